"""What `contract` launches where clusters of CTAs hold its tokens: one pass over the streams."""

from torch import Tensor

from tile_mhc import _device, jit, selection
from tile_mhc.kernels._shapes import cluster_size
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._destinations import (
    NO_DESTINATIONS,
    Destinations,
    for_part,
    gradient_buffers,
)
from tile_mhc.ops._library import dtype_of, dtypes
from tile_mhc.ops.mixes import column_sums


def _dtypes(
    weight: Tensor, norm_weight: Tensor | None, scale: Tensor, bias: Tensor
) -> tuple[str, ...]:
    return dtypes(
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
    )


def forward(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    tf32: bool,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write `outputs`: the readout, and for the backward mixes and inv_rms."""
    n, hidden_size = residual.shape[-2:]
    x = residual.view(-1, n * hidden_size)
    out, mixes, inv_rms = outputs
    size = cluster_size(n, hidden_size, False, _device.limits())
    given = _dtypes(weight, norm_weight, scale, bias)
    jit.kernel("contract_cluster_fwd", n, hidden_size, *given)(
        x,
        *projection_op.parameters(weight, norm_weight),
        scale,
        bias.contiguous(),
        out.view(-1, hidden_size),
        mixes.view(-1, n),
        inv_rms.view(-1),
        norm_eps,
        pre_eps,
        tf32,
        selection.num_clusters(x.shape[0], size, bound_by_memory=True),
    )


def backward(
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
    """Gradients of residual, weight, scale, bias and norm_weight; the first is not in `into`."""
    n, hidden_size = residual.shape[-2:]
    x = residual.view(-1, n * hidden_size)
    of_projection = for_part(into, {1: 1, 4: 2})
    grads = gradient_buffers(of_projection, residual, weight, norm_weight)
    size = cluster_size(n, hidden_size, True, _device.limits())
    clusters = selection.num_clusters(x.shape[0], size, bound_by_memory=False)
    partials = projection_op.partial_sums(clusters, grads[1], norm_weight, of_projection)
    # One row per cluster: the bias gradients, then the scale gradient.
    gate_partials = mixes.new_empty(clusters, n + 1)
    given = _dtypes(weight, norm_weight, scale, bias)
    jit.kernel("contract_cluster_bwd", n, hidden_size, *given)(
        grad.contiguous().view(-1, hidden_size),
        x,
        *projection_op.parameters(weight, norm_weight),
        scale,
        bias.contiguous(),
        mixes.view(-1, n),
        inv_rms.view(-1),
        grads[0].view(x.shape),
        grads[1].unsqueeze(0) if partials is None else partials,
        gate_partials,
        pre_eps,
        tf32,
        clusters,
    )
    if partials is not None:
        projection_op.sum_partials(partials, weight, norm_weight, grads, of_projection)
    gates = column_sums(gate_partials, scale, bias, for_part(into, {2: 1, 3: 2}))
    return grads[0], grads[1], *gates, grads[2]
