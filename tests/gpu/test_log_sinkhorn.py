import pytest
import torch

import far_apart as definition
import oracle
from cases import mixes
from te_cases import DTYPES, N, case, dtypes, far_apart, op_of
from tile_mhc.compat import transformer_engine as te


@mixes
@dtypes
def test_sinkhorn(case, dtypes):
    op = op_of("sinkhorn", dtypes)
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("iters", [1, 2, 33])
def test_other_counts(iters):
    op = op_of("sinkhorn", DTYPES[0])
    tensors, _ = op.inputs((130,), 4, 64, "cuda")
    oracle.check(op, case(130, 64, "few steps"), tensors, {"iters": iters})


def test_logits_far_apart():
    op = op_of("sinkhorn", DTYPES[0])
    tensors = {"logits": far_apart("cuda")}
    ours = oracle.check(op, case(4096, 64, "sums of nothing but underflow"), tensors, {})
    assert all(tensor.isfinite().all() for tensor in ours.values())


def test_same_bits_every_run():
    op = op_of("sinkhorn", DTYPES[0])
    oracle.check_repeatable(op, *op.inputs((4097,), 4, 64, "cuda"))


def test_nonfinite_stays_in_its_token():
    op = op_of("sinkhorn", DTYPES[0])
    oracle.check_isolation(op, *op.inputs((65,), 4, 64, "cuda"), "logits")


def test_equal_logits_are_uniform():
    op = op_of("sinkhorn", DTYPES[0])
    out = op.run(torch.full((3, 4, 4), 300.0, device="cuda"))
    assert torch.equal(out, torch.full_like(out, 0.25))


@pytest.mark.parametrize("iters", [20, 100])
def test_is_that_of_the_definition(iters):
    def sinkhorn(logits):
        return te.mhc_fused_sinkhorn(logits, N, iters=iters)

    for gap in definition.GAPS:
        definition.check(N, gap, iters, "cuda", sinkhorn)
