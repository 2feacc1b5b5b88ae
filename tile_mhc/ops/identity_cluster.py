"""What `identity_pre` launches where clusters of CTAs hold its tokens: a pass over the streams."""

from torch import Tensor

from tile_mhc import _device, jit, selection
from tile_mhc.kernels._shapes import identity_cluster_size
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    for_part,
    gradient_buffers,
)
from tile_mhc.ops._library import absent, dtype_of, dtypes
from tile_mhc.ops.mixes import column_sums


def forward(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    post_eps: float,
    post_mult: float,
    tf32: bool,
    outputs: tuple[Tensor, ...],
) -> None:
    """Write `outputs`: layer input and post_mix, and for the backward mixes and inv_rms."""
    n, hidden_size = residual.shape[-2:]
    x = residual.view(-1, n * hidden_size)
    layer_input, post_mix, mixes, inv_rms = outputs
    size = identity_cluster_size(n, hidden_size, False, False, _device.limits())
    given = dtypes(
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
    )
    jit.kernel("identity_cluster_fwd", hidden_size, *given)(
        x,
        *projection_op.parameters(weight, norm_weight),
        scale.contiguous(),
        bias.contiguous(),
        layer_input.view(-1, hidden_size),
        post_mix.view(-1, n),
        mixes.view(-1, 2 * n),
        inv_rms.view(-1),
        norm_eps,
        pre_eps,
        post_eps,
        post_mult,
        tf32,
        selection.num_clusters(x.shape[0], size, bound_by_memory=True),
    )


def backward_size(n: int, hidden_size: int, held: bool) -> int:
    """CTAs of the backward that share a token."""
    return identity_cluster_size(n, hidden_size, True, held, _device.limits())


def backward(
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
    """Gradients of residual, weight, scale, bias and norm_weight; the first is not in `into`."""
    n, hidden_size = residual.shape[-2:]
    x = residual.view(-1, n * hidden_size)
    of_projection = for_part(into, {1: 1, 4: 2})
    grads = gradient_buffers(of_projection, residual, weight, norm_weight)
    size = backward_size(n, hidden_size, accumulated is not None)
    clusters = selection.num_clusters(x.shape[0], size, bound_by_memory=False)
    partials = projection_op.partial_sums(clusters, grads[1], norm_weight, of_projection)
    # One row per cluster: the bias gradients, then the scale gradients.
    gate_partials = mixes.new_empty(clusters, 2 * n + 2)
    held = absent(x, x.dtype) if accumulated is None else accumulated.contiguous().view(x.shape)
    given = dtypes(
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
        held=dtype_of(accumulated),
    )
    jit.kernel("identity_cluster_bwd", hidden_size, *given)(
        grad_input.contiguous().view(-1, hidden_size),
        grad_post.contiguous().view(-1, n),
        x,
        *projection_op.parameters(weight, norm_weight),
        scale.contiguous(),
        bias.contiguous(),
        mixes.view(-1, 2 * n),
        inv_rms.view(-1),
        held,
        grads[0].view(x.shape),
        grads[1].unsqueeze(0) if partials is None else partials,
        gate_partials,
        pre_eps,
        post_mult,
        tf32,
        clusters,
    )
    if partials is not None:
        projection_op.sum_partials(partials, weight, norm_weight, grads, of_projection)
    gates = column_sums(gate_partials, scale, bias, for_part(into, {2: 1, 3: 2}))
    return grads[0], grads[1], *gates, grads[2]
