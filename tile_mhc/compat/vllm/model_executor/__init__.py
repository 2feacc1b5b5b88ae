"""As `vllm.model_executor`: what is mHC of it."""

from tile_mhc.compat.vllm.model_executor import kernels

__all__ = ["kernels"]
