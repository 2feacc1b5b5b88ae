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

# Accesses that a thread writes: of one row, so that what is written at one time lies together, or
# where a thread has but one of a row, of two streams. H100, 2026-11, us at T=8192 H=7168 and
# T=4096 H=2560: 202.2 and 38.6, where a CTA that wrote all streams took 206.2 and 39.3. With one
# access there are more CTAs than start in the time: 201.9 and 43.1.
ACCESSES = 2


@builder(SIMT)
def expand_fwd(n: int, hidden_size: int, dtype: str = "bfloat16"):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, dtype)
    threads = row_threads(hidden_size, vector)
    pieces = min(row_chunks(hidden_size, threads, vector), ACCESSES)
    copies = ACCESSES // pieces
    chunks = row_chunks(hidden_size, threads, vector * pieces)
    groups = n // copies
    stride = threads * vector

    @T.prim_func
    def expand_fwd_kernel(
        hidden: T.Tensor[(tokens, hidden_size), dtype],
        out: T.Tensor[(tokens, n, hidden_size), dtype],
    ):
        with T.Kernel(tokens * groups * chunks, threads=threads) as block:
            follow_previous()
            t = block // (groups * chunks)
            i = block // chunks % groups * copies
            h = (block % chunks * pieces * threads + T.get_thread_binding()) * vector
            values = T.alloc_local((pieces, vector), dtype)
            for p in T.unroll(pieces):
                if h + p * stride < hidden_size:
                    for v in T.vectorized(vector):
                        values[p, v] = hidden[t, h + p * stride + v]
            for c in T.unroll(copies):
                for p in T.unroll(pieces):
                    if h + p * stride < hidden_size:
                        for v in T.vectorized(vector):
                            out[t, i + c, h + p * stride + v] = values[p, v]

    return expand_fwd_kernel


@builder(READS_LAST)
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
