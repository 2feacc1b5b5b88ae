"""As in TransformerEngine: mHC, here in TileLang."""

from tile_mhc.compat.transformer_engine.pytorch.triton import mhc

__all__ = ["mhc"]
