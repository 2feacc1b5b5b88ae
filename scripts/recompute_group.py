"""What a recompute group saves and costs, beside no group and beside torch's checkpoints.

    python scripts/recompute_group.py --record scripts/records/recompute_group.json

A stack of sub-layers, each a `HyperConnection` round one linear map from H to H in bfloat16:
- none: as it is;
- groups: a `recompute_group` round each so many sub-layers;
- checkpoint: `torch.utils.checkpoint` (not reentrant) round each two.

The three take turns. A step is forward and backward, with a gradient that is given.
peak_gb: the most memory that is allocated during a step, above the parameters and their gradients.
step_ms: a step, between two events, while the GPU has work enough to stay behind the host. Median.
host_us: the time until forward and backward have returned, by sub-layer, with so few tokens that
    the GPU is not waited for. Median, and its difference to `none`. `hooks` is what torch takes for
    hooks of saved tensors that do nothing, round the linear maps alone: no group can take less.
replay: one launch of `recompute` for 10 sub-layers, by the time of a copy of the fewest bytes.

Gradients are compared by their bits. Without a GPU only that is checked.

Exit codes: 0; 1 gradients differ; 2 bad usage. A bar that is missed is printed, and no failure.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from text_batches import device_name
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import tile_mhc
from tile_mhc.nn import HyperConnection

VARIANTS = ("none", "groups", "checkpoint")
HOOKS = "hooks"  # timed on the host alone
REPLAYS = ((8192, 7168, 1.09), (4096, 2560, 1.12))
# By quantity: the most that it may be.
BARS = {"peak": 0.50, "beside checkpoint": 0.85, "beside none": 1.08, "host_us": 25.0}
HOST_TOKENS = 16
GB = 1e9


class Stack(nn.Module):
    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        device, count, hidden = arguments.device, arguments.sub_layers, arguments.hidden
        self.connections = nn.ModuleList(
            HyperConnection(hidden, device=device) for _ in range(count)
        )
        self.layers = nn.ModuleList(
            nn.Linear(hidden, hidden, bias=False, dtype=torch.bfloat16, device=device)
            for _ in range(count)
        )
        for connection in self.connections:
            nn.init.constant_(connection.scale, 0.5)
        self.group = arguments.group
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def run(self, streams: Tensor, first: int, count: int) -> Tensor:
        for i in range(first, min(first + count, len(self.layers))):
            streams = self.connections[i](streams, self.layers[i])
        return streams

    def forward(self, streams: Tensor, variant: str) -> Tensor:
        if variant == "none":
            return self.run(streams, 0, len(self.layers))
        if variant == HOOKS:
            for connection, layer in zip(self.connections, self.layers, strict=True):
                streams = connection(streams, functools.partial(hooked, layer))
            return streams
        if variant == "groups":
            for first in range(0, len(self.layers), self.group):
                with tile_mhc.recompute_group():
                    streams = self.run(streams, first, self.group)
            return streams
        for first in range(0, len(self.layers), 2):
            streams = checkpoint(self.run, streams, first, 2, use_reentrant=False)
        return streams

    def gradients(self, streams: Tensor) -> list[Tensor]:
        return [streams.grad, *(parameter.grad for parameter in self.parameters())]


def itself(saved: Any) -> Any:
    return saved


def hooked(layer: nn.Module, layer_input: Tensor) -> Any:
    with saved_tensors_hooks(itself, itself):
        return layer(layer_input)


def make_step(stack: Stack, tokens: int, arguments: argparse.Namespace) -> Any:
    generator = torch.Generator(arguments.device).manual_seed(0)
    shape = (tokens, 4, arguments.hidden)
    streams, grad = (
        torch.randn(shape, generator=generator, device=arguments.device).bfloat16()
        for _ in range(2)
    )
    streams.requires_grad_()
    streams.grad = torch.zeros_like(streams)

    def step(variant: str) -> None:
        stack(streams, variant).backward(grad)

    return step, streams


def same_bits(stack: Stack, step: Any, streams: Tensor) -> list[str]:
    """The variants whose gradients are not those of `none`."""
    found: dict[str, list[Tensor]] = {}
    for variant in VARIANTS:
        for grad in stack.gradients(streams):
            grad.zero_()
        step(variant)
        found[variant] = [grad.clone() for grad in stack.gradients(streams)]
    return [
        variant
        for variant in VARIANTS[1:]
        if not all(torch.equal(a, b) for a, b in zip(found[variant], found["none"], strict=True))
    ]


def peak_gb(stack: Stack, step: Callable[[str], None], variant: str) -> float:
    parameters = sum(2 * p.nbytes for p in stack.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - parameters
    step(variant)
    torch.cuda.synchronize()
    # The streams, their gradient and the given one are of the step; nothing else is there.
    print(f"  {variant}: of the peak, inputs and the like {others / GB:.3f} GB", file=sys.stderr)
    return (torch.cuda.max_memory_allocated() - parameters) / GB


def step_ms(step: Callable[[str], None], variant: str, repeats: int) -> list[float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(repeats):
        start.record()
        step(variant)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    import gc

    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def host_us(step: Callable[[str], None], variant: str, count: int, repeats: int) -> list[float]:
    samples = []
    with no_collection():
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            step(variant)
            samples.append(1e-3 * (time.perf_counter_ns() - start) / count)
    return samples


def replay_ratios(device: torch.device) -> dict[str, dict[str, float]]:
    from tile_mhc.bench.measuring import Shape, measure_all
    from tile_mhc.bench.ops import make_ops
    from tile_mhc.bench.timing import Clock

    clock = Clock(device)
    bandwidth = clock.copy_bandwidth()
    op = [op for op in make_ops() if op.name == "recompute.fwd"]
    shapes = [Shape(tokens, hidden, 4) for tokens, hidden, _ in REPLAYS]
    found = {}
    for result in measure_all(op, shapes, clock, bandwidth, None):
        if result.ours.us is None or result.over_floor is None:
            raise RuntimeError(f"recompute at {result.shape}: {result.ours.problem}")
        found[f"{result.shape.T}x{result.shape.H}"] = {
            "us": result.ours.us,
            "floor_us": result.floor_us,
            "over_floor": result.over_floor,
        }
    return found


def measure(arguments: argparse.Namespace, stack: Stack) -> dict[str, Any]:
    step, _ = make_step(stack, arguments.tokens, arguments)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in VARIANTS}
    peaks = {}
    for _ in range(2):
        for variant in VARIANTS:
            step(variant)
    for variant in VARIANTS:
        peaks[variant] = peak_gb(stack, step, variant)
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            times = step_ms(step, variant, arguments.steps)
            samples[variant].setdefault("step_ms", []).extend(times)
    del step
    few, _ = make_step(stack, HOST_TOKENS, arguments)
    samples[HOOKS] = {}
    for _ in range(2):
        for variant in samples:
            for _ in range(3):
                few(variant)
    count = len(stack.layers)
    for _ in range(arguments.rounds):
        for variant in samples:
            times = host_us(few, variant, count, 2 * arguments.steps)
            samples[variant].setdefault("host_us", []).extend(times)
    of_hooks = {HOOKS: {"host_us": statistics.median(samples[HOOKS]["host_us"])}}
    return of_hooks | {
        variant: {
            "peak_gb": peaks[variant],
            **{name: statistics.median(values) for name, values in samples[variant].items()},
            "step_ms_range": [min(samples[variant]["step_ms"]), max(samples[variant]["step_ms"])],
        }
        for variant in VARIANTS
    }


def bars(rows: dict[str, Any], replays: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What was found, and the most that it may be."""
    none, groups, other = (rows[name] for name in VARIANTS)
    found = [
        ("peak memory, of that without", groups["peak_gb"] / none["peak_gb"], BARS["peak"]),
        (
            "step, of that with checkpoints",
            groups["step_ms"] / other["step_ms"],
            BARS["beside checkpoint"],
        ),
        ("step, of that without", groups["step_ms"] / none["step_ms"], BARS["beside none"]),
        (
            "host time added, us a sub-layer",
            groups["host_us"] - none["host_us"],
            BARS["host_us"],
        ),
    ]
    for tokens, hidden, bar in REPLAYS:
        name = f"{tokens}x{hidden}"
        found.append((f"replay {name}, of its floor", replays[name]["over_floor"], bar))
    return found


def print_rows(rows: dict[str, Any], found: list[tuple[str, float, float]]) -> None:
    columns = ("peak_gb", "step_ms", "host_us")
    print("".join(["".ljust(12), *(column.rjust(10) for column in columns)]))
    for variant, row in rows.items():
        cells = (f"{row[column]:10.2f}" if column in row else " " * 10 for column in columns)
        print("".join([variant.ljust(12), *cells]))
    for name, value, bar in found:
        verdict = "met" if value <= bar else "MISSED"
        print(f"{name:36}{value:8.3f}  bar {bar:6.2f}  {verdict}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default: {device}")
    for name, default, what in (
        ("hidden", 4096, "width of a stream"),
        ("tokens", 4096, "tokens of a step"),
        ("sub-layers", 32, "sub-layers of the stack"),
        ("group", 8, "sub-layers of a group"),
        ("rounds", 5, "turns of each variant"),
        ("steps", 4, "steps of a turn"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--record", type=Path, help="a JSON file to write")
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    stack = Stack(arguments)
    step, streams = make_step(stack, min(arguments.tokens, 256), arguments)
    differing = same_bits(stack, step, streams)
    del step, streams
    for variant in differing:
        print(f"error: {variant}: the gradients must have the bits of none's", file=sys.stderr)
    print(
        f"{arguments.sub_layers} sub-layers, groups of {arguments.group}, {arguments.tokens} x "
        f"{arguments.hidden}, on {device_name(device)}; bits of the gradients: "
        f"{'differ' if differing else 'the same'}"
    )
    if device.type != "cuda":
        return 1 if differing else 0
    rows = measure(arguments, stack)
    del stack
    torch.cuda.empty_cache()
    replays = replay_ratios(torch.device("cuda", torch.cuda.current_device()))
    found = bars(rows, replays)
    print_rows(rows, found)
    settings = ("hidden", "tokens", "sub_layers", "group", "rounds", "steps")
    report = {
        "gpu": device_name(device),
        "torch": torch.__version__,
        "settings": {name: getattr(arguments, name) for name in settings},
        "variants": rows,
        "replay": replays,
        "bars": [{"what": name, "value": value, "bar": bar} for name, value, bar in found],
        "same_bits": not differing,
    }
    print(json.dumps(report))
    if arguments.record is not None:
        arguments.record.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
