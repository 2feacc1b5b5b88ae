"""The differentiable calls."""

from tile_mhc.compat.tile_kernels.modeling import mhc

__all__ = ["mhc"]
