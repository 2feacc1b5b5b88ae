#!/usr/bin/env bash
# TileLang 0.1.15 gives a tile of a pipeline back to its producer while an asynchronous GEMM may read it.
#
# Behaviour: in a warp-specialised `T.Pipelined` loop a consumer tells the producer that it may load the next
# tile into a buffer right after the last statement that names the buffer. `T.gemm` with the annotation
# `wg_wait: -1` only starts wgmma; that it has ended is known after `T.wait_wgmma(0)`. The generated code
# arrives at the buffer's barrier between the two, so that TMA may write what wgmma still reads. Reading one
# element of the buffer after the wait moves the arrival behind it.
# Expected: a buffer that an asynchronous GEMM reads is kept until the wait that ends it, or an error.
#
# Output seen (torch 2.13.0+cpu, tilelang 0.1.15), in the order of the generated source:
#   asynchronous, waited for later         wgmma, arrive, wait
#   and one element read behind the wait   wgmma, wait, arrive
#   T.gemm as it is by default             wgmma, wait, arrive
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

M, N, K = 128, 64, 64
MARKS = {"wgmma": r"tl::wgmma_ss<", "wait": r"wait_wgmma<0>|warpgroup_wait<0>", "arrive": r"\]\.arrive\(\)"}


def products(steps, asynchronous, reads_behind):
    annotations = {"wg_wait": -1} if asynchronous else {}

    @T.prim_func
    def kernel(
        A: T.Tensor((M, steps * K), "bfloat16"),
        B: T.Tensor((N, steps * K), "bfloat16"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=256):
            a = T.alloc_shared((M, K), "bfloat16")
            b = T.alloc_shared((N, K), "bfloat16")
            product = T.alloc_fragment((M, N), "float32")
            total = T.alloc_fragment((M, N), "float32")
            kept = T.alloc_local((2,), "bfloat16")
            T.clear(total)
            for k in T.Pipelined(steps, num_stages=2):
                T.copy(A[0, k * K], a)
                T.copy(B[0, k * K], b)
                T.gemm(a, b, product, transpose_B=True, clear_accum=True, annotations=annotations)
                if asynchronous:
                    T.wait_wgmma(0)
                if reads_behind:
                    kept[0] = a[0, 0]
                    kept[1] = b[0, 0]
                for i, j in T.Parallel(M, N):
                    total[i, j] += product[i, j]
            T.copy(total, C)

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = tilelang.lower(kernel, target=target).kernel_source
    consumer = source[source.index(re.search(MARKS["wgmma"], source).group()) :]
    first = {name: re.search(mark, consumer) for name, mark in MARKS.items()}
    return ", ".join(sorted(first, key=lambda name: first[name].start()))


print("torch", torch.__version__, "tilelang", tilelang.__version__)
CASES = {
    "asynchronous, waited for later": ((True, False), "wgmma, arrive, wait"),
    "and one element read behind the wait": ((True, True), "wgmma, wait, arrive"),
    "T.gemm as it is by default": ((False, False), "wgmma, wait, arrive"),
}
changed = False
for name, (flags, seen) in CASES.items():
    order = products(8, *flags)
    print(f"{name:38} {order}")
    changed |= order != seen
sys.exit("the behaviour has changed" if changed else 0)
PY
venv/bin/python finding.py
