"""The launcher of a pre of few tokens, with the post before it or without; see the kernels."""

from collections.abc import Sequence

from torch import Tensor

from tile_mhc import jit, selection
from tile_mhc.kernels._shapes import FEW_COLUMNS, FEW_ROW, is_no_eps
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
    layer_norm: tuple[Tensor, float] | None,
    of_post: tuple[Tensor, ...] | None = None,
) -> None:
    """Write `outputs`: layer input, with a `pre_mix` the next, post_mix and comb_mix; for the
    backward mixes and inv_rms. The layer input as its norm makes it, where there is a `layer_norm`.

    With `of_post`, which is layer_output, post_mix and comb_mix of the sub-layer before, and the
    streams, these are written first: all else is of them, and the residual is what they are made
    of.
    """
    n, hidden_size = residual.shape[-2:]
    num_mixes, size = weight.shape
    x = residual.view(-1, size)
    num_tokens = x.shape[0]
    layer_input, *next_pre, post_mix, comb_mix, mixes, inv_rms = outputs
    layer_norm_weight, layer_norm_eps = layer_norm or (absent(residual), 0.0)
    delayed = pre_mix is not None
    # Before the launches, the second of which reads them beside the first.
    parameters = projection_op.parameters(weight, norm_weight)
    gates = scale.contiguous(), bias.contiguous(), layer_norm_weight.contiguous()
    given_mix = absent(residual) if pre_mix is None else pre_mix.contiguous().view(-1, n)
    *before, made = post_op.given_before(x, n, of_post)
    sums = mixes.new_empty(hidden_size // FEW_COLUMNS, num_tokens, FEW_ROW)
    layer_input = layer_input.view(-1, hidden_size)
    of_weight = dtypes(weight=weight.dtype, norm_weight=dtype_of(norm_weight))
    own = selection.few_streams(num_tokens)
    steps = selection.few_steps(num_tokens, hidden_size, own)
    # By warps that have all streams: the second launch then only takes the norm.
    collapses = delayed and own == n
    collapse = (given_mix, layer_input) if collapses else (absent(x), absent(x, x.dtype))
    jit.kernel("few_project", hidden_size, of_post is not None, own, collapses, *of_weight)(
        *before, *parameters, collapse[0], made, collapse[1], sums, steps, tf32
    )
    given = dtypes(
        weight=weight.dtype,
        norm_weight=dtype_of(norm_weight),
        scale=scale.dtype,
        bias=bias.dtype,
        layer_norm=None if layer_norm is None else layer_norm[0].dtype,
    )
    jit.kernel("few_pre", hidden_size, delayed, collapses, *given)(
        sums,
        *gates,
        x if of_post is None else made,
        *parameters,
        absent(x) if collapses else given_mix,
        layer_input,
        next_pre[0].view(-1, n) if next_pre else absent(x),
        post_mix.view(-1, n),
        comb_mix.view(-1, n * n),
        mixes.view(-1, num_mixes),
        inv_rms.view(-1),
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
