"""1 -> n: add the layer output to every stream, and mix the streams."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels import _copies, _gradients
from tile_mhc.compat.tile_kernels.mhc import post_kernel
from tile_mhc.compat.tile_kernels.mhc.post_kernel import mhc_post_fwd
from tile_mhc.ops.post import post

__all__ = ["MHCPost", "mhc_post", "mhc_post_bwd", "mhc_post_fwd"]


def mhc_post(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`tile_mhc.post`; streams that are not contiguous are copied, and `out` may also be given
    when a gradient is needed."""
    op = "mhc_post"
    errors.require_tensor(op, "residual", residual)
    inputs = {
        "residual": residual,
        "x": x,
        "post_layer_mix": post_layer_mix,
        "comb_res_mix": comb_res_mix,
    }
    inputs = {name: _copies.contiguous(op, name, value) for name, value in inputs.items()}
    residual, x, post_layer_mix, comb_res_mix = inputs.values()
    if out is None or not _gradients.any_needs_grad(*inputs.values()):
        result = post(x, residual, post_layer_mix, comb_res_mix, out=out)
    else:
        _gradients.check_out(op, out, residual.shape, list(inputs.items()))
        result = _gradients.into_out(post(x, residual, post_layer_mix, comb_res_mix), out)
    _copies.count_gradients(op, out=result)
    return result


def mhc_post_bwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    d_o: torch.Tensor,
    fuse_grad_acc: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc.post_kernel.mhc_post_bwd`, which by default posts the residual's gradient here."""
    return post_kernel.mhc_post_bwd(
        x, residual, post_layer_mix, comb_res_mix, d_o, fuse_grad_acc=fuse_grad_acc
    )


class MHCPost:
    """`MHCPost.apply` is `mhc_post`."""

    apply = staticmethod(mhc_post)
