"""Manifold-constrained hyper-connections (mHC) in TileLang.

A residual is n streams of width H. The ops read a layer input from them, write a layer output back,
and mix them; on a CUDA device they run TileLang kernels, on a CPU the torch reference.
"""

from tile_mhc import _checkout  # noqa: F401  (first: the others import tile_mhc.kernels)
from tile_mhc import config as config
from tile_mhc import nn as nn
from tile_mhc._recompute_group import RecomputeGroup, recompute_group
from tile_mhc._warm_up import WarmUp, warm_up
from tile_mhc.accumulator import GradAccumulator
from tile_mhc.errors import AccumulatorError, RecomputeError, ShapeError, UnsupportedError
from tile_mhc.main_grad import without_main_grad
from tile_mhc.ops.aggregate import aggregate
from tile_mhc.ops.contract import contract
from tile_mhc.ops.expand import expand
from tile_mhc.ops.fused_pre import fused_pre
from tile_mhc.ops.head_mix import head_mix
from tile_mhc.ops.identity_post import identity_post
from tile_mhc.ops.identity_pre import identity_pre
from tile_mhc.ops.mixes import split_mixes
from tile_mhc.ops.post import post
from tile_mhc.ops.post_pre import post_pre
from tile_mhc.ops.projection import projection
from tile_mhc.ops.recompute import recompute
from tile_mhc.ops.sinkhorn import sinkhorn
from tile_mhc.ops.stream_mean import stream_mean

__version__ = "0.1.0"
__all__ = [
    "AccumulatorError",
    "GradAccumulator",
    "RecomputeError",
    "RecomputeGroup",
    "ShapeError",
    "UnsupportedError",
    "WarmUp",
    "aggregate",
    "contract",
    "expand",
    "fused_pre",
    "head_mix",
    "identity_post",
    "identity_pre",
    "post",
    "post_pre",
    "projection",
    "recompute",
    "recompute_group",
    "sinkhorn",
    "split_mixes",
    "stream_mean",
    "warm_up",
    "without_main_grad",
]
