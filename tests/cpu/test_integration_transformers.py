"""tile_mhc under Hugging Face's DeepSeek-V4, held against the original forwards."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tile_mhc import UnsupportedError, functional
from tile_mhc.integrations import transformers as integration
from tile_mhc.integrations.transformers import _manifold
from tile_mhc.integrations.transformers._models import FAMILIES

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
from tiny_deepseek import (
    CPU,
    ONE_STEP,
    beside,
    cast_parameters,
    distance,
    magnitudes,
    make_connection,
    make_head,
    make_model,
    mix,
    modeling,
    one_step,
    step,
)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "deepseek_v4.py"
sys.path.insert(0, str(SCRIPT.parent))  # it imports its neighbour as scripts do


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def load_script():
    spec = importlib.util.spec_from_file_location("deepseek_v4", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["deepseek_v4"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_import_leaves_transformers_alone():
    code = (
        "import sys, tile_mhc, tile_mhc.integrations.transformers\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("num_streams", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_connection_matches_the_original(num_streams, dtype):
    exact = make_connection(num_streams)
    module = cast_parameters(exact, dtype)
    streams = torch.randn(2, 5, num_streams, 64).bfloat16()
    upstream = [
        torch.randn(2, 5, num_streams),
        torch.randn(2, 5, num_streams, num_streams),
        torch.randn(2, 5, 64).bfloat16(),
    ]

    def evaluate(connection, x):
        x = x.detach().requires_grad_()
        outputs = connection(x)
        upstream_grads = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        leaves = {"streams": x, **dict(connection.named_parameters())}
        arguments = outputs, list(leaves.values()), upstream_grads
        grads = torch.autograd.grad(*arguments, retain_graph=True)
        named = dict(zip(("post_mix", "comb_mix", "layer_input"), outputs, strict=True))
        units = dict(zip(leaves, magnitudes(*arguments), strict=True))
        return named | dict(zip(leaves, grads, strict=True)), units

    truth, units = evaluate(exact, streams.float())
    original, _ = evaluate(module, streams)
    integration.patch()
    ours, _ = evaluate(module, streams)
    assert integration.backend_report() == {"pre": {CPU: 1}}
    for name, exactly in truth.items():
        mine, theirs, unit = ours[name], original[name], units.get(name)
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        bound = 1.1 * distance(theirs, exactly, unit) + 2e-6
        assert distance(mine, exactly, unit) <= bound, name


def test_head_matches_the_original():
    head = make_head()
    streams = torch.randn(2, 5, 4, 64).bfloat16().requires_grad_()
    leaves = {"streams": streams, **dict(head.named_parameters())}
    original = head(streams)
    upstream = torch.randn_like(original)
    arguments = [original], list(leaves.values()), [upstream]
    original_grads = torch.autograd.grad(*arguments, retain_graph=True)
    units = magnitudes(*arguments)
    integration.patch()
    ours = head(streams)
    assert torch.equal(ours, original)  # one rounding of one float32 sum each
    grads = torch.autograd.grad(ours, leaves.values(), upstream)
    for name, mine, theirs, unit in zip(leaves, grads, original_grads, units, strict=True):
        assert mine.dtype == theirs.dtype
        assert distance(mine, theirs, unit) <= (4e-3 if mine.dtype == torch.bfloat16 else 2e-6), (
            name
        )
    assert integration.backend_report() == {"head": {CPU: 1}}


def test_float32_model_is_unchanged():
    model = make_model()
    ids = torch.randint(32, (2, 24))
    logits, grads = step(model, ids)
    integration.patch()
    patched_logits, patched_grads = step(model, ids)
    assert distance(patched_logits, logits) <= 1e-5
    assert grads.keys() == patched_grads.keys()
    for name, grad in grads.items():
        assert distance(patched_grads[name], grad, beside(name, grads)) <= 1e-4, name
    assert integration.backend_report() == ONE_STEP


@pytest.mark.parametrize("hyper", [torch.float32, torch.bfloat16])
def test_bfloat16_model_is_no_further_from_float32_than_the_original(hyper):
    exact = make_model()
    model = cast_parameters(exact, torch.bfloat16)
    if hyper == torch.float32:
        for name, parameter in model.named_parameters():
            if "hc" in name:
                parameter.data = parameter.data.float()
    ids = torch.randint(32, (2, 64))
    logits, grads = step(exact, ids)
    names = list(grads)

    def all_grads(named):
        return torch.cat([named[name].flatten() for name in names])

    original_logits, original_grads = step(model, ids)
    integration.patch()
    ours_logits, ours_grads = step(model, ids)
    assert distance(ours_logits, logits) <= 1.1 * distance(original_logits, logits)
    ours, original, truth = map(all_grads, (ours_grads, original_grads, grads))
    assert distance(ours, truth) <= 1.1 * distance(original, truth)
    assert integration.backend_report() == ONE_STEP
    step(model, ids)
    assert integration.backend_report()["boundary"] == {CPU: 6}


@pytest.mark.parametrize(
    ("num_streams", "hidden_size", "dtype", "reason"),
    [
        (3, 64, torch.bfloat16, "no kernel for n=3, H=64"),
        (4, 16448, torch.bfloat16, "no kernel for n=4, H=16448"),
        (4, 64, torch.float64, "float64 streams"),
    ],
)
def test_streams_without_a_kernel_are_left_to_transformers(num_streams, hidden_size, dtype, reason):
    connection = make_connection(num_streams, hidden_size)
    head = make_head(num_streams, hidden_size)
    streams = torch.randn(1, 7, num_streams, hidden_size).to(dtype)
    layer_output = torch.randn(1, 7, hidden_size).to(dtype)
    post_mix, comb_mix, layer_input = connection(streams)
    hidden = head(streams)
    integration.patch()
    ours = connection(streams)
    original = (post_mix, comb_mix, layer_input)
    assert all(torch.equal(a, b) for a, b in zip(ours, original, strict=True))
    assert torch.equal(head(streams), hidden)
    assert layer_input.dtype == hidden.dtype == dtype
    mixed = mix(layer_output, streams, post_mix, comb_mix)
    assert mixed.dtype == dtype
    expected = post_mix[..., None] * layer_output[..., None, :].float()
    expected = expected + torch.einsum("btij,btih->btjh", comb_mix, streams.float())
    assert distance(mixed, expected) <= (6e-3 if dtype.itemsize == 2 else 2e-6)
    backend = {f"transformers ({reason})": 1}
    assert integration.backend_report() == {"head": backend, "post": backend, "pre": backend}


def test_model_without_a_kernel_has_the_bits_of_the_original():
    model = cast_parameters(make_model(hc_mult=3), torch.bfloat16)
    ids = torch.randint(32, (2, 24))
    logits, grads = step(model, ids)
    for streams_dtype in (None, torch.float16):
        with integration.patch(streams_dtype=streams_dtype):
            ours, our_grads = step(model, ids)
            report = integration.backend_report()
        assert torch.equal(ours, logits)
        assert all(torch.equal(our_grads[name], grads[name]) for name in grads)
        why = "no kernel for n=3, H=64"
        assert report.pop("boundary") == {f"separate ({why})": 3}
        assert {backend for counts in report.values() for backend in counts} == {
            f"transformers ({why})"
        }


class Doubled(torch.nn.Module):
    """A norm of another kind, with the one attribute that the original has."""

    eps = 1e-6

    def forward(self, x):
        return 2 * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def replace_norm(module, _):
    module.input_norm = Doubled()


def replace_forward_of_the_norm(module, _):
    module.input_norm.forward = Doubled().forward


def replace_forward_of_its_class(_, monkeypatch):
    monkeypatch.setattr(modeling.DeepseekV4UnweightedRMSNorm, "forward", Doubled.forward)


def subclass_norm(module, _):
    class Half(modeling.DeepseekV4UnweightedRMSNorm):
        def forward(self, x):
            return super().forward(x) / 2

    module.input_norm = Half()


def hook_norm(module, _):
    module.input_norm.register_forward_hook(lambda norm, args, output: output * 2)


def hook_input_of_the_norm(module, _):
    module.input_norm.register_forward_pre_hook(lambda norm, args: (args[0] + 1,))


def hook_gradient_of_the_norm(module, _):
    module.input_norm.register_full_backward_hook(lambda norm, grads, _: (grads[0] * 2,))


def hook_gradient_into_the_norm(module, _):
    module.input_norm.register_full_backward_pre_hook(lambda norm, grads: (grads[0] * 2,))


def make_eps_a_tensor(module, _):
    module.input_norm.eps = torch.tensor(1e-2)


def make_other_eps_a_tensor(module, _):
    module.eps = module.hc_eps = torch.tensor(1e-2)


@pytest.mark.parametrize("kind", ["connection", "head"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_norm, "input_norm is Doubled"),
        (subclass_norm, "input_norm is Half"),
        (replace_forward_of_the_norm, "input_norm has another forward"),
        (replace_forward_of_its_class, "input_norm has another forward"),
        (hook_norm, "input_norm has hooks"),
        (hook_input_of_the_norm, "input_norm has hooks"),
        (hook_gradient_of_the_norm, "input_norm has hooks"),
        (hook_gradient_into_the_norm, "input_norm has hooks"),
        (make_eps_a_tensor, "an eps that is no number"),
        (make_other_eps_a_tensor, "an eps that is no number"),
    ],
)
def test_what_an_operator_would_pass_over_is_left_to_transformers(
    kind, change, reason, monkeypatch
):
    module = make_connection() if kind == "connection" else make_head()
    change(module, monkeypatch)
    streams = torch.randn(2, 5, 4, 64, requires_grad=True)
    leaves = [streams, *module.parameters()]

    def evaluate():
        outputs = module(streams)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad([o.square().sum() for o in outputs], leaves)

    original = evaluate()
    with integration.patch():
        ours = evaluate()
        report = integration.backend_report()
    assert all(torch.equal(a, b) for a, b in zip(ours, original, strict=True))
    call = "pre" if kind == "connection" else "head"
    assert report == {call: {f"transformers ({reason})": 1}}


@pytest.mark.parametrize("steps", [-1, 0, 1, 1024, 1025])
def test_steps_of_sinkhorn_without_a_kernel_are_left_to_transformers(steps):
    connection = make_connection()
    connection.hc_sinkhorn_iters = steps
    streams = torch.randn(1, 3, 4, 64)
    original = connection(streams)
    integration.patch()
    ours = connection(streams)
    assert all(distance(a, b) <= 2e-6 for a, b in zip(ours, original, strict=True))
    has_kernel = 1 <= steps <= 1024
    backend = CPU if has_kernel else f"transformers (no kernel for hc_sinkhorn_iters={steps})"
    assert integration.backend_report() == {"pre": {backend: 1}}


def test_one_hooked_norm_leaves_the_rest_patched():
    model = make_model()
    hook_norm(model.model.layers[1].ffn_hc, None)
    ids = torch.randint(32, (2, 24))
    logits, _ = step(model, ids)
    integration.patch()
    ours, _ = step(model, ids)
    assert distance(ours, logits) <= 1e-5
    hooked = "transformers (input_norm has hooks)"
    expected = one_step(**{"input_norm has hooks": 1})
    assert integration.backend_report() == expected | {"pre": {CPU: 1, hooked: 1}}


def test_hooks_for_all_modules_do_not_see_the_norm_that_does_not_run():
    connection = make_connection()
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module)
    )
    try:
        integration.patch()
        connection(torch.randn(1, 3, 4, 64))
    finally:
        handle.remove()
    assert seen == [connection]
    assert integration.backend_report() == {"pre": {CPU: 1}}


def test_parametrized_weight_is_served():
    class Scaled(torch.nn.Module):
        def forward(self, weight):
            return weight * 1.5

    connection = make_connection()
    torch.nn.utils.parametrize.register_parametrization(connection, "fn", Scaled())
    streams = torch.randn(2, 5, 4, 64)
    original = connection(streams)
    integration.patch()
    ours = connection(streams)
    assert all(distance(a, b) <= 2e-6 for a, b in zip(ours, original, strict=True))
    assert integration.backend_report() == {"pre": {CPU: 1}}


def test_non_contiguous_streams():
    connection = make_connection()
    streams = torch.randn(5, 2, 4, 64).bfloat16().transpose(0, 1)
    integration.patch()
    ours = connection(streams)
    dense = connection(streams.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_a_cache(dtype):
    model = cast_parameters(make_model(), dtype).eval()
    prompt = torch.randint(32, (1, 9))
    options = {"max_new_tokens": 6, "do_sample": False}
    original = model.generate(prompt, use_cache=True, **options)
    integration.patch()
    ours = model.generate(prompt, use_cache=True, **options)
    uncached = model.generate(prompt, use_cache=False, **options)
    assert ours.shape == (1, 15)
    if dtype == torch.float32:
        assert torch.equal(ours, original)
    assert torch.equal(ours, uncached)
    assert sum(integration.backend_report()["head"].values()) == 12


def test_evaluation_without_grad_gives_the_same_bits():
    model = cast_parameters(make_model(), torch.bfloat16).eval()
    ids = torch.randint(32, (2, 24))
    integration.patch()
    with_grad = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, with_grad)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, with_grad)


def test_compiled_connection_and_mixing():
    connection = make_connection()

    class SubLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.connection = connection

        def forward(self, streams):
            post_mix, comb_mix, layer_input = self.connection(streams)
            return mix(layer_input, streams, post_mix, comb_mix)

    streams = torch.randn(2, 5, 4, 64).bfloat16().requires_grad_()
    integration.patch()
    layer = SubLayer()
    eager = layer(streams)
    upstream = torch.randn_like(eager)
    leaves = [streams, *connection.parameters()]
    eager_grads = torch.autograd.grad(eager, leaves, upstream)
    compiled_layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled = compiled_layer(streams)
        grads = torch.autograd.grad(compiled, leaves, upstream)
    assert torch.equal(compiled, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))
    # Traced once, so counted once: the counter does not make it compile again.
    assert integration.backend_report() == {"post": {CPU: 2}, "pre": {CPU: 2}}


def test_compiled_model():
    model = cast_parameters(make_model(), torch.bfloat16).eval()
    ids = torch.randint(32, (1, 24))
    integration.patch()
    with torch.no_grad():
        eager = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager")(ids, use_cache=False).logits
    assert torch.equal(compiled, eager)


def test_parameters_and_hooks_stay():
    model = make_model()
    names = list(model.state_dict())
    seen = []
    model.model.layers[0].attn_hc.register_forward_hook(lambda *call: seen.append(len(call)))
    integration.patch()
    output = model(torch.randint(32, (1, 8)), output_hidden_states=True)
    assert list(model.state_dict()) == names
    assert seen == [3]
    assert [tuple(h.shape) for h in output.hidden_states[:2]] == [(1, 8, 4, 64)] * 2


def test_missing_transformers(monkeypatch):
    with monkeypatch.context() as without:
        for family in FAMILIES.values():
            without.setitem(sys.modules, family.modeling_name, None)
        message = "patch: transformers must be installed and have .*deepseek_v4 .5.17 to 5.24 have"
        with pytest.raises(ImportError, match=message):
            integration.patch()
    assert not integration.is_patched()


def test_missing_class(monkeypatch):
    monkeypatch.delattr(modeling, "DeepseekV4HyperHead")
    with pytest.raises(UnsupportedError, match="must have the class DeepseekV4HyperHead"):
        integration.patch()
    assert not integration.is_patched()


def test_changed_signature_patches_nothing(monkeypatch):
    original = modeling.DeepseekV4HyperConnection.forward

    def forward(self, hidden_states, mask):
        raise NotImplementedError(self, hidden_states, mask)

    monkeypatch.setattr(modeling.DeepseekV4DecoderLayer, "forward", forward)
    message = (
        r"DeepseekV4DecoderLayer.forward must take \(self, hidden_states, input_ids, \*\*kwargs\).*"
        r"got \(self, hidden_states, mask\) in transformers"
    )
    with pytest.raises(UnsupportedError, match=message):
        integration.patch()
    assert modeling.DeepseekV4HyperConnection.forward is original
    assert not integration.is_patched()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Streams are read, written and mixed. " * 40)
    return path


def test_script_agrees(capsys, text):
    arguments = ["--device", "cpu", "--text", str(text), "--length", "160"]
    assert load_script().main([*arguments, "--steps", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    backends = [run["backend"] for run in report["runs"]]
    assert backends == [
        "transformers", CPU,
        "transformers", CPU,
        "transformers", CPU,
    ]  # fmt: skip
    assert all(run["grads_cosine"] > 0.99 for run in report["runs"])
    assert all(run["loss_last"] < run["loss_first"] for run in report["runs"])
    assert not integration.is_patched()


def test_table_of_the_script(capsys, text, monkeypatch):
    script = load_script()
    # Of one model: the numbers are those that JSON has.
    monkeypatch.setattr(script, "MODELS", ("float32",))
    arguments = ["--device", "cpu", "--text", str(text), "--length", "160", "--steps", "1"]
    assert script.main(arguments) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if CPU in line] == ["float32"]
    assert out.endswith("\nagreement\n")


def test_script_finds_a_wrong_direction(capsys, text, monkeypatch):
    def transposed(family, layer_output, streams, post_mix, comb_mix):
        return functional.mhc_post(layer_output, streams, post_mix, comb_mix.mT.contiguous())

    monkeypatch.setattr(_manifold, "post", transposed)
    script = load_script()
    monkeypatch.setattr(script, "MODELS", ("bfloat16",))
    arguments = ["--device", "cpu", "--text", str(text), "--length", "160", "--steps", "1"]
    assert script.main(arguments) == 1
    out = capsys.readouterr().out
    assert "NO AGREEMENT" in out
    assert "bfloat16: logits must be within" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--device", "nonsense"], "--device must name a usable device"),
        (["--text", "/nowhere/at/all"], "--text must name a file"),
    ],
)
def test_script_bad_usage(capsys, text, arguments, message):
    with pytest.raises(SystemExit) as stop:
        load_script().main(["--text", str(text), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
