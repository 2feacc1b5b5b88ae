"""TileLang under Hugging Face's GLM-5.3 and HY-V4 on a GPU."""

import pytest
import torch

from tile_mhc.integrations import transformers as integration

pytest.importorskip("transformers.models.hy_v4.modeling_hy_v4")
import tiny_glm
import tiny_hy
from building import MAKERS, build, ours_of, register
from tiny_deepseek import beside, cast_parameters, distance, step

HIDDEN, TOKENS = 256, 160
# Nothing discrete to choose: what differs in the last bits stays so.
WHOLE = {"hidden_size": HIDDEN, "index_topk": 256, "num_experts_per_tok": 4}
BOUNDARIES = 2 * tiny_glm.LAYERS - 1
SUBLAYERS = 2 * tiny_hy.LAYERS
ONE_STEP = {
    "glm5_next": {"boundary": BOUNDARIES, "head": 1, "post": 1, "pre": 1},
    "hy_v4": {"head": 1, "post": SUBLAYERS, "pre": SUBLAYERS},
    "hy_v4_vl": {"head": 1, "post": SUBLAYERS, "pre": SUBLAYERS},
}


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


@pytest.fixture(params=ONE_STEP)
def kind(request):
    tiny_hy.skip_absent(request.param)
    return request.param


def make_model(kind, **changes):
    return MAKERS[kind](**WHOLE | changes).cuda()


def make_ids(batch=2, length=TOKENS):
    return tiny_hy.make_ids(batch, length).cuda()


def layers_of(model):
    return getattr(model.model, "language_model", model.model).layers


def steps(kind, times=1):
    return {call: {"TileLang": times * count} for call, count in ONE_STEP[kind].items()}


def together(grads, names):
    return torch.cat([grads[name].flatten() for name in names])


def test_float32_model(kind):
    """The projection takes the weight as two bfloat16 parts: 1e-5, where float32 has 1e-6."""
    model, ids = make_model(kind), make_ids()
    logits, grads = step(model, ids)
    integration.patch()
    ours, our_grads = step(model, ids)
    assert integration.backend_report() == steps(kind)
    assert distance(ours, logits) <= 3e-4
    assert our_grads.keys() == grads.keys()
    assert distance(together(our_grads, grads), together(grads, grads)) <= 1e-3
    for name, grad in grads.items():
        if "hc" in name:
            assert distance(our_grads[name], grad, beside(name, grads)) <= 5e-3, name


@pytest.mark.parametrize("hyper", [torch.float32, torch.bfloat16])
def test_bfloat16_models_are_no_further_from_float32_than_the_originals(kind, hyper):
    """Of several, as linear attention in bfloat16 scatters."""
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(4):
        exact, ids = make_model(kind), make_ids()
        model = cast_parameters(exact, torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "hc" in name:
                parameter.data = parameter.data.to(hyper)
        logits, grads = step(exact, ids)
        original = step(model, ids)
        with integration.patch():
            ours = step(model, ids)
            assert integration.backend_report() == steps(kind)
        truth = together(grads, grads)
        for at, (found, found_grads) in enumerate((original, ours)):
            pair = distance(found, logits), distance(together(found_grads, grads), truth)
            errors[at] += torch.tensor(pair, dtype=torch.float64) ** 2
    ratio = (errors[1] / errors[0]).sqrt()
    assert ratio[0] <= 1.1
    assert ratio[1] <= 1.2


def test_generation_with_a_cache(kind):
    model = cast_parameters(make_model(kind), torch.bfloat16).eval()
    prompt = make_ids(1, 40)
    integration.patch()
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
    assert integration.backend_report() == steps(kind, 6)
    assert tokens.shape == (1, 46)
    with torch.no_grad():
        logits = model(tokens[:, :-1], use_cache=False).logits[:, 39:].float()
    # Prefill and decode round differently: the chosen token is the best, or tied with it.
    chosen = logits.gather(-1, tokens[:, 40:, None]).squeeze(-1)
    assert (chosen >= logits.amax(-1) - 0.15 * logits.std(-1)).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    model, ids, ran = make_model(kind), make_ids(), []
    for layer in layers_of(model):
        layer.mlp.register_forward_hook(lambda *call: ran.append(call[0]))
    integration.patch()
    logits, grads = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran.clear()
    again, again_grads = step(model, ids)
    assert len(ran) == 2 * len(layers_of(model))
    assert distance(again, logits) <= 1e-4
    # Not the same bits: some of transformers' own backwards add with atomics.
    assert distance(together(again_grads, grads), together(grads, grads)) <= 1e-3
    backends = {each for counts in integration.backend_report().values() for each in counts}
    assert backends <= {"TileLang", "separate (checkpointing)"}


def test_recompute_groups_of_glm():
    model, ids = make_model("glm5_next"), make_ids()
    with integration.patch():
        logits, grads = step(model, ids)
    with integration.patch(recompute_layers=2):
        found, found_grads = step(model, ids)
        assert integration.backend_report() == steps("glm5_next")
    # Not the same bits: some of transformers' own sums are atomics.
    assert distance(found, logits) <= 1e-5
    assert distance(together(found_grads, grads), together(grads, grads)) <= 1e-3


def test_streams_dtype_in_a_float32_model(kind):
    model, ids = make_model(kind), make_ids()
    truth = model(ids, use_cache=False).logits
    with integration.patch(streams_dtype=torch.bfloat16):
        logits, grads = step(model, ids)
        assert integration.backend_report() == steps(kind)
    assert logits.dtype == torch.float32
    assert 0 < distance(logits, truth) <= 3e-2
    assert all(grad.isfinite().all() for grad in grads.values())


def test_built_with_the_mapping(kind, monkeypatch):
    from transformers import monkey_patching

    model, ids = make_model(kind).eval(), make_ids()
    register(monkeypatch, kind)
    try:
        built = build(model)
    finally:
        monkey_patching.clear_patch_mapping()
    assert ours_of(built) == set(integration.patch_mapping([kind]))
    with torch.no_grad():
        found = built(ids, use_cache=False).logits
        with integration.patch(models=[kind]):
            expected = model(ids, use_cache=False).logits
            assert integration.backend_report() == steps(kind)
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("hidden_size", [HIDDEN, 4096])
def test_connection_of_hy_is_no_further_from_float32_than_the_original(hidden_size):
    exact = tiny_hy.make_connection(hidden_size=hidden_size).cuda()
    streams = torch.randn(2, 33, 4, hidden_size, device="cuda").bfloat16()
    upstream = [torch.randn(2, 33, 4), torch.randn(2, 33, hidden_size).bfloat16()]

    def evaluate(x):
        x = x.detach().requires_grad_()
        outputs = exact(x)
        leaves = [x, *exact.parameters()]
        given = [g.to(o) for g, o in zip(upstream, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, given)]

    truth, original = evaluate(streams.float()), evaluate(streams)
    integration.patch()
    ours = evaluate(streams)
    assert integration.backend_report() == {"pre": {"TileLang": 1}}
    names = ["post_mix", "layer_input", "streams", *(n for n, _ in exact.named_parameters())]
    bias = truth[names.index("base")]
    for name, mine, theirs, exactly in zip(names, ours, original, truth, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        unit = bias if name == "scale" else None  # which may cancel: of the same terms as the bias
        bound = 1.1 * distance(theirs, exactly, unit) + 3e-5
        assert distance(mine, exactly, unit) <= bound, name
