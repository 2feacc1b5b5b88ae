"""1 -> n, without a mix of the streams.

out[t, j, h] = post_mix[t, j] * layer_output[t, h] + residual[t, j, h]
grad_output[t, h] = sum_j post_mix[t, j] * grad[t, j, h]
grad_post[t, j] = sum_h layer_output[t, h] * grad[t, j, h]

The gradient of the residual is `grad`: nothing is written but into an accumulator. The bias of the
layer, and its gradient, are as in `post`.
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
from tile_mhc.kernels.post import load_output


@builder(SIMT)
def identity_post_fwd(n: int, hidden_size: int, *, streams_dtype: str, layer_bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)
    has_bias = layer_bias_dtype != ""

    @T.prim_func
    def identity_post_fwd_kernel(
        layer_output: T.Tensor[(tokens, hidden_size), streams_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        post_mix: T.Tensor[(tokens, n), T.float32],
        bias: T.Tensor[(hidden_size if has_bias else 1,), layer_bias_dtype or T.float32],
        out: T.Tensor[(tokens, n, hidden_size), streams_dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            streams = T.alloc_local((n, vector), streams_dtype)
            output = T.alloc_local((vector,), "float32" if has_bias else streams_dtype)
            post = T.alloc_local((n,), T.float32)
            if h < hidden_size:
                load_streams(residual, t, h, n, streams)
                load_output(layer_output, bias if has_bias else None, t, h, output)
                for j in T.unroll(n):
                    post[j] = post_mix[t, j]
                for j in T.unroll(n):
                    for v in T.vectorized(vector):
                        out[t, j, h + v] = T.cast(
                            post[j] * T.cast(output[v], T.float32)
                            + T.cast(streams[j, v], T.float32),
                            streams_dtype,
                        )

    return identity_post_fwd_kernel


@builder(SIMT)
def identity_post_bwd(
    n: int,
    hidden_size: int,
    *,
    streams_dtype: str,
    layer_bias_dtype: str,
    into_dtype: str,
    limits: Architecture,
):
    """Gradients of a token; with a bias of a slice of tokens, and their sum for the bias.

    With `into_dtype` `grad` is also written or added to an accumulator.
    """
    tokens = T.dynamic("num_tokens")
    has_bias = layer_bias_dtype != ""
    slices = T.dynamic("num_slices") if has_bias else 1
    directed = into_dtype != ""
    target = into_dtype or streams_dtype
    # That of no accumulator, too: the sums of post_mix keep their order.
    vector = row_vector(hidden_size, streams_dtype)
    # A CTA of a slice goes through many tokens, and is to leave room for as many as `post_slices`.
    threads = row_threads(hidden_size, vector, 128 if has_bias else 256)
    lanes = sum_lanes(n, threads)

    @T.prim_func
    def identity_post_bwd_kernel(
        grad: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        layer_output: T.Tensor[(tokens, hidden_size), streams_dtype],
        post_mix: T.Tensor[(tokens, n), T.float32],
        grad_output: T.Tensor[(tokens, hidden_size), streams_dtype],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_residual: T.Tensor[(tokens, n, hidden_size) if directed else (1,), target],
        bias: T.Tensor[(hidden_size if has_bias else 1,), layer_bias_dtype or T.float32],
        partials: T.Tensor[(slices, hidden_size) if has_bias else (1,), T.float32],
        adds: T.int32,
    ):
        with T.Kernel(slices if has_bias else tokens, threads=threads) as block:
            follow_previous()
            if has_bias:
                T.annotate_min_blocks_per_sm(limits.post_slices)
            tid = T.get_thread_binding()
            wide = T.alloc_local((n, vector), streams_dtype)
            output = T.alloc_local((vector,), "float32" if has_bias else streams_dtype)
            post = T.alloc_local((n,), T.float32)
            total = T.alloc_local((vector,), T.float32)
            partial = T.alloc_local((1,), T.float32)
            sums = T.alloc_local((n,), T.float32)
            shared = T.alloc_shared(sums_shape(n, threads), T.float32)
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
                for j in T.unroll(n):
                    sums[j] = 0.0
                    post[j] = post_mix[t, j]
                for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
                    h = (c * threads + tid) * vector
                    if h < hidden_size:
                        load_streams(grad, t, h, n, wide)
                        load_output(layer_output, bias if has_bias else None, t, h, output)
                        for v in T.unroll(vector):
                            total[v] = 0.0
                        for j in T.unroll(n):
                            partial[0] = 0.0
                            for v in T.unroll(vector):
                                total[v] += post[j] * T.cast(wide[j, v], T.float32)
                                partial[0] += T.cast(output[v], T.float32) * T.cast(
                                    wide[j, v], T.float32
                                )
                            sums[j] += partial[0]
                        for v in T.vectorized(vector):
                            grad_output[t, h + v] = T.cast(total[v], streams_dtype)
                        if has_bias:
                            for v in T.vectorized(vector):
                                of_bias[h + v] += total[v]
                        if directed:
                            for j in T.unroll(n):
                                for v in T.unroll(vector):
                                    total[v] = T.cast(wide[j, v], T.float32)
                                if adds != 0:
                                    add_streams(grad_residual, t, j, h, total)
                                for v in T.vectorized(vector):
                                    grad_residual[t, j, h + v] = T.cast(total[v], target)
                block_sums(sums, n, threads, shared, partial)
                if tid % lanes == 0 and tid < n * lanes:
                    grad_post[t, tid // lanes] = partial[0]
            if has_bias:
                for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
                    h = (c * threads + tid) * vector
                    if h < hidden_size:
                        for v in T.vectorized(vector):
                            partials[block, h + v] = of_bias[h + v]

    return identity_post_bwd_kernel
