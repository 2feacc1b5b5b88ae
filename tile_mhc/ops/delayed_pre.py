"""`fused_pre` with a pre_mix: the collapse does not wait for the projection of the same streams."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tile_mhc import jit, reference, selection
from tile_mhc.kernels._shapes import DELAYED_COLUMNS, is_no_eps
from tile_mhc.ops import _flops, _whole_pre
from tile_mhc.ops import aggregate as aggregate_op
from tile_mhc.ops import gates as gates_op
from tile_mhc.ops import log_sinkhorn as log_sinkhorn_op
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
from tile_mhc.ops._group import active
from tile_mhc.ops._library import (
    absent,
    dtype_of,
    dtypes,
    empty_gradients,
    filled,
    register,
)
from tile_mhc.ops._op import Op
from tile_mhc.ops._passing import passing

# The weight and eps of an RMS norm of the layer input.
Norm = tuple[Tensor, float]
# Of the operator's inputs: what has a gradient comes first.
GRADIENTS = 6


def choose(passes_residual: bool) -> tuple[Op, Callable[..., Any] | None]:
    """How `fused_pre` with a pre_mix, which is the fifth of its inputs, is called; see `call`."""
    return (_PASSING_OP, _passed) if passes_residual else (_OP, None)


def launch(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor,
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
    n, hidden_size = residual.shape[-2:]
    gates = (residual, weight, scale, bias)
    steps = (norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat)
    of_all: list[Any] = [
        *gates,
        pre_mix,
        norm_weight,
        *steps,
        num_splits,
        tf32,
        outputs,
        layer_norm,
    ]
    if residual.numel() and not _whole_pre.forward(*of_all):
        normed = None
        if selection.is_one_pass(residual.dtype, n, hidden_size, num_splits):
            products, squares = _launch_pass(
                residual, weight, pre_mix, norm_weight, tf32, outputs[0]
            )
            normed = None if layer_norm is None else (outputs[0], *layer_norm)
        else:
            products, squares = projection_op.split_products(
                residual, weight, norm_weight, num_splits, tf32
            )
            # Right behind the projection, which has left the first tokens in L2.
            aggregate_op.launch(residual, pre_mix, outputs[0])
            if layer_norm is not None:
                _launch_norm(outputs[0], *layer_norm)
        of_mixes = (*gates, norm_weight, *steps, tf32, outputs[1:], normed)
        launch_mixes(products, squares, *of_mixes)
    return outputs


def _launch_norm(layer_input: Tensor, weight: Tensor, eps: float) -> None:
    """In place."""
    hidden_size = layer_input.shape[-1]
    given = dtypes(streams=layer_input.dtype, layer_norm=weight.dtype)
    jit.kernel("input_norm", hidden_size, *given)(
        layer_input.view(-1, hidden_size), weight.contiguous(), eps
    )


def _launch_pass(
    residual: Tensor,
    weight: Tensor,
    pre_mix: Tensor,
    norm_weight: Tensor | None,
    tf32: bool,
    layer_input: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the layer input, and return the products and squares as `split_products` does."""
    n, hidden_size = residual.shape[-2:]
    of_weight, splits, given = prepare_weight(residual, weight, norm_weight, tf32)
    products, squares, block = prepare_pass(residual, weight)
    jit.kernel("delayed_pre_fwd", hidden_size, splits, *given)(
        residual.view(-1, weight.shape[1]),
        pre_mix.contiguous().view(-1, n),
        *of_weight,
        layer_input.view(-1, hidden_size),
        products,
        squares,
        block,
        tf32,
    )
    return products, squares


def prepare_weight(
    residual: Tensor, weight: Tensor, norm_weight: Tensor | None, tf32: bool
) -> tuple[tuple[Tensor, Tensor], bool, tuple[str, ...]]:
    """The weight and norm weight that a pass reads, whether it splits them, and their dtypes."""
    num_mixes, size = weight.shape
    of_weight = projection_op.parameters(weight, norm_weight)
    given = dtypes(weight=weight.dtype, norm_weight=dtype_of(norm_weight))
    if selection.splits_weight(residual.numel() // size):
        return of_weight, True, given
    parts = weight.new_empty(2 * num_mixes, size, dtype=torch.bfloat16)
    jit.kernel("weight_parts", num_mixes, size, *given)(*of_weight, parts, tf32)
    return (parts, absent(parts)), False, ()


def prepare_pass(residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Room for the products and squares of splits of H, and the steps of a split."""
    num_mixes, size = weight.shape
    num_tokens, hidden_size = residual.numel() // size, residual.shape[-1]
    block = selection.delayed_blocks_per_split(num_tokens, hidden_size)
    splits = -(-hidden_size // (block * DELAYED_COLUMNS))
    products = weight.new_empty(splits, num_tokens, num_mixes, dtype=torch.float32)
    return products, weight.new_empty(splits, num_tokens, dtype=torch.float32), block


def launch_mixes(
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
    normed: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Write pre_mix, post_mix, comb_mix, mixes and inv_rms from the splits' products.

    And the norm of the layer input in place, of which `normed` has that, its weight and eps.
    """
    n, hidden_size = residual.shape[-2:]
    num_mixes, size = weight.shape
    given = dtypes(
        streams=residual.dtype,
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
        layer_norm=None if normed is None else normed[1].dtype,
    )
    layer_norm_eps = 0.0
    to_norm = absent(residual, residual.dtype), absent(residual)
    if normed is not None:
        layer_input, layer_norm_weight, layer_norm_eps = normed
        to_norm = layer_input.view(-1, hidden_size), layer_norm_weight.contiguous()
    next_pre, post_mix, comb_mix, mixes, inv_rms = outputs
    many_splits = selection.has_many_splits(products.shape[0])
    jit.kernel("delayed_mixes", n, hidden_size, many_splits, *given)(
        products,
        squares,
        scale.contiguous(),
        bias.contiguous(),
        residual.view(-1, size),
        *projection_op.parameters(weight, norm_weight),
        next_pre.view(-1, n),
        post_mix.view(-1, n),
        comb_mix.view(-1, n * n),
        mixes.view(-1, num_mixes),
        inv_rms.view(-1),
        *to_norm,
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
    return tuple(out.contiguous() for out in reference.delayed_pre_with_mixes(*arguments))


def empty(residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    *lead, n, hidden_size = residual.shape
    sizes = ((n,), (n,), (n, n), (n * (n + 2),), ())
    mixes = (residual.new_empty((*lead, *size), dtype=torch.float32) for size in sizes)
    return residual.new_empty((*lead, hidden_size)), *mixes


def no_mix(like: Tensor) -> Tensor:
    """What operators return as the next pre_mix where they were given none."""
    return like.new_empty(0, dtype=torch.float32)


def launch_backward(
    grad_input: Tensor,
    grad_next: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool,
    wants_pre: bool,
    accumulated: Tensor | None,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, ...]:
    """Gradients of the first inputs; without `wants_pre` that of pre_mix has no element."""
    n, hidden_size = residual.shape[-2:]
    grads = _room(into, residual, weight, scale, bias, pre_mix, norm_weight, wants_pre)
    grad_residual, grad_weight, grad_scale, grad_bias, grad_pre_mix, grad_norm_weight = grads
    if residual.numel() == 0:
        clear(into, dict(enumerate(grads)))
        return grads
    # Before the kernels that read the weight beside the one before them.
    weight, norm_weight = projection_op.contiguous(weight, norm_weight)
    accumulated = None if accumulated is None else accumulated.contiguous()
    grad_input = grad_input.contiguous().view(-1, hidden_size)
    gate_partials, by_token = gates_op.launch_backward(
        gates_op.Delayed(grad_next, pre_mix),
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
    of_gates = (gate_partials, grad_scale, grad_bias, for_part(into, {2: 1, 3: 2}))
    to_matmuls = for_part(into, {1: 1, 5: 2})
    if selection.is_one_pass(residual.dtype, n, hidden_size, None):
        # Whether or not the gradient of pre_mix is wanted: the others have the same bits.
        num_tokens, size = grad_input.shape[0], n * hidden_size
        alone = accumulated is None
        # As each kernel is built.
        shape = (-1, size) if alone else (-1, n, hidden_size)
        if alone:
            slice_tokens = projection_op.backward_slice(num_tokens, weight, n, has_sums=True)
        else:
            slice_tokens = pass_slice(num_tokens, weight, hidden_size)
        sums, partials = backward_room(
            grad_input, n, slice_tokens, norm_weight, grad_weight, to_matmuls
        )
        given = dtypes(
            weight=weight.dtype, norm_weight=dtype_of(norm_weight), held=dtype_of(accumulated)
        )
        if alone:
            kernel = jit.kernel("delayed_pre_bwd", hidden_size, *given)
        else:
            kernel = jit.kernel("delayed_pre_add_bwd", hidden_size, *given)
        kernel(
            *by_token,
            residual.view(shape),
            *projection_op.parameters(weight, norm_weight),
            grad_input,
            *(() if accumulated is None else (accumulated.view(shape),)),
            grad_residual.view(shape),
            sums,
            grad_weight.unsqueeze(0) if partials is None else partials,
            slice_tokens,
            tf32,
        )
        # By the same kernel where nobody asks for the first.
        grad_pre = grad_pre_mix.view(-1, n) if wants_pre else sums.new_empty(num_tokens, n)
        if partials is not None:
            grads_of_matmuls = (grad_residual, grad_weight, grad_norm_weight)
            projection_op.sum_partials(partials, weight, norm_weight, grads_of_matmuls, to_matmuls)
        launch_sums(sums, grad_pre, *of_gates, beside=partials is not None)
        return grads
    mixes_op.launch_sums(*of_gates)
    if wants_pre:
        jit.kernel("aggregate_mix_bwd", n, hidden_size, *dtypes(streams=residual.dtype))(
            grad_input, residual.view(-1, n, hidden_size), grad_pre_mix.view(-1, n)
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
        to_matmuls,
    )
    return grads


def pass_slice(num_tokens: int, weight: Tensor, hidden_size: int) -> int:
    """Tokens that a CTA of a backward pass over columns of all streams takes."""
    num_mixes, size = weight.shape
    columns = size // hidden_size * DELAYED_COLUMNS
    start = selection.DELAYED_START_TILES
    return selection.backward_slice(num_tokens, size, num_mixes, columns, start)


def backward_room(
    grad_input: Tensor,
    sums_of: int,
    slice_tokens: int,
    norm_weight: Tensor | None,
    grad_weight: Tensor,
    into: Destinations,
) -> tuple[Tensor, Tensor | None]:
    """Room for `sums_of` sums a token by columns, and for those of the weight by slices of tokens,
    if they are not the gradient itself."""
    num_tokens, hidden_size = grad_input.shape
    blocks = hidden_size // DELAYED_COLUMNS
    sums = grad_weight.new_empty(blocks, num_tokens, sums_of, dtype=torch.float32)
    slices = -(-num_tokens // slice_tokens)
    return sums, projection_op.partial_sums(slices, grad_weight, norm_weight, into)


def launch_sums(
    sums: Tensor,
    grad_pre: Tensor,
    partials: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
    into: Destinations,
    others: Sequence[Tensor] = (),
    *,
    beside: bool,
) -> None:
    """Write the gradients by token: that of pre_mix, behind those of comb_mix and post_mix.

    And in the same launch what `mixes_op.launch_sums` does; `beside` as there, of the pass that has
    made the sums.
    """
    grad_comb, grad_post = others or (absent(sums), absent(sums))
    blocks, _, num_sums = sums.shape
    directed = 1 in into or 2 in into
    given = mixes_op.gate_dtypes(grad_scale, grad_bias)
    jit.kernel("delayed_sums", num_sums, blocks * DELAYED_COLUMNS, directed, *given)(
        sums,
        grad_comb,
        grad_post,
        grad_pre,
        partials,
        grad_bias,
        grad_scale,
        adds(into, 2),
        adds(into, 1),
        beside,
    )


def _room(into: Destinations, *inputs: Any) -> tuple[Tensor, ...]:
    """As `gradient_buffers`, but for a gradient of pre_mix that nobody wants."""
    *tensors, wants_pre = inputs
    if not wants_pre:
        tensors[4] = tensors[4].new_empty(0)
    return gradient_buffers(into, *tensors)


def _backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    arguments = list(args)
    wants_pre = arguments.pop(-2)
    *grads, grad_norm_weight = reference.delayed_pre_backward(*arguments)
    if not wants_pre:
        grads[4] = grads[4].new_empty(0)
    if grad_norm_weight is None:
        grad_norm_weight = grads[-1].new_empty(0)
    return *(grad.contiguous() for grad in grads), grad_norm_weight


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors = list(args[4:10])  # residual to norm_weight
    if not args[-2]:
        tensors[4] = tensors[4].new_empty(0)
    return empty_gradients(*tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[4:6])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *options, _, tf32 = inputs[GRADIENTS:]
    saved = (*inputs[:GRADIENTS], *output[4:6])
    ctx.options = (*options, tf32, inputs[4].requires_grad)
    ctx.set_materialize_grads(False)
    if torch.compiler.is_compiling() or active.group is None:
        ctx.save_for_backward(*saved)
    else:
        active.group.after_delayed_pre(ctx, saved, output[0])


def _backward_arguments(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Gradients that autograd left out are zeros; that of the residual joins what it has."""
    saved = ctx.saved_tensors or ctx.kept.take()  # once: checkpointing unpacks it only once
    passed = grads[-1] if len(grads) in (5, 7) else None
    return *filled(grads[:4], empty, saved[0]), *saved, *ctx.options, passed


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward_arguments(ctx, *grads))


def _gradients(arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = list(_delayed_pre_backward(*arguments))
    if not arguments[-2]:
        result[4] = None
    if arguments[9] is None:
        result[5] = None
    return *result, *[None] * 7


_BACKWARD = (
    "delayed_pre_backward(Tensor grad_input, Tensor grad_next, Tensor grad_post, "
    "Tensor grad_comb, Tensor residual, Tensor weight, Tensor scale, Tensor bias, Tensor pre_mix, "
    "Tensor? norm_weight, Tensor mixes, Tensor inv_rms, float pre_eps, float sinkhorn_eps, "
    "float post_mult, int sinkhorn_repeat, bool tf32, bool wants_pre, Tensor? accumulated) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_delayed_pre_backward = register(
    _BACKWARD,
    cuda=launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.delayed_pre_backward,
)
_delayed_pre = register(
    "delayed_pre(Tensor residual, Tensor weight, Tensor scale, Tensor bias, Tensor pre_mix, "
    "Tensor? norm_weight, float norm_eps, float pre_eps, float sinkhorn_eps, float post_mult, "
    "int sinkhorn_repeat, int? num_splits, bool tf32) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cuda=launch,
    cpu=_cpu,
    fake=empty,
    flops=_flops.projection_and_aggregate,
    backward=_backward,
    setup_context=_setup_context,
    hidden=(4, 5),
)


_passed = passing(_delayed_pre, 4, _save, _backward_arguments, _gradients)
_backward_into = register_into(
    _BACKWARD,
    (1, 2, 3, 5),
    cuda=launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.delayed_pre_backward,
)
_PARAMETERS = {1: "weight", 2: "scale", 3: "bias", 5: "norm_weight"}
_OP = Op(
    name="fused_pre",
    operator=_delayed_pre,
    save=_save,
    gradients=_delayed_pre_backward,
    tensors=GRADIENTS,
    arguments=_backward_arguments,
    backward=_backward_into,
    visible=4,
    parameters=_PARAMETERS,
)
_PASSING_OP = dataclasses.replace(_OP, passes=True)
