"""1 -> n copy, and the sum that is its gradient.

out[t, i, h] = hidden[t, h];  grad_hidden[t, h] = sum_i grad[t, i, h]
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    builder,
    follow_previous,
    load_streams,
    row_chunks,
    row_threads,
    row_vector,
)


@builder(SIMT)
def expand_fwd(n: int, hidden_size: int, dtype: str = "bfloat16"):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)

    @T.prim_func
    def expand_fwd_kernel(
        hidden: T.Tensor[(tokens, hidden_size), dtype],
        out: T.Tensor[(tokens, n, hidden_size), dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            value = T.alloc_local((vector,), dtype)
            if h < hidden_size:
                for v in T.vectorized(vector):
                    value[v] = hidden[t, h + v]
                for i in T.unroll(n):
                    for v in T.vectorized(vector):
                        out[t, i, h + v] = value[v]

    return expand_fwd_kernel


@builder(SIMT)
def expand_bwd(n: int, hidden_size: int, dtype: str = "bfloat16"):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)

    @T.prim_func
    def expand_bwd_kernel(
        grad: T.Tensor[(tokens, n, hidden_size), dtype],
        grad_hidden: T.Tensor[(tokens, hidden_size), dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            streams = T.alloc_local((n, vector), dtype)
            total = T.alloc_local((vector,), T.float32)
            if h < hidden_size:
                load_streams(grad, t, h, n, streams)
                for v in T.unroll(vector):
                    total[v] = 0.0
                for i in T.unroll(n):
                    for v in T.unroll(vector):
                        total[v] += T.cast(streams[i, v], T.float32)
                for v in T.vectorized(vector):
                    grad_hidden[t, h + v] = T.cast(total[v], dtype)

    return expand_bwd_kernel
