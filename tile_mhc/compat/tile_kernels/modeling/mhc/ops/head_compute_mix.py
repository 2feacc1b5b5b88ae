"""The head's mixes -> its gate."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels import _copies, _gradients
from tile_mhc.ops.head_mix import head_mix


def mhc_head_compute_mix(
    input_mix: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    mhc_pre_eps: float,
) -> torch.Tensor:
    """`tile_mhc.head_mix`; the scale is (1,) or ()."""
    op = "mhc_head_compute_mix"
    errors.require_tensor(op, "mhc_scale", mhc_scale)
    scale = _gradients.parameter_input(op, "mhc_scale", mhc_scale)
    base = _gradients.parameter_input(op, "mhc_base", mhc_base)
    scale = scale.reshape(1) if scale.ndim == 0 else scale
    input_mix = _copies.contiguous(op, "input_mix", input_mix)
    out = head_mix(input_mix, scale, base, pre_eps=mhc_pre_eps)
    _copies.count_gradients(op, out=out)
    return out


class MHCHeadComputeMix:
    """`MHCHeadComputeMix.apply` is `mhc_head_compute_mix`."""

    apply = staticmethod(mhc_head_compute_mix)
