"""The gate of the readout: the head's mixes -> weights."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.ops import _flops
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    register_into,
)
from tile_mhc.ops._library import register
from tile_mhc.ops._op import Op
from tile_mhc.ops.mixes import check_gates, column_sums, gate_dtypes, no_sums


def head_mix(mixes: Tensor, scale: Tensor, bias: Tensor, *, pre_eps: float = 1e-6) -> Tensor:
    """Turn the head's mixes into its gate.

    gate = sigmoid(mixes * scale + bias) + pre_eps

    Gradients of parameters that carry `main_grad` go into that: see `tile_mhc.main_grad`.

    Args:
        mixes: (..., n) float32; n in 2, 4, 8.
        scale: (1,) float32 or bfloat16.
        bias: (n,) float32 or bfloat16.
        pre_eps: added to the gate.

    Returns:
        (..., n) float32.

    Raises:
        ShapeError: a shape, dtype or device does not match.
        UnsupportedError: n has no kernel.

    Source: DeepSeek TileKernels `mhc/head_compute_mix_kernel.py`.
    """
    inputs = (mixes, scale, bias, pre_eps)
    known = _OP.find(inputs)
    if known is not None:
        return _OP.call(inputs, known)[0]
    errors.require_tensor("head_mix", "mixes", mixes)
    if mixes.dtype != torch.float32 or mixes.ndim < 1:
        raise errors.ShapeError(
            f"head_mix: mixes must be (..., n) float32; got {errors.describe(mixes)}"
        )
    errors.check_num_streams("head_mix", mixes.shape[-1])
    errors.check_device("head_mix", "mixes", mixes)
    check_gates("head_mix", scale, bias, 1, mixes.shape[-1], ("mixes", mixes))
    errors.check_number("head_mix", "pre_eps", pre_eps)
    return _OP.call(inputs)[0]


def launch(mixes: Tensor, scale: Tensor, bias: Tensor, pre_eps: float) -> Tensor:
    out = mixes.new_empty(mixes.shape)
    launch_into(mixes, scale, bias, pre_eps, out)
    return out


def launch_into(mixes: Tensor, scale: Tensor, bias: Tensor, pre_eps: float, out: Tensor) -> None:
    n = mixes.shape[-1]
    if out.numel():
        jit.kernel("head_mix_fwd", n, *gate_dtypes(scale, bias))(
            mixes.contiguous().view(-1, n), scale, bias.contiguous(), out.view(-1, n), pre_eps
        )


def launch_backward(
    grad: Tensor, mixes: Tensor, scale: Tensor, bias: Tensor, into: Destinations = NO_DESTINATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    n = mixes.shape[-1]
    grad_mixes = mixes.new_empty(mixes.shape)
    num_tokens = mixes.numel() // n
    if num_tokens == 0:
        return grad_mixes, *no_sums(scale, bias, into)
    # One row of partial sums per CTA: the bias gradients, then the scale gradient.
    partials = mixes.new_empty(selection.partial_rows(num_tokens), n + 1)
    jit.kernel("head_mix_bwd", n, *gate_dtypes(scale, bias))(
        grad.contiguous().view(-1, n),
        mixes.contiguous().view(-1, n),
        scale,
        bias.contiguous(),
        grad_mixes.view(-1, n),
        partials,
    )
    return grad_mixes, *column_sums(partials, scale, bias, into)


def _backward_fake(
    grad: Tensor, mixes: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return mixes.new_empty(mixes.shape), scale.new_empty(scale.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_arguments(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return grad, *ctx.saved_tensors


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_head_mix_backward(*_backward_arguments(ctx, grad)), None)


_BACKWARD = (
    "head_mix_backward(Tensor grad, Tensor mixes, Tensor scale, Tensor bias) "
    "-> (Tensor, Tensor, Tensor)"
)
_head_mix_backward = register(
    _BACKWARD,
    cuda=launch_backward,
    cpu=reference.head_mix_backward,
    fake=_backward_fake,
    flops=_flops.pointwise,
)
_head_mix = register(
    "head_mix(Tensor mixes, Tensor scale, Tensor bias, float pre_eps) -> Tensor",
    cuda=launch,
    cpu=lambda mixes, scale, bias, pre_eps: reference.head_mix(mixes, scale, bias, pre_eps=pre_eps),
    fake=lambda mixes, scale, bias, pre_eps: mixes.new_empty(mixes.shape),
    flops=_flops.pointwise,
    backward=_backward,
    setup_context=_setup_context,
)
_OP = Op(
    name="head_mix",
    operator=_head_mix,
    save=_setup_context,
    arguments=_backward_arguments,
    gradients=_head_mix_backward,
    tensors=3,
    backward=register_into(
        _BACKWARD,
        (1, 2),
        cuda=launch_backward,
        cpu=reference.head_mix_backward,
        fake=_backward_fake,
        flops=_flops.pointwise,
    ),
    parameters={1: "scale", 2: "bias"},
)
