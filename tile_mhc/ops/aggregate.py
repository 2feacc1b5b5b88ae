"""n -> 1: read the layer input from the residual streams."""

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
from tile_mhc.ops._library import dtypes, register
from tile_mhc.ops._op import Op


def aggregate(
    residual: Tensor,
    pre_mix: Tensor,
    *,
    grad_accumulator: GradAccumulator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Read the layer input from the residual streams.

    layer_input[t, h] = sum_i pre_mix[t, i] * residual[t, i, h]        (fp32 sum, i ascending)

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        pre_mix: (..., n) or (..., n, 1) float32.
        grad_accumulator: gathers the gradient of the residual from all ops that get it.
        out: optional destination (..., H), of the dtype of the residual; not allowed when a
            gradient is needed.

    Returns:
        (..., H), of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.1; TileKernels `mhc/pre_apply_mix_kernel.py`.
    """
    inputs = (residual, pre_mix)
    known = _OP.find(inputs) if out is None else None
    if known is not None:
        return _OP.call(inputs, known, grad_accumulator)[0]
    _, hidden_size = errors.check_streams("aggregate", "residual", residual)
    check_mix("aggregate", "pre_mix", pre_mix, ("residual", residual))
    if out is None:
        return _OP.call(inputs, None, grad_accumulator)[0]
    shape = (*residual.shape[:-2], hidden_size)
    errors.check_tensor("aggregate", "out", out, [shape], residual.dtype, ("residual", residual))
    errors.check_out("aggregate", out, [("residual", residual), ("pre_mix", pre_mix)])
    _aggregate_out(residual, pre_mix, out)
    return out


def check_mix(op: str, name: str, mix: Tensor, streams: tuple[str, Tensor]) -> None:
    """A mix of one weight a stream: (..., n) or (..., n, 1), float32, beside the streams."""
    shape = streams[1].shape[:-1]
    errors.check_tensor(op, name, mix, [shape, (*shape, 1)], torch.float32, streams)


def launch(residual: Tensor, pre_mix: Tensor, out: Tensor) -> None:
    n, hidden_size = residual.shape[-2:]
    if out.numel():
        given = dtypes(streams=residual.dtype)
        if selection.reads_last(residual.nbytes):
            kernel = jit.kernel("aggregate_last_fwd", n, hidden_size, *given)
        else:
            kernel = jit.kernel("aggregate_fwd", n, hidden_size, *given)
        kernel(
            residual.view(-1, n, hidden_size),
            pre_mix.contiguous().view(-1, n),
            out.view(-1, hidden_size),
        )


def _cuda(residual: Tensor, pre_mix: Tensor) -> Tensor:
    out = _fake(residual, pre_mix)
    launch(residual, pre_mix, out)
    return out


def _fake(residual: Tensor, pre_mix: Tensor) -> Tensor:
    return residual.new_empty(*residual.shape[:-2], residual.shape[-1])


def _cpu_out(residual: Tensor, pre_mix: Tensor, out: Tensor) -> None:
    out.copy_(reference.aggregate(residual, pre_mix))


def _backward_cuda(
    grad: Tensor, residual: Tensor, pre_mix: Tensor, into: Destinations = NO_DESTINATIONS
) -> tuple[Tensor, ...]:
    n, hidden_size = residual.shape[-2:]
    grad_residual, grad_mix = gradient_buffers(into, residual, pre_mix)
    if residual.numel():
        given = dtypes(streams=residual.dtype, into=destination_dtype(into, 0))
        jit.kernel("aggregate_bwd", n, hidden_size, *given)(
            grad.contiguous().view(-1, hidden_size),
            residual.view(-1, n, hidden_size),
            pre_mix.contiguous().view(-1, n),
            grad_residual.view(-1, n, hidden_size),
            grad_mix.view(-1, n),
            adds(into, 0),
        )
    return grad_residual, grad_mix


def _backward_fake(grad: Tensor, residual: Tensor, pre_mix: Tensor) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), pre_mix.new_empty(pre_mix.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or active.group is None:
        ctx.save_for_backward(*inputs)
    else:
        layer_input = output if isinstance(output, Tensor) else output[0]
        active.group.after_aggregate(ctx, inputs, layer_input)


def _backward_arguments(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return grad, *(ctx.saved_tensors or ctx.kept.take())


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _aggregate_backward(*_backward_arguments(ctx, grad))


_BACKWARD = "aggregate_backward(Tensor grad, Tensor residual, Tensor pre_mix) -> (Tensor, Tensor)"
_aggregate_backward = register(
    _BACKWARD,
    cuda=_backward_cuda,
    cpu=reference.aggregate_backward,
    fake=_backward_fake,
    flops=_flops.aggregate_backward,
)
_aggregate = register(
    "aggregate(Tensor residual, Tensor pre_mix) -> Tensor",
    cuda=_cuda,
    cpu=reference.aggregate,
    fake=_fake,
    flops=_flops.aggregate,
    backward=_backward,
    setup_context=_setup_context,
)
_aggregate_out = register(
    "aggregate_out(Tensor residual, Tensor pre_mix, Tensor(a!) out) -> ()",
    cuda=launch,
    cpu=_cpu_out,
    fake=lambda residual, pre_mix, out: None,
    flops=_flops.aggregate,
)
_OP = Op(
    name="aggregate",
    operator=_aggregate,
    save=_setup_context,
    arguments=_backward_arguments,
    gradients=_aggregate_backward,
    tensors=2,
    backward=register_into(
        _BACKWARD,
        (0,),
        cuda=_backward_cuda,
        cpu=reference.aggregate_backward,
        fake=_backward_fake,
        flops=_flops.aggregate_backward,
    ),
)
