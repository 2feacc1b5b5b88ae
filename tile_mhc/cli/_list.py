"""`tile-mhc list`: the kernels that given sizes need."""

import click
import torch
from rich.table import Column, Table

from tile_mhc import jit, specs
from tile_mhc.cli._options import json_option, kernel_options, print_json, print_table, sizes
from tile_mhc.kernels._arch import DEFAULT


def _own_arch() -> str | None:
    """That of this machine's GPU, if there are kernels for it."""
    if not torch.cuda.is_available():
        return None
    arch = jit.device_arch(torch.cuda.current_device())
    return arch if arch in specs.ARCHS else None


@click.command("list")
@kernel_options(hidden_required=False)
@click.option(
    "--arch",
    type=click.Choice(specs.ARCHS),
    default=lambda: _own_arch() or DEFAULT,
    show_default=f"this machine's GPU, else {DEFAULT}",
    help="What they would run on.",
)
@json_option
def list_command(
    hidden: tuple[int, ...],
    streams: tuple[int, ...],
    repeat: tuple[int, ...],
    dtypes: tuple[str, ...],
    parameters: tuple[str, ...],
    grads: tuple[str, ...],
    ops: tuple[str, ...],
    arch: str,
    as_json: bool,
) -> None:
    """Show which kernels there are, and the arguments that these sizes give them."""
    chosen: dict[str, list[specs.Arguments]] = {}
    asked = sizes(hidden, streams, repeat, dtypes, parameters, grads)
    for name, args in specs.select(asked, ops, arch):
        chosen.setdefault(name, []).append(args)
    rows = [(spec, chosen[spec.name]) for spec in specs.SPECS if spec.name in chosen]
    if as_json:
        print_json(
            [
                {"name": spec.name, "stem": spec.stem, "ops": spec.ops, "arguments": arguments}
                for spec, arguments in rows
            ]
        )
        return
    table = Table("kernel", Column("module", no_wrap=True), "ops", "arguments")
    for spec, arguments in rows:
        table.add_row(
            spec.name,
            f"kernels/mhc/{spec.module.replace('.', '/')}.py",
            ", ".join(spec.ops),
            " ".join(f"({', '.join(map(str, args))})" for args in arguments),
        )
    print_table(table)
