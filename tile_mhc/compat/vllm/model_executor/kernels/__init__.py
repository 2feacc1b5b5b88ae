"""As `vllm.model_executor.kernels`: what is mHC of it."""

from tile_mhc.compat.vllm.model_executor.kernels import mhc

__all__ = ["mhc"]
