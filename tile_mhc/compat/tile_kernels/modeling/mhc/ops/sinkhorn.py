"""n x n logits -> a doubly stochastic matrix."""

import torch

from tile_mhc.ops.sinkhorn import sinkhorn


def sinkhorn_normalize(x: torch.Tensor, repeat: int = 10, eps: float = 1e-6) -> torch.Tensor:
    """`tile_mhc.sinkhorn`."""
    return sinkhorn(x, repeat=repeat, eps=eps)
