"""mixes and sinkhorn in one launch, beside an aggregate that waits for neither.

DeepSeek-V4.1 collapses the streams by a pre_mix that is known before they are read, so all that
hangs on the projection is a row of mixes a token.
"""

import tilelang.language as T

from tile_mhc.kernels._common import SIMT, builder, follow_previous
from tile_mhc.kernels._shapes import SUM_LANES
from tile_mhc.kernels.mixes import logit, sigmoid
from tile_mhc.kernels.projection import norm_shape, token_mix
from tile_mhc.kernels.sinkhorn import sinkhorn_token

THREADS = 256


@builder(SIMT)
def delayed_mixes(
    n: int,
    hidden_size: int,
    many_splits: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    streams_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
):
    """The splits' sums, gates and comb of several tokens a CTA: the bits of the separate ops."""
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    num_mixes = n * (n + 2)
    size = n * hidden_size
    # Tokens whose mixes one CTA sums, a thread a mix; with many splits one token, in turns.
    sharing = SUM_LANES if many_splits else 1
    group = 1 if many_splits else THREADS // num_mixes
    turns = -(-num_mixes * sharing // THREADS) if many_splits else 1

    @T.prim_func
    def delayed_mixes_kernel(
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        x: T.Tensor[(tokens, size), streams_dtype],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        pre_mix: T.Tensor[(tokens, n), T.float32],
        post_mix: T.Tensor[(tokens, n), T.float32],
        comb_mix: T.Tensor[(tokens, n * n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        norm_eps: T.float32,
        pre_eps: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        repeat: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(T.ceildiv(tokens, group), threads=THREADS) as block:
            follow_previous()
            tid = T.get_thread_binding()
            z = T.alloc_local((1,), T.float32)
            mixed = T.alloc_local((2,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            logits = T.alloc_shared((group, num_mixes), T.float32)
            for turn in T.serial(turns):
                index = (turn * THREADS + tid) // sharing
                # A thread past the end does a mix again: its neighbours may need its sums.
                slot = T.min(index // num_mixes, group - 1)
                t = T.min(block * group + slot, tokens - 1)
                m = index % num_mixes
                token_mix(
                    products,
                    squares,
                    x,
                    weight,
                    norm_weight,
                    norm_weight_dtype,
                    splits,
                    t,
                    m,
                    1,
                    tid % sharing,
                    sharing,
                    size,
                    norm_eps,
                    tf32,
                    mixed,
                )
                if tid % sharing == 0 and index < group * num_mixes:
                    logit(mixed[0], scale[T.min(m // n, 2)], bias[m], z)
                    logits[slot, m] = z[0]
                    if block * group + slot < tokens:
                        mixes[t, m] = mixed[0]
                        if m == 0:
                            inv_rms[t] = mixed[1]
                        if m < 2 * n:
                            sigmoid(z[0], z)
                            if m < n:
                                pre_mix[t, m] = z[0] + pre_eps
                            else:
                                post_mix[t, m - n] = z[0] * post_mult
            T.sync_threads()
            if tid < group and block * group + tid < tokens:
                for i in T.unroll(n):
                    for j in T.unroll(n):
                        comb[i, j] = logits[tid, 2 * n + i * n + j]
                sinkhorn_token(comb, n, repeat, sinkhorn_eps)
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        comb_mix[block * group + tid, i * n + j] = comb[i, j]

    return delayed_mixes_kernel
