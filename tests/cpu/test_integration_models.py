"""Which models of transformers are there, which are patched, and what the report says of them."""

import importlib.util
import inspect
import sys

import pytest
import torch

from tile_mhc import UnsupportedError
from tile_mhc.integrations import transformers as integration

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
import tiny_glm
from building import MAKERS
from tile_mhc.integrations.transformers._models import FAMILIES
from tiny_deepseek import CPU, distance
from tiny_hy import make_ids

THERE = [kind for kind in FAMILIES if importlib.util.find_spec(f"transformers.models.{kind}")]


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def functions_of(kind):
    modeling = FAMILIES[kind].modeling()
    forwards = FAMILIES[kind].forwards.values()
    return [inspect.unwrap(getattr(modeling, each.class_name).forward) for each in forwards]


def codes_of(kind):
    return [function.__code__ for function in functions_of(kind)]


def test_all_that_are_there_are_patched():
    codes = {kind: codes_of(kind) for kind in THERE}
    with integration.patch():
        report = integration.backend_report(by_model=True)
        assert list(report) == list(FAMILIES)
        for kind, said in report.items():
            if kind not in THERE:
                assert said["served"] == []
                assert said["not_served"][kind].startswith("not in transformers 5.")
                continue
            names = [forward.class_name for forward in FAMILIES[kind].forwards.values()]
            assert said == {"served": names, "not_served": {}, "calls": {}}
            assert not set(codes_of(kind)) & set(codes[kind])
    assert {kind: codes_of(kind) for kind in THERE} == codes


@pytest.mark.parametrize("kind", THERE)
def test_signatures_stay(kind):
    before = [inspect.signature(function) for function in functions_of(kind)]
    with integration.patch():
        for function, signature in zip(functions_of(kind), before, strict=True):
            found = inspect.signature(function).parameters.values()
            expected = signature.parameters.values()
            assert [(p.name, p.kind, p.default) for p in found] == [
                (p.name, p.kind, p.default) for p in expected
            ]


@pytest.mark.parametrize("chosen", THERE)
def test_one_alone(chosen):
    codes = {kind: codes_of(kind) for kind in THERE}
    for models in ([chosen], chosen, iter([chosen, chosen])):
        with integration.patch(models=models):
            changed = {kind for kind in THERE if codes_of(kind) != codes[kind]}
            assert changed == {chosen}
            report = integration.backend_report(by_model=True)
    for kind in THERE:
        assert bool(report[kind]["served"]) is (kind == chosen)
        assert report[kind]["not_served"] == ({} if kind == chosen else {kind: "not patched"})


def test_calls_by_model():
    models = {kind: MAKERS[kind]().eval() for kind in THERE}
    counts = {}
    with torch.no_grad():
        for kind, model in models.items():
            with integration.patch():
                model(make_ids(), use_cache=False)
                counts[kind] = integration.backend_report()
        with integration.patch():
            for model in models.values():
                model(make_ids(), use_cache=False)
            total, by_model = (
                integration.backend_report(),
                integration.backend_report(by_model=True),
            )
    assert {kind: by_model[kind]["calls"] for kind in THERE} == counts
    heads = sum(counts[kind]["head"][CPU] for kind in THERE)
    assert total["head"] == {CPU: heads} == {CPU: len(THERE)}
    assert total["pre"][CPU] == sum(counts[kind]["pre"][CPU] for kind in THERE)


def test_a_model_that_transformers_lacks(monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, FAMILIES["glm5_next"].modeling_name, None)
        with integration.patch():
            said = integration.backend_report(by_model=True)["glm5_next"]
            assert said["served"] == []
            assert said["not_served"]["glm5_next"].startswith("not in transformers 5.")
        message = "transformers must be installed and have .*glm5_next .5.17 to 5.24 have.; got: "
        with pytest.raises(ImportError, match="^patch: " + message):
            integration.patch(models=["deepseek_v4", "glm5_next"])
        with pytest.raises(ImportError, match="^patch_mapping: " + message):
            integration.patch_mapping(["glm5_next"])
        assert not any(name.startswith("Glm5") for name in integration.patch_mapping())
    assert not integration.is_patched()


@pytest.mark.parametrize("call", [integration.patch, integration.patch_mapping])
@pytest.mark.parametrize("models", [["deepseek_v3"], "glm", ["hy_v4", None]])
def test_names_of_no_model(call, models):
    bad = models if isinstance(models, str) else models[-1]
    message = (
        f"^{call.__name__}: models must name some of deepseek_v4, glm5_next, hy_v4, hy_v4_vl; "
        f"got {bad!r}$"
    )
    with pytest.raises(ValueError, match=message):
        call(models=models)
    assert not integration.is_patched()


def test_other_models_than_those_of_the_patch_in_force():
    with integration.patch(models=["hy_v4", "deepseek_v4"]):
        with integration.patch(models=["deepseek_v4", "hy_v4"]):
            assert integration.is_patched()
        message = r"models must be \['deepseek_v4', 'hy_v4'\], as in the patch in force; got \["
        with pytest.raises(ValueError, match=message):
            integration.patch()


def test_no_models_at_all():
    with pytest.raises(ValueError, match=r"^patch: models must name some of .*; got none$"):
        integration.patch(models=[])


@pytest.mark.parametrize(("kind", "name"), [("hy_v4", "HYV4"), ("glm5_next", "Glm5NextText")])
def test_one_that_is_not_as_it_was_written_for_stops_all(kind, name, monkeypatch):
    codes = {each: codes_of(each) for each in THERE}
    with monkeypatch.context() as changed:
        changed.delattr(FAMILIES[kind].modeling(), f"{name}UnweightedRMSNorm")
        message = rf"must have the class {name}UnweightedRMSNorm .*models=\[\.\.\.\] leaves"
        with pytest.raises(UnsupportedError, match=message):
            integration.patch()
        with pytest.raises(UnsupportedError, match=message):
            integration.patch_mapping()
        assert not integration.is_patched()
        assert {each: codes_of(each) for each in THERE} == codes
        with integration.patch(models=["deepseek_v4"]):
            assert integration.is_patched()


def test_a_models_forward_that_is_anothers_is_left_and_said(monkeypatch):
    model = tiny_glm.make_model().eval()
    original = tiny_glm.modeling.Glm5NextTextModel.forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(tiny_glm.modeling.Glm5NextTextModel, "forward", forward)
    expected = model(make_ids(), use_cache=False).logits
    ids = make_ids()
    expected = model(ids, use_cache=False).logits
    integration.patch()
    assert distance(model(ids, use_cache=False).logits, expected) <= 1e-5
    said = integration.backend_report(by_model=True)["glm5_next"]
    assert said["served"] == list(tiny_glm.CLASSES[:-1])
    assert said["not_served"].keys() == {"Glm5NextTextModel"}
    assert "Glm5NextTextModel.forward must take" in said["not_served"]["Glm5NextTextModel"]
    why = "separate (not in a model with layers of transformers alone)"
    assert said["calls"]["boundary"][why] == tiny_glm.LAYERS - 1


@pytest.fixture
def one_process():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("kind", [kind for kind in THERE if kind != "deepseek_v4"])
def test_sharded_by_fsdp2(kind, one_process):
    from torch.distributed.fsdp import fully_shard

    model, ids = MAKERS[kind](), make_ids()
    expected = model(ids, use_cache=False).logits
    inner = getattr(model.model, "language_model", model.model)
    for layer in inner.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(model, mesh=one_process)
    with integration.patch():
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        report = integration.backend_report()
    assert distance(output.logits, expected) <= 1e-5
    assert all(
        {backend} <= {CPU, "separate (hooks on a layer)"} for c in report.values() for backend in c
    )
    assert inner.layers[0].attn_hc.fn.grad.to_local().norm() > 0


@pytest.mark.parametrize("kind", [kind for kind in THERE if kind != "deepseek_v4"])
def test_offloaded_by_accelerate(kind):
    accelerate = pytest.importorskip("accelerate")
    model, ids = MAKERS[kind]().eval(), make_ids()
    expected = model(ids, use_cache=False).logits
    model = accelerate.cpu_offload(model, execution_device="cpu")
    with integration.patch(), torch.no_grad():
        assert distance(model(ids, use_cache=False).logits, expected) <= 1e-5
        report = integration.backend_report()
    assert report["pre"][CPU] >= 2
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)
