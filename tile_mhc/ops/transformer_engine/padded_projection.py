"""Bare products, in padded rows, and mean squares: operators behind compat.transformer_engine."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import jit
from tile_mhc.kernels._shapes import PADDED, factors_width, padded
from tile_mhc.ops import _flops
from tile_mhc.ops._library import absent, empty_gradients, register
from tile_mhc.ops.projection import contiguous, launch_matmuls, split_products
from tile_mhc.ops.transformer_engine import reference

# The order of the elements of a row does not matter to a product: any four rows will do.
STREAMS = 4


def _cuda(x: Tensor, weight: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    h, ms = _fake(x, weight, norm_weight)
    num_tokens, size = x.shape
    if num_tokens:
        streams = x.view(num_tokens, STREAMS, -1)
        products, squares = split_products(streams, weight, norm_weight, None, False)
        jit.kernel("padded_projection_fwd", weight.shape[0], size)(products, squares, h, ms)
    return h, ms


def _fake(x: Tensor, weight: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    num_tokens = x.shape[0]
    h = x.new_empty((num_tokens, PADDED), dtype=torch.float32)
    return h, x.new_empty((num_tokens,), dtype=torch.float32)


def _backward_cuda(
    grad_h: Tensor,
    grad_ms: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    accumulated: Tensor | None,
) -> tuple[Tensor, ...]:
    grad_x, grad_weight, grad_norm_weight = empty_gradients(x, weight, norm_weight)
    num_tokens, size = x.shape
    if num_tokens == 0:
        return grad_x, grad_weight.zero_(), grad_norm_weight.zero_()
    num_mixes = weight.shape[0]
    weight, norm_weight = contiguous(weight, norm_weight)
    grad_parts = x.new_empty(num_tokens, 2 * padded(num_mixes), dtype=torch.bfloat16)
    factors = grad_h.new_empty(num_tokens, factors_width(0))
    jit.kernel("padded_projection_pack", num_mixes, size)(
        grad_h.contiguous(), grad_ms.contiguous(), grad_parts, factors
    )
    grads = (grad_x, grad_weight, grad_norm_weight)
    launch_matmuls(
        grad_parts,
        factors,
        x.view(num_tokens, STREAMS, -1),
        weight,
        norm_weight,
        False,
        0,
        absent(x, x.dtype),
        accumulated,
        grads,
    )
    return grads


def _backward_cpu(
    grad_h: Tensor,
    grad_ms: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    accumulated: Tensor | None,
) -> tuple[Tensor, ...]:
    grad_x, grad_weight, grad_norm_weight = reference.projection_backward(
        grad_h, grad_ms, x, weight, norm_weight, accumulated
    )
    if grad_norm_weight is None:
        grad_norm_weight = weight.new_empty(0)
    return grad_x, grad_weight.contiguous(), grad_norm_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_h: Tensor, grad_ms: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, norm_weight = ctx.saved_tensors
    *grads, grad_norm_weight = projection_backward(grad_h, grad_ms, x, weight, norm_weight, None)
    return *grads, None if norm_weight is None else grad_norm_weight


projection_backward = register(
    "padded_projection_backward(Tensor grad_h, Tensor grad_ms, Tensor x, Tensor weight, "
    "Tensor? norm_weight, Tensor? accumulated) -> (Tensor, Tensor, Tensor)",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=lambda grad_h, grad_ms, x, weight, norm_weight, accumulated: empty_gradients(
        x, weight, norm_weight
    ),
    flops=_flops.padded_projection_backward,
)
projection = register(
    "padded_projection(Tensor x, Tensor weight, Tensor? norm_weight) -> (Tensor, Tensor)",
    cuda=_cuda,
    cpu=reference.projection,
    fake=_fake,
    flops=_flops.projection,
    backward=_backward,
    setup_context=_setup_context,
)
