"""n -> 1 on streams that lie innermost, (T, C, n), as TransformerEngine keeps them.

out[t, c] = sum_i mix[t, i] * x[t, c, i]
grad_x[t, c, i] = mix[t, i] * grad[t, c]
grad_mix[t, i] = sum_c grad[t, c] * x[t, c, i]
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    block_sums,
    builder,
    follow_previous,
    load_mixes,
    sum_lanes,
    sums_shape,
)
from tile_mhc.kernels.transformer_engine._interleaved import (
    add_held,
    channels_per_access,
    load_access,
    load_held,
    row_shape,
    store_access,
    wider,
)


@builder(SIMT)
def interleaved_aggregate_fwd(n: int, channels: int, *, streams_dtype: str):
    tokens = T.dynamic("num_tokens")
    width = channels_per_access(n, channels, streams_dtype)
    accesses = channels // width
    threads, steps = row_shape(accesses)
    chunks = -(-accesses // (threads * steps))

    @T.prim_func
    def interleaved_aggregate_fwd_kernel(
        x: T.Tensor[(tokens, channels * n), streams_dtype],
        mix: T.Tensor[(tokens, n), T.float32],
        out: T.Tensor[(tokens, channels), streams_dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            first = block % chunks * (threads * steps) + T.get_thread_binding()
            streams = T.alloc_local((steps, width * n), streams_dtype)
            weights = T.alloc_local((n,), T.float32)
            total = T.alloc_local((width,), T.float32)
            for s in T.unroll(steps):
                if first + s * threads < accesses:
                    load_access(x, t, (first + s * threads) * (width * n), s, streams)
            load_mixes(mix, t, 0, n, weights)
            for s in T.unroll(steps):
                if first + s * threads < accesses:
                    for c in T.unroll(width):
                        total[c] = 0.0
                        for i in T.unroll(n):
                            total[c] += weights[i] * T.cast(streams[s, c * n + i], T.float32)
                    store_access(total, out, t, (first + s * threads) * width)

    return interleaved_aggregate_fwd_kernel


@builder(SIMT)
def interleaved_aggregate_bwd(n: int, channels: int, *, streams_dtype: str, into_dtype: str):
    """`into_dtype` is float32 for a buffer of gradients: on top of what it holds, if `adds`."""
    tokens = T.dynamic("num_tokens")
    grad_dtype = into_dtype or streams_dtype
    width = channels_per_access(n, channels, wider(streams_dtype, grad_dtype))
    accesses = channels // width
    threads, steps = row_shape(accesses)
    has_buffer = grad_dtype == "float32"
    lanes = sum_lanes(n, threads)

    @T.prim_func
    def interleaved_aggregate_bwd_kernel(
        grad: T.Tensor[(tokens, channels), streams_dtype],
        x: T.Tensor[(tokens, channels * n), streams_dtype],
        mix: T.Tensor[(tokens, n), T.float32],
        grad_mix: T.Tensor[(tokens, n), T.float32],
        grad_x: T.Tensor[(tokens, channels * n), grad_dtype],
        adds: T.int32,
    ):
        with T.Kernel(tokens, threads=threads) as t:
            follow_previous()
            tid = T.get_thread_binding()
            wide = T.alloc_local((steps, width), streams_dtype)
            streams = T.alloc_local((steps, width * n), streams_dtype)
            held = T.alloc_local((steps, width * n), T.float32)
            weights = T.alloc_local((n,), T.float32)
            sums = T.alloc_local((n,), T.float32)
            result = T.alloc_local((width * n,), T.float32)
            total = T.alloc_local((1,), T.float32)
            shared = T.alloc_shared(sums_shape(n, threads), T.float32)
            load_mixes(mix, t, 0, n, weights)
            for i in T.unroll(n):
                sums[i] = 0.0
            for tile in T.serial(T.ceildiv(accesses, threads * steps)):
                first = tile * (threads * steps) + tid
                for s in T.unroll(steps):
                    if first + s * threads < accesses:
                        load_access(x, t, (first + s * threads) * (width * n), s, streams)
                        load_access(grad, t, (first + s * threads) * width, s, wide)
                        if has_buffer:
                            load_held(grad_x, adds, t, (first + s * threads) * (width * n), s, held)
                for s in T.unroll(steps):
                    if first + s * threads < accesses:
                        for i in T.unroll(n):
                            # A short chain of its own, then one addition: less rounding.
                            total[0] = 0.0
                            for c in T.unroll(width):
                                total[0] += T.cast(wide[s, c], T.float32) * T.cast(
                                    streams[s, c * n + i], T.float32
                                )
                                result[c * n + i] = weights[i] * T.cast(wide[s, c], T.float32)
                            sums[i] += total[0]
                        at = (first + s * threads) * (width * n)
                        if has_buffer:
                            add_held(held, s, adds, result)
                        store_access(result, grad_x, t, at)
            block_sums(sums, n, threads, shared, total)
            if tid % lanes == 0 and tid < n * lanes:
                grad_mix[t, tid // lanes] = total[0]

    return interleaved_aggregate_bwd_kernel
