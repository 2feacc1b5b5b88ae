"""Gradients of the gates of a pre, each rounded once."""

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference
from tile_mhc.ops import _flops
from tile_mhc.ops import mixes as mixes_op
from tile_mhc.ops._library import register
from tile_mhc.ops.tile_kernels.outputs import copy


def _cuda(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    post_mult: float,
    grad_mixes: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
) -> None:
    num_mixes, n = mixes.shape[-1], grad_pre.shape[-1]
    num_tokens = mixes.numel() // num_mixes
    if num_tokens == 0:
        grad_scale.zero_()
        grad_bias.zero_()
        return
    shape = mixes_op.partial_shape(num_tokens, num_mixes)
    partials = mixes.new_empty(shape, dtype=torch.float64)
    given = mixes_op.gate_dtypes(scale, bias)
    jit.kernel("exact_mixes_bwd", n, *given)(
        grad_pre.contiguous().view(-1, n),
        grad_post.contiguous().view(-1, n),
        grad_comb.contiguous().view(-1, n * n),
        mixes.contiguous().view(-1, num_mixes),
        scale.contiguous(),
        bias.contiguous(),
        grad_mixes.view(-1, num_mixes),
        partials,
        post_mult,
    )
    jit.kernel("exact_sums", num_mixes, 3, *given)(partials, grad_bias, grad_scale)


def _cpu(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    post_mult: float,
    *outs: Tensor,
) -> None:
    n = grad_pre.shape[-1]
    grads = reference.split_mixes_backward(
        grad_pre.double(),
        grad_post.double(),
        grad_comb.double().reshape(*mixes.shape[:-1], n, n),
        mixes.double(),
        scale.double(),
        bias.double(),
        n,
        post_mult,
    )
    copy(outs, grads)


split_mixes_backward = register(
    "split_mixes_backward_out(Tensor grad_pre, Tensor grad_post, Tensor grad_comb, Tensor mixes, "
    "Tensor scale, Tensor bias, float post_mult, Tensor(a!) grad_mixes, Tensor(b!) grad_scale, "
    "Tensor(c!) grad_bias) -> ()",
    cuda=_cuda,
    cpu=_cpu,
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
