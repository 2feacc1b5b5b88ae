"""n -> 1, weighted by pre_mix.

out[t, h] = sum_i pre_mix[t, i] * residual[t, i, h]
grad_residual[t, i, h] = pre_mix[t, i] * grad[t, h]
grad_mix[t, i] = sum_h grad[t, h] * residual[t, i, h]
"""

from typing import Any

import tilelang.language as T

from tile_mhc.kernels._common import (
    READS_LAST,
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
    weighted_sum,
)


def _forward(n: int, hidden_size: int, streams_dtype: str) -> Any:
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)

    @T.prim_func
    def aggregate_fwd_kernel(
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        pre_mix: T.Tensor[(tokens, n), T.float32],
        out: T.Tensor[(tokens, hidden_size), streams_dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            streams = T.alloc_local((n, vector), streams_dtype)
            mix = T.alloc_local((n,), T.float32)
            total = T.alloc_local((vector,), T.float32)
            if h < hidden_size:
                load_streams(residual, t, h, n, streams)
                for i in T.unroll(n):
                    mix[i] = pre_mix[t, i]
                weighted_sum(mix, streams, n, total)
                for v in T.vectorized(vector):
                    out[t, h + v] = T.cast(total[v], streams_dtype)

    return aggregate_fwd_kernel


@builder(SIMT)
def aggregate_fwd(n: int, hidden_size: int, *, streams_dtype: str):
    return _forward(n, hidden_size, streams_dtype)


@builder(READS_LAST)
def aggregate_last_fwd(n: int, hidden_size: int, *, streams_dtype: str):
    """The same kernel for streams of which L2 holds a good part: it gives up what has been read."""
    return _forward(n, hidden_size, streams_dtype)


@T.macro
def row_products(wide: T.Buffer, streams: T.Buffer, n: int, sums: T.Buffer):
    """sums[i] += sum_v wide[v] * streams[i, v].

    A short chain of its own, then one addition: less rounding than one long chain over the row.
    """
    partial = T.alloc_local((1,), T.float32)
    for i in T.unroll(n):
        partial[0] = 0.0
        for v in T.unroll(wide.shape[0]):
            partial[0] += T.cast(wide[v], T.float32) * T.cast(streams[i, v], T.float32)
        sums[i] += partial[0]


@builder(SIMT)
def aggregate_bwd(n: int, hidden_size: int, *, streams_dtype: str, into_dtype: str):
    """Both gradients; with `into_dtype` the residual's may be added to what is there."""
    tokens = T.dynamic("num_tokens")
    directed = into_dtype != ""
    target = into_dtype or streams_dtype
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    lanes = sum_lanes(n, threads)

    @T.prim_func
    def aggregate_bwd_kernel(
        grad: T.Tensor[(tokens, hidden_size), streams_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        pre_mix: T.Tensor[(tokens, n), T.float32],
        grad_residual: T.Tensor[(tokens, n, hidden_size), target],
        grad_mix: T.Tensor[(tokens, n), T.float32],
        adds: T.int32,
    ):
        with T.Kernel(tokens, threads=threads) as t:
            follow_previous()
            tid = T.get_thread_binding()
            streams = T.alloc_local((n, vector), streams_dtype)
            wide = T.alloc_local((vector,), streams_dtype)
            mix = T.alloc_local((n,), T.float32)
            sums = T.alloc_local((n,), T.float32)
            total = T.alloc_local((1,), T.float32)
            shared = T.alloc_shared(sums_shape(n, threads), T.float32)
            for i in T.unroll(n):
                mix[i] = pre_mix[t, i]
                sums[i] = 0.0
            for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
                h = (c * threads + tid) * vector
                if h < hidden_size:
                    for v in T.vectorized(vector):
                        wide[v] = grad[t, h + v]
                    load_streams(residual, t, h, n, streams)
                    row_products(wide, streams, n, sums)
                    for i in T.unroll(n):
                        if directed:
                            product = T.alloc_local((vector,), T.float32)
                            for v in T.unroll(vector):
                                product[v] = mix[i] * T.cast(wide[v], T.float32)
                            if adds != 0:
                                add_streams(grad_residual, t, i, h, product)
                            for v in T.vectorized(vector):
                                grad_residual[t, i, h + v] = T.cast(product[v], target)
                        else:
                            for v in T.vectorized(vector):
                                grad_residual[t, i, h + v] = T.cast(
                                    mix[i] * T.cast(wide[v], T.float32), streams_dtype
                                )
            block_sums(sums, n, threads, shared, total)
            if tid % lanes == 0 and tid < n * lanes:
                grad_mix[t, tid // lanes] = total[0]

    return aggregate_bwd_kernel


@T.macro
def mix_sum(grad: T.Tensor, residual: T.Tensor, t: T.int32, threads: int, total: T.Buffer):
    """total[0] = the gradient of a token's pre_mix[i], in thread i * sum_lanes(n, threads)."""
    n, hidden_size = residual.shape[1:]
    vector = row_vector(hidden_size, residual.dtype)
    tid = T.get_thread_binding()
    streams = T.alloc_local((n, vector), residual.dtype)
    wide = T.alloc_local((vector,), residual.dtype)
    sums = T.alloc_local((n,), T.float32)
    shared = T.alloc_shared(sums_shape(n, threads), T.float32)
    for i in T.unroll(n):
        sums[i] = 0.0
    for c in T.serial(T.ceildiv(hidden_size, threads * vector)):
        h = (c * threads + tid) * vector
        if h < hidden_size:
            for v in T.vectorized(vector):
                wide[v] = grad[t, h + v]
            load_streams(residual, t, h, n, streams)
            row_products(wide, streams, n, sums)
    block_sums(sums, n, threads, shared, total)


@builder(SIMT)
def aggregate_mix_bwd(n: int, hidden_size: int, *, streams_dtype: str):
    """The gradient of pre_mix alone: the projection's backward takes the rest along.

    It reads beside the kernel before it, one of the mixes', and waits for that before it writes.
    """
    tokens = T.dynamic("num_tokens")
    threads = row_threads(hidden_size, row_vector(hidden_size, streams_dtype))
    lanes = sum_lanes(n, threads)

    @T.prim_func
    def aggregate_mix_bwd_kernel(
        grad: T.Tensor[(tokens, hidden_size), streams_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        grad_mix: T.Tensor[(tokens, n), T.float32],
    ):
        with T.Kernel(tokens, threads=threads) as block:
            # The last tokens first: the projection's backward then finds its first in L2.
            t = tokens - 1 - block
            tid = T.get_thread_binding()
            total = T.alloc_local((1,), T.float32)
            mix_sum(grad, residual, t, threads, total)
            follow_previous()
            if tid % lanes == 0 and tid < n * lanes:
                grad_mix[t, tid // lanes] = total[0]

    return aggregate_mix_bwd_kernel


@builder(SIMT)
def aggregate_mix_first_bwd(n: int, hidden_size: int, *, streams_dtype: str):
    """The same as the first kernel of an op: the one before may be what writes its gradient."""
    tokens = T.dynamic("num_tokens")
    threads = row_threads(hidden_size, row_vector(hidden_size, streams_dtype))
    lanes = sum_lanes(n, threads)

    @T.prim_func
    def aggregate_mix_first_bwd_kernel(
        grad: T.Tensor[(tokens, hidden_size), streams_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        grad_mix: T.Tensor[(tokens, n), T.float32],
    ):
        with T.Kernel(tokens, threads=threads) as block:
            follow_previous()
            # As above.
            t = tokens - 1 - block
            tid = T.get_thread_binding()
            total = T.alloc_local((1,), T.float32)
            mix_sum(grad, residual, t, threads, total)
            if tid % lanes == 0 and tid < n * lanes:
                grad_mix[t, tid // lanes] = total[0]

    return aggregate_mix_first_bwd_kernel
