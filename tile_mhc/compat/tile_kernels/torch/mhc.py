"""`tile_mhc.reference` under TileKernels' names."""

import torch

from tile_mhc import reference


def expand_to_mhc_ref(hidden: torch.Tensor, mhc_mult: int) -> torch.Tensor:
    """See `tile_mhc.reference.expand`."""
    return reference.expand(hidden, mhc_mult)


def sinkhorn_normalize_ref(x: torch.Tensor, repeat: int = 10, eps: float = 1e-6) -> torch.Tensor:
    """See `tile_mhc.reference.sinkhorn`."""
    return reference.sinkhorn(x, repeat=repeat, eps=eps)


def mhc_head_compute_mix_ref(
    input_mix: torch.Tensor, mhc_scale: torch.Tensor, mhc_base: torch.Tensor, mhc_pre_eps: float
) -> torch.Tensor:
    """See `tile_mhc.reference.head_mix`."""
    return reference.head_mix(input_mix, mhc_scale, mhc_base, pre_eps=mhc_pre_eps)


def mhc_pre_split_mixes_ref(
    input_mixes: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    mhc_mult: int,
    mhc_post_mult_value: float,
    mhc_pre_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `tile_mhc.reference.split_mixes`; pre and post are (..., n, 1)."""
    pre_mix, post_mix, comb_mix = reference.split_mixes(
        input_mixes,
        mhc_scale,
        mhc_base,
        num_streams=mhc_mult,
        post_mult=mhc_post_mult_value,
        pre_eps=mhc_pre_eps,
    )
    return pre_mix.unsqueeze(-1), post_mix.unsqueeze(-1), comb_mix


def mhc_pre_apply_mix_ref(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """See `tile_mhc.reference.aggregate`."""
    return reference.aggregate(x, mix).bfloat16()


def mhc_post_ref(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
) -> torch.Tensor:
    """See `tile_mhc.reference.post`."""
    return reference.post(x, residual, post_layer_mix, comb_res_mix).bfloat16()


def mhc_pre_norm_fn_ref(
    residual: torch.Tensor,
    mhc_fn: torch.Tensor,
    mhc_norm_weight: torch.Tensor | None,
    mhc_norm_eps: float,
) -> torch.Tensor:
    """See `tile_mhc.reference.projection`."""
    return reference.projection(
        residual, mhc_fn, norm_weight=mhc_norm_weight, norm_eps=mhc_norm_eps
    )


def mhc_pre_norm_fn_partials_ref(
    residual: torch.Tensor, fn: torch.Tensor, n_splits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products (n_splits, T, 1, N) and sums of squares (n_splits, T, 1) over slices of K.

    What a matmul that splits K leaves, for `mhc_reduce_partials_and_rmsnorm_fwd`. Of release 2.1.0.
    """
    num_mixes, size = fn.shape
    streams = residual.reshape(-1, size).float().unflatten(-1, (n_splits, -1)).transpose(0, 1)
    weight = fn.view(num_mixes, n_splits, -1).transpose(0, 1)
    products = torch.bmm(streams, weight.mT)
    return products.unsqueeze(-2), streams.square().sum(-1, keepdim=True)
