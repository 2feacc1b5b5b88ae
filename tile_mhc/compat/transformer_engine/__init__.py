"""The mHC part of TransformerEngine (main, d0067d0) on tile_mhc: same names, arguments, defaults.

Streams lie innermost, (s, b, C, n), and are read and written so. Import the functions from here, or
call `install()` once and keep `from transformer_engine.pytorch.triton.mhc import ...` as it is:
that module, and nothing else of TransformerEngine, is then this package's.

What differs from TransformerEngine, all of it on purpose:

- Every gradient is deterministic, whatever NVTE_ALLOW_NONDETERMINISTIC_ALGO says; `use_split_k` is
  accepted with and without it. K is always split as far as fills the GPU, and summed in order.
- Products are near float32 with and without `use_tf32`: TF32 would be no faster.
- `recompute_hist` changes nothing: the backward of the Sinkhorn keeps its steps in shared memory,
  not in global memory.
- Any leading dimensions, also none, and zero tokens; as many tokens as fit. Bad input raises
  ShapeError or UnsupportedError instead of failing an assert; n is 4 here too. Streams that are not
  contiguous raise, where TransformerEngine copies them.
- `fused_grad_x_acc_buffer`: the first backward that has a gradient for it overwrites it, whichever
  op that is, and later ones add: a chain without `mhc_fused_expand_combine`, or with two, is right
  too. The projection's backward returns a new tensor, never the buffer itself, so that layers may
  share one in float32 as well. A gradient of one forward in the way of another's raises. See
  `_accumulation`.
- The three results of `mhc_fused_scale` are contiguous, no views of one padded tensor, and an
  `alpha` and a `beta` of different dtypes each get a gradient of their own.
- The gradient of H has zeros in the columns of padding, and the RMS epsilon is float32's for every
  dtype of `ms`.
- Without `mhc_fused_*` classes and kernels: `mHCProjectionOp` and its like are left out, and so is
  the rest of TransformerEngine.
"""

from tile_mhc.compat.transformer_engine import pytorch
from tile_mhc.compat.transformer_engine._alias import install, uninstall
from tile_mhc.compat.transformer_engine.pytorch.triton.mhc import (
    mhc_fused_aggregate,
    mhc_fused_expand_combine,
    mhc_fused_projection,
    mhc_fused_scale,
    mhc_fused_sinkhorn,
    mhc_generate_mix_and_aggregate,
)

__all__ = [
    "install",
    "mhc_fused_aggregate",
    "mhc_fused_expand_combine",
    "mhc_fused_projection",
    "mhc_fused_scale",
    "mhc_fused_sinkhorn",
    "mhc_generate_mix_and_aggregate",
    "pytorch",
    "uninstall",
]
