"""SGLang's mHC functions (0.5.23, DeepSeek-V4) on tile_mhc: same names, arguments and defaults.

Modules lie as SGLang's do: where `sglang.kernels.ops.layernorm.mhc` was, put
`tile_mhc.compat.sglang.kernels.ops.layernorm.mhc`. The functions are here, too, and `warm_up`,
which compiles and loads all kernels that they will launch.

What differs from SGLang, all of it on purpose:

- Products are near float32 for any number of tokens; SGLang's are float32 at a boundary of up to 32
  tokens, and TF32 elsewhere.
- The norm of the layer input takes the mean square of what it norms, which is rounded; SGLang that
  of what it had before.
- `n_splits`, `n_splits_pre` and `tile_n` change nothing: launches are sized by the number of
  tokens. `tile_mhc.config.set_batch_invariant` makes a token's bits independent of it.
- Any leading dimensions, zero tokens everywhere; n in 2, 4, 8; H from 1 to 16384; streams bfloat16,
  float16 or float32; parameters, the norm's too, float32 or bfloat16, and used as they are. Bad
  input raises ShapeError or UnsupportedError instead of failing an assert.
- They are for inference. Without a `norm_weight` gradients are those of `fused_pre`, `post_pre` and
  `contract`, not silently cut; with one, where a gradient is wanted, they raise UnsupportedError.
- No symmetric memory: outputs come from torch's allocator.
- The rest of SGLang's modules is left out.
"""

from tile_mhc.compat.sglang import kernels
from tile_mhc.compat.sglang._warm_up import warm_up
from tile_mhc.compat.sglang.kernels.ops.layernorm.mhc import (
    mhc_fused_post_pre,
    mhc_post,
    mhc_pre,
)
from tile_mhc.compat.sglang.kernels.ops.layernorm.mhc_head import fused_hc_head

__all__ = [
    "fused_hc_head",
    "kernels",
    "mhc_fused_post_pre",
    "mhc_post",
    "mhc_pre",
    "warm_up",
]
