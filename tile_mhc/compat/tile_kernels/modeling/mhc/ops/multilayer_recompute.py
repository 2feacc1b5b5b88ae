"""Replay of many sub-layers in one pass."""

from tile_mhc.compat.tile_kernels.mhc.multilayer_recompute_kernel import mhc_multilayer_recompute

__all__ = ["mhc_multilayer_recompute"]
