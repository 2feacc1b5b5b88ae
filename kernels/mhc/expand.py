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


def spreading_ctas(n: int, hidden_size: int, dtype: str) -> int:
    """CTAs per token of a kernel that writes a row of H to n streams."""
    vector = row_vector(hidden_size, dtype)
    return n // COPIES * row_chunks(hidden_size, row_threads(hidden_size, vector), vector)


@T.macro
def spread(hidden: T.Tensor, out: T.Tensor, block: T.int32, threads: int, factor: float | None):
    """out[t, i, h] = hidden[t, h], times a factor if there is one: the part of one CTA."""
    _, n, hidden_size = out.shape
    vector = row_vector(hidden_size, out.dtype)
    chunks = row_chunks(hidden_size, threads, vector)
    groups = n // COPIES
    t = block // (groups * chunks)
    i = block // chunks % groups * COPIES
    h = (block % chunks * threads + T.get_thread_binding()) * vector
    values = T.alloc_local((vector,), out.dtype)
    if h < hidden_size:
        for v in T.vectorized(vector):
            values[v] = hidden[t, h + v]
        if factor is not None:
            for v in T.unroll(vector):
                values[v] = T.cast(T.cast(values[v], T.float32) * factor, out.dtype)
        for c in T.unroll(COPIES):
            for v in T.vectorized(vector):
                out[t, i + c, h + v] = values[v]


@T.macro
def sum_streams(
    streams: T.Tensor, out: T.Tensor, block: T.int32, threads: int, factor: float | None
):
    """out[t, h] = sum_i streams[t, i, h] in fp32, i ascending, times a factor if there is one."""
    _, n, hidden_size = streams.shape
    vector = row_vector(hidden_size, out.dtype)
    chunks = row_chunks(hidden_size, threads, vector)
    t = block // chunks
    h = (block % chunks * threads + T.get_thread_binding()) * vector
    values = T.alloc_local((n, vector), out.dtype)
    total = T.alloc_local((vector,), T.float32)
    if h < hidden_size:
        load_streams(streams, t, h, n, values)
        for v in T.unroll(vector):
            total[v] = 0.0
        for i in T.unroll(n):
            for v in T.unroll(vector):
                total[v] += T.cast(values[i, v], T.float32)
        if factor is not None:
            for v in T.unroll(vector):
                total[v] *= factor
        for v in T.vectorized(vector):
            out[t, h + v] = T.cast(total[v], out.dtype)


@builder(SIMT)
def expand_fwd(n: int, hidden_size: int, *, streams_dtype: str):
    tokens = T.dynamic("num_tokens")
    threads = row_threads(hidden_size, row_vector(hidden_size, streams_dtype))
    ctas = spreading_ctas(n, hidden_size, streams_dtype)

    @T.prim_func
    def expand_fwd_kernel(
        hidden: T.Tensor[(tokens, hidden_size), streams_dtype],
        out: T.Tensor[(tokens, n, hidden_size), streams_dtype],
    ):
        with T.Kernel(tokens * ctas, threads=threads) as block:
            follow_previous()
            spread(hidden, out, block, threads, None)

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
            sum_streams(grad, grad_hidden, block, threads, None)

    return expand_bwd_kernel
