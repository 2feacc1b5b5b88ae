"""The gates of bare products in padded rows: operators behind compat.transformer_engine."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import jit, selection
from tile_mhc.ops import _flops
from tile_mhc.ops._library import register
from tile_mhc.ops.mixes import column_sums, gate_dtypes
from tile_mhc.ops.transformer_engine import reference


def _cuda(
    h: Tensor, ms: Tensor, scale: Tensor, bias: Tensor, num_streams: int
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake(h, ms, scale, bias, num_streams)
    if h.numel():
        jit.kernel("padded_mixes_fwd", num_streams, *gate_dtypes(scale, bias))(
            h.contiguous(), ms.contiguous(), scale.contiguous(), bias.contiguous(), *outputs
        )
    return outputs


def _cpu(
    h: Tensor, ms: Tensor, scale: Tensor, bias: Tensor, num_streams: int
) -> tuple[Tensor, ...]:
    return tuple(out.contiguous() for out in reference.mixes(h, ms, scale, bias, num_streams))


def _fake(
    h: Tensor, ms: Tensor, scale: Tensor, bias: Tensor, num_streams: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, n = h.shape[0], num_streams
    return h.new_empty(num_tokens, n), h.new_empty(num_tokens, n), h.new_empty(num_tokens, n * n)


def _backward_cuda(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    h: Tensor,
    ms: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_streams: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_h, grad_ms = h.new_empty(h.shape), ms.new_empty(ms.shape)
    num_tokens = h.shape[0]
    if num_tokens == 0:
        return grad_h, grad_ms, torch.zeros_like(scale), torch.zeros_like(bias)
    partials = h.new_empty(selection.partial_rows(num_tokens), bias.numel() + scale.numel())
    jit.kernel("padded_mixes_bwd", num_streams, *gate_dtypes(scale, bias))(
        grad_pre.contiguous(),
        grad_post.contiguous(),
        grad_comb.contiguous(),
        h.contiguous(),
        ms.contiguous(),
        scale.contiguous(),
        bias.contiguous(),
        grad_h,
        grad_ms,
        partials,
    )
    return grad_h, grad_ms, *column_sums(partials, scale, bias)


def _backward_fake(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    h: Tensor,
    ms: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_streams: int,
) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (h, ms, scale, bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_streams = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return *_mixes_backward(*grads, *ctx.saved_tensors, ctx.num_streams), None


_mixes_backward = register(
    "padded_mixes_backward(Tensor grad_pre, Tensor grad_post, Tensor grad_comb, Tensor h, "
    "Tensor ms, Tensor scale, Tensor bias, int num_streams) -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_backward_cuda,
    cpu=reference.mixes_backward,
    fake=_backward_fake,
    flops=_flops.pointwise,
)
mixes = register(
    "padded_mixes(Tensor h, Tensor ms, Tensor scale, Tensor bias, int num_streams) "
    "-> (Tensor, Tensor, Tensor)",
    cuda=_cuda,
    cpu=_cpu,
    fake=_fake,
    flops=_flops.pointwise,
    backward=_backward,
    setup_context=_setup_context,
)
