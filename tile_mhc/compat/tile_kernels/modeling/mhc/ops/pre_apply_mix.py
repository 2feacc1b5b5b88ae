"""n -> 1: read the layer input from the residual streams."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels import _copies, _gradients
from tile_mhc.ops.aggregate import aggregate


def mhc_pre_apply_mix(
    x: torch.Tensor, mix: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`tile_mhc.aggregate`; backward adds the residual's gradient to one posted on the residual's
    storage, if any, and `out` may also be given when a gradient is needed. Streams that are not
    contiguous are copied."""
    op = "mhc_pre_apply_mix"
    x, mix = _copies.contiguous(op, "x", x), _copies.contiguous(op, "mix", mix)
    if out is not None and not _gradients.any_needs_grad(x, mix):
        return aggregate(x, mix, out=out)
    if out is not None:
        errors.check_streams(op, "x", x)
        shape = (*x.shape[:-2], x.shape[-1])
        _gradients.check_out(op, out, shape, [("x", x), ("mix", mix)])
    result = aggregate(_gradients.residual_input(op, x, release=False), mix)
    if out is not None:
        result = _gradients.into_out(result, out)
    _copies.count_gradients(op, out=result)
    return result


class MHCPreApplyMix:
    """`MHCPreApplyMix.apply` is `mhc_pre_apply_mix`."""

    apply = staticmethod(mhc_pre_apply_mix)
