"""1 -> n: add the layer output to every stream, and mix the streams (expand-combine)."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.ops import _flops
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    adds,
    destination_dtype,
    gradient_buffers,
    register_into,
)
from tile_mhc.ops._group import active
from tile_mhc.ops._library import absent, dtype_of, dtypes, empty_gradients, empty_like, register
from tile_mhc.ops._op import Op
from tile_mhc.ops.aggregate import check_mix


def post(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    *,
    bias: Tensor | None = None,
    grad_accumulator: GradAccumulator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Write the layer output back into the residual streams, mixing them on the way.

    out[t, j, h] = post_mix[t, j] * (layer_output[t, h] + bias[h])
                   + sum_i comb_mix[t, i, j] * residual[t, i, h]
    (fp32, the layer output first, then i ascending)

    The gradient of the bias is the fp32 sum over the tokens of the gradient of layer_output before
    that is rounded, by slices of tokens and then over the slices, in a fixed order.

    Args:
        layer_output: (..., H), contiguous, of the dtype of the residual.
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        post_mix: (..., n) or (..., n, 1) float32.
        comb_mix: (..., n, n) float32, index [in, out].
        bias: optional (H,) float32 or bfloat16, the bias of the layer's last linear map.
        grad_accumulator: gathers the gradient of the residual from all ops that get it.
        out: optional destination (..., n, H), of the dtype of the residual; not allowed when a
            gradient is needed.

    Returns:
        (..., n, H), of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n, H or the dtype has no kernel.

    Source: mHC paper (arXiv 2512.24880), eq. 3; TileKernels `mhc/post_kernel.py`; the bias is
    Megatron-LM's and TransformerEngine's.
    """
    inputs = (layer_output, residual, post_mix, comb_mix, bias)
    known = _OP.find(inputs) if out is None else None
    if known is not None:
        return _OP.call(inputs, known, grad_accumulator)[0]
    check_post("post", layer_output, residual, post_mix, comb_mix, ("bias", bias))
    like = ("residual", residual)
    if out is None:
        return _OP.call(inputs, None, grad_accumulator)[0]
    errors.check_tensor("post", "out", out, [residual.shape], residual.dtype, like)
    named = [("layer_output", layer_output), like, ("post_mix", post_mix), ("comb_mix", comb_mix)]
    if bias is not None:
        named.append(("bias", bias))
    errors.check_out("post", out, named)
    _post_out(*inputs, out)
    return out


def check_post(
    op: str,
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    bias: tuple[str, Tensor | None],
) -> None:
    """The inputs of a post; the bias of the layer has another name in another op."""
    num_streams, hidden_size = errors.check_streams(op, "residual", residual)
    like = ("residual", residual)
    shape = (*residual.shape[:-2], hidden_size)
    errors.check_tensor(op, "layer_output", layer_output, [shape], residual.dtype, like)
    errors.check_contiguous(op, "layer_output", layer_output)
    check_mix(op, "post_mix", post_mix, like)
    comb_shape = (*residual.shape[:-1], num_streams)
    errors.check_tensor(op, "comb_mix", comb_mix, [comb_shape], torch.float32, like)
    if bias[1] is not None:
        errors.check_tensor(op, *bias, [(hidden_size,)], errors.PARAMETERS, like)


def launch(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    n, hidden_size = residual.shape[-2:]
    if out.numel():
        given = dtypes(streams=residual.dtype, layer_bias=dtype_of(bias))
        jit.kernel("post_fwd", n, hidden_size, *given)(
            layer_output.view(-1, hidden_size),
            residual.view(-1, n, hidden_size),
            post_mix.contiguous().view(-1, n),
            comb_mix.contiguous().view(-1, n, n),
            out.view(-1, n, hidden_size),
            *([] if bias is None else [bias.contiguous()]),
        )


def given_before(x: Tensor, n: int, of_post: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """What kernels that make a post on their way are given of it: layer_output, the streams x,
    post_mix and comb_mix, and the streams to write. Without `of_post` what is absent, but for x."""
    if of_post is None:
        return absent(x, x.dtype), x, absent(x), absent(x), absent(x, x.dtype)
    layer_output, post_mix, comb_mix, streams = of_post
    return (
        layer_output.view(-1, layer_output.shape[-1]),
        x,
        post_mix.contiguous().view(-1, n),
        comb_mix.contiguous().view(-1, n, n),
        streams.view(x.shape),
    )


def _cuda(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    bias: Tensor | None,
) -> Tensor:
    out = empty_like(residual)
    launch(layer_output, residual, post_mix, comb_mix, bias, out)
    return out


def _fake(layer_output: Tensor, residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)


def _cpu(*tensors: Any) -> Tensor:
    *others, bias = tensors
    return reference.post(*others, bias=bias)


def _cpu_out(*tensors: Any) -> None:
    *inputs, out = tensors
    out.copy_(_cpu(*inputs))


def launch_backward(
    grad: Tensor,
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    bias: Tensor | None,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, ...]:
    n, hidden_size = residual.shape[-2:]
    grads = gradient_buffers(into, layer_output, residual, post_mix, comb_mix, bias)
    grad_output, grad_residual, grad_post, grad_comb, grad_bias = grads
    if residual.numel() == 0:
        grad_bias.zero_()
        return grads
    of_bias = []
    num_tokens = residual.numel() // (n * hidden_size)
    few = bias is None and selection.is_one_token_per_sm(num_tokens)
    if bias is not None:
        partials = post_mix.new_empty(selection.bias_slices(num_tokens), hidden_size)
        of_bias = [bias.contiguous(), partials]
    given = dtypes(
        streams=residual.dtype, layer_bias=dtype_of(bias), into=destination_dtype(into, 1)
    )
    jit.kernel("post_bwd", n, hidden_size, few, *given)(
        grad.contiguous().view(-1, n, hidden_size),
        layer_output.view(-1, hidden_size),
        residual.view(-1, n, hidden_size),
        post_mix.contiguous().view(-1, n),
        comb_mix.contiguous().view(-1, n, n),
        grad_output.view(-1, hidden_size),
        grad_residual.view(-1, n, hidden_size),
        grad_post.view(-1, n),
        grad_comb.view(-1, n * n),
        adds(into, 1),
        *of_bias,
    )
    if bias is not None:
        jit.kernel("post_bias_bwd", hidden_size, *dtypes(layer_bias=bias.dtype))(
            partials, grad_bias
        )
    return grads


def _backward_cpu(
    grad: Tensor,
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    *grads, grad_bias = reference.post_backward(
        grad, layer_output, residual, post_mix, comb_mix, bias
    )
    return *grads, comb_mix.new_empty(0) if grad_bias is None else grad_bias


def _backward_fake(grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return empty_gradients(*inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or active.group is None:
        ctx.save_for_backward(*inputs)
    else:
        streams = output if isinstance(output, Tensor) else output[0]
        active.group.after_post(ctx, inputs, streams)


def _backward_arguments(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, *(ctx.saved_tensors or ctx.kept.take())


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _backward_arguments(ctx, grad)
    *grads, grad_bias = _post_backward(*arguments)
    return *grads, None if arguments[5] is None else grad_bias


_BACKWARD = (
    "post_backward(Tensor grad, Tensor layer_output, Tensor residual, Tensor post_mix, "
    "Tensor comb_mix, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_post_backward = register(
    _BACKWARD,
    cuda=launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.post_backward,
)
_post = register(
    "post(Tensor layer_output, Tensor residual, Tensor post_mix, Tensor comb_mix, Tensor? bias) "
    "-> Tensor",
    cuda=_cuda,
    cpu=_cpu,
    fake=_fake,
    flops=_flops.post,
    backward=_backward,
    setup_context=_setup_context,
)
_post_out = register(
    "post_out(Tensor layer_output, Tensor residual, Tensor post_mix, Tensor comb_mix, "
    "Tensor? bias, Tensor(a!) out) -> ()",
    cuda=launch,
    cpu=_cpu_out,
    fake=lambda *_: None,
    flops=_flops.post,
)
_OP = Op(
    name="post",
    operator=_post,
    save=_setup_context,
    arguments=_backward_arguments,
    gradients=_post_backward,
    tensors=5,
    backward=register_into(
        _BACKWARD,
        (1,),
        cuda=launch_backward,
        cpu=_backward_cpu,
        fake=_backward_fake,
        flops=_flops.post_backward,
    ),
    residual=1,
)
