"""The specification of what `compat.tile_kernels.mhc` has and the public ops do not."""

import torch
from torch import Tensor

from tile_mhc import reference


def partials_norm(
    split_products: Tensor, split_squares: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over the splits, (T, G, N) and (T, G), and the mixes (T, N)."""
    products, squares = split_products.sum(0), split_squares.sum(0)
    inv_rms = torch.rsqrt(squares / group_size + eps)
    return products, squares, (products * inv_rms.unsqueeze(-1)).sum(-2)


def partials_norm_backward(
    grad: Tensor, products: Tensor, squares: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the summed products and squares."""
    inv_rms = torch.rsqrt(squares / group_size + eps)
    along = (grad.unsqueeze(-2) * products).sum(-1)
    grad_squares = along * inv_rms / (squares + eps * group_size) * -0.5
    return grad.unsqueeze(-2) * inv_rms.unsqueeze(-1), grad_squares


def norm_fn_products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Products (T, N) of x (T, K) and the weight as TF32, and sums of squares (T,)."""
    rounded = reference.round_to_tf32(weight)
    wide = x.to(rounded.dtype)
    return wide @ rounded.mT, wide.square().sum(-1)


def norm_fn_backward(
    grad: Tensor, grad_squares: Tensor, x: Tensor, weight: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x on top of the one `held`, and that of the weight; TF32 as the forward."""
    grad, rounded = reference.round_to_tf32(grad), reference.round_to_tf32(weight)
    wide = x.to(grad.dtype)
    grad_x = grad @ rounded + 2 * wide * grad_squares.unsqueeze(-1) + held
    return grad_x, grad.mT @ wide


def partials_pre(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """post_mix (T, n), comb_mix (T, n, n) and the layer input (T, H) from sums of one group."""
    num_streams, hidden_size = residual.shape[-2:]
    _, _, mixes = partials_norm(
        split_products.unsqueeze(-2),
        split_squares.unsqueeze(-1),
        num_streams * hidden_size,
        norm_eps,
    )
    pre_mix, post_mix, logits = reference.split_mixes(
        mixes, scale, bias, num_streams=num_streams, post_mult=post_mult, pre_eps=pre_eps
    )
    comb_mix = reference.sinkhorn(logits, repeat=sinkhorn_repeat, eps=sinkhorn_eps)
    return post_mix, comb_mix, reference.aggregate(residual, pre_mix)


def head_mix_rows_backward(
    grad: Tensor, mixes: Tensor, scale: Tensor, bias: Tensor, rows: int, block_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the mixes, and those of scale (R, 1) and bias (R, n) by rows.

    Block b of `block_tokens` tokens counts in row b % rows.
    """
    n = mixes.shape[-1]
    grad_mixes, _, _ = reference.head_mix_backward(grad, mixes, scale, bias)
    unit = torch.ones_like(scale)
    logits = reference.head_mix_backward(grad, mixes * scale.to(mixes.dtype), unit, bias)[0]
    row = torch.arange(mixes.numel() // n, device=mixes.device) // block_tokens % rows
    by_row = mixes.new_zeros(rows, n)
    of_bias = by_row.index_add(0, row, logits.view(-1, n))
    of_scale = by_row.index_add(0, row, (logits * mixes).view(-1, n))
    return grad_mixes, of_scale.sum(-1, keepdim=True), of_bias
