"""The gates of bare products: scale, bias, the RMS factor and sigmoids, as TransformerEngine has
them.

r = 1 / sqrt(ms + eps);  z = h * r * scale[group] + bias
pre = sigmoid(z);  post = 2 * sigmoid(z);  comb = z
Rows of h are padded to PADDED columns. Gradients of scale and bias: partial sums, then column_sums.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    builder,
    follow_previous,
    load_mixes,
    store_mixes,
    store_partials,
)
from tile_mhc.kernels._shapes import PADDED, TOKENS_PER_PARTIAL
from tile_mhc.kernels.mixes import WARP_TOKENS, logit, sigmoid, sigmoid_slope

# One thread per token.
THREADS = TOKENS_PER_PARTIAL
# TransformerEngine's: the epsilon of float32, which its users cannot choose.
RMS_EPS = 2.0**-23
POST_MULT = 2.0


@builder(SIMT)
def padded_mixes_fwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = n + 2

    @T.prim_func
    def padded_mixes_fwd_kernel(
        h: T.Tensor[(tokens, PADDED), T.float32],
        ms: T.Tensor[(tokens,), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(n * rows,), bias_dtype],
        pre: T.Tensor[(tokens, n), T.float32],
        post: T.Tensor[(tokens, n), T.float32],
        comb: T.Tensor[(tokens, n * n), T.float32],
    ):
        with T.Kernel(T.ceildiv(tokens, WARP_TOKENS), threads=WARP_TOKENS * rows) as block:
            follow_previous()
            t = block * WARP_TOKENS + T.get_thread_binding() % WARP_TOKENS
            row = T.get_thread_binding() // WARP_TOKENS
            z = T.alloc_local((n,), T.float32)
            gate = T.alloc_local((1,), T.float32)
            inv_rms = T.alloc_local((1,), T.float32)
            if t < tokens:
                load_mixes(h, t, row * n, n, z)
                inv_rms[0] = T.rsqrt(ms[t] + T.float32(RMS_EPS))
                for k in T.unroll(n):
                    logit(z[k] * inv_rms[0], scale[T.min(row, 2)], bias[row * n + k], gate)
                    z[k] = gate[0]
                if row < 2:
                    for k in T.unroll(n):
                        sigmoid(z[k], gate)
                        z[k] = gate[0]
                if row == 0:
                    store_mixes(z, n, pre, t, 0)
                elif row == 1:
                    for k in T.unroll(n):
                        z[k] *= POST_MULT
                    store_mixes(z, n, post, t, 0)
                else:
                    store_mixes(z, n, comb, t, (row - 2) * n)

    return padded_mixes_fwd_kernel


@builder(SIMT)
def padded_mixes_bwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_partials")
    num_mixes = n * (n + 2)

    @T.prim_func
    def padded_mixes_bwd_kernel(
        grad_pre: T.Tensor[(tokens, n), T.float32],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
        h: T.Tensor[(tokens, PADDED), T.float32],
        ms: T.Tensor[(tokens,), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        grad_h: T.Tensor[(tokens, PADDED), T.float32],
        grad_ms: T.Tensor[(tokens,), T.float32],
        partials: T.Tensor[(rows, num_mixes + 3), T.float32],
    ):
        # One thread per token; the sums of a CTA are one row of partials: bias, then scale.
        with T.Kernel(rows, threads=THREADS) as row:
            follow_previous()
            tid = T.get_thread_binding()
            t = row * THREADS + tid
            z = T.alloc_local((1,), T.float32)
            slope = T.alloc_local((1,), T.float32)
            total = T.alloc_local((1,), T.float32)
            inv_rms = T.alloc_local((1,), T.float32)
            factor = T.alloc_local((3,), T.float32)
            mix = T.alloc_local((PADDED,), T.float32)
            sums = T.alloc_local((num_mixes + 3,), T.float32)
            for k in T.unroll(num_mixes + 3):
                sums[k] = 0.0
            if t < tokens:
                # `sums` holds the gradients of the gates first, then those of their arguments.
                load_mixes(h, t, 0, PADDED, mix)
                load_gradients(grad_pre, t, n, 0, sums)
                load_gradients(grad_post, t, n, n, sums)
                load_gradients(grad_comb, t, n * n, 2 * n, sums)
                inv_rms[0] = T.rsqrt(ms[t] + T.float32(RMS_EPS))
                for g in T.unroll(3):
                    factor[g] = T.cast(scale[g], T.float32)
                for k in T.unroll(num_mixes):
                    mix[k] *= inv_rms[0]
                for k in T.unroll(2 * n):
                    logit(mix[k], factor[k // n], bias[k], z)
                    sigmoid_slope(z[0], slope)
                    sums[k] *= slope[0]
                for k in T.unroll(n):
                    sums[n + k] *= POST_MULT
                total[0] = 0.0
                for k in T.unroll(num_mixes):
                    sums[num_mixes + T.min(k // n, 2)] += sums[k] * mix[k]
                for g in T.unroll(3):
                    total[0] += sums[num_mixes + g] * factor[g]
                for k in T.unroll(num_mixes):
                    mix[k] = sums[k] * (factor[T.min(k // n, 2)] * inv_rms[0])
                for k in T.unroll(PADDED - num_mixes):
                    mix[num_mixes + k] = 0.0
                store_mixes(mix, PADDED, grad_h, t, 0)
                # d r / d ms = -r**3 / 2; two of the r stand in mix and in total.
                grad_ms[t] = -0.5 * total[0] * inv_rms[0] * inv_rms[0]
            store_partials(sums, num_mixes + 3, THREADS, row, partials)

    return padded_mixes_bwd_kernel


@T.macro
def load_gradients(source: T.Tensor, t: T.int32, count: int, first: int, local: T.Buffer):
    """local[first + k] = source[t, k] for k < count."""
    row = T.alloc_local((count,), T.float32)
    load_mixes(source, t, 0, count, row)
    for k in T.unroll(count):
        local[first + k] = row[k]
