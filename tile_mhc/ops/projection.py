"""RMS statistic and (n*H) -> n*(n+2) matmul of the flattened streams."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import _device, errors, jit, reference, selection
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.kernels._shapes import (
    ANY_K,
    BLOCK_K,
    PIECE,
    backward_layout,
    factors_width,
    padded,
)
from tile_mhc.ops import _flops
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    adds,
    clear,
    destination_dtype,
    gradient_buffers,
    register_into,
)
from tile_mhc.ops._library import absent, dtype_of, dtypes, empty_gradients, register, temporaries
from tile_mhc.ops._op import Op


def projection(
    residual: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    num_splits: int | None = None,
    tf32: bool = False,
    grad_accumulator: GradAccumulator | None = None,
) -> Tensor:
    """Project the flattened streams onto the mixes, with an RMS norm folded in.

    mixes[t] = (x[t] @ (weight * norm_weight).T) * rsqrt(mean(x[t]**2) + norm_eps),  x (T, n*H)

    On CUDA the weight, and streams that are not bfloat16, are split into two bfloat16 parts, so
    that the product is near fp32 (about 1e-5 relative to float64, where TF32 gives 2e-4); sums over
    K are fp32, in a fixed order. Of float32 streams below 2**-117 the first part alone counts.

    Gradients of parameters that carry `main_grad` go into that: see `tile_mhc.main_grad`.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384. The fastest are bfloat16 and an H that is a multiple of 64.
        weight: (N, n*H) float32 or bfloat16; N is n*(n+2) for a block, n for the head.
        norm_weight: optional (n*H,) float32 or bfloat16, a learnable weight of the RMS norm.
        norm_eps: added to the mean square, inside the root.
        num_splits: the most slices of K to work on in parallel; by default as many as fill the
            GPU. The same number and shape give the same bits; `config.set_batch_invariant` makes
            them the same for any number of tokens.
        tf32: round the weight, and in the backward the gradient of the product, to TF32 as
            TileKernels does: for those who compare with it; it is no faster.
        grad_accumulator: gathers the gradient of the residual from all ops that get it.

    Returns:
        (..., N) float32.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n, N or H has no kernel.

    Source: mHC paper (arXiv 2512.24880), eq. 7; DeepSeek TileKernels `mhc/norm_fn_kernel.py`.
    """
    inputs = (residual, weight, norm_weight, norm_eps, num_splits, tf32)
    known = _OP.find(inputs)
    if known is None:
        check_projection("projection", *inputs)
    return _OP.call(inputs, known, grad_accumulator)[0]


def check_projection(
    op: str,
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    num_splits: int | None,
    tf32: bool,
    num_mixes: tuple[int, ...] | None = None,
) -> None:
    n, _ = errors.check_streams(op, "residual", residual)
    rows = num_mixes or (n * (n + 2), n)
    check_parameters(op, residual, weight, norm_weight, norm_eps, num_splits, tf32, rows)


def check_parameters(
    op: str,
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    num_splits: int | None,
    tf32: bool,
    rows: tuple[int, ...],
) -> None:
    """All but the streams."""
    size = residual.shape[-2] * residual.shape[-1]
    like = ("residual", residual)
    errors.check_tensor(op, "weight", weight, [(n, size) for n in rows], errors.PARAMETERS, like)
    if norm_weight is not None:
        errors.check_tensor(op, "norm_weight", norm_weight, [(size,)], errors.PARAMETERS, like)
    errors.check_number(op, "norm_eps", norm_eps)
    errors.check_bool(op, "tf32", tf32)
    if num_splits is not None:
        errors.check_positive_int(op, "num_splits", num_splits)


def contiguous(weight: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.contiguous(), None if norm_weight is None else norm_weight.contiguous()


def parameters(weight: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two as kernels take them."""
    weight, norm_weight = contiguous(weight, norm_weight)
    return weight, absent(weight) if norm_weight is None else norm_weight


def split_products(
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """The products (S, T, N) and sums of squares (S, T) of S slices of K."""
    num_mixes, size = weight.shape
    x = residual.view(-1, size)
    num_tokens = x.shape[0]
    # A fast kernel's streams have the default dtype, which leaves no word.
    given = dtypes(streams=x.dtype, weight=weight.dtype, norm_weight=dtype_of(norm_weight))
    if selection.is_fast(residual.dtype, residual.shape[-1]):
        block = selection.blocks_per_split(num_tokens, size, num_splits)
        splits = -(-size // (block * BLOCK_K))
        kernel = jit.kernel("projection_fwd", num_mixes, size, *given)
    else:
        block = selection.any_blocks_per_split(num_tokens, size, num_splits)
        splits = -(-size // (block * ANY_K))
        kernel = jit.kernel("projection_any_fwd", num_mixes, size, *given)
    products = x.new_empty(splits, num_tokens, num_mixes, dtype=torch.float32)
    squares = x.new_empty(splits, num_tokens, dtype=torch.float32)
    kernel(x, *parameters(weight, norm_weight), products, squares, block, tf32)
    return products, squares


def _cuda(
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    mixes, inv_rms = _fake(residual, weight, norm_weight, norm_eps, num_splits, tf32)
    if residual.numel():
        num_mixes, size = weight.shape
        x = residual.view(-1, size)
        products, squares = split_products(residual, weight, norm_weight, num_splits, tf32)
        given = dtypes(
            streams=residual.dtype, weight=weight.dtype, norm_weight=dtype_of(norm_weight)
        )
        jit.kernel(
            "projection_norm", num_mixes, size, selection.has_many_splits(products.shape[0]), *given
        )(
            products,
            squares,
            x,
            *parameters(weight, norm_weight),
            mixes.view(-1, num_mixes),
            inv_rms.view(-1),
            norm_eps,
            tf32,
        )
    return mixes, inv_rms


def _cpu(
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    mixes, inv_rms = reference.projection_with_rms(residual, weight, norm_weight, norm_eps, tf32)
    return mixes.contiguous(), inv_rms.contiguous()


def _fake(
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    lead = residual.shape[:-2]
    dtype = torch.float32
    mixes = weight.new_empty((*lead, weight.shape[0]), dtype=dtype)
    return mixes, weight.new_empty(lead, dtype=dtype)


def launch_backward(
    grad: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    tf32: bool,
    aggregated: tuple[Tensor, Tensor] | None = None,
    into: Destinations = NO_DESTINATIONS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual, weight and norm_weight, by position in `into`.

    `aggregated`, (gradient of the layer input, pre_mix), adds the gradient of an aggregate of the
    same streams before the one rounding.
    """
    grad_residual, grad_weight, grad_norm_weight = gradient_buffers(
        into, residual, weight, norm_weight
    )
    grads = grad_residual, grad_weight, grad_norm_weight
    if residual.numel() == 0:
        clear(into, {1: grad_weight, 2: grad_norm_weight})
        return grads
    num_mixes, size = weight.shape
    # Before the kernels that read the weight beside the one before them.
    weight, norm_weight = contiguous(weight, norm_weight)
    if aggregated is None:
        streams = 0
        grad_input, pre_mix = absent(residual, residual.dtype), absent(residual)
    else:
        streams, hidden_size = residual.shape[-2:]
        grad_input = aggregated[0].contiguous().view(-1, hidden_size)
        pre_mix = aggregated[1].view(-1, streams)
    grad, mixes = grad.contiguous().view(-1, num_mixes), mixes.view(-1, num_mixes)
    parts, factors = temporaries(mixes, *factor_shapes(mixes.shape[0], num_mixes, streams))
    launch_matmuls(
        launch_norm(size, grad, mixes, inv_rms.view(-1), pre_mix, parts, factors, tf32),
        factors,
        residual,
        weight,
        norm_weight,
        tf32,
        streams,
        grad_input,
        grad_residual if adds(into, 0) else None,
        grads,
        into,
    )
    return grads


def factor_shapes(
    num_tokens: int, num_mixes: int, streams: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Per token: the gradient of the bare product in two bfloat16 parts, and a few factors.

    As float32, of which two bfloat16 take one.
    """
    return (num_tokens, padded(num_mixes)), (num_tokens, factors_width(streams))


def launch_norm(
    size: int,
    grad_mixes: Tensor,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_mix: Tensor,
    parts: Tensor,
    factors: Tensor,
    tf32: bool,
) -> Tensor:
    """The gradient of the bare product in two parts; and written, what else a token needs.

    `parts` and `factors` are room of `factor_shapes`, of as many streams as pre_mix has columns. It
    has one element and is not read where there are none.
    """
    streams = pre_mix.shape[1] if pre_mix.ndim == 2 else 0
    grad_parts = parts.view(torch.bfloat16)
    jit.kernel("projection_norm_bwd", mixes.shape[1], size, streams)(
        grad_mixes, mixes, inv_rms, pre_mix, grad_parts, factors, tf32
    )
    return grad_parts


def launch_matmuls(
    grad_parts: Tensor,
    factors: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    tf32: bool,
    streams: int,
    grad_input: Tensor,
    accumulated: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    into: Destinations = NO_DESTINATIONS,
) -> None:
    """Write the gradients of residual, weight and norm_weight, by position in `into`.

    `grad_input` is read if there are `streams`; `accumulated` is a gradient of the residual to add.
    The kernel launched right before is to be one of ours, and weight and norm_weight are to be
    contiguous: the kernel here reads them, residual and grad_input before that one has ended.
    """
    grad_residual, grad_weight, _ = grads
    num_mixes, size = weight.shape
    x = residual.view(-1, size)
    num_tokens = x.shape[0]
    given = dtypes(
        streams=x.dtype,
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        held=dtype_of(accumulated),
        into=destination_dtype(into, 0),
    )
    if selection.is_fast(residual.dtype, residual.shape[-1]):
        joins = accumulated is not None or 0 in into
        slice_tokens = backward_slice(num_tokens, weight, streams, joins=joins)
        kernel = jit.kernel("projection_bwd", num_mixes, size, streams, *given)
    else:
        slice_tokens = selection.any_backward_slice(num_tokens, size)
        kernel = jit.kernel("projection_any_bwd", num_mixes, size, streams, *given)
    slices = -(-num_tokens // slice_tokens)
    partials = partial_sums(slices, grad_weight, norm_weight, into)
    kernel(
        grad_parts,
        factors,
        x,
        *parameters(weight, norm_weight),
        grad_input,
        absent(x, x.dtype) if accumulated is None else accumulated.view(-1, size),
        grad_residual.view(-1, size),
        grad_weight.unsqueeze(0) if partials is None else partials,
        slice_tokens,
        tf32,
    )
    if partials is not None:
        sum_partials(partials, weight, norm_weight, grads, into)


def backward_slice(
    num_tokens: int, weight: Tensor, streams: int, *, joins: bool = False, has_sums: bool = False
) -> int:
    """Tokens that a CTA of `projection_backward` of the kernels takes; the last two as there."""
    num_mixes, size = weight.shape
    limits = _device.limits()
    of_streams, pieces = backward_layout(num_mixes, size, streams, limits, joins, has_sums)
    start = selection.SUMS_START_TILES if has_sums else selection.START_TILES
    return selection.backward_slice(num_tokens, size, num_mixes, of_streams * pieces * PIECE, start)


def partial_sums(
    slices: int, grad_weight: Tensor, norm_weight: Tensor | None, into: Destinations
) -> Tensor | None:
    """Room for the gradients of the weight by slices of the tokens, to `sum_partials` then.

    None where that of a single slice is the gradient.
    """
    if (
        slices == 1
        and norm_weight is None
        and grad_weight.dtype == torch.float32
        and not adds(into, 1)
    ):
        return None
    return grad_weight.new_empty(slices, *grad_weight.shape, dtype=torch.float32)


def sum_partials(
    partials: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    grads: tuple[Tensor, ...],
    into: Destinations,
) -> None:
    """Write the gradients of weight and norm_weight, the second and third of `grads`."""
    _, grad_weight, grad_norm_weight = grads
    _, num_mixes, size = partials.shape
    directed = 1 in into or 2 in into
    given = dtypes(
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        into_weight=grad_weight.dtype if directed else None,
        into_norm_weight=None if norm_weight is None or not directed else grad_norm_weight.dtype,
    )
    jit.kernel("projection_weight_bwd", num_mixes, size, *given)(
        partials,
        *parameters(weight, norm_weight),
        grad_weight,
        absent(weight) if norm_weight is None else grad_norm_weight,
        adds(into, 1),
        adds(into, 2),
    )


def _backward_cpu(
    grad: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_norm_weight = reference.projection_backward(
        grad, residual, weight, norm_weight, mixes, inv_rms, tf32
    )
    if grad_norm_weight is None:
        grad_norm_weight = weight.new_empty(0)
    return grad_x, grad_weight.contiguous(), grad_norm_weight


def _backward_fake(
    grad: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    tf32: bool,
) -> tuple[Tensor, ...]:
    return empty_gradients(residual, weight, norm_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, weight, norm_weight, _, _, ctx.tf32 = inputs
    ctx.save_for_backward(residual, weight, norm_weight, *output)


def _backward_arguments(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.tf32


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    arguments = _backward_arguments(ctx, *grads)
    grad_residual, grad_weight, grad_norm_weight = _projection_backward(*arguments)
    if arguments[3] is None:
        grad_norm_weight = None
    return grad_residual, grad_weight, grad_norm_weight, None, None, None


_BACKWARD = (
    "projection_backward(Tensor grad, Tensor residual, Tensor weight, Tensor? norm_weight, "
    "Tensor mixes, Tensor inv_rms, bool tf32) -> (Tensor, Tensor, Tensor)"
)
_projection_backward = register(
    _BACKWARD,
    cuda=launch_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
    flops=_flops.projection_backward,
)
_projection = register(
    "projection(Tensor residual, Tensor weight, Tensor? norm_weight, float norm_eps, "
    "int? num_splits, bool tf32) -> (Tensor, Tensor)",
    cuda=_cuda,
    cpu=_cpu,
    fake=_fake,
    flops=_flops.projection,
    backward=_backward,
    setup_context=_setup_context,
    hidden=(1,),
)
_OP = Op(
    name="projection",
    operator=_projection,
    save=_save,
    arguments=_backward_arguments,
    gradients=_projection_backward,
    tensors=3,
    backward=register_into(
        _BACKWARD,
        (0, 1, 2),
        cuda=launch_backward,
        cpu=_backward_cpu,
        fake=_backward_fake,
        flops=_flops.projection_backward,
    ),
    parameters={1: "weight", 2: "norm_weight"},
)
