"""Calls past the dispatcher: which are served so, what they compute, and in how few steps."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import replaying
import tile_mhc
from tile_mhc import ShapeError, config, fused_pre, jit, post, post_pre
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.nn import HyperConnection
from tile_mhc.ops import _replay
from tile_mhc.ops._autograd import OPERATORS
from tile_mhc.ops._replay import Replay

# Calls, of which the last two at least are of a known kind.
ENOUGH = _replay.SIGHTINGS + 1
TYPES = ("Tensor", "Tensor?", "float", "bool")


def add_kernel(a, b, c, factor, doubled):
    c.copy_((a + b) * factor * (2 if doubled else 1))


def scale_kernel(c, out, extra):
    out.copy_(c * 3)
    if extra is not None:
        out.add_(extra)


KERNELS = {"add": add_kernel, "scale": scale_kernel}


def kernel(name, args):
    return KERNELS[name]


def launcher(a, b, factor, doubled):
    """3 * factor * (a + b), flat, and that before the 3."""
    other = a.new_empty(1) if b is None else b
    between, out = a.new_empty(a.numel()), torch.empty_like(a)
    flat = a.view(-1)
    jit.kernel("add")(flat, flat if b is None else other.view(-1), between, factor, doubled)
    jit.kernel("scale")(between, out.view(-1), None)
    return out, between


@pytest.fixture
def replay():
    with replaying.replaying(kernel):
        yield Replay(TYPES, launcher, hidden=(1,))


def taught(replay, *args):
    for _ in range(_replay.SIGHTINGS):
        replay.learn(args)
    return replay


def pair(seed=0, shape=(6, 8)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def test_the_first_of_a_kind_is_not_learned(replay):
    args = *pair(), 0.5, False
    assert replay.find(args) is None
    for _ in range(_replay.SIGHTINGS - 1):
        assert replay.learn(args) is None
    assert replay.find(args) is None
    assert replay.learn(args) is not None
    assert replay.find(args) is not None


@pytest.fixture
def plain_memory():
    """As it is outside of these tests, which have torch fill it: see `poisoned_memory`."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("doubled", [False, True])
def test_computes_what_the_launcher_does(replay, doubled):
    taught(replay, *pair(), 0.5, doubled)
    for seed in range(1, 4):
        a, b = pair(seed)
        out, between = replay.find((a, b, 0.5, doubled)).run()
        expected = (a + b) * 0.5 * (2 if doubled else 1)
        assert torch.equal(out, expected * 3)
        assert torch.equal(between, expected.view(-1))
        out, between = replay.find((a, b, 0.5, doubled)).run_visible()
        assert torch.equal(out, expected * 3)
        assert between is None


@pytest.mark.usefixtures("plain_memory")
def test_memory_is_not_filled_unless_torch_fills_its_own(replay, monkeypatch):
    monkeypatch.setitem(KERNELS, "scale", lambda *args: None)
    taught(replay, *pair(), 0.5, False)
    made = []
    allocate = _replay.empty
    monkeypatch.setattr(_replay, "empty", lambda *layout: made.append(layout) or allocate(*layout))
    outputs = replay.find((*pair(), 0.5, False)).run()
    expected = [(tuple(out.shape), out.stride(), out.dtype) for out in outputs]
    assert made == expected
    torch.use_deterministic_algorithms(True, warn_only=True)
    out, between = replay.find((*pair(), 0.5, False)).run()
    assert made == expected
    assert out.isnan().all()
    assert not between.isnan().any()


def test_an_absent_tensor_is_another_kind(replay):
    a, b = pair()
    taught(replay, a, b, 1.0, False)
    assert replay.find((a, None, 1.0, False)) is None
    taught(replay, a, None, 1.0, False)
    assert torch.equal(replay.find((b, None, 1.0, False)).run()[0], b * 6)
    assert torch.equal(replay.find((b, a, 1.0, False)).run()[0], (a + b) * 3)


def test_kinds_of_one_shape_take_turns(replay):
    a, b = pair()
    taught(replay, a, None, 1.0, False)
    taught(replay, a, b, 1.0, False)
    taught(replay, a, b, 1.0, True)
    for _ in range(2):
        assert torch.equal(replay.find((b, None, 1.0, False)).run()[0], b * 6)
        assert torch.equal(replay.find((b, a, 1.0, False)).run()[0], (a + b) * 3)
        assert torch.equal(replay.find((b, a, 1.0, True)).run()[0], (a + b) * 6)


def test_nothing_is_kept_of_a_call(replay):
    import gc
    import weakref

    a, b = pair()
    taught(replay, a, b, 1.0, False)
    outputs = replay.find((a, b, 1.0, False)).run()
    references = [weakref.ref(tensor) for tensor in (a, b, *outputs)]
    del a, b, outputs
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


OTHERS = {
    "shape": lambda a, b: (a[:4].clone(), b[:4].clone(), 1.0, False),
    "dtype": lambda a, b: (a.bfloat16(), b, 1.0, False),
    "dtype of the second": lambda a, b: (a, b.bfloat16(), 1.0, False),
    "strides": lambda a, b: (a, b.t().contiguous().t(), 1.0, False),
    "requires_grad": lambda a, b: (a, b.requires_grad_(), 1.0, False),
    "a number": lambda a, b: (a, b, 2.0, False),
    "a flag": lambda a, b: (a, b, 1.0, True),
    "an integer for a number": lambda a, b: (a, b, 1, False),
    "True for a number": lambda a, b: (a, b, True, False),
    "0 for False": lambda a, b: (a, b, 1.0, 0),
    "without a hash": lambda a, b: (a, b, [1.0], False),
    "no tensor": lambda a, b: (None, b, 1.0, False),
    "a list": lambda a, b: (a.tolist(), b, 1.0, False),
    "a number for a tensor": lambda a, b: (a, 3, 1.0, False),
    "twice the same": lambda a, b: (a, a, 1.0, False),
    "a subclass": lambda a, b: (a, b.as_subclass(type("Other", (Tensor,), {})), 1.0, False),
    "a parameter": lambda a, b: (a, torch.nn.Parameter(b, False), 1.0, False),
    "a negative view": lambda a, b: (a, torch._neg_view(b), 1.0, False),
    "meta": lambda a, b: (a.to("meta"), b.to("meta"), 1.0, False),
    "misaligned": lambda a, b: (_misaligned(a), b, 1.0, False),
    "freed": lambda a, b: (a, _freed(b), 1.0, False),
}


def _misaligned(tensor):
    room = torch.empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


def _freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("other", OTHERS)
def test_other_calls_are_not_served(replay, other):
    taught(replay, *pair(), 1.0, False)
    assert replay.find((*pair(1), 1.0, False)) is not None
    assert replay.find(OTHERS[other](*pair(2))) is None


NEVER = (
    "a subclass",
    "a negative view",
    "meta",
    "strides",
    "misaligned",
    "freed",
    "twice the same",
)


@pytest.mark.parametrize("other", NEVER)
def test_other_calls_are_not_learned(other):
    runs = []
    with replaying.replaying(kernel):
        replay = Replay(TYPES, lambda *given: (runs.append(given), launcher(*given))[1], ())
        for seed in range(2 * _replay.SIGHTINGS):
            args = OTHERS[other](*pair(seed))
            assert replay.learn(args) is None
            assert replay.find(args) is None
        assert not runs
        # And do not stand in the way of others.
        taught(replay, *pair(), 1.0, False)
        assert replay.find((*pair(), 1.0, False)) is not None


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


WATCHERS = {
    "dispatch mode": _Dispatch,
    "function mode": _Function,
    "fake mode": FakeTensorMode,
    "forward mode": forward_ad.dual_level,
    "profiler": torch.profiler.profile,
    "inference mode": torch.inference_mode,
    "below autograd": torch._C._AutoDispatchBelowAutograd,
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_whoever_watches_sees_the_operator(replay, watcher):
    args = *pair(), 1.0, False
    taught(replay, *args)
    with WATCHERS[watcher]():
        assert replay.find(args) is None
    assert replay.find(args) is not None


LEARNERS = [name for name in WATCHERS if name not in ("inference mode", "below autograd")]


@pytest.mark.parametrize("watcher", LEARNERS)
def test_nothing_is_learned_while_watched(replay, watcher):
    args = *pair(), 1.0, False
    with WATCHERS[watcher]():
        for _ in range(2 * _replay.SIGHTINGS):
            assert replay.learn(args) is None


TRANSFORMS = {
    "grad": lambda look, a: torch.func.grad(lambda x: (look(), x.sum())[1])(a),
    "vmap": lambda look, a: torch.func.vmap(lambda x: (look(), x)[1])(a),
    "jvp": lambda look, a: torch.func.jvp(lambda x: (look(), x)[1], (a,), (a,)),
    "functionalize": lambda look, a: torch.func.functionalize(lambda x: (look(), x + 1)[1])(a),
    "jit.trace": lambda look, a: torch.jit.trace(
        lambda x: (look(), x + 1)[1], a, check_trace=False
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_see_the_operator(replay, transform):
    args = *pair(), 1.0, False
    taught(replay, *args)
    other = *pair(3, (4, 4)), 1.0, False
    found = []

    def look():
        found.append(replay.find(args))
        found.extend(replay.learn(other) for _ in range(2 * _replay.SIGHTINGS))

    TRANSFORMS[transform](look, pair(1)[0])
    assert found
    assert set(found) == {None}


def test_what_is_set_makes_another_kind(replay):
    args = *pair(), 1.0, False
    taught(replay, *args)
    before = config.get_batch_invariant()
    config.set_batch_invariant(not before)
    try:
        assert replay.find(args) is None
    finally:
        config.set_batch_invariant(before)
    assert replay.find(args) is not None


def test_another_current_device_is_not_served(replay, monkeypatch):
    args = *pair(), 1.0, False
    taught(replay, *args)
    monkeypatch.setattr(_replay, "current_device", lambda: 1)
    assert replay.find(args) is None


def test_threads_learn_for_themselves(replay):
    args = *pair(), 1.0, False
    taught(replay, *args)
    found = []
    thread = threading.Thread(target=lambda: found.append(replay.find(args)))
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(
    "extra",
    [
        lambda a, out: out.zero_(),
        lambda a, out: a.t().contiguous(),
        lambda a, out: a + 1,
        lambda a, out: torch.zeros(3),
    ],
    ids=["writes", "copies", "computes", "fills"],
)
def test_a_launcher_that_does_more_is_never_replayed(extra):
    def more(a, b, factor, doubled):
        out, between = launcher(a, b, factor, doubled)
        extra(a, out)
        return out, between

    runs = []
    with replaying.replaying(kernel):
        replay = Replay(TYPES, lambda *given: (runs.append(given), more(*given))[1], ())
        args = *pair(), 1.0, False
        for _ in range(3 * _replay.SIGHTINGS):
            assert replay.learn(args) is None
            assert replay.find(args) is None
    # It is not tried again and again.
    assert len(runs) == 1


@pytest.mark.parametrize("what", ["an input", "a part of an allocation", "one of its own"])
def test_outputs_that_cannot_be_made_are_not_learned(what):
    def other(a, b, factor, doubled):
        out, _ = launcher(a, b, factor, doubled)
        if what == "an input":
            return a, out
        return out, out[:2] if what == "a part of an allocation" else torch.tensor([1.0])

    with replaying.replaying(kernel):
        replay = Replay(TYPES, other, ())
        for _ in range(2 * _replay.SIGHTINGS):
            assert replay.learn((*pair(), 1.0, False)) is None


def test_learning_launches_nothing(replay, monkeypatch):
    launched = []
    monkeypatch.setitem(KERNELS, "scale", lambda *args: launched.append(args))
    args = *pair(), 1.0, False
    taught(replay, *args)
    assert not launched
    replay.find(args).run()
    assert len(launched) == 1


def test_forgets_where_there_are_many_shapes(replay, monkeypatch):
    monkeypatch.setattr(_replay, "MOST_KEYS", 4)
    first = *pair(), 1.0, False
    taught(replay, *first)
    for size in range(11, 20):
        taught(replay, *pair(0, (size, 8)), 1.0, False)
    assert len(replay._memory.kinds) <= 4
    assert replay.find(first) is None
    taught(replay, *first)
    assert replay.find(first) is not None


def test_learns_few_kinds_of_a_shape(replay, monkeypatch):
    monkeypatch.setattr(_replay, "MOST_KINDS", 2)
    a, b = pair()
    taught(replay, a, b, 1.0, False)
    taught(replay, a, None, 1.0, False)
    taught(replay, a, torch.nn.Parameter(b), 1.0, False)
    assert replay.find((a, torch.nn.Parameter(b), 1.0, False)) is None
    assert replay.find((a, None, 1.0, False)) is not None


# The ops themselves, with kernels that do nothing.

TOKENS, N, HIDDEN = 6, 4, 64
NUM_MIXES = N * (N + 2)
NAMES = sorted(OPERATORS)


@pytest.fixture
def launched():
    names = []

    def nothing(name, args):
        return lambda *given: names.append(name)

    with replaying.replaying(nothing), replaying.launchers_on_cpu(*NAMES):
        replaying.forget()
        yield names
    replaying.forget()


def sub_layer_inputs():
    streams = torch.zeros(TOKENS, N, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(NUM_MIXES, N * HIDDEN, requires_grad=True)
    return streams, weight, *(torch.zeros(k, requires_grad=True) for k in (3, NUM_MIXES))


def step_of(inputs):
    grad = torch.zeros(TOKENS, N, HIDDEN, dtype=torch.bfloat16)

    def step():
        layer_input, post_mix, comb_mix, through = fused_pre(*inputs, passes_residual=True)
        post(layer_input, through, post_mix, comb_mix).backward(grad)

    return step


def boundary_of(inputs, delayed):
    streams, *gates = inputs
    grad = torch.zeros(TOKENS, N, HIDDEN, dtype=torch.bfloat16)
    pre_mix = torch.zeros(TOKENS, N, requires_grad=True) if delayed else None
    post_mix = torch.zeros(TOKENS, N, requires_grad=True)
    comb_mix = torch.zeros(TOKENS, N, N, requires_grad=True)
    layer_output = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)

    def step():
        outputs = post_pre(layer_output, streams, post_mix, comb_mix, *gates, pre_mix=pre_mix)
        assert len(outputs) == 4 + delayed
        torch.autograd.backward(outputs[:2], (grad, grad[:, 0].contiguous()))
        torch.autograd.grad(fused_pre(*inputs, pre_mix=pre_mix)[-1].sum(), inputs)

    return step


STEPS = {
    "sub-layer": lambda inputs: step_of(inputs),
    "boundary": lambda inputs: boundary_of(inputs, False),
    "delayed boundary": lambda inputs: boundary_of(inputs, True),
}


@pytest.mark.parametrize("sightings", [1, 2, _replay.SIGHTINGS])
@pytest.mark.parametrize("what", STEPS)
def test_a_step_launches_what_it_did_before(launched, monkeypatch, what, sightings):
    inputs = sub_layer_inputs()
    step = STEPS[what](inputs)
    monkeypatch.setattr(_replay, "SIGHTINGS", 100)
    step()
    rounds = [list(launched)]
    monkeypatch.setattr(_replay, "SIGHTINGS", sightings)
    replaying.forget()
    for _ in range(sightings + 2):
        launched.clear()
        step()
        rounds.append(list(launched))
        assert all(tensor.grad.shape == tensor.shape for tensor in inputs)
    assert rounds[0]
    assert rounds == [rounds[0]] * len(rounds)


def test_no_step_goes_by_the_dispatcher_once_it_is_known(launched, monkeypatch):
    step = step_of(sub_layer_inputs())
    for _ in range(_replay.SIGHTINGS):
        step()
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "_operator", None)
    step()


def test_bad_input_is_found_after_good(launched):
    streams, weight, scale, bias = sub_layer_inputs()
    for _ in range(ENOUGH):
        fused_pre(streams, weight, scale, bias, tf32=False)
    for arguments in (
        {"tf32": 0},
        {"tf32": None},
        {"norm_eps": True},
        {"sinkhorn_repeat": 10.0},
        {"passes_residual": 1},
        {"num_splits": True},
    ):
        with pytest.raises(ShapeError, match=f"^fused_pre: {next(iter(arguments))} must be"):
            fused_pre(streams, weight, scale, bias, **arguments)
    with pytest.raises(ShapeError, match="weight must be"):
        fused_pre(streams, weight[:, :-1], scale, bias)
    with pytest.raises(ShapeError, match="must be in memory"):
        fused_pre(streams, _freed(weight.detach().clone().requires_grad_()), scale, bias)


def test_the_passed_residual_is_a_view(launched):
    inputs = sub_layer_inputs()
    for _ in range(ENOUGH):
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                *_, through = fused_pre(*inputs, passes_residual=True)
            assert through is not inputs[0]
            assert through.data_ptr() == inputs[0].data_ptr()
            assert through.requires_grad
            assert through._is_view()
            assert (through.grad_fn is not None) is (context is torch.enable_grad)


def _accumulated(inputs):
    streams, *parameters = inputs
    grad = torch.zeros(TOKENS, N, HIDDEN, dtype=torch.bfloat16)

    def step():
        accumulator = GradAccumulator(streams)
        mixes = tile_mhc.projection(streams, parameters[0], grad_accumulator=accumulator)
        pre_mix, post_mix, logits = tile_mhc.split_mixes(mixes, *parameters[1:], num_streams=N)
        comb_mix = tile_mhc.sinkhorn(logits)
        layer_input = tile_mhc.aggregate(streams, pre_mix, grad_accumulator=accumulator)
        out = post(layer_input, streams, post_mix, comb_mix, grad_accumulator=accumulator)
        out.backward(grad)

    return step


def _forward(inputs):
    def step():
        with torch.no_grad():
            layer_input, post_mix, comb_mix, through = fused_pre(*inputs, passes_residual=True)
            post(layer_input, through, post_mix, comb_mix)

    return step


def _main_grad(inputs):
    for parameter in inputs[1:]:
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.grad_added_to_main_grad = False
    return step_of(inputs)


def _module(inputs):
    module = HyperConnection(HIDDEN)
    grad = torch.zeros(TOKENS, N, HIDDEN, dtype=torch.bfloat16)
    return lambda: module(inputs[0], lambda layer_input: layer_input).backward(grad)


# Python calls of ours in an iteration, and launches. They do not scatter as a time does. At 0cf2b7e
# a step took 198 calls.
BUDGETS = {
    "step": (step_of, 48, 8),
    "forward": (_forward, 20, 3),
    "main_grad": (_main_grad, 101, 9),
    "module": (_module, 51, 8),
    "accumulator": (_accumulated, 183, 13),
}


@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("case", BUDGETS)
def test_few_calls_an_iteration(launched, case):
    build, most, launches = BUDGETS[case]
    step = build(sub_layer_inputs())
    for _ in range(ENOUGH):
        step()
    launched.clear()
    calls = _count_calls(step)
    assert len(launched) == launches
    assert calls <= most


def _count_calls(function):
    """Calls of Python functions of tile_mhc; on the CPU one thread runs the backward, too."""
    package = str(Path(tile_mhc.__file__).parent)
    count = 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(package)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
