"""Everything before a sub-layer in one call."""

import torch

from tile_mhc.compat.tile_kernels import _copies
from tile_mhc.compat.tile_kernels.mhc.norm_fn_kernel import round_to_tf32
from tile_mhc.ops.fused_pre import fused_pre

__all__ = ["mhc_pre_big_fuse", "round_to_tf32"]


def mhc_pre_big_fuse(
    residual: torch.Tensor,
    fn: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    rms_eps: float,
    mhc_pre_eps: float,
    mhc_sinkhorn_eps: float,
    mhc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tile_mhc.fused_pre` as (post_mix (..., n, 1), comb_mix, layer_input).

    Outside any graph, as TileKernels' is, also when an input requires grad.
    """
    residual = _copies.contiguous("mhc_pre_big_fuse", "residual", residual)
    with torch.no_grad():
        layer_input, post_mix, comb_mix = fused_pre(
            residual,
            fn,
            mhc_scale,
            mhc_base,
            norm_eps=rms_eps,
            pre_eps=mhc_pre_eps,
            sinkhorn_eps=mhc_sinkhorn_eps,
            post_mult=mhc_post_mult_value,
            sinkhorn_repeat=sinkhorn_repeat,
            num_splits=n_splits,
            tf32=True,
        )
    return post_mix.unsqueeze(-1), comb_mix, layer_input
