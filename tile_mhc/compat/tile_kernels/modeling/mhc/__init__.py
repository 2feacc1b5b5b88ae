"""The calls of a model: at the embedding, before a sub-layer, and at the end."""

from tile_mhc.compat.tile_kernels.modeling.mhc.functional import (
    expand_from_embedding,
    mhc_head,
    mhc_pre,
)

__all__ = ["expand_from_embedding", "mhc_head", "mhc_pre"]
