"""Mixes -> pre, post and comb weights: scale, bias and sigmoid."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.ops import _flops
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    adds,
    clear,
    for_part,
    gradient_buffers,
    register_into,
)
from tile_mhc.ops._library import dtypes, register
from tile_mhc.ops._op import Op


def split_mixes(
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_streams: int,
    post_mult: float = 1.0,
    pre_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the projection's output into the three groups of mix weights.

    z = mixes * (scale[0] for the first n, scale[1] for the next n, scale[2] for the rest) + bias
    pre_mix = sigmoid(z[:n]) + pre_eps;  post_mix = post_mult * sigmoid(z[n:2n]);  comb = z[2n:]

    Gradients of parameters that carry `main_grad` go into that: see `tile_mhc.main_grad`.

    Args:
        mixes: (..., n*(n+2)) float32.
        scale: (3,) float32 or bfloat16.
        bias: (n*(n+2),) float32 or bfloat16.
        num_streams: n, one of 2, 4, 8.
        post_mult: factor of post_mix (DeepSeek-V4 uses 2).
        pre_eps: added to pre_mix.

    Returns:
        pre_mix (..., n), post_mix (..., n) and the logits of comb_mix (..., n, n), index
        [in, out], all float32. `sinkhorn` makes comb_mix of the logits.

    Raises:
        ShapeError: a shape, dtype or device does not match.
        UnsupportedError: n has no kernel.

    Source: mHC paper (arXiv 2512.24880), eq. 7 and 8; TileKernels `mhc/pre_split_mixes_kernel.py`.
    """
    inputs = (mixes, scale, bias, num_streams, post_mult, pre_eps)
    known = _OP.find(inputs)
    if known is not None:
        return _OP.call(inputs, known)  # type: ignore[return-value]
    errors.require_tensor("split_mixes", "mixes", mixes)
    errors.check_num_streams("split_mixes", num_streams)
    shape = (*mixes.shape[:-1], num_streams * (num_streams + 2))
    errors.check_tensor("split_mixes", "mixes", mixes, [shape], torch.float32)
    errors.check_device("split_mixes", "mixes", mixes)
    check_gates("split_mixes", scale, bias, 3, shape[-1], ("mixes", mixes))
    errors.check_number("split_mixes", "post_mult", post_mult)
    errors.check_number("split_mixes", "pre_eps", pre_eps)
    return _OP.call(inputs)  # type: ignore[return-value]


def check_gates(
    op: str, scale: Tensor, bias: Tensor, scales: int, biases: int, like: tuple[str, Tensor]
) -> None:
    errors.check_tensor(op, "scale", scale, [(scales,)], errors.PARAMETERS, like)
    errors.check_tensor(op, "bias", bias, [(biases,)], errors.PARAMETERS, like)


def gate_dtypes(scale: Tensor, bias: Tensor) -> tuple[str, ...]:
    return dtypes(scale=scale.dtype, bias=bias.dtype)


def column_sums(
    partials: Tensor, scale: Tensor, bias: Tensor, into: Destinations = NO_DESTINATIONS
) -> tuple[Tensor, Tensor]:
    """Gradients of scale and bias from rows of partial sums: bias columns, then scale columns.

    `into` has them at the positions 1 and 2.
    """
    grad_scale, grad_bias = gradient_buffers(for_part(into, {1: 0, 2: 1}), scale, bias)
    launch_sums(partials, grad_scale, grad_bias, into)
    return grad_scale, grad_bias


def launch_sums(
    partials: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
    into: Destinations = NO_DESTINATIONS,
    *,
    beside: bool = False,
) -> None:
    """Write the gradients of scale and bias; `beside` the kernel launched right before, one of ours
    behind the one that made the partials."""
    directed = 1 in into or 2 in into
    given = gate_dtypes(grad_scale, grad_bias)
    jit.kernel("column_sums", grad_bias.numel(), grad_scale.numel(), directed, *given)(
        partials, grad_bias, grad_scale, adds(into, 2), adds(into, 1), beside
    )


def _fake(
    mixes: Tensor, scale: Tensor, bias: Tensor, num_streams: int, post_mult: float, pre_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    lead = mixes.shape[:-1]
    n = num_streams
    return mixes.new_empty(*lead, n), mixes.new_empty(*lead, n), mixes.new_empty(*lead, n, n)


def launch(
    mixes: Tensor, scale: Tensor, bias: Tensor, num_streams: int, post_mult: float, pre_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake(mixes, scale, bias, num_streams, post_mult, pre_eps)
    n = num_streams
    if mixes.numel():
        launch_rows(
            mixes.contiguous().view(-1, n * (n + 2)),
            scale,
            bias,
            outputs[0].view(-1, n),
            outputs[1].view(-1, n),
            outputs[2].view(-1, n * n),
            post_mult,
            pre_eps,
        )
    return outputs


def launch_rows(
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor,
    post_mix: Tensor,
    logits: Tensor,
    post_mult: float,
    pre_eps: float,
) -> None:
    """Of mixes that are contiguous (tokens, numbers), as are the three outputs."""
    jit.kernel("split_mixes_fwd", pre_mix.shape[1], *gate_dtypes(scale, bias))(
        mixes,
        scale.contiguous(),
        bias.contiguous(),
        pre_mix,
        post_mix,
        logits,
        post_mult,
        pre_eps,
    )


def _cpu(
    mixes: Tensor, scale: Tensor, bias: Tensor, num_streams: int, post_mult: float, pre_eps: float
) -> tuple[Tensor, ...]:
    outputs = reference.split_mixes(
        mixes, scale, bias, num_streams=num_streams, post_mult=post_mult, pre_eps=pre_eps
    )
    return tuple(out.contiguous() for out in outputs)


def launch_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_streams: int,
    post_mult: float,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, Tensor, Tensor]:
    n, num_mixes = num_streams, mixes.shape[-1]
    grad_mixes = mixes.new_empty(mixes.shape)
    num_tokens = mixes.numel() // num_mixes
    if num_tokens == 0:
        return grad_mixes, *no_sums(scale, bias, into)
    partials = mixes.new_empty(partial_shape(num_tokens, num_mixes))
    launch_backward_rows(
        grad_pre.contiguous().view(-1, n),
        grad_post.contiguous().view(-1, n),
        grad_comb.contiguous().view(-1, n * n),
        mixes.contiguous().view(-1, num_mixes),
        scale,
        bias,
        grad_mixes.view(-1, num_mixes),
        partials,
        post_mult,
    )
    return grad_mixes, *column_sums(partials, scale, bias, into)


def partial_shape(num_tokens: int, num_mixes: int) -> tuple[int, int]:
    """One row of partial sums per CTA: the bias gradients, then the three scale gradients."""
    return selection.partial_rows(num_tokens), num_mixes + 3


def launch_backward_rows(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    grad_mixes: Tensor,
    partials: Tensor,
    post_mult: float,
) -> None:
    """Of mixes and gradients that are contiguous (tokens, numbers); `partials` to be summed."""
    jit.kernel("split_mixes_bwd", grad_pre.shape[1], *gate_dtypes(scale, bias))(
        grad_pre,
        grad_post,
        grad_comb,
        mixes,
        scale.contiguous(),
        bias.contiguous(),
        grad_mixes,
        partials,
        post_mult,
    )


def no_sums(scale: Tensor, bias: Tensor, into: Destinations) -> tuple[Tensor, Tensor]:
    """What `column_sums` gives for no token."""
    _, grad_scale, grad_bias = gradient_buffers(into, bias, scale, bias)
    clear(into, {1: grad_scale, 2: grad_bias})
    return grad_scale, grad_bias


def _backward_fake(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_streams: int,
    post_mult: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return mixes.new_empty(mixes.shape), scale.new_empty(scale.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mixes, scale, bias, ctx.num_streams, ctx.post_mult, _ = inputs
    ctx.save_for_backward(mixes, scale, bias)


def _backward_arguments(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return *grads, *ctx.saved_tensors, ctx.num_streams, ctx.post_mult


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return (*_split_mixes_backward(*_backward_arguments(ctx, *grads)), None, None, None)


_BACKWARD = (
    "split_mixes_backward(Tensor grad_pre, Tensor grad_post, Tensor grad_comb, Tensor mixes, "
    "Tensor scale, Tensor bias, int num_streams, float post_mult) -> (Tensor, Tensor, Tensor)"
)
_split_mixes_backward = register(
    _BACKWARD,
    cuda=launch_backward,
    cpu=reference.split_mixes_backward,
    fake=_backward_fake,
    flops=_flops.pointwise,
)
_split_mixes = register(
    "split_mixes(Tensor mixes, Tensor scale, Tensor bias, int num_streams, float post_mult, "
    "float pre_eps) -> (Tensor, Tensor, Tensor)",
    cuda=launch,
    cpu=_cpu,
    fake=_fake,
    flops=_flops.pointwise,
    backward=_backward,
    setup_context=_setup_context,
)
_OP = Op(
    name="split_mixes",
    operator=_split_mixes,
    save=_setup_context,
    arguments=_backward_arguments,
    gradients=_split_mixes_backward,
    tensors=3,
    backward=register_into(
        _BACKWARD,
        (1, 2),
        cuda=launch_backward,
        cpu=reference.split_mixes_backward,
        fake=_backward_fake,
        flops=_flops.pointwise,
    ),
    visible=3,
    parameters={1: "scale", 2: "bias"},
)
