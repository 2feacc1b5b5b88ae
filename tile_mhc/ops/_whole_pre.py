"""Where a pre, or a post and the next pre, has kernels that make all of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tile_mhc import selection
from tile_mhc.ops import few_pre, pre_cluster


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
    num_splits: int | None,
    tf32: bool,
    outputs: Sequence[Tensor],
    layer_norm: tuple[Tensor, float] | None,
    of_post: tuple[Tensor, ...] | None = None,
) -> bool:
    """Whether it has: then `outputs` are written, as `few_pre.forward` says."""
    n, hidden_size = residual.shape[-2:]
    num_tokens = residual.numel() // (n * hidden_size)
    steps = (norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat)
    given: list[Any] = [residual, weight, scale, bias, pre_mix, norm_weight, *steps, tf32, outputs]
    if selection.is_few(num_tokens) and selection.is_one_pass(
        residual.dtype, n, hidden_size, num_splits
    ):
        given += [layer_norm, of_post]
        few_pre.forward(*given)
        return True
    once = layer_norm is None and selection.pre_reads_once(
        residual.dtype,
        num_tokens,
        n,
        hidden_size,
        num_splits,
        has_post=of_post is not None,
        delayed=pre_mix is not None,
    )
    if once:
        given.append(of_post)
        pre_cluster.forward(*given)
    return once
