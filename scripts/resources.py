#!/usr/bin/env python3
"""Compare what kernels take of an SM with the committed table, scripts/resources.json.

    tile-mhc compile --measure --json ... > compiled.json
    resources.py compiled.json            exits with 1 where a kernel spills, takes over 10 % more
                                          registers or shared memory, or is not in the table (of
                                          the architectures that were compiled); on other GPUs than
                                          Hopper where it spills more than there; and where it takes
                                          more shared memory than a CTA has
    resources.py compiled.json --renew    write the table's rows of these architectures, unless a
                                          kernel spills on Hopper
    --some                                what was compiled is a part of the kernels: rows of others
                                          stay, but for kernels that there are no more

`scripts/check.sh kernels` does the first, `RENEW_RESOURCES=1 scripts/check.sh kernels` the second,
and with `OPS=post,expand` each for the kernels of these ops.
Registers are a matter of the compiler too: with another nvcc than the table's, what only grew is
printed and does not fail.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tile_mhc import jit, specs
from tile_mhc.kernels._arch import ARCHITECTURES

TABLE = Path(__file__).resolve().with_name("resources.json")
GROWTH = 1.1
# What `scripts/check.sh kernels` compiles for.
SIZES = specs.Sizes(4, 4096)
COUNTED = ("registers", "shared_memory")
SPILLS = ("spill_stores", "spill_loads")
# What all shapes are chosen for; elsewhere a few registers of an address may not fit.
NO_SPILLS = "sm_90a"

Row = dict[str, int]


def title_of(name: str, args: Iterable[object], arch: str) -> str:
    return f"{name}({', '.join(map(str, args))}) {arch}"


def titles(arch: str) -> set[str]:
    """Every kernel that has a row of this architecture, where that has rows."""
    return {title_of(name, args, arch) for name, args in specs.select([SIZES], arch=arch)}


def rows_of(compiled: dict[str, Any]) -> dict[str, Row]:
    rows = {}
    for kernel in compiled["kernels"]:
        if kernel["error"]:
            raise SystemExit(f"{kernel['name']}: {kernel['error']}")
        title = title_of(kernel["name"], kernel["args"], kernel["arch"])
        rows[title] = {key: kernel[key] for key in (*COUNTED, *SPILLS)}
    return rows


def spills(found: dict[str, Row], table: dict[str, Row]) -> list[str]:
    """Those that spill where they may not, or more than in the table."""
    bad = []
    for title, row in found.items():
        known = {} if title.endswith(NO_SPILLS) else table.get(title, {})
        # Unknown counts as spilling.
        if any(row[key] is None or row[key] > known.get(key, 0) for key in SPILLS):
            bad.append(f"{title}: spills, {row['spill_stores']} + {row['spill_loads']} bytes")
    return bad


def arch_of(title: str) -> str:
    return title.rpartition(" ")[2]


def too_large(found: dict[str, Row]) -> list[str]:
    """Those that no launch would take."""
    return [
        f"{title}: {row['shared_memory']} bytes of shared memory, of {most}"
        for title, row in found.items()
        if row["shared_memory"] > (most := ARCHITECTURES[arch_of(title)].shared_bytes)
    ]


def problems(
    found: dict[str, Row], table: dict[str, Row], same_nvcc: bool, some: bool = False
) -> list[str]:
    """What fails, by kernel; an architecture of which the table has nothing is only compiled."""
    known = {NO_SPILLS, *map(arch_of, table)}
    bad = too_large(found)
    found = {title: row for title, row in found.items() if arch_of(title) in known}
    bad += spills(found, table)
    for title, row in found.items():
        if title not in table:
            bad.append(f"{title}: is not in the table")
            continue
        for key in COUNTED:
            before, now = table[title][key], row[key]
            if now > GROWTH * before:
                text = f"{title}: {key.replace('_', ' ')} from {before} to {now}"
                if same_nvcc:
                    bad.append(text)
                else:
                    print(f"with another nvcc: {text}")
    compiled = set() if some else set(map(arch_of, found))
    gone = sorted(title for title in table.keys() - found if arch_of(title) in compiled)
    return bad + [f"{title}: is in the table, and not compiled" for title in gone]


def kept(table: dict[str, Row], found: dict[str, Row], some: bool) -> dict[str, Row]:
    """What stays of the table beside rows that were found."""
    archs = set(map(arch_of, found))
    wanted = set().union(*map(titles, archs)) if some else set()
    return {t: row for t, row in table.items() if arch_of(t) not in archs or t in wanted}


def nvcc_version() -> str:
    nvcc = jit.find_nvcc()
    if nvcc is None:
        raise SystemExit("resources: needs nvcc")
    output = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"release ([\d.]+)", output.stdout)
    return version[1] if version else "unknown"


def write_table(found: dict[str, Row], nvcc: str) -> None:
    lines = [f"  {json.dumps(title)}: {json.dumps(row)}" for title, row in sorted(found.items())]
    rows = ",\n".join(lines)
    TABLE.write_text(f'{{"nvcc": {json.dumps(nvcc)}, "kernels": {{\n{rows}\n}}}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("compiled", type=Path, help="what tile-mhc compile --json printed")
    parser.add_argument("--renew", action="store_true", help="write the table")
    parser.add_argument("--some", action="store_true", help="of a part of the kernels")
    arguments = parser.parse_args()
    found = rows_of(json.loads(arguments.compiled.read_text()))
    nvcc = nvcc_version()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    if arguments.renew:
        hopper = {title: row for title, row in found.items() if title.endswith(NO_SPILLS)}
        if bad := spills(hopper, {}) + too_large(found):
            print("\n".join(bad), file=sys.stderr)
            return 1
        write_table(kept(table["kernels"], found, arguments.some) | found, nvcc)
        print(f"{len(found)} kernels written to {TABLE}; look at its diff")
        return 0
    bad = problems(found, table["kernels"], nvcc == table["nvcc"], arguments.some)
    if bad:
        print("\n".join(bad), file=sys.stderr)
        print("if meant so: RENEW_RESOURCES=1 scripts/check.sh kernels, with why", file=sys.stderr)
        return 1
    spilling = [title for title, row in found.items() if any(row[key] for key in SPILLS)]
    print(
        f"{len(found)} kernels compile, and those of architectures in {TABLE.name} take what it "
        f"says, or less than 10 % more; spilling: {', '.join(spilling) or 'none'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
