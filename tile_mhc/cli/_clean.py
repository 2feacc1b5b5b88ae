"""`tile-mhc clean`: remove our kernels from TileLang's cache, and nobody else's."""

import re
import shutil
import sys
from pathlib import Path

import click

from tile_mhc import jit, specs
from tile_mhc.cli._options import cache_option, json_option, print_json


@click.command("clean")
@cache_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def clean_command(yes: bool, as_json: bool) -> None:
    """Remove tile_mhc's kernels from TileLang's cache; other projects' entries stay."""
    root = jit.cache_directory()
    entries = find_entries(root)
    size = sum(folder_size(entry) for entry in entries)
    if entries and not yes:
        if as_json:
            raise click.UsageError("--json must come with --yes, as there is nobody to ask")
        question = f"Remove {len(entries)} cache entries ({size / 1e6:.1f} MB) from {root}?"
        try:
            agreed = click.confirm(question, err=True)
        except click.Abort:
            click.echo(err=True)  # the question's line has not ended
            if sys.stdin.isatty():
                raise
            raise click.UsageError("--yes must be given where there is nobody to ask") from None
        if not agreed:
            raise click.Abort
    for entry in entries:
        try:
            shutil.rmtree(entry)
        except OSError as error:
            raise click.ClickException(f"cannot remove {entry}: {error}") from error
    if as_json:
        print_json({"cache_dir": str(root), "removed": len(entries), "bytes": size})
    else:
        click.echo(f"removed {len(entries)} cache entries ({size / 1e6:.1f} MB) from {root}")


def find_entries(root: Path) -> list[Path]:
    """The cache entries, of any TileLang version, that hold kernels of ours."""
    ours = re.compile(rf"\b(?:{'|'.join(sorted(specs.device_functions()))})\b".encode())
    # In order, and once: several files of an entry may name our kernels.
    found: dict[Path, None] = {}
    for pattern in ("*/*/kernels/*/device_kernel.cu", "*/cuda-binaries/*/kernel.*"):
        for file in sorted(root.glob(pattern)):
            try:
                if ours.search(file.read_bytes()):
                    found[file.parent] = None
            except OSError:
                continue
    return list(found)


def folder_size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
