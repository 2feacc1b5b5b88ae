"""Mixes, and a whole pre, from sums over splits of K that another's matmul has left."""

from typing import Any

from torch import Tensor

from tile_mhc import errors, jit, selection
from tile_mhc.kernels._shapes import is_no_eps
from tile_mhc.ops import _flops
from tile_mhc.ops._library import absent, dtypes, register
from tile_mhc.ops.log_sinkhorn import launch_comb
from tile_mhc.ops.tile_kernels import reference
from tile_mhc.ops.tile_kernels.outputs import copy


def _norm_cuda(
    split_products: Tensor,
    split_squares: Tensor,
    group_size: int,
    eps: float,
    products: Tensor,
    squares: Tensor,
    mixes: Tensor,
) -> None:
    splits, _, groups, num_mixes = split_products.shape
    if mixes.numel():
        jit.kernel("partials_norm_fwd", num_mixes, groups)(
            split_products.contiguous().view(splits, -1, num_mixes),
            split_squares.contiguous().view(splits, -1),
            products.view(-1, num_mixes),
            squares.view(-1),
            mixes,
            group_size,
            eps,
        )


def _norm_cpu(
    split_products: Tensor, split_squares: Tensor, group_size: int, eps: float, *outs: Tensor
) -> None:
    copy(outs, reference.partials_norm(split_products, split_squares, group_size, eps))


def _backward_cuda(
    grad: Tensor,
    products: Tensor,
    squares: Tensor,
    group_size: int,
    eps: float,
    grad_products: Tensor,
    grad_squares: Tensor,
) -> None:
    _, groups, num_mixes = products.shape
    if products.numel():
        jit.kernel("partials_norm_bwd", num_mixes, groups)(
            grad.contiguous(),
            products.contiguous().view(-1, num_mixes),
            squares.contiguous().view(-1),
            grad_products.view(-1, num_mixes),
            grad_squares.view(-1),
            group_size,
            eps,
        )


def _backward_cpu(
    grad: Tensor, products: Tensor, squares: Tensor, group_size: int, eps: float, *outs: Tensor
) -> None:
    grads = reference.partials_norm_backward(
        grad.double(), products.double(), squares.double(), group_size, eps
    )
    copy(outs, grads)


def _pre_cuda(
    split_products: Tensor,
    split_squares: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    post_mix: Tensor,
    comb_mix: Tensor,
    layer_input: Tensor,
) -> None:
    if residual.numel() == 0:
        return
    n, hidden_size = residual.shape[-2:]
    _, num_tokens, num_mixes = split_products.shape
    # What `fused_pre` keeps for its backward.
    mixes = split_products.new_empty(num_tokens, num_mixes)
    inv_rms = split_products.new_empty(num_tokens)
    given = dtypes(streams=residual.dtype, scale=scale.dtype, bias=bias.dtype)
    if selection.reads_last(residual.nbytes):
        kernel = jit.kernel("partials_last_pre", n, hidden_size, *given)
    else:
        kernel = jit.kernel("partials_pre", n, hidden_size, *given)
    kernel(
        split_products.contiguous(),
        split_squares.contiguous(),
        scale.contiguous(),
        bias.contiguous(),
        residual,
        residual.view(-1, n * hidden_size),
        absent(mixes).view(1, 1),
        absent(mixes),
        layer_input,
        post_mix,
        comb_mix.view(-1, n * n),
        mixes,
        inv_rms,
        absent(mixes),
        norm_eps,
        pre_eps,
        sinkhorn_eps,
        post_mult,
        0.0,
        sinkhorn_repeat,
        False,
    )
    if is_no_eps(sinkhorn_eps):
        launch_comb(mixes, scale, bias, comb_mix.view(-1, n, n), sinkhorn_repeat)


def _pre_cpu(*tensors_and_options: Any) -> None:
    inputs, outs = tensors_and_options[:-3], tensors_and_options[-3:]
    copy(outs, reference.partials_pre(*inputs))


def _pre_flops(*shapes: Any, **_: Any) -> int:
    return _flops.aggregate(shapes[4])


partials_norm = register(
    "partials_norm_out(Tensor split_products, Tensor split_squares, int group_size, float eps, "
    "Tensor(a!) products, Tensor(b!) squares, Tensor(c!) mixes) -> ()",
    cuda=_norm_cuda,
    cpu=_norm_cpu,
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
partials_norm_backward = register(
    "partials_norm_backward_out(Tensor grad, Tensor products, Tensor squares, int group_size, "
    "float eps, Tensor(a!) grad_products, Tensor(b!) grad_squares) -> ()",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
partials_pre = register(
    "partials_pre_out(Tensor split_products, Tensor split_squares, Tensor scale, Tensor bias, "
    "Tensor residual, float norm_eps, float pre_eps, float sinkhorn_eps, float post_mult, "
    "int sinkhorn_repeat, Tensor(a!) post_mix, Tensor(b!) comb_mix, Tensor(c!) layer_input) -> ()",
    cuda=_pre_cuda,
    cpu=_pre_cpu,
    fake=lambda *_: None,
    flops=_pre_flops,
    out_alignment=errors.ALIGNMENT,
)
