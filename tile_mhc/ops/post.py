"""1 -> n: add the layer output to every stream, and mix the streams (expand-combine)."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.ops._destinations import NOWHERE, Destinations, Route, call, register_into
from tile_mhc.ops._library import register
from tile_mhc.ops.aggregate import check_mix


def post(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    *,
    grad_accumulator: GradAccumulator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Write the layer output back into the residual streams, mixing them on the way.

    out[t, j, h] = post_mix[t, j] * layer_output[t, h] + sum_i comb_mix[t, i, j] * residual[t, i, h]
    (fp32, the layer output first, then i ascending)

    Args:
        layer_output: (..., H) bfloat16, contiguous.
        residual: (..., n, H) bfloat16, contiguous; n in 2, 4, 8; H a multiple of 64.
        post_mix: (..., n) or (..., n, 1) float32.
        comb_mix: (..., n, n) float32, index [in, out].
        grad_accumulator: gathers the gradient of the residual from all ops that get it.
        out: optional destination (..., n, H) bfloat16; not allowed when a gradient is needed.

    Returns:
        (..., n, H) bfloat16.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: mHC paper (arXiv 2512.24880), eq. 3; TileKernels `mhc/post_kernel.py`.
    """
    num_streams, hidden_size = errors.check_streams("post", "residual", residual)
    like = ("residual", residual)
    shape = (*residual.shape[:-2], hidden_size)
    errors.check_tensor("post", "layer_output", layer_output, [shape], residual.dtype, like)
    errors.check_contiguous("post", "layer_output", layer_output)
    check_mix("post", "post_mix", post_mix, like)
    comb_shape = (*residual.shape[:-1], num_streams)
    errors.check_tensor("post", "comb_mix", comb_mix, [comb_shape], torch.float32, like)
    if out is None:
        inputs = (layer_output, residual, post_mix, comb_mix)
        return call(_ROUTE, inputs, grad_accumulator)
    errors.check_tensor("post", "out", out, [residual.shape], residual.dtype, like)
    inputs = [("layer_output", layer_output), like, ("post_mix", post_mix), ("comb_mix", comb_mix)]
    errors.check_out("post", out, inputs)
    _post_out(layer_output, residual, post_mix, comb_mix, out)
    return out


def _launch(
    layer_output: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor, out: Tensor
) -> None:
    n, hidden_size = residual.shape[-2:]
    if out.numel():
        jit.kernel("post_fwd", n, hidden_size)(
            layer_output.view(-1, hidden_size),
            residual.view(-1, n, hidden_size),
            post_mix.contiguous().view(-1, n),
            comb_mix.contiguous().view(-1, n, n),
            out.view(-1, n, hidden_size),
        )


def _cuda(layer_output: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor) -> Tensor:
    out = _fake(layer_output, residual, post_mix, comb_mix)
    _launch(layer_output, residual, post_mix, comb_mix, out)
    return out


def _fake(layer_output: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def _cpu_out(
    layer_output: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor, out: Tensor
) -> None:
    out.copy_(reference.post(layer_output, residual, post_mix, comb_mix))


def _backward_cuda(
    grad: Tensor, layer_output: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, hidden_size = residual.shape[-2:]
    grads = _backward_fake(grad, layer_output, residual, post_mix, comb_mix)
    grad_output, grad_residual, grad_post, grad_comb = grads
    if residual.numel():
        jit.kernel("post_bwd", n, hidden_size)(
            grad.contiguous().view(-1, n, hidden_size),
            layer_output.view(-1, hidden_size),
            residual.view(-1, n, hidden_size),
            post_mix.contiguous().view(-1, n),
            comb_mix.contiguous().view(-1, n, n),
            grad_output.view(-1, hidden_size),
            grad_residual.view(-1, n, hidden_size),
            grad_post.view(-1, n),
            grad_comb.view(-1, n * n),
        )
    return grads


def _backward_fake(
    grad: Tensor, layer_output: Tensor, residual: Tensor, post_mix: Tensor, comb_mix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        layer_output.new_empty(layer_output.shape),
        residual.new_empty(residual.shape),
        post_mix.new_empty(post_mix.shape),
        comb_mix.new_empty(comb_mix.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_arguments(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return grad, *ctx.saved_tensors


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _post_backward(*_backward_arguments(ctx, grad))


_BACKWARD = (
    "post_backward(Tensor grad, Tensor layer_output, Tensor residual, Tensor post_mix, "
    "Tensor comb_mix) -> (Tensor, Tensor, Tensor, Tensor)"
)
_post_backward = register(
    _BACKWARD,
    cuda=_backward_cuda,
    cpu=reference.post_backward,
    fake=_backward_fake,
)
_post = register(
    "post(Tensor layer_output, Tensor residual, Tensor post_mix, Tensor comb_mix) -> Tensor",
    cuda=_cuda,
    cpu=reference.post,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_post_out = register(
    "post_out(Tensor layer_output, Tensor residual, Tensor post_mix, Tensor comb_mix, "
    "Tensor(a!) out) -> ()",
    cuda=_launch,
    cpu=_cpu_out,
    fake=lambda layer_output, residual, post_mix, comb_mix, out: None,
)
_ROUTE = Route(
    name="post",
    operator=_post,
    setup=_setup_context,
    arguments=_backward_arguments,
    backward=register_into(
        _BACKWARD,
        (1,),
        cuda=_backward_cuda,
        cpu=reference.post_backward,
        fake=_backward_fake,
    ),
    residual=1,
)
