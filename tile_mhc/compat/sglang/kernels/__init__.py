"""As `sglang.kernels`: what is mHC of it."""

from tile_mhc.compat.sglang.kernels import ops

__all__ = ["ops"]
