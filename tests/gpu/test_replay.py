"""Calls past the dispatcher on a GPU: the bits, the stream, the graph that dispatched ones have."""

import threading

import pytest
import torch
from torch import Tensor

import replaying
from cases import operator_calls
from tile_mhc import config, fused_pre, post
from tile_mhc.ops import _replay
from tile_mhc.ops._autograd import OPERATORS

LEAD, N, HIDDEN = (2, 65), 4, 256
REPLAYED = sorted(name for name, op in OPERATORS.items() if op.replay is not None)


@pytest.fixture(autouse=True)
def learns_fast(monkeypatch):
    """The second call of a kind is a known one."""
    monkeypatch.setattr(_replay, "SIGHTINGS", 2)
    replaying.forget()
    yield
    replaying.forget()


@pytest.mark.parametrize("name", REPLAYED)
def test_same_bits(name):
    replay = OPERATORS[name].replay
    with torch.no_grad():
        calls = operator_calls(LEAD, N, HIDDEN, "cuda")[name]
    for _ in range(_replay.SIGHTINGS):
        replay.learn(replaying.fresh(calls))
    dispatched = replaying.fresh(calls)
    expected = getattr(torch.ops.tile_mhc, name)(*dispatched)
    expected = (expected,) if isinstance(expected, Tensor) else expected
    for _ in range(3):
        given = replaying.fresh(calls)
        call = replay.find(given)
        assert call is not None
        results = call.run()
        for result, value in zip(results, expected, strict=True):
            assert (result is None) is (value.numel() == 0)
            if result is not None:
                assert torch.equal(replaying.bits(result), replaying.bits(value))
        for value, other in zip(given, dispatched, strict=True):
            if isinstance(value, Tensor):
                assert torch.equal(replaying.bits(value), replaying.bits(other))


def inputs(hidden_size=HIDDEN, tokens=33, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    streams = normal(tokens, N, hidden_size).bfloat16()
    weight = normal(N * (N + 2), N * hidden_size) * 0.05
    return [t.requires_grad_() for t in (streams, weight, normal(3), normal(N * (N + 2)))]


def sub_layer(tensors):
    layer_input, post_mix, comb_mix, through = fused_pre(*tensors, passes_residual=True)
    return post(layer_input, through, post_mix, comb_mix)


def step(tensors):
    out = sub_layer(tensors)
    grads = torch.autograd.grad(out.float().square().sum(), tensors)
    return [out.detach(), *grads]


def same(results, expected):
    return all(
        torch.equal(replaying.bits(a), replaying.bits(b))
        for a, b in zip(results, expected, strict=True)
    )


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_steps_give_the_same_bits(batch_invariant):
    before = config.get_batch_invariant()
    config.set_batch_invariant(batch_invariant)
    try:
        first, *others = [step(inputs()) for _ in range(4)]
        assert all(same(other, first) for other in others)
        with torch.no_grad():
            assert same([sub_layer(inputs()) for _ in range(4)], [first[0]] * 4)
    finally:
        config.set_batch_invariant(before)


def test_runs_on_the_current_stream():
    tensors = inputs()
    expected = [step(tensors) for _ in range(3)][-1]
    stream = torch.cuda.Stream()
    late = [tensor.detach().clone().zero_().requires_grad_() for tensor in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # What the kernels read is only there when the stream has come so far.
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for to, value in zip(late, tensors, strict=True):
                to.copy_(value)
        results = step(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(results, expected)


def test_other_libraries_find_their_stream_as_it_was():
    core = pytest.importorskip("tvm_ffi.core")
    device = torch.cuda.current_device()
    mine = torch.cuda.Stream().cuda_stream
    before = core._env_set_current_stream(2, device, mine)
    try:
        for _ in range(3):
            step(inputs())
        assert core._env_set_current_stream(2, device, before) == mine
    finally:
        core._env_set_current_stream(2, device, before)


def test_captured_in_a_graph():
    tensors = inputs()
    for _ in range(3):
        expected = step(tensors)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = step(tensors)
    graph.replay()
    assert same(results, expected)
    other = inputs(seed=1)
    with torch.no_grad():
        for to, value in zip(tensors, other, strict=True):
            to.copy_(value)
    graph.replay()
    assert same(results, step(other))


def test_threads_do_not_mix_up_their_addresses():
    expected = {seed: step(inputs(seed=seed)) for seed in range(4)}
    wrong = []

    def work(seed):
        tensors = inputs(seed=seed)
        for _ in range(50):
            if not same(step(tensors), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_keeps_no_memory():
    for _ in range(3):
        step(inputs())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step(inputs())
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    expected = [step(inputs()) for _ in range(3)][-1]
    moved = [tensor.detach().to("cuda:1").requires_grad_() for tensor in inputs()]
    for _ in range(4):
        results = step(moved)
        assert same([result.to("cuda:0") for result in results], expected)
        with torch.cuda.device(1):
            results = step(moved)
        assert same([result.to("cuda:0") for result in results], expected)
