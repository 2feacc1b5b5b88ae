"""Everything before a sub-layer: projection, mixes, Sinkhorn and aggregate in one op."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.kernels._shapes import is_no_eps
from tile_mhc.ops import _flops, _whole_pre
from tile_mhc.ops import delayed_pre as delayed_op
from tile_mhc.ops import gates as gates_op
from tile_mhc.ops import log_sinkhorn as log_sinkhorn_op
from tile_mhc.ops import mixes as mixes_op
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops import sinkhorn as sinkhorn_op
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    clear,
    for_part,
    gradient_buffers,
    register_into,
)
from tile_mhc.ops._group import active
from tile_mhc.ops._library import absent, dtype_of, dtypes, empty_gradients, filled, register
from tile_mhc.ops._op import Op
from tile_mhc.ops._passing import passing
from tile_mhc.ops.aggregate import check_mix
from tile_mhc.ops.delayed_pre import Norm

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tile_mhc.ops._options import PreOptions

# By themselves in this block, without which mypy misses what they belong to.
if TYPE_CHECKING:

    @overload
    def fused_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        pre_mix: None = None,
        passes_residual: Literal[False] = False,
        **options: Unpack[PreOptions],
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def fused_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        pre_mix: None = None,
        passes_residual: Literal[True],
        **options: Unpack[PreOptions],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    @overload
    def fused_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        pre_mix: Tensor,
        passes_residual: Literal[False] = False,
        **options: Unpack[PreOptions],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    @overload
    def fused_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        pre_mix: Tensor,
        passes_residual: Literal[True],
        **options: Unpack[PreOptions],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    @overload
    def fused_pre(
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        pre_mix: Tensor | None = None,
        passes_residual: bool = False,
        **options: Unpack[PreOptions],
    ) -> tuple[Tensor, ...]: ...


def fused_pre(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    pre_mix: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 1.0,
    sinkhorn_repeat: int = 10,
    layer_norm_weight: Tensor | None = None,
    layer_norm_eps: float = 1e-6,
    num_splits: int | None = None,
    tf32: bool = False,
    passes_residual: bool = False,
) -> tuple[Tensor, ...]:
    """Compute the layer input and the mixes of one sub-layer.

    mixes = projection(residual, weight);  pre_mix, post_mix, logits = split_mixes(mixes)
    layer_input = aggregate(residual, pre_mix);  comb_mix = sinkhorn(logits)

    With an explicit `num_splits` the outputs are the bits of the four ops one after another.
    Without, what hangs on the projection may differ in its last bits, as its sums are taken in
    another order: with a `pre_mix`, see `post_pre`; for up to 128 tokens (bfloat16, n = 4, H a
    multiple of 64), which have kernels of their own; and for many where clusters of CTAs hold them
    (bfloat16, n = 4, usual H up to 7168, no layer_norm_weight), which read the streams once.
    Not so in the batch-invariant mode. The gradient of the residual is rounded once for both
    its uses, where the four ops round it twice and autograd their sum.

    With `passes_residual` the residual is an output too, for the `post` of the sub-layer to read.
    The gradient that comes back for it is then added inside this op's backward, before the one
    rounding: a pass over three stream tensors less than when autograd adds it. Anything may read
    that output, or nothing; any other use of the residual itself stays right too.

    With a `pre_mix`, as in DeepSeek-V4.1, the layer input is aggregate(residual, pre_mix): what the
    sub-layer before has made. The pre_mix of split_mixes is then an output, for the sub-layer after
    (`post_pre` takes it; behind the last one `aggregate` does). The first sub-layer takes one that
    is 1 for stream 0 and 0 for the others.

    With a `layer_norm_weight`, for inference alone:

    layer_input = layer_input * rsqrt(mean(layer_input**2) + layer_norm_eps) * layer_norm_weight

    of the layer input as it was rounded, in the same launches.

    Gradients of parameters that carry `main_grad` go into that: see `tile_mhc.main_grad`.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        weight: (n*(n+2), n*H) float32 or bfloat16.
        scale: (3,) float32 or bfloat16.
        bias: (n*(n+2),) float32 or bfloat16.
        pre_mix: optional (..., n) or (..., n, 1) float32, the weights of the layer input.
        norm_weight: optional (n*H,) float32 or bfloat16, a learnable weight of the RMS norm.
        norm_eps: added to the mean square of the RMS norm (DeepSeek-V4.1 uses 1e-20).
        pre_eps: added to pre_mix.
        sinkhorn_eps: added to the softmax and the divisors of Sinkhorn; 0 as in `sinkhorn`, which
            takes two kernels more.
        post_mult: factor of post_mix (DeepSeek-V4 uses 2).
        sinkhorn_repeat: Sinkhorn steps, from 1 to 1024 (DeepSeek-V4 uses 20).
        layer_norm_weight: optional (H,) float32 or bfloat16, of an RMS norm of the layer input;
            not allowed when a gradient is needed.
        layer_norm_eps: added to the mean square of that norm.
        num_splits: as in `projection`.
        tf32: as in `projection`.
        passes_residual: whether to return the residual, too.

    Returns:
        layer_input (..., H), of the dtype of the residual; with a `pre_mix`, then the next one
        (..., n); post_mix (..., n) and comb_mix (..., n, n), all mixes float32; with
        `passes_residual`, then a view of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel, or a layer_norm_weight has no gradient.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.1; TileKernels `mhc_pre`, `mhc_pre_big_fuse`.
    """
    options = (
        norm_weight,
        norm_eps,
        pre_eps,
        sinkhorn_eps,
        post_mult,
        sinkhorn_repeat,
        num_splits,
        tf32,
    )
    passes = passes_residual is True
    if layer_norm_weight is not None:
        errors.check_bool("fused_pre", "passes_residual", passes_residual)
        norm = (layer_norm_weight, layer_norm_eps)
        outputs = _call_normed(residual, weight, scale, bias, pre_mix, *options, *norm)
        return (*outputs, residual.view_as(residual)) if passes else outputs
    if pre_mix is None:
        inputs: tuple[Any, ...] = (residual, weight, scale, bias, *options)
        op, plain = (_PASSING_OP, _passed) if passes else (_OP, None)
    else:
        inputs = (residual, weight, scale, bias, pre_mix, *options)
        op, plain = delayed_op.choose(passes)
    known = op.find(inputs) if type(passes_residual) is bool else None
    if known is None:
        errors.check_streams("fused_pre", "residual", residual)
        check_pre("fused_pre", residual, weight, scale, bias, pre_mix, *options)
        errors.check_bool("fused_pre", "passes_residual", passes_residual)
        errors.check_number("fused_pre", "layer_norm_eps", layer_norm_eps)
    outputs = op.call(inputs, known, plain=plain)
    return (*outputs[: op.visible], outputs[-1]) if passes else outputs[: op.visible]


def check_pre(
    op: str,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    num_splits: int | None,
    tf32: bool,
) -> None:
    """The inputs of a pre, but for the streams."""
    n = residual.shape[-2]
    rows = n * (n + 2)
    projection_op.check_parameters(
        op, residual, weight, norm_weight, norm_eps, num_splits, tf32, (rows,)
    )
    mixes_op.check_gates(op, scale, bias, 3, rows, ("residual", residual))
    if pre_mix is not None:
        check_mix(op, "pre_mix", pre_mix, ("residual", residual))
    sinkhorn_op.check_sinkhorn(op, sinkhorn_repeat, sinkhorn_eps, prefix="sinkhorn_")
    errors.check_number(op, "post_mult", post_mult)
    errors.check_number(op, "pre_eps", pre_eps)


def check_layer_norm(
    op: str, residual: Tensor, layer_norm_weight: object, inputs: Sequence[Any]
) -> None:
    """The weight of a norm of the layer input, and that none of `inputs` wants a gradient."""
    shapes, like = [residual.shape[-1:]], ("residual", residual)
    errors.check_tensor(op, "layer_norm_weight", layer_norm_weight, shapes, errors.PARAMETERS, like)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        refuse_gradient(op, layer_norm_weight)


def refuse_gradient(op: str, layer_norm_weight: object) -> None:
    raise errors.UnsupportedError(
        f"{op}: layer_norm_weight must be None when a gradient is needed; got "
        f"{errors.describe(layer_norm_weight)}, whose norm is for inference (torch.no_grad() "
        "allows it)"
    )


def launch(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    num_splits: int | None,
    tf32: bool,
    layer_norm: Norm | None = None,
) -> tuple[Tensor, ...]:
    outputs = empty(residual)
    if not residual.numel():
        return outputs
    gates = (residual, weight, scale, bias)
    steps = (norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat)
    of_all: list[Any] = [*gates, None, norm_weight, *steps, num_splits, tf32, outputs, layer_norm]
    if not _whole_pre.forward(*of_all):
        products, squares = projection_op.split_products(
            residual, weight, norm_weight, num_splits, tf32
        )
        given: list[Any] = [*gates, norm_weight, *steps, tf32, outputs, layer_norm]
        launch_from(products, squares, *given)
    return outputs


def launch_from(
    products: Tensor,
    squares: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool,
    outputs: Sequence[Tensor],
    layer_norm: Norm | None = None,
) -> None:
    """Write what the operator returns from the splits' products and sums of squares.

    The layer input is written as its norm makes it, where there is a `layer_norm`.
    """
    n, hidden_size = residual.shape[-2:]
    num_mixes, size = weight.shape
    given = dtypes(
        streams=residual.dtype,
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
        layer_norm=None if layer_norm is None else layer_norm[0].dtype,
    )
    layer_norm_weight, layer_norm_eps = layer_norm or (absent(residual), 0.0)
    layer_input, post_mix, comb_mix, mixes, inv_rms = outputs
    many_splits = selection.has_many_splits(products.shape[0])
    jit.kernel("fused_pre", n, hidden_size, many_splits, *given)(
        products,
        squares,
        scale.contiguous(),
        bias.contiguous(),
        residual.view(-1, n, hidden_size),
        residual.view(-1, size),
        *projection_op.parameters(weight, norm_weight),
        layer_input.view(-1, hidden_size),
        post_mix.view(-1, n),
        comb_mix.view(-1, n * n),
        mixes.view(-1, num_mixes),
        inv_rms.view(-1),
        layer_norm_weight.contiguous(),
        norm_eps,
        pre_eps,
        sinkhorn_eps,
        post_mult,
        layer_norm_eps,
        sinkhorn_repeat,
        tf32,
    )
    if is_no_eps(sinkhorn_eps):
        log_sinkhorn_op.launch_comb(mixes, scale, bias, comb_mix, sinkhorn_repeat)


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    arguments = list(args)
    del arguments[-2]  # num_splits: the reference sums K at once
    return tuple(out.contiguous() for out in reference.fused_pre_with_mixes(*arguments))


def empty(residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    *lead, n, hidden_size = residual.shape
    sizes = ((n,), (n, n), (n * (n + 2),), ())
    mixes = (residual.new_empty((*lead, *size), dtype=torch.float32) for size in sizes)
    return residual.new_empty((*lead, hidden_size)), *mixes


def launch_backward(
    grad_input: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool,
    accumulated: Tensor | None,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, ...]:
    n, hidden_size = residual.shape[-2:]
    grads = gradient_buffers(into, residual, weight, scale, bias, norm_weight)
    grad_residual, grad_weight, grad_scale, grad_bias, grad_norm_weight = grads
    if residual.numel() == 0:
        clear(into, dict(enumerate(grads)))
        return grads
    grad_input = grad_input.contiguous().view(-1, hidden_size)
    # Before the kernels that read the weight beside the one before them.
    weight, norm_weight = projection_op.contiguous(weight, norm_weight)
    accumulated = None if accumulated is None else accumulated.contiguous()
    partials, by_token = gates_op.launch_backward(
        gates_op.Aggregated(grad_input, residual),
        grad_post,
        grad_comb,
        mixes,
        inv_rms,
        scale,
        bias,
        weight.shape[1],
        (pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat),
        tf32,
    )
    projection_op.launch_matmuls(
        *by_token,
        residual,
        weight,
        norm_weight,
        tf32,
        n,
        grad_input,
        accumulated,
        (grad_residual, grad_weight, grad_norm_weight),
        for_part(into, {1: 1, 4: 2}),
    )
    to_sums = for_part(into, {2: 1, 3: 2})
    mixes_op.launch_sums(partials, grad_scale, grad_bias, to_sums, beside=True)
    return grads


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    *grads, grad_norm_weight = reference.fused_pre_backward(*args)
    if grad_norm_weight is None:
        grad_norm_weight = grads[1].new_empty(0)
    return *(grad.contiguous() for grad in grads), grad_norm_weight


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(*args[3:8])  # residual to norm_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[3:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    residual, weight, scale, bias, norm_weight, _, *options, _, tf32 = inputs
    saved = (residual, weight, scale, bias, norm_weight, *output[3:5])
    ctx.options = (*options, tf32)
    if torch.compiler.is_compiling() or active.group is None:
        ctx.save_for_backward(*saved)
    else:
        active.group.after_fused_pre(ctx, saved, output[0], options[0])


def _backward_arguments(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors or ctx.kept.take()
    return *grads[:3], *saved, *ctx.options, None


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(_backward_arguments(ctx, *grads))


def _gradients(arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    result = _fused_pre_backward(*arguments)
    grad_norm_weight = None if arguments[7] is None else result[4]
    return *result[:4], grad_norm_weight, *[None] * 7


_BACKWARD = (
    "fused_pre_backward(Tensor grad_input, Tensor grad_post, Tensor grad_comb, Tensor residual, "
    "Tensor weight, Tensor scale, Tensor bias, Tensor? norm_weight, Tensor mixes, "
    "Tensor inv_rms, float pre_eps, float sinkhorn_eps, float post_mult, int sinkhorn_repeat, "
    "bool tf32, Tensor? accumulated) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_fused_pre_backward = register(
    _BACKWARD,
    cuda=launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.fused_pre_backward,
)
_fused_pre = register(
    "fused_pre(Tensor residual, Tensor weight, Tensor scale, Tensor bias, Tensor? norm_weight, "
    "float norm_eps, float pre_eps, float sinkhorn_eps, float post_mult, int sinkhorn_repeat, "
    "int? num_splits, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cuda=launch,
    cpu=_cpu,
    fake=empty,
    flops=_flops.projection_and_aggregate,
    backward=_backward,
    setup_context=_setup_context,
    hidden=(3, 4),
)


def _passing_arguments(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients that autograd left out are zeros; that of the residual joins what it has."""
    saved = ctx.saved_tensors or ctx.kept.take()  # once: checkpointing unpacks it only once
    given: Sequence[Tensor | None] = grads[:3]
    if grads[0] is None or grads[1] is None or grads[2] is None:
        given = filled(given, empty, saved[0])
    return *given, *saved, *ctx.options, grads[-1]


_passed = passing(_fused_pre, 3, _save, _passing_arguments, _gradients)
_backward_into = register_into(
    _BACKWARD,
    (1, 2, 3, 4),
    cuda=launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.fused_pre_backward,
)
_PARAMETERS = {1: "weight", 2: "scale", 3: "bias", 4: "norm_weight"}
_OP = Op(
    name="fused_pre",
    operator=_fused_pre,
    save=_save,
    arguments=_backward_arguments,
    gradients=_fused_pre_backward,
    tensors=5,
    backward=_backward_into,
    visible=3,
    parameters=_PARAMETERS,
)
_PASSING_OP = dataclasses.replace(_OP, arguments=_passing_arguments, passes=True)


def _call_normed(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    norm_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """`fused_pre` with a norm of the layer input, whose weight and eps are the last options."""
    *steps, num_splits, tf32, layer_norm_weight, layer_norm_eps = options
    tensors = (residual, weight, scale, bias, pre_mix, norm_weight, layer_norm_weight)
    inputs = (*tensors, *steps, layer_norm_eps, num_splits, tf32)
    # A gradient is refused, which is looked at in each call that may have one.
    known = None if torch.is_grad_enabled() else _NORMED_OP.find(inputs)
    if known is None:
        errors.check_streams("fused_pre", "residual", residual)
        of_pre: tuple[Any, ...] = (*tensors[:6], *steps, num_splits, tf32)
        check_pre("fused_pre", *of_pre)
        errors.check_number("fused_pre", "layer_norm_eps", layer_norm_eps)
        check_layer_norm("fused_pre", residual, layer_norm_weight, tensors)
    layer_input, next_pre, *mixes = _NORMED_OP.call(inputs, known)
    given = () if pre_mix is None else (next_pre,)
    return layer_input, *given, *mixes


def _launch_normed(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    norm_weight: Tensor | None,
    layer_norm_weight: Tensor,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    layer_norm_eps: float,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, ...]:
    gates: list[Any] = [residual, weight, scale, bias]
    options: list[Any] = [norm_weight, norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat]
    options += [num_splits, tf32, (layer_norm_weight, layer_norm_eps)]
    if pre_mix is None:
        given = [*gates, *options]
        layer_input, *mixes = launch(*given)
        mixes.insert(0, delayed_op.no_mix(residual))
    else:
        given = [*gates, pre_mix, *options]
        layer_input, *mixes = delayed_op.launch(*given)
    return layer_input, *mixes[:3]


def _normed_cpu(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    norm_weight: Tensor | None,
    layer_norm_weight: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    names = ("norm_eps", "pre_eps", "sinkhorn_eps", "post_mult", "sinkhorn_repeat")
    *steps, _, tf32 = options  # not num_splits: the reference sums K at once
    layer_input, *mixes = reference.fused_pre(
        residual,
        weight,
        scale,
        bias,
        pre_mix=pre_mix,
        norm_weight=norm_weight,
        layer_norm_weight=layer_norm_weight,
        tf32=tf32,
        **dict(zip((*names, "layer_norm_eps"), steps, strict=True)),
    )
    if pre_mix is None:
        mixes.insert(0, delayed_op.no_mix(residual))
    return tuple(out.contiguous() for out in (layer_input, *mixes))


def _normed_fake(residual: Tensor, *others: Any) -> tuple[Tensor, ...]:
    layer_input, next_pre, *mixes = delayed_op.empty(residual)
    if others[3] is None:
        next_pre = delayed_op.no_mix(residual)
    return layer_input, next_pre, *mixes[:2]


def _refuse_normed(_: Any, inputs: Sequence[Any], *__: Any) -> None:
    """The operator's `setup_context`: behind it nothing of a gradient is called."""
    refuse_gradient("fused_pre", inputs[6])


_NORMED_OP = Op(
    name="fused_pre",
    operator=register(
        "normed_pre(Tensor residual, Tensor weight, Tensor scale, Tensor bias, Tensor? pre_mix, "
        "Tensor? norm_weight, Tensor layer_norm_weight, float norm_eps, float pre_eps, "
        "float sinkhorn_eps, float post_mult, int sinkhorn_repeat, float layer_norm_eps, "
        "int? num_splits, bool tf32) -> (Tensor, Tensor, Tensor, Tensor)",
        cuda=_launch_normed,
        cpu=_normed_cpu,
        fake=_normed_fake,
        flops=_flops.projection_and_aggregate,
        backward=_refuse_normed,
        setup_context=_refuse_normed,
    ),
    save=_refuse_normed,
    arguments=_refuse_normed,  # type: ignore[arg-type]
    gradients=_fused_pre_backward,
    tensors=7,
    visible=4,
)
