"""The gradients of a pre's gates: from those of its mix weights to what the projection's takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from tile_mhc import jit, selection
from tile_mhc.ops import mixes as mixes_op
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops import sinkhorn as sinkhorn_op
from tile_mhc.ops._library import dtypes, temporaries


class Aggregated(NamedTuple):
    """Where the layer input was made by the pre_mix of these gates: (tokens, H) and the streams."""

    grad_input: Tensor
    residual: Tensor


class Delayed(NamedTuple):
    """Where it was not: the gradient of that pre_mix, and the one that made the layer input."""

    grad_next: Tensor
    pre_mix: Tensor


class _Gates(NamedTuple):
    """What all kernels take of the gates; what has a row per token has two dimensions."""

    grad_post: Tensor
    grad_comb: Tensor
    mixes: Tensor
    inv_rms: Tensor
    scale: Tensor
    bias: Tensor


class _Options(NamedTuple):
    pre_eps: float
    sinkhorn_eps: float
    post_mult: float
    sinkhorn_repeat: int


def launch_backward(
    pre: Aggregated | Delayed,
    grad_post: Tensor,
    grad_comb: Tensor,
    mixes: Tensor,
    inv_rms: Tensor,
    scale: Tensor,
    bias: Tensor,
    size: int,
    options: tuple[float, float, float, int],
    tf32: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rows of sums for the gradients of bias and scale, which `mixes_op.launch_sums` adds up, and
    what `projection_op.launch_matmuls` takes by token.

    That is the gradient of the bare product in two bfloat16 parts, and the factors. `size` is n*H;
    `options` are pre_eps, sinkhorn_eps, post_mult and sinkhorn_repeat.
    """
    n, num_mixes = grad_post.shape[-1], mixes.shape[-1]
    # No copy may come between kernels that read beside the one before them.
    gates = _Gates(
        grad_post.contiguous().view(-1, n),
        grad_comb.contiguous().view(-1, n * n),
        mixes.view(-1, num_mixes),
        inv_rms.view(-1),
        scale.contiguous(),
        bias.contiguous(),
    )
    if isinstance(pre, Delayed):
        pre = Delayed(*(tensor.contiguous().view(-1, n) for tensor in pre))
    of = _Options(*options)
    at_once = selection.has_gates_at_once(n, of.sinkhorn_repeat, of.sinkhorn_eps)
    launch = _launch_at_once if at_once else _launch_in_steps
    partials, grad_parts, factors = launch(pre, gates, of, size, tf32)
    return partials, (grad_parts, factors)


def _launch_at_once(
    pre: Aggregated | Delayed, gates: _Gates, options: _Options, size: int, tf32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of bias and scale by rows, the parts and the factors, by one kernel."""
    num_tokens, num_mixes = gates.mixes.shape
    n = gates.grad_post.shape[1]
    partials, parts, factors, grad_pre = temporaries(
        gates.mixes,
        mixes_op.partial_shape(num_tokens, num_mixes),
        *projection_op.factor_shapes(num_tokens, num_mixes, n),
        (num_tokens, n),
    )
    made = partials, parts.view(torch.bfloat16), factors
    capacity = selection.history_capacity(options.sinkhorn_repeat)
    given = mixes_op.gate_dtypes(gates.scale, gates.bias)
    if isinstance(pre, Delayed):
        jit.kernel("delayed_gates_bwd", n, capacity, *given)(
            *pre, *gates, *made, size, *options[1:], tf32
        )
    else:
        hidden_size = pre.grad_input.shape[1]
        streams = dtypes(streams=pre.residual.dtype)
        jit.kernel("aggregate_mix_first_bwd", n, hidden_size, *streams)(
            pre.grad_input, pre.residual.view(-1, n, hidden_size), grad_pre
        )
        jit.kernel("gates_bwd", n, capacity, *given)(grad_pre, *gates, *made, size, *options, tf32)
    return made


def _launch_in_steps(
    pre: Aggregated | Delayed, gates: _Gates, options: _Options, size: int, tf32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the kernels of the separate ops."""
    num_tokens, num_mixes = gates.mixes.shape
    n = gates.grad_post.shape[1]
    own_mix, grad_pre, logits, grad_logits, grad_mixes, partials, parts, factors = temporaries(
        gates.mixes,
        (num_tokens, n),
        (num_tokens, n),
        (num_tokens, n * n),
        (num_tokens, n * n),
        (num_tokens, num_mixes),
        mixes_op.partial_shape(num_tokens, num_mixes),
        *projection_op.factor_shapes(num_tokens, num_mixes, n),
    )
    pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat = options
    of_gates = gates.mixes, gates.scale, gates.bias
    # Nothing reads post_mix here: it goes where a gradient of pre_mix may overwrite it.
    mixes_op.launch_rows(*of_gates, own_mix, grad_pre, logits, post_mult, pre_eps)
    sinkhorn_op.launch_backward_rows(
        n, gates.grad_comb, logits, grad_logits, sinkhorn_repeat, sinkhorn_eps
    )
    if isinstance(pre, Delayed):
        grad_pre, pre_mix = pre
    else:
        pre_mix = own_mix
        hidden_size = pre.grad_input.shape[1]
        streams = dtypes(streams=pre.residual.dtype)
        jit.kernel("aggregate_mix_bwd", n, hidden_size, *streams)(
            pre.grad_input, pre.residual.view(-1, n, hidden_size), grad_pre
        )
    mixes_op.launch_backward_rows(
        grad_pre, gates.grad_post, grad_logits, *of_gates, grad_mixes, partials, post_mult
    )
    grad_parts = projection_op.launch_norm(
        size, grad_mixes, gates.mixes, gates.inv_rms, pre_mix, parts, factors, tf32
    )
    return partials, grad_parts, factors
