"""SGLang's `fused_hc_head`, the readout behind the last layer."""

import torch

from tile_mhc.ops.contract import contract

__all__ = ["fused_hc_head"]


def fused_hc_head(
    x: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """`tile_mhc.contract`, the learned readout of the streams.

    Args:
        x: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to 16384.
        hc_fn: (n, n*H) float32 or bfloat16.
        hc_scale: (1,) float32 or bfloat16, or of another shape with one element.
        hc_base: (n,) float32 or bfloat16.
        norm_eps: added to the mean square of the streams.
        hc_eps: added to the gates.

    Returns:
        (..., H), of the dtype of x.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: SGLang 0.5.23, `sglang/kernels/ops/layernorm/mhc_head.py`.
    """
    if isinstance(hc_scale, torch.Tensor) and hc_scale.ndim != 1 and hc_scale.numel() == 1:
        hc_scale = hc_scale.reshape(1)
    return contract(x, hc_fn, hc_scale, hc_base, norm_eps=norm_eps, pre_eps=hc_eps)
