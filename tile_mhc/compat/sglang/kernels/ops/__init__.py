"""As `sglang.kernels.ops`: what is mHC of it."""

from tile_mhc.compat.sglang.kernels.ops import layernorm

__all__ = ["layernorm"]
