"""RMS statistic and (n*H) -> n*(n+2) matmul."""

import torch

from tile_mhc.compat.tile_kernels import _copies, _gradients
from tile_mhc.compat.tile_kernels.mhc.norm_fn_kernel import round_to_tf32
from tile_mhc.ops.projection import projection

__all__ = ["MHCPreNormFn", "mhc_pre_norm_fn", "round_to_tf32"]


def mhc_pre_norm_fn(
    residual: torch.Tensor,
    mhc_fn: torch.Tensor,
    mhc_norm_weight: torch.Tensor | None,
    mhc_norm_eps: float,
    fuse_grad_acc: bool = True,
    n_splits: int = 16,
) -> torch.Tensor:
    """`tile_mhc.projection`; with `fuse_grad_acc`, backward adds the residual's gradient to one
    posted on the residual's storage, if any, and takes that off the storage."""
    op = "mhc_pre_norm_fn"
    residual = _copies.contiguous(op, "residual", residual)
    if fuse_grad_acc:
        residual = _gradients.residual_input(op, residual, release=True)
    weight = _gradients.parameter_input(op, "mhc_fn", mhc_fn)
    norm_weight = mhc_norm_weight
    if norm_weight is not None:
        norm_weight = _gradients.parameter_input(op, "mhc_norm_weight", norm_weight)
    out = projection(
        residual,
        weight,
        norm_weight=norm_weight,
        norm_eps=mhc_norm_eps,
        num_splits=n_splits,
        tf32=True,
    )
    _copies.count_gradients(op, out=out)
    return out


class MHCPreNormFn:
    """`mhc_pre_norm_fn` without a norm weight, under TileKernels' autograd name."""

    @staticmethod
    def apply(
        x: torch.Tensor, fn: torch.Tensor, norm_eps: float, fuse_grad_acc: bool, n_splits: int
    ) -> torch.Tensor:
        return mhc_pre_norm_fn(x, fn, None, norm_eps, fuse_grad_acc, n_splits)
