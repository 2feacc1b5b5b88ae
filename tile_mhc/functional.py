"""The calls of a model by TileKernels' names: at the start, around a sub-layer, and at the end."""

from tile_mhc.ops.contract import contract as mhc_head
from tile_mhc.ops.expand import expand as expand_from_embedding
from tile_mhc.ops.fused_pre import fused_pre as mhc_pre
from tile_mhc.ops.post import post as mhc_post

__all__ = ["expand_from_embedding", "mhc_head", "mhc_post", "mhc_pre"]
