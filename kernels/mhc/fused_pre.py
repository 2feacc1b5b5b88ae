"""mixes + sinkhorn + aggregate in one launch.

The first CTAs make post and comb, several tokens each, while the others aggregate, one token each:
the latency of Sinkhorn hides behind the bandwidth of the streams. Both sum the splits of the
projection themselves, with the macros of the separate kernels: the same bits.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    builder,
    follow_previous,
    load_streams,
    row_threads,
    row_vector,
    weighted_sum,
)
from tile_mhc.kernels.mixes import logit
from tile_mhc.kernels.projection import norm_shape, token_mix
from tile_mhc.kernels.sinkhorn import sinkhorn_token

# What Sinkhorn's CTAs need at n = 4; the others need less, and more of them hide latency better.
REGISTERS = 48


@T.macro
def gated_aggregate(
    products: T.Tensor,
    squares: T.Tensor,
    x: T.Tensor,
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_dtype: str,
    splits: T.int32,
    t: T.int32,
    n: int,
    hidden_size: int,
    threads: int,
    vector: int,
    scale: T.PrimExpr,
    bias: T.Tensor,
    residual: T.Tensor,
    out: T.Tensor,
    mixes: T.Tensor,
    inv_rms: T.Tensor,
    norm_eps: T.float32,
    pre_eps: T.float32,
    tf32: T.int32,
):
    """What one CTA does for token t: its first n mixes, their gate, and the streams it weighs."""
    tid = T.get_thread_binding()
    mixed = T.alloc_local((2,), T.float32)
    z = T.alloc_local((1,), T.float32)
    gate = T.alloc_shared((n,), T.float32)
    mix = T.alloc_local((n,), T.float32)
    streams = T.alloc_local((n, vector), residual.dtype)
    total = T.alloc_local((vector,), T.float32)
    # Asked for before the mixes are summed: the two latencies overlap.
    if tid * vector < hidden_size:
        load_streams(residual, t, tid * vector, n, streams)
    if tid < n:
        size = n * hidden_size
        token_mix(
            products,
            squares,
            x,
            weight,
            norm_weight,
            norm_dtype,
            splits,
            t,
            tid,
            size,
            norm_eps,
            tf32,
            mixed,
        )
        mixes[t, tid] = mixed[0]
        if tid == 0:
            inv_rms[t] = mixed[1]
        logit(mixed[0], scale, bias[tid], z)
        gate[tid] = T.sigmoid(z[0]) + pre_eps
    T.sync_threads()
    for i in T.unroll(n):
        mix[i] = gate[i]
    for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
        h = (c * threads + tid) * vector
        if h < hidden_size:
            if c > 0:
                load_streams(residual, t, h, n, streams)
            weighted_sum(mix, streams, n, total)
            for v in T.vectorized(vector):
                out[t, h + v] = T.cast(total[v], out.dtype)


@builder(SIMT)
def fused_pre(
    n: int,
    hidden_size: int,
    weight_dtype: str = "float32",
    norm_dtype: str = "",
    dtype: str = "bfloat16",
    scale_dtype: str = "float32",
    bias_dtype: str = "float32",
):
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    num_mixes = n * (n + 2)
    size = n * hidden_size
    vector = row_vector(hidden_size, dtype)
    threads = max(row_threads(hidden_size, vector), -(-num_mixes // 32) * 32)
    # Tokens whose mixes one CTA sums at once, a thread a mix.
    group = threads // num_mixes

    @T.prim_func
    def fused_pre_kernel(
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), dtype],
        x: T.Tensor[(tokens, size), dtype],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_dtype), norm_dtype or T.float32],
        layer_input: T.Tensor[(tokens, hidden_size), dtype],
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
            if n < 8:
                T.annotate_min_blocks_per_sm(65536 // (REGISTERS * threads))
            tid = T.get_thread_binding()
            mix_blocks = T.ceildiv(tokens, group)
            mixed = T.alloc_local((2,), T.float32)
            z = T.alloc_local((1,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            logits = T.alloc_shared((group, num_mixes), T.float32)
            if block < mix_blocks:
                t = block * group + tid // num_mixes
                m = tid % num_mixes
                if tid < group * num_mixes and t < tokens and m >= n:
                    token_mix(
                        products,
                        squares,
                        x,
                        weight,
                        norm_weight,
                        norm_dtype,
                        splits,
                        t,
                        m,
                        size,
                        norm_eps,
                        tf32,
                        mixed,
                    )
                    mixes[t, m] = mixed[0]
                    logit(mixed[0], scale[T.min(m // n, 2)], bias[m], z)
                    if m < 2 * n:
                        post_mix[t, m - n] = T.sigmoid(z[0]) * post_mult
                    logits[tid // num_mixes, m] = z[0]
                T.sync_threads()
                if tid < group and block * group + tid < tokens:
                    for i in T.unroll(n):
                        for j in T.unroll(n):
                            comb[i, j] = logits[tid, 2 * n + i * n + j]
                    sinkhorn_token(comb, n, repeat, sinkhorn_eps)
                    for i in T.unroll(n):
                        for j in T.vectorized(n):
                            comb_mix[block * group + tid, i * n + j] = comb[i, j]
            else:
                gated_aggregate(
                    products,
                    squares,
                    x,
                    weight,
                    norm_weight,
                    norm_dtype,
                    splits,
                    block - mix_blocks,
                    n,
                    hidden_size,
                    threads,
                    vector,
                    scale[0],
                    bias,
                    residual,
                    layer_input,
                    mixes,
                    inv_rms,
                    norm_eps,
                    pre_eps,
                    tf32,
                )

    return fused_pre_kernel
