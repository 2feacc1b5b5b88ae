"""What of the projection is public below autograd: the rounding to TF32."""

import torch

from tile_mhc import errors

# TF32 keeps 10 of float32's 23 mantissa bits.
DROPPED_BITS = 23 - 10


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest TF32 value, ties away from zero, still stored as float32."""
    shape = errors.require_tensor("round_to_tf32", "x", x).shape
    errors.check_tensor("round_to_tf32", "x", x, [shape], torch.float32)
    half = 1 << (DROPPED_BITS - 1)
    mask = -1 << DROPPED_BITS
    rounded = ((x.view(torch.int32) + half) & mask).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)
