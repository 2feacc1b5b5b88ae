"""One op a boundary between the layers of Hugging Face's DeepSeek-V4, and where it must not be."""

import copy
import inspect
import threading

import pytest
import torch

from tile_mhc.integrations import transformers as integration
from tile_mhc.integrations.transformers import _decoder_stack, _stand_ins

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
from tiny_deepseek import (
    CLASSES,
    CPU,
    ONE_STEP,
    beside,
    cast_parameters,
    distance,
    make_model,
    modeling,
    one_step,
    step,
)

IDS = torch.arange(48).view(2, 24) % 32


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def report_of(run):
    """What `run` counts by itself, and what it returns."""
    integration.unpatch()
    with integration.patch():
        result = run()
        return integration.backend_report(), result


def logits_of(model):
    return model(IDS, use_cache=False).logits


def test_a_deeper_stack_is_one_boundary_an_op():
    model = make_model(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "compressed_sparse_attention"] * 2,
        mlp_layer_types=["hash_moe"] * 4,
    )
    logits, grads = step(model, IDS)
    report, (ours, our_grads) = report_of(lambda: step(model, IDS))
    assert report == {"boundary": {CPU: 7}, "head": {CPU: 1}, "post": {CPU: 1}, "pre": {CPU: 1}}
    assert distance(ours, logits) <= 1e-5
    assert our_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert distance(our_grads[name], grad, beside(name, grads)) <= 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_layers_apart(dtype):
    model = cast_parameters(make_model(), dtype).eval()
    _, together = report_of(lambda: logits_of(model))
    model.model.layers[1].register_forward_pre_hook(lambda *call: None)
    report, apart = report_of(lambda: logits_of(model))
    assert report == one_step(**{"hooks on a layer": 1})
    assert torch.equal(together, apart)


def test_hidden_states_are_streams_and_later_calls_are_whole_again():
    model = make_model().eval()

    def recorded():
        return model(IDS, use_cache=False, output_hidden_states=True).hidden_states

    expected = recorded()
    report, found = report_of(recorded)
    assert report == one_step(**{"hidden states are recorded": 1})
    assert [tuple(h.shape) for h in found] == [(2, 24, 4, 64)] * 2 + [(2, 24, 64)]
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) <= 1e-5
    # transformers' hooks are still there.
    assert report_of(lambda: logits_of(model))[0] == ONE_STEP
    model.config.output_hidden_states = True
    assert report_of(lambda: logits_of(model))[0] == report


def test_checkpointing_is_for_training():
    model = make_model()
    model.gradient_checkpointing_enable()
    report, (_, grads) = report_of(lambda: step(model, IDS))
    assert report["boundary"]["separate (checkpointing)"] == 1
    model.gradient_checkpointing_disable()
    _, (_, plain) = report_of(lambda: step(model, IDS))
    assert all(distance(grads[name], plain[name], beside(name, plain)) <= 1e-4 for name in plain)
    model.gradient_checkpointing_enable()
    assert report_of(lambda: logits_of(model.eval()))[0] == ONE_STEP


def test_generation():
    model = make_model().eval()
    prompt = torch.randint(32, (1, 9))
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    expected = model.generate(prompt, **options)
    report, found = report_of(lambda: model.generate(prompt, **options))
    assert torch.equal(found, expected)
    assert report == {call: {CPU: 4 * counts[CPU]} for call, counts in ONE_STEP.items()}


def on_layer(register):
    return lambda model, hook: getattr(model.model.layers[0], register)(hook)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_on_a_layer_see_streams(register):
    model, seen = make_model(), []

    def hook(module, *call):
        seen.extend(value[0] if isinstance(value, tuple) else value for value in call[-1:])

    getattr(model.model.layers[0], register)(hook)
    report, _ = report_of(lambda: step(model, IDS))
    assert report == one_step(**{"hooks on a layer": 1})
    assert [tuple(value.shape) for value in seen if value is not None] == [(2, 24, 4, 64)]


def test_hooks_for_all_modules_see_every_module():
    model, seen = make_model(), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append((module, output))
    )
    try:
        report, _ = report_of(lambda: logits_of(model))
    finally:
        handle.remove()
    assert report == one_step(
        **{"hooks for all modules": 1, "hooks on a hyper-connection": 2},
    )
    modules = [module for module, _ in seen]
    for layer in model.model.layers:
        assert {layer, layer.attn_hc, layer.ffn_hc} <= set(modules)
    assert not any(isinstance(output, _decoder_stack.Pending) for _, output in seen)


@pytest.mark.parametrize("name", ["attn_hc", "ffn_hc"])
def test_a_hook_on_a_hyper_connection_changes_what_it_returns(name):
    model = make_model().eval()
    getattr(model.model.layers[1], name).register_forward_hook(
        lambda module, args, output: (*output[:2], 2 * output[2])
    )
    expected = logits_of(model)
    report, found = report_of(lambda: logits_of(model))
    assert report == one_step(**{"hooks on a hyper-connection": 1})
    assert distance(found, expected) <= 1e-5


class Louder(modeling.DeepseekV4HyperConnection):
    def forward(self, hidden_streams):
        post_mix, comb_mix, layer_input = super().forward(hidden_streams)
        return post_mix, comb_mix, 2 * layer_input


class Watched(modeling.DeepseekV4DecoderLayer):
    def forward(self, *args, **kwargs):
        self.seen = args, set(kwargs)
        return super().forward(*args, **kwargs)


def test_subclasses_with_a_forward_of_their_own():
    model = make_model().eval()
    model.model.layers[1].attn_hc.__class__ = Louder
    expected = logits_of(model)
    report, found = report_of(lambda: logits_of(model))
    assert report == one_step(**{"a hyper-connection has another forward": 1})
    assert distance(found, expected) <= 1e-5
    layer = model.model.layers[1]
    layer.__class__ = Watched
    expected = logits_of(model)
    kwargs = layer.seen[1]
    report, found = report_of(lambda: logits_of(model))
    assert report == one_step(**{"not in a model with layers of transformers alone": 1})
    assert distance(found, expected) <= 1e-5
    assert layer.seen[1] == kwargs  # not ours, which only our layers take
    assert isinstance(layer.seen[0][0], torch.Tensor)


def test_layers_in_another_order_do_not_hand_on():
    model = make_model().eval()
    model.model.layers = model.model.layers[::-1]
    expected = logits_of(model)
    report, found = report_of(lambda: logits_of(model))
    assert report["boundary"]["separate (not in a model with layers of transformers alone)"] == 1
    assert distance(found, expected) <= 1e-5


def test_a_models_forward_that_is_not_transformers_own(monkeypatch):
    """All but the boundaries between layers works as ever."""
    model = make_model().eval()
    original = modeling.DeepseekV4Model.forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(modeling.DeepseekV4Model, "forward", forward)
    code = inspect.unwrap(original).__code__
    report, _ = report_of(lambda: logits_of(model))
    assert report == one_step(**{"not in a model with layers of transformers alone": 1})
    assert inspect.unwrap(original).__code__ is code
    monkeypatch.undo()
    assert report_of(lambda: logits_of(model))[0] == ONE_STEP
    assert inspect.unwrap(original).__code__ is code


def test_the_models_signature_stays():
    function = inspect.unwrap(modeling.DeepseekV4Model.forward)
    before, code = inspect.signature(function), function.__code__
    names = [list(inspect.signature(f).parameters) for f in _stand_ins.MODEL]
    assert list(before.parameters) in names
    with integration.patch():
        assert function.__code__ is not code
        assert inspect.signature(function).parameters.keys() == before.parameters.keys()
        found = inspect.signature(function).parameters.values()
        assert [p.default for p in found] == [p.default for p in before.parameters.values()]
    assert function.__code__ is code


@pytest.mark.parametrize("again", [False, True], ids=["undone", "patched again"])
def test_undone_while_a_model_runs(again):
    """A model that has handed on runs to its end; then transformers has its code back."""
    model = make_model().eval()
    functions = [inspect.unwrap(getattr(modeling, name).forward) for name in CLASSES]
    codes = [function.__code__ for function in functions]
    expected = logits_of(model)
    inside, undone = threading.Event(), threading.Event()
    found = []

    def wait(*_):
        inside.set()
        undone.wait(30)

    handle = model.model.layers[0].mlp.register_forward_hook(wait)
    integration.patch()
    swapped = [function.__code__ for function in functions]
    with torch.no_grad():
        thread = threading.Thread(target=lambda: found.append(logits_of(model)))
        thread.start()
        assert inside.wait(30)
        integration.unpatch()
        assert not integration.is_patched()
        if again:
            integration.patch()
        undone.set()
        thread.join(60)
    handle.remove()
    assert distance(found[0], expected) <= 1e-5
    assert integration.is_patched() is again
    assert [function.__code__ for function in functions] == (swapped if again else codes)
    assert report_of(lambda: logits_of(model))[0] == ONE_STEP
    assert torch.equal(logits_of(model), expected)


def test_compiled_whole():
    model = cast_parameters(make_model(), torch.bfloat16).eval()
    _, eager = report_of(lambda: logits_of(model))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        report, found = report_of(lambda: logits_of(compiled))
    assert report == ONE_STEP
    assert torch.equal(found, eager)
