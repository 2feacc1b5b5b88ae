"""Ops on a GPU that has no kernels, which this one is taken for: the reference on CUDA tensors."""

import pytest
import torch

import oracle
from cases import OPS, Case, recompute_inputs
from tile_mhc import _device, jit, recompute

CASE = Case(130, 4, 192, "any")


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    def refuse(name, *args):
        raise jit.CompileError(f"{name} was asked for")

    monkeypatch.setattr(_device, "limits_of", lambda _: None)
    monkeypatch.setattr(_device, "_warned", set())
    monkeypatch.setattr(jit, "kernel", refuse)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.filterwarnings("ignore:tile_mhc:RuntimeWarning")
def test_op(op):
    oracle.check(op, CASE, *op.inputs(*CASE.shape, "cuda"))


@pytest.mark.filterwarnings("ignore:tile_mhc:RuntimeWarning")
def test_op_within_autocast():
    op = OPS[0]
    with torch.autocast("cuda", dtype=torch.float16):
        oracle.check(op, CASE, *op.inputs(*CASE.shape, "cuda"))


def test_recompute():
    inputs = recompute_inputs(3, 2, *CASE.shape, "cuda")
    with pytest.warns(RuntimeWarning, match="Ops are computed by the reference"):
        found = recompute(*inputs)
    expected = recompute(
        *([t.cpu() for t in x] if isinstance(x, list) else x.cpu() for x in inputs)
    )
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2**-7, atol=2**-7)
