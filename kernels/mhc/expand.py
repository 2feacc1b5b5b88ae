"""1 -> n copy, and the sum that is its gradient.

out[t, i, h] = hidden[t, h];  grad_hidden[t, h] = sum_i grad[t, i, h]
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    VECTOR,
    builder,
    follow_previous,
    load_streams,
    row_chunks,
    row_threads,
)


@builder(SIMT)
def expand_fwd(n: int, hidden_size: int):
    tokens = T.dynamic("num_tokens")
    threads = row_threads(hidden_size)
    chunks = row_chunks(hidden_size, threads)

    @T.prim_func
    def expand_fwd_kernel(
        hidden: T.Tensor[(tokens, hidden_size), T.bfloat16],
        out: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * VECTOR
            value = T.alloc_local((VECTOR,), T.bfloat16)
            if h < hidden_size:
                for v in T.vectorized(VECTOR):
                    value[v] = hidden[t, h + v]
                for i in T.unroll(n):
                    for v in T.vectorized(VECTOR):
                        out[t, i, h + v] = value[v]

    return expand_fwd_kernel


@builder(SIMT)
def expand_bwd(n: int, hidden_size: int):
    tokens = T.dynamic("num_tokens")
    threads = row_threads(hidden_size)
    chunks = row_chunks(hidden_size, threads)

    @T.prim_func
    def expand_bwd_kernel(
        grad: T.Tensor[(tokens, n, hidden_size), T.bfloat16],
        grad_hidden: T.Tensor[(tokens, hidden_size), T.bfloat16],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * VECTOR
            streams = T.alloc_local((n, VECTOR), T.bfloat16)
            total = T.alloc_local((VECTOR,), T.float32)
            if h < hidden_size:
                load_streams(grad, t, h, n, streams)
                for v in T.unroll(VECTOR):
                    total[v] = 0.0
                for i in T.unroll(n):
                    for v in T.unroll(VECTOR):
                        total[v] += T.cast(streams[i, v], T.float32)
                for v in T.vectorized(VECTOR):
                    grad_hidden[t, h + v] = T.cast(total[v], T.bfloat16)

    return expand_bwd_kernel
