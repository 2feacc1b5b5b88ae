"""tile_mhc under Hugging Face's HY-V4, with and without vision, held against the original."""

import copy
import inspect

import pytest
import torch

from tile_mhc.integrations import transformers as integration

pytest.importorskip("transformers.models.hy_v4.modeling_hy_v4")
from tile_mhc.integrations.transformers import _hy_v4
from tile_mhc.integrations.transformers._models import FAMILIES
from tiny_deepseek import CPU, beside, cast_parameters, distance, magnitudes, step
from tiny_hy import (
    KINDS,
    LAYERS,
    NAMES,
    class_of,
    layers_of,
    make_connection,
    make_ids,
    make_model,
    skip_absent,
)

ONE_STEP = {"head": {CPU: 1}, "post": {CPU: 2 * LAYERS}, "pre": {CPU: 2 * LAYERS}}


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


@pytest.fixture(params=KINDS)
def kind(request):
    skip_absent(request.param)
    return request.param


def report_of(run):
    """What `run` counts by itself, and what it returns."""
    integration.unpatch()
    with integration.patch():
        result = run()
        return integration.backend_report(), result


def logits_of(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize("num_streams", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_connection_matches_the_original(kind, num_streams, dtype):
    exact = make_connection(kind, num_streams)
    module = cast_parameters(exact, dtype)
    streams = torch.randn(2, 5, num_streams, 64).bfloat16()
    upstream = [torch.randn(2, 5, num_streams), torch.randn(2, 5, 64).bfloat16()]

    def evaluate(connection, x):
        x = x.detach().requires_grad_()
        outputs = connection(x)
        upstream_grads = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        leaves = {"streams": x, **dict(connection.named_parameters())}
        arguments = outputs, list(leaves.values()), upstream_grads
        grads = torch.autograd.grad(*arguments, retain_graph=True)
        named = dict(zip(("post_mix", "layer_input"), outputs, strict=True))
        units = dict(zip(leaves, magnitudes(*arguments), strict=True))
        return named | dict(zip(leaves, grads, strict=True)), units

    truth, units = evaluate(exact, streams.float())
    original, _ = evaluate(module, streams)
    report, (ours, _) = report_of(lambda: evaluate(module, streams))
    assert report == {"pre": {CPU: 1}}
    for name, exactly in truth.items():
        mine, theirs, unit = ours[name], original[name], units.get(name)
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        bound = 1.1 * distance(theirs, exactly, unit) + 2e-6
        assert distance(mine, exactly, unit) <= bound, name


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_post_has_the_bits_of_a_line_of_the_original(dtype, of):
    """Which adds in float32, and gives back the dtype of the streams whatever the output has."""
    streams, output = torch.randn(2, 5, 4, 64).to(dtype), torch.randn(2, 5, 64).to(of)
    post_mix = torch.rand(2, 5, 4)
    integration.patch()
    ours = _hy_v4.post(FAMILIES["hy_v4"], output, streams, post_mix)
    added = post_mix.unsqueeze(-1) * output.float().unsqueeze(-2) + streams.float()
    assert ours.dtype == dtype
    assert torch.equal(ours, added.to(dtype))


def test_float32_model_is_unchanged(kind):
    model, ids = make_model(kind), make_ids()
    logits, grads = step(model, ids)
    report, (ours, our_grads) = report_of(lambda: step(model, ids))
    assert report == ONE_STEP
    assert distance(ours, logits) <= 1e-5
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert distance(our_grads[name], grad, beside(name, grads)) <= 1e-4, name


@pytest.mark.parametrize("hyper", [torch.float32, torch.bfloat16])
def test_bfloat16_model_is_no_further_from_float32_than_the_original(kind, hyper):
    """With nothing discrete to choose. `hc` stays float32 in what transformers loads."""
    exact, ids = make_model(kind, index_topk=128, num_experts_per_tok=4), make_ids(2, 64)
    model = cast_parameters(exact, torch.bfloat16)
    if hyper == torch.float32:
        for name, parameter in model.named_parameters():
            if "hc" in name:
                parameter.data = parameter.data.float()
    logits, grads = step(exact, ids)

    def together(named):
        return torch.cat([named[name].flatten() for name in grads])

    original, original_grads = step(model, ids)
    report, (ours, our_grads) = report_of(lambda: step(model, ids))
    assert report == ONE_STEP
    assert distance(ours, logits) <= 1.1 * distance(original, logits)
    truth = together(grads)
    bound = 1.1 * distance(together(original_grads), truth)
    assert distance(together(our_grads), truth) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint(kind, dtype, tmp_path):
    make_model(kind).to(dtype).save_pretrained(tmp_path)
    model = type(make_model(kind)).from_pretrained(tmp_path, dtype="auto").eval()
    assert layers_of(model)[0].attn_hc.fn.dtype == torch.float32
    ids = make_ids()
    with torch.no_grad():
        original = logits_of(model, ids)
        report, ours = report_of(lambda: logits_of(model, ids))
    assert report == ONE_STEP
    assert ours.dtype == original.dtype
    assert distance(ours, original) <= (1e-5 if dtype == torch.float32 else 0.3)


def test_streams_dtype_reaches_the_operators_and_nothing_else(kind):
    model, ids = make_model(kind, index_topk=128, num_experts_per_tok=4), make_ids()
    truth = logits_of(model, ids)
    streams, inputs = [], []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, args, output: streams.append(output[0].dtype))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0].dtype))
    with integration.patch(streams_dtype=torch.bfloat16):
        logits, grads = step(model, ids)
        assert integration.backend_report() == ONE_STEP
    assert streams == [torch.bfloat16] * (LAYERS - 1) + [torch.float32]
    assert inputs == [torch.float32] * (2 * LAYERS)
    assert logits.dtype == torch.float32
    assert 0 < distance(logits, truth) <= 3e-2
    assert all(grad.isfinite().all() for grad in grads.values())


def test_generation(kind):
    model, prompt = make_model(kind).eval(), make_ids(1, 9)
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    expected = model.generate(prompt, **options)
    report, found = report_of(lambda: model.generate(prompt, **options))
    assert torch.equal(found, expected)
    assert report == {call: {CPU: 4 * counts[CPU]} for call, counts in ONE_STEP.items()}


def test_hidden_states(kind):
    model, ids = make_model(kind).eval(), make_ids()

    def recorded():
        return model(ids, use_cache=False, output_hidden_states=True).hidden_states

    expected = recorded()
    report, found = report_of(recorded)
    assert report == ONE_STEP
    assert [tuple(h.shape) for h in found] == [(2, 24, 4, 64)] * LAYERS + [(2, 24, 64)]
    assert all(distance(*pair) <= 1e-5 for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(kind, reentrant):
    model, ids, ran = make_model(kind), make_ids(), []
    for layer in layers_of(model):
        layer.mlp.register_forward_hook(lambda *call: ran.append(call[0]))
    _, (logits, grads) = report_of(lambda: step(model, ids))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran.clear()
    report, found = report_of(lambda: step(model, ids))
    assert len(ran) == 2 * LAYERS
    assert report == ONE_STEP | {call: {CPU: 4 * LAYERS} for call in ("post", "pre")}
    assert torch.equal(found[0], logits)
    assert all(torch.equal(found[1][name], grad) for name, grad in grads.items())


def test_recompute_layers_leave_it_as_it_is_and_say_so(kind):
    model, ids = make_model(kind), make_ids()
    _, (logits, grads) = report_of(lambda: step(model, ids))
    with integration.patch(recompute_layers=2):
        found = step(model, ids)
        report = integration.backend_report()
    none = "none (streams that are not mixed are not made again)"
    assert report == ONE_STEP | {"recompute": {none: LAYERS}}
    assert torch.equal(found[0], logits)
    assert all(torch.equal(found[1][name], grad) for name, grad in grads.items())


class Louder(torch.nn.Module):
    """A connection of somebody's own, in the place of the original."""

    def __init__(self, connection):
        super().__init__()
        self.connection = connection

    def forward(self, streams):
        post_mix, layer_input = self.connection(streams)
        return post_mix, 2 * layer_input


def hook_the_connection(layer):
    layer.ffn_hc.register_forward_hook(lambda module, args, output: (output[0], 2 * output[1]))


def replace_the_connection(layer):
    layer.ffn_hc = Louder(layer.ffn_hc)


def hook_the_norm(layer):
    layer.ffn_hc.input_norm.register_forward_hook(lambda module, args, output: 2 * output)


def give_the_connection_another_magnitude(layer):
    layer.ffn_hc.hc_post_magnitude = torch.tensor(3.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_the_connection, ""),
        (replace_the_connection, ""),
        (hook_the_norm, "input_norm has hooks"),
        (give_the_connection_another_magnitude, "a magnitude that is no number"),
    ],
)
def test_what_an_operator_would_pass_over(kind, change, reason):
    model, ids = make_model(kind), make_ids()
    change(layers_of(model)[1])
    logits, grads = step(model, ids)
    report, (ours, our_grads) = report_of(lambda: step(model, ids))
    pre = {CPU: 2 * LAYERS}
    if reason:
        pre = {CPU: 2 * LAYERS - 1, f"transformers ({reason})": 1}
    assert report == ONE_STEP | {"pre": pre}
    assert distance(ours, logits) <= 1e-5
    for name, grad in grads.items():
        assert distance(our_grads[name], grad, beside(name, grads)) <= 1e-4, name


def test_without_a_kernel_it_has_the_bits_of_the_original(kind):
    model, ids = cast_parameters(make_model(kind, hc_mult=3), torch.bfloat16), make_ids()
    logits, grads = step(model, ids)
    report, (ours, our_grads) = report_of(lambda: step(model, ids))
    none = "transformers (no kernel for n=3, H=64)"
    assert report == {call: {none: counts[CPU]} for call, counts in ONE_STEP.items()}
    assert torch.equal(ours, logits)
    assert all(torch.equal(our_grads[name], grad) for name, grad in grads.items())


def test_autocast_does_not_touch_the_mixing(kind):
    connection, streams = make_connection(kind), torch.randn(2, 5, 4, 64)
    integration.patch()
    exact = connection(streams)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = connection(streams)
    assert all(torch.equal(a, b) for a, b in zip(exact, ours, strict=True))


def test_compiled_connection(kind):
    connection, streams = make_connection(kind), torch.randn(2, 5, 4, 64).requires_grad_()
    compiled = torch.compile(copy.deepcopy(connection), backend="aot_eager", fullgraph=True)
    original = compiled(streams)
    integration.patch()
    eager = connection(streams)
    ours = compiled(streams)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))
    assert all(distance(a, b) <= 2e-6 for a, b in zip(ours, original, strict=True))
    assert integration.backend_report() == {"pre": {CPU: 2}}


def test_the_patch_goes_in_and_out(kind):
    names = [f"{NAMES[kind]}{each}" for each in ("HyperConnection", "HyperHead", "DecoderLayer")]
    classes = [class_of(kind, name.removeprefix(NAMES[kind])) for name in names]
    functions = [inspect.unwrap(cls.forward) for cls in classes]
    codes = [function.__code__ for function in functions]
    model, ids = make_model(kind).eval(), make_ids()
    expected = logits_of(model, ids)
    with integration.patch(models=[kind]):
        assert distance(logits_of(model, ids), expected) <= 1e-5
        report = integration.backend_report(by_model=True)[kind]
        assert report == {"served": names, "not_served": {}, "calls": ONE_STEP}
        assert all(f.__code__ is not code for f, code in zip(functions, codes, strict=True))
    assert [function.__code__ for function in functions] == codes
    assert torch.equal(logits_of(model, ids), expected)
