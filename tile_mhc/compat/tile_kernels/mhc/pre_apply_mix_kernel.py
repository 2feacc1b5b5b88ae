"""n -> 1: read the layer input from the residual streams, and its gradients."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.aggregate import aggregate, check_mix


def mhc_pre_apply_mix_fwd(x: torch.Tensor, mix: torch.Tensor, o: torch.Tensor) -> None:
    """Write `tile_mhc.aggregate` of x (..., n, H) with mix (..., n) into o (..., H)."""
    op = "mhc_pre_apply_mix_fwd"
    _, hidden = errors.check_streams(op, "x", x)
    check_mix(op, "mix", mix, ("x", x))
    apart = [("x", x), ("mix", mix)]
    _checks.check_streams_output(op, "o", o, (*x.shape[:-2], hidden), ("x", x), apart)
    with torch.no_grad():
        aggregate(x, mix, out=o)


def mhc_pre_apply_mix_bwd(
    o_grad: torch.Tensor, x: torch.Tensor, mix: torch.Tensor, x_grad: torch.Tensor
) -> torch.Tensor:
    """Add the gradient of x to x_grad (..., n, H), rounded once, and return that of mix.

    o_grad is (..., H), and contiguous, as x is.
    """
    op = "mhc_pre_apply_mix_bwd"
    _, hidden = errors.check_streams(op, "x", x)
    like = ("x", x)
    check_mix(op, "mix", mix, like)
    errors.check_tensor(op, "o_grad", o_grad, [(*x.shape[:-2], hidden)], x.dtype, like)
    errors.check_contiguous(op, "o_grad", o_grad)
    apart = [("o_grad", o_grad), like, ("mix", mix)]
    _checks.check_streams_output(op, "x_grad", x_grad, x.shape, like, apart)
    with torch.no_grad():
        _, mix_grad = torch.ops.tile_mhc.aggregate_backward_into(o_grad, x, mix, x_grad, [True])
    return mix_grad  # type: ignore[no-any-return]
