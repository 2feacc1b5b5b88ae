"""The mHC part of DeepSeek TileKernels 1.0.0 on tile_mhc: same modules, names, arguments, defaults.

Import it from here, or call `install()` once and keep every `import tile_kernels...` as it is; with
`install(force=True)` a real tile_kernels keeps what is not mHC, such as quant and moe.

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
- Kernel builders with a leading underscore are left out, so that the modules of `mhc` that hold
  nothing else are empty; so are the quantisation, MoE, engram and transpose parts.
"""

from tile_mhc.compat.tile_kernels import config, mhc, modeling, torch
from tile_mhc.compat.tile_kernels._alias import install, uninstall

__all__ = ["config", "install", "mhc", "modeling", "torch", "uninstall"]
