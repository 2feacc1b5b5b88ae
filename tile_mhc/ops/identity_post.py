"""1 -> n: add the layer output to every stream, which goes on as it is."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.ops import _flops
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    adds,
    destination_dtype,
    register_into,
)
from tile_mhc.ops._library import (
    absent,
    dtype_of,
    dtypes,
    empty_gradients,
    empty_like,
    register,
)
from tile_mhc.ops._op import Op
from tile_mhc.ops.aggregate import check_mix


def identity_post(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    *,
    bias: Tensor | None = None,
    grad_accumulator: GradAccumulator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Write the layer output into the residual streams, which are not mixed.

    out[t, j, h] = post_mix[t, j] * (layer_output[t, h] + bias[h]) + residual[t, j, h]
    (fp32, rounded once)

    The backward does not read the residual, and its gradient is that of the output, untouched. That
    of the bias is the fp32 sum over the tokens of the gradient of layer_output before that is
    rounded, by slices of tokens and then over the slices, in a fixed order.

    Args:
        layer_output: (..., H), contiguous, of the dtype of the residual.
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        post_mix: (..., n) or (..., n, 1) float32.
        bias: optional (H,) float32 or bfloat16, the bias of the layer's last linear map.
        grad_accumulator: gathers the gradient of the residual from all ops that get it.
        out: optional destination (..., n, H), of the dtype of the residual; not allowed when a
            gradient is needed.

    Returns:
        (..., n, H), of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n, H or the dtype has no kernel.

    Source: HY-V4, transformers `HYV4DecoderLayer`; `post` with a comb_mix of the identity.
    """
    # The residual behind the others: its gradient is no work.
    inputs = (layer_output, post_mix, bias, residual)
    known = _OP.find(inputs) if out is None else None
    if known is not None:
        return _OP.call(inputs, known, grad_accumulator)[0]
    _, hidden_size = errors.check_streams("identity_post", "residual", residual)
    like = ("residual", residual)
    shape = (*residual.shape[:-2], hidden_size)
    errors.check_tensor(
        "identity_post", "layer_output", layer_output, [shape], residual.dtype, like
    )
    errors.check_contiguous("identity_post", "layer_output", layer_output)
    check_mix("identity_post", "post_mix", post_mix, like)
    if bias is not None:
        errors.check_tensor(
            "identity_post", "bias", bias, [(hidden_size,)], errors.PARAMETERS, like
        )
    if out is None:
        return _OP.call(inputs, None, grad_accumulator)[0]
    errors.check_tensor("identity_post", "out", out, [residual.shape], residual.dtype, like)
    named = [("layer_output", layer_output), like, ("post_mix", post_mix)]
    if bias is not None:
        named.append(("bias", bias))
    errors.check_out("identity_post", out, named)
    _identity_post_out(*inputs, out)
    return out


def _launch(
    layer_output: Tensor, post_mix: Tensor, bias: Tensor | None, residual: Tensor, out: Tensor
) -> None:
    n, hidden_size = residual.shape[-2:]
    if out.numel():
        given = dtypes(streams=residual.dtype, layer_bias=dtype_of(bias))
        jit.kernel("identity_post_fwd", n, hidden_size, *given)(
            layer_output.view(-1, hidden_size),
            residual.view(-1, n, hidden_size),
            post_mix.contiguous().view(-1, n),
            absent(residual) if bias is None else bias.contiguous(),
            out.view(-1, n, hidden_size),
        )


def _cuda(layer_output: Tensor, post_mix: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    out = empty_like(residual)
    _launch(layer_output, post_mix, bias, residual, out)
    return out


def _fake(_output: Tensor, _mix: Tensor, _bias: Tensor | None, residual: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def _cpu(layer_output: Tensor, post_mix: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return reference.identity_post(layer_output, residual, post_mix, bias=bias)


def _cpu_out(*tensors: Any) -> None:
    *inputs, out = tensors
    out.copy_(_cpu(*inputs))


def _launch_backward(
    grad: Tensor,
    layer_output: Tensor,
    post_mix: Tensor,
    bias: Tensor | None,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of layer_output, post_mix and bias; that of the residual goes only into a
    destination, at position 3, as otherwise it is `grad`."""
    n, hidden_size = grad.shape[-2:]
    grad_output, grad_post, grad_bias = empty_gradients(layer_output, post_mix, bias)
    if grad.numel() == 0:
        return grad_output, grad_post, grad_bias.zero_()
    if bias is None:
        of_bias = absent(grad), absent(grad)
    else:
        num_tokens = grad.numel() // (n * hidden_size)
        partials = post_mix.new_empty(selection.bias_slices(num_tokens), hidden_size)
        of_bias = bias.contiguous(), partials
    if 3 in into:
        grad_residual = into[3].tensor.view(-1, n, hidden_size)
    else:
        grad_residual = absent(grad, grad.dtype)
    given = dtypes(streams=grad.dtype, layer_bias=dtype_of(bias), into=destination_dtype(into, 3))
    jit.kernel("identity_post_bwd", n, hidden_size, *given)(
        grad.contiguous().view(-1, n, hidden_size),
        layer_output.view(-1, hidden_size),
        post_mix.contiguous().view(-1, n),
        grad_output.view(-1, hidden_size),
        grad_post.view(-1, n),
        grad_residual,
        *of_bias,
        adds(into, 3),
    )
    if bias is not None:
        jit.kernel("post_bias_bwd", hidden_size, *dtypes(layer_bias=bias.dtype))(
            partials, grad_bias
        )
    return grad_output, grad_post, grad_bias


def _backward_cpu(
    grad: Tensor, layer_output: Tensor, post_mix: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, grad_post, grad_bias = reference.identity_post_backward(
        grad, layer_output, post_mix, bias
    )
    return grad_output, grad_post, post_mix.new_empty(0) if grad_bias is None else grad_bias


def _backward_fake(_grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return empty_gradients(*inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_arguments(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _backward_arguments(ctx, grad)
    grad_output, grad_post, grad_bias = _identity_post_backward(*arguments)
    return grad_output, grad_post, None if arguments[3] is None else grad_bias, grad


_ARGUMENTS = "(Tensor grad, Tensor layer_output, Tensor post_mix, Tensor? bias)"
_identity_post_backward = register(
    f"identity_post_backward{_ARGUMENTS} -> (Tensor, Tensor, Tensor)",
    cuda=_launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.identity_post_backward,
)
_identity_post = register(
    "identity_post(Tensor layer_output, Tensor post_mix, Tensor? bias, Tensor residual) -> Tensor",
    cuda=_cuda,
    cpu=_cpu,
    fake=_fake,
    flops=_flops.identity_post,
    backward=_backward,
    setup_context=_setup_context,
)
_identity_post_out = register(
    "identity_post_out(Tensor layer_output, Tensor post_mix, Tensor? bias, Tensor residual, "
    "Tensor(a!) out) -> ()",
    cuda=_launch,
    cpu=_cpu_out,
    fake=lambda *_: None,
    flops=_flops.identity_post,
)
# With the gradient of the residual, which is in no operator's results but for this one's.
_with_residual = register_into(
    f"identity_post_backward{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)",
    (3,),
    cuda=lambda grad, *inputs, into: (
        *_launch_backward(grad, inputs[0], inputs[1], inputs[2], into),
        grad.new_empty(0),
    ),
    cpu=lambda *inputs: (*_backward_cpu(*inputs), inputs[0]),
    fake=lambda *inputs: (*_backward_fake(*inputs), inputs[0].new_empty(inputs[0].shape)),
    flops=_flops.identity_post_backward,
)


def _backward_into(arguments: Sequence[Any], into: Destinations) -> Sequence[Tensor | None]:
    if not into:
        grads: tuple[Tensor, ...] = _identity_post_backward(*arguments)
        return grads
    return _with_residual(arguments, into)


_OP = Op(
    name="identity_post",
    operator=_identity_post,
    save=_setup_context,
    arguments=_backward_arguments,
    gradients=_identity_post_backward,
    tensors=4,
    backward=_backward_into,
    residual=3,
    untouched=True,
)
