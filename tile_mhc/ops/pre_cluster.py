"""What `fused_pre`, and `post_pre` without a pre_mix, launch where clusters of CTAs hold their
tokens: one pass over the streams.
"""

from collections.abc import Sequence

from torch import Tensor

from tile_mhc import _device, jit, selection
from tile_mhc.kernels._shapes import is_no_eps, pre_cluster
from tile_mhc.ops import log_sinkhorn as log_sinkhorn_op
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._library import dtype_of, dtypes


def forward(
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
    of_post: tuple[Tensor, ...] | None = None,
) -> None:
    """Write `outputs`: layer input, post_mix and comb_mix; for the backward mixes and inv_rms.

    With `of_post`, which is layer_output, post_mix and comb_mix of the sub-layer before, and the
    streams, these are written first: all else is of them, and the residual is what they are made
    of.
    """
    n, hidden_size = residual.shape[-2:]
    x = residual.view(-1, n * hidden_size)
    layer_input, post_mix, comb_mix, mixes, inv_rms = outputs
    given = dtypes(
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
    )
    parameters = (
        *projection_op.parameters(weight, norm_weight),
        scale.contiguous(),
        bias.contiguous(),
    )
    written = (
        layer_input.view(-1, hidden_size),
        post_mix.view(-1, n),
        comb_mix.view(-1, n * n),
        mixes.view(-1, n * (n + 2)),
        inv_rms.view(-1),
    )
    size = pre_cluster(n, hidden_size, of_post is not None, _device.limits()).size
    options = (
        norm_eps,
        pre_eps,
        sinkhorn_eps,
        post_mult,
        sinkhorn_repeat,
        tf32,
        selection.num_clusters(x.shape[0], size, bound_by_memory=False),
    )
    if of_post is None:
        jit.kernel("pre_cluster_fwd", hidden_size, *given)(x, *parameters, *written, *options)
    else:
        layer_output, post_before, comb_before, streams = of_post
        jit.kernel("post_pre_cluster_fwd", hidden_size, *given)(
            layer_output.view(-1, hidden_size),
            x,
            post_before.contiguous().view(-1, n),
            comb_before.contiguous().view(-1, n, n),
            *parameters,
            streams.view(x.shape),
            *written,
            *options,
        )
    if is_no_eps(sinkhorn_eps):
        log_sinkhorn_op.launch_comb(mixes, scale, bias, comb_mix, sinkhorn_repeat)
