"""Which kernels a GPU has: its architecture, and what becomes of ops where it has none."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

import oracle
import replaying
from cases import AGGREGATE, OPS, PROJECTION, recompute_inputs
from tile_mhc import UnsupportedError, _device, aggregate, config, jit, recompute, selection
from tile_mhc.integrations.transformers import _serving
from tile_mhc.kernels._arch import ARCHITECTURES, BLACKWELL, HOPPER, SMALL_AMPERE, SMALL_BLACKWELL
from tile_mhc.ops import _replay
from tile_mhc.ops._autograd import OPERATORS

NAMES = sorted(OPERATORS)
SHAPE = ((13,), 4, 64)
OLD = "the GPU must be one of sm_80, .*; got Tesla T4, sm_75"


@pytest.fixture
def gpu(monkeypatch):
    """A current device of a capability that a test chooses; its index is that of CPU tensors."""
    state = {"capability": (7, 5), "asked": 0}

    def capability(_):
        state["asked"] += 1
        return state["capability"]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(_device, "_warned", set())
    _device.limits_of.cache_clear()
    yield state
    _device.limits_of.cache_clear()


@contextlib.contextmanager
def launchers():
    with replaying.launchers_on_cpu(*NAMES):
        yield


@pytest.mark.parametrize(
    ("capability", "limits"),
    [((8, 6), SMALL_AMPERE), ((9, 0), HOPPER), ((10, 3), BLACKWELL), ((12, 0), SMALL_BLACKWELL),
     ((7, 5), None), ((8, 7), None), ((11, 0), None)],
)  # fmt: skip
def test_limits_of_a_device(gpu, capability, limits):
    gpu["capability"] = capability
    assert _device.limits_of(0) is limits
    assert _device.limits() is (limits or HOPPER)


def test_a_device_is_asked_once(gpu):
    gpu["capability"] = (8, 0)
    for _ in range(3):
        assert selection.is_one_pass(torch.bfloat16, 4, 64, None)
    assert gpu["asked"] == 1
    assert _device.limits_of(1) is ARCHITECTURES["sm_80"]
    assert gpu["asked"] == 2


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_reference_answers_without_kernels(gpu, op):
    tensors, options = op.inputs(*SHAPE, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    expected = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    with launchers(), pytest.warns(RuntimeWarning, match=OLD):
        found = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    oracle.check_same_bits(expected, found, f"{op.name} on a GPU without kernels:")


def test_of_lists_and_outs_too(gpu):
    inputs = recompute_inputs(2, 1, *SHAPE, "cpu")
    tensors, _ = AGGREGATE.inputs(*SHAPE, "cpu")
    out = torch.full((13, 64), torch.nan, dtype=torch.bfloat16)
    expected, once = recompute(*inputs), aggregate(**tensors)
    with launchers():
        with pytest.warns(RuntimeWarning, match=OLD):
            found = recompute(*inputs)
        version = out._version
        aggregate(**tensors, out=out)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    assert torch.equal(out, once)
    assert out._version > version


def test_the_warning_comes_once_and_says_what_to_do(gpu):
    tensors, _ = AGGREGATE.inputs(*SHAPE, "cpu")
    with launchers(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            aggregate(**tensors)
            PROJECTION.run(**PROJECTION.inputs(*SHAPE, "cpu")[0])
    ours = [str(w.message) for w in caught if "tile_mhc" in str(w.message)]
    assert len(ours) == 1
    assert "sm_120a; got Tesla T4, sm_75. Ops are computed by the reference" in ours[0]
    assert "set_require_kernels(True)" in ours[0]


@pytest.mark.parametrize("op", OPS, ids=str)
def test_or_they_raise(gpu, op, monkeypatch):
    monkeypatch.setattr(config, "_require_kernels", False)
    assert not config.get_require_kernels()
    config.set_require_kernels(True)
    assert config.get_require_kernels()
    tensors, options = op.inputs(*SHAPE, "cpu")
    with launchers(), pytest.raises(UnsupportedError, match=rf"^\w+: {OLD}$"):
        op.run(**tensors, **options)


def test_require_kernels_is_true_or_false():
    with pytest.raises(ValueError, match=r"^set_require_kernels: enabled must be True or False; g"):
        config.set_require_kernels(1)


@pytest.mark.parametrize(
    ("device", "capability", "backend"),
    [
        ("cuda:0", (9, 0), "TileLang"),
        ("cuda:1", (8, 0), "TileLang"),
        ("cuda:0", (7, 5), "reference (on cuda)"),
        ("cpu", (7, 5), "reference (on cpu)"),
    ],
)
def test_the_backend_that_a_report_names(gpu, device, capability, backend):
    gpu["capability"] = capability
    streams = SimpleNamespace(device=torch.device(device))
    assert _serving.backend(streams) == backend


@pytest.mark.filterwarnings("ignore:tile_mhc:RuntimeWarning")
def test_no_call_without_kernels_is_learned(gpu):
    """Nor is a launcher's work written down where it would not be launched."""

    def nothing(name, args):
        raise jit.CompileError(f"{name} was asked for")

    tensors, _ = AGGREGATE.inputs(*SHAPE, "cpu")
    expected = aggregate(**tensors)
    with replaying.replaying(nothing), launchers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device, "limits_of", lambda _: None)
        replaying.forget()
        for _ in range(_replay.SIGHTINGS + 2):
            assert torch.equal(aggregate(**tensors), expected)
    replaying.forget()


def test_a_pass_takes_what_shared_memory_holds():
    """The table's choices by architecture, as launchers make them."""
    taken = {
        name: (
            selection.is_one_pass(torch.bfloat16, 4, 4096, None, limits),
            selection.reads_once(torch.bfloat16, 4, 4096, True, limits),
            [n for n in (2, 4, 8) if selection.has_gates_at_once(n, 20, 1.0, limits)],
        )
        for name, limits in ARCHITECTURES.items()
    }
    assert taken == {
        "sm_80": (True, False, [2, 4]),
        **dict.fromkeys(("sm_86", "sm_89", "sm_120a"), (False, False, [2])),
        **dict.fromkeys(("sm_90a", "sm_100a", "sm_103a"), (True, True, [2, 4])),
    }
