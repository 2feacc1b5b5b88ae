"""n x n logits -> a doubly stochastic matrix."""

import torch

from tile_mhc.compat.tile_kernels import _copies
from tile_mhc.ops.sinkhorn import sinkhorn


def sinkhorn_normalize(x: torch.Tensor, repeat: int = 10, eps: float = 1e-6) -> torch.Tensor:
    """`tile_mhc.sinkhorn`."""
    op = "sinkhorn_normalize"
    out = sinkhorn(_copies.contiguous(op, "x", x), repeat=repeat, eps=eps)
    _copies.count_gradients(op, out=out)
    return out
