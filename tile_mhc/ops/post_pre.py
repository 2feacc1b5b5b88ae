"""The boundary between two sub-layers: the post of one and all that is before the next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.ops import _flops, _whole_pre
from tile_mhc.ops import delayed_pre as delayed_op
from tile_mhc.ops import fused_pre as fused_op
from tile_mhc.ops import gates as gates_op
from tile_mhc.ops import post as post_op
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    for_part,
    gradient_buffers,
    register_into,
)
from tile_mhc.ops._group import active
from tile_mhc.ops._library import (
    absent,
    dtype_of,
    dtypes,
    empty_gradients,
    empty_like,
    filled,
    register,
)
from tile_mhc.ops._op import Op

OP = "post_pre"
# Of the operator's inputs: what has a gradient comes first.
GRADIENTS = 10
# Positions of gradients here and in the halves that the backward is made of.
OF_POST = {1: 1}
OF_FUSED_PRE = {4: 1, 5: 2, 6: 3, 9: 4}
OF_DELAYED_PRE = {4: 1, 5: 2, 6: 3, 9: 5}

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tile_mhc.ops._options import PostPreOptions

# By themselves in this block, without which mypy misses what they belong to.
if TYPE_CHECKING:

    @overload
    def post_pre(
        layer_output: Tensor,
        residual: Tensor,
        post_mix: Tensor,
        comb_mix: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        pre_mix: None = None,
        **options: Unpack[PostPreOptions],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    @overload
    def post_pre(
        layer_output: Tensor,
        residual: Tensor,
        post_mix: Tensor,
        comb_mix: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        pre_mix: Tensor,
        **options: Unpack[PostPreOptions],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...


def post_pre(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    pre_mix: Tensor | None = None,
    layer_bias: Tensor | None = None,
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
    grad_accumulator: GradAccumulator | None = None,
) -> tuple[Tensor, ...]:
    """Write a sub-layer's output into the streams, and read from them what the next one needs.

    streams = post(layer_output, residual, post_mix, comb_mix, bias=layer_bias)
    layer_input, post_mix, comb_mix = fused_pre(streams, weight, scale, bias)

    With a `pre_mix`, as in DeepSeek-V4.1:

    layer_input, pre_mix, post_mix, comb_mix = fused_pre(streams, weight, scale, bias,
                                                         pre_mix=pre_mix)

    and with a `layer_norm_weight`, for inference alone:

    layer_input = layer_input * rsqrt(mean(layer_input**2) + layer_norm_eps) * layer_norm_weight

    The streams are rounded to their dtype once, and projected and collapsed as they were rounded;
    so is the layer input before its norm. The gradient of the streams is for all their uses, this
    op's and later ones', and is rounded at most once on its way to those of residual and
    layer_output.

    With an explicit `num_splits` the outputs are the bits of the separate ops. Without, so are the
    streams, and with a `pre_mix` the layer input; what hangs on the projection may differ in its
    last bits where one pass over the streams makes and projects them (bfloat16, n = 4, H a multiple
    of 64, no layer_bias), which sums by columns of all streams at once. Up to 128 tokens have
    kernels of their own for that, but in the batch-invariant mode. Without a `pre_mix` many tokens
    of the usual H from 2560 to 7168 take one pass for all, with the bits of `post` and then
    `fused_pre` in one pass; in the batch-invariant mode always two.

    Gradients of parameters that carry `main_grad` go into that: see `tile_mhc.main_grad`.

    Args:
        layer_output: (..., H), contiguous, of the dtype of the residual.
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        post_mix: (..., n) or (..., n, 1) float32, of the sub-layer that ends.
        comb_mix: (..., n, n) float32, index [in, out], of the sub-layer that ends.
        weight: (n*(n+2), n*H) float32 or bfloat16, as the other parameters of the sub-layer that
            begins.
        scale: (3,) float32 or bfloat16.
        bias: (n*(n+2),) float32 or bfloat16, of the gates.
        pre_mix: optional (..., n) or (..., n, 1) float32: the weights of the layer input, which the
            pre before has returned.
        layer_bias: optional (H,) float32 or bfloat16, the bias of the last linear map of the
            sub-layer that ends.
        norm_weight: optional (n*H,) float32 or bfloat16, a learnable weight of the RMS norm of the
            streams.
        norm_eps: added to the mean square of that norm (DeepSeek-V4.1 uses 1e-20).
        pre_eps: added to the new pre_mix.
        sinkhorn_eps: as in `fused_pre`.
        post_mult: factor of the new post_mix (DeepSeek-V4 uses 2).
        sinkhorn_repeat: Sinkhorn steps, from 1 to 1024 (DeepSeek-V4 uses 20).
        layer_norm_weight: optional (H,) float32 or bfloat16, of an RMS norm of the layer input;
            not allowed when a gradient is needed.
        layer_norm_eps: added to the mean square of that norm.
        num_splits: as in `projection`.
        tf32: as in `projection`.
        grad_accumulator: gathers the gradient of the residual from all ops that get it.

    Returns:
        The streams (..., n, H) and layer_input (..., H), of the dtype of the residual; with a
        `pre_mix`, the next one (..., n); post_mix (..., n) and comb_mix (..., n, n), of the
        sub-layer that begins, all mixes float32.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n, H or the dtype has no kernel, or a layer_norm_weight has no gradient.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.1; that of DeepSeek-V4.1, vLLM's
    `mhc_fused_post_pre_delayed` and DeepGEMM's `mega_mhc`.
    """
    options = (norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat)
    inputs = (
        layer_output,
        residual,
        post_mix,
        comb_mix,
        weight,
        scale,
        bias,
        pre_mix,
        layer_bias,
        norm_weight,
        layer_norm_weight,
        *options,
        layer_norm_eps,
        num_splits,
        tf32,
    )
    # What is refused with a gradient is looked at in each call that may have one.
    looks = layer_norm_weight is not None and torch.is_grad_enabled()
    known = None if looks else _OP.find(inputs)
    if known is None:
        _check(inputs)
    streams, layer_input, next_pre, *mixes = _OP.call(inputs, known, grad_accumulator)
    given = () if pre_mix is None else (next_pre,)
    return streams, layer_input, *given, *mixes[:2]


def _check(inputs: tuple[Any, ...]) -> None:
    layer_output, residual, post_mix, comb_mix, *gates, layer_bias, norm_weight = inputs[:GRADIENTS]
    layer_norm_weight, *options, layer_norm_eps, num_splits, tf32 = inputs[GRADIENTS:]
    post_op.check_post(OP, layer_output, residual, post_mix, comb_mix, ("layer_bias", layer_bias))
    of_pre: tuple[Any, ...] = (residual, *gates, norm_weight, *options, num_splits, tf32)
    fused_op.check_pre(OP, *of_pre)
    errors.check_number(OP, "layer_norm_eps", layer_norm_eps)
    if layer_norm_weight is not None:
        fused_op.check_layer_norm(OP, residual, layer_norm_weight, inputs)


def _cuda(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    layer_bias: Tensor | None,
    norm_weight: Tensor | None,
    layer_norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    layer_norm_eps: float,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, ...]:
    steps = (norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat)
    streams = empty_like(residual)
    gates = (streams, weight, scale, bias)
    of_post = (layer_output, post_mix, comb_mix, streams)
    norm = None if layer_norm_weight is None else (layer_norm_weight, layer_norm_eps)
    n, hidden_size = residual.shape[-2:]
    one_pass = selection.is_one_pass(residual.dtype, n, hidden_size, num_splits)
    pre_op = fused_op if pre_mix is None else delayed_op
    if one_pass and layer_bias is None and residual.numel() > 0:
        outputs = pre_op.empty(residual)
        layer_input, *mixes = outputs
        of_gates = (residual, weight, scale, bias, pre_mix, norm_weight)
        given: list[Any] = [*of_gates, *steps, num_splits, tf32, outputs, norm, of_post]
        if not _whole_pre.forward(*given):
            sums = _launch_pass(
                layer_output,
                residual,
                post_mix,
                comb_mix,
                pre_mix,
                weight,
                norm_weight,
                tf32,
                streams,
                layer_input,
            )
            if pre_mix is None:
                given = [*sums, *gates, norm_weight, *steps, tf32, outputs, norm]
                fused_op.launch_from(*given)
            else:
                normed = None if norm is None else (layer_input, *norm)
                given = [*sums, *gates, norm_weight, *steps, tf32, mixes, normed]
                delayed_op.launch_mixes(*given)
    else:
        post_op.launch(layer_output, residual, post_mix, comb_mix, layer_bias, streams)
        own_mix = [] if pre_mix is None else [pre_mix]
        given = [*gates, *own_mix, norm_weight, *steps, num_splits, tf32, norm]
        layer_input, *mixes = pre_op.launch(*given)
    if pre_mix is None:
        mixes.insert(0, delayed_op.no_mix(residual))
    return streams, layer_input, *mixes


def _launch_pass(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    pre_mix: Tensor | None,
    weight: Tensor,
    norm_weight: Tensor | None,
    tf32: bool,
    streams: Tensor,
    layer_input: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the streams, and return the products and squares of their splits.

    With a pre_mix the layer input, too.
    """
    n, hidden_size = residual.shape[-2:]
    size = n * hidden_size
    of_weight, splits, given = delayed_op.prepare_weight(residual, weight, norm_weight, tf32)
    *sums, block = delayed_op.prepare_pass(residual, weight)
    of_post = (
        layer_output.view(-1, hidden_size),
        residual.view(-1, size),
        post_mix.contiguous().view(-1, n),
        comb_mix.contiguous().view(-1, n, n),
    )
    flat = streams.view(-1, size)
    if pre_mix is None:
        jit.kernel("post_project_fwd", hidden_size, splits, *given)(
            *of_post, *of_weight, flat, *sums, block, tf32
        )
    else:
        jit.kernel("post_pre_fwd", hidden_size, splits, *given)(
            *of_post,
            pre_mix.contiguous().view(-1, n),
            *of_weight,
            flat,
            layer_input.view(-1, hidden_size),
            *sums,
            block,
            tf32,
        )
    products, squares = sums
    return products, squares


def _cpu(*args: Any) -> tuple[Tensor, ...]:
    arguments = list(args)
    del arguments[-2]  # num_splits: the reference sums K at once
    outputs = list(reference.post_pre_with_mixes(*arguments))
    if outputs[2] is None:
        outputs[2] = delayed_op.no_mix(args[1])
    return tuple(out.contiguous() for out in outputs if out is not None)


def _fake(layer_output: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, ...]:
    layer_input, next_pre, *mixes = delayed_op.empty(residual)
    if others[5] is None:
        next_pre = delayed_op.no_mix(residual)
    return residual.new_empty(residual.shape), layer_input, next_pre, *mixes


def _backward_cuda(
    grad_streams: Tensor | None,
    grad_input: Tensor,
    grad_next: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    layer_bias: Tensor | None,
    norm_weight: Tensor | None,
    streams: Tensor,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool,
    wants_pre: bool,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, ...]:
    n, hidden_size = residual.shape[-2:]
    one_pass = selection.is_one_pass(residual.dtype, n, hidden_size, None)
    plain = layer_bias is None and 1 not in into and residual.numel() > 0
    if one_pass and plain:
        of_all = _launch_pass_backward(
            grad_streams,
            grad_input,
            (grad_next, grad_post, grad_comb),
            (layer_output, residual, post_mix, comb_mix, weight, scale, bias),
            pre_mix,
            norm_weight,
            streams,
            mixes,
            inv_rms,
            (pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat),
            tf32,
            into,
        )
        return of_all if wants_pre else (*of_all[:7], delayed_op.no_mix(residual), *of_all[8:])
    gates = [streams, weight, scale, bias]
    steps = (pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat, tf32)
    of_mixes = [grad_post, grad_comb]
    saved: list[Any] = [norm_weight, mixes, inv_rms, *steps]
    if pre_mix is None:
        given = [grad_input, *of_mixes, *gates, *saved, grad_streams, for_part(into, OF_FUSED_PRE)]
        grad, *parameters, grad_norm = fused_op.launch_backward(*given)
        grad_pre_mix = delayed_op.no_mix(residual)
    else:
        saved += [wants_pre, grad_streams, for_part(into, OF_DELAYED_PRE)]
        given = [grad_input, grad_next, *of_mixes, *gates, pre_mix, *saved]
        grad, *parameters, grad_pre_mix, grad_norm = delayed_op.launch_backward(*given)
    *grads, grad_layer_bias = post_op.launch_backward(
        grad,
        layer_output,
        residual,
        post_mix,
        comb_mix,
        layer_bias,
        into=for_part(into, OF_POST),
    )
    if norm_weight is None:
        grad_norm = delayed_op.no_mix(residual)
    return *grads, *parameters, grad_pre_mix, grad_layer_bias, grad_norm


def _launch_pass_backward(
    grad_streams: Tensor | None,
    grad_input: Tensor,
    grad_mixes: Sequence[Tensor],
    inputs: Sequence[Tensor],
    pre_mix: Tensor | None,
    norm_weight: Tensor | None,
    streams: Tensor,
    mixes: Tensor,
    inv_rms: Tensor,
    options: tuple[float, float, float, int],
    tf32: bool,
    into: Destinations,
) -> tuple[Tensor, ...]:
    """In one pass, which makes the streams again and does not round their gradient.

    Without a `pre_mix` behind another one over the streams, for the gradient of their own.
    """
    grads = gradient_buffers(into, *inputs, pre_mix, None, norm_weight)
    grad_output, grad_residual, grad_post, grad_comb, grad_weight, *grad_gates = grads[:7]
    layer_output, residual, post_mix, comb_mix, weight, *gates = inputs
    n, hidden_size = residual.shape[-2:]
    size = n * hidden_size
    # Before the kernels that read the weight beside the one before them.
    weight, norm_weight = projection_op.contiguous(weight, norm_weight)
    grad_input = grad_input.contiguous().view(-1, hidden_size)
    grad_next, *of_mixes = grad_mixes
    pre: gates_op.Aggregated | gates_op.Delayed
    if pre_mix is None:
        pre = gates_op.Aggregated(grad_input, streams)
        grad_pre = mixes.new_empty(mixes.numel() // (n * (n + 2)), n)
    else:
        pre = gates_op.Delayed(grad_next, pre_mix)
        grad_pre = grads[7].view(-1, n)
    to_gates = for_part(into, {5: 1, 6: 2})
    of_gates: list[Any] = [*of_mixes, mixes, inv_rms, *gates, size, options, tf32]
    gate_partials, by_token = gates_op.launch_backward(pre, *of_gates)
    to_matmuls = for_part(into, {4: 1, 9: 2})
    slice_tokens = delayed_op.pass_slice(grad_input.shape[0], weight, hidden_size)
    sums, partials = delayed_op.backward_room(
        grad_input, n * (n + 2), slice_tokens, norm_weight, grad_weight, to_matmuls
    )
    given = dtypes(
        weight=weight.dtype, norm_weight=dtype_of(norm_weight), held=dtype_of(grad_streams)
    )
    jit.kernel("post_pre_bwd", hidden_size, *given)(
        *by_token,
        layer_output.view(-1, hidden_size),
        residual.view(-1, n, hidden_size),
        post_mix.contiguous().view(-1, n),
        comb_mix.contiguous().view(-1, n * n),
        *projection_op.parameters(weight, norm_weight),
        grad_input,
        absent(residual, residual.dtype)
        if grad_streams is None
        else grad_streams.contiguous().view(-1, n, hidden_size),
        grad_output.view(-1, hidden_size),
        grad_residual.view(-1, n, hidden_size),
        sums,
        grad_weight.unsqueeze(0) if partials is None else partials,
        slice_tokens,
        tf32,
    )
    of_mixes = [grad_comb.view(-1, n * n), grad_post.view(-1, n)]
    grad_scale, grad_bias = grad_gates
    if partials is not None:
        of_matmuls = (grad_residual, grad_weight, grads[9])
        projection_op.sum_partials(partials, weight, norm_weight, of_matmuls, to_matmuls)
    delayed_op.launch_sums(
        sums,
        grad_pre,
        gate_partials,
        grad_scale,
        grad_bias,
        to_gates,
        of_mixes,
        beside=partials is not None,
    )
    no_mix = delayed_op.no_mix(residual)
    of_pre = no_mix if pre_mix is None else grads[7]
    return *grads[:7], of_pre, no_mix, no_mix if norm_weight is None else grads[9]


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    *arguments, wants_pre = args
    grads = list(reference.post_pre_backward(*arguments))
    if not wants_pre:
        grads[7] = None
    no_mix = delayed_op.no_mix(args[6])
    return tuple(no_mix if grad is None else grad.contiguous() for grad in grads)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors = list(args[5:15])  # layer_output to norm_weight
    if not args[-1]:
        tensors[7] = None
    grads = list(empty_gradients(*tensors))
    for at in (7, 8, 9):
        if tensors[at] is None:
            grads[at] = delayed_op.no_mix(args[6])
    return tuple(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    # A pre_mix that is not given has no next one: a tensor without an element, or None.
    no_next = [output[2]] if inputs[7] is None and output[2] is not None else []
    ctx.mark_non_differentiable(*output[5:], *no_next)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if inputs[GRADIENTS] is not None:
        fused_op.refuse_gradient(OP, inputs[GRADIENTS])
    _, _, *options, _, _, tf32 = inputs[GRADIENTS:]
    pre_mix = inputs[7]
    saved = (*inputs[:GRADIENTS], output[0], *output[5:])
    ctx.options = (*options, tf32, pre_mix is not None and pre_mix.requires_grad)
    # A gradient of the streams that is not there is not read.
    ctx.set_materialize_grads(False)
    if torch.compiler.is_compiling() or active.group is None:
        ctx.save_for_backward(*saved)
    else:
        active.group.after_post_pre(ctx, saved, output[1], options[0])


def _backward_arguments(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients that autograd left out are zeros; that of the streams is left out."""
    saved = ctx.saved_tensors or ctx.kept.take()  # once: checkpointing unpacks it only once
    residual, pre_mix = saved[1], saved[7]
    given = list(grads[1:5])
    if pre_mix is None:
        given[1] = delayed_op.no_mix(residual)
    return grads[0], *filled(given, delayed_op.empty, residual), *saved, *ctx.options


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward_arguments(ctx, *grads))


def _gradients(arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = list(_post_pre_backward(*arguments))
    if not arguments[-1]:
        result[7] = None
    for at in (8, 9):
        if arguments[5 + at] is None:
            result[at] = None
    return *result, *[None] * 9


_BACKWARD = (
    "post_pre_backward(Tensor? grad_streams, Tensor grad_input, Tensor grad_next, "
    "Tensor grad_post, Tensor grad_comb, Tensor layer_output, Tensor residual, Tensor post_mix, "
    "Tensor comb_mix, Tensor weight, Tensor scale, Tensor bias, Tensor? pre_mix, "
    "Tensor? layer_bias, Tensor? norm_weight, Tensor streams, Tensor mixes, Tensor inv_rms, "
    "float pre_eps, float sinkhorn_eps, float post_mult, int sinkhorn_repeat, bool tf32, "
    "bool wants_pre) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)"
)
_post_pre_backward = register(
    _BACKWARD,
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.post_pre_backward,
)
_post_pre = register(
    "post_pre(Tensor layer_output, Tensor residual, Tensor post_mix, Tensor comb_mix, "
    "Tensor weight, Tensor scale, Tensor bias, Tensor? pre_mix, Tensor? layer_bias, "
    "Tensor? norm_weight, Tensor? layer_norm_weight, float norm_eps, float pre_eps, "
    "float sinkhorn_eps, float post_mult, int sinkhorn_repeat, float layer_norm_eps, "
    "int? num_splits, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cuda=_cuda,
    cpu=_cpu,
    fake=_fake,
    flops=_flops.post_pre,
    backward=_backward,
    setup_context=_setup_context,
    hidden=(5, 6),
)
_OP = Op(
    name=OP,
    operator=_post_pre,
    save=_save,
    gradients=_post_pre_backward,
    tensors=GRADIENTS + 1,
    arguments=_backward_arguments,
    backward=register_into(
        _BACKWARD,
        (1, 4, 5, 6, 9),
        cuda=_backward_cuda,
        cpu=_backward_cpu,
        fake=_backward_fake,
        flops=_flops.post_pre_backward,
    ),
    visible=5,
    residual=1,
    parameters={4: "weight", 5: "scale", 6: "bias", 9: "norm_weight"},
)
