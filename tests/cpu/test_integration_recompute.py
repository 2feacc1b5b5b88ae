"""patch(recompute_layers=...): groups of decoder layers of a real DeepSeek-V4."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from tile_mhc import recompute_group
from tile_mhc.integrations import transformers as integration

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
from tile_mhc._recompute_group import RecomputeGroup
from tile_mhc.integrations.transformers import _recompute_layers
from tiny_deepseek import make_model, step

LAYERS = 4
KINDS = {
    "num_hidden_layers": LAYERS,
    "layer_types": ["sliding_attention", "compressed_sparse_attention"] * 2,
    "mlp_layer_types": ["hash_moe"] * LAYERS,
}


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()
    _recompute_layers._waiting.group = None


@pytest.fixture
def closed(monkeypatch):
    """How many sub-layers' inputs and streams each group has made, when it is closed."""
    counts, close = [], RecomputeGroup.close

    def counted(group):
        counts.append(len(group._all))
        close(group)

    monkeypatch.setattr(RecomputeGroup, "close", counted)
    return counts


def check(model, ids, *, layers, **patched):
    with integration.patch(**patched):
        logits, grads = step(model, ids)
    with integration.patch(recompute_layers=layers, **patched):
        found = step(model, ids)
    assert torch.equal(found[0], logits)
    assert grads.keys() == found[1].keys()
    assert all(torch.equal(found[1][name], grads[name]) for name in grads)


@pytest.mark.parametrize(
    ("layers", "groups"), [(1, [3, 4, 4, 5]), (2, [7, 9]), (3, [11, 5]), (4, [16]), (9, [16])]
)
def test_same_bits_in_groups(layers, groups, closed):
    """The streams behind a layer are made with the layer that reads them: by one boundary."""
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))
    check(model, ids, layers=layers)
    assert closed == groups
    assert _recompute_layers._waiting.group is None


def test_with_streams_of_another_dtype(closed):
    check(make_model(**KINDS), torch.randint(32, (2, 24)), layers=2, streams_dtype=torch.bfloat16)
    assert closed == [7, 9]


@pytest.mark.parametrize("reentrant", [False, True])
def test_beside_gradient_checkpointing(reentrant, closed):
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    check(model, ids, layers=2)
    assert closed == []


def test_inside_other_hooks(closed):
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))
    with save_on_cpu():
        check(model, ids, layers=2)
    assert closed == []
    with recompute_group():
        check(model, ids, layers=2)
    assert closed == [32]  # of the group around both steps


def test_without_gradients(closed):
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))
    with integration.patch(recompute_layers=2), torch.no_grad():
        model(ids)
    assert closed == []


def test_an_exception_leaves_nothing(closed):
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))

    def fail(*_):
        raise KeyError

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with integration.patch(recompute_layers=4):
        with pytest.raises(KeyError):
            model(ids)
        handle.remove()
        assert _recompute_layers._waiting.group is None
        logits, _ = step(model, ids)
    assert logits.isfinite().all()


def test_a_forward_that_stops_between_layers(closed):
    """Its group is not taken for one of the next forward."""
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))

    def fail(*_):
        raise KeyError

    with integration.patch(recompute_layers=4):
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(ids)
        handle.remove()
        step(model, ids)
    assert closed == [4, 16]


def test_a_forward_that_ends_before_its_group(closed):
    """As a pipeline stage, whose config knows of layers elsewhere."""
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))
    model.model.layers = model.model.layers[:3]
    with integration.patch(recompute_layers=8):
        step(model, ids)
    assert len(closed) == 1
    assert _recompute_layers._waiting.group is None


@pytest.mark.parametrize("around", [torch.no_grad, save_on_cpu])
def test_a_layer_without_a_group_ends_the_one_that_waits(around, closed):
    config = SimpleNamespace(num_hidden_layers=8)
    _recompute_layers.run(8, 0, config, lambda: None)
    assert closed == []
    with around():
        _recompute_layers.run(8, 1, config, lambda: None)
    assert closed == [0]
    assert _recompute_layers._waiting.group is None


def test_nothing_waits_after_a_step():
    model, ids = make_model(**KINDS), torch.randint(32, (2, 24))
    with integration.patch(recompute_layers=3):
        step(model, ids)
    gc.collect()
    assert [each for each in gc.get_objects() if type(each) is RecomputeGroup] == []


def test_bad_numbers_of_layers():
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="patch: recompute_layers must be an integer"):
            integration.patch(recompute_layers=bad)
    with integration.patch(recompute_layers=2):
        with pytest.raises(
            ValueError, match="recompute_layers must be 2, as in the patch in force"
        ):
            integration.patch(recompute_layers=3)
        with integration.patch(recompute_layers=2):
            assert integration.is_patched()
