"""TileKernels 1.0.0's two matmuls by their builders, on the CPU, a GPU and the emulator."""

import pytest
import torch

from parity import calls
from tile_mhc.compat.tile_kernels.mhc.norm_fn_kernel import (
    _mhc_pre_norm_fn_bwd_mul,
    _mhc_pre_norm_fn_fwd_mul,
    round_to_tf32,
)

# Tokens, mixes, columns, and the dtype of the streams.
CASES = pytest.mark.parametrize(
    "sizes",
    [
        (0, 24, 512, torch.bfloat16),
        (1, 24, 768, torch.bfloat16),
        (130, 24, 768, torch.bfloat16),
        (300, 8, 512, torch.bfloat16),
        (13, 4, 132, torch.bfloat16),
        (13, 80, 512, torch.float32),
    ],
    ids=str,
)


class OwnNorm(torch.autograd.Function):
    """The projection by 1.0.0's matmuls, as a project with a norm of its own calls them."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        tokens, size, num_mixes = *x.shape, weight.shape[0]
        fn = round_to_tf32(weight)
        products = torch.full((tokens, 1, num_mixes), float("nan"), device=x.device)
        squares = torch.full((tokens, 1), float("nan"), device=x.device)
        _mhc_pre_norm_fn_fwd_mul(num_mixes, 1, size)(x, fn, products, squares)
        rms = torch.sqrt(squares / size)
        ctx.save_for_backward(x, fn, products[:, 0], rms)
        ctx.eps = eps
        return products[:, 0] / (rms + eps)

    @staticmethod
    def backward(ctx, grad):
        x, fn, products, rms = ctx.saved_tensors
        (tokens, size), num_mixes = x.shape, fn.shape[0]
        inverse = 1 / (rms + ctx.eps)
        grad_products = (grad * inverse).view(tokens, 1, num_mixes)
        of_rms = (grad * products).sum(1, keepdim=True) * -(inverse**2)
        grad_squares = of_rms / (2 * size * rms)
        grad_x, grad_fn = torch.zeros_like(x), torch.full_like(fn, float("nan"))
        build = _mhc_pre_norm_fn_bwd_mul(num_mixes, 1, size)
        build(grad_products, grad_squares, x, fn, grad_x, grad_fn)
        return grad_x, grad_fn, None


def check(num_tokens, num_mixes, size, dtype, device):
    """Against float64, outputs and gradients."""
    x = torch.randn(num_tokens, size, device=device).to(dtype)
    weight = round_to_tf32(torch.randn(num_mixes, size, device=device) / size**0.5)
    grad = torch.randn(num_tokens, num_mixes, device=device)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    mixes = OwnNorm.apply(*leaves, 1e-6)
    found = [mixes.detach(), *torch.autograd.grad(mixes, leaves, grad)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = wide[0] @ wide[1].mT / (wide[0].square().mean(-1, keepdim=True).sqrt() + 1e-6)
    exact = [truth.detach(), *torch.autograd.grad(truth, wide, grad.double())]
    # The gradient of the product is rounded to TF32, that of x to its own dtype, too.
    bounds = [1e-5, 2e-3 if dtype == torch.bfloat16 else 5e-4, 5e-4]
    for value, expected, bound in zip(found, exact, bounds, strict=True):
        assert value.shape == expected.shape
        if num_tokens:
            assert calls.relative_error(value, expected) <= bound
        else:
            assert not value.count_nonzero()


def check_added(device):
    """x's gradient is added to what it has, and rounded once; what else is written is not read."""
    x, held = (torch.randn(70, 512, device=device).bfloat16() for _ in range(2))
    fn = round_to_tf32(torch.randn(24, 512, device=device))
    grad = round_to_tf32(torch.randn(70, 1, 24, device=device))
    grad_squares = torch.randn(70, 1, device=device)
    grad_x, grad_fn = held.clone(), torch.full_like(fn, float("nan"))
    _mhc_pre_norm_fn_bwd_mul(24, 1, 512)(grad, grad_squares, x, fn, grad_x, grad_fn)
    wide = grad[:, 0].double()
    exact = wide @ fn.double() + 2 * grad_squares.double() * x.double() + held.double()
    rounding = calls.relative_error(exact.bfloat16(), exact)
    assert calls.relative_error(grad_x, exact) <= 1.02 * rounding
    assert calls.relative_error(grad_fn, wide.mT @ x.double()) <= 1e-5
