import pytest

import oracle
from te_cases import DTYPES, dtypes, op_of, widths

KINDS = pytest.mark.parametrize("kind", ["projection", "projection_norm"])


@widths
@dtypes
@KINDS
def test_projection(case, dtypes, kind):
    op = op_of(kind, dtypes)
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("channels", [1280, 5129])
@KINDS
def test_same_bits_every_run(kind, channels):
    op = op_of(kind, DTYPES[0])
    oracle.check_repeatable(op, *op.inputs((1300,), 4, channels, "cuda"))


def test_nonfinite_stays_in_its_token():
    op = op_of("projection", DTYPES[0])
    oracle.check_isolation(op, *op.inputs((65,), 4, 192, "cuda"), "x")
