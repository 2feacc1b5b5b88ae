"""The gate of the readout alone: sigmoid(mixes * scale + bias) + pre_eps, and its gradients.

Gradients of scale and bias are sums over tokens: a row of partial sums per CTA, then `column_sums`
over the rows.
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
from tile_mhc.kernels.mixes import THREADS, logit, sigmoid, sigmoid_slope


@builder(SIMT)
def head_mix_fwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    # Whole tokens, one thread per mix: indices stay 32 bits wide.
    block_tokens = 256 // n

    @T.prim_func
    def head_mix_fwd_kernel(
        mixes: T.Tensor[(tokens, n), T.float32],
        scale: T.Tensor[(1,), scale_dtype],
        bias: T.Tensor[(n,), bias_dtype],
        out: T.Tensor[(tokens, n), T.float32],
        pre_eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(tokens, block_tokens), threads=block_tokens * n) as block:
            follow_previous()
            t = block * block_tokens + T.get_thread_binding() // n
            k = T.get_thread_binding() % n
            z = T.alloc_local((1,), T.float32)
            if t < tokens:
                logit(mixes[t, k], scale[0], bias[k], z)
                sigmoid(z[0], z)
                out[t, k] = z[0] + pre_eps

    return head_mix_fwd_kernel


@builder(SIMT)
def head_mix_bwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_partials")

    @T.prim_func
    def head_mix_bwd_kernel(
        grad: T.Tensor[(tokens, n), T.float32],
        mixes: T.Tensor[(tokens, n), T.float32],
        scale: T.Tensor[(1,), scale_dtype],
        bias: T.Tensor[(n,), bias_dtype],
        grad_mixes: T.Tensor[(tokens, n), T.float32],
        partials: T.Tensor[(rows, n + 1), T.float32],
    ):
        # One thread per token; the sums of a CTA are one row of partials: bias, then scale.
        with T.Kernel(rows, threads=THREADS) as row:
            follow_previous()
            tid = T.get_thread_binding()
            t = row * THREADS + tid
            z = T.alloc_local((1,), T.float32)
            slope = T.alloc_local((1,), T.float32)
            mix = T.alloc_local((n,), T.float32)
            out = T.alloc_local((n,), T.float32)
            sums = T.alloc_local((n + 1,), T.float32)
            for k in T.unroll(n + 1):
                sums[k] = 0.0
            if t < tokens:
                load_mixes(mixes, t, 0, n, mix)
                load_mixes(grad, t, 0, n, out)
                for k in T.unroll(n):
                    logit(mix[k], scale[0], bias[k], z)
                    sigmoid_slope(z[0], slope)
                    sums[k] = out[k] * slope[0]
                    sums[n] += sums[k] * mix[k]
                    out[k] = sums[k] * T.cast(scale[0], T.float32)
                store_mixes(out, n, grad_mixes, t, 0)
            store_partials(sums, n + 1, THREADS, row, partials)

    return head_mix_bwd_kernel
