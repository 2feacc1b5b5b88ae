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
from tile_mhc.kernels._arch import ARCHITECTURES

# sm_86 and sm_89 have the sizes of sm_120a and the instructions of sm_80.
SAMPLED = ("sm_80", "sm_120a")
# With pipelines, and with tables of steps in shared memory.
NAMES = ("expand_fwd", "projection_fwd", "projection_bwd", "sinkhorn_bwd", "delayed_pre_fwd")
SIZES = specs.Sizes(4, 64)


def last_of_each(sizes: specs.Sizes, arch: str) -> list[_measure.Kernel]:
    """The last of each name, which has the most tensors."""
    return [(name, args, arch) for name, args in dict(specs.select([sizes], arch=arch)).items()]


def problem(kernel: _measure.Kernel, found: _measure.Measured) -> str | None:
    if isinstance(found, str):
        return found
    if found.spill_stores or found.spill_loads:
        return f"spills, {found.spill_stores} + {found.spill_loads} bytes"
    most = ARCHITECTURES[kernel[2]].shared_bytes
    if found.shared_memory > most:
        return f"{found.shared_memory} bytes of shared memory, of {most}"
    return None


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
    bad = []
    for (name, args, arch), found in compiled.items():
        if text := problem((name, args, arch), found):
            bad.append(f"{resources.title_of(name, args, arch)}: {text}")
    table = json.loads(resources.TABLE.read_text())
    same_nvcc = resources.nvcc_version() == table["nvcc"]
    rows = rows_of({kernel: compiled[kernel] for kernel in hopper})
    grown = resources.problems(rows, table["kernels"], same_nvcc, some=True)
    bad += [text for text in grown if text not in bad]
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
