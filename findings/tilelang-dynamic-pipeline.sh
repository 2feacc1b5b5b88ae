#!/usr/bin/env bash
# TileLang 0.1.15 does not lower a pipeline of a count known at run time to cp.async, unless asked to unroll.
#
# Behaviour: a `T.Pipelined` loop with two copies, a count that is an expression of the kernel's arguments and
# `num_stages` of 2 or more does not lower for GPUs before Hopper: code generation ends with "TypeError:
# Downcast from tirx.Sub to ir.IntImm failed". The last iterations, which start no copy, wait for fewer and
# fewer; TileLang leaves them as a loop, in which that number, an immediate of PTX, is an expression of the
# loop's variable. With the annotation `pragma_unroll_explicit` on the loop it unrolls them, and the numbers
# are constants. Nothing is amiss with a count known when compiling, or with one stage.
# Expected: the last iterations are unrolled whenever there are several, as their number is known.
#
# Output seen (torch 2.13.0+cpu, tilelang 0.1.15), the copies that the source leaves in flight, or the error:
#   sm_80, count of the arguments, 1 stage    0, 1
#   sm_80, count of the arguments, 2 stages   Downcast from tirx.Sub to ir.IntImm failed.
#   the same, unrolled                        0, 1, 2, 3
#   sm_80, count of 8, 2 stages               0, 1, 2, 3
#
# Needs python3 with venv and pip's package index; no GPU, no nvcc. Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export TILELANG_CACHE_DIR="$folder/cache" TILELANG_PRINT_ON_COMPILATION=0 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 tilelang==0.1.15

cat >finding.py <<'PY'
import re
import sys

import tilelang
import tilelang.language as T
import torch
import tvm

ROWS, COLUMNS = 64, 64


def waits(stages, is_dynamic, unrolls):
    """The copies in flight at the waits of a kernel, each of whose CTAs has a slice of tiles."""
    tiles = T.dynamic("tiles")
    annotations = {"pragma_unroll_explicit": True} if unrolls else None

    @T.prim_func
    def kernel(
        A: T.Tensor((tiles * ROWS, COLUMNS), "float32"),
        W: T.Tensor((tiles, COLUMNS), "float32"),
        B: T.Tensor((4 * ROWS, COLUMNS), "float32"),
        each: T.int32,
    ):
        with T.Kernel(4, threads=128) as cta:
            a = T.alloc_shared((ROWS, COLUMNS), "float32")
            w = T.alloc_shared((COLUMNS,), "float32")
            total = T.alloc_fragment((ROWS, COLUMNS), "float32")
            T.clear(total)
            count = T.min(each, tiles - cta * each) if is_dynamic else 8
            for k in T.Pipelined(count, num_stages=stages, annotations=annotations):
                T.copy(A[(cta * each + k) * ROWS, 0], a)
                T.copy(W[k, 0], w)
                for i, j in T.Parallel(ROWS, COLUMNS):
                    total[i, j] += a[i, j]
                for i, j in T.Parallel(ROWS, COLUMNS):
                    total[i, j] *= w[j]
            T.copy(total, B[cta * ROWS, 0])

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"})
    try:
        with target:
            source = tilelang.lower(kernel, target=target).kernel_source
    except TypeError as error:
        return str(error).strip().splitlines()[-1]
    return ", ".join(sorted(set(re.findall(r"cp_async_wait<(\d+)>", source))))


print("torch", torch.__version__, "tilelang", tilelang.__version__)
FAILS = "Downcast from tirx.Sub to ir.IntImm failed."
FOUR = "0, 1, 2, 3"
CASES = {
    "sm_80, count of the arguments, 1 stage": ((1, True, False), "0, 1"),
    "sm_80, count of the arguments, 2 stages": ((2, True, False), FAILS),
    "the same, unrolled": ((2, True, True), FOUR),
    "sm_80, count of 8, 2 stages": ((2, False, False), FOUR),
}
changed = False
for name, (arguments, seen) in CASES.items():
    found = waits(*arguments)
    print(f"{name:41} {found}")
    changed |= found != seen
sys.exit("the behaviour has changed" if changed else 0)
PY
venv/bin/python finding.py
