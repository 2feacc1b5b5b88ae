#!/usr/bin/env python3
"""Compile one kernel of each name for Hopper, and a few for architectures that no GPU of ours has.

    sample_kernels.py    exits with 1 where one does not compile, spills or takes more shared memory
                         than a CTA has, and for Hopper where it takes over 10 % more than the
                         committed table, scripts/resources.json, says

What `scripts/check.sh kernels` does, as half of the kernels differ from another in a tensor that
they do without; `scripts/check.sh --all kernels` compiles all of them.
"""

import json
import os
import sys

import resources

from tile_mhc import specs
from tile_mhc.cli import _measure

# sm_86 and sm_89 have the sizes of sm_120a and the instructions of sm_80.
SAMPLED = ("sm_80", "sm_120a")
# With pipelines, and with tables of steps in shared memory.
NAMES = ("expand_fwd", "projection_fwd", "projection_bwd", "sinkhorn_bwd", "delayed_pre_fwd")
SIZES = specs.Sizes(4, 64)


def last_of_each(sizes: specs.Sizes, arch: str) -> list[_measure.Kernel]:
    """The last of each name, which has the most tensors."""
    return [(name, args, arch) for name, args in dict(specs.select([sizes], arch=arch)).items()]


def rows_of(compiled: dict[_measure.Kernel, _measure.Measured]) -> dict[str, resources.Row]:
    """Of kernels that compile, as the table has them."""
    return {
        resources.title_of(name, args, arch): vars(found)
        for (name, args, arch), found in compiled.items()
        if not isinstance(found, str)
    }


def main() -> int:
    hopper = last_of_each(resources.SIZES, resources.NO_SPILLS)
    kernels = hopper + [k for arch in SAMPLED for k in last_of_each(SIZES, arch) if k[0] in NAMES]
    compiled = dict(_measure.measure(kernels, len(os.sched_getaffinity(0))))
    bad = [
        f"{resources.title_of(*kernel)}: {found}"
        for kernel, found in compiled.items()
        if isinstance(found, str)
    ]
    table = json.loads(resources.TABLE.read_text())
    same_nvcc = resources.nvcc_version() == table["nvcc"]
    rows = rows_of(compiled)
    of_hopper = {title: row for title, row in rows.items() if title.endswith(resources.NO_SPILLS)}
    others = {title: row for title, row in rows.items() if title not in of_hopper}
    bad += resources.problems(of_hopper, table["kernels"], same_nvcc, some=True)
    # Of sizes that the table does not have.
    bad += resources.spills(others, {}) + resources.too_large(others)
    if bad:
        print("\n".join(bad), file=sys.stderr)
        print("if meant so: RENEW_RESOURCES=1 scripts/check.sh kernels, with why", file=sys.stderr)
        return 1
    print(
        f"{len(hopper)} kernels for {resources.NO_SPILLS} take what {resources.TABLE.name} says, "
        f"or less than 10 % more; {len(kernels) - len(hopper)} compile for {', '.join(SAMPLED)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
