"""The mHC part of DeepSeek TileKernels on tile_mhc: same modules, names, arguments, defaults.

Import it from here, or call `install()` once and keep every `import tile_kernels...` as it is; with
`install(force=True)` a real tile_kernels keeps what is not mHC, such as quant and moe.

Of release 1.0.0 it has all that is public; of 2.1.0, beside it, the plain functions of `mhc`, which
write into tensors that they are given and know no autograd:

- `expand_to_mhc_fwd`, `_bwd`; `mhc_pre_apply_mix_fwd`, `_bwd`, which adds to x_grad and returns the
  gradient of mix; `mhc_post_fwd`, `_bwd`; `mhc_sinkhorn_fwd`, `_bwd`; `mhc_pre_split_mixes_fwd`,
  `_bwd`; `mhc_head_compute_mix_fwd`, `_bwd`, with the gradients of scale and base in rows of
  partial sums; `mhc_multilayer_recompute`.
- Behind a matmul of the caller's, such as DeepGEMM's `tf32_hc_prenorm_gemm`:
  `mhc_reduce_partials_and_rmsnorm_fwd`, `_bwd`, and `mhc_pre_big_fuse_fwd`, whose outputs have the
  bits of the functions for its parts; `mhc_fn_normw_merge_fwd`, `_bwd`, which adds to both.

Of 1.0.0's private builders it has those that NeMo Automodel, DeepGEMM's tests, XTuner and others
import, in their modules of `mhc`: `_mhc_sinkhorn_fwd`, `_bwd`; `_mhc_pre_norm_fn_fwd_mul`,
`_bwd_mul`, with one group, `_fwd_norm`, `_bwd_norm`; `_mhc_pre_big_fuse`;
`_mhc_head_compute_mix_fwd`, `_bwd`; `_mhc_pre_split_mixes_fwd`, `_bwd`, which puts the gradients of
scale and base into row 0 of their partial sums; `_mhc_pre_apply_mix_fwd`, `_bwd`; `_mhc_post_fwd`,
`_bwd`.

What differs from TileKernels, all of it on purpose:

- Any leading dimensions, also none; n in 2, 4, 8; H from 1 to 16384; streams bfloat16, float16 or
  float32; parameters float32 or bfloat16; zero tokens; mixes with or without the last axis of size
  1. Bad input raises ShapeError or UnsupportedError instead of failing an assert.
- `n_splits` is honoured: it is the most slices of K the projection works on in parallel.
- The projection rounds to TF32 as TileKernels does (`tf32=True`), as its tests compare with a TF32
  product; `tile_mhc.projection` without it is closer to float64.
- The gradient through a gate near 0 or 1 keeps its digits, where TileKernels' is 0 from z = 17 on;
  Sinkhorn with an eps of 0 takes logits however far apart.
- `mhc_pre` applies `norm_weight` with and without a gradient; `mhc_mult` must match the residual.
- `mhc_head` runs forward and backward, on n rows of `fn` or on the first n of more.
- Gradients are plain autograd's, whatever else consumes the residual. `mhc_post` in a graph never
  hangs its gradient on the residual's storage; autograd adds the parts, each rounded to the dtype
  of the streams. A caller who hangs `grad_from_mhc_post` there, or calls `mhc_post_bwd` (which does
  it, and raises where one is pending), still gets the accumulation: see `_gradients`.
- `main_grad` of fn, norm_weight, scale and base is looked up in the backward, and all four honour
  it.
- `out` may be given with and without a gradient; one that aliases an input or is not contiguous
  raises, where TileKernels would write into a copy or corrupt what backward needs.
- `mhc_multilayer_recompute` compiles nothing anew for another number of layers, and copies nothing
  from pinned memory.
- `round_to_tf32` clears the bits that TF32 does not have, and keeps infinities.
- Streams, layer outputs and mixes that are not contiguous, as (s, b, n, d) streams rearranged to
  (b, s, n, d), are read by way of one copy, and so are gradients that come back strided. Each copy
  is counted: `copy_report()`. Nothing is looked for on the storage of what was copied, whose tokens
  have another order. The plain functions want contiguous streams; `mhc_post_fwd` and `_bwd` copy.
- `mhc_post_bwd` is in both releases, with one default apart. In `mhc` and `mhc.post_kernel` it is
  2.1.0's and posts nothing unless `fuse_grad_acc=True`; in `modeling.mhc.ops` it is 1.0.0's.
- `set_pdl` and `use_deterministic_algorithms` are kept for their getters and decide nothing: all
  kernels are launched by programmatic dependent launch, and give the same bits on every run.
  `token_block_size` decides which row of partial sums a token counts in, and nothing else.
- `mhc_pre_split_mixes_bwd` makes post_layer_mix again of the mixes and does not read it.
- The builders of the weights' product are left out, as are 2.1.0's `..._cuda` and `..._asc`
  modules; so are the quantisation, MoE, engram, transform and transpose parts.
"""

from tile_mhc.compat.tile_kernels import config, mhc, modeling, torch
from tile_mhc.compat.tile_kernels._alias import install, uninstall
from tile_mhc.compat.tile_kernels._copies import copy_report
from tile_mhc.compat.tile_kernels.config import (
    get_deterministic_algorithms,
    get_device_num_sms,
    get_max_smem_per_sm,
    get_num_sms,
    get_pdl,
    set_num_sms,
    set_pdl,
    use_deterministic_algorithms,
)

__all__ = [
    "config",
    "copy_report",
    "get_deterministic_algorithms",
    "get_device_num_sms",
    "get_max_smem_per_sm",
    "get_num_sms",
    "get_pdl",
    "install",
    "mhc",
    "modeling",
    "set_num_sms",
    "set_pdl",
    "torch",
    "uninstall",
    "use_deterministic_algorithms",
]
