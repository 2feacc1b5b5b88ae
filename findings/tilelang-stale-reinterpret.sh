#!/usr/bin/env bash
# TileLang 0.1.15 gives a second `T.reinterpret` of a register the value that the first one had.
#
# Behaviour: a kernel that takes the bits of a register, writes the register, and takes its bits again stores
# the first value twice. Code generation puts the operand of `T.reinterpret` into a variable, and keeps that
# for every operand of the same text in the same scope of the C++; that the register is assigned in between is
# not looked at. No error, no warning. In a `T.serial` loop over the two halves it is right: unrolled code is
# wrong where a loop is not. An operand that is a call (`T.call_pure_extern` of
# `__int_as_float`, which does the same) is written where it stands, and right.
# Expected: what is stored second is of what the register has then.
#
# Output seen (torch 2.13.0+cpu, tilelang 0.1.15), which loads what is stored first and second is made of:
#   T.reinterpret             A[0], A[0]
#   in a loop                 A[0], A[32]
#   __int_as_float            A[0], A[32]
#
# Needs python3 with venv, pip's package index and g++, which runs the generated lines; no GPU, no nvcc.
# Exits 0 while this is so, 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export TILELANG_CACHE_DIR="$folder/cache" TILELANG_PRINT_ON_COMPILATION=0 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 tilelang==0.1.15

cat >finding.py <<'PY'
import re
import subprocess
import sys
from pathlib import Path

import tilelang
import tilelang.language as T
import torch
import tvm

A_TYPE, B_TYPE = T.Tensor((64,), "int32"), T.Tensor((64,), "float32")


@T.prim_func
def straight(A: A_TYPE, B: B_TYPE):
    with T.Kernel(1, threads=32):
        t = T.get_thread_binding()
        word = T.alloc_local((1,), "int32")
        word[0] = A[t]
        B[t] = T.reinterpret(word[0] << 16, "float32")
        word[0] = A[32 + t]
        B[32 + t] = T.reinterpret(word[0] << 16, "float32")


@T.prim_func
def in_a_loop(A: A_TYPE, B: B_TYPE):
    with T.Kernel(1, threads=32):
        t = T.get_thread_binding()
        word = T.alloc_local((1,), "int32")
        for k in T.serial(2):
            word[0] = A[k * 32 + t]
            B[k * 32 + t] = T.reinterpret(word[0] << 16, "float32")


@T.prim_func
def by_call(A: A_TYPE, B: B_TYPE):
    with T.Kernel(1, threads=32):
        t = T.get_thread_binding()
        word = T.alloc_local((1,), "int32")
        word[0] = A[t]
        B[t] = T.call_pure_extern("float32", "__int_as_float", word[0] << 16)
        word[0] = A[32 + t]
        B[32 + t] = T.call_pure_extern("float32", "__int_as_float", word[0] << 16)


# What runs the body as thread 0: word k of A holds the upper half of k as a float32.
HOST = """
#include <cstdio>
#include <cstring>
struct { int x; } threadIdx;
float __int_as_float(int bits) { float value; memcpy(&value, &bits, 4); return value; }
void body(const int* A, float* B) {
%s
int main() {
  int A[64];
  float B[64];
  for (int k = 0; k < 64; ++k) {
    float value = k;
    memcpy(&A[k], &value, 4);
    A[k] = A[k] >> 16;
  }
  body(A, B);
  printf("A[%%d], A[%%d]", int(B[0]), int(B[32]));
}
"""


def stored(kernel):
    """From which words of A the first and the second half of B are, for thread 0."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = tilelang.lower(kernel, target=target).kernel_source
    body = re.search(r"__global__ .*?\{\n(.*)", source, re.DOTALL)[1]
    Path("body.cpp").write_text(HOST % body)
    subprocess.run(["g++", "-w", "-fno-strict-aliasing", "body.cpp", "-o", "body"], check=True)
    return subprocess.run(["./body"], check=True, capture_output=True, text=True).stdout


print("torch", torch.__version__, "tilelang", tilelang.__version__)
CASES = {
    "T.reinterpret": (straight, "A[0], A[0]"),
    "in a loop": (in_a_loop, "A[0], A[32]"),
    "__int_as_float": (by_call, "A[0], A[32]"),
}
changed = False
for name, (kernel, seen) in CASES.items():
    found = stored(kernel)
    print(f"{name:25} {found}")
    changed |= found != seen
sys.exit("the behaviour has changed" if changed else 0)
PY
venv/bin/python finding.py
