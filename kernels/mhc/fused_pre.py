"""mixes + sinkhorn + aggregate in one launch.

The first CTAs make post and comb, several tokens each, while the others aggregate, one token each:
the latency of Sinkhorn hides behind the bandwidth of the streams. Both sum the splits of the
projection themselves, with the macros of the separate kernels: the same bits. With a
`layer_norm_dtype` who has aggregated a token takes its norm, too.
"""

from typing import Any

import tilelang.language as T
from tilelang import PassConfigKey

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import (
    READS_LAST,
    SIMT,
    builder,
    follow_previous,
    load_streams,
    row_threads,
    row_vector,
    weighted_sum,
)
from tile_mhc.kernels._norm import normed_row
from tile_mhc.kernels._shapes import SUM_LANES
from tile_mhc.kernels._weights import norm_shape
from tile_mhc.kernels.mixes import logit, sigmoid
from tile_mhc.kernels.projection import token_mix
from tile_mhc.kernels.sinkhorn import sinkhorn_token


@T.macro
def gated_aggregate(
    products: T.Tensor,
    squares: T.Tensor,
    x: T.Tensor,
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_weight_dtype: str,
    splits: T.int32,
    sharing: int,
    t: T.int32,
    n: int,
    hidden_size: int,
    threads: int,
    vector: int,
    scale: T.Tensor,
    bias: T.Tensor,
    residual: T.Tensor,
    out: T.Tensor,
    mixes: T.Tensor,
    inv_rms: T.Tensor,
    norm_eps: T.float32,
    pre_eps: T.float32,
    tf32: T.int32,
    post_mix: T.Tensor = None,
    post_eps: T.float32 = 0.0,
    post_mult: T.float32 = 1.0,
):
    """What one CTA does for token t: its first n mixes, their gate, and the streams it weighs.

    With a `post_mix` of the next n mixes too, and their gate, which goes there.
    """
    tid = T.get_thread_binding()
    count = n if post_mix is None else 2 * n
    mixed = T.alloc_local((2,), T.float32)
    z = T.alloc_local((1,), T.float32)
    gate = T.alloc_shared((n,), T.float32)
    mix = T.alloc_local((n,), T.float32)
    streams = T.alloc_local((n, vector), residual.dtype)
    total = T.alloc_local((vector,), T.float32)
    # Asked for before the mixes are summed: the two latencies overlap.
    if tid * vector < hidden_size:
        load_streams(residual, t, tid * vector, n, streams)
    # Whole warps where neighbours share a mix.
    if tid < (max(32, count * sharing) if sharing > 1 else count):
        size = n * hidden_size
        m = T.min(tid // sharing, count - 1)
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
        if tid % sharing == 0 and tid < count * sharing:
            mixes[t, m] = mixed[0]
            if tid == 0:
                inv_rms[t] = mixed[1]
            if post_mix is None:
                logit(mixed[0], scale[0], bias[m], z)
                sigmoid(z[0], z)
                gate[m] = z[0] + pre_eps
            else:
                logit(mixed[0], scale[m // n], bias[m], z)
                sigmoid(z[0], z)
                if m < n:
                    gate[m] = z[0] + pre_eps
                else:
                    post_mix[t, m - n] = z[0] * post_mult + post_eps
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


def _pass_configs(
    _n: int, _hidden_size: int, many_splits: bool, *_dtypes: str
) -> dict[PassConfigKey, Any]:
    # Many splits stand for few tokens: L2 holds their streams for the post as well.
    return SIMT if many_splits else READS_LAST


def pre_kernel(
    n: int,
    hidden_size: int,
    many_splits: bool,
    weight_dtype: str,
    norm_weight_dtype: str,
    streams_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    layer_norm_dtype: str,
    limits: Architecture,
) -> Any:
    """The prim_func of `fused_pre`; without a `weight_dtype` the products are not of ours."""
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    num_mixes = n * (n + 2)
    size = n * hidden_size
    vector = row_vector(hidden_size, streams_dtype)
    threads = max(row_threads(hidden_size, vector), -(-num_mixes // 32) * 32, n * SUM_LANES)
    ctas = limits.warps(limits.sinkhorn_registers) // (threads // 32)
    norms = layer_norm_dtype != ""
    weight_shape = (num_mixes, size) if weight_dtype else (1, 1)
    # Tokens whose mixes one CTA sums, a thread a mix; with many splits one token, in turns.
    sharing = SUM_LANES if many_splits else 1
    group = 1 if many_splits else threads // num_mixes
    turns = -(-num_mixes * sharing // threads) if many_splits else 1

    @T.prim_func
    def fused_pre_kernel(
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        x: T.Tensor[(tokens, size), streams_dtype],
        weight: T.Tensor[weight_shape, weight_dtype or T.float32],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        layer_input: T.Tensor[(tokens, hidden_size), streams_dtype],
        post_mix: T.Tensor[(tokens, n), T.float32],
        comb_mix: T.Tensor[(tokens, n * n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        layer_norm_weight: T.Tensor[(hidden_size if norms else 1,), layer_norm_dtype or T.float32],
        norm_eps: T.float32,
        pre_eps: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        layer_norm_eps: T.float32,
        repeat: T.int32,
        tf32: T.int32,
    ):
        mix_blocks = T.ceildiv(tokens, group)
        with T.Kernel(mix_blocks + tokens, threads=threads) as block:
            follow_previous()
            if n < 8:
                T.annotate_min_blocks_per_sm(ctas)
            tid = T.get_thread_binding()
            z = T.alloc_local((1,), T.float32)
            mixed = T.alloc_local((2,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            logits = T.alloc_shared((group, num_mixes), T.float32)
            if block < mix_blocks:
                for turn in T.serial(turns):
                    index = (turn * threads + tid) // sharing
                    # A thread past the end does a mix again: its neighbours may need its sums.
                    slot = T.min(index // num_mixes, group - 1)
                    t = T.min(block * group + slot, tokens - 1)
                    m = index % num_mixes
                    if many_splits or m >= n:
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
                    if m >= n and tid % sharing == 0 and index < group * num_mixes:
                        logit(mixed[0], scale[T.min(m // n, 2)], bias[m], z)
                        logits[slot, m] = z[0]
                        if block * group + slot < tokens:
                            mixes[t, m] = mixed[0]
                            if m < 2 * n:
                                sigmoid(z[0], z)
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
            else:
                gated_aggregate(
                    products,
                    squares,
                    x,
                    weight,
                    norm_weight,
                    norm_weight_dtype,
                    splits,
                    sharing,
                    block - mix_blocks,
                    n,
                    hidden_size,
                    threads,
                    vector,
                    scale,
                    bias,
                    residual,
                    layer_input,
                    mixes,
                    inv_rms,
                    norm_eps,
                    pre_eps,
                    tf32,
                )
                if norms:
                    normed_row(
                        layer_input,
                        layer_norm_weight,
                        block - mix_blocks,
                        hidden_size,
                        threads,
                        vector,
                        layer_norm_eps,
                    )

    return fused_pre_kernel


@builder(_pass_configs)
def fused_pre(
    n: int,
    hidden_size: int,
    many_splits: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    streams_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    layer_norm_dtype: str,
    limits: Architecture,
):
    return pre_kernel(
        n,
        hidden_size,
        many_splits,
        weight_dtype,
        norm_weight_dtype,
        streams_dtype,
        scale_dtype,
        bias_dtype,
        layer_norm_dtype,
        limits,
    )
