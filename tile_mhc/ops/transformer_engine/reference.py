"""The specification, as in `reference`, of the ops in TransformerEngine's layout and split.

Streams lie innermost: x (..., C, n), whose transposed view is the residual of `reference`. The
projection flattens that to x (T, C*n), and gives bare products and mean squares; their gates apply
the RMS factor.
"""

import torch
from torch import Tensor

from tile_mhc import reference
from tile_mhc.kernels._shapes import PADDED

RMS_EPS = torch.finfo(torch.float32).eps
POST_MULT = 2.0


def _wide(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def aggregate(x: Tensor, mix: Tensor) -> Tensor:
    """out[t, c] = sum_i mix[t, i] * x[t, c, i]"""
    return reference.aggregate(x.mT, mix)


def aggregate_backward(grad: Tensor, x: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and mix."""
    grad_x, grad_mix = reference.aggregate_backward(grad, x.mT, mix)
    return grad_x.mT, grad_mix


def post(f: Tensor, bias: Tensor | None, x: Tensor, post_mix: Tensor, comb_mix: Tensor) -> Tensor:
    """out[t, c, j] = post_mix[t, j] * (f[t, c] + bias[c]) + sum_i comb_mix[t, i, j] * x[t, c, i]"""
    return reference.post(f, x.mT, post_mix, comb_mix, bias=bias).mT


def post_backward(
    grad: Tensor, f: Tensor, bias: Tensor | None, x: Tensor, post_mix: Tensor, comb_mix: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of f, bias, x, post_mix and comb_mix."""
    grad_f, grad_x, grad_post, grad_comb, grad_bias = reference.post_backward(
        grad.mT, f, x.mT, post_mix, comb_mix, bias
    )
    return grad_f, grad_bias, grad_x.mT, grad_post, grad_comb


def projection(x: Tensor, weight: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """h = x @ (weight * norm_weight).T in the first N of PADDED columns, and ms = mean(x**2)"""
    dtype = _wide(x, weight, norm_weight)
    merged = reference.merge_norm_weight(weight.to(dtype), norm_weight)
    wide = x.to(dtype)
    h = torch.nn.functional.pad(wide @ merged.mT, (0, PADDED - weight.shape[0]))
    return h, wide.square().mean(-1)


def projection_backward(
    grad_h: Tensor,
    grad_ms: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    accumulated: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, on top of what is accumulated, weight and norm_weight."""
    dtype = _wide(grad_h, x, weight, norm_weight)
    wide_weight = weight.to(dtype)
    merged = reference.merge_norm_weight(wide_weight, norm_weight)
    grad = grad_h[:, : weight.shape[0]].to(dtype)
    wide = x.to(dtype)
    grad_x = grad @ merged + wide * (grad_ms.to(dtype).unsqueeze(-1) * (2 / x.shape[-1]))
    if accumulated is not None:
        grad_x = grad_x + accumulated.view_as(x)
    grad_merged = grad.mT @ wide
    grad_norm_weight = None
    if norm_weight is not None:
        grad_norm_weight = (grad_merged * wide_weight).sum(0).to(norm_weight.dtype)
    grad_weight = reference.merge_norm_weight(grad_merged, norm_weight).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight, grad_norm_weight


def mixes(
    h: Tensor, ms: Tensor, scale: Tensor, bias: Tensor, num_streams: int
) -> tuple[Tensor, Tensor, Tensor]:
    """z = h * rsqrt(ms + eps) * scale + bias; pre = sigmoid(z), post = 2 * sigmoid(z), comb = z"""
    n = num_streams
    normed = h[:, : n * (n + 2)] * (ms.unsqueeze(-1) + RMS_EPS).rsqrt()
    pre, post, comb = reference.split_mixes(
        normed, scale, bias, num_streams=n, post_mult=POST_MULT, pre_eps=0.0
    )
    return pre, post, comb.flatten(-2)


def mixes_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    h: Tensor,
    ms: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_streams: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, ms, scale and bias."""
    n = num_streams
    num_mixes = n * (n + 2)
    inv_rms = (ms.unsqueeze(-1) + RMS_EPS).rsqrt()
    normed = h[:, :num_mixes] * inv_rms
    grad, grad_scale, grad_bias = reference.split_mixes_backward(
        grad_pre, grad_post, grad_comb, normed, scale, bias, n, POST_MULT
    )
    grad_ms = -0.5 * ((grad * normed).sum(-1, keepdim=True) * inv_rms * inv_rms).squeeze(-1)
    grad_h = torch.nn.functional.pad(grad * inv_rms, (0, PADDED - num_mixes))
    return grad_h, grad_ms, grad_scale, grad_bias
