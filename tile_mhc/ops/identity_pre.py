"""Everything before a sub-layer whose streams are not mixed: projection, gates and aggregate.

One pass over bfloat16 streams where clusters of CTAs hold its tokens: where
`selection.identity_reads_once` says so, for the forward and the backward each; see
`identity_cluster`. Elsewhere two, the projection's and that of the aggregate; in the forward also
with a given `num_splits`, and in the backward for a gradient that goes into an accumulator.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.ops import _flops
from tile_mhc.ops import identity_cluster as cluster_op
from tile_mhc.ops import mixes as mixes_op
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    adds,
    clear,
    for_part,
    gradient_buffers,
    register_into,
)
from tile_mhc.ops._library import (
    dtype_of,
    dtypes,
    empty_gradients,
    filled,
    register,
    temporaries,
)
from tile_mhc.ops._op import Op
from tile_mhc.ops._passing import passing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tile_mhc.ops._options import IdentityPreOptions

# By themselves in this block, without which mypy misses what they belong to.
if TYPE_CHECKING:

    @overload
    def identity_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        passes_residual: Literal[False] = False,
        **options: Unpack[IdentityPreOptions],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def identity_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        passes_residual: Literal[True],
        **options: Unpack[IdentityPreOptions],
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def identity_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        passes_residual: bool = False,
        **options: Unpack[IdentityPreOptions],
    ) -> tuple[Tensor, ...]: ...


def identity_pre(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    post_eps: float = 1e-6,
    post_mult: float = 1.0,
    num_splits: int | None = None,
    tf32: bool = False,
    passes_residual: bool = False,
    grad_accumulator: GradAccumulator | None = None,
) -> tuple[Tensor, ...]:
    """Compute the layer input and the write weights of a sub-layer whose streams are not mixed.

    mixes = projection(residual, weight)
    z = mixes * (scale[0] for the first n, scale[1] for the next n) + bias
    pre_mix = sigmoid(z[:n]) + pre_eps;  post_mix = post_mult * sigmoid(z[n:]) + post_eps
    layer_input = aggregate(residual, pre_mix)

    On CUDA products are near fp32, as in `projection`, and sums in a fixed order; the gradient of
    the residual is rounded once for both its uses. Where a cluster of CTAs can hold a token
    (bfloat16, n = 4, the usual H up to 7168) the streams are read once, each way. Elsewhere, and
    with a `num_splits`, they are read twice in the forward: the mixes are then the bits of
    `projection`. The backward of wide H has clusters of 16 CTAs, and reads them twice where a GPU
    has fewer than 113 SMs and in the batch-invariant mode.

    With `passes_residual` the residual is an output too, for `identity_post` to read. The gradient
    that comes back for it, that of the streams which `identity_post` wrote, is then added inside
    this op's backward, before the one rounding. Anything may read that output, or nothing.

    Gradients of parameters that carry `main_grad` go into that: see `tile_mhc.main_grad`.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        weight: (2*n, n*H) float32 or bfloat16.
        scale: (2,) float32 or bfloat16.
        bias: (2*n,) float32 or bfloat16.
        norm_weight: optional (n*H,) float32 or bfloat16, a learnable weight of the RMS norm.
        norm_eps: added to the mean square of the RMS norm.
        pre_eps: added to pre_mix.
        post_eps: added to post_mix.
        post_mult: factor of post_mix (HY-V4: `hc_magnitude`).
        num_splits: as in `projection`, which then makes the mixes in a pass of its own; by default
            the streams are read once where they can be.
        tf32: as in `projection`.
        passes_residual: whether to return the residual, too.
        grad_accumulator: gathers the gradient of the residual from all ops that get it; not with
            `passes_residual`. The backward is then that of two passes: other last bits.

    Returns:
        layer_input (..., H), of the dtype of the residual; post_mix (..., n) float32; with
        `passes_residual`, then a view of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: HY-V4 of Tencent, transformers `HYV4HyperConnection`.
    """
    options = (norm_weight, norm_eps, pre_eps, post_eps, post_mult, num_splits, tf32)
    inputs: tuple[Any, ...] = (residual, weight, scale, bias, *options)
    passes = passes_residual is True
    op, plain = (_PASSING_OP, _passed) if passes else (_OP, None)
    known = op.find(inputs) if type(passes_residual) is bool else None
    if known is None:
        errors.check_streams("identity_pre", "residual", residual)
        _check(residual, weight, scale, bias, *options)
        errors.check_bool("identity_pre", "passes_residual", passes_residual)
    if passes and grad_accumulator is not None:
        raise errors.ShapeError(
            "identity_pre: grad_accumulator must be None with passes_residual, whose gradient this "
            f"op adds itself; got {errors.describe(grad_accumulator)}"
        )
    outputs = op.call(inputs, known, grad_accumulator, plain)
    return (*outputs[: op.visible], outputs[-1]) if passes else outputs[: op.visible]


def mixes_of(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """What the op makes its gates of, (..., 2*n) float32: the same bits, for who observes them."""
    inputs = (residual, weight, scale, bias, norm_weight, norm_eps, 0.0, 0.0, 1.0, None, False)
    errors.check_streams("identity_pre", "residual", residual)
    _check(*inputs)
    mixes: Tensor = _identity_pre(*inputs)[2]
    return mixes


def _check(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    post_eps: float,
    post_mult: float,
    num_splits: int | None,
    tf32: bool,
) -> None:
    """All but the streams."""
    rows = 2 * residual.shape[-2]
    projection_op.check_parameters(
        "identity_pre", residual, weight, norm_weight, norm_eps, num_splits, tf32, (rows,)
    )
    mixes_op.check_gates("identity_pre", scale, bias, 2, rows, ("residual", residual))
    errors.check_number("identity_pre", "pre_eps", pre_eps)
    errors.check_number("identity_pre", "post_eps", post_eps)
    errors.check_number("identity_pre", "post_mult", post_mult)


def _launch(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    post_eps: float,
    post_mult: float,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, ...]:
    outputs = _empty(residual)
    if residual.numel() == 0:
        return outputs
    n, hidden_size = residual.shape[-2:]
    if num_splits is None and selection.identity_reads_once(
        residual.dtype, n, hidden_size, backward=False
    ):
        cluster_op.forward(
            residual,
            weight,
            scale,
            bias,
            norm_weight,
            norm_eps,
            pre_eps,
            post_eps,
            post_mult,
            tf32,
            outputs,
        )
        return outputs
    layer_input, post_mix, mixes, inv_rms = outputs
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
    many_splits = selection.has_many_splits(products.shape[0])
    jit.kernel("identity_pre_fwd", n, hidden_size, many_splits, *given)(
        products,
        squares,
        scale.contiguous(),
        bias.contiguous(),
        residual.view(-1, n, hidden_size),
        x,
        *projection_op.parameters(weight, norm_weight),
        layer_input.view(-1, hidden_size),
        post_mix.view(-1, n),
        mixes.view(-1, 2 * n),
        inv_rms.view(-1),
        norm_eps,
        pre_eps,
        post_eps,
        post_mult,
        tf32,
    )
    return outputs


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    arguments = list(args)
    del arguments[-2]  # num_splits: the reference sums K at once
    return tuple(out.contiguous() for out in reference.identity_pre_with_mixes(*arguments))


def _empty(residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    *lead, n, hidden_size = residual.shape
    sizes = ((n,), (2 * n,), ())
    mixes = (residual.new_empty((*lead, *size), dtype=torch.float32) for size in sizes)
    return residual.new_empty((*lead, hidden_size)), *mixes


def _launch_backward(
    grad_input: Tensor,
    grad_post: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    post_mult: float,
    tf32: bool,
    accumulated: Tensor | None,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, ...]:
    n, hidden_size = residual.shape[-2:]
    held = accumulated is not None
    if (
        residual.numel()
        and 0 not in into
        and selection.identity_reads_once(residual.dtype, n, hidden_size, True, held)
        and selection.has_clusters_of(cluster_op.backward_size(n, hidden_size, held))
    ):
        return cluster_op.backward(
            grad_input,
            grad_post,
            residual,
            weight,
            scale,
            bias,
            norm_weight,
            mixes,
            inv_rms,
            pre_eps,
            post_mult,
            tf32,
            accumulated,
            into,
        )
    grads = gradient_buffers(into, residual, weight, scale, bias, norm_weight)
    grad_residual, grad_weight, grad_scale, grad_bias, grad_norm_weight = grads
    if residual.numel() == 0:
        clear(into, dict(enumerate(grads)))
        return grads
    grad_input = grad_input.contiguous().view(-1, hidden_size)
    mixes = mixes.view(-1, 2 * n)
    num_tokens = mixes.shape[0]
    # Before the kernels that read beside the one before them.
    weight, norm_weight = projection_op.contiguous(weight, norm_weight)
    accumulated = None if accumulated is None else accumulated.contiguous()
    grad_post, inv_rms = grad_post.contiguous().view(-1, n), inv_rms.view(-1)
    gates = (grad_post, mixes, inv_rms, scale.contiguous(), bias.contiguous())
    grad_pre, partials, parts, factors = temporaries(
        mixes,
        (num_tokens, n),
        (selection.partial_rows(num_tokens), 2 * n + 2),
        *projection_op.factor_shapes(num_tokens, 2 * n, n),
    )
    jit.kernel("aggregate_mix_first_bwd", n, hidden_size, *dtypes(streams=residual.dtype))(
        grad_input, residual.view(-1, n, hidden_size), grad_pre
    )
    grad_parts = parts.view(torch.bfloat16)
    jit.kernel("identity_gates_bwd", n, *mixes_op.gate_dtypes(scale, bias))(
        grad_pre,
        *gates,
        partials,
        grad_parts,
        factors,
        n * hidden_size,
        pre_eps,
        post_mult,
        tf32,
    )
    mixes_op.launch_sums(partials, grad_scale, grad_bias, for_part(into, {2: 1, 3: 2}))
    projection_op.launch_matmuls(
        grad_parts,
        factors,
        residual,
        weight,
        norm_weight,
        tf32,
        n,
        grad_input,
        grad_residual if adds(into, 0) else accumulated,
        (grad_residual, grad_weight, grad_norm_weight),
        for_part(into, {0: 0, 1: 1, 4: 2}),
    )
    return grads


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    *grads, grad_norm_weight = reference.identity_pre_backward(*args)
    if grad_norm_weight is None:
        grad_norm_weight = grads[1].new_empty(0)
    return *(grad.contiguous() for grad in grads), grad_norm_weight


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(*args[2:7])  # residual to norm_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[2:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, pre_eps, _, post_mult, _, tf32 = inputs
    ctx.save_for_backward(*tensors, *output[2:4])
    ctx.options = (pre_eps, post_mult, tf32)


def _backward_arguments(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return *grads[:2], *ctx.saved_tensors, *ctx.options, None


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(_backward_arguments(ctx, *grads))


def _gradients(arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    result = _identity_pre_backward(*arguments)
    grad_norm_weight = None if arguments[6] is None else result[4]
    return *result[:4], grad_norm_weight, *[None] * 6


_BACKWARD = (
    "identity_pre_backward(Tensor grad_input, Tensor grad_post, Tensor residual, Tensor weight, "
    "Tensor scale, Tensor bias, Tensor? norm_weight, Tensor mixes, Tensor inv_rms, float pre_eps, "
    "float post_mult, bool tf32, Tensor? accumulated) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_identity_pre_backward = register(
    _BACKWARD,
    cuda=_launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.identity_pre_backward,
)
_identity_pre = register(
    "identity_pre(Tensor residual, Tensor weight, Tensor scale, Tensor bias, Tensor? norm_weight, "
    "float norm_eps, float pre_eps, float post_eps, float post_mult, int? num_splits, bool tf32) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_launch,
    cpu=_cpu,
    fake=_empty,
    flops=_flops.projection_and_aggregate,
    backward=_backward,
    setup_context=_setup_context,
    hidden=(2, 3),
)


def _passing_arguments(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients that autograd left out are zeros; that of the residual joins what it has."""
    saved = ctx.saved_tensors  # once: checkpointing unpacks it only once
    return *filled(grads[:2], _empty, saved[0]), *saved, *ctx.options, grads[-1]


_passed = passing(_identity_pre, 2, _save, _passing_arguments, _gradients)
_backward_into = register_into(
    _BACKWARD,
    (0, 1, 2, 3, 4),
    cuda=_launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.identity_pre_backward,
)
_PARAMETERS = {1: "weight", 2: "scale", 3: "bias", 4: "norm_weight"}
_OP = Op(
    name="identity_pre",
    operator=_identity_pre,
    save=_save,
    arguments=_backward_arguments,
    gradients=_identity_pre_backward,
    tensors=5,
    backward=_backward_into,
    visible=2,
    parameters=_PARAMETERS,
)
_PASSING_OP = dataclasses.replace(_OP, arguments=_passing_arguments, passes=True)
