"""One op at one shape: check it, capture it, time it, beside the peer's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tile_mhc.bench.checking import check, poisoned_memory
from tile_mhc.bench.inputs import Inputs, make_inputs
from tile_mhc.bench.ops import Adding, Call, Op
from tile_mhc.bench.peer import STREAMS as PEER_STREAMS
from tile_mhc.bench.peer import Peer
from tile_mhc.bench.timing import Clock, Graph, Times

WARM_CALLS = 2


@dataclass(frozen=True)
class Shape:
    T: int
    H: int
    n: int

    def __str__(self) -> str:
        return f"{self.T}x{self.H}x{self.n}"


@dataclass(frozen=True)
class Side:
    """Ours or the peer's: its times, or what is wrong with it."""

    device: Times | None = None
    host: Times | None = None
    problem: str | None = None

    @property
    def us(self) -> float | None:
        return self.device.median if self.device else None

    @property
    def host_us(self) -> float | None:
        return self.host.median if self.host else None


@dataclass(frozen=True)
class Result:
    """One row. `peer` is None where there is nothing to compare with."""

    op: str
    shape: Shape
    floor_bytes: int
    floor_us: float
    ours: Side
    peer: Side | None

    @property
    def ratio(self) -> float | None:
        """Ours by the peer's."""
        theirs = self.peer.us if self.peer else None
        return self.ours.us / theirs if self.ours.us and theirs else None

    @property
    def over_floor(self) -> float | None:
        return self.ours.us / self.floor_us if self.ours.us else None

    @property
    def gbs(self) -> float | None:
        """The fewest bytes by our time, in GB/s."""
        return self.floor_bytes / self.ours.us * 1e-3 if self.ours.us else None


class WrongResultError(Exception):
    """The op does not compute what the reference does."""


def measure_all(
    ops: Sequence[Op],
    shapes: Sequence[Shape],
    clock: Clock,
    bandwidth: float,
    peer: Peer | None,
) -> Iterator[Result]:
    """Every op at every shape, shape by shape; `bandwidth` is in bytes per microsecond."""
    for shape in shapes:
        with clock.running():
            x = make_inputs(shape.T, shape.H, shape.n, clock.device)
        for op in ops:
            with clock.running():
                ours, theirs = measure(op, x, clock, peer)
            floor = op.floor(shape.T, shape.H, shape.n)
            yield Result(op.name, shape, floor, floor / bandwidth, ours, theirs)
        del x
        torch.cuda.empty_cache()


def measure(op: Op, x: Inputs, clock: Clock, peer: Peer | None = None) -> tuple[Side, Side | None]:
    """Ours and the peer's. What is wrong with one costs the other nothing."""
    x = x.with_layers() if op.layers else x
    prepare: list[Callable[[Inputs], Call]] = [op.ours]
    if peer is not None and x.n == PEER_STREAMS and op.name in peer.calls:
        prepare.append(peer.calls[op.name])
    sides = [Side() for _ in prepare]
    calls: dict[int, Call] = {}
    graphs: dict[int, Graph] = {}
    for index, preparation in enumerate(prepare):
        try:
            call = preparation(x)
            graphs[index] = capture(op, x, call, clock)
            calls[index] = call
        except Exception as failure:
            sides[index] = Side(problem=describe(failure))
    try:
        device = clock.time(list(graphs.values()))
        host = clock.time_host(list(calls.values()))
        for index, on_device, on_host in zip(graphs, device, host, strict=True):
            sides[index] = Side(on_device, on_host)
    except Exception as failure:
        for index in graphs:
            sides[index] = Side(problem=f"timing: {describe(failure)}")
    return sides[0], sides[1] if len(sides) > 1 else None


def capture(op: Op, x: Inputs, call: Call, clock: Clock) -> Graph:
    """A graph of `call`, if its results are right, eager and replayed, into memory full of NaN.

    Raises:
        WrongResultError: they are not.
    """
    reset(call)
    with poisoned_memory():
        outputs = call()
    if error := check(op, x, outputs):
        raise WrongResultError(error)
    del outputs
    for _ in range(WARM_CALLS):
        call()
    graph = clock.capture(call)
    for out in graph.outputs:
        out.fill_(float("nan"))
    reset(call)
    graph.replay()
    if error := check(op, x, graph.outputs):
        raise WrongResultError(f"replayed: {error}")
    return graph


def reset(call: Call) -> None:
    if isinstance(call, Adding):
        call.reset()


def describe(failure: BaseException) -> str:
    """One line; a compiler's message carries its whole source.

    With the error that it hides: what fails in a capture makes the capture's end fail, too.
    """
    lines = str(failure).strip().splitlines()
    text = f"{type(failure).__name__}: {lines[0][:300] if lines else ''}"
    hidden = None if failure.__suppress_context__ else failure.__context__
    return f"{text}, after {describe(hidden)}" if hidden else text
