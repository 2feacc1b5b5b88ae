"""1 -> n: copy an embedding into every stream."""

import torch

from tile_mhc.compat.tile_kernels import _gradients
from tile_mhc.compat.tile_kernels.mhc.expand_kernel import (
    expand_to_mhc_bwd_tl,
    expand_to_mhc_fwd_tl,
)
from tile_mhc.ops.expand import expand

__all__ = ["ExpandToMHCFn", "expand_to_mhc", "expand_to_mhc_bwd_tl", "expand_to_mhc_fwd_tl"]


def expand_to_mhc(
    hidden: torch.Tensor, mhc_mult: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`tile_mhc.expand`; `out` may also be given when a gradient is needed."""
    if out is None or not _gradients.any_needs_grad(hidden):
        return expand(hidden, mhc_mult, out=out)
    shape = (*hidden.shape[:-1], mhc_mult, *hidden.shape[-1:])
    _gradients.check_out("expand_to_mhc", out, shape, [("hidden", hidden)])
    return _gradients.into_out(expand(hidden, mhc_mult), out)


class ExpandToMHCFn:
    """`ExpandToMHCFn.apply` is `expand_to_mhc`."""

    apply = staticmethod(expand_to_mhc)
