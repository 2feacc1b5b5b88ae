"""As in TransformerEngine: the way to `triton.mhc`, and nothing else."""

from tile_mhc.compat.transformer_engine.pytorch import triton

__all__ = ["triton"]
