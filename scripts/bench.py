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

What is going to run is compiled first, on all cores: our kernels in threads, TileKernels' in a
process a stem, which leave them in TileLang's cache. `--quick` takes QUICK_SHAPES: one width, so a
third of the compilation. A failure of the peer costs its column of that row alone.

Exit codes: 0; 1 an op failed, was wrong, or exceeded --max-ratio; 2 bad usage, or no GPU.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_ops import STREAMS, Inputs, Op, Outputs, Peer, Run, find_peer, make_inputs, make_ops
from torch import Tensor

from tile_mhc import jit, specs

HERE = Path(__file__).resolve().parent
QUICK_SHAPES = ((4096, 2560), (16, 2560))
SHAPES = ((8192, 7168), (4096, 4096), (4096, 2560), (128, 7168), (16, 7168))
REPEATS = 60  # 2 % of a launch-bound op is 0.1 us: with 20 the medians of one op scatter more
FLUSH_BYTES = 256 << 20
COPY_BYTES = 1 << 30
CHUNK = 1024  # tokens that the reference takes at a time
# bfloat16 rounds by at most 2**-9, three times at most; TF32 products are off by 2e-4 of the rms.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float32: 2e-3}
WARM_SECONDS = 120
# The ops of `specs` behind a stem that is not one of them.
OPS_OF = {
    "sub_layer": ("projection", "split_mixes", "sinkhorn", "aggregate", "fused_pre", "post"),
}
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
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    problems = []
    for who in ("ours", "peer"):
        if who == "peer" and (peer is None or op.peer is None):
            continue
        error = None
        try:
            run = op.ours(inputs) if who == "ours" else op.peer(peer, inputs)  # type: ignore[misc,arg-type]
            graph, error = capture(op, inputs, run)
        except Exception as failure:
            error = describe(failure)
        if error:
            problems.append(f"{who}: {error}")
        else:
            graphs[who] = graph
    try:
        medians = time_replays([graph.replay for graph in graphs.values()], flush)
    except Exception as failure:
        return None, None, [*problems, f"timing: {describe(failure)}"]
    times = dict(zip(graphs, medians, strict=True))
    return times.get("ours"), times.get("peer"), problems


def describe(failure: BaseException) -> str:
    """One line; a compiler's message carries its whole source."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:300] if lines else ''}"


def precompile(ops: list[Op], shapes: list[tuple[int, int]], peer: Peer | None, jobs: int) -> None:
    """Compile what the run needs; what fails here fails again, and is reported, where it runs."""
    start = time.perf_counter()
    stems = list(dict.fromkeys(op.name.partition(".")[0] for op in ops))
    commands = [] if peer is None else [warm_command(stem, ops, shapes) for stem in peer_stems(ops)]
    hidden_sizes = sorted({hidden for _, hidden in shapes})
    sizes = [specs.Sizes(STREAMS, hidden) for hidden in hidden_sizes]
    kernels = specs.select(sizes, {name for stem in stems for name in OPS_OF.get(stem, (stem,))})
    arch = jit.device_arch(torch.cuda.current_device())
    jit.import_tilelang()

    def ours(kernel: tuple[str, specs.Arguments]) -> str | None:
        try:
            jit.compile_kernel(*kernel, arch)
        except jit.CompileError as failure:
            return describe(failure)
        return None

    def theirs(command: list[str]) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=WARM_SECONDS)
        except subprocess.TimeoutExpired:
            return f"peer, {command[-1]}: took more than {WARM_SECONDS} s"
        lines = done.stderr.strip().splitlines()
        return f"peer, {command[-1]}: {lines[-1] if lines else ''}" if done.returncode else None

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(theirs, command) for command in commands]
        futures += [pool.submit(ours, kernel) for kernel in kernels]
        problems = [problem for future in futures if (problem := future.result())]
    seconds = time.perf_counter() - start
    print(f"compiled in {seconds:.0f} s: {len(kernels)} kernels, {len(commands)} stems of the peer")
    for problem in problems:
        print(f"  {problem}")


def peer_stems(ops: list[Op]) -> list[str]:
    """The stems whose kernels the peer needs: what its fused ops run, the others compile too."""
    stems = list(dict.fromkeys(op.name.partition(".")[0] for op in ops if op.peer is not None))
    covered = set(OPS_OF["sub_layer"]) - {"fused_pre"} <= set(stems)
    return [stem for stem in stems if not (stem == "sub_layer" and covered)]


def warm_command(stem: str, ops: list[Op], shapes: list[tuple[int, int]]) -> list[str]:
    names = [op.name for op in ops if op.name.partition(".")[0] == stem]
    shape_text = ",".join(f"{tokens}x{hidden}" for tokens, hidden in shapes)
    script = str(HERE / "bench.py")
    return [sys.executable, script, "--shapes", shape_text, "--warm-peer", "--ops", ",".join(names)]


def warm_peer(ops: list[Op], shapes: list[tuple[int, int]], device: torch.device) -> int:
    """Run the peer's side of `ops` once, for what that leaves in the cache."""
    peer = find_peer()
    failed = False
    for tokens, hidden in shapes:
        inputs = make_inputs(tokens, hidden, device)
        for op in ops:
            if peer is None or op.peer is None:
                continue
            try:
                op.peer(peer, op.prepare(inputs))()
                torch.cuda.synchronize()
            except Exception as failure:
                print(f"{op.name} {describe(failure)}", file=sys.stderr)
                failed = True
    return int(failed)


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
    parser.add_argument("--shapes", type=parse_shapes, help="TxH,TxH,...; default: all of SHAPES")
    parser.add_argument("--quick", action="store_true", help="two shapes of one width")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="compile on so many cores; default: all"
    )
    parser.add_argument("--warm-peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-peer", action="store_true", help="do not look for TileKernels")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append JSON lines to FILE")
    parser.add_argument("--commit", help="recorded as the commit; default: from git")
    parser.add_argument("--max-ratio", type=float, help="fail where ours / peer is above this")
    arguments = parser.parse_args(argv)
    try:
        arguments.ops = select_ops(arguments.ops)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {arguments.jobs}")
    if arguments.shapes is None:
        arguments.shapes = list(QUICK_SHAPES if arguments.quick else SHAPES)
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
    if arguments.warm_peer:
        return warm_peer(arguments.ops, arguments.shapes, device)
    peer = None
    if not arguments.no_peer:
        try:
            peer = find_peer()
            print(f"peer: {'TileKernels' if peer else 'not installed'}")
        except Exception as error:
            print(f"peer: does not import: {type(error).__name__}: {error}")
    precompile(arguments.ops, arguments.shapes, peer, arguments.jobs)
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
