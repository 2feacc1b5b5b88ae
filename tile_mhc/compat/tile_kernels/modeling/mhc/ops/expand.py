"""1 -> n: copy an embedding into every stream."""

import torch

from tile_mhc.compat.tile_kernels import _copies, _gradients
from tile_mhc.compat.tile_kernels.mhc.expand_kernel import (
    expand_to_mhc_bwd_tl,
    expand_to_mhc_fwd_tl,
)
from tile_mhc.ops.expand import expand

__all__ = ["ExpandToMHCFn", "expand_to_mhc", "expand_to_mhc_bwd_tl", "expand_to_mhc_fwd_tl"]


def expand_to_mhc(
    hidden: torch.Tensor, mhc_mult: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`tile_mhc.expand`; one that is not contiguous is copied, and `out` may also be given when a
    gradient is needed."""
    op = "expand_to_mhc"
    hidden = _copies.contiguous(op, "hidden", hidden)
    if out is None or not _gradients.any_needs_grad(hidden):
        result = expand(hidden, mhc_mult, out=out)
    else:
        shape = (*hidden.shape[:-1], mhc_mult, *hidden.shape[-1:])
        _gradients.check_out(op, out, shape, [("hidden", hidden)])
        result = _gradients.into_out(expand(hidden, mhc_mult), out)
    _copies.count_gradients(op, out=result)
    return result


class ExpandToMHCFn:
    """`ExpandToMHCFn.apply` is `expand_to_mhc`."""

    apply = staticmethod(expand_to_mhc)
