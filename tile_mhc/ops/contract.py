"""n -> 1 at the end: a learned readout of the streams.

`contract` makes one pass over bfloat16 streams where clusters of CTAs hold its tokens: where
`selection.reads_once` says so, for the forward and the backward each; see `contract_cluster`.
Elsewhere it makes two, the projection's and its own; in the forward also with a given `num_splits`,
and in the backward for a gradient that goes into an accumulator.
"""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.ops import _flops, contract_cluster
from tile_mhc.ops import head_mix as head_mix_op
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    for_part,
    register_into,
)
from tile_mhc.ops._library import dtype_of, dtypes, empty_gradients, register
from tile_mhc.ops._op import Op
from tile_mhc.ops.mixes import check_gates


def contract(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    num_splits: int | None = None,
    tf32: bool = False,
    grad_accumulator: GradAccumulator | None = None,
) -> Tensor:
    """Read one stream out of n, with learned weights per token.

    gate = sigmoid(projection(residual, weight) * scale + bias) + pre_eps
    out[t, h] = sum_i gate[t, i] * residual[t, i, h]

    On CUDA products are near fp32, as in `projection` (about 2.5e-6 relative to float64), and sums
    in a fixed order; the gradient of the residual is rounded once for both its uses. Where a
    cluster of CTAs can hold a token (bfloat16, n up to 4, the usual H up to 8192) the streams are
    read once. Elsewhere, and with a `num_splits`, they are read twice in the forward: the output
    is then the bits of `projection`, `head_mix` and `aggregate` one after another.

    Gradients of parameters that carry `main_grad` go into that: see `tile_mhc.main_grad`.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        weight: (n, n*H) float32 or bfloat16.
        scale: (1,) float32 or bfloat16.
        bias: (n,) float32 or bfloat16.
        norm_weight: optional (n*H,) float32 or bfloat16, a learnable weight of the RMS norm.
        norm_eps: added to the mean square of the RMS norm.
        pre_eps: added to the gate.
        num_splits: as in `projection`, which then makes the mixes in a pass of its own; by default
            the streams are read once where they can be.
        tf32: as in `projection`.
        grad_accumulator: gathers the gradient of the residual from all ops that get it. The
            backward is then that of two passes: other last bits.

    Returns:
        (..., H), of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: Megatron-LM `learned_output_contract`; DeepSeek TileKernels `mhc_head`.
    """
    inputs = (residual, weight, scale, bias, norm_weight, norm_eps, pre_eps, num_splits, tf32)
    known = _OP.find(inputs)
    if known is None:
        n, _ = errors.check_streams("contract", "residual", residual)
        projection_op.check_parameters(
            "contract", residual, weight, norm_weight, norm_eps, num_splits, tf32, (n,)
        )
        check_gates("contract", scale, bias, 1, n, ("residual", residual))
        errors.check_number("contract", "pre_eps", pre_eps)
    return _OP.call(inputs, known, grad_accumulator)[0]


def _cuda(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake(residual)
    if residual.numel() == 0:
        return outputs
    if num_splits is None and _reads_once(residual, backward=False):
        contract_cluster.forward(
            residual, weight, scale, bias, norm_weight, norm_eps, pre_eps, tf32, outputs
        )
    else:
        n, hidden_size = residual.shape[-2:]
        x = residual.view(-1, n * hidden_size)
        products, squares = projection_op.split_products(
            residual, weight, norm_weight, num_splits, tf32
        )
        given = dtypes(
            streams=residual.dtype,
            weight=weight.dtype,
            norm_weight=dtype_of(norm_weight),
            scale=scale.dtype,
            bias=bias.dtype,
        )
        out, mixes, inv_rms = outputs
        many_splits = selection.has_many_splits(products.shape[0])
        jit.kernel("contract_fwd", n, hidden_size, many_splits, *given)(
            products,
            squares,
            scale,
            bias.contiguous(),
            residual.view(-1, n, hidden_size),
            x,
            *projection_op.parameters(weight, norm_weight),
            out.view(-1, hidden_size),
            mixes.view(-1, n),
            inv_rms.view(-1),
            norm_eps,
            pre_eps,
            tf32,
        )
    return outputs


def _reads_once(residual: Tensor, backward: bool) -> bool:
    n, hidden_size = residual.shape[-2:]
    return selection.reads_once(residual.dtype, n, hidden_size, backward)


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    arguments = list(args)
    del arguments[-2]  # num_splits: the reference sums K at once
    return tuple(out.contiguous() for out in reference.contract_with_mixes(*arguments))


def _fake(residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    *lead, n, hidden_size = residual.shape
    return (
        residual.new_empty((*lead, hidden_size)),
        residual.new_empty((*lead, n), dtype=torch.float32),
        residual.new_empty(lead, dtype=torch.float32),
    )


def _backward_cuda(
    grad: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    tf32: bool,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, ...]:
    if residual.numel() and 0 not in into and _reads_once(residual, backward=True):
        return contract_cluster.backward(
            grad,
            residual,
            weight,
            scale,
            bias,
            norm_weight,
            mixes,
            inv_rms,
            pre_eps,
            tf32,
            into,
        )
    n, hidden_size = residual.shape[-2:]
    grad = grad.contiguous()
    gate = head_mix_op.launch(mixes, scale, bias, pre_eps)
    grad_gate = torch.empty_like(gate)
    if residual.numel():
        jit.kernel("aggregate_mix_bwd", n, hidden_size, *dtypes(streams=residual.dtype))(
            grad.view(-1, hidden_size), residual.view(-1, n, hidden_size), grad_gate.view(-1, n)
        )
    grad_mixes, grad_scale, grad_bias = head_mix_op.launch_backward(
        grad_gate, mixes, scale, bias, for_part(into, {2: 1, 3: 2})
    )
    grad_residual, grad_weight, grad_norm_weight = projection_op.launch_backward(
        grad_mixes,
        residual,
        weight,
        norm_weight,
        mixes,
        inv_rms,
        tf32,
        aggregated=(grad, gate),
        into=for_part(into, {0: 0, 1: 1, 4: 2}),
    )
    return grad_residual, grad_weight, grad_scale, grad_bias, grad_norm_weight


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    *grads, grad_norm_weight = reference.contract_backward(*args)
    if grad_norm_weight is None:
        grad_norm_weight = grads[1].new_empty(0)
    return *(grad.contiguous() for grad in grads), grad_norm_weight


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(*args[1:6])  # residual to norm_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, pre_eps, _, tf32 = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options = (pre_eps, tf32)


def _backward_arguments(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, *ctx.options


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _backward_arguments(ctx, *grads)
    result = _contract_backward(*arguments)
    grad_norm_weight = None if arguments[5] is None else result[4]
    return *result[:4], grad_norm_weight, *[None] * 4


_BACKWARD = (
    "contract_backward(Tensor grad, Tensor residual, Tensor weight, Tensor scale, Tensor bias, "
    "Tensor? norm_weight, Tensor mixes, Tensor inv_rms, float pre_eps, bool tf32) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_contract_backward = register(
    _BACKWARD,
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.contract_backward,
)
_contract = register(
    "contract(Tensor residual, Tensor weight, Tensor scale, Tensor bias, Tensor? norm_weight, "
    "float norm_eps, float pre_eps, int? num_splits, bool tf32) -> (Tensor, Tensor, Tensor)",
    cuda=_cuda,
    cpu=_cpu,
    fake=_fake,
    flops=_flops.projection_and_aggregate,
    backward=_backward,
    setup_context=_setup_context,
    hidden=(1, 2),
)
_OP = Op(
    name="contract",
    operator=_contract,
    save=_save,
    arguments=_backward_arguments,
    gradients=_contract_backward,
    tensors=5,
    backward=register_into(
        _BACKWARD,
        (0, 1, 2, 3, 4),
        cuda=_backward_cuda,
        cpu=_backward_cpu,
        fake=_backward_fake,
        flops=_flops.contract_backward,
    ),
    parameters={1: "weight", 2: "scale", 3: "bias", 4: "norm_weight"},
)
