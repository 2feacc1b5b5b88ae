"""The projection of streams that its fast kernels do not take; test_dtypes.py has its cases."""

import dataclasses

import pytest
import torch

import oracle
from cases import PARAMETERS, PROJECTION, Case, Dtypes
from tile_mhc import config, projection

FLOAT32 = Dtypes(torch.float32, (), "two parts of a stream")
ODD = Dtypes(torch.bfloat16, PARAMETERS, "an odd width")
KINDS = pytest.mark.parametrize(
    ("dtypes", "num_streams", "hidden_size"),
    [(FLOAT32, 4, 1280), (ODD, 2, 65), (ODD, 8, 100)],
    ids=str,
)


def inputs(dtypes, num_tokens, num_streams, hidden_size):
    tensors, options = PROJECTION.inputs((num_tokens,), num_streams, hidden_size, "cuda")
    return dtypes.of(tensors), options


@KINDS
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 1000, 8448, 17000])
def test_every_number_of_splits(dtypes, num_streams, hidden_size, num_tokens):
    case = Case(num_tokens, num_streams, hidden_size, "splits and slices follow from T")
    oracle.check(PROJECTION, case, *inputs(dtypes, num_tokens, num_streams, hidden_size))


@KINDS
@pytest.mark.parametrize("num_splits", [1, 2, 1000])
def test_capped_splits(dtypes, num_streams, hidden_size, num_splits):
    def run(**arguments):
        return projection(**arguments, num_splits=num_splits)

    op = dataclasses.replace(PROJECTION, run=run)
    case = Case(130, num_streams, hidden_size, "a cap on the splits")
    oracle.check(op, case, *inputs(dtypes, 130, num_streams, hidden_size))


@KINDS
def test_head_weight(dtypes, num_streams, hidden_size):
    tensors, options = inputs(dtypes, 65, num_streams, hidden_size)
    tensors["weight"] = tensors["weight"][:num_streams].contiguous()
    case = Case(65, num_streams, hidden_size, "the weight of the head")
    oracle.check(PROJECTION, case, tensors, options)


@KINDS
def test_without_norm_weight(dtypes, num_streams, hidden_size):
    tensors, options = inputs(dtypes, 130, num_streams, hidden_size)
    del tensors["norm_weight"]
    case = Case(130, num_streams, hidden_size, "no norm weight")
    oracle.check(PROJECTION, case, tensors, options)


@KINDS
def test_fewer_sms(dtypes, num_streams, hidden_size):
    case = Case(300, num_streams, hidden_size, "several tiles a CTA")
    try:
        config.set_num_sms(1)
        oracle.check(PROJECTION, case, *inputs(dtypes, 300, num_streams, hidden_size))
    finally:
        config.set_num_sms(0)


@KINDS
def test_same_bits_every_run(dtypes, num_streams, hidden_size):
    oracle.check_repeatable(PROJECTION, *inputs(dtypes, 1000, num_streams, hidden_size))


@KINDS
def test_nonfinite_stays_in_its_token(dtypes, num_streams, hidden_size):
    tensors, options = inputs(dtypes, 130, num_streams, hidden_size)
    oracle.check_isolation(PROJECTION, tensors, options, "residual")


@pytest.mark.parametrize("value", [0.0, 3.4e38, 1e30, 1e19, 1e-19, 1e-34], ids=str)
def test_one_size_of_float32_residual(value):
    """Sums of squares that float32 cannot hold, and those it rounds to zero.

    Below 2**-117 the low part of a stream is subnormal, and tensor cores take it for zero.
    """
    tensors, options = inputs(FLOAT32, 13, 4, 1280)
    tensors["residual"] = tensors["residual"].sign() * value
    oracle.check(PROJECTION, Case(13, 4, 1280, "values of any size"), tensors, options)


@pytest.mark.parametrize("value", [65504.0, 2.0**-14, 2.0**-24], ids=str)
def test_one_size_of_float16_residual(value):
    """The largest, and subnormals, of which bfloat16 keeps all."""
    tensors, options = inputs(Dtypes(torch.float16, (), ""), 13, 4, 1280)
    tensors["residual"] = (tensors["residual"].sign() * value).half()
    oracle.check(PROJECTION, Case(13, 4, 1280, "values of any size"), tensors, options)


def test_tf32():
    """The switch rounds the weight, here too."""
    tensors, _ = inputs(FLOAT32, 65, 4, 100)
    rounded, exact = projection(**tensors, tf32=True), projection(**tensors)
    assert 5e-5 < oracle.relative_error(rounded, exact.double()) < 1e-3
