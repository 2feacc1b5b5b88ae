"""Classes for transformers' `register_patch_mapping`: who is built with them is served."""

import contextlib
import copy
import pickle
import sys

import pytest
import torch

from tile_mhc.integrations import transformers as integration

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
from transformers import monkey_patching

import tiny_deepseek
from building import MAKERS, build, ours_of, register
from tiny_deepseek import CPU, beside, cast_parameters, distance, step
from tiny_hy import make_ids


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()
    monkey_patching.clear_patch_mapping()
    integration.patch(models=["deepseek_v4"])  # forgets what was counted
    integration.unpatch()


@pytest.fixture(params=MAKERS)
def kind(request):
    pytest.importorskip(f"transformers.models.{request.param}")
    return request.param


@pytest.fixture
def model(kind):
    """One of transformers', made first: what holds others makes them by from_config, too."""
    return MAKERS[kind]()


@pytest.fixture
def registered(kind, model, monkeypatch):
    register(monkeypatch, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_built_model_has_the_bits_of_a_patched_one(model, kind, registered, dtype):
    model, ids = cast_parameters(model, dtype), make_ids()
    with integration.patch(models=[kind]):
        expected = step(model, ids)
        report = integration.backend_report()
    integration.patch(models=["deepseek_v4"])
    integration.unpatch()
    built = build(model)
    found = step(built, ids)
    assert integration.backend_report() == report
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
    assert ours_of(built) == set(integration.patch_mapping(models=[kind]))
    assert not ours_of(model)


def test_other_models_stay_as_they_are(model, kind, registered):
    """Before and after, and where the mapping has been taken back."""
    ids = make_ids()
    expected = step(model, ids)
    built = build(model)
    monkey_patching.unregister_patch_mapping(list(integration.patch_mapping(models=[kind])))
    later = build(model)
    assert not ours_of(later)
    for other in (model, later):
        logits, grads = step(other, ids)
        assert torch.equal(logits, expected[0])
        assert all(torch.equal(grads[name], grad) for name, grad in expected[1].items())
    assert integration.backend_report() == {}
    assert distance(step(built, ids)[0], expected[0]) <= 1e-5
    assert integration.backend_report() != {}


def test_hidden_states_are_recorded_of_models_with_and_without_it(model, kind, registered):
    """transformers lists our class among what is recorded, and never takes it back."""
    model, ids = model.eval(), make_ids()
    built = build(model)
    monkey_patching.clear_patch_mapping()
    later = build(model)
    found = [
        each(ids, use_cache=False, output_hidden_states=True).hidden_states
        for each in (model, built, later)
    ]
    assert len(found[0]) > 2
    for states in found[1:]:
        assert all(distance(*pair) <= 1e-5 for pair in zip(states, found[0], strict=True))


def test_saved_and_loaded(model, kind, registered, tmp_path):
    model, ids = model.eval(), make_ids()
    expected = model(ids, use_cache=False).logits
    build(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert ours_of(loaded)
    assert distance(loaded(ids, use_cache=False).logits, expected) <= 1e-5
    assert loaded.config.architectures == [type(model).__name__]
    monkey_patching.clear_patch_mapping()
    assert not ours_of(type(model).from_pretrained(tmp_path))


def test_initial_values_are_transformers_own(model, kind, registered):
    built = type(model)._from_config(copy.deepcopy(model.config))
    scales = [p for name, p in built.named_parameters() if "_hc" in name and name.endswith("scale")]
    assert scales
    value = 0.01 if kind.startswith("hy") else 1.0
    assert all((scale == value).all() for scale in scales)


def test_checkpointing(model, kind, registered):
    ids = make_ids()
    logits, grads = step(model, ids)
    built = build(model)
    built.gradient_checkpointing_enable({"use_reentrant": False})
    ran = []
    layers = [m for m in built.modules() if type(m).__name__.endswith("DecoderLayer")]
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *call: ran.append(call[0]))
    found = step(built, ids)
    assert len(ran) == 2 * len(layers)
    assert distance(found[0], logits) <= 1e-5
    for name, grad in grads.items():
        assert distance(found[1][name], grad, beside(name, grads)) <= 2e-4, name


def test_beside_a_patch(model, kind, registered):
    """Whose arguments hold for built models too, as long as it is in force."""
    ids = make_ids()
    built = build(model)
    expected, _ = step(built, ids)
    once = integration.backend_report()
    for _ in range(2):
        with integration.patch():
            assert torch.equal(step(built, ids)[0], expected)
            assert integration.backend_report() == once
            assert torch.equal(step(model, ids)[0], expected)
        with integration.patch(streams_dtype=torch.bfloat16):
            assert distance(step(built, ids)[0], expected) > 0
        assert torch.equal(step(built, ids)[0], expected)
    assert integration.patch_mapping(models=[kind]).keys() <= integration.patch_mapping().keys()


@pytest.mark.parametrize("own_patch", [False, True])
def test_boundaries_that_are_apart_are_counted_once(model, registered, own_patch):
    model, ids = model.eval(), make_ids()
    built = build(model)
    layers = [m for m in built.modules() if type(m).__name__.endswith("DecoderLayer")]
    layers[0].register_forward_hook(lambda *call: None)
    with integration.patch() if own_patch else contextlib.nullcontext():
        built(ids, use_cache=False)
        boundaries = integration.backend_report().get("boundary", {})
    assert boundaries in ({}, {CPU: 2 * len(layers) - 2, "separate (hooks on a layer)": 1})


@pytest.mark.parametrize("part", ["HyperConnection", "HyperHead", "DecoderLayer", "Model"])
def test_some_of_the_classes(model, kind, registered, part):
    """Whoever takes some alone is served there, and nothing else is given what it does not know."""
    mapping = integration.patch_mapping([kind])
    chosen = [name for name in mapping if name.endswith(part)]
    if not chosen:
        pytest.skip(f"{kind} has no {part} to replace")
    monkey_patching.unregister_patch_mapping([name for name in mapping if name not in chosen])
    model, ids, seen = model.eval(), make_ids(), []
    expected = model(ids, use_cache=False).logits
    built = build(model)
    assert ours_of(built) == set(chosen)
    for module in built.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: seen.extend(kwargs), with_kwargs=True
            )
    assert distance(built(ids, use_cache=False).logits, expected) <= 1e-5
    assert seen
    assert "tile_mhc_hands_on" not in seen


def test_compiled(model, kind, registered):
    if kind == "glm5_next":
        pytest.skip("a minute of tracing, through linear attention; see test_integration_glm.py")
    built = build(model.eval())
    built = getattr(built.model, "language_model", built.model)
    ids = make_ids(1, 16)
    with torch.no_grad():
        eager = built(ids, use_cache=False).last_hidden_state
        compiled = torch.compile(built, backend="aot_eager")
        found = compiled(ids, use_cache=False).last_hidden_state
    assert distance(found, eager) <= 1e-5


def test_made_while_a_patch_is_in_force(model, kind, registered):
    with integration.patch():
        monkey_patching.register_patch_mapping(integration.patch_mapping(), overwrite=True)
        built = build(model)
    ids = make_ids()
    assert distance(step(built, ids)[0], step(model, ids)[0]) <= 1e-5


def test_copied_and_pickled(model, kind, registered):
    model, ids = model.eval(), make_ids()
    built = build(model)
    expected = built(ids, use_cache=False).logits
    for other in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert ours_of(other) == ours_of(built)
        assert torch.equal(other(ids, use_cache=False).logits, expected)


def test_asked_for_while_a_model_is_built(kind, registered):
    """Where our classes stand in transformers' modules."""
    mapping = integration.patch_mapping([kind])
    with monkey_patching.apply_patches():
        assert integration.patch_mapping([kind]) == mapping
        with integration.patch(models=[kind]):
            assert integration.is_patched()
    assert not integration.is_patched()


class Derived(integration.patch_mapping(["deepseek_v4"])["DeepseekV4HyperHead"]):
    pass


def test_a_class_that_is_derived_of_one_is_as_any_other():
    built = integration.patch_mapping(["deepseek_v4"])["DeepseekV4HyperHead"]
    config = tiny_deepseek.make_config()
    original, ours, derived = (
        kind(config) for kind in (tiny_deepseek.modeling.DeepseekV4HyperHead, built, Derived)
    )
    assert all(isinstance(each, built) for each in (original, ours, derived))
    assert [isinstance(each, Derived) for each in (original, ours, derived)] == [False, False, True]
    assert issubclass(Derived, built)
    assert not issubclass(built, Derived)
    assert type(pickle.loads(pickle.dumps(ours))) is built
    assert pickle.loads(pickle.dumps(Derived)) is Derived


@pytest.fixture
def one_process():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_sharded_by_fsdp2(model, kind, registered, one_process):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    ids = make_ids()
    expected = model(ids, use_cache=False).logits
    built = build(model)
    layers = [m for m in built.modules() if type(m).__name__.endswith("DecoderLayer")]
    for layer in layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(built, mesh=one_process)
    assert all(isinstance(layer, FSDPModule) for layer in layers)
    output = built(ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert distance(output.logits, expected) <= 1e-5
    backends = {backend for calls in integration.backend_report().values() for backend in calls}
    assert backends <= {CPU, "separate (hooks on a layer)"}
    assert layers[0].attn_hc.fn.grad.to_local().norm() > 0


def test_a_bare_model_hands_nothing_on(model, kind, registered):
    """transformers calls the class that it was given, and replaces those inside."""
    inner = getattr(model.model, "language_model", model.model).eval()
    ids = make_ids()
    expected = inner(ids, use_cache=False).last_hidden_state
    built = build(inner)
    assert distance(built(ids, use_cache=False).last_hidden_state, expected) <= 1e-5
    report = integration.backend_report()
    if "boundary" in report:
        why = "separate (not in a model with layers of transformers alone)"
        assert report["boundary"][why] == len(built.layers) - 1
    assert report["post"][CPU] >= len(built.layers)


def test_names_and_signatures_are_the_originals(kind):
    mapping = integration.patch_mapping(models=[kind])
    modeling = sys.modules[f"transformers.models.{kind}.modeling_{kind}"]
    assert mapping == integration.patch_mapping(models=[kind])
    for name, cls in mapping.items():
        original = getattr(modeling, name)
        assert cls is not original
        assert cls.__name__ == original.__name__ == name
        assert issubclass(cls, original)
        assert cls.forward is not original.forward
