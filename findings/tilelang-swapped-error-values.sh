#!/usr/bin/env bash
# TileLang 0.1.15 swaps the two numbers at the end of an error about an argument.
#
# Behaviour: a compiled CUDA kernel checks each tensor it is called with. When one does not fit, the
# message ends in "expected: A, got: B", where A is what was passed and B is what the kernel needs.
# Two messages contradict themselves in one line, as their first half is right.
# Expected: "expected" is the kernel's number, "got" the tensor's.
#
# Output seen (torch 2.13.0+cpu, tilelang 0.1.15; the kernel takes 64 float32 on a CUDA device):
#   (48,) instead of (64,): kernel add_one input A shape[0] violates packed ABI constraint; expected: 48, got: 64
#   (64, 1) instead of (64,): kernel add_one input A ndim mismatch, expected 1; expected: 2, got: 1
#   stride 2 instead of 1: kernel add_one input A strides[0] violates packed ABI constraint; expected: 2, got: 1
#   on the CPU: kernel add_one input A device_type mismatch, expected cuda; expected: 1, got: 2
# (In DLPack, 1 is the CPU and 2 is CUDA.)
#
# Needs python3 with venv, g++ and pip's package index, which also gives nvcc; no GPU, as the checks
# come before the launch. Exits 0 while this is so, 1 once it is not.
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
import sys

import tilelang
import tilelang.language as T
import torch

# name: the tensor passed, the end of the message
CASES = {
    "(48,) instead of (64,)": (torch.zeros(48), "expected: 48, got: 64"),
    "(64, 1) instead of (64,)": (torch.zeros(64, 1), "expected 1; expected: 2, got: 1"),
    "stride 2 instead of 1": (torch.zeros(128)[::2], "expected: 2, got: 1"),
    "on the CPU": (torch.zeros(64), "expected cuda; expected: 1, got: 2"),
}


@T.prim_func
def add_one(A: T.Tensor((64,), "float32"), OUT: T.Tensor((64,), "float32")):
    with T.Kernel(1, threads=64):
        for i in T.Parallel(64):
            OUT[i] = A[i] + 1.0


kernel = tilelang.compile(add_one, target={"kind": "cuda", "arch": "sm_90a"})
print("torch", torch.__version__, "tilelang", tilelang.__version__)
changed = False
for name, (tensor, ending) in CASES.items():
    try:
        kernel(tensor, torch.zeros(64))
    except RuntimeError as error:
        message = str(error).strip().splitlines()[-1]
    else:
        message = "no error"
    print(f"{name}: {message}")
    changed |= not message.endswith(ending)
sys.exit("the behaviour has changed" if changed else 0)
PY
venv/bin/python finding.py
