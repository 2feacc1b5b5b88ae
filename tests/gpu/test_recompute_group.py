"""Recompute groups on a GPU: the allocator's bytes, CUDA graphs, streams and devices."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import replaying
from groups import LAYERS, WAYS, Stack, check_bits, check_same, first_streams, gradients, loss_of
from tile_mhc import RecomputeError, config, recompute_group, split_mixes
from tile_mhc.ops import _replay
from tile_mhc.ops import recompute as recompute_op

WIDTH, LEAD = 1280, (2, 65)
SLEEP_CYCLES = 100_000_000  # some 50 ms


def stack_of(way="modules", kind="norm"):
    return Stack(way, kind, hidden_size=WIDTH).cuda()


def streams_of(device="cuda"):
    return first_streams(lead=LEAD, hidden_size=WIDTH, device=device)


@pytest.mark.parametrize("way", WAYS)
def test_bits(way):
    """The first calls go by the dispatcher, the last ones past it."""
    stack, streams = stack_of(way), streams_of()
    replaying.forget()
    for _ in range(_replay.SIGHTINGS + 1):
        check_bits(stack, recompute_group(), streams)


@pytest.mark.parametrize("way", ["modules", "V4.1"])
def test_bits_where_a_token_does_not_depend_on_its_batch(way):
    stack = stack_of(way)
    config.set_batch_invariant(True)
    try:
        check_bits(stack, recompute_group(), streams_of())
    finally:
        config.set_batch_invariant(False)


@pytest.mark.parametrize("num_streams", [2, 4, 8])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_gates_have_the_bits_of_split_mixes(num_streams, parameters):
    rows, tokens = num_streams * (num_streams + 2), 261
    streams = torch.empty(tokens, num_streams, 64, dtype=torch.bfloat16, device="cuda")
    gates = [
        (
            4 * torch.randn(tokens, rows, device="cuda"),
            torch.randn(3, device="cuda").to(parameters),
            torch.randn(rows, device="cuda").to(parameters),
        )
        for _ in range(19)  # more addresses than one launch of the table takes
    ]
    found = recompute_op.pre_mixes(streams, *map(list, zip(*gates, strict=True)), 1e-3)
    for ours, given in zip(found, gates, strict=True):
        assert torch.equal(ours, split_mixes(*given, num_streams=num_streams, pre_eps=1e-3)[0])


def allocated():
    """Bytes that were asked for: a block that is handed out may be up to 1 MiB larger."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats().get("requested_bytes.all.current", 0)


@pytest.mark.parametrize("way", ["modules", "functions", "boundaries", "V4.1"])
def test_allocated_bytes(way):
    stack, streams = stack_of(way, "linear"), streams_of()
    gradients(stack, recompute_group(), streams)  # gradients of parameters are there then
    stack.zero_grad(set_to_none=False)
    found = {}
    for name, group in (("without", nullcontext()), ("with", recompute_group())):
        before = allocated()
        with group:
            out = stack(streams)
        found[name] = allocated() - before
        del out
        assert allocated() == before, name
    of_input = streams.nbytes // 4
    made = (LAYERS - 1 + (way == "V4.1")) * streams.nbytes + LAYERS * of_input
    assert made <= found["without"] - found["with"] <= made + 64 * 512


@pytest.mark.parametrize("retain", [False, True])
def test_nothing_stays_after_a_backward(retain):
    stack, streams = stack_of(), streams_of()
    loss_of(stack(streams)).backward()
    with recompute_group():
        loss = loss_of(stack(streams))
    before = allocated()
    loss.backward(retain_graph=retain)
    after = allocated()
    assert after <= before
    if retain:
        loss.backward()
        assert allocated() < after


def test_peak_of_a_step():
    """Of two groups one is there at a time."""
    stack, streams = stack_of("modules", "linear"), streams_of()

    def in_groups(streams):
        pairs = list(zip(stack.connections, stack.layers, strict=True))
        for half in (pairs[: LAYERS // 2], pairs[LAYERS // 2 :]):
            with recompute_group():
                for connection, layer in half:
                    streams = connection(streams, layer)
        return streams

    peaks = []
    for forward in (stack, in_groups):
        loss_of(forward(streams)).backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = forward(streams)
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out
    # Without the streams and inputs of the first group, but for its last streams.
    half = LAYERS // 2
    assert peaks[0] - peaks[1] >= (half - 1) * streams.nbytes + half * streams.nbytes // 4


def test_graph_of_a_training_step():
    stack, static = stack_of(), streams_of()

    def step():
        return gradients_of(stack, static)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            static.copy_(torch.randn(static.shape, generator=generator, device="cuda"))
        for value in captured:
            value.fill_(float("nan"))
        graph.replay()
        check_same(captured, gradients_of(stack, static, nullcontext()))


def gradients_of(stack, streams, around=None):
    with around or recompute_group():
        out = stack(streams)
    leaves = [streams, *stack.connections.parameters(), *stack.layers.parameters()]
    return [out.detach(), *torch.autograd.grad(loss_of(out), leaves)]


def test_forward_on_a_side_stream():
    """Whose work is late: what is replayed elsewhere must wait for it."""
    stack, streams = stack_of(), streams_of()
    expected = gradients(stack, nullcontext(), streams)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    group = recompute_group()
    streams = streams.detach().clone().requires_grad_()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        with group:
            out = stack(streams)
    group.replay()
    torch.cuda.current_stream().wait_stream(side)
    loss_of(out).backward()
    check_same([out, streams.grad, *(p.grad for p in stack.parameters())], expected)
    stack.zero_grad()


def test_replay_on_another_stream_into_the_callers_memory():
    stack, streams = stack_of(), streams_of()
    expected = gradients(stack, nullcontext(), streams)
    streams = streams.detach().clone().requires_grad_()
    with recompute_group() as group:
        out = stack(streams)
    given, side = [], torch.cuda.Stream()

    def allocate(shape, dtype, device):
        given.append(torch.full(shape, float("nan"), dtype=dtype, device=device))
        return given[-1]

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        group.replay(allocate)
    loss_of(out).backward()
    check_same([out, streams.grad, *(p.grad for p in stack.parameters())], expected)
    assert len(given) == 2 * LAYERS - 1
    assert not any(tensor.isnan().any() for tensor in given)


def test_memory_that_another_group_has_taken():
    """A kernel that writes raises the version, too."""
    stack, slots, outs = stack_of(), [], []
    for _ in range(2):
        with recompute_group() as group:
            outs.append(stack(streams_of()))
        taken = iter(slots)

        def allocate(shape, dtype, device, taken=taken):
            slot = next(taken, None)
            if slot is None:
                slots.append(slot := torch.empty(shape, dtype=dtype, device=device))
            return slot

        group.replay(allocate)
    with pytest.raises(RecomputeError, match="what a replay has made must be as it was"):
        loss_of(outs[0]).backward()
    loss_of(outs[1]).backward()


def test_two_streams_in_one_group():
    """Two stacks, each on its own stream, one of them late."""
    stacks, streams = [stack_of() for _ in range(2)], [streams_of() for _ in range(2)]
    expected = [
        gradients(stack, nullcontext(), x) for stack, x in zip(stacks, streams, strict=True)
    ]
    sides = [torch.cuda.Stream() for _ in range(2)]
    outs = []
    with recompute_group():
        for index, (stack, x, side) in enumerate(zip(stacks, streams, sides, strict=True)):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                if index:
                    torch.cuda._sleep(SLEEP_CYCLES)
                outs.append(stack(x))
    for side in sides:
        torch.cuda.current_stream().wait_stream(side)
    (loss_of(outs[0]) + loss_of(outs[1])).backward()
    for stack, x, out, values in zip(stacks, streams, outs, expected, strict=True):
        check_same([out, x.grad, *(p.grad for p in stack.parameters())], values)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_of_a_checkpoint(reentrant):
    stack, streams = stack_of(kind="dropout"), streams_of()

    def grouped(streams):
        with recompute_group():
            return stack(streams)

    def forward(streams):
        return checkpoint(grouped, streams, use_reentrant=reentrant)

    check_bits(stack, nullcontext(), streams, forward)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_two_devices_in_one_group():
    first, second = stack_of(), stack_of().to("cuda:1")
    found = []
    for around in (nullcontext(), recompute_group()):
        streams = streams_of()
        with around:
            out = second(first(streams).to("cuda:1"))
        loss_of(out).backward()
        parameters = [*first.parameters(), *second.parameters()]
        found.append([out.detach(), streams.grad, *(p.grad for p in parameters)])
        first.zero_grad()
        second.zero_grad()
    check_same(*found)
