"""As `vllm.model_executor.kernels.mhc`: its TileLang functions."""

from tile_mhc.compat.vllm.model_executor.kernels.mhc import tilelang
from tile_mhc.compat.vllm.model_executor.kernels.mhc.tilelang import *  # noqa: F403

__all__ = ["tilelang", *tilelang.__all__]
