"""1 -> n, plus stream mixing (expand-combine).

out[t, j, h] = post_mix[t, j] * layer_output[t, h] + sum_i comb_mix[t, i, j] * residual[t, i, h]
grad_output[t, h] = sum_j post_mix[t, j] * grad[t, j, h]
grad_residual[t, i, h] = sum_j comb_mix[t, i, j] * grad[t, j, h]
grad_post[t, j] = sum_h layer_output[t, h] * grad[t, j, h]
grad_comb[t, i, j] = sum_h residual[t, i, h] * grad[t, j, h]
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    VECTOR,
    block_sums,
    builder,
    follow_previous,
    load_streams,
    row_chunks,
    row_threads,
    sum_lanes,
    sums_shape,
)


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
    for v in T.unroll(VECTOR):
        total[v] = post[j] * T.cast(output[v], T.float32)
    for i in T.unroll(n):
        for v in T.unroll(VECTOR):
            total[v] += comb[i, j] * T.cast(streams[i, v], T.float32)


@builder(SIMT)
def post_fwd(n: int, hidden_size: int):
    tokens = T.dynamic("num_tokens")
    threads = row_threads(hidden_size)
    chunks = row_chunks(hidden_size, threads)

    @T.prim_func
    def post_fwd_kernel(
        layer_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        residual: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
        post_mix: T.Tensor[(tokens, n), T.float32],
        comb_mix: T.Tensor[(tokens, n, n), T.float32],
        out: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * VECTOR
            streams = T.alloc_local((n, VECTOR), T.bfloat16)
            output = T.alloc_local((VECTOR,), T.bfloat16)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            total = T.alloc_local((VECTOR,), T.float32)
            if h < hidden_size:
                load_streams(residual, t, h, n, streams)
                for v in T.vectorized(VECTOR):
                    output[v] = layer_output[t, h + v]
                for i in T.unroll(n):
                    post[i] = post_mix[t, i]
                    for j in T.vectorized(n):
                        comb[i, j] = comb_mix[t, i, j]
                for j in T.unroll(n):
                    combine(post, comb, output, streams, j, n, total)
                    for v in T.vectorized(VECTOR):
                        out[t, j, h + v] = T.cast(total[v], T.bfloat16)

    return post_fwd_kernel


@builder(SIMT)
def post_bwd(n: int, hidden_size: int):
    tokens = T.dynamic("num_tokens")
    num_sums = n * (n + 1)
    # One thread a sum at least, to write them.
    threads = max(row_threads(hidden_size, 128), -(-num_sums // 32) * 32)
    # H200, 2026-11: the sums live in registers, and left alone the compiler takes 134 at n = 4, so
    # that too few threads fit to cover the latency of memory: 535 us at T=8192 H=7168, against 393
    # us with this. 160 threads would have to spill.
    blocks_per_sm = 4 if n < 8 else 2
    lanes = sum_lanes(num_sums, threads)

    @T.prim_func
    def post_bwd_kernel(
        grad: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
        layer_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        residual: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
        post_mix: T.Tensor[(tokens, n), T.float32],
        comb_mix: T.Tensor[(tokens, n, n), T.float32],
        grad_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        grad_residual: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
    ):
        with T.Kernel(tokens, threads=threads) as t:
            follow_previous()
            T.annotate_min_blocks_per_sm(blocks_per_sm)
            tid = T.get_thread_binding()
            wide = T.alloc_local((n, VECTOR), T.bfloat16)
            streams = T.alloc_local((n, VECTOR), T.bfloat16)
            output = T.alloc_local((VECTOR,), T.bfloat16)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            total = T.alloc_local((VECTOR,), T.float32)
            partial = T.alloc_local((1,), T.float32)
            # n*n sums of comb, then n of post.
            sums = T.alloc_local((num_sums,), T.float32)
            shared = T.alloc_shared(sums_shape(num_sums, threads), T.float32)
            for k in T.unroll(num_sums):
                sums[k] = 0.0
            for i in T.unroll(n):
                post[i] = post_mix[t, i]
                for j in T.vectorized(n):
                    comb[i, j] = comb_mix[t, i, j]
            for c in T.serial(T.ceildiv(hidden_size, threads * VECTOR)):
                h = (c * threads + tid) * VECTOR
                if h < hidden_size:
                    load_streams(grad, t, h, n, wide)
                    load_streams(residual, t, h, n, streams)
                    for v in T.vectorized(VECTOR):
                        output[v] = layer_output[t, h + v]
                    for v in T.unroll(VECTOR):
                        total[v] = 0.0
                    for j in T.unroll(n):
                        partial[0] = 0.0
                        for v in T.unroll(VECTOR):
                            total[v] += post[j] * T.cast(wide[j, v], T.float32)
                            partial[0] += T.cast(output[v], T.float32) * T.cast(
                                wide[j, v], T.float32
                            )
                        sums[n * n + j] += partial[0]
                    for v in T.vectorized(VECTOR):
                        grad_output[t, h + v] = T.cast(total[v], T.bfloat16)
                    for i in T.unroll(n):
                        for v in T.unroll(VECTOR):
                            total[v] = 0.0
                        for j in T.unroll(n):
                            partial[0] = 0.0
                            for v in T.unroll(VECTOR):
                                total[v] += comb[i, j] * T.cast(wide[j, v], T.float32)
                                partial[0] += T.cast(streams[i, v], T.float32) * T.cast(
                                    wide[j, v], T.float32
                                )
                            sums[i * n + j] += partial[0]
                        for v in T.vectorized(VECTOR):
                            grad_residual[t, i, h + v] = T.cast(total[v], T.bfloat16)
            block_sums(sums, num_sums, threads, shared, partial)
            if tid % lanes == 0:
                if tid < n * n * lanes:
                    grad_comb[t, tid // lanes] = partial[0]
                elif tid < num_sums * lanes:
                    grad_post[t, tid // lanes - n * n] = partial[0]

    return post_bwd_kernel
