"""Gradients of the readout's gate, in rows of partial sums, as compat.tile_kernels.mhc asks."""

import pytest
import torch

from parity import plain
from tile_mhc import head_mix, reference
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


def test_the_gradient_of_the_mixes_has_the_bits_of_the_op():
    (grad, mix, scale, base), (grad_mix, _, _) = run(4097, 132, 32)
    leaf = mix.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(head_mix(leaf, scale, base, pre_eps=1e-6), leaf, grad)
    assert torch.equal(grad_mix, wanted)


def test_same_bits_every_run():
    runs = [run(8193, 132, 32)[1] for _ in range(3)]
    for others in zip(*runs, strict=True):
        assert all(torch.equal(others[0], other) for other in others[1:])
