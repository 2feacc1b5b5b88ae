"""Time every op on a GPU, beside TileKernels 1.0.0 where that is importable.

Each op is captured in a CUDA graph. Ours and theirs are replayed in turn, the L2 cache overwritten
before every replay; a time is the median of REPEATS replays, between two events. Single backwards
are called without autograd, the sub-layer goes through it, forward and backward in one graph.

An op whose result is wrong is not timed. Results, of an eager run into memory full of NaN and of
the replayed graph, are compared with tile_mhc.reference in float64, all elements, sums over the
tokens included: |got - want| <= TOLERANCE[dtype] * (|want| + 4 rms(want)).

The floor of an op is the fewest bytes it can move, divided by the copy bandwidth of the card.
GB/s counts the same bytes. `*.bwd` writes the gradient of the residual; TileKernels adds to one
that exists, which costs it a read of the streams.

Exit codes: 0; 1 an op failed, was wrong, or exceeded --max-ratio; 2 bad usage, or no GPU.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_ops import STREAMS, Inputs, Op, Outputs, Peer, Run, find_peer, make_inputs, make_ops
from torch import Tensor

HERE = Path(__file__).resolve().parent
SHAPES = ((8192, 7168), (4096, 4096), (4096, 2560), (128, 7168), (16, 7168))
REPEATS = 20
FLUSH_BYTES = 256 << 20
COPY_BYTES = 1 << 30
CHUNK = 1024  # tokens that the reference takes at a time
# bfloat16 rounds by at most 2**-9, three times at most; TF32 products are off by 2e-4 of the rms.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float32: 2e-3}
PARAMETERS = ("weight", "scale", "bias", "head_scale", "head_bias", "head_weight")


def find_error(got: Tensor, want: Tensor) -> str | None:
    """What is wrong with `got`; a NaN is."""
    if got.numel() != want.numel():
        return f"{tuple(got.shape)} for {tuple(want.shape)}"
    error = (got.reshape(want.shape).double() - want).abs()
    bound = TOLERANCE[got.dtype] * (want.abs() + 4 * want.square().mean().sqrt())
    wrong = ~(error <= bound)
    if not wrong.any():
        return None
    worst = error.masked_fill(error.isnan(), torch.inf).max()
    return f"{int(wrong.sum())} of {wrong.numel()} elements, by up to {float(worst):.2e}"


def check(op: Op, inputs: Inputs, outputs: Outputs) -> str | None:
    """Compare with the float64 reference, CHUNK tokens at a time."""

    def part(name: str, value: Any, tokens: slice) -> Any:
        if isinstance(value, list):
            return [part(name, tensor, tokens) for tensor in value]
        return (value if name in PARAMETERS else value[:, tokens]).double()

    total = inputs["residual"].shape[1]
    sums: dict[int, Tensor] = {}
    for start in range(0, total, CHUNK):
        tokens = slice(start, start + CHUNK)
        wants = op.truth({name: part(name, value, tokens) for name, value in inputs.items()})
        for index, (got, want) in enumerate(zip(outputs, wants, strict=True)):
            if got is None or want is None:
                continue
            if index in op.summed:
                sums[index] = sums.get(index, torch.zeros_like(want)) + want
                continue
            by_token = got if got.shape[0] == 1 else got.unsqueeze(0)
            error = find_error(by_token[:, tokens], want)
            if error:
                return f"output {index}, tokens from {start}: {error}"
    for index, want in sums.items():
        error = find_error(outputs[index], want)  # type: ignore[arg-type]
        if error:
            return f"output {index}: {error}"
    return None


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def capture(op: Op, inputs: Inputs, run: Run) -> tuple[torch.cuda.CUDAGraph, str | None]:
    """A graph of `run`, and what is wrong with its results."""
    reset = getattr(run, "reset", lambda: None)
    reset()
    with poisoned_memory():
        outputs = run()
    error = check(op, inputs, outputs)
    del outputs
    graph = torch.cuda.CUDAGraph()
    if error:
        return graph, error
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = run()
    for out in outputs:
        if out is not None:
            out.fill_(float("nan"))
    reset()
    graph.replay()
    error = check(op, inputs, outputs)
    return graph, f"replayed: {error}" if error else None


def time_replays(
    graphs: list[Callable[[], object]], flush: Tensor, repeats: int = REPEATS
) -> list[float]:
    """The median microseconds of each, replayed in turn."""
    pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for repeat in range(repeats + 3):
        for replay, events in zip(graphs, pairs, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            replay()
            end.record()
            if repeat >= 3:
                events.append((start, end))
    torch.cuda.synchronize()
    return [
        statistics.median(1e3 * start.elapsed_time(end) for start, end in events)
        for events in pairs
    ]


def copy_bandwidth(device: torch.device, flush: Tensor) -> float:
    """Bytes per microsecond, reads and writes counted."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / time_replays([lambda: target.copy_(source)], flush, repeats=200)[0]


def measure(
    op: Op, inputs: Inputs, peer: Peer | None, flush: Tensor
) -> tuple[float | None, float | None, list[str]]:
    """Microseconds of ours and of the peer's, and what went wrong."""
    inputs = op.prepare(inputs)
    graphs, problems = [], []
    for who in ("ours", "peer"):
        graph = None
        if who == "ours" or (peer is not None and op.peer is not None):
            try:
                run = op.ours(inputs) if who == "ours" else op.peer(peer, inputs)  # type: ignore[misc,arg-type]
                graph, error = capture(op, inputs, run)
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
            if error:
                graph = None
                problems.append(f"{who}: {error}")
        graphs.append(graph)
    timed = [graph for graph in graphs if graph is not None]
    times = iter(time_replays([graph.replay for graph in timed], flush))
    ours, theirs = (None if graph is None else next(times) for graph in graphs)
    return ours, theirs, problems


def environment(device: torch.device, commit: str | None) -> dict[str, str]:
    def output_of(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip().partition("\n")[0] or "unknown"

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(device),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "tilelang": importlib.metadata.version("tilelang"),
        "commit": commit or output_of("git", "describe", "--always", "--dirty"),
    }


def select_ops(names: str | None) -> list[Op]:
    """Ops by full name (post.bwd) or stem (post)."""
    ops = make_ops()
    if names is None:
        return ops
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {op.name for op in ops} | {op.name.partition(".")[0] for op in ops}
    unknown = sorted(set(wanted) - known)
    if unknown or not wanted:
        raise argparse.ArgumentTypeError(
            f"--ops must name some of {', '.join(op.name for op in ops)}; got {unknown or names!r}"
        )
    return [op for op in ops if op.name in wanted or op.name.partition(".")[0] in wanted]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """TxH,TxH,..."""
    shapes = []
    for item in text.split(","):
        tokens, _, hidden = item.strip().partition("x")
        if not (tokens.isdecimal() and hidden.isdecimal() and int(tokens) and int(hidden)):
            raise argparse.ArgumentTypeError(
                f"--shapes must be TxH,TxH,... with T and H at least 1; got {text!r}"
            )
        shapes.append((int(tokens), int(hidden)))
    return shapes


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", help="op names or stems, by comma; default: all")
    parser.add_argument("--shapes", type=parse_shapes, default=list(SHAPES), help="TxH,TxH,...")
    parser.add_argument("--no-peer", action="store_true", help="do not look for TileKernels")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append JSON lines to FILE")
    parser.add_argument("--commit", help="recorded as the commit; default: from git")
    parser.add_argument("--max-ratio", type=float, help="fail where ours / peer is above this")
    arguments = parser.parse_args(argv)
    try:
        arguments.ops = select_ops(arguments.ops)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed; torch sees none")
    return arguments


def row(name: str, cells: list[float | int | None]) -> str:
    formats = ("6d", "6d", "9.1f", "7.0f", "7.2f", "9.1f", "6.2f")
    text = [
        " " * (int(spec.partition(".")[0].rstrip("d")) - 1) + "-"
        if cell is None
        else format(cell, spec)
        for cell, spec in zip(cells, formats, strict=True)
    ]
    return f"{name:18}" + " ".join(text)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    warnings.filterwarnings("ignore", message=".*deterministic.*")  # poisoned_memory's own doing
    device = torch.device("cuda", torch.cuda.current_device())
    peer = None
    if not arguments.no_peer:
        try:
            peer = find_peer()
            print(f"peer: {'TileKernels' if peer else 'not installed'}")
        except Exception as error:
            print(f"peer: does not import: {type(error).__name__}: {error}")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    bandwidth = copy_bandwidth(device, flush)
    facts = environment(device, arguments.commit)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"copy bandwidth {bandwidth * 1e-3:.0f} GB/s\n")
    print(f"{'op':18}{'T':>6} {'H':>6} {'us':>9} {'GB/s':>7} {'x floor':>7} {'peer us':>9} ratio")
    failed = False
    for tokens, hidden in arguments.shapes:
        inputs = make_inputs(tokens, hidden, device)
        for op in arguments.ops:
            floor_bytes = op.floor(tokens, hidden, STREAMS)
            floor = floor_bytes / bandwidth
            us, peer_us, problems = measure(op, inputs, peer, flush)
            ratio = us / peer_us if us and peer_us else None
            speed = floor_bytes / us * 1e-3 if us else None
            over_floor = us / floor if us else None
            print(row(op.name, [tokens, hidden, us, speed, over_floor, peer_us, ratio]), flush=True)
            for problem in problems:
                print(f"  {problem}", flush=True)
            too_slow = ratio is not None and ratio > (arguments.max_ratio or float("inf"))
            failed |= us is None or too_slow
            if arguments.record and us is not None:
                line = facts | {
                    "op": op.name,
                    "T": tokens,
                    "H": hidden,
                    "n": STREAMS,
                    "us": round(us, 2),
                    "floor_us": round(floor, 2),
                    "peer_us": None if peer_us is None else round(peer_us, 2),
                }
                with arguments.record.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        del inputs
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
