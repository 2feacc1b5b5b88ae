"""Recompute groups: the same bits for less memory, and nothing that stays behind."""

import gc
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import distributed
import replaying
import sharding
import tile_mhc
from groups import (
    BF16,
    LAYER_KINDS,
    LAYERS,
    LEAD,
    WAYS,
    H,
    N,
    Stack,
    check_bits,
    check_same,
    first_streams,
    gates,
    gradients,
    loss_of,
)
from tile_mhc import (
    RecomputeError,
    ShapeError,
    UnsupportedError,
    recompute_group,
)
from tile_mhc import _recompute_group as group_module
from tile_mhc.ops import _replay
from tile_mhc.ops import recompute as recompute_op
from tile_mhc.ops._autograd import OPERATORS
from tile_mhc.ops._group import active

STREAMS_BYTES = 2 * 5 * N * H * 2
INPUT_BYTES = STREAMS_BYTES // N


class Watch(TorchDispatchMode):
    """Every operator that runs, and the memory that it made."""

    def __init__(self):
        super().__init__()
        self.names = []
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name.partition("::")[2])
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def live(self, stack, *besides):
        """Bytes that are still there, but for the parameters and these tensors."""
        gc.collect()
        known = {t.untyped_storage()._cdata for t in (*stack.parameters(), *besides)}
        return sum(
            size
            for key, (reference, size) in self._storages.items()
            if key not in known and not reference.expired()
        )

    def replays(self):
        return self.names.count("recompute")


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_bits(way, kind):
    stack = Stack(way, kind)
    with Watch() as watch:
        check_bits(stack, recompute_group())
    assert watch.replays() >= 1 if way != "bias" else watch.names.count("post_out") >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("way", ["modules", "V4.1"])
def test_bits_of_other_dtypes(way, dtype):
    check_bits(Stack(way, dtype=dtype), recompute_group())


@pytest.mark.parametrize("way", ["modules", "functions", "boundaries", "run_sublayers", "V4.1"])
def test_one_launch_a_group(way):
    stack = Stack(way)
    with Watch() as watch:
        gradients(stack, recompute_group())
    assert watch.replays() == 1


@pytest.mark.parametrize("way", ["modules", "functions", "boundaries", "V4.1"])
def test_memory(way):
    """Of the streams and layer inputs only the first streams are there between the two."""
    live, streams = {}, first_streams()
    stack = Stack(way)
    for name, group in (("without", nullcontext()), ("with", recompute_group())):
        with Watch() as watch:
            with group:
                out = stack(streams)
            live[name] = watch.live(stack, out, streams)
    between = LAYERS - 1 + (way == "V4.1")  # the last streams are not its output
    made = between * STREAMS_BYTES + LAYERS * INPUT_BYTES
    assert live["without"] - live["with"] == made


def test_what_is_made_again_goes_as_the_backward_passes():
    stack, there = Stack(), []
    with recompute_group() as group:
        out = stack(first_streams())

    def look(_):
        there.append(sum(made.value is not None for made in group._alive()))

    assert there == []
    for layer in stack.layers:
        layer.linear.weight.register_hook(look)
    loss_of(out).backward()
    # When its weight has its gradient, a layer's input is gone, and its streams are needed yet; of
    # the streams the first and the last are not made again.
    assert there == [6, 4, 2, 0]


def test_a_graph_that_is_dropped_leaves_nothing():
    stack = Stack()
    with Watch() as watch:
        streams = first_streams()
        with recompute_group() as group:
            out = stack(streams)
        del out
        assert watch.live(stack, streams) == 0
    assert group._alive() == []


def test_nothing_but_the_graph_keeps_what_is_kept():
    """Without the collector of cycles: memory must not wait for that."""
    stack, streams = Stack(), first_streams()
    gc.collect()
    gc.disable()
    try:
        with recompute_group() as group:
            out = stack(streams)
        references = [*group._all]
        assert any(reference() is not None for reference in references)
        del out
        assert [reference() for reference in references] == [None] * len(references)
        with recompute_group() as group:
            out = stack(streams)
        references = [*group._all]
        loss_of(out).backward()
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def leave(group, first):
    with group:
        first()
        raise KeyError


def test_an_exception_frees_all():
    stack, kept = Stack(), []
    with Watch() as watch:
        streams = first_streams()
        group = recompute_group()
        with pytest.raises(KeyError):
            leave(group, lambda: kept.append(stack(streams)))
        assert active.group is None
        assert [made for made in group._alive() if made.source.packed is not None] == []
    with pytest.raises(RecomputeError, match="left without an exception"):
        loss_of(kept[0]).backward()
    with pytest.raises(RecomputeError, match="left without an exception"):
        group.replay()
    kept.clear()
    assert watch.live(stack, streams) == 0


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 1, 1), (4,)])
def test_several_groups(sizes):
    stack = Stack()

    def forward(streams):
        pairs = iter(zip(stack.connections, stack.layers, strict=True))
        for size in sizes:
            with recompute_group():
                for _ in range(size):
                    connection, layer = next(pairs)
                    streams = connection(streams, layer)
        return streams

    with Watch() as watch:
        check_bits(stack, nullcontext(), forward=forward)
    assert watch.replays() == len(sizes)


@pytest.mark.parametrize("inner", [0, 1, 2, 3])
def test_nested_groups(inner):
    stack = Stack()

    def forward(streams):
        pairs = list(zip(stack.connections, stack.layers, strict=True))
        for index, (connection, layer) in enumerate(pairs):
            with recompute_group() if index == inner else nullcontext():
                streams = connection(streams, layer)
        return streams

    check_bits(stack, recompute_group(), forward=forward)


def test_nested_in_a_layer():
    stack = Stack()

    def forward(streams):
        for connection, layer in zip(stack.connections, stack.layers, strict=True):

            def grouped(x, layer=layer):
                with recompute_group():
                    return layer(x)

            streams = connection(streams, grouped)
        return streams

    with Watch() as watch:
        check_bits(stack, recompute_group(), forward=forward)
    assert watch.replays() == 1


def test_parts_of_one_group():
    stack = Stack()
    group = recompute_group()

    def forward(streams):
        for connection, layer in zip(stack.connections, stack.layers, strict=True):
            with group.part():
                streams = connection(streams, layer)
            assert active.group is None
        group.close()
        return streams

    with Watch() as watch:
        check_bits(stack, nullcontext(), forward=forward)
    assert watch.replays() == 1


def test_an_exception_in_a_part_closes_the_group():
    group = recompute_group()
    with pytest.raises(KeyError), group.part():
        raise KeyError
    with pytest.raises(RecomputeError, match="closed already"):
        group.part().__enter__()


def test_two_backwards():
    stack, streams = Stack(), first_streams()
    expected = gradients(stack, nullcontext())
    with Watch() as watch:
        with recompute_group() as group:
            out = stack(streams)
        loss = loss_of(out)
        kept = watch.live(stack, out, streams)
        loss.backward(retain_graph=True)
        first = [streams.grad, *(p.grad for p in stack.parameters())]
        # What the replay has made does not stay.
        besides = [tensor for tensor in first if tensor is not None]
        assert watch.live(stack, out, streams, *besides) <= kept
        assert group._alive()
        streams.grad = None
        stack.zero_grad()
        loss.backward()
        second = [streams.grad, *(p.grad for p in stack.parameters())]
    assert watch.replays() == 2
    for grads in (first, second):
        check_same(grads, expected[1:])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("way", ["modules", "functions", "V4.1"])
def test_a_second_backward_of_a_part_of_the_graph(way):
    """The node of the loss is not freed, but ours are."""
    stack = Stack(way)
    with recompute_group():
        out = stack(first_streams())
    grad = torch.ones_like(out)
    out.backward(grad)
    with pytest.raises(RuntimeError, match="second"):
        out.backward(grad)


def test_partial_backwards():
    stack = Stack()
    wanted = [stack.layers[1].linear.weight, stack.connections[2].weight]
    found = []
    for around in (nullcontext(), recompute_group()):
        streams = first_streams()
        with around:
            middle = stack.connections[0](streams, stack.layers[0])
            out = middle
            for connection, layer in list(zip(stack.connections, stack.layers, strict=True))[1:]:
                out = connection(out, layer)
        loss = loss_of(out)
        some = torch.autograd.grad(loss, [*wanted, middle], retain_graph=True)
        last = torch.autograd.grad(loss, stack.layers[3].linear.weight, retain_graph=True)
        rest = torch.autograd.grad(loss, streams)
        found.append([*some, *last, *rest])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


FROZEN = {
    "streams": lambda stack, streams: streams.requires_grad_(False),
    "connections": lambda stack, streams: stack.connections.requires_grad_(False),
    "layers": lambda stack, streams: stack.layers.requires_grad_(False),
    "the first": lambda stack, streams: (
        streams.requires_grad_(False),
        stack.layers[0].requires_grad_(False),
        stack.connections[0].requires_grad_(False),
    ),
    "all but one": lambda stack, streams: (
        streams.requires_grad_(False),
        stack.requires_grad_(False),
        stack.layers[2].requires_grad_(True),
    ),
}


@pytest.mark.parametrize("way", ["modules", "boundaries", "V4.1"])
@pytest.mark.parametrize("what", FROZEN)
def test_frozen(what, way):
    stack = Stack(way)
    found = []
    for around in (nullcontext(), recompute_group()):
        streams = first_streams()
        FROZEN[what](stack, streams)
        found.append(gradients(stack, around, streams))
    assert any(grad is not None for grad in found[0][1:])
    check_same(*found)


def test_without_gradients_nothing_is_noted():
    stack = Stack()
    with recompute_group() as group:
        with torch.no_grad():
            stack(first_streams())
        stack.requires_grad_(False)
        stack(first_streams().requires_grad_(False))
    assert group._all == []


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
@pytest.mark.parametrize("calls_methods", [False, True], ids=["forward", "pre and post"])
def test_under_fully_shard(calls_methods, tmp_path):
    """Which gathers the parameters of a module for its own forward and backward alone."""
    found = distributed.spawn(sharding.in_a_group, tmp_path, calls_methods)
    assert found == {"same": True, "replays": 4}


REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


@REENTRANT
def test_checkpoints_inside(reentrant):
    stack = Stack()

    def forward(streams):
        for index, (connection, layer) in enumerate(
            zip(stack.connections, stack.layers, strict=True)
        ):
            if index % 2:
                streams = checkpoint(connection, streams, layer, use_reentrant=reentrant)
            else:
                streams = connection(streams, layer)
        return streams

    with Watch() as watch:
        check_bits(stack, recompute_group(), forward=forward)
    assert watch.replays() >= 1


@REENTRANT
def test_checkpoints_in_layers(reentrant):
    stack = Stack(kind="norm")

    def forward(streams):
        for connection, layer in zip(stack.connections, stack.layers, strict=True):
            streams = connection(
                streams, lambda x, layer=layer: checkpoint(layer, x, use_reentrant=reentrant)
            )
        return streams

    check_bits(stack, recompute_group(), forward=forward)


@REENTRANT
@pytest.mark.parametrize("way", ["modules", "boundaries", "V4.1"])
def test_checkpoints_outside(way, reentrant):
    stack = Stack(way, "dropout")

    def grouped(streams):
        with recompute_group():
            return stack(streams)

    def forward(streams):
        return checkpoint(grouped, streams, use_reentrant=reentrant)

    check_bits(stack, nullcontext(), forward=forward)


def test_a_checkpoint_outside_keeps_its_input_alone():
    stack, streams = Stack(), first_streams()

    def grouped(streams):
        with recompute_group():
            return stack(streams)

    with Watch() as watch:
        out = checkpoint(grouped, streams, use_reentrant=False)
        assert watch.live(stack, out, streams) < 100  # the state of random numbers


@pytest.mark.parametrize("inside", [False, True])
def test_other_hooks(inside):
    stack = Stack()

    def forward(streams):
        with save_on_cpu() if inside else recompute_group():
            return stack(streams)

    check_bits(stack, recompute_group() if inside else save_on_cpu(), forward=forward)


def test_other_hooks_around_get_what_is_kept():
    stack, streams, packed = Stack(), first_streams(), []

    def pack(tensor):
        packed.append(tensor.untyped_storage().nbytes())
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with recompute_group():
            stack(streams)
        few = packed.count(STREAMS_BYTES)
        packed.clear()
        stack(streams)
        many = packed.count(STREAMS_BYTES)
    # The first streams alone.
    assert few < many
    assert few == 4


def test_main_grad():
    stack, streams = Stack(), first_streams()
    expected = gradients(stack, nullcontext())[2:]
    parameters = list(stack.parameters())
    for connection in stack.connections:
        for parameter in connection.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad_added_to_main_grad = False
    with recompute_group():
        out = stack(streams)
    loss_of(out).backward()
    for parameter, grad in zip(parameters, expected, strict=True):
        if hasattr(parameter, "main_grad"):
            assert parameter.grad_added_to_main_grad
            assert torch.equal(parameter.main_grad, grad)


def in_place_cases():
    def forward(change):
        def run(stack, streams):
            values = {
                "parameter": stack.connections[1].scale,
                "weight": stack.layers[1].linear.weight,
            }
            values["streams"] = streams * 1
            current = values["streams"]
            for index, (connection, layer) in enumerate(
                zip(stack.connections, stack.layers, strict=True)
            ):
                layer_input, post_mix, comb_mix, through = connection.pre(current)
                output = layer(layer_input)
                current = connection.post(output, through, post_mix, comb_mix)
                if index == 1:
                    values |= {"output": output, "post_mix": post_mix, "comb_mix": comb_mix}
            with torch.no_grad():
                values[change].add_(1)
            return current

        return run

    names = ("streams", "output", "post_mix", "comb_mix", "parameter", "weight")
    return {name: forward(name) for name in names}


@pytest.mark.parametrize("change", in_place_cases())
def test_what_is_kept_must_not_change(change):
    stack = Stack()
    run = in_place_cases()[change]
    with recompute_group():
        out = run(stack, first_streams())
    with pytest.raises(RecomputeError, match=r"at version \d; got .* at version \d, which"):
        loss_of(out).backward()


def test_what_is_made_again_may_change():
    """What the graph saw is made again: autograd alone would have to refuse."""
    stack = Stack()
    expected = gradients(stack, nullcontext())

    def forward(streams):
        inputs = []
        for connection, layer in zip(stack.connections, stack.layers, strict=True):
            layer_input, post_mix, comb_mix, through = connection.pre(streams)
            inputs.append(layer_input)
            streams = connection.post(layer(layer_input), through, post_mix, comb_mix)
        for layer_input in inputs:
            layer_input.detach().zero_()
        return streams

    found = gradients(stack, recompute_group(), forward=forward)
    check_same(found, expected)


def test_streams_that_are_changed_before_the_next_read_them():
    stack = Stack()

    def forward(streams):
        for connection, layer in zip(stack.connections, stack.layers, strict=True):
            streams = connection(streams, layer)
            streams.mul_(0.5)
        return streams

    found = []
    for around in (nullcontext(), recompute_group()):
        found.append(gradients(stack, around, forward=forward))
    check_same(*found)


def test_explicit_replay():
    stack, streams = Stack(), first_streams()
    expected = gradients(stack, nullcontext())
    with Watch() as watch:
        with recompute_group() as group:
            out = stack(streams)
        group.replay()
        group.replay()
        assert watch.replays() == 1
        loss_of(out).backward()
        assert watch.replays() == 1
        group.replay()
        assert watch.replays() == 1
    found = [out.detach(), streams.grad, *(p.grad for p in stack.parameters())]
    check_same(found, expected)


class Arena:
    """Memory of the caller's."""

    def __init__(self, change=lambda tensor: tensor):
        self.given, self.change = [], change

    def __call__(self, shape, dtype, device):
        self.given.append(torch.empty(shape, dtype=dtype, device=device))
        return self.change(self.given[-1])


def test_destinations_of_the_caller():
    stack, streams, arena = Stack(), first_streams(), Arena()
    expected = gradients(stack, nullcontext())
    with recompute_group() as group:
        out = stack(streams)
    group.replay(arena)
    layer, between = (*LEAD, H), (*LEAD, N, H)
    assert [t.shape for t in arena.given] == [layer, between] * (LAYERS - 1) + [layer]
    loss_of(out).backward()
    found = [out.detach(), streams.grad, *(p.grad for p in stack.parameters())]
    check_same(found, expected)


def test_a_launch_raises_the_versions_of_what_it_writes(monkeypatch):
    """A kernel's writes are not torch's: another replay into the same memory must not pass."""
    monkeypatch.setattr(recompute_op.jit, "kernel", lambda *_: lambda *_: None)
    monkeypatch.setattr(recompute_op, "_write_table", lambda *_: None)
    streams = first_streams().detach()
    mixes = [torch.rand(*LEAD, N) for _ in range(3)]
    outputs = [torch.empty(*LEAD, H, dtype=streams.dtype) for _ in range(3)]
    combs = [torch.rand(*LEAD, N, N) for _ in range(3)]
    inputs = [torch.empty(*LEAD, H, dtype=streams.dtype) for _ in range(3)]
    residuals = [torch.empty_like(streams) for _ in range(3)]
    recompute_op._cuda(streams, mixes, outputs, mixes, combs, inputs, residuals)
    assert [tensor._version for tensor in (*inputs, *residuals)] == [1] * 6
    assert [tensor._version for tensor in (*mixes, *outputs, *combs)] == [0] * 9


def test_norm_weights_of_a_launch_are_aligned(monkeypatch):
    given = []
    monkeypatch.setattr(
        recompute_op.jit, "kernel", lambda name, *_: lambda *args: given.append((name, args))
    )
    monkeypatch.setattr(recompute_op, "_write_table", lambda *_: None)
    streams, weight = first_streams().detach(), torch.rand(H + 1)[1:]
    mix, row = torch.rand(*LEAD, N), torch.empty(*LEAD, H, dtype=streams.dtype)
    recompute_op._cuda(streams, [mix], [], [], [], [row], [], [weight], 1e-6)
    (name, (_, passed, _)) = given[-1]
    assert name == "input_norm"
    assert passed.data_ptr() % 16 == 0
    assert torch.equal(passed, weight)


def test_a_destination_that_is_written_to():
    stack, arena = Stack(), Arena()
    with recompute_group() as group:
        out = stack(first_streams())
    group.replay(arena)
    arena.given[0].zero_()
    with pytest.raises(RecomputeError, match="what a replay has made must be as it was"):
        loss_of(out).backward()


SHARED = torch.empty(2 * STREAMS_BYTES, dtype=torch.uint8)
BAD_DESTINATIONS = {
    "none": (lambda t: None, "must be a torch.Tensor"),
    "shape": (lambda t: t[1:], r"must be \(2, 5"),
    "dtype": (lambda t: t.float(), "bfloat16"),
    "strides": (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
    "misaligned": (
        lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape),
        "must start at a multiple",
    ),
    "shared": (
        lambda t: SHARED[: t.nbytes].view(t.dtype).view(t.shape),
        "must not share memory",
    ),
}


@pytest.mark.parametrize("case", BAD_DESTINATIONS)
def test_bad_destinations(case):
    change, message = BAD_DESTINATIONS[case]
    stack = Stack()
    with recompute_group() as group:
        out = stack(first_streams())
    with pytest.raises(ShapeError, match=message):
        group.replay(Arena(change))
    # And nothing is spoilt.
    loss_of(out).backward()


def test_entered_once():
    group = recompute_group()
    with group, pytest.raises(RecomputeError, match="one that is open already"):
        group.__enter__()
    with pytest.raises(RecomputeError, match="one that is closed already"):
        group.__enter__()


def test_closed_once():
    group = recompute_group()
    with group, pytest.raises(RecomputeError, match="a group that is open"):
        group.close()
    with pytest.raises(RecomputeError, match="closed already"):
        group.close()
    with pytest.raises(RecomputeError, match="one that is not open"):
        group.__exit__(None, None, None)


def test_left_in_order():
    first, second = recompute_group(), recompute_group()
    first.__enter__()
    second.__enter__()
    with pytest.raises(RecomputeError, match="got another order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert active.group is None


def test_a_group_left_in_another_order_holds_nothing():
    """Its hooks lie under others: they stay, and keep every tensor as it is."""
    stack, group, inner = Stack(), recompute_group(), save_on_cpu()
    group.__enter__()
    out = stack(first_streams())
    inner.__enter__()
    with pytest.raises(RecomputeError, match="got another order"):
        group.__exit__(None, None, None)
    assert active.group is None
    assert not group._made
    assert not group._roots
    with pytest.raises(RecomputeError, match="an exception has left"):
        loss_of(out).backward()
    inner.__exit__(None, None, None)
    check_bits(stack, nullcontext(), first_streams())
    torch._C._autograd._pop_saved_tensors_default_hooks()
    assert not group_module.has_hooks()


def test_left_in_its_thread():
    group, caught = recompute_group(), []

    def leave():
        with pytest.raises(RecomputeError, match="the thread that entered it"):
            group.__exit__(None, None, None)
        caught.append(True)

    with group:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
    assert caught


def test_a_group_is_of_one_thread():
    stack = Stack()
    other = Stack()
    with recompute_group() as group:
        out = stack(first_streams())
        count = len(group._all)
        thread = threading.Thread(target=lambda: loss_of(other(first_streams())).backward())
        thread.start()
        thread.join()
        assert len(group._all) == count
    thread = threading.Thread(target=lambda: loss_of(out).backward())
    thread.start()
    thread.join()
    expected = gradients(Stack(), nullcontext())
    assert len(expected) == len(list(stack.parameters())) + 2
    assert stack.layers[0].linear.weight.grad is not None


def test_backward_inside():
    stack = Stack()
    expected = gradients(stack, nullcontext())
    streams = first_streams()
    with recompute_group():
        out = stack(streams)
        loss_of(out).backward()
    found = [out.detach(), streams.grad, *(p.grad for p in stack.parameters())]
    check_same(found, expected)


def test_transforms_are_refused():
    stack = Stack()

    def loss(streams):
        with recompute_group():
            return loss_of(stack(streams))

    with pytest.raises(UnsupportedError, match=r"outside of the transforms of torch\.func"):
        torch.func.grad(loss)(first_streams().detach())


def test_gradients_of_gradients_are_refused():
    stack = Stack()
    stack.requires_grad_(False)
    streams = first_streams()
    with recompute_group():
        out = stack(streams)
    (grad,) = torch.autograd.grad(loss_of(out), streams, create_graph=True)
    with pytest.raises(UnsupportedError, match="the gradient must be taken once"):
        grad.square().sum().backward()


def test_second_derivatives_of_what_is_not_ours():
    weight = torch.randn(H, H, requires_grad=True)
    x = torch.randn(3, H)
    with recompute_group():
        out = (x @ weight).pow(3).sum()
    (grad,) = torch.autograd.grad(out, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), weight)
    out = (x @ weight).pow(3).sum()
    (grad,) = torch.autograd.grad(out, weight, create_graph=True)
    assert torch.equal(second, torch.autograd.grad(grad.sum(), weight)[0])


def test_tensors_without_a_storage():
    dense = torch.eye(4, requires_grad=True)
    found = []
    for around in (nullcontext(), recompute_group()):
        with around:
            out = torch.sparse.mm(torch.eye(4).to_sparse_csr(), dense).square()
            out = torch.sparse.mm(torch.eye(4).to_sparse_coo(), out).square().sum()
        found.append(torch.autograd.grad(out, dense)[0])
    assert torch.equal(*found)


def test_vmap_inside():
    stack = Stack(layers=1)
    gate, (connection,) = stack.layers[0], stack.connections
    streams = first_streams()

    def one(streams):
        layer_input, post_mix, comb_mix = tile_mhc.fused_pre(streams, *gates(connection))
        return tile_mhc.post(gate(layer_input), streams, post_mix, comb_mix)

    found = []
    for around in (nullcontext(), recompute_group()):
        with around:
            out = torch.vmap(one)(streams)
        found.append(torch.autograd.grad(loss_of(out), [streams, connection.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("inside", [False, True])
def test_compiled(inside):
    stack = Stack()

    def grouped(streams):
        with recompute_group():
            return stack(streams)

    if inside:
        forward, around = torch.compile(grouped, backend="eager"), nullcontext()
    else:
        forward, around = torch.compile(stack, backend="aot_eager"), recompute_group()
    check_bits(stack, around, forward=forward)


def test_no_tokens():
    stack = Stack()
    streams = torch.empty(0, N, H, dtype=BF16, requires_grad=True)
    with recompute_group():
        out = stack(streams)
    out.float().sum().backward()
    assert streams.grad.shape == streams.shape


@pytest.mark.parametrize("way", ["modules", "boundaries", "V4.1"])
def test_known_calls_tell_too(way):
    """Calls that go past the dispatcher, with kernels that do nothing."""
    stack, streams = Stack(way), first_streams()

    def nothing(name, args):
        return lambda *given: None

    names = sorted(OPERATORS)
    with replaying.replaying(nothing), replaying.launchers_on_cpu(*names):
        replaying.forget()
        for _ in range(_replay.SIGHTINGS + 2):
            with recompute_group() as group:
                out = stack(streams)
            count, alive = len(group._all), len(group._alive())
            out.backward(torch.zeros_like(out))
            assert group._alive() == []
        # Of post_pre without a pre_mix the backward has an empty argument, and is never known.
        dispatched = {"post_pre_backward"} if way == "boundaries" else set()
        with pytest.MonkeyPatch.context() as patch:
            for name in set(OPERATORS) - dispatched:
                if OPERATORS[name].replay is not None:
                    patch.setattr(OPERATORS[name], "_operator", None)
            with recompute_group() as group:
                out = stack(streams)
            assert (len(group._all), len(group._alive())) == (count, alive)
            out.backward(torch.zeros_like(out))
    replaying.forget()
    assert count == 2 * LAYERS + (way == "V4.1")


def test_hooks_in_force():
    top = torch._C._autograd._top_saved_tensors_default_hooks
    assert top(True) is None
    with saved_tensors_hooks(pack := (lambda t: t), unpack := (lambda t: t)):
        assert top(True) == (pack, unpack)
    assert top(True) is None


def test_weak_references_of_storages():
    tensor = torch.empty(3)
    storage = tensor.untyped_storage()
    reference, address = storage._weak_ref(), storage._cdata
    assert tensor.view(3, 1)[1:].untyped_storage()._cdata == address
    del storage
    assert not torch.UntypedStorage._expired(reference)
    del tensor
    assert torch.UntypedStorage._expired(reference)
    # Its address is not another's, as long as the weak reference is there.
    assert all(torch.empty(3).untyped_storage()._cdata != address for _ in range(100))
    torch.UntypedStorage._free_weak_ref(reference)


def test_a_group_that_is_never_closed_frees_its_weak_references(monkeypatch):
    freed, free = [], torch.UntypedStorage._free_weak_ref
    monkeypatch.setattr(
        group_module, "_free_weak_ref", lambda reference: (freed.append(reference), free(reference))
    )
    group, stack = recompute_group(), Stack()
    with group.part():
        out = stack(first_streams())
    expected = list(group._storages)
    assert len(expected) == 2 * LAYERS + 1
    del group, out
    gc.collect()
    assert sorted(freed) == sorted(expected)


@pytest.mark.parametrize("retain", [False, True])
def test_whether_a_backward_retains_its_graph(retain):
    seen = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda _: seen.append(torch._C._autograd._get_current_graph_task_keep_graph()))
    (x * 2).sum().backward(retain_graph=retain)
    assert seen == [retain]
