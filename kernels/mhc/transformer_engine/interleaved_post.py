"""1 -> n, plus stream mixing, on streams that lie innermost, (T, C, n), as TransformerEngine keeps
them.

out[t, c, j] = post[t, j] * (f[t, c] + bias[c]) + sum_i comb[t, i, j] * x[t, c, i]
grad_f[t, c] = sum_j post[t, j] * grad[t, c, j]
grad_bias[c] = sum_t grad_f[t, c], before that is rounded
grad_x[t, c, i] = sum_j comb[t, i, j] * grad[t, c, j]
grad_post[t, j] = sum_c (f[t, c] + bias[c]) * grad[t, c, j]
grad_comb[t, i, j] = sum_c x[t, c, i] * grad[t, c, j]
"""

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
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
    STEPS,
    add_held,
    channels_per_access,
    load_access,
    load_held,
    row_shape,
    store_access,
    wider,
)


def bias_shape(channels: int, layer_bias_dtype: str) -> tuple[int]:
    return (channels if layer_bias_dtype else 1,)


@T.macro
def layer_values(
    f: T.Buffer, s: int, bias: T.Tensor, layer_bias_dtype: str, at: T.int32, out: T.Buffer
):
    """out = f[s, :], plus the bias of its channels if there is one, in float32."""
    for c in T.unroll(out.shape[0]):
        out[c] = T.cast(f[s, c], T.float32)
        if layer_bias_dtype != "":
            out[c] += T.cast(bias[at + c], T.float32)


@builder(SIMT)
def interleaved_post_fwd(
    n: int, channels: int, *, streams_dtype: str, layer_output_dtype: str, layer_bias_dtype: str
):
    """`layer_bias_dtype` is empty without a bias."""
    tokens = T.dynamic("num_tokens")
    width = channels_per_access(n, channels, streams_dtype)
    accesses = channels // width
    threads, steps = row_shape(accesses)
    chunks = -(-accesses // (threads * steps))

    @T.prim_func
    def interleaved_post_fwd_kernel(
        f: T.Tensor[(tokens, channels), layer_output_dtype],
        bias: T.Tensor[bias_shape(channels, layer_bias_dtype), layer_bias_dtype or T.float32],
        x: T.Tensor[(tokens, channels * n), streams_dtype],
        post: T.Tensor[(tokens, n), T.float32],
        comb: T.Tensor[(tokens, n * n), T.float32],
        out: T.Tensor[(tokens, channels * n), streams_dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            first = block % chunks * (threads * steps) + T.get_thread_binding()
            streams = T.alloc_local((steps, width * n), streams_dtype)
            layer = T.alloc_local((steps, width), layer_output_dtype)
            values = T.alloc_local((width,), T.float32)
            posts = T.alloc_local((n,), T.float32)
            combs = T.alloc_local((n * n,), T.float32)
            result = T.alloc_local((width * n,), T.float32)
            for s in T.unroll(steps):
                if first + s * threads < accesses:
                    load_access(x, t, (first + s * threads) * (width * n), s, streams)
                    load_access(f, t, (first + s * threads) * width, s, layer)
            load_mixes(post, t, 0, n, posts)
            load_mixes(comb, t, 0, n * n, combs)
            for s in T.unroll(steps):
                if first + s * threads < accesses:
                    at = (first + s * threads) * width
                    layer_values(layer, s, bias, layer_bias_dtype, at, values)
                    for c in T.unroll(width):
                        for j in T.unroll(n):
                            result[c * n + j] = posts[j] * values[c]
                            for i in T.unroll(n):
                                result[c * n + j] += combs[i * n + j] * T.cast(
                                    streams[s, c * n + i], T.float32
                                )
                    store_access(result, out, t, at * n)

    return interleaved_post_fwd_kernel


@builder(SIMT)
def interleaved_post_bwd(
    n: int,
    channels: int,
    *,
    streams_dtype: str,
    layer_output_dtype: str,
    layer_bias_dtype: str,
    into_dtype: str,
    limits: Architecture,
):
    """All gradients, one token per CTA; with a bias, one slice of tokens per CTA.

    A CTA then sums the gradient of the bias over its slice, in its row of `partials`.

    `into_dtype` is float32 for a buffer of gradients: on top of what it holds, if `adds`.
    """
    tokens = T.dynamic("num_tokens")
    slices = T.dynamic("num_slices")
    grad_dtype = into_dtype or streams_dtype
    width = channels_per_access(n, channels, wider(streams_dtype, grad_dtype))
    accesses = channels // width
    has_bias = layer_bias_dtype != ""
    # The sums for a bias take registers: with four steps those would spill.
    threads, steps = row_shape(accesses, 128, 2 if has_bias else STEPS)
    tiles = -(-accesses // (threads * steps))
    num_sums = n * (n + 1)
    lanes = sum_lanes(num_sums, threads)
    has_buffer = grad_dtype == "float32"
    ctas = limits.interleaved_post_ctas

    @T.prim_func
    def interleaved_post_bwd_kernel(
        grad: T.Tensor[(tokens, channels * n), streams_dtype],
        f: T.Tensor[(tokens, channels), layer_output_dtype],
        bias: T.Tensor[bias_shape(channels, layer_bias_dtype), layer_bias_dtype or T.float32],
        x: T.Tensor[(tokens, channels * n), streams_dtype],
        post: T.Tensor[(tokens, n), T.float32],
        comb: T.Tensor[(tokens, n * n), T.float32],
        grad_f: T.Tensor[(tokens, channels), layer_output_dtype],
        partials: T.Tensor[(slices, channels) if has_bias else (1,), T.float32],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
        grad_x: T.Tensor[(tokens, channels * n), grad_dtype],
        adds: T.int32,
    ):
        with T.Kernel(slices if has_bias else tokens, threads=threads) as block:
            follow_previous()
            # As in post_bwd: more registers would leave too few threads for memory's latency.
            T.annotate_min_blocks_per_sm(ctas)
            tid = T.get_thread_binding()
            wide = T.alloc_local((steps, width * n), streams_dtype)
            streams = T.alloc_local((steps, width * n), streams_dtype)
            layer = T.alloc_local((steps, width), layer_output_dtype)
            held = T.alloc_local((steps, width * n), T.float32)
            values = T.alloc_local((width,), T.float32)
            posts = T.alloc_local((n,), T.float32)
            combs = T.alloc_local((n * n,), T.float32)
            result = T.alloc_local((width * n,), T.float32)
            total = T.alloc_local((width,), T.float32)
            partial = T.alloc_local((1,), T.float32)
            # n*n sums of comb, then n of post.
            sums = T.alloc_local((num_sums,), T.float32)
            shared = T.alloc_shared(sums_shape(num_sums, threads), T.float32)
            if has_bias:
                # Each thread adds to, and reads, only its own: no barrier is needed.
                of_bias = T.alloc_shared((tiles * steps, width, threads), T.float32)
                for s in T.serial(tiles * steps):
                    for c in T.unroll(width):
                        of_bias[s, c, tid] = 0.0
            # A slice takes every `slices`-th token: what runs at one time is near in memory.
            for step in T.serial(T.ceildiv(tokens - block, slices) if has_bias else 1):
                t = step * slices + block if has_bias else block
                load_mixes(post, t, 0, n, posts)
                load_mixes(comb, t, 0, n * n, combs)
                for k in T.unroll(num_sums):
                    sums[k] = 0.0
                for tile in T.serial(tiles):
                    first = tile * (threads * steps) + tid
                    for s in T.unroll(steps):
                        if first + s * threads < accesses:
                            load_access(grad, t, (first + s * threads) * (width * n), s, wide)
                            load_access(x, t, (first + s * threads) * (width * n), s, streams)
                            load_access(f, t, (first + s * threads) * width, s, layer)
                            if has_buffer:
                                load_held(
                                    grad_x, adds, t, (first + s * threads) * (width * n), s, held
                                )
                    for s in T.unroll(steps):
                        if first + s * threads < accesses:
                            at = (first + s * threads) * width
                            layer_values(layer, s, bias, layer_bias_dtype, at, values)
                            for c in T.unroll(width):
                                total[c] = 0.0
                            for j in T.unroll(n):
                                # A short chain of its own, then one addition: less rounding.
                                partial[0] = 0.0
                                for c in T.unroll(width):
                                    total[c] += posts[j] * T.cast(wide[s, c * n + j], T.float32)
                                    partial[0] += values[c] * T.cast(wide[s, c * n + j], T.float32)
                                sums[n * n + j] += partial[0]
                            store_access(total, grad_f, t, at)
                            if has_bias:
                                for c in T.unroll(width):
                                    of_bias[tile * steps + s, c, tid] += total[c]
                            for i in T.unroll(n):
                                for c in T.unroll(width):
                                    result[c * n + i] = 0.0
                                for j in T.unroll(n):
                                    partial[0] = 0.0
                                    for c in T.unroll(width):
                                        result[c * n + i] += combs[i * n + j] * T.cast(
                                            wide[s, c * n + j], T.float32
                                        )
                                        partial[0] += T.cast(
                                            streams[s, c * n + i], T.float32
                                        ) * T.cast(wide[s, c * n + j], T.float32)
                                    sums[i * n + j] += partial[0]
                            if has_buffer:
                                add_held(held, s, adds, result)
                            store_access(result, grad_x, t, at * n)
                block_sums(sums, num_sums, threads, shared, partial)
                if tid % lanes == 0:
                    if tid < n * n * lanes:
                        grad_comb[t, tid // lanes] = partial[0]
                    elif tid < num_sums * lanes:
                        grad_post[t, tid // lanes - n * n] = partial[0]
            if has_bias:
                for s in T.serial(tiles * steps):
                    if s * threads + tid < accesses:
                        for c in T.unroll(width):
                            partials[block, (s * threads + tid) * width + c] = of_bias[s, c, tid]

    return interleaved_post_bwd_kernel
