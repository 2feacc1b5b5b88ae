"""Gradients of the readout's gate, in rows of partial sums, as compat.tile_kernels.mhc asks."""

import pytest
import torch

from parity import plain
from tile_mhc import reference
from tile_mhc.compat.tile_kernels import mhc


def run(num_tokens, rows, block, n=4):
    make = plain.Maker("rows", num_tokens, 64, "cuda", n)
    mix, grad = make.by_token("mix", n), make.by_token("grad", n)
    scale, base = make.float32("scale", 1), make.float32("base", n)
    outs = [plain.unwritten(mix, *shape) for shape in (mix.shape, (rows, 1), (rows, n))]
    mhc.mhc_head_compute_mix_bwd(grad, mix, scale, base, *outs, rows, block)
    return (grad, mix, scale, base), outs


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 127, 4096, 8193])
def test_sums_of_the_rows(num_tokens, n):
    given, (grad_mix, scales, bases) = run(num_tokens, 132, 0, n)
    truth = reference.head_mix_backward(*(tensor.double() for tensor in given))
    for found, exact in zip((grad_mix, scales.sum(0), bases.sum(0)), truth, strict=True):
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_each_is_rounded_once(n):
    call = plain.PLAIN["head_compute_mix_bwd"]
    plain.check_rounded_once(mhc, call, call.inputs(plain.Maker(call.name, 4097, 64, "cuda", n)))


def test_same_bits_every_run():
    runs = [run(8193, 132, 32)[1] for _ in range(3)]
    for others in zip(*runs, strict=True):
        assert all(torch.equal(others[0], other) for other in others[1:])
