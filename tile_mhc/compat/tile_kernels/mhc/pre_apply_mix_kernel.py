"""n -> 1: read the layer input from the residual streams, and its gradients."""

from collections.abc import Callable

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


def _mhc_pre_apply_mix_fwd(
    mhc_mult: int, hidden: int, n_thr: int = 128, h_blk: int = 1024
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """A callable (x, mix, o): `mhc_pre_apply_mix_fwd` of (T, mhc_mult, hidden). Of 1.0.0."""
    op = "_mhc_pre_apply_mix_fwd"
    _checks.check_sizes(op, mhc_mult, hidden, n_thr=n_thr, h_blk=h_blk)

    def kernel(x: torch.Tensor, mix: torch.Tensor, o: torch.Tensor) -> None:
        _checks.check_rows(op, "x", x, (mhc_mult, hidden), errors.STREAMS)
        mhc_pre_apply_mix_fwd(x, mix, o)

    return kernel


def _mhc_pre_apply_mix_bwd(
    mhc_mult: int, hidden: int, n_thr: int = 128, h_blk: int = 1024
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A callable (o_grad, x, mix, x_grad): `mhc_pre_apply_mix_bwd`. Of release 1.0.0."""
    op = "_mhc_pre_apply_mix_bwd"
    _checks.check_sizes(op, mhc_mult, hidden, n_thr=n_thr, h_blk=h_blk)

    def kernel(
        o_grad: torch.Tensor, x: torch.Tensor, mix: torch.Tensor, x_grad: torch.Tensor
    ) -> torch.Tensor:
        _checks.check_rows(op, "x", x, (mhc_mult, hidden), errors.STREAMS)
        return mhc_pre_apply_mix_bwd(o_grad, x, mix, x_grad)

    return kernel
