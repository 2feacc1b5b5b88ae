"""`tile-mhc list`: the kernels that given sizes need."""

import click
from rich.table import Column, Table

from tile_mhc import specs
from tile_mhc.cli._options import json_option, kernel_options, print_json, print_table, sizes


@click.command("list")
@kernel_options(hidden_required=False)
@json_option
def list_command(
    hidden: tuple[int, ...],
    streams: tuple[int, ...],
    repeat: tuple[int, ...],
    dtypes: tuple[str, ...],
    parameters: tuple[str, ...],
    grads: tuple[str, ...],
    ops: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show which kernels there are, and the arguments that these sizes give them."""
    chosen: dict[str, list[specs.Arguments]] = {}
    for name, args in specs.select(sizes(hidden, streams, repeat, dtypes, parameters, grads), ops):
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
