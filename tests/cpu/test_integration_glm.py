"""tile_mhc under Hugging Face's GLM-5.3, held against the original forwards."""

import copy
import inspect
import threading

import pytest
import torch

from tile_mhc import UnsupportedError
from tile_mhc.integrations import transformers as integration

pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")
from tile_mhc._recompute_group import RecomputeGroup
from tile_mhc.integrations.transformers import _recompute_layers
from tiny_deepseek import CPU, beside, cast_parameters, distance, step
from tiny_glm import CLASSES, LAYERS, layers_of, make_ids, make_model, modeling

BOUNDARIES = 2 * LAYERS - 1


def one_step(**apart):
    """What a step calls, with so many of its boundaries apart, by the reason."""
    count = sum(apart.values())
    reasons = {f"separate ({why})": times for why, times in apart.items()}
    both = {CPU: 1 + count}
    whole = {CPU: BOUNDARIES - count}
    return {"boundary": whole | reasons, "head": {CPU: 1}, "post": both, "pre": both}


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()
    _recompute_layers._waiting.group = None


def report_of(run):
    """What `run` counts by itself, and what it returns."""
    integration.unpatch()
    with integration.patch():
        result = run()
        return integration.backend_report(), result


def logits_of(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


def assert_near(found, expected):
    """Logits and gradients of two float32 steps."""
    assert distance(found[0], expected[0]) <= 1e-5
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert distance(found[1][name], grad, beside(name, expected[1])) <= 2e-4, name


def test_float32_model_is_unchanged():
    model, ids = make_model(), make_ids()
    expected = step(model, ids)
    report, found = report_of(lambda: step(model, ids))
    assert report == one_step()
    assert_near(found, expected)
    with integration.patch():
        step(model, ids)
        of_models = integration.backend_report(by_model=True)
    assert of_models["glm5_next"] == {"served": list(CLASSES), "not_served": {}, "calls": report}
    assert of_models["deepseek_v4"]["calls"] == {}


def test_bfloat16_models_are_no_further_from_float32_than_the_originals():
    """Of several, as linear attention in bfloat16 scatters; with nothing discrete to choose."""
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(4):
        exact, ids = make_model(index_topk=128, num_experts_per_tok=4), make_ids(2, 64)
        model = cast_parameters(exact, torch.bfloat16)
        logits, grads = step(exact, ids)
        original = step(model, ids)
        report, ours = report_of(lambda model=model, ids=ids: step(model, ids))
        assert report == one_step()
        for at, (found, found_grads) in enumerate((original, ours)):
            both = (torch.cat([g[name].flatten() for name in grads]) for g in (found_grads, grads))
            errors[at] += torch.tensor([distance(found, logits), distance(*both)]) ** 2
    ratio = (errors[1] / errors[0]).sqrt()
    assert ratio[0] <= 1.1
    assert ratio[1] <= 1.2


def test_bfloat16_checkpoint(tmp_path):
    """Its `fn` is bfloat16, before 5.24 the gates are too."""
    make_model().bfloat16().save_pretrained(tmp_path)
    model = type(make_model()).from_pretrained(tmp_path, dtype="auto").eval()
    assert layers_of(model)[0].attn_hc.fn.dtype == torch.bfloat16
    ids = make_ids()
    with torch.no_grad():
        exact = logits_of(copy.deepcopy(model).float(), ids)
        original = logits_of(model, ids)
        report, ours = report_of(lambda: logits_of(model, ids))
    assert report == one_step()
    assert ours.dtype == original.dtype
    assert 0 < distance(ours, exact) <= 0.5
    assert distance(ours, original) <= distance(original, exact) + distance(ours, exact)


@pytest.mark.parametrize(
    ("own", "asked"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_streams_dtype_reaches_the_operators_and_nothing_else(own, asked):
    exact, ids = make_model(index_topk=128, num_experts_per_tok=4), make_ids()
    model = cast_parameters(exact, own)
    truth = logits_of(exact, ids)
    streams, inputs = [], []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, args, output: streams.append(output[0].dtype))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0].dtype))
    norm = model.model.language_model.norm
    norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0].dtype))
    with integration.patch(streams_dtype=asked):
        logits, grads = step(model, ids)
        assert integration.backend_report() == one_step(**{"hooks on a layer": LAYERS - 1})
    assert streams == [asked] * (LAYERS - 1) + [own]
    assert inputs == [own] * (2 * LAYERS + 1)
    assert 0 < distance(logits, truth) <= 3e-2
    assert all(grad.isfinite().all() for grad in grads.values())


def test_generation():
    model, prompt = make_model().eval(), make_ids(1, 9)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, use_cache=True, **options)
    report, found = report_of(lambda: model.generate(prompt, use_cache=True, **options))
    assert torch.equal(found, expected)
    assert report == {call: {CPU: 4 * counts[CPU]} for call, counts in one_step().items()}


def test_hidden_states_are_streams_and_later_calls_are_whole_again():
    model, ids = make_model().eval(), make_ids()

    def recorded():
        return model(ids, use_cache=False, output_hidden_states=True).hidden_states

    expected = recorded()
    report, found = report_of(recorded)
    assert report == one_step(**{"hidden states are recorded": LAYERS - 1})
    assert [tuple(h.shape) for h in found] == [(2, 24, 4, 64)] * LAYERS + [(2, 24, 64)]
    assert all(distance(*pair) <= 1e-5 for pair in zip(found, expected, strict=True))
    assert report_of(lambda: logits_of(model, ids))[0] == one_step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, ids = make_model(), make_ids()
    ran = []
    for layer in layers_of(model):
        layer.mlp.register_forward_hook(lambda *call: ran.append(call[0]))
    expected = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran.clear()
    report, found = report_of(lambda: step(model, ids))
    assert len(ran) == 2 * LAYERS
    twice = 2 * (2 * LAYERS)
    assert report["post"] == report["pre"] | {CPU: twice // 2}
    assert report["boundary"] == {"separate (checkpointing)": LAYERS - 1, CPU: 2 * LAYERS}
    assert_near(found, expected)


@pytest.mark.parametrize(("layers", "groups"), [(1, [3, 4, 4, 5]), (3, [11, 5]), (9, [16])])
def test_recompute_groups_give_the_same_bits(layers, groups, monkeypatch):
    model, ids = make_model(), make_ids()
    counts, close = [], RecomputeGroup.close

    def counted(group):
        counts.append(len(group._all))
        close(group)

    monkeypatch.setattr(RecomputeGroup, "close", counted)
    _, (logits, grads) = report_of(lambda: step(model, ids))
    with integration.patch(recompute_layers=layers):
        found = step(model, ids)
    assert counts == groups
    assert torch.equal(found[0], logits)
    assert all(torch.equal(found[1][name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_on_a_layer_see_streams_and_leave_the_bits(dtype):
    model, ids, seen = cast_parameters(make_model(), dtype).eval(), make_ids(), []
    _, together = report_of(lambda: logits_of(model, ids))
    layer = layers_of(model)[1]
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    report, apart = report_of(lambda: logits_of(model, ids))
    assert report == one_step(**{"hooks on a layer": 2})
    assert torch.equal(together, apart)
    ((streams, indices),) = seen
    assert (streams.shape, streams.dtype) == ((2, 24, 4, 64), dtype)
    assert indices is not None  # for the layer after it


def test_sharded_by_changed_classes_and_with_captured_forwards():
    model, ids = make_model().eval(), make_ids()
    expected = logits_of(model, ids)
    for layer in layers_of(model):
        layer.__class__ = type("FSDPLayer", (type(layer),), {})
    report, found = report_of(lambda: logits_of(model, ids))
    assert report == one_step()
    assert distance(found, expected) <= 1e-5
    connection = layers_of(model)[1].ffn_hc
    connection.forward = connection.forward
    report, found = report_of(lambda: logits_of(model, ids))
    assert report == one_step(**{"a hyper-connection has another forward": 1})
    assert distance(found, expected) <= 1e-5
    integration.unpatch()
    assert torch.equal(logits_of(model, ids), expected)


def test_without_a_kernel_it_has_the_bits_of_the_original():
    model, ids = cast_parameters(make_model(hc_mult=3), torch.bfloat16), make_ids()
    logits, grads = step(model, ids)
    report, (ours, our_grads) = report_of(lambda: step(model, ids))
    why = "no kernel for n=3, H=64"
    assert report.pop("boundary") == {f"separate ({why})": BOUNDARIES}
    assert {each for counts in report.values() for each in counts} == {f"transformers ({why})"}
    assert torch.equal(ours, logits)
    assert all(torch.equal(our_grads[name], grad) for name, grad in grads.items())


def test_compiled():
    """With linear attention alone: transformers' sparse one breaks the graph, patched or not."""
    linear = {"layer_types": ["linear_attention"] * 2, "indexer_types": ["full"] * 2}
    model = make_model(num_hidden_layers=2, mlp_layer_types=["dense"] * 2, **linear).eval()
    model, ids = model.model.language_model, make_ids(1, 8)
    with torch.no_grad():
        _, eager = report_of(lambda: model(ids, use_cache=False).last_hidden_state)
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
        report, found = report_of(lambda: compiled(ids, use_cache=False).last_hidden_state)
    once = {CPU: 1}
    assert report == {"boundary": {CPU: 3}, "head": once, "post": once, "pre": once}
    assert distance(found, eager) <= 1e-5


def test_undone_while_a_model_runs():
    """What was handed on is written by the post before the original layer goes on."""
    model, ids = make_model().eval(), make_ids()
    functions = [inspect.unwrap(getattr(modeling, name).forward) for name in CLASSES]
    codes = [function.__code__ for function in functions]
    expected = logits_of(model, ids)
    inside, undone = threading.Event(), threading.Event()
    found = []

    def wait(*_):
        inside.set()
        undone.wait(30)

    handle = layers_of(model)[0].mlp.register_forward_hook(wait)
    integration.patch()
    assert all(f.__code__ is not code for f, code in zip(functions, codes, strict=True))
    with torch.no_grad():
        thread = threading.Thread(target=lambda: found.append(logits_of(model, ids)))
        thread.start()
        assert inside.wait(30)
        integration.unpatch()
        assert not integration.is_patched()
        undone.set()
        thread.join(60)
    handle.remove()
    assert distance(found[0], expected) <= 1e-5
    assert [function.__code__ for function in functions] == codes
    assert torch.equal(logits_of(model, ids), expected)


def test_changed_signature_patches_no_model(monkeypatch):
    def forward(self, hidden_states, mask):
        raise NotImplementedError(self, hidden_states, mask)

    monkeypatch.setattr(modeling.Glm5NextTextDecoderLayer, "forward", forward)
    message = (
        r"Glm5NextTextDecoderLayer.forward must take \(self, hidden_states, attention_mask, .*"
        r"got \(self, hidden_states, mask\) in transformers .* models=\[...\] leaves a model out"
    )
    with pytest.raises(UnsupportedError, match=message):
        integration.patch()
    assert not integration.is_patched()
    with integration.patch(models=["deepseek_v4"]):
        assert integration.is_patched()
        report = integration.backend_report(by_model=True)
        assert report["glm5_next"]["not_served"] == {"glm5_next": "not patched"}
