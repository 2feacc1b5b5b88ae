"""What `fused_pre`, `identity_pre` and `post_pre` take by keyword, but for the flags that change
what they return.

Only for the overloads of the three, which only type checkers read: at run time there are none, and
the documentation shows the one signature with its defaults. A test compares it with these.
"""

from typing import TypedDict

from torch import Tensor

from tile_mhc.accumulator import GradAccumulator


class MixesOptions(TypedDict, total=False):
    norm_weight: Tensor | None
    norm_eps: float
    pre_eps: float
    sinkhorn_eps: float
    post_mult: float
    sinkhorn_repeat: int
    num_splits: int | None
    tf32: bool


class PreOptions(MixesOptions, total=False):
    layer_norm_weight: Tensor | None
    layer_norm_eps: float


class PostPreOptions(PreOptions, total=False):
    layer_bias: Tensor | None
    grad_accumulator: GradAccumulator | None


class IdentityPreOptions(TypedDict, total=False):
    norm_weight: Tensor | None
    norm_eps: float
    pre_eps: float
    post_eps: float
    post_mult: float
    num_splits: int | None
    tf32: bool
    grad_accumulator: GradAccumulator | None
