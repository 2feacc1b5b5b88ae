import pytest
import torch

import oracle
from te_cases import DTYPES, case, dtypes, op_of, widths

KINDS = pytest.mark.parametrize("kind", ["post", "post_bias"])


@widths
@dtypes
@KINDS
def test_post(case, dtypes, kind):
    op = op_of(kind, dtypes)
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("channels", [1280, 5129])
@KINDS
def test_same_bits_every_run(kind, channels):
    op = op_of(kind, DTYPES[0])
    oracle.check_repeatable(op, *op.inputs((1300,), 4, channels, "cuda"))


@pytest.mark.parametrize("poisoned", ["f", "x", "post_mix", "comb_mix"])
def test_nonfinite_stays_in_its_token(poisoned):
    op = op_of("post", DTYPES[0])
    oracle.check_isolation(op, *op.inputs((65,), 4, 192, "cuda"), poisoned)


def test_layer_output_of_a_wider_dtype():
    op = op_of("post_bias", DTYPES[0])
    tensors, options = op.inputs((130,), 4, 192, "cuda")
    tensors["f"] = torch.randn_like(tensors["f"], dtype=torch.float32)
    oracle.check(op, case(130, 192, "f in float32, x in bfloat16"), tensors, options)
