"""`tile-mhc compile`: fill the cache with every kernel that given sizes need."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tile_mhc import jit, specs
from tile_mhc.cli import _measure, _resources
from tile_mhc.cli._options import (
    Words,
    cache_option,
    json_option,
    kernel_options,
    print_json,
    print_table,
    sizes,
)


@dataclass(frozen=True)
class Outcome:
    """One row of the closing table."""

    name: str
    args: specs.Arguments
    arch: str
    compiled: jit.Compiled | None = None
    resources: _resources.Resources | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))})"

    @property
    def status(self) -> str:
        if self.error and self.compiled is None:
            return "failed"
        if self.compiled is None:
            return "measured"
        return "built" if self.compiled.built else "cached"

    @property
    def spills(self) -> int | None:
        r = self.resources
        if r is None or r.spill_stores is None or r.spill_loads is None:
            return None
        return r.spill_stores + r.spill_loads


@click.command("compile")
@click.option(
    "--arch",
    type=Words(specs.ARCHS),
    help=f"Targets, comma-separated: {', '.join(specs.ARCHS)}.  [default: this machine's GPU]",
)
@kernel_options(hidden_required=True)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="one per CPU core",
    help="Kernels compiled at a time.",
)
@cache_option
@click.option("--fail-on-spills", is_flag=True, help="Exit with 1 if a kernel spills registers.")
@click.option(
    "--measure",
    "only_measures",
    is_flag=True,
    help="Store nothing: find out what the kernels take of an SM, in a third of the time.",
)
@json_option
def compile_command(
    arch: tuple[str, ...] | None,
    hidden: tuple[int, ...],
    streams: tuple[int, ...],
    repeat: tuple[int, ...],
    dtypes: tuple[str, ...],
    parameters: tuple[str, ...],
    grads: tuple[str, ...],
    ops: tuple[str, ...],
    jobs: int,
    fail_on_spills: bool,
    only_measures: bool,
    as_json: bool,
) -> None:
    """Compile kernels into TileLang's cache. Needs nvcc, but no GPU.

    The cache can be copied to another machine with the same TileLang version; there, set
    TILELANG_CACHE_DIR to it, and nothing is compiled.
    """
    if arch is None:
        if not torch.cuda.is_available():
            raise click.UsageError(
                f"--arch must be given where there is no GPU: {', '.join(specs.ARCHS)}"
            )
        own = jit.device_arch(torch.cuda.current_device())
        if own not in specs.ARCHS:
            raise click.UsageError(
                f"--arch must be among {', '.join(specs.ARCHS)}; got {own}, this machine's GPU"
            )
        arch = (own,)
    root = jit.cache_directory()
    if not only_measures:
        _check_cache(root)
    # The variable forbids surprises, and this command is how kernels are built on purpose.
    os.environ["TILE_MHC_JIT"] = "1"

    chosen = sizes(hidden, streams, repeat, dtypes, parameters, grads)
    wanted = [(name, args, a) for a in arch for name, args in specs.select(chosen, ops, a)]
    start = time.perf_counter()
    outcomes = _run_all(wanted, jobs, only_measures, quiet=as_json)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "cache_dir": str(root),
                "seconds": round(seconds, 3),
                "kernels": [_as_json(outcome) for outcome in outcomes],
            }
        )
    else:
        _print_outcomes(outcomes, seconds, None if only_measures else str(root))
    _raise_if_bad(outcomes, fail_on_spills)


def _check_cache(root: Path) -> None:
    if problem := jit.cache_problem(root):
        raise click.ClickException(f"--cache-dir must be writable; got {root} ({problem})")
    if not jit.import_tilelang().env.is_cache_enabled():
        raise click.ClickException(
            "TILELANG_DISABLE_CACHE must not be set, as nothing would be stored; "
            f"got {os.environ.get('TILELANG_DISABLE_CACHE', '')!r}"
        )


def _run_all(
    wanted: list[_measure.Kernel], jobs: int, only_measures: bool, quiet: bool
) -> list[Outcome]:
    outcomes: dict[_measure.Kernel, Outcome] = {}
    with _reporter(len(wanted), quiet) as report:
        for outcome in (_measure_all if only_measures else _compile_all)(wanted, jobs):
            outcomes[outcome.name, outcome.args, outcome.arch] = outcome
            report(outcome)
    return [outcomes[kernel] for kernel in wanted]


def _compile_all(wanted: list[_measure.Kernel], jobs: int) -> Iterator[Outcome]:
    """Compile in threads: lowering releases the GIL, and nvcc is a process of its own."""
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(_compile_one, *kernel) for kernel in wanted]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _measure_all(wanted: list[_measure.Kernel], jobs: int) -> Iterator[Outcome]:
    for kernel, found in _measure.measure(wanted, jobs):
        if isinstance(found, str):
            yield Outcome(*kernel, error=found)
        else:
            yield Outcome(*kernel, resources=found)


def _compile_one(name: str, args: specs.Arguments, arch: str) -> Outcome:
    try:
        compiled = jit.compile_kernel(name, args, arch)
    except jit.CompileError as error:
        return Outcome(name, args, arch, error=str(error))
    try:
        resources = _resources.measure(compiled)
    except (OSError, jit.CompileError) as error:
        return Outcome(name, args, arch, compiled, error=str(error))
    return Outcome(name, args, arch, compiled, resources)


@contextlib.contextmanager
def _reporter(total: int, quiet: bool) -> Iterator[Callable[[Outcome], None]]:
    """A progress bar on a terminal, one line per kernel elsewhere; both on stderr."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        done = 0

        def line(outcome: Outcome) -> None:
            nonlocal done
            done += 1
            if quiet:
                return
            detail = outcome.error or ""
            if outcome.compiled is not None:
                detail = f"{outcome.compiled.seconds:6.2f} s  {outcome.compiled.key[:12]}"
            click.echo(
                f"[{done}/{total}] {outcome.arch} {outcome.title} {outcome.status} {detail}",
                err=True,
            )

        yield line
        return
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda outcome: progress.update(task, advance=1, description=outcome.title)


def _print_outcomes(outcomes: list[Outcome], seconds: float, root: str | None) -> None:
    table = Table("kernel", "arch", "key")
    for heading in ("seconds", "", "registers", "shared memory", "stack", "spills"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for o in outcomes:
        r = o.resources
        table.add_row(
            o.title,
            o.arch,
            o.compiled.key[:12] if o.compiled else "-",
            f"{o.compiled.seconds:.2f}" if o.compiled else "-",
            o.status,
            str(r.registers) if r else "-",
            str(r.shared_memory) if r else "-",
            str(r.stack) if r else "-",
            "?" if o.spills is None else str(o.spills),
        )
    print_table(table)
    counts = Counter(outcome.status for outcome in outcomes)
    done = ["measured"] if root is None else ["built", "cached"]
    where = "nothing stored" if root is None else f"cache: {root}"
    numbers = ", ".join(f"{counts[status]} {status}" for status in (*done, "failed"))
    click.echo(f"{numbers} in {seconds:.1f} s; {where}")


def _as_json(outcome: Outcome) -> dict[str, Any]:
    compiled, resources = outcome.compiled, outcome.resources
    return {
        "name": outcome.name,
        "args": outcome.args,
        "arch": outcome.arch,
        "status": outcome.status,
        "key": compiled.key if compiled else None,
        "seconds": round(compiled.seconds, 3) if compiled else None,
        **(asdict(resources) if resources else {}),
        "error": outcome.error,
    }


def _raise_if_bad(outcomes: list[Outcome], fail_on_spills: bool) -> None:
    failed = [o for o in outcomes if o.error]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(outcomes)} kernels failed, the first with: {failed[0].error}"
        )
    # Unknown counts as spilling: the option is a promise.
    spilling = [o.title for o in outcomes if o.spills != 0]
    if fail_on_spills and spilling:
        raise click.ClickException(
            f"{len(spilling)} of {len(outcomes)} kernels spill registers: {', '.join(spilling)}"
        )
