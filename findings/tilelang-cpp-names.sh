#!/usr/bin/env bash
# TileLang 0.1.15 renames a buffer whose name is a word of C, but not one whose name is a word of C++.
#
# Behaviour: names in Python become names in the generated source, which is C++ for every target. A
# tensor called `double` or `register` gets another name there and compiles. One called `new`, `this`,
# `auto`, `operator` or `template` keeps its name: the function traces and lowers, and then the C++
# compiler rejects the source with a syntax error. `half` and `uint`, names of CUDA's types, are kept
# as well, and hide those types.
# Expected: all reserved words are renamed, or the name is refused where the function is written.
#
# Output seen (torch 2.13.0+cpu, tilelang 0.1.15, nvcc 13.0.88):
#   renamed in the source: char, double, float, int, register, struct, union
#   kept in the source: auto, const, delete, new, operator, template, this, half, uint
#   compiled for sm_90a, a tensor called double: ok
#   compiled for sm_90a, a tensor called new: error: expected a ")"
#
# Needs python3 with venv, g++ and pip's package index, which also gives nvcc; no GPU. Exits 0 while
# this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export TILELANG_CACHE_DIR="$folder/cache" TILELANG_PRINT_ON_COMPILATION=0 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 tilelang==0.1.15 \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
CUDA_HOME=$(venv/bin/python -c 'import nvidia.cu13 as cuda; print(list(cuda.__path__)[0])')
export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"

cat >finding.py <<'PY'
import importlib
import re
import sys
from pathlib import Path

import tilelang
import torch
import tvm

RENAMED = ["char", "double", "float", "int", "register", "struct", "union"]
KEPT = ["auto", "const", "delete", "new", "operator", "template", "this", "half", "uint"]

TEMPLATE = """
@T.prim_func
def takes_{name}({name}: T.Tensor((64,), "float32"), OUT: T.Tensor((64,), "float32")):
    with T.Kernel(1, threads=64):
        for i in T.Parallel(64):
            OUT[i] = {name}[i] + 1.0
"""
TARGET = {"kind": "cuda", "arch": "sm_90a"}

# TileLang reads the source of a function, so the functions stand in a file.
functions = [TEMPLATE.format(name=name) for name in RENAMED + KEPT]
Path("kernels_by_name.py").write_text("import tilelang.language as T\n" + "".join(functions))
kernels = importlib.import_module("kernels_by_name")


def is_kept(name):
    target = tvm.target.Target(TARGET)
    with target:
        source = tilelang.lower(getattr(kernels, f"takes_{name}"), target=target).kernel_source
    return re.search(rf"= \({name}\[", source) is not None


def compilation(name):
    try:
        tilelang.compile(getattr(kernels, f"takes_{name}"), target=TARGET)
    except RuntimeError as error:
        return re.search(r"error: .*|$", str(error)).group() or str(error)
    return "ok"


print("torch", torch.__version__, "tilelang", tilelang.__version__)
kept = [name for name in RENAMED + KEPT if is_kept(name)]
print("renamed in the source:", ", ".join(name for name in RENAMED + KEPT if name not in kept))
print("kept in the source:", ", ".join(kept))
results = {name: compilation(name) for name in ("double", "new")}
for name, result in results.items():
    print(f"compiled for sm_90a, a tensor called {name}: {result}")
same = kept == KEPT and results["double"] == "ok" and results["new"].startswith("error: expected")
sys.exit(0 if same else "the behaviour has changed")
PY
venv/bin/python finding.py
