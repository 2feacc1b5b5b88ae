import pytest

import oracle
from te_cases import DTYPES, dtypes, op_of, widths


@widths
@dtypes
def test_aggregate(case, dtypes):
    op = op_of("aggregate", dtypes)
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("channels", [1280, 5129])
def test_same_bits_every_run(channels):
    op = op_of("aggregate", DTYPES[0])
    oracle.check_repeatable(op, *op.inputs((130,), 4, channels, "cuda"))


@pytest.mark.parametrize("poisoned", ["x", "mix"])
def test_nonfinite_stays_in_its_token(poisoned):
    op = op_of("aggregate", DTYPES[0])
    oracle.check_isolation(op, *op.inputs((65,), 4, 192, "cuda"), poisoned)
