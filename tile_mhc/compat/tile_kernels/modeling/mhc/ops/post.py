"""1 -> n: add the layer output to every stream, and mix the streams."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels import _gradients
from tile_mhc.compat.tile_kernels.mhc.post_kernel import mhc_post_bwd, mhc_post_fwd
from tile_mhc.ops.post import post

__all__ = ["MHCPost", "mhc_post", "mhc_post_bwd", "mhc_post_fwd"]


def mhc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`tile_mhc.post`; a residual that is not contiguous is copied, and `out` may also be given
    when a gradient is needed."""
    residual = errors.require_tensor("mhc_post", "residual", residual).contiguous()
    if out is None or not _gradients.any_needs_grad(x, residual, post_layer_mix, comb_res_mix):
        return post(x, residual, post_layer_mix, comb_res_mix, out=out)
    inputs = [
        ("residual", residual),
        ("x", x),
        ("post_layer_mix", post_layer_mix),
        ("comb_res_mix", comb_res_mix),
    ]
    _gradients.check_out("mhc_post", out, residual.shape, inputs)
    return _gradients.into_out(post(x, residual, post_layer_mix, comb_res_mix), out)


class MHCPost:
    """`MHCPost.apply` is `mhc_post`."""

    apply = staticmethod(mhc_post)
