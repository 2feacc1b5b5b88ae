"""TileKernels' functions below autograd: they take tensors and build no graph.

Those of release 2.1.0, which write into tensors that they are given, lie here; in the modules are
also those of 1.0.0, public ones and the builders that other projects import.
"""

from tile_mhc.compat.tile_kernels.mhc.expand_kernel import expand_to_mhc_bwd, expand_to_mhc_fwd
from tile_mhc.compat.tile_kernels.mhc.head_compute_mix_kernel import (
    mhc_head_compute_mix_bwd,
    mhc_head_compute_mix_fwd,
)
from tile_mhc.compat.tile_kernels.mhc.multilayer_recompute_kernel import mhc_multilayer_recompute
from tile_mhc.compat.tile_kernels.mhc.norm_fn_kernel import (
    mhc_fn_normw_merge_bwd,
    mhc_fn_normw_merge_fwd,
    mhc_reduce_partials_and_rmsnorm_bwd,
    mhc_reduce_partials_and_rmsnorm_fwd,
)
from tile_mhc.compat.tile_kernels.mhc.post_kernel import mhc_post_bwd, mhc_post_fwd
from tile_mhc.compat.tile_kernels.mhc.pre_apply_mix_kernel import (
    mhc_pre_apply_mix_bwd,
    mhc_pre_apply_mix_fwd,
)
from tile_mhc.compat.tile_kernels.mhc.pre_big_fuse_kernel import mhc_pre_big_fuse_fwd
from tile_mhc.compat.tile_kernels.mhc.pre_split_mixes_kernel import (
    mhc_pre_split_mixes_bwd,
    mhc_pre_split_mixes_fwd,
)
from tile_mhc.compat.tile_kernels.mhc.sinkhorn_kernel import mhc_sinkhorn_bwd, mhc_sinkhorn_fwd

__all__ = [
    "expand_to_mhc_bwd",
    "expand_to_mhc_fwd",
    "mhc_fn_normw_merge_bwd",
    "mhc_fn_normw_merge_fwd",
    "mhc_head_compute_mix_bwd",
    "mhc_head_compute_mix_fwd",
    "mhc_multilayer_recompute",
    "mhc_post_bwd",
    "mhc_post_fwd",
    "mhc_pre_apply_mix_bwd",
    "mhc_pre_apply_mix_fwd",
    "mhc_pre_big_fuse_fwd",
    "mhc_pre_split_mixes_bwd",
    "mhc_pre_split_mixes_fwd",
    "mhc_reduce_partials_and_rmsnorm_bwd",
    "mhc_reduce_partials_and_rmsnorm_fwd",
    "mhc_sinkhorn_bwd",
    "mhc_sinkhorn_fwd",
]
