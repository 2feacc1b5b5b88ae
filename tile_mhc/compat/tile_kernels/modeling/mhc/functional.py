"""TileKernels' `mhc_pre`, `mhc_head` and `expand_from_embedding`, composed of the ops beside it."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels import _copies, _gradients
from tile_mhc.compat.tile_kernels.modeling.mhc.ops import (
    expand_to_mhc,
    mhc_head_compute_mix,
    mhc_post,
    mhc_pre_apply_mix,
    mhc_pre_big_fuse,
    mhc_pre_norm_fn,
    mhc_pre_split_mixes,
    sinkhorn_normalize,
)
from tile_mhc.ops.fused_pre import fused_pre

__all__ = [
    "expand_from_embedding",
    "expand_to_mhc",
    "mhc_head",
    "mhc_head_compute_mix",
    "mhc_post",
    "mhc_pre",
    "mhc_pre_apply_mix",
    "mhc_pre_big_fuse",
    "mhc_pre_norm_fn",
    "mhc_pre_split_mixes",
    "sinkhorn_normalize",
]


def expand_from_embedding(x: torch.Tensor, mhc_mult: int = 4) -> torch.Tensor:
    """`tile_mhc.expand`: (..., H) to (..., mhc_mult, H), of the same dtype."""
    return expand_to_mhc(x, mhc_mult)


def mhc_pre(
    residual: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    mhc_mult: int = 4,
    post_mult_value: float = 1.0,
    pre_eps: float = 1e-6,
    sinkhorn_eps: float = 1e-6,
    sinkhorn_repeat: int = 10,
    n_splits: int = 16,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`tile_mhc.functional.mhc_pre`; the same bits with and without a gradient.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32; n in 2, 4, 8; H up to 16384. One that is
            not contiguous is copied.
        fn: (n*(n+2), n*H) float32 or bfloat16.
        scale: (3,) float32 or bfloat16.
        base: (n*(n+2),) float32 or bfloat16.
        norm_weight: optional (n*H,) float32 or bfloat16, a learnable weight of the RMS norm.
        norm_eps: added to the mean square of the RMS norm.
        mhc_mult: n.
        post_mult_value: factor of post_mix.
        pre_eps: added to pre_mix.
        sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        sinkhorn_repeat: Sinkhorn steps, from 1 to 1024.
        n_splits: the most slices of K the projection works on in parallel.

    Returns:
        layer_input (..., H), of the dtype of the residual, and the pair post_mix (..., n, 1),
        comb_mix (..., n, n), float32, for `mhc_post`.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: DeepSeek TileKernels `modeling/mhc/functional.py`.
    """
    op = "mhc_pre"
    residual = _copies.contiguous(op, "residual", residual)
    _check_mult(op, residual, mhc_mult)
    if _gradients.any_needs_grad(residual, fn, scale, base, norm_weight):
        residual = _gradients.residual_input(op, residual, release=True)
        fn = _gradients.parameter_input(op, "fn", fn)
        scale = _gradients.parameter_input(op, "scale", scale)
        base = _gradients.parameter_input(op, "base", base)
        if norm_weight is not None:
            norm_weight = _gradients.parameter_input(op, "norm_weight", norm_weight)
    layer_input, post_mix, comb_mix = fused_pre(
        residual,
        fn,
        scale,
        base,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        pre_eps=pre_eps,
        sinkhorn_eps=sinkhorn_eps,
        post_mult=post_mult_value,
        sinkhorn_repeat=sinkhorn_repeat,
        num_splits=n_splits,
        tf32=True,
    )
    post_mix = post_mix.unsqueeze(-1)
    _copies.count_gradients(op, layer_input=layer_input, post_mix=post_mix, comb_mix=comb_mix)
    return layer_input, (post_mix, comb_mix)


def mhc_head(
    residual: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    mhc_mult: int = 4,
    pre_eps: float = 1e-6,
    n_splits: int = 16,
) -> torch.Tensor:
    """`tile_mhc.contract`, the learned readout of the streams.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32; n in 2, 4, 8; H up to 16384. One that is
            not contiguous is copied.
        fn: (n, n*H) float32 or bfloat16; of more rows, up to n*(n+2), the first n count.
        scale: (1,) or () float32 or bfloat16.
        base: (n,) float32 or bfloat16.
        norm_weight: optional (n*H,) float32 or bfloat16, a learnable weight of the RMS norm.
        norm_eps: added to the mean square of the RMS norm.
        mhc_mult: n.
        pre_eps: added to the gate.
        n_splits: the most slices of K the projection works on in parallel.

    Returns:
        (..., H), of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: DeepSeek TileKernels `modeling/mhc/functional.py`.
    """
    residual = _copies.contiguous("mhc_head", "residual", residual)
    _check_mult("mhc_head", residual, mhc_mult)
    rows = mhc_mult * (mhc_mult + 2)
    errors.require_tensor("mhc_head", "fn", fn)
    if fn.ndim == 2 and mhc_mult < fn.shape[0] <= rows:
        fn = _gradients.parameter_input("mhc_head", "fn", fn)[:mhc_mult]
    mixes = mhc_pre_norm_fn(residual, fn, norm_weight, norm_eps, n_splits=n_splits)
    if mixes.shape[-1] != mhc_mult:
        raise errors.ShapeError(
            f"mhc_head: fn must have from {mhc_mult} to {rows} rows; got {errors.describe(fn)}"
        )
    mix = mhc_head_compute_mix(mixes, scale, base, pre_eps)
    return mhc_pre_apply_mix(residual, mix.unsqueeze(-1))


def _check_mult(op: str, residual: torch.Tensor, mhc_mult: int) -> None:
    num_streams, _ = errors.check_streams(op, "residual", residual)
    if mhc_mult != num_streams:
        raise errors.ShapeError(
            f"{op}: mhc_mult must be {num_streams} to match residual "
            f"{errors.describe(residual)}; got {errors.shown(mhc_mult)}"
        )
