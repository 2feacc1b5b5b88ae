"""Replay of the aggregates and posts of many sub-layers in one pass."""

import torch

from tile_mhc.ops.recompute import recompute


def mhc_multilayer_recompute(
    initial_residual: torch.Tensor,
    pre_mix_list: list[torch.Tensor],
    layer_output_list: list[torch.Tensor],
    post_mix_list: list[torch.Tensor],
    comb_mix_list: list[torch.Tensor],
    layer_input_list: list[torch.Tensor],
    residual_list: list[torch.Tensor],
) -> None:
    """`tile_mhc.recompute` into the last two lists; all the tensors are contiguous."""
    with torch.no_grad():
        recompute(
            initial_residual,
            pre_mix_list,
            layer_output_list,
            post_mix_list,
            comb_mix_list,
            # .data: a refilled activation must not look modified to the node that saved it.
            layer_inputs=[tensor.data for tensor in layer_input_list],
            residuals=[tensor.data for tensor in residual_list],
        )
