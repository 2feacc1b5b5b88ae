"""1 -> n, plus stream mixing, on streams that lie innermost, (..., C, n): operators behind
compat.transformer_engine."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import jit, selection
from tile_mhc.ops import _flops
from tile_mhc.ops._library import absent, dtype_of, dtypes, empty_gradients, own_dtype, register
from tile_mhc.ops.transformer_engine import reference


def _cuda(f: Tensor, bias: Tensor | None, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    channels, n = x.shape[-2:]
    if out.numel():
        given = dtypes(streams=x.dtype, layer_output=f.dtype, layer_bias=dtype_of(bias))
        jit.kernel("interleaved_post_fwd", n, channels, *given)(
            f.contiguous().view(-1, channels),
            absent(x) if bias is None else bias.contiguous(),
            x.view(-1, channels * n),
            post.contiguous().view(-1, n),
            comb.contiguous().view(-1, n * n),
            out.view(-1, channels * n),
        )
    return out


def _cpu(*inputs: Any) -> Tensor:
    return reference.post(*inputs).contiguous()


def _launch_backward(
    grad: Tensor,
    f: Tensor,
    bias: Tensor | None,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    adds: bool,
    grads: tuple[Tensor, ...],
) -> None:
    """Write the gradients of f, bias, x, post and comb."""
    grad_f, grad_bias, grad_x, grad_post, grad_comb = grads
    channels, n = x.shape[-2:]
    if x.numel() == 0:
        grad_bias.zero_()
        return
    partials = absent(x)
    if bias is not None:
        partials = post.new_empty(selection.bias_slices(post.numel() // n), channels)
    given = dtypes(
        streams=x.dtype,
        layer_output=f.dtype,
        layer_bias=dtype_of(bias),
        into=own_dtype(grad_x, x),
    )
    jit.kernel("interleaved_post_bwd", n, channels, *given)(
        grad.contiguous().view(-1, channels * n),
        f.contiguous().view(-1, channels),
        absent(x) if bias is None else bias.contiguous(),
        x.view(-1, channels * n),
        post.contiguous().view(-1, n),
        comb.contiguous().view(-1, n * n),
        grad_f.view(-1, channels),
        partials,
        grad_post.view(-1, n),
        grad_comb.view(-1, n * n),
        grad_x.view(-1, channels * n),
        adds,
    )
    if bias is not None:
        jit.kernel("post_bias_bwd", channels, *dtypes(layer_bias=bias.dtype))(partials, grad_bias)


def _backward_cuda(
    grad: Tensor, f: Tensor, bias: Tensor | None, x: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, ...]:
    grads = empty_gradients(f, bias, x, post, comb)
    _launch_backward(grad, f, bias, x, post, comb, False, grads)
    return grads


def _backward_cpu(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    grad_f, grad_bias, grad_x, grad_post, grad_comb = reference.post_backward(grad, *inputs)
    if grad_bias is None:
        grad_bias = grad_f.new_empty(0)
    return grad_f, grad_bias, grad_x.contiguous(), grad_post, grad_comb


def _accumulate_cuda(
    grad: Tensor,
    f: Tensor,
    bias: Tensor | None,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    adds: bool,
    out: Tensor,
) -> tuple[Tensor, ...]:
    grads = empty_gradients(f, bias, post, comb)
    _launch_backward(grad, f, bias, x, post, comb, adds, (*grads[:2], out, *grads[2:]))
    return grads


def _accumulate_cpu(
    grad: Tensor,
    f: Tensor,
    bias: Tensor | None,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    adds: bool,
    out: Tensor,
) -> tuple[Tensor, ...]:
    wide = x.to(torch.float32)
    grad_f, grad_bias, grad_x, *grad_mixes = _backward_cpu(grad, f, bias, wide, post, comb)
    buffer = out.view_as(x)
    buffer.copy_(buffer + grad_x if adds else grad_x)
    return grad_f, grad_bias, *grad_mixes


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing unpacks it only once
    grad_f, grad_bias, *others = post_backward(grad, *saved)
    return grad_f, None if saved[1] is None else grad_bias, *others


_INPUTS = "Tensor f, Tensor? bias, Tensor x, Tensor post, Tensor comb"

post_backward = register(
    f"interleaved_post_backward(Tensor grad, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=lambda grad, *inputs: empty_gradients(*inputs),
    flops=_flops.interleaved_post_backward,
)
# The gradients of f, bias, post and comb are returned; that of x is added to `out`, float32, or
# with `adds` unset overwrites it.
post_accumulate = register(
    f"interleaved_post_accumulate(Tensor grad, {_INPUTS}, bool adds, Tensor(a!) out) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_accumulate_cuda,
    cpu=_accumulate_cpu,
    fake=lambda grad, f, bias, x, post, comb, adds, out: empty_gradients(f, bias, post, comb),
    flops=_flops.interleaved_post_backward,
)
post = register(
    f"interleaved_post({_INPUTS}) -> Tensor",
    cuda=_cuda,
    cpu=_cpu,
    fake=lambda f, bias, x, post, comb: x.new_empty(x.shape),
    flops=_flops.interleaved_post,
    backward=_backward,
    setup_context=_setup_context,
)
