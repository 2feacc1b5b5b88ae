#!/usr/bin/env python3
"""Compile for the architectures that no GPU of ours has what their row of the table changes.

    sample_kernels.py    exits with 1 where a kernel does not compile, spills or takes more shared
                         memory than a CTA has

Under a minute of CPU time; `scripts/check.sh --all kernels` compiles all others, too.
"""

import sys

from tile_mhc import specs
from tile_mhc.cli import _measure
from tile_mhc.kernels._arch import ARCHITECTURES

# sm_86 and sm_89 have the sizes of sm_120a and the instructions of sm_80.
SAMPLED = ("sm_80", "sm_120a")
# With pipelines, and with tables of steps in shared memory.
NAMES = ("expand_fwd", "projection_fwd", "projection_bwd", "sinkhorn_bwd", "delayed_pre_fwd")
SIZES = specs.Sizes(4, 64)


def samples(arch: str) -> list[_measure.Kernel]:
    """The last of each name, which has the most tensors."""
    chosen = dict(specs.select([SIZES], arch=arch))
    return [(name, chosen[name], arch) for name in NAMES if name in chosen]


def problem(kernel: _measure.Kernel, found: _measure.Measured) -> str | None:
    if isinstance(found, str):
        return found
    if found.spill_stores or found.spill_loads:
        return f"spills, {found.spill_stores} + {found.spill_loads} bytes"
    most = ARCHITECTURES[kernel[2]].shared_bytes
    if found.shared_memory > most:
        return f"{found.shared_memory} bytes of shared memory, of {most}"
    return None


def main() -> int:
    kernels = [kernel for arch in SAMPLED for kernel in samples(arch)]
    bad = 0
    for kernel, found in _measure.measure(kernels, 1):
        if text := problem(kernel, found):
            bad += 1
            name, args, arch = kernel
            print(f"{name}({', '.join(map(str, args))}) {arch}: {text}", file=sys.stderr)
    print(f"{len(kernels) - bad} of {len(kernels)} kernels compile for {', '.join(SAMPLED)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
