"""n -> 1 on streams that lie innermost, (..., C, n): operators behind compat.transformer_engine."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import jit
from tile_mhc.ops import _flops
from tile_mhc.ops._library import dtypes, own_dtype, register
from tile_mhc.ops.transformer_engine import reference


def _cuda(x: Tensor, mix: Tensor) -> Tensor:
    out = _fake(x, mix)
    channels, n = x.shape[-2:]
    if out.numel():
        jit.kernel("interleaved_aggregate_fwd", n, channels, *dtypes(streams=x.dtype))(
            x.view(-1, channels * n), mix.contiguous().view(-1, n), out.view(-1, channels)
        )
    return out


def _fake(x: Tensor, mix: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1])


def _launch_backward(
    grad: Tensor, x: Tensor, mix: Tensor, adds: bool, grad_x: Tensor, grad_mix: Tensor
) -> None:
    channels, n = x.shape[-2:]
    if x.numel():
        given = dtypes(streams=x.dtype, into=own_dtype(grad_x, x))
        jit.kernel("interleaved_aggregate_bwd", n, channels, *given)(
            grad.contiguous().view(-1, channels),
            x.view(-1, channels * n),
            mix.contiguous().view(-1, n),
            grad_mix.view(-1, n),
            grad_x.view(-1, channels * n),
            adds,
        )


def _backward_cuda(grad: Tensor, x: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_mix = _backward_fake(grad, x, mix)
    _launch_backward(grad, x, mix, False, grad_x, grad_mix)
    return grad_x, grad_mix


def _backward_cpu(grad: Tensor, x: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_mix = reference.aggregate_backward(grad, x, mix)
    return grad_x.contiguous(), grad_mix


def _backward_fake(grad: Tensor, x: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), mix.new_empty(mix.shape)


def _accumulate_cuda(grad: Tensor, x: Tensor, mix: Tensor, adds: bool, out: Tensor) -> Tensor:
    grad_mix = mix.new_empty(mix.shape)
    _launch_backward(grad, x, mix, adds, out, grad_mix)
    return grad_mix


def _accumulate_cpu(grad: Tensor, x: Tensor, mix: Tensor, adds: bool, out: Tensor) -> Tensor:
    grad_x, grad_mix = reference.aggregate_backward(grad, x.to(torch.float32), mix)
    buffer = out.view_as(x)
    buffer.copy_(buffer + grad_x if adds else grad_x)
    return grad_mix


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return aggregate_backward(grad, *ctx.saved_tensors)


aggregate_backward = register(
    "interleaved_aggregate_backward(Tensor grad, Tensor x, Tensor mix) -> (Tensor, Tensor)",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.aggregate_backward,
)
# The gradient of mix is returned; that of x is added to `out`, float32, or with `adds` unset
# overwrites it.
aggregate_accumulate = register(
    "interleaved_aggregate_accumulate(Tensor grad, Tensor x, Tensor mix, bool adds, "
    "Tensor(a!) out) -> Tensor",
    cuda=_accumulate_cuda,
    cpu=_accumulate_cpu,
    fake=lambda grad, x, mix, adds, out: mix.new_empty(mix.shape),
    flops=_flops.aggregate_backward,
)
aggregate = register(
    "interleaved_aggregate(Tensor x, Tensor mix) -> Tensor",
    cuda=_cuda,
    cpu=reference.aggregate,
    fake=_fake,
    flops=_flops.aggregate,
    backward=_backward,
    setup_context=_setup_context,
)
