"""Gradients of the product of the weights, added to what is there, for compat.tile_kernels.mhc."""

import pytest

from parity import plain
from tile_mhc.compat.tile_kernels import mhc

CALL = plain.PLAIN["fn_normw_merge_bwd"]


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("hidden_size", [33, 64, 1280])
def test_each_is_rounded_once(hidden_size, n):
    plain.check_rounded_once(
        mhc, CALL, CALL.inputs(plain.Maker(CALL.name, 1, hidden_size, "cuda", n))
    )


@pytest.mark.parametrize("num_mixes", [1, 5, 24])
def test_any_number_of_rows(num_mixes):
    make = plain.Maker(CALL.name, 1, 64, "cuda")
    make.num_mixes = num_mixes
    plain.check_rounded_once(mhc, CALL, CALL.inputs(make))
