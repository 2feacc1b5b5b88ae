"""As `sglang.kernels.ops.layernorm`: what is mHC of it."""

from tile_mhc.compat.sglang.kernels.ops.layernorm import mhc, mhc_head

__all__ = ["mhc", "mhc_head"]
