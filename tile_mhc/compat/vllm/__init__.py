"""vLLM's mHC functions (0.33.0, DeepSeek-V4 and V4.1) on tile_mhc: same names, arguments, defaults.

Modules lie as vLLM's do: where `vllm.model_executor.kernels.mhc.tilelang` was, put
`tile_mhc.compat.vllm.model_executor.kernels.mhc.tilelang`. The functions are here, too, and
`warm_up`, which compiles and loads all kernels that they will launch.

What differs from vLLM, all of it on purpose:

- Products are near float32 for any number of tokens, and of the streams as they are rounded; vLLM's
  are TF32, but at a boundary of up to 32 tokens float32, and of streams that are not rounded yet.
- The norm of the layer input takes the mean square of what it norms, which is rounded: as vLLM's
  delayed functions do, and its others do not.
- `n_splits` and `tile_n` change nothing, as in vLLM: launches are sized by the number of tokens.
  `tile_mhc.config.set_batch_invariant` makes a token's bits independent of it.
- Any leading dimensions; n in 2, 4, 8; H from 1 to 16384; streams bfloat16, float16 or float32;
  parameters, the norm's too, float32 or bfloat16, and used as they are; mixes with or without the
  last axis of size 1. Bad input raises ShapeError or UnsupportedError instead of failing an assert.
- They are for inference. Without a `norm_weight` gradients are those of `fused_pre`, `post_pre` and
  `contract`, not silently cut; with one, where a gradient is wanted, they raise UnsupportedError.
- They are functions, no operators of `torch.ops.vllm`: what they call are operators, of
  `torch.ops.tile_mhc`. The layers (`MHCPreOp` and its like) and `mhc_pre_broadcast_tilelang` are
  left out.
"""

from tile_mhc.compat.vllm import model_executor
from tile_mhc.compat.vllm._warm_up import warm_up
from tile_mhc.compat.vllm.model_executor.kernels.mhc.tilelang import (
    hc_head_fused_kernel_tilelang,
    mhc_fused_post_pre_delayed_tilelang,
    mhc_fused_post_pre_tilelang,
    mhc_post_tilelang,
    mhc_pre_delayed_tilelang,
    mhc_pre_tilelang,
)

__all__ = [
    "hc_head_fused_kernel_tilelang",
    "mhc_fused_post_pre_delayed_tilelang",
    "mhc_fused_post_pre_tilelang",
    "mhc_post_tilelang",
    "mhc_pre_delayed_tilelang",
    "mhc_pre_tilelang",
    "model_executor",
    "warm_up",
]
