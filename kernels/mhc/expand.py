"""1 -> n copy, and the sum that is its gradient.

out[t, i, h] = hidden[t, h];  grad_hidden[t, h] = sum_i grad[t, i, h]
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    READS_LAST,
    SIMT,
    builder,
    follow_previous,
    load_streams,
    row_chunks,
    row_threads,
    row_vector,
)

# Streams per CTA. H200, 2026-11, us with one (two accesses to it per thread), two and four streams:
# 148.2, 144.8 and 148.4 at T=8192 H=7168, 44.5, 43.4 and 45.9 at 4096x4096, 28.4, 28.3 and 28.8 at
# 4096x2560, 5.4, 5.6 and 5.3 at 128x7168. With one stream and one access per thread the GPU cannot
# start so many CTAs as fast as memory would take their writes: 157.8 us.
COPIES = 2


@builder(SIMT)
def expand_fwd(n: int, hidden_size: int, *, streams_dtype: str):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)
    groups = n // COPIES

    @T.prim_func
    def expand_fwd_kernel(
        hidden: T.Tensor[(tokens, hidden_size), streams_dtype],
        out: T.Tensor[(tokens, n, hidden_size), streams_dtype],
    ):
        with T.Kernel(tokens * groups * chunks, threads=threads) as block:
            follow_previous()
            t = block // (groups * chunks)
            i = block // chunks % groups * COPIES
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            values = T.alloc_local((vector,), streams_dtype)
            if h < hidden_size:
                for v in T.vectorized(vector):
                    values[v] = hidden[t, h + v]
                for c in T.unroll(COPIES):
                    for v in T.vectorized(vector):
                        out[t, i + c, h + v] = values[v]

    return expand_fwd_kernel


@builder(READS_LAST)
def expand_bwd(n: int, hidden_size: int, *, streams_dtype: str):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)

    @T.prim_func
    def expand_bwd_kernel(
        grad: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        grad_hidden: T.Tensor[(tokens, hidden_size), streams_dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            streams = T.alloc_local((n, vector), streams_dtype)
            total = T.alloc_local((vector,), T.float32)
            if h < hidden_size:
                load_streams(grad, t, h, n, streams)
                for v in T.unroll(vector):
                    total[v] = 0.0
                for i in T.unroll(n):
                    for v in T.unroll(vector):
                        total[v] += T.cast(streams[i, v], T.float32)
                for v in T.vectorized(vector):
                    grad_hidden[t, h + v] = T.cast(total[v], streams_dtype)

    return expand_bwd_kernel
