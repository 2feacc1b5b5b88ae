"""A pre whose collapse waits for no projection: one pass over the streams, then a row a token.

DeepSeek-V4.1 collapses the streams by a pre_mix that is known before they are read. So whoever has
a tile of them in shared memory projects it, takes its squares and collapses it: see
`forward_pass`, which may make the tile too, by a post. All that is left is the mixes, once their
sums are whole.

n = 4, bfloat16 streams and an H that is a multiple of 64; other streams take the kernels of
`projection` and `aggregate`.
"""

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._backward import projection_backward
from tile_mhc.kernels._boundary import (
    MIXES,
    STREAMS,
    THREADS,
    backward_pass,
    forward_pass,
    num_sums,
    weight_shapes,
)
from tile_mhc.kernels._common import (
    SIMT,
    VECTOR,
    builder,
    follow_previous,
    follow_previous_at_last,
    follow_previous_unless,
    row_vector,
)
from tile_mhc.kernels._norm import normed_row
from tile_mhc.kernels._shapes import DELAYED_COLUMNS, SUM_LANES, factors_width, padded
from tile_mhc.kernels._weights import high_part, low_part, norm_shape
from tile_mhc.kernels.mixes import logit, sigmoid, sum_column
from tile_mhc.kernels.projection import (
    AT_ONCE,
    token_mix,
    weight_value,
)
from tile_mhc.kernels.sinkhorn import sinkhorn_token


@builder(SIMT)
def weight_parts(num_mixes: int, size: int, *, weight_dtype: str, norm_weight_dtype: str):
    """The weight as two bfloat16 parts, once a call: every tile of tokens reads it again."""
    groups = -(-size // (THREADS * VECTOR))

    @T.prim_func
    def weight_parts_kernel(
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        parts: T.Tensor[(2 * num_mixes, size), T.bfloat16],
        tf32: T.int32,
    ):
        with T.Kernel(groups, 2 * num_mixes, threads=THREADS) as (group, row):
            follow_previous()
            k = (group * THREADS + T.get_thread_binding()) * VECTOR
            values = T.alloc_local((VECTOR,), T.float32)
            if k < size:
                for v in T.unroll(VECTOR):
                    values[v] = weight_value(
                        weight, norm_weight, norm_weight_dtype, row % num_mixes, k + v, tf32
                    )
                if row < num_mixes:
                    for v in T.vectorized(VECTOR):
                        parts[row, k + v] = high_part(values[v])
                else:
                    for v in T.vectorized(VECTOR):
                        parts[row, k + v] = low_part(values[v])

    return weight_parts_kernel


@builder({})
def delayed_pre_fwd(
    hidden_size: int,
    splits_weight: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    limits: Architecture,
):
    """Products, squares and the layer input of streams that there are."""
    of_weight = (splits_weight, weight_dtype, norm_weight_dtype)
    body, tokens, splits, size = forward_pass(hidden_size, False, True, *of_weight, limits)
    read, norm = weight_shapes(hidden_size, *of_weight)

    @T.prim_func
    def delayed_pre_fwd_kernel(
        x: T.Tensor[(tokens, size), T.bfloat16],
        pre_mix: T.Tensor[(tokens, STREAMS), T.float32],
        weight: T.Tensor[read[0], read[1]],
        norm_weight: T.Tensor[norm[0], norm[1]],
        layer_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        products: T.Tensor[(splits, tokens, MIXES), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        blocks: T.int32,
        tf32: T.int32,
    ):
        body(
            None,
            x,
            None,
            None,
            pre_mix,
            weight,
            norm_weight,
            None,
            layer_input,
            products,
            squares,
            blocks,
            tf32,
        )

    return delayed_pre_fwd_kernel


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
    layer_norm_dtype: str,
):
    """The splits' sums, gates and comb of several tokens a CTA: the bits of the separate ops.

    With a `layer_norm_dtype` others take a token of the layer input each, and its norm: what the
    pass before has left in L2, beside the latency of Sinkhorn.
    """
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    num_mixes = n * (n + 2)
    size = n * hidden_size
    # Tokens whose mixes one CTA sums, a thread a mix; with many splits one token, in turns.
    sharing = SUM_LANES if many_splits else 1
    group = 1 if many_splits else THREADS // num_mixes
    turns = -(-num_mixes * sharing // THREADS) if many_splits else 1
    norms = layer_norm_dtype != ""
    vector = row_vector(hidden_size, streams_dtype)

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
        layer_input: T.Tensor[(tokens, hidden_size) if norms else (1,), streams_dtype],
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
        with T.Kernel(mix_blocks + (tokens if norms else 0), threads=THREADS) as block:
            follow_previous()
            tid = T.get_thread_binding()
            z = T.alloc_local((1,), T.float32)
            mixed = T.alloc_local((2,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            logits = T.alloc_shared((group, num_mixes), T.float32)
            if block < mix_blocks:
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
            if norms and block >= mix_blocks:
                normed_row(
                    layer_input,
                    layer_norm_weight,
                    block - mix_blocks,
                    hidden_size,
                    THREADS,
                    vector,
                    layer_norm_eps,
                )

    return delayed_mixes_kernel


@builder({})
def delayed_pre_bwd(
    hidden_size: int, *, weight_dtype: str, norm_weight_dtype: str, limits: Architecture
):
    """Gradients of streams, weight (by slices of tokens) and pre_mix (by columns) in one pass: that
    of `projection_bwd`, with the sums for the pre_mix, which is not that of the same streams.
    """
    size = STREAMS * hidden_size
    of_tensors = ("", norm_weight_dtype, "")
    body, tokens, slices = projection_backward(MIXES, size, STREAMS, True, *of_tensors, limits)

    @T.prim_func
    def delayed_pre_bwd_kernel(
        grad_parts: T.Tensor[(tokens, 2 * padded(MIXES)), T.bfloat16],
        factors: T.Tensor[(tokens, factors_width(STREAMS)), T.float32],
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        grad_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        grad_x: T.Tensor[(tokens, size), T.bfloat16],
        sums: T.Tensor[(hidden_size // DELAYED_COLUMNS, tokens, STREAMS), T.float32],
        partials: T.Tensor[(slices, MIXES, size), T.float32],
        slice_tokens: T.int32,
        tf32: T.int32,
    ):
        body(
            grad_parts,
            factors,
            x,
            weight,
            norm_weight,
            grad_input,
            None,
            grad_x,
            sums,
            partials,
            slice_tokens,
            tf32,
        )

    return delayed_pre_bwd_kernel


@builder({})
def delayed_pre_add_bwd(
    hidden_size: int,
    *,
    held_dtype: str,
    weight_dtype: str,
    norm_weight_dtype: str,
    limits: Architecture,
):
    """The same on top of a gradient that the streams have: the pass of `post_pre_bwd`, without the
    post. Of `projection_bwd` a CTA would have half of the columns, and be slower with few tokens.

    H200, 2026-11, us of this one and of that: 440 and 436 at 8192x7168, 27.5 and 30 at 128x7168.
    """
    body, tokens, slices, size = backward_pass(hidden_size, False, True, norm_weight_dtype, limits)

    @T.prim_func
    def delayed_pre_add_bwd_kernel(
        grad_parts: T.Tensor[(tokens, 2 * padded(MIXES)), T.bfloat16],
        factors: T.Tensor[(tokens, factors_width(STREAMS)), T.float32],
        x: T.Tensor[(tokens, STREAMS, hidden_size), T.bfloat16],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        grad_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        held: T.Tensor[(tokens, STREAMS, hidden_size), held_dtype],
        grad_x: T.Tensor[(tokens, STREAMS, hidden_size), T.bfloat16],
        sums: T.Tensor[(hidden_size // DELAYED_COLUMNS, tokens, num_sums(False)), T.float32],
        partials: T.Tensor[(slices, MIXES, size), T.float32],
        slice_tokens: T.int32,
        tf32: T.int32,
    ):
        body(
            grad_parts,
            factors,
            None,
            x,
            None,
            None,
            weight,
            norm_weight,
            grad_input,
            held,
            None,
            grad_x,
            sums,
            partials,
            slice_tokens,
            tf32,
        )

    return delayed_pre_add_bwd_kernel


@builder(SIMT)
def delayed_sums(
    num_sums: int, hidden_size: int, directed: bool, *, scale_dtype: str, bias_dtype: str
):
    """Sum what the columns of a backward have left by token, in order: each warp of a CTA those of
    every fourth block, as a thread that has all waits for one load after another.

    The last four are the gradient of pre_mix; before them those of comb_mix and post_mix. The first
    CTAs do what `column_sums` does of the gates: one launch for both. Like that it may run `beside`
    the kernel before it.
    """
    tokens = T.dynamic("num_tokens")
    blocks = hidden_size // DELAYED_COLUMNS
    rows = T.dynamic("num_partials")
    every = num_sums > STREAMS
    combs = STREAMS * STREAMS
    columns = MIXES + 3
    warps = THREADS // 32

    @T.prim_func
    def delayed_sums_kernel(
        sums: T.Tensor[(blocks, tokens, num_sums), T.float32],
        grad_comb: T.Tensor[(tokens, combs) if every else (1,), T.float32],
        grad_post: T.Tensor[(tokens, STREAMS) if every else (1,), T.float32],
        grad_pre: T.Tensor[(tokens, STREAMS), T.float32],
        partials: T.Tensor[(rows, columns), T.float32],
        grad_bias: T.Tensor[(MIXES,), bias_dtype],
        grad_scale: T.Tensor[(3,), scale_dtype],
        adds_bias: T.int32,
        adds_scale: T.int32,
        beside: T.int32,
    ):
        with T.Kernel(columns + T.ceildiv(tokens * num_sums, 32), threads=THREADS) as block:
            follow_previous_unless(beside)
            if block < columns:
                sum_column(
                    partials, block, THREADS, directed, grad_bias, grad_scale, adds_bias, adds_scale
                )
            else:
                tid = T.get_thread_binding()
                index = (block - columns) * 32 + tid % 32
                t = index // num_sums
                k = index % num_sums
                total = T.alloc_local((1,), T.float32)
                parts = T.alloc_local((AT_ONCE,), T.float32)
                warp_sums = T.alloc_shared((warps, 32), T.float32)
                total[0] = 0.0
                if t < tokens:
                    for turn in T.serial(T.ceildiv(blocks, AT_ONCE * warps)):
                        for i in T.unroll(AT_ONCE):
                            b = (turn * AT_ONCE + i) * warps + tid // 32
                            if b < blocks:
                                parts[i] = sums[b, t, k]
                        for i in T.unroll(AT_ONCE):
                            b = (turn * AT_ONCE + i) * warps + tid // 32
                            if b < blocks:
                                total[0] += parts[i]
                warp_sums[tid // 32, tid % 32] = total[0]
                T.sync_threads()
                if tid < 32 and t < tokens:
                    total[0] = 0.0
                    for w in T.unroll(warps):
                        total[0] += warp_sums[w, tid]
                    if k >= num_sums - STREAMS:
                        grad_pre[t, k - (num_sums - STREAMS)] = total[0]
                    elif every:
                        if k < combs:
                            grad_comb[t, k] = total[0]
                        else:
                            grad_post[t, k - combs] = total[0]
            follow_previous_at_last(beside)

    return delayed_sums_kernel
