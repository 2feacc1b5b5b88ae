"""Gradients of the gates of a pre, each rounded once, for compat.tile_kernels.mhc."""

import pytest
import torch

from parity import plain
from tile_mhc.compat.tile_kernels import mhc

CALL = plain.PLAIN["pre_split_mixes_bwd"]


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 127, 4096, 40001])
def test_each_is_rounded_once(num_tokens, n):
    make = plain.Maker(CALL.name, num_tokens, 64, "cuda", n)
    plain.check_rounded_once(mhc, CALL, CALL.inputs(make))


def test_same_bits_every_run():
    inputs = CALL.inputs(plain.Maker(CALL.name, 8193, 64, "cuda"))
    first, *others = (CALL.run(mhc, inputs) for _ in range(3))
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name
