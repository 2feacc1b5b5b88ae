"""Whom `patch()` and `unpatch()` reach: whatever holds a forward, whenever it was taken."""

import copy
import functools

import pytest
import torch

from tile_mhc import UnsupportedError
from tile_mhc.integrations import transformers as integration
from tile_mhc.integrations.transformers import _manifold

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
from tiny_deepseek import (
    CLASSES,
    CPU,
    FAMILY,
    ONE_STEP,
    distance,
    make_connection,
    make_model,
    modeling,
    one_step,
)

IDS = torch.arange(48).view(2, 24) % 32


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def calls(model):
    """What a forward counts, and its logits."""
    before = integration.backend_report()
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    after = integration.backend_report()
    for call, backends in before.items():
        for backend, count in backends.items():
            after[call][backend] -= count
    return {c: {b: n for b, n in counts.items() if n} for c, counts in after.items()}, logits


def assert_follows_the_patch(model, expected=ONE_STEP):
    """The model, made or changed outside of a patch, goes in and out of it."""
    counts, original = calls(model)
    assert not any(counts.values())
    for _ in range(2):
        with integration.patch():
            counts, logits = calls(model)
        assert counts == expected
        assert distance(logits, original) <= 1e-5
        counts, logits = calls(model)
        assert not any(counts.values())
        assert torch.equal(logits, original)


def test_functions_stay_and_get_their_code_back():
    functions = [getattr(modeling, name).forward for name in CLASSES]
    before = [function.__code__ for function in functions]
    model = make_model()
    _, original = calls(model)
    integration.patch()
    assert integration.is_patched()
    integration.patch()
    assert [getattr(modeling, name).forward for name in CLASSES] == functions
    assert calls(model)[0] == ONE_STEP
    integration.unpatch()
    integration.unpatch()
    assert not integration.is_patched()
    assert [getattr(modeling, name).forward for name in CLASSES] == functions
    assert [function.__code__ for function in functions] == before
    assert torch.equal(calls(model)[1], original)


def capture(module):
    """As accelerate's `add_hook_to_module`: keep the bound forward, and set a partial instead."""
    module._old_forward = module.forward

    def hooked(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    partial = functools.partial(hooked, module)
    module.forward = functools.update_wrapper(partial, module._old_forward)


def capture_all(model):
    for module in model.modules():
        # Those without a state need no device of their own: accelerate leaves them out.
        if module.state_dict():
            capture(module)
    return model


def change_classes(model):
    """As FSDP2's `fully_shard`: a class made of the module's takes its place."""
    for layer in model.model.layers:
        kind = type(layer)
        layer.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})
    return model


def deepcopied(model):
    return copy.deepcopy(capture_all(model))


# Who holds a forward has it called.
CAPTURED = one_step(
    **{
        "a hyper-connection has another forward": 2,
        "not in a model with layers of transformers alone": 1,
    }
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(capture_all, CAPTURED), (change_classes, ONE_STEP), (deepcopied, CAPTURED)],
)
def test_forwards_taken_before(change, expected):
    assert_follows_the_patch(change(make_model()), expected)


@pytest.mark.parametrize(
    ("change", "expected"), [(capture_all, CAPTURED), (change_classes, ONE_STEP)]
)
def test_forwards_taken_under_the_patch(change, expected):
    with integration.patch():
        model = change(make_model())
        assert calls(model)[0] == expected
    assert_follows_the_patch(model, expected)


@pytest.mark.parametrize("when", ["before", "under"])
def test_offloaded_by_accelerate(when):
    accelerate = pytest.importorskip("accelerate")
    model = make_model().eval()
    if when == "under":
        integration.patch()
    model = accelerate.cpu_offload(model, execution_device="cpu")
    integration.unpatch()
    # It holds the forward of a module that has parameters itself, which a layer has not.
    expected = one_step(**{"a hyper-connection has another forward": 3})
    assert_follows_the_patch(model, expected)


@pytest.fixture
def one_process():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("when", ["before", "under"])
def test_sharded_by_fsdp2(one_process, when):
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    if when == "under":
        integration.patch()
    for layer in model.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(model, mesh=one_process)
    integration.unpatch()
    assert_follows_the_patch(model, one_step(**{"hooks on a layer": 1}))


class Around(torch.nn.Module):
    def __init__(self, connection):
        super().__init__()
        self.connection = connection

    def forward(self, streams):
        return self.connection(streams)[0] + 1


@pytest.mark.parametrize("when", ["before", "under"])
def test_compiled(when, monkeypatch):
    module = Around(make_connection())
    streams = torch.randn(2, 5, 4, 64)
    original = module(streams)
    monkeypatch.setattr(_manifold, "POST_MULT", 6.0)  # tells ours from transformers'
    expected = 3 * (original - 1) + 1
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    if when == "before":
        torch.testing.assert_close(compiled(streams), original)
    for _ in range(2):
        with integration.patch():
            torch.testing.assert_close(compiled(streams), expected)
            torch.testing.assert_close(compiled(streams), expected)
            assert integration.backend_report() == {"pre": {CPU: 1}}
        torch.testing.assert_close(compiled(streams), original)


def test_compiled_model_before():
    model = make_model(
        num_hidden_layers=1, layer_types=["sliding_attention"], mlp_layer_types=["hash_moe"]
    ).eval()
    compiled = torch.compile(model, backend="eager")
    _, original = calls(compiled)
    with integration.patch():
        counts, logits = calls(compiled)
        assert counts.keys() == ONE_STEP.keys()
        assert distance(logits, original) <= 1e-5
    counts, logits = calls(compiled)
    assert not any(counts.values())
    assert torch.equal(logits, original)


def test_subclass_is_served_through_super_and_may_have_a_forward_of_its_own():
    class Louder(modeling.DeepseekV4HyperConnection):
        def forward(self, hidden_streams):
            post_mix, comb_mix, layer_input = super().forward(hidden_streams)
            return post_mix, comb_mix, 2 * layer_input

    class Own(modeling.DeepseekV4HyperConnection):
        def forward(self, hidden_streams):
            return hidden_streams.sum()

    connection = make_connection()
    streams = torch.randn(1, 3, 4, 64)
    with integration.patch():
        plain = connection(streams)[2]
        connection.__class__ = Louder
        assert torch.equal(connection(streams)[2], 2 * plain)
        assert integration.backend_report() == {"pre": {CPU: 2}}
        connection.__class__ = Own
        assert torch.equal(connection(streams), streams.sum())
        assert integration.backend_report() == {"pre": {CPU: 2}}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_checkpointing_recomputes_every_layer_and_saves_little(reentrant, sharded):
    model = make_model(num_hidden_layers=3, layer_types=["sliding_attention"] * 3,
                       mlp_layer_types=["hash_moe"] * 3)  # fmt: skip
    if sharded:
        change_classes(model)
    ran = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *call: ran.append(call[0].layer_idx))
        # Without checkpointing, too, the boundaries between layers are apart: for the same bits.
        layer.register_forward_hook(lambda *call: None)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def one_step():
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        ran.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(IDS, labels=IDS, use_cache=False)
        held = sum(saved.values())
        output.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return output.logits.detach(), grads, list(ran), held

    integration.patch()
    logits, grads, layers, held = one_step()
    assert layers == [0, 1, 2]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, again_grads, layers, held_again = one_step()
    assert layers == [0, 1, 2, 2, 1, 0]  # each again in the backward
    report = integration.backend_report()
    assert report["post"] == {CPU: 3 + 6}
    why = {"separate (hooks on a layer)": 2, "separate (checkpointing)": 2}
    assert report["boundary"] == {CPU: 3 + 6} | why
    assert held_again < held / 3
    assert torch.equal(logits, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))
    integration.unpatch()
    assert held_again <= one_step()[3]


def test_later_patch_stands_and_the_report_of_ours_is_true(monkeypatch):
    connection = make_connection()
    streams = torch.randn(1, 3, 4, 64)
    integration.patch()
    original = modeling.DeepseekV4HyperConnection.forward
    with monkeypatch.context() as later:
        later.setattr(
            modeling.DeepseekV4HyperConnection, "forward", lambda self, x: original(self, x)[2]
        )
        assert not integration.is_patched()
        connection(streams)
        assert integration.backend_report() == {"pre": {CPU: 1}}
        integration.unpatch()
        connection(streams)
        assert integration.backend_report() == {"pre": {CPU: 1}}
    assert modeling.DeepseekV4HyperConnection.forward is original
    assert not integration.is_patched()


def test_forward_that_is_not_transformers_own(monkeypatch):
    def forward(self, hidden_streams):
        raise NotImplementedError(self, hidden_streams)

    code = forward.__code__
    monkeypatch.setattr(modeling.DeepseekV4HyperConnection, "forward", forward)
    message = (
        rf"patch: DeepseekV4HyperConnection.forward must be the one of {modeling.__name__}; "
        rf"got <function .*forward at .*> of {__name__}. Undo the other patch first"
    )
    with pytest.raises(UnsupportedError, match=message):
        integration.patch()
    assert forward.__code__ is code
    assert not integration.is_patched()
    monkeypatch.undo()
    # Nor one whose code another copy of this module has taken.
    function = modeling.DeepseekV4HyperHead.forward
    monkeypatch.setattr(function, "__code__", FAMILY.code_of(FAMILY.forwards["head"]))
    with pytest.raises(UnsupportedError, match=r"DeepseekV4HyperHead\.forward must be the one of"):
        integration.patch()
