"""SGLang's `mhc_pre`, `mhc_post` and `mhc_fused_post_pre`; see the package for what differs."""

import torch

from tile_mhc.compat import _serving
from tile_mhc.ops.post import post

__all__ = ["mhc_fused_post_pre", "mhc_post", "mhc_pre"]


def mhc_pre(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    n_splits_pre: int = 32,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tile_mhc.fused_pre`: all that is before a sub-layer.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        fn: (n*(n+2), n*H) float32 or bfloat16.
        hc_scale: (3,) float32 or bfloat16.
        hc_base: (n*(n+2),) float32 or bfloat16.
        rms_eps: added to the mean square of the streams.
        hc_pre_eps: added to the weights of the layer input.
        hc_sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        hc_post_mult_value: factor of post_mix.
        sinkhorn_repeat: Sinkhorn steps, from 1 to 1024.
        n_splits: changes nothing, see the package.
        n_splits_pre: changes nothing.
        norm_weight: optional (H,) float32 or bfloat16, of an RMS norm of the layer input; not
            allowed when a gradient is needed. (TileKernels' `norm_weight`, of the streams, is
            another.)
        norm_eps: added to the mean square of that norm.

    Returns:
        post_mix (..., n, 1) and comb_mix (..., n, n), float32, and layer_input (..., H), of the
        dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match, or a norm_weight has no
            norm_eps.
        UnsupportedError: n or H has no kernel, or a norm_weight has no gradient.

    Source: SGLang 0.5.23, `sglang/kernels/ops/layernorm/mhc.py`.
    """
    del n_splits, n_splits_pre
    gates = _serving.Gates(
        fn,
        hc_scale,
        hc_base,
        rms_eps,
        hc_pre_eps,
        hc_sinkhorn_eps,
        hc_post_mult_value,
        sinkhorn_repeat,
    )
    return _serving.pre(residual, gates, _serving.norm_of("mhc_pre", norm_weight, norm_eps))


def mhc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
) -> torch.Tensor:
    """`tile_mhc.post`: a sub-layer's output into the streams.

    Args:
        x: (..., H), contiguous, of the dtype of the residual.
        residual: (..., n, H) bfloat16, float16 or float32, contiguous.
        post_layer_mix: (..., n, 1) or (..., n) float32.
        comb_res_mix: (..., n, n) float32, index [in, out].

    Returns:
        The streams (..., n, H), of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: SGLang 0.5.23, `sglang/kernels/ops/layernorm/mhc.py`.
    """
    return post(x, residual, post_layer_mix, comb_res_mix)


def mhc_fused_post_pre(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    tile_n: int = 1,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tile_mhc.post_pre`: the post of one sub-layer and all that is before the next.

    Args:
        x: (..., H), contiguous, of the dtype of the residual.
        residual: (..., n, H), contiguous, as in `mhc_pre`.
        post_layer_mix: (..., n, 1) or (..., n) float32, of the sub-layer that ends.
        comb_res_mix: (..., n, n) float32, index [in, out], of the sub-layer that ends.
        fn: as in `mhc_pre`, as all below, of the sub-layer that begins.
        hc_scale: (3,).
        hc_base: (n*(n+2),).
        rms_eps: added to the mean square of the streams.
        hc_pre_eps: added to the weights of the layer input.
        hc_sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        hc_post_mult_value: factor of post_mix.
        sinkhorn_repeat: Sinkhorn steps.
        n_splits: changes nothing, see the package.
        tile_n: changes nothing.
        norm_weight: optional (H,), of an RMS norm of the layer input; not allowed when a gradient
            is needed.
        norm_eps: added to the mean square of that norm.

    Returns:
        The streams (..., n, H), post_mix (..., n, 1), comb_mix (..., n, n) and layer_input
        (..., H), the last three of the sub-layer that begins; mixes float32, the others of the
        dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match, or a norm_weight has no
            norm_eps.
        UnsupportedError: n or H has no kernel, or a norm_weight has no gradient.

    Source: SGLang 0.5.23, `sglang/kernels/ops/layernorm/mhc.py`.
    """
    del n_splits, tile_n
    gates = _serving.Gates(
        fn,
        hc_scale,
        hc_base,
        rms_eps,
        hc_pre_eps,
        hc_sinkhorn_eps,
        hc_post_mult_value,
        sinkhorn_repeat,
    )
    norm = _serving.norm_of("mhc_fused_post_pre", norm_weight, norm_eps)
    return _serving.fused_post_pre(x, residual, post_layer_mix, comb_res_mix, gates, norm)
