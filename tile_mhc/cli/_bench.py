"""`tile-mhc bench`: every op timed on the GPU, by its byte floor and beside TileKernels."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from tile_mhc import jit, specs
from tile_mhc.bench import cliffs, compiling, measuring, peer, records
from tile_mhc.bench.measuring import Result, Shape, Side
from tile_mhc.bench.ops import Op, make_ops
from tile_mhc.bench.peer import Peer
from tile_mhc.bench.records import Setting
from tile_mhc.bench.timing import COPY_BYTES, Clock, Events, Flush, Times
from tile_mhc.cli._options import (
    HIDDEN,
    STREAMS,
    Numbers,
    json_option,
    print_json,
    print_table,
)

TOKENS = Numbers(lambda t: t > 0, "an integer of at least 1")
DEFAULT_SHAPES = ((8192, 7168), (4096, 4096), (4096, 2560), (128, 7168), (16, 7168))
DEFAULT_TOKENS = (8192, 4096, 128, 16)
DEFAULT_HIDDEN = (2560, 4096, 7168)


class OpNames(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """An op by its name (post.bwd), or several by their stem (post)."""

    name = "op"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        ops = make_ops()
        if value not in {op.name for op in ops} | {op.stem for op in ops}:
            names = ", ".join(op.name for op in ops)
            self.fail(f"must be among {names}; got {value!r}", param, ctx)
        return str(value)


class TokensByHidden(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """TxH,TxH,..."""

    name = "TxH,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        shapes = []
        for word in value.split(","):
            tokens, cross, hidden = word.strip().partition("x")
            if not cross:
                self.fail(f"must be TxH,TxH,...; got {word.strip()!r}", param, ctx)
            shapes.append(
                (TOKENS.convert(tokens, param, ctx)[0], HIDDEN.convert(hidden, param, ctx)[0])
            )
        return tuple(dict.fromkeys(shapes))


@click.command("bench")
@click.argument("ops", nargs=-1, type=OpNames())
@click.option("--tokens", type=TOKENS, help="Token counts T, with every --hidden.")
@click.option("--hidden", type=HIDDEN, help="Hidden sizes H, with every --tokens.")
@click.option("--shapes", type=TokensByHidden(), help="Instead of those two, pairs of them.")
@click.option(
    "--cliffs",
    "looks_for_cliffs",
    is_flag=True,
    help=f"Instead of those, {len(cliffs.TOKENS)} token counts around the edges of tiles by "
    f"{len(cliffs.HIDDEN)} widths; exit with 1 if a shape takes more than {cliffs.FACTOR} times as "
    f"long as one next to it, by their floors.",
)
@click.option(
    "--streams", type=STREAMS, default=(4,), show_default="4", help="Numbers of streams n."
)
@click.option(
    "--vs",
    type=click.Choice([peer.NAME]),
    help="Time it too, in turns with ours: the release that is found, 1.0.0 or 2.1.0.",
)
@click.option(
    "--events",
    type=click.Choice(["inside", "around"]),
    help="Of the graph, where the clock's events stand.  [default: inside, where torch can]",
)
@click.option(
    "--flush",
    "flush_by",
    type=click.Choice(["copy", "read", "none"]),
    default="copy",
    show_default=True,
    help="What makes L2 cold: a copy, half of which the op writes back, a read, or nothing.",
)
@click.option(
    "--record",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append one JSON line per op and shape.",
)
@click.option("--commit", help="What --record has for the commit.  [default: git's]")
@click.option(
    "--max-ratio",
    type=click.FloatRange(min=0, min_open=True),
    help="Exit with 1 where ours takes more than so many times the peer's time.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="one per CPU core",
    help="Kernels compiled at a time, before.",
)
@click.option("--warm-peer", is_flag=True, hidden=True)
@json_option
def bench_command(
    ops: tuple[str, ...],
    tokens: tuple[int, ...] | None,
    hidden: tuple[int, ...] | None,
    shapes: tuple[tuple[int, int], ...] | None,
    looks_for_cliffs: bool,
    streams: tuple[int, ...],
    vs: str | None,
    events: Events | None,
    flush_by: Flush,
    record: Path | None,
    commit: str | None,
    max_ratio: float | None,
    jobs: int,
    warm_peer: bool,
    as_json: bool,
) -> None:
    """Time ops on the GPU: OPS by name (post.bwd) or stem (post), by default all.

    A time is the median of CUDA-graph replays from a cold L2, +- half its interquartile range. The
    floor is the fewest bytes that the op can move, at the copy bandwidth of this card; GB/s counts
    the same bytes. Host is the wall time of an eager call on the CPU. An op whose result is not the
    float64 reference's is not timed, and the exit code is 1.
    """
    if max_ratio is not None and vs is None:
        raise click.UsageError("--max-ratio needs --vs, as there is nothing to compare with")
    pairs = choose_pairs(tokens, hidden, shapes, looks_for_cliffs)
    wanted = [Shape(t, h, n) for n in streams for t, h in pairs]
    chosen = [op for op in make_ops() if not ops or op.name in ops or op.stem in ops]
    if not torch.cuda.is_available():
        raise click.UsageError("a CUDA device is needed; torch sees none")
    own = jit.device_arch(torch.cuda.current_device())
    if own not in specs.ARCHS:
        raise click.UsageError(
            f"the GPU must be one of {', '.join(specs.ARCHS)}, to have kernels; got {own}"
        )
    tile_kernels = find_peer() if vs else None
    device = torch.device("cuda", torch.cuda.current_device())
    if warm_peer and tile_kernels:
        problems = list(compiling.warm_peer(chosen, wanted, tile_kernels, device))
        if problems:
            raise click.ClickException("; ".join(problems))
        return

    if record:
        check_appendable(record)
    compile_before(chosen, wanted, tile_kernels, jobs)
    clock = Clock(device, events, flush_by)
    bandwidth = clock.copy_bandwidth()
    empty = clock.empty_kernel()
    title = f"{peer.NAME} {tile_kernels.release}" if tile_kernels else None
    setting = records.make_setting(clock, bandwidth, empty, commit, title)
    if not as_json:
        print_setting(setting, empty)
    results: list[Result] = []
    measured = measuring.measure_all(chosen, wanted, clock, bandwidth, tile_kernels)
    for shape, group in itertools.groupby(measured, key=lambda result: result.shape):
        block = list(report(group, len(chosen) * len(wanted), len(results), setting, record))
        results += block
        if not as_json:
            print_table(make_table(shape, block, with_peer=vs is not None))
    compared = cliffs.compare(results, empty.median)
    if as_json:
        print_json(
            asdict(setting)
            | {
                "results": [as_dict(result) for result in results],
                "cliffs": [str(cliff) for cliff in cliffs.find_cliffs(compared)],
            }
        )
    elif looks_for_cliffs:
        click.echo(verdict(compared))
    raise_if_bad(results, max_ratio, compared if looks_for_cliffs else [])


def choose_pairs(
    tokens: tuple[int, ...] | None,
    hidden: tuple[int, ...] | None,
    shapes: tuple[tuple[int, int], ...] | None,
    looks_for_cliffs: bool,
) -> Sequence[tuple[int, int]]:
    """The pairs (T, H) that the options ask for."""
    if sum((bool(tokens or hidden), bool(shapes), looks_for_cliffs)) > 1:
        raise click.UsageError("--shapes, --cliffs, and --tokens with --hidden exclude each other")
    if shapes:
        return shapes
    if looks_for_cliffs:
        return [(t, h) for h in cliffs.HIDDEN for t in cliffs.TOKENS]
    if tokens or hidden:
        return [(t, h) for h in hidden or DEFAULT_HIDDEN for t in tokens or DEFAULT_TOKENS]
    return DEFAULT_SHAPES


def find_peer() -> Peer:
    try:
        found = peer.find()
    except Exception as error:
        text = f"--vs {peer.NAME} does not import: {measuring.describe(error)}"
        raise click.UsageError(text) from error
    if found is None:
        raise click.UsageError(f"--vs {peer.NAME} needs it installed")
    return found


def check_appendable(file: Path) -> None:
    """Before the run, as it takes minutes."""
    try:
        file.open("a").close()
    except OSError as error:
        raise click.UsageError(f"--record must be writable; got {file} ({error})") from error


def compile_before(
    ops: list[Op], shapes: list[Shape], tile_kernels: Peer | None, jobs: int
) -> None:
    kernels = compiling.kernels(ops, shapes, jit.device_arch(torch.cuda.current_device()))
    commands = compiling.peer_commands(ops, shapes, tile_kernels) if tile_kernels else {}
    tail = f", and {peer.NAME}' of {len(commands)} stems" if commands else ""
    note(f"compiling {len(kernels)} kernels{tail}")
    for problem in compiling.compile_all(kernels, commands, jobs):
        note(problem)


def report(
    results: Iterator[Result], total: int, done: int, setting: Setting, file: Path | None
) -> Iterator[Result]:
    """Record each as it comes, and say on stderr how it went: a run may be cut off."""
    for number, result in enumerate(results, done + 1):
        time = "failed" if result.ours.us is None else f"{result.ours.us:.1f} us"
        note(f"[{number}/{total}] {result.shape} {result.op} {time}")
        for who, side in (("ours", result.ours), (peer.NAME, result.peer)):
            if side and side.problem:
                note(f"  {who}: {side.problem}")
        line = records.make_record(setting, result)
        if file and line:
            records.append(file, line)
        yield result


def note(text: str) -> None:
    click.echo(text, err=True)


def print_setting(setting: Setting, empty: Times) -> None:
    click.echo(
        f"{setting.gpu}, driver {setting.driver}, torch {setting.torch}, "
        f"tilelang {setting.tilelang}, commit {setting.commit}, {setting.date}"
    )
    click.echo(
        f"copy bandwidth {setting.copy_gbs:.0f} GB/s, {COPY_BYTES >> 30} GiB, read and write"
    )
    click.echo(
        f"empty kernel {empty.median:.2f} us {spread(empty)}, by the same clock: "
        f"events {setting.events} the graph, L2 {setting.flush} before"
    )
    if setting.peer:
        click.echo(f"peer: {setting.peer}")


def make_table(shape: Shape, results: Sequence[Result], with_peer: bool) -> Table:
    table = Table(title=f"T = {shape.T}, H = {shape.H}, n = {shape.n}", title_justify="left")
    table.add_column("op", no_wrap=True)
    headings = ["us", "+-", "GB/s", "x floor", "host us"]
    if with_peer:
        headings += ["peer us", "+-", "ours / peer", "peer host us"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        ours, theirs = result.ours, result.peer or Side()
        cells = [
            number(ours.us, ".1f"),
            spread(ours.device),
            number(result.gbs, ".0f"),
            number(result.over_floor, ".2f"),
            number(ours.host_us, ".1f"),
        ]
        if with_peer:
            cells += [
                number(theirs.us, ".1f"),
                spread(theirs.device),
                number(result.ratio, ".2f"),
                number(theirs.host_us, ".1f"),
            ]
        table.add_row(result.op, *cells)
    return table


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def spread(times: Times | None) -> str:
    """Half the interquartile range, in percent of the median."""
    return f"{50 * times.spread:.1f}%" if times else "-"


def as_dict(result: Result) -> dict[str, Any]:
    return asdict(result) | {
        "ratio": result.ratio,
        "over_floor": result.over_floor,
        "gbs": result.gbs,
    }


def verdict(compared: Sequence[cliffs.Comparison]) -> str:
    """One line, and one for each cliff."""
    found = cliffs.find_cliffs(compared)
    text = f"cliffs: {len(found)} in {len(compared)} comparisons with neighbouring shapes"
    if compared and not found:
        text += f"; worst: {max(compared, key=lambda comparison: comparison.factor)}"
    return "\n".join([text, *(f"  {cliff}" for cliff in found)])


def raise_if_bad(
    results: Sequence[Result],
    max_ratio: float | None,
    compared: Sequence[cliffs.Comparison],
) -> None:
    """Exit with 1, and say why in one line."""

    def names(found: Sequence[Result]) -> str:
        return ", ".join(f"{result.op} at {result.shape}" for result in found)

    complaints = []
    if failed := [result for result in results if result.ours.problem]:
        complaints.append(f"not timed: {names(failed)}")
    limit = max_ratio if max_ratio is not None else float("inf")
    if slow := [result for result in results if (result.ratio or 0) > limit]:
        complaints.append(f"above --max-ratio {max_ratio:g}: {names(slow)}")
    if found := cliffs.find_cliffs(compared):
        complaints.append(f"cliffs: {len(found)}, the worst: {found[0]}")
    if complaints:
        raise click.ClickException("; ".join(complaints))
