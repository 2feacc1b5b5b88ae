"""What `fused_pre` and `post_pre` launch where clusters of CTAs hold their tokens: one pass."""

from collections.abc import Sequence

from torch import Tensor

from tile_mhc import _device, jit, selection
from tile_mhc.kernels._shapes import is_no_eps, pre_cluster
from tile_mhc.ops import log_sinkhorn as log_sinkhorn_op
from tile_mhc.ops import post as post_op
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._library import absent, dtype_of, dtypes


def forward(
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
    tf32: bool,
    outputs: Sequence[Tensor],
    of_post: tuple[Tensor, ...] | None = None,
) -> None:
    """Write `outputs`: layer input, with a `pre_mix` the next, post_mix and comb_mix; for the
    backward mixes and inv_rms.

    With `of_post`, which is layer_output, post_mix and comb_mix of the sub-layer before, and the
    streams, these are written first: all else is of them, and the residual is what they are made
    of.
    """
    n, hidden_size = residual.shape[-2:]
    x = residual.view(-1, n * hidden_size)
    layer_input, *next_pre, post_mix, comb_mix, mixes, inv_rms = outputs
    has_post, delayed = of_post is not None, pre_mix is not None
    *before, streams = post_op.given_before(x, n, of_post)
    given = dtypes(
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
    )
    size = pre_cluster(n, hidden_size, has_post, delayed, _device.limits()).size
    jit.kernel("pre_cluster_fwd", hidden_size, has_post, delayed, *given)(
        *before,
        absent(x) if pre_mix is None else pre_mix.contiguous().view(-1, n),
        *projection_op.parameters(weight, norm_weight),
        scale.contiguous(),
        bias.contiguous(),
        streams,
        layer_input.view(-1, hidden_size),
        next_pre[0].view(-1, n) if next_pre else absent(x),
        post_mix.view(-1, n),
        comb_mix.view(-1, n * n),
        mixes.view(-1, n * (n + 2)),
        inv_rms.view(-1),
        norm_eps,
        pre_eps,
        sinkhorn_eps,
        post_mult,
        sinkhorn_repeat,
        tf32,
        selection.num_clusters(x.shape[0], size, bound_by_memory=False),
    )
    if is_no_eps(sinkhorn_eps):
        log_sinkhorn_op.launch_comb(mixes, scale, bias, comb_mix, sinkhorn_repeat)
