"""Mixes -> pre, post and comb weights."""

import torch

from tile_mhc.compat.tile_kernels import _copies, _gradients
from tile_mhc.ops.mixes import split_mixes


def mhc_pre_split_mixes(
    input_mixes: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    mhc_mult: int,
    mhc_post_mult_value: float,
    mhc_pre_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tile_mhc.split_mixes`, with pre and post of shape (..., n, 1)."""
    op = "mhc_pre_split_mixes"
    input_mixes = _copies.contiguous(op, "input_mixes", input_mixes)
    pre_mix, post_mix, comb_mix = split_mixes(
        input_mixes,
        _gradients.parameter_input(op, "mhc_scale", mhc_scale),
        _gradients.parameter_input(op, "mhc_base", mhc_base),
        num_streams=mhc_mult,
        post_mult=mhc_post_mult_value,
        pre_eps=mhc_pre_eps,
    )
    pre_mix, post_mix = pre_mix.unsqueeze(-1), post_mix.unsqueeze(-1)
    _copies.count_gradients(op, pre_mix=pre_mix, post_mix=post_mix, comb_mix=comb_mix)
    return pre_mix, post_mix, comb_mix


class MHCPreSplitMixes:
    """`MHCPreSplitMixes.apply` is `mhc_pre_split_mixes`."""

    apply = staticmethod(mhc_pre_split_mixes)
