"""Options that several commands share, and how their values are checked."""

import itertools
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from tile_mhc import jit, specs
from tile_mhc.errors import MAX_HIDDEN, SUPPORTED_STREAMS
from tile_mhc.kernels._shapes import HISTORY_STEP
from tile_mhc.ops.sinkhorn import MAX_REPEAT

Command = TypeVar("Command", bound=Callable[..., Any])

# Wide enough for every table, where no terminal says how wide it is.
PLAIN_WIDTH = 200


class Words(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Comma-separated words, each one of `allowed`."""

    name = "list"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
        for word in words:
            if word not in self.allowed:
                self.fail(f"must be among {', '.join(self.allowed)}; got {word!r}", param, ctx)
        return words


class Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Comma-separated integers that `accept` takes; `expected` says which those are."""

    name = "integers"

    def __init__(self, accept: Callable[[int], bool], expected: str) -> None:
        self.accept = accept
        self.expected = expected

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = []
        for word in value.split(","):
            try:
                number = int(word)
            except ValueError:
                number = None
            if number is None or not self.accept(number):
                self.fail(f"must be {self.expected}; got {word.strip()!r}", param, ctx)
            numbers.append(number)
        return tuple(dict.fromkeys(numbers))


HIDDEN = Numbers(lambda h: 0 < h <= MAX_HIDDEN, f"an integer from 1 to {MAX_HIDDEN}")
STREAMS = Numbers(
    lambda n: n in SUPPORTED_STREAMS, f"one of {', '.join(map(str, SUPPORTED_STREAMS))}"
)
REPEAT = Numbers(lambda r: 0 < r <= MAX_REPEAT, f"an integer from 1 to {MAX_REPEAT}")


def kernel_options(hidden_required: bool) -> Callable[[Command], Command]:
    """--hidden, --streams, --dtype, --param-dtype, --grad-dtype, --repeat and --ops."""
    presence: dict[str, Any] = {"required": True}
    if not hidden_required:
        presence = {"default": (4096,), "show_default": "4096"}

    def decorate(command: Command) -> Command:
        for option in (
            click.option(
                "--ops",
                type=Words(specs.OPS),
                default=specs.OPS,
                show_default="all",
                help="Ops whose kernels are wanted, comma-separated.",
            ),
            click.option(
                "--repeat",
                type=REPEAT,
                default=(HISTORY_STEP,),
                show_default=f"up to {HISTORY_STEP}",
                help="Sinkhorn repeat counts, comma-separated.",
            ),
            click.option(
                "--param-dtype",
                "parameters",
                type=Words(specs.EVERY_PARAMETER),
                default=specs.PARAMETERS,
                show_default=",".join(specs.PARAMETERS),
                help="Dtypes that each of the parameters may have, comma-separated.",
            ),
            click.option(
                "--grad-dtype",
                "grads",
                type=Words(specs.STREAMS),
                default=(),
                show_default="none",
                help="Dtypes of gradient accumulators and main_grad, comma-separated.",
            ),
            click.option(
                "--dtype",
                "dtypes",
                type=Words(specs.STREAMS),
                default=(specs.DTYPE,),
                show_default=specs.DTYPE,
                help="Dtypes of the streams, comma-separated.",
            ),
            click.option(
                "--streams",
                type=STREAMS,
                default=(4,),
                show_default="4",
                help="Numbers of streams n, comma-separated.",
            ),
            click.option(
                "--hidden",
                type=HIDDEN,
                help="Hidden sizes H, comma-separated.",
                **presence,
            ),
        ):
            command = option(command)
        return command

    return decorate


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def cache_option(command: Command) -> Command:
    def use(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value == "":
            raise click.BadParameter("must be a folder; got ''", ctx, param)
        # TileLang reads the variable at each use; set before it is imported.
        if value is not None:
            os.environ["TILELANG_CACHE_DIR"] = str(jit.cache_path(value))

    return click.option(
        "--cache-dir",
        type=click.Path(),
        callback=use,
        expose_value=False,
        help="TileLang's cache folder.  [default: $TILELANG_CACHE_DIR or ~/.tilelang/cache]",
    )(command)


def sizes(
    hidden: tuple[int, ...],
    streams: tuple[int, ...],
    repeat: tuple[int, ...],
    dtypes: tuple[str, ...],
    parameters: tuple[str, ...],
    grads: tuple[str, ...] = (),
) -> list[specs.Sizes]:
    choices = itertools.product(streams, hidden, repeat, dtypes)
    return [specs.Sizes(*choice, parameters, grads) for choice in choices]


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    console.print(table)
