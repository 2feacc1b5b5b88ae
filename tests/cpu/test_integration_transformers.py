"""tile_mhc under Hugging Face's DeepSeek-V4, held against the original forwards."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oracle
from cases import CONTRACT, FUSED_PRE
from tile_mhc import UnsupportedError, functional
from tile_mhc.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip(integration.MODELING)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "deepseek_v4.py"
sys.path.insert(0, str(SCRIPT.parent))  # it imports its neighbour as scripts do
CPU = "reference (on cpu)"


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def make_config(**changes):
    fields = {
        "vocab_size": 32,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "hash_moe"],
        "sliding_window": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    return transformers.DeepseekV4Config(**fields)


def make_model(**changes):
    model = transformers.DeepseekV4ForCausalLM(make_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base"):
                parameter.normal_()
            parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # zeros at first: the same expert twice
                buffer.copy_(torch.rand(32, 4).argsort(-1)[:, :2])
    return model.train()


def make_connection(num_streams=4, hidden_size=64):
    connection = modeling.DeepseekV4HyperConnection(
        make_config(hc_mult=num_streams, hidden_size=hidden_size)
    )
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.bfloat16().float()
    return connection


def cast_parameters(module, dtype):
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def step(model, ids):
    """The logits and every gradient of one training step, as float32."""
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.logits.detach().float(), grads


def distance(value, truth):
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


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


def test_patch_twice_then_unpatch_twice_restores_the_originals():
    names = ["DeepseekV4HyperConnection", "DeepseekV4HyperHead", "DeepseekV4DecoderLayer"]
    before = [getattr(modeling, name).forward for name in names]
    assert not integration.is_patched()
    integration.patch()
    patched = [getattr(modeling, name).forward for name in names]
    assert integration.is_patched()
    assert not set(patched) & set(before)
    integration.patch()
    assert [getattr(modeling, name).forward for name in names] == patched
    integration.unpatch()
    integration.unpatch()
    assert [getattr(modeling, name).forward for name in names] == before
    assert not integration.is_patched()


def test_with_block_undoes_only_its_own_patch():
    with integration.patch():
        with integration.patch():
            pass
        assert integration.is_patched()
    assert not integration.is_patched()
    with pytest.raises(KeyError), integration.patch():
        raise KeyError
    assert not integration.is_patched()


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
        grads = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        leaves = [x, *connection.parameters()]
        return outputs, torch.autograd.grad(outputs, leaves, grads)

    truth = evaluate(exact, streams.float())
    original = evaluate(module, streams)
    integration.patch()
    ours = evaluate(module, streams)
    assert integration.backend_report() == {"pre": {CPU: 1}}
    tensors = {"residual": streams, "weight": exact.fn, "scale": exact.scale, "bias": exact.base}
    options = {"post_mult": 2.0, "sinkhorn_repeat": exact.hc_sinkhorn_iters}
    arguments = tensors, options, [upstream[2], *upstream[:2]]
    _, terms = oracle.terms_of(FUSED_PRE, *arguments)
    summed = {"base": terms["grad_bias"], "scale": terms["grad_scale"]}
    names = [None] * 4 + [name for name, _ in module.named_parameters()]
    for name, mine, theirs, exactly in zip(
        names,
        sum(map(tuple, ours), ()),
        sum(map(tuple, original), ()),
        sum(map(tuple, truth), ()),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        error, their_error = (
            oracle.relative_error(value.detach(), exactly.detach().double(), summed.get(name))
            for value in (mine, theirs)
        )
        assert error <= 1.1 * their_error + 2e-6


def test_head_matches_the_original():
    head = modeling.DeepseekV4HyperHead(make_config())
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    streams = torch.randn(2, 5, 4, 64).bfloat16().requires_grad_()
    leaves = [streams, *head.parameters()]
    original = head(streams)
    upstream = torch.randn_like(original)
    original_grads = torch.autograd.grad(original, leaves, upstream)
    integration.patch()
    ours = head(streams)
    assert torch.equal(ours, original)  # one rounding of one float32 sum each
    grads = torch.autograd.grad(ours, leaves, upstream)
    names = {"hc_fn": "weight", "hc_scale": "scale", "hc_base": "bias"}
    tensors = {names[name]: p.detach() for name, p in head.named_parameters()}
    tensors["residual"] = streams.detach()
    _, terms = oracle.terms_of(CONTRACT, tensors, {}, [upstream])
    keys = ["residual", *(names[name] for name, _ in head.named_parameters())]
    for key, mine, theirs in zip(keys, grads, original_grads, strict=True):
        assert mine.dtype == theirs.dtype
        error = oracle.relative_error(mine, theirs.double(), terms.get(f"grad_{key}"))
        assert error <= (4e-3 if mine.dtype == torch.bfloat16 else 2e-6)
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
        assert distance(patched_grads[name], grad) <= 1e-4, name
    assert integration.backend_report() == {"head": {CPU: 1}, "post": {CPU: 4}, "pre": {CPU: 4}}


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
    assert integration.backend_report() == {"head": {CPU: 1}, "post": {CPU: 4}, "pre": {CPU: 4}}
    step(model, ids)
    assert integration.backend_report()["post"] == {CPU: 8}


@pytest.mark.parametrize(
    ("num_streams", "hidden_size", "dtype", "reason"),
    [
        (3, 64, torch.bfloat16, "no kernel for n=3, H=64"),
        (4, 16448, torch.bfloat16, "no kernel for n=4, H=16448"),
        (4, 64, torch.float64, "float64 streams"),
    ],
)
def test_what_no_kernel_takes_runs_the_reference(num_streams, hidden_size, dtype, reason):
    connection = make_connection(num_streams, hidden_size)
    streams = torch.randn(1, 7, num_streams, hidden_size).to(dtype)
    original = connection(streams)
    integration.patch()
    ours = connection(streams)
    for mine, theirs in zip(ours, original, strict=True):
        assert distance(mine, theirs) <= (4e-3 if dtype.itemsize == 2 else 2e-6)
    assert ours[2].dtype == dtype
    mixed = integration._post(ours[2], streams, ours[0], ours[1])
    assert mixed.dtype == dtype
    backend = {f"reference ({reason})": 1}
    assert integration.backend_report() == {"post": backend, "pre": backend}


def test_float32_layer_output_widens_the_streams():
    streams = torch.randn(1, 7, 4, 64).bfloat16()
    layer_output = torch.randn(1, 7, 64)
    post_mix, comb_mix = torch.rand(1, 7, 4), torch.rand(1, 7, 4, 4)
    mixed = integration._post(layer_output, streams, post_mix, comb_mix)
    assert mixed.dtype == torch.float32
    expected = post_mix[..., None] * layer_output[..., None, :]
    expected = expected + torch.einsum("btij,btih->btjh", comb_mix, streams.float())
    torch.testing.assert_close(mixed, expected)


def test_streams_dtype_reaches_the_operators_from_a_float32_model():
    model = make_model()
    ids = torch.randint(32, (2, 24))
    logits, _ = step(model, ids)
    with integration.patch(streams_dtype=torch.bfloat16):
        ours, grads = step(model, ids)
        report = integration.backend_report()
    assert report == {"head": {CPU: 1}, "post": {CPU: 4}, "pre": {CPU: 4}}
    assert 0 < distance(ours, logits) <= 2e-2
    assert all(grad.isfinite().all() for grad in grads.values())
    with integration.patch():
        step(model, ids)
        assert integration.backend_report() == {"head": {CPU: 1}, "post": {CPU: 4}, "pre": {CPU: 4}}


def test_bad_streams_dtype():
    with pytest.raises(ValueError, match="streams_dtype must be a floating point dtype"):
        integration.patch(streams_dtype=torch.int8)
    assert not integration.is_patched()
    integration.patch()
    with pytest.raises(ValueError, match="streams_dtype must be None, as in the patch in force"):
        integration.patch(streams_dtype=torch.bfloat16)


def test_autocast_does_not_touch_the_mixing():
    connection = make_connection()
    streams = torch.randn(2, 5, 4, 64)
    integration.patch()
    for dtype in (torch.bfloat16, torch.float32):
        exact = connection(streams.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = connection(streams.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(exact, ours, strict=True))


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(reentrant):
    model = cast_parameters(make_model(), torch.bfloat16)
    ids = torch.randint(32, (2, 24))
    integration.patch()
    logits, grads = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, again_grads = step(model, ids)
    assert torch.equal(logits, again)
    assert grads.keys() == again_grads.keys()
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)
    # Twice in the first step's place: each layer ran again in the backward.
    assert integration.backend_report()["post"] == {CPU: 12}


def test_compiled_connection_and_mixing():
    connection = make_connection()

    class SubLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.connection = connection

        def forward(self, streams):
            post_mix, comb_mix, layer_input = self.connection(streams)
            return integration._post(layer_input, streams, post_mix, comb_mix)

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
    monkeypatch.setitem(sys.modules, integration.MODELING, None)
    with pytest.raises(ImportError, match="patch: transformers must be installed and have"):
        integration.patch()


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


def test_unpatch_refuses_to_drop_a_later_patch(monkeypatch):
    integration.patch()
    with monkeypatch.context() as later:
        later.setattr(modeling.DeepseekV4HyperHead, "forward", torch.nn.Identity.forward)
        with pytest.raises(RuntimeError, match=r"DeepseekV4HyperHead\.forward must be the one"):
            integration.unpatch()
        assert integration.is_patched()
    integration.unpatch()
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
    assert load_script().main([*arguments, "--steps", "1"]) == 0
    assert "agreement" in capsys.readouterr().out


def test_script_finds_a_wrong_direction(capsys, text, monkeypatch):
    def transposed(layer_output, streams, post_mix, comb_mix):
        return functional.mhc_post(layer_output, streams, post_mix, comb_mix.mT.contiguous())

    monkeypatch.setattr(integration, "_post", transposed)
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
