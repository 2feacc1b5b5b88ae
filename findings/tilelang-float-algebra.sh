#!/usr/bin/env bash
# TileLang 0.1.15 simplifies floating-point expressions as if floats were real numbers.
#
# Behaviour: the generated code of five usual float32 idioms is not what was written.
#   (x + y) - y           becomes x         rounding by a large constant does nothing
#   ((x + y) - x) - y     becomes 0         Kahan's compensation is always zero
#   x != x                becomes false     a NaN is not found
#   x - x, x * 0          become 0          an infinity or a NaN is lost
# but (x - y) + y and x * y / y stay as they are. No option of TileLang is set, and -ffast-math plays no
# part: the expressions are gone before a C or CUDA compiler sees them. It is the same for the
# targets "c", which runs here, and "cuda", whose source is printed.
# Expected: IEEE arithmetic in the order written, as of a C or CUDA compiler without that flag.
#
# Output seen (torch 2.13.0+cpu, tilelang 0.1.15; the line of CUDA behind each is left out here):
#   (x + y) - y          x=2.75 y=12582912.0: TileLang 2.75, IEEE 3.0
#   ((x + y) - x) - y    x=100000000.0 y=3.0: TileLang 0.0, IEEE -3.0
#   1 if x != x else 2   x=nan y=0.0: TileLang 2.0, IEEE 1.0
#   x - x                x=inf y=0.0: TileLang 0.0, IEEE nan
#   x * 0                x=nan y=0.0: TileLang 0.0, IEEE nan
#   (x - y) + y          x=2.75 y=12582912.0: TileLang 3.0, IEEE 3.0
#   x * y / y            x=2.999999894026671e+30 y=10000000000.0: TileLang inf, IEEE inf
#
# Needs python3 with venv, g++ and pip's package index; no GPU. Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export TILELANG_CACHE_DIR="$folder/cache" TILELANG_PRINT_ON_COMPILATION=0 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 tilelang==0.1.15

cat >finding.py <<'PY'
import sys

import numpy as np
import tilelang
import tilelang.language as T
import torch
import tvm

F32 = np.float32
BIG = F32(12582912.0)  # 1.5 * 2**23: adding it rounds a small float32 to an integer

# name: the expression, (x, y), what TileLang 0.1.15 gives
IDIOMS = {
    "(x + y) - y": (lambda x, y: (x + y) - y, (F32(2.75), BIG), F32(2.75)),
    "((x + y) - x) - y": (lambda x, y: ((x + y) - x) - y, (F32(1e8), F32(3.0)), F32(0)),
    "1 if x != x else 2": (None, (F32("nan"), F32(0)), F32(2)),
    "x - x": (lambda x, y: x - x, (F32("inf"), F32(0)), F32(0)),
    "x * 0": (lambda x, y: x * F32(0), (F32("nan"), F32(0)), F32(0)),
    "(x - y) + y": (lambda x, y: (x - y) + y, (F32(2.75), BIG), F32(3)),
    "x * y / y": (lambda x, y: x * y / y, (F32(3e30), F32(1e10)), F32("inf")),
}


def in_tilelang(expression, x, y):
    if expression is None:
        return T.if_then_else(x != x, T.float32(1), T.float32(2))
    return expression(x, y)


def in_numpy(expression, x, y):
    with np.errstate(all="ignore"):
        return (F32(1) if x != x else F32(2)) if expression is None else F32(expression(x, y))


def serial(expression):
    @T.prim_func
    def idiom(
        X: T.Tensor((1,), "float32"), Y: T.Tensor((1,), "float32"), OUT: T.Tensor((1,), "float32")
    ):
        for i in T.serial(1):
            OUT[i] = in_tilelang(expression, X[i], Y[i])

    return tilelang.compile(idiom, target="c", execution_backend="cython")


def cuda_source(expression):
    @T.prim_func
    def idiom(
        X: T.Tensor((64,), "float32"), Y: T.Tensor((64,), "float32"), OUT: T.Tensor((64,), "float32")
    ):
        with T.Kernel(1, threads=64):
            for i in T.Parallel(64):
                OUT[i] = in_tilelang(expression, X[i], Y[i])

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = tilelang.lower(idiom, target=target).kernel_source
    line = [line for line in source.splitlines() if "OUT[" in line][-1]
    return line.replace("((int)threadIdx.x)", "i").strip()


print("torch", torch.__version__, "tilelang", tilelang.__version__)
changed = False
for name, (expression, (x, y), seen) in IDIOMS.items():
    out = torch.empty(1)
    serial(expression)(torch.tensor([x.item()]), torch.tensor([y.item()]), out)
    got, ieee = F32(out.item()), in_numpy(expression, x, y)
    print(f"{name:20} x={x} y={y}: TileLang {got}, IEEE {ieee}; CUDA: {cuda_source(expression)}")
    changed |= not np.array_equal(got, seen, equal_nan=True)
sys.exit("the behaviour has changed" if changed else 0)
PY
venv/bin/python finding.py
