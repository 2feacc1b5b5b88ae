"""mixes + sinkhorn + aggregate in one launch.

The first CTAs make post and comb, several tokens each, while the others aggregate, one token each:
the latency of Sinkhorn hides behind the bandwidth of the streams. Both sum the splits of the
projection themselves, with the macros of the separate kernels: the same bits.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    VECTOR,
    builder,
    follow_previous,
    load_streams,
    row_threads,
    weighted_sum,
)
from tile_mhc.kernels.mixes import logit
from tile_mhc.kernels.projection import token_mix
from tile_mhc.kernels.sinkhorn import sinkhorn_token


@builder(SIMT)
def fused_pre(n: int, hidden_size: int):
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    num_mixes = n * (n + 2)
    size = n * hidden_size
    threads = max(row_threads(hidden_size), -(-num_mixes // 32) * 32)
    # Tokens whose mixes one CTA sums at once, a thread a mix.
    group = threads // num_mixes

    @T.prim_func
    def fused_pre_kernel(
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        scale: T.Tensor[(3,), T.float32],
        bias: T.Tensor[(num_mixes,), T.float32],
        residual: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(num_mixes, size), T.float32],
        layer_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
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
        with T.Kernel(T.ceildiv(tokens, group) + tokens, threads=threads) as block:
            follow_previous()
            tid = T.get_thread_binding()
            mix_blocks = T.ceildiv(tokens, group)
            mixed = T.alloc_local((2,), T.float32)
            z = T.alloc_local((1,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            mix = T.alloc_local((n,), T.float32)
            streams = T.alloc_local((n, VECTOR), T.bfloat16)
            total = T.alloc_local((VECTOR,), T.float32)
            logits = T.alloc_shared((group, num_mixes), T.float32)
            if block < mix_blocks:
                t = block * group + tid // num_mixes
                m = tid % num_mixes
                if tid < group * num_mixes and t < tokens and m >= n:
                    token_mix(
                        products, squares, x, weight, splits, t, m, size, norm_eps, tf32, mixed
                    )
                    mixes[t, m] = mixed[0]
                    logit(mixed[0], scale[T.min(m // n, 2)], bias[m], z)
                    if m < 2 * n:
                        post_mix[t, m - n] = T.sigmoid(z[0]) * post_mult
                    logits[tid // num_mixes, m] = z[0]
            else:
                # Asked for before the mixes are summed: the two latencies overlap.
                if tid * VECTOR < hidden_size:
                    load_streams(residual, block - mix_blocks, tid * VECTOR, n, streams)
                if tid < n:
                    token_mix(
                        products,
                        squares,
                        x,
                        weight,
                        splits,
                        block - mix_blocks,
                        tid,
                        size,
                        norm_eps,
                        tf32,
                        mixed,
                    )
                    mixes[block - mix_blocks, tid] = mixed[0]
                    if tid == 0:
                        inv_rms[block - mix_blocks] = mixed[1]
                    logit(mixed[0], scale[0], bias[tid], z)
                    logits[0, tid] = T.sigmoid(z[0]) + pre_eps
            T.sync_threads()
            if block < mix_blocks:
                if tid < group and block * group + tid < tokens:
                    for i in T.unroll(n):
                        for j in T.unroll(n):
                            comb[i, j] = logits[tid, 2 * n + i * n + j]
                    sinkhorn_token(comb, n, repeat, sinkhorn_eps)
                    for i in T.unroll(n):
                        for j in T.vectorized(n):
                            comb_mix[block * group + tid, i * n + j] = comb[i, j]
            else:
                for i in T.unroll(n):
                    mix[i] = logits[0, i]
                for c in T.serial(T.ceildiv(hidden_size, threads * VECTOR)):
                    h = (c * threads + tid) * VECTOR
                    if h < hidden_size:
                        if c > 0:
                            load_streams(residual, block - mix_blocks, h, n, streams)
                        weighted_sum(mix, streams, n, total)
                        for v in T.vectorized(VECTOR):
                            layer_input[block - mix_blocks, h + v] = T.cast(total[v], T.bfloat16)

    return fused_pre_kernel
