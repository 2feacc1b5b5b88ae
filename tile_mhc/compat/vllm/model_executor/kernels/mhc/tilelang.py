"""vLLM's functions around its TileLang kernels, on ours; see the package for what differs."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from tile_mhc import errors
from tile_mhc.compat import _serving
from tile_mhc.ops.aggregate import aggregate
from tile_mhc.ops.contract import contract
from tile_mhc.ops.fused_pre import check_layer_norm, fused_pre
from tile_mhc.ops.mixes import split_mixes
from tile_mhc.ops.post import post
from tile_mhc.ops.post_pre import post_pre
from tile_mhc.ops.projection import projection
from tile_mhc.ops.sinkhorn import sinkhorn

__all__ = [
    "hc_head_fused_kernel_tilelang",
    "mhc_fused_post_pre_delayed_tilelang",
    "mhc_fused_post_pre_tilelang",
    "mhc_post_tilelang",
    "mhc_pre_delayed_tilelang",
    "mhc_pre_tilelang",
]


def mhc_pre_tilelang(
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
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
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
        n_splits: changes nothing.
        norm_weight: optional (H,) float32 or bfloat16, of an RMS norm of the layer input; not
            allowed when a gradient is needed. (TileKernels' `norm_weight`, of the streams, is
            another.)
        norm_eps: added to the mean square of that norm.

    Returns:
        post_mix (..., n, 1) and comb_mix (..., n, n), float32, and layer_input (..., H), of the
        dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel, or a norm_weight has no gradient.

    Source: vLLM 0.33.0, `vllm/model_executor/kernels/mhc/tilelang.py`.
    """
    del n_splits
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
    norm = _serving.norm_of("mhc_pre_tilelang", norm_weight, norm_eps)
    return _serving.pre(residual, gates, norm)


def mhc_post_tilelang(
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

    Source: vLLM 0.33.0, `vllm/model_executor/kernels/mhc/tilelang.py`.
    """
    return post(x, residual, post_layer_mix, comb_res_mix)


def mhc_fused_post_pre_tilelang(
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
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tile_mhc.post_pre`: the post of one sub-layer and all that is before the next.

    Args:
        x: (..., H), contiguous, of the dtype of the residual.
        residual: (..., n, H), contiguous, as in `mhc_pre_tilelang`.
        post_layer_mix: (..., n, 1) or (..., n) float32, of the sub-layer that ends.
        comb_res_mix: (..., n, n) float32, index [in, out], of the sub-layer that ends.
        fn: as in `mhc_pre_tilelang`, as all below, of the sub-layer that begins.
        hc_scale: (3,).
        hc_base: (n*(n+2),).
        rms_eps: added to the mean square of the streams.
        hc_pre_eps: added to the weights of the layer input.
        hc_sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        hc_post_mult_value: factor of post_mix.
        sinkhorn_repeat: Sinkhorn steps.
        n_splits: changes nothing.
        tile_n: changes nothing.
        norm_weight: optional (H,), of an RMS norm of the layer input; not allowed when a gradient
            is needed.
        norm_eps: added to the mean square of that norm.

    Returns:
        The streams (..., n, H), post_mix (..., n, 1), comb_mix (..., n, n) and layer_input
        (..., H), the last three of the sub-layer that begins; mixes float32, the others of the
        dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel, or a norm_weight has no gradient.

    Source: vLLM 0.33.0, `vllm/model_executor/kernels/mhc/tilelang.py`.
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
    norm = _serving.norm_of("mhc_fused_post_pre_tilelang", norm_weight, norm_eps)
    return _serving.fused_post_pre(x, residual, post_layer_mix, comb_res_mix, gates, norm)


def mhc_pre_delayed_tilelang(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    pre_mix: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tile_mhc.fused_pre` with a `pre_mix`, as DeepSeek-V4.1 has it.

    With an `x` the mixes are those of x in place of the streams: the first layer's embedding, whose
    `fn` is summed over the streams. That takes separate ops.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        fn: (n*(n+2), n*H) float32 or bfloat16; with an x (n*(n+2), K).
        hc_scale: (3,) float32 or bfloat16.
        hc_base: (n*(n+2),) float32 or bfloat16.
        rms_eps: added to the mean square of the streams, or of x.
        hc_pre_eps: added to the next pre_mix.
        hc_sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        hc_post_mult_value: factor of post_mix.
        sinkhorn_repeat: Sinkhorn steps, from 1 to 1024.
        pre_mix: (..., n) or (..., n, 1) float32, what the sub-layer before has returned; None
            reads stream 0.
        x: optional (..., K), contiguous, with the leading dimensions of the residual and a dtype of
            streams; K is a multiple of n.
        norm_weight: optional (H,) float32 or bfloat16, of an RMS norm of the layer input; not
            allowed when a gradient is needed.
        norm_eps: added to the mean square of that norm.

    Returns:
        post_mix (..., n, 1), comb_mix (..., n, n), layer_input (..., H), and the next pre_mix
        (..., n); mixes float32, layer_input of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel, or a norm_weight has no gradient.

    Source: vLLM 0.33.0, `vllm/model_executor/kernels/mhc/tilelang.py`.
    """
    op = "mhc_pre_delayed_tilelang"
    errors.check_streams(op, "residual", residual)
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
    mix = _first_stream(residual) if pre_mix is None else pre_mix
    norm = _serving.norm_of(op, norm_weight, norm_eps)
    if x is not None:
        return _pre_of(x, residual, mix, gates, norm_weight, norm_eps)
    layer_input, next_pre, post_mix, comb_mix = fused_pre(
        residual, fn, hc_scale, hc_base, pre_mix=mix, **gates.options(norm)
    )
    return post_mix.unsqueeze(-1), comb_mix, layer_input, next_pre


def mhc_fused_post_pre_delayed_tilelang(
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
    pre_mix: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    capture_aux: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tile_mhc.post_pre` with a `pre_mix`, as DeepSeek-V4.1 has it.

    Args:
        x: (..., H), contiguous, of the dtype of the residual.
        residual: (..., n, H), contiguous, as in `mhc_pre_delayed_tilelang`.
        post_layer_mix: (..., n, 1) or (..., n) float32, of the sub-layer that ends.
        comb_res_mix: (..., n, n) float32, index [in, out], of the sub-layer that ends.
        fn: as in `mhc_pre_delayed_tilelang`, as all below, of the sub-layer that begins.
        hc_scale: (3,).
        hc_base: (n*(n+2),).
        rms_eps: added to the mean square of the streams.
        hc_pre_eps: added to the next pre_mix.
        hc_sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        hc_post_mult_value: factor of post_mix.
        sinkhorn_repeat: Sinkhorn steps.
        pre_mix: (..., n) or (..., n, 1) float32; None reads stream 0.
        norm_weight: optional (H,), of an RMS norm of the layer input; not allowed when a gradient
            is needed.
        norm_eps: added to the mean square of that norm.
        capture_aux: whether to return the mean of the new streams, too, for a draft model.

    Returns:
        The streams (..., n, H), post_mix (..., n, 1), comb_mix (..., n, n), layer_input (..., H),
        the next pre_mix (..., n), and the mean of the streams (..., H), which is (0, H) without
        `capture_aux`; mixes float32, the others of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel, or a norm_weight has no gradient.

    Source: vLLM 0.33.0, `vllm/model_executor/kernels/mhc/tilelang.py`.
    """
    op = "mhc_fused_post_pre_delayed_tilelang"
    n, hidden_size = errors.check_streams(op, "residual", residual)
    errors.check_bool(op, "capture_aux", capture_aux)
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
    streams, layer_input, next_pre, post_mix, comb_mix = post_pre(
        x,
        residual,
        post_layer_mix,
        comb_res_mix,
        fn,
        hc_scale,
        hc_base,
        pre_mix=_first_stream(residual) if pre_mix is None else pre_mix,
        **gates.options(_serving.norm_of(op, norm_weight, norm_eps)),
    )
    if capture_aux:
        # A power of two: exactly the mean.
        aux = aggregate(streams, _mixes(residual).fill_(1 / n))
    else:
        aux = residual.new_empty(0, hidden_size)
    return streams, post_mix.unsqueeze(-1), comb_mix, layer_input, next_pre, aux


def hc_head_fused_kernel_tilelang(
    hs_flat: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """`tile_mhc.contract`, the learned readout of the streams.

    Args:
        hs_flat: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to 16384.
        fn: (n, n*H) float32 or bfloat16.
        hc_scale: (1,) float32 or bfloat16.
        hc_base: (n,) float32 or bfloat16.
        rms_eps: added to the mean square of the streams.
        hc_eps: added to the gates.

    Returns:
        (..., H), of the dtype of hs_flat.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: vLLM 0.33.0, `vllm/model_executor/kernels/mhc/tilelang.py`.
    """
    return contract(hs_flat, fn, hc_scale, hc_base, norm_eps=rms_eps, pre_eps=hc_eps)


def _mixes(residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape[:-1], dtype=torch.float32)


def _first_stream(residual: Tensor) -> Tensor:
    mix = _mixes(residual).zero_()
    mix[..., 0] = 1
    return mix


def _pre_of(
    x: Tensor,
    residual: Tensor,
    pre_mix: Tensor,
    gates: _serving.Gates,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixes of x, which is projected as if it were streams, and the layer input of the streams.

    Once in a model, so that nothing is fused.
    """
    op, (*lead, n, hidden_size) = "mhc_pre_delayed_tilelang", residual.shape
    errors.require_tensor(op, "x", x)
    if x.ndim == 0 or list(x.shape[:-1]) != lead or x.shape[-1] % n:
        raise errors.ShapeError(
            f"{op}: x must be {(*lead, 'K')} with K a multiple of {n} to match residual "
            f"{errors.describe(residual)}; got {errors.describe(x)}"
        )
    errors.check_contiguous(op, "x", x)
    if norm_weight is not None:
        check_layer_norm(op, residual, norm_weight, (x, residual, pre_mix, norm_weight, *gates))
    mixes = projection(x.view(*lead, n, x.shape[-1] // n), gates.fn, norm_eps=gates.rms_eps)
    next_pre, post_mix, logits = split_mixes(
        mixes,
        gates.scale,
        gates.base,
        num_streams=n,
        post_mult=gates.post_mult,
        pre_eps=gates.pre_eps,
    )
    comb_mix = sinkhorn(logits, repeat=gates.sinkhorn_repeat, eps=gates.sinkhorn_eps)
    layer_input = aggregate(residual, pre_mix)
    if norm_weight is not None:
        # Rounded once, as in the fused ops.
        wide = rms_norm(layer_input.float(), (hidden_size,), norm_weight.float(), norm_eps)
        layer_input = wide.to(layer_input.dtype)
    return post_mix.unsqueeze(-1), comb_mix, layer_input, next_pre
