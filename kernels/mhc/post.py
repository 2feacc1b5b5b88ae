"""1 -> n, plus stream mixing (expand-combine).

out[t, j, h] = post_mix[t, j] * layer_output[t, h] + sum_i comb_mix[t, i, j] * residual[t, i, h]
grad_output[t, h] = sum_j post_mix[t, j] * grad[t, j, h]
grad_residual[t, i, h] = sum_j comb_mix[t, i, j] * grad[t, j, h]
grad_post[t, j] = sum_h layer_output[t, h] * grad[t, j, h]
grad_comb[t, i, j] = sum_h residual[t, i, h] * grad[t, j, h]

With a bias of the layer, layer_output[t, h] + bias[h] takes the place of layer_output[t, h], and
grad_bias[h] = sum_t grad_output[t, h], before that is rounded.
"""

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import (
    SIMT,
    add_streams,
    block_sums,
    builder,
    follow_previous,
    load_streams,
    row_chunks,
    row_threads,
    row_vector,
    sum_lanes,
    sums_shape,
)

# post_bwd of few tokens: as many threads as have the registers that it wants, with four streams
# 128. H200, 2026-11, us with these and with 128: 12.4 and 15.2 at 128x7168, 6.5 and 8.3 at 16x4096;
# with more tokens than SMs 18.9 and 18.1.
FEW_TOKENS_THREADS = 512
FEW_TOKENS_THREADS_OF_EIGHT = 256


@T.macro
def combine(
    post: T.Buffer,
    comb: T.Buffer,
    output: T.Buffer,
    streams: T.Buffer,
    j: T.int32,
    n: int,
    total: T.Buffer,
):
    """total[v] = post[j] * output[v] + sum_i comb[i, j] * streams[i, v]: a post's arithmetic."""
    for v in T.unroll(total.shape[0]):
        total[v] = post[j] * T.cast(output[v], T.float32)
    for i in T.unroll(n):
        for v in T.unroll(total.shape[0]):
            total[v] += comb[i, j] * T.cast(streams[i, v], T.float32)


@T.macro
def load_output(layer_output: T.Tensor, bias: T.Tensor, t: T.int32, h: T.int32, output: T.Buffer):
    """output = layer_output[t, h : h + vector], plus the bias in float32 if there is one."""
    if bias is None:
        for v in T.vectorized(output.shape[0]):
            output[v] = layer_output[t, h + v]
    else:
        for v in T.vectorized(output.shape[0]):
            output[v] = T.cast(layer_output[t, h + v], T.float32) + T.cast(bias[h + v], T.float32)


@builder(SIMT)
def post_fwd(n: int, hidden_size: int, *, streams_dtype: str, layer_bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)
    has_bias = layer_bias_dtype != ""

    @T.macro
    def forward(
        layer_output: T.Tensor,
        residual: T.Tensor,
        post_mix: T.Tensor,
        comb_mix: T.Tensor,
        out: T.Tensor,
        bias: T.Tensor,
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            streams = T.alloc_local((n, vector), streams_dtype)
            output = T.alloc_local((vector,), "float32" if has_bias else streams_dtype)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            total = T.alloc_local((vector,), T.float32)
            if h < hidden_size:
                load_streams(residual, t, h, n, streams)
                load_output(layer_output, bias, t, h, output)
                for i in T.unroll(n):
                    post[i] = post_mix[t, i]
                    for j in T.vectorized(n):
                        comb[i, j] = comb_mix[t, i, j]
                for j in T.unroll(n):
                    combine(post, comb, output, streams, j, n, total)
                    for v in T.vectorized(vector):
                        out[t, j, h + v] = T.cast(total[v], streams_dtype)

    if not has_bias:

        @T.prim_func
        def post_fwd_kernel(
            layer_output: T.Tensor[(tokens, hidden_size), streams_dtype],
            residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
            post_mix: T.Tensor[(tokens, n), T.float32],
            comb_mix: T.Tensor[(tokens, n, n), T.float32],
            out: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        ):
            forward(layer_output, residual, post_mix, comb_mix, out, None)

        return post_fwd_kernel

    @T.prim_func
    def post_biased_fwd_kernel(
        layer_output: T.Tensor[(tokens, hidden_size), streams_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        post_mix: T.Tensor[(tokens, n), T.float32],
        comb_mix: T.Tensor[(tokens, n, n), T.float32],
        out: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        bias: T.Tensor[(hidden_size,), layer_bias_dtype],
    ):
        forward(layer_output, residual, post_mix, comb_mix, out, bias)

    return post_biased_fwd_kernel


@builder(SIMT)
def post_bwd(
    n: int,
    hidden_size: int,
    few_tokens: bool,
    *,
    streams_dtype: str,
    layer_bias_dtype: str,
    into_dtype: str,
    limits: Architecture,
):
    """All gradients of a token; with a bias of a slice of tokens, and their sum for the bias.

    With `into_dtype` the gradient of the residual may be added to what is there. Of `few_tokens` an
    SM has one, and it is the latency of memory that takes time: more threads go through a token in
    fewer steps.
    """
    tokens = T.dynamic("num_tokens")
    slices = T.dynamic("num_slices")
    num_sums = n * (n + 1)
    directed = into_dtype != ""
    target = into_dtype or streams_dtype
    # Eight streams and float32 sums of theirs are too many registers for accesses of eight.
    vector = row_vector(hidden_size, target if n == 8 else streams_dtype)
    # One thread a sum at least, to write them.
    limit = 128
    if few_tokens:
        limit = FEW_TOKENS_THREADS if n < 8 else FEW_TOKENS_THREADS_OF_EIGHT
    threads = max(row_threads(hidden_size, vector, limit), -(-num_sums // 32) * 32)
    # H200, 2026-11: the sums live in registers, and left alone the compiler takes 134 at n = 4, so
    # that too few threads fit to cover the latency of memory: 535 us at T=8192 H=7168, against 393
    # us with this. 160 threads would have to spill.
    blocks_per_sm = limits.post_ctas if n < 8 else limits.post_ctas_of_eight
    if few_tokens:
        blocks_per_sm = 1
    lanes = sum_lanes(num_sums, threads)
    has_bias = layer_bias_dtype != ""

    @T.macro
    def backward(
        grad: T.Tensor,
        layer_output: T.Tensor,
        residual: T.Tensor,
        post_mix: T.Tensor,
        comb_mix: T.Tensor,
        grad_output: T.Tensor,
        grad_residual: T.Tensor,
        grad_post: T.Tensor,
        grad_comb: T.Tensor,
        adds: T.int32,
        bias: T.Tensor,
        partials: T.Tensor,
    ):
        with T.Kernel(slices if has_bias else tokens, threads=threads) as block:
            follow_previous()
            T.annotate_min_blocks_per_sm(blocks_per_sm)
            tid = T.get_thread_binding()
            wide = T.alloc_local((n, vector), streams_dtype)
            streams = T.alloc_local((n, vector), streams_dtype)
            output = T.alloc_local((vector,), "float32" if has_bias else streams_dtype)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            total = T.alloc_local((vector,), T.float32)
            partial = T.alloc_local((1,), T.float32)
            # n*n sums of comb, then n of post.
            sums = T.alloc_local((num_sums,), T.float32)
            shared = T.alloc_shared(sums_shape(num_sums, threads), T.float32)
            if has_bias:
                # Each thread adds to, and reads, only its own columns: no barrier is needed.
                of_bias = T.alloc_shared((hidden_size,), T.float32)
                for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
                    h = (c * threads + tid) * vector
                    if h < hidden_size:
                        for v in T.vectorized(vector):
                            of_bias[h + v] = 0.0
            # A slice takes every `slices`-th token: what runs at one time is near in memory.
            for step in T.serial(T.ceildiv(tokens - block, slices) if has_bias else 1):
                t = step * slices + block if has_bias else block
                for k in T.unroll(num_sums):
                    sums[k] = 0.0
                for i in T.unroll(n):
                    post[i] = post_mix[t, i]
                    for j in T.vectorized(n):
                        comb[i, j] = comb_mix[t, i, j]
                for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
                    h = (c * threads + tid) * vector
                    if h < hidden_size:
                        load_streams(grad, t, h, n, wide)
                        load_streams(residual, t, h, n, streams)
                        load_output(layer_output, bias, t, h, output)
                        for v in T.unroll(vector):
                            total[v] = 0.0
                        for j in T.unroll(n):
                            partial[0] = 0.0
                            for v in T.unroll(vector):
                                total[v] += post[j] * T.cast(wide[j, v], T.float32)
                                partial[0] += T.cast(output[v], T.float32) * T.cast(
                                    wide[j, v], T.float32
                                )
                            sums[n * n + j] += partial[0]
                        for v in T.vectorized(vector):
                            grad_output[t, h + v] = T.cast(total[v], streams_dtype)
                        if has_bias:
                            for v in T.vectorized(vector):
                                of_bias[h + v] += total[v]
                        for i in T.unroll(n):
                            for v in T.unroll(vector):
                                total[v] = 0.0
                            for j in T.unroll(n):
                                partial[0] = 0.0
                                for v in T.unroll(vector):
                                    total[v] += comb[i, j] * T.cast(wide[j, v], T.float32)
                                    partial[0] += T.cast(streams[i, v], T.float32) * T.cast(
                                        wide[j, v], T.float32
                                    )
                                sums[i * n + j] += partial[0]
                            if directed and adds != 0:
                                add_streams(grad_residual, t, i, h, total)
                            for v in T.vectorized(vector):
                                grad_residual[t, i, h + v] = T.cast(total[v], target)
                block_sums(sums, num_sums, threads, shared, partial)
                if tid % lanes == 0:
                    if tid < n * n * lanes:
                        grad_comb[t, tid // lanes] = partial[0]
                    elif tid < num_sums * lanes:
                        grad_post[t, tid // lanes - n * n] = partial[0]
            if has_bias:
                for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
                    h = (c * threads + tid) * vector
                    if h < hidden_size:
                        for v in T.vectorized(vector):
                            partials[block, h + v] = of_bias[h + v]

    if not has_bias:

        @T.prim_func
        def post_bwd_kernel(
            grad: T.Tensor[(tokens, n, hidden_size), streams_dtype],
            layer_output: T.Tensor[(tokens, hidden_size), streams_dtype],
            residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
            post_mix: T.Tensor[(tokens, n), T.float32],
            comb_mix: T.Tensor[(tokens, n, n), T.float32],
            grad_output: T.Tensor[(tokens, hidden_size), streams_dtype],
            grad_residual: T.Tensor[(tokens, n, hidden_size), target],
            grad_post: T.Tensor[(tokens, n), T.float32],
            grad_comb: T.Tensor[(tokens, n * n), T.float32],
            adds: T.int32,
        ):
            backward(
                grad,
                layer_output,
                residual,
                post_mix,
                comb_mix,
                grad_output,
                grad_residual,
                grad_post,
                grad_comb,
                adds,
                None,
                None,
            )

        return post_bwd_kernel

    @T.prim_func
    def post_biased_bwd_kernel(
        grad: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        layer_output: T.Tensor[(tokens, hidden_size), streams_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        post_mix: T.Tensor[(tokens, n), T.float32],
        comb_mix: T.Tensor[(tokens, n, n), T.float32],
        grad_output: T.Tensor[(tokens, hidden_size), streams_dtype],
        grad_residual: T.Tensor[(tokens, n, hidden_size), target],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
        adds: T.int32,
        bias: T.Tensor[(hidden_size,), layer_bias_dtype],
        partials: T.Tensor[(slices, hidden_size), T.float32],
    ):
        backward(
            grad,
            layer_output,
            residual,
            post_mix,
            comb_mix,
            grad_output,
            grad_residual,
            grad_post,
            grad_comb,
            adds,
            bias,
            partials,
        )

    return post_biased_bwd_kernel


@builder(SIMT)
def post_bias_bwd(hidden_size: int, *, layer_bias_dtype: str):
    """grad_bias: the sum of the slices, each of eight warps a stride of them, then the warps."""
    slices = T.dynamic("num_slices")
    warps = 8

    @T.prim_func
    def post_bias_bwd_kernel(
        partials: T.Tensor[(slices, hidden_size), T.float32],
        grad_bias: T.Tensor[(hidden_size,), layer_bias_dtype],
    ):
        with T.Kernel(T.ceildiv(hidden_size, 32), threads=32 * warps) as block:
            follow_previous()
            tid = T.get_thread_binding()
            h = block * 32 + tid % 32
            total = T.alloc_local((1,), T.float32)
            shared = T.alloc_shared((32 * warps,), T.float32)
            total[0] = 0.0
            if h < hidden_size:
                for step in T.serial(T.ceildiv(slices, warps)):
                    if step * warps + tid // 32 < slices:
                        total[0] += partials[step * warps + tid // 32, h]
            shared[tid] = total[0]
            T.sync_threads()
            if tid < 32 and h < hidden_size:
                total[0] = 0.0
                for warp in T.unroll(warps):
                    total[0] += shared[warp * 32 + tid]
                grad_bias[h] = T.cast(total[0], layer_bias_dtype)

    return post_bias_bwd_kernel
