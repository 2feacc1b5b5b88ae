"""The post and its gradients, without a graph."""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels import _copies
from tile_mhc.compat.tile_kernels._gradients import POSTED
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.aggregate import check_mix
from tile_mhc.ops.post import post


def mhc_post_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`tile_mhc.post` outside any graph; streams that are not contiguous are copied."""
    op = "mhc_post_fwd"
    x, residual = _copies.contiguous(op, "x", x), _copies.contiguous(op, "residual", residual)
    like = _check_inputs(op, x, residual, post_layer_mix, comb_res_mix)
    if out is not None:
        mixes = [("post_layer_mix", post_layer_mix), ("comb_res_mix", comb_res_mix)]
        apart = [("x", x), like, *mixes]
        _checks.check_streams_output(op, "out", out, residual.shape, like, apart)
    with torch.no_grad():
        return post(x, residual, post_layer_mix, comb_res_mix, out=out)


def mhc_post_bwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    d_o: torch.Tensor,
    fuse_grad_acc: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, residual, post_layer_mix and comb_res_mix from that of the output.

    This is release 2.1.0's function, which leaves nothing behind. With `fuse_grad_acc`, which is
    1.0.0's and there True by default, the residual's gradient is also posted on the residual's
    storage, where `mhc_pre_apply_mix` and `mhc_pre_norm_fn` add theirs to it in place: right only
    where nothing else consumes the residual. Raises ValueError where a posted gradient is still
    pending.
    """
    op = "mhc_post_bwd"
    d_o = _copies.contiguous(op, "d_o", d_o)
    if not fuse_grad_acc:
        x, residual = _copies.contiguous(op, "x", x), _copies.contiguous(op, "residual", residual)
    like = _check_inputs(op, x, residual, post_layer_mix, comb_res_mix)
    errors.check_tensor(op, "d_o", d_o, [residual.shape], residual.dtype, like)
    storage = residual.untyped_storage()
    if fuse_grad_acc and hasattr(storage, POSTED):
        raise ValueError(
            f"{op}: the storage of residual must hold no pending {POSTED}; "
            f"got {errors.describe(getattr(storage, POSTED))}"
        )
    with torch.no_grad():
        grads = torch.ops.tile_mhc.post_backward(
            d_o, x, residual, post_layer_mix, comb_res_mix, None
        )
    if fuse_grad_acc:
        setattr(storage, POSTED, grads[1])
    d_x, d_residual, d_post_layer_mix, d_comb_res_mix = grads[:4]
    return d_x, d_residual, d_post_layer_mix, d_comb_res_mix


def _mhc_post_fwd(
    mhc: int, hidden: int, n_thr: int = 128, h_blk: int = 1024
) -> Callable[..., None]:
    """A callable (a, b, c, d, x): comb_res_mix, residual, post_layer_mix, layer output and output.

    Of release 1.0.0, on flat tokens (T, ...).
    """
    op = "_mhc_post_fwd"
    _checks.check_sizes(op, mhc, hidden, n_thr=n_thr, h_blk=h_blk)

    def kernel(
        a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, x: torch.Tensor
    ) -> None:
        _checks.check_rows(op, "b", b, (mhc, hidden), errors.STREAMS)
        mhc_post_fwd(d, b, c, a, out=x)

    return kernel


def _mhc_post_bwd(
    mhc: int, hidden: int, n_thr: int = 128, h_blk: int = 256
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A callable (dx, a, b, c, d), the gradient of the output and what `_mhc_post_fwd` read.

    It returns the gradients of a, b, c and d. Of release 1.0.0.
    """
    op = "_mhc_post_bwd"
    _checks.check_sizes(op, mhc, hidden, n_thr=n_thr, h_blk=h_blk)

    def kernel(
        dx: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        _checks.check_rows(op, "b", b, (mhc, hidden), errors.STREAMS)
        d_x, d_residual, d_post_mix, d_comb_mix = mhc_post_bwd(d, b, c, a, dx)
        return d_comb_mix, d_residual, d_post_mix, d_x

    return kernel


def _check_inputs(
    op: str, x: object, residual: object, post_layer_mix: torch.Tensor, comb_res_mix: object
) -> tuple[str, torch.Tensor]:
    num_streams, hidden_size = errors.check_streams(op, "residual", residual)
    streams = errors.require_tensor(op, "residual", residual)
    like, lead = ("residual", streams), streams.shape[:-2]
    errors.check_tensor(op, "x", x, [(*lead, hidden_size)], streams.dtype, like)
    errors.check_contiguous(op, "x", errors.require_tensor(op, "x", x))
    check_mix(op, "post_layer_mix", post_layer_mix, like)
    comb_shape = (*lead, num_streams, num_streams)
    errors.check_tensor(op, "comb_res_mix", comb_res_mix, [comb_shape], torch.float32, like)
    return like
