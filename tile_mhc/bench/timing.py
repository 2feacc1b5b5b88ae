"""The clock: CUDA graphs replayed in turn from a cold L2, and eager calls on the host.

One sample is: make L2 cold, replay the graph of the call, wait. By default L2 is made cold by a
copy, which leaves half of it dirty, as an op does that reads as much as it writes: what is dirty is
written back during the call, and as much of what the call writes stays behind. So a call that only
reads pays for up to 25 MB (6 us on an H200) that are not its own. Reading instead leaves L2 clean,
which is fair to such a call and flatters one that writes: at T=4096 H=2560 it then beats its floor.
Overwriting leaves all of it dirty, and would charge every call for up to 50 MB. Without either a
call finds what its last replay left: so much costs a second read of what L2 still holds. The two
events of a sample are nodes of the graph, before and after the call, so that its launch is outside
of the interval. Where torch cannot record events in a graph they stand around the replay, and its
launch counts: 4.7 us for an empty kernel on an H200. Either way `empty_kernel` says what nothing
takes by the same clock.

Calls that are compared take turns, a sample each, so that a change of the card's clock rate meets
all of them. Everything runs on one stream, the one that captures: autograd runs a backward on the
stream of its forward, and a capture that meets another stream fails. (torch then leaves the stream
of that capture current, so that the next one works: the first shape alone seemed to be at fault.)
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Call = Callable[[], Any]
Events = Literal["inside", "around"]
Flush = Literal["copy", "read", "none"]

FLUSH_BYTES = 256 << 20  # read and written together: five times the L2 of an H200
COPY_BYTES = 1 << 30
ROUNDS = 60  # 2 % of a launch-bound op is 0.1 us: with 20 the medians of one op scatter more
WARM_ROUNDS = 3
# Between two synchronisations so few calls that the launch queue, of about a thousand, never fills.
HOST_CALLS = 10
HOST_ROUNDS = 30


@dataclass(frozen=True)
class Times:
    """Median and quartiles of some samples, in microseconds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Times":
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper)

    @property
    def spread(self) -> float:
        """The interquartile range by the median."""
        return (self.upper - self.lower) / self.median


class Graph:
    """A call in a CUDA graph, with an event before it and one after it.

    Capture on the current stream, which must not be the default one, and call once before: what the
    first call compiles, loads or allocates for good cannot be captured.
    """

    def __init__(self, call: Call, events: Events) -> None:
        self.inside = events == "inside"
        self.start, self.end = self._event(), self._event()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            if self.inside:
                self.start.record()
            self.outputs = call()
            if self.inside:
                self.end.record()

    def _event(self) -> torch.cuda.Event:
        if self.inside:
            return torch.cuda.Event(enable_timing=True, external=True)
        return torch.cuda.Event(enable_timing=True)

    def replay(self) -> None:
        if self.inside:
            self.graph.replay()
            return
        self.start.record()
        self.graph.replay()
        self.end.record()

    def microseconds(self) -> float:
        """Of the last replay, once it has ended."""
        milliseconds: float = self.start.elapsed_time(self.end)
        return 1e3 * milliseconds


class Clock:
    """Times graphs on one device, on a stream of its own: see `running`.

    Args:
        device: a CUDA device.
        events: where the events stand; None tries inside first.
        flush_by: what makes L2 cold, or "none".
    """

    def __init__(
        self, device: torch.device, events: Events | None = None, flush_by: Flush = "copy"
    ) -> None:
        self.device = device
        self.flush_by: Flush = flush_by
        self.stream = torch.cuda.Stream(device)
        self._source = torch.zeros(FLUSH_BYTES // 8, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        torch.cuda.synchronize(device)
        self.events: Events = events or self._find_events()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """On the clock's stream, which what is timed must be built on as well."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
            self.stream.synchronize()

    def capture(self, call: Call) -> Graph:
        return Graph(call, self.events)

    def flush(self, flush_by: Flush) -> None:
        """Leave L2 cold, half of it or, by reading, nothing to be written back; or as it is."""
        if flush_by == "copy":
            _copy(self._source, self._target)
        elif flush_by == "read":
            self._source.amax()
            self._target.amax()

    def time(
        self, graphs: Sequence[Graph], rounds: int = ROUNDS, flush_by: Flush | None = None
    ) -> list[Times]:
        """The times of each, replayed in turn; `flush_by` in place of the clock's own."""
        samples: list[list[float]] = [[] for _ in graphs]
        for turn in range(-WARM_ROUNDS, rounds):
            for graph, own in zip(graphs, samples, strict=True):
                self.flush(flush_by or self.flush_by)
                graph.replay()
                self.stream.synchronize()
                if turn >= 0:
                    own.append(graph.microseconds())
        return [Times.of(own) for own in samples]

    def time_host(self, calls: Sequence[Call], rounds: int = HOST_ROUNDS) -> list[Times]:
        """The wall time of one eager call of each on the CPU, in turns of HOST_CALLS.

        The device works behind: it is waited for after a turn, outside of the interval.
        """
        samples: list[list[float]] = [[] for _ in calls]
        with _no_garbage_collection():
            for turn in range(-WARM_ROUNDS, rounds):
                for call, own in zip(calls, samples, strict=True):
                    for _ in range(HOST_CALLS):
                        start = time.perf_counter_ns()
                        call()
                        elapsed = time.perf_counter_ns() - start
                        if turn >= 0:
                            own.append(1e-3 * elapsed)
                    self.stream.synchronize()
        return [Times.of(own) for own in samples]

    def copy_bandwidth(self) -> float:
        """Bytes per microsecond of a copy of COPY_BYTES, reads and writes counted.

        Always after another copy: what is left in L2 at its end was left there before it too.
        """
        source = torch.zeros(COPY_BYTES // 4, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        return 2 * COPY_BYTES / self.time_alone(lambda: _copy(source, target), "copy").median

    def empty_kernel(self) -> Times:
        """A kernel of one thread that does nothing."""
        return self.time_alone(lambda: torch.cuda._sleep(0))

    def time_alone(self, call: Call, flush_by: Flush | None = None) -> Times:
        with self.running():
            call()
            return self.time([self.capture(call)], flush_by=flush_by)[0]

    def _find_events(self) -> Events:
        """Inside, if torch records external events in a graph and they can be read after it."""
        try:
            with self.running():
                torch.cuda._sleep(0)
                graph = Graph(lambda: torch.cuda._sleep(0), "inside")
                graph.replay()
                self.stream.synchronize()
                return "inside" if graph.microseconds() > 0 else "around"
        except (TypeError, ValueError, RuntimeError):
            return "around"


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """By a kernel: a captured `copy_` reached 2760 GB/s on an H200, where kernels reach 4250."""
    torch.mul(source, 1, out=target)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As timeit does: a collection would fall on whichever call comes next."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
