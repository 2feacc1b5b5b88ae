"""n -> 1: read the layer input from the residual streams."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels import _gradients
from tile_mhc.ops.aggregate import aggregate


def mhc_pre_apply_mix(
    x: torch.Tensor, mix: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`tile_mhc.aggregate`; backward adds the residual's gradient to one posted on the residual's
    storage, if any, and `out` may also be given when a gradient is needed."""
    op = "mhc_pre_apply_mix"
    if out is None:
        return aggregate(_gradients.residual_input(op, x, release=False), mix)
    if not _gradients.any_needs_grad(x, mix):
        return aggregate(x, mix, out=out)
    errors.check_streams(op, "x", x)
    shape = (*x.shape[:-2], x.shape[-1])
    _gradients.check_out(op, out, shape, [("x", x), ("mix", mix)])
    result = aggregate(_gradients.residual_input(op, x, release=False), mix)
    return _gradients.into_out(result, out)


class MHCPreApplyMix:
    """`MHCPreApplyMix.apply` is `mhc_pre_apply_mix`."""

    apply = staticmethod(mhc_pre_apply_mix)
