"""Gradients of the readout's gate, those of scale and bias in as many rows of sums as asked for.

Blocks of `block_tokens` tokens go to the rows in turn, as TileKernels deals them to its CTAs.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    block_sums,
    builder,
    follow_previous,
    load_mixes,
    store_mixes,
    sum_lanes,
    sums_shape,
)
from tile_mhc.kernels.mixes import THREADS, logit, sigmoid_slope


@builder(SIMT)
def head_mix_rows_bwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_rows")
    lanes = sum_lanes(n + 1, THREADS)

    @T.prim_func
    def head_mix_rows_bwd_kernel(
        grad: T.Tensor[(tokens, n), T.float32],
        mixes: T.Tensor[(tokens, n), T.float32],
        scale: T.Tensor[(1,), scale_dtype],
        bias: T.Tensor[(n,), bias_dtype],
        grad_mixes: T.Tensor[(tokens, n), T.float32],
        scale_rows: T.Tensor[(rows,), T.float32],
        bias_rows: T.Tensor[(rows, n), T.float32],
        block_tokens: T.int32,
    ):
        # One CTA a row.
        with T.Kernel(rows, threads=THREADS) as row:
            follow_previous()
            tid = T.get_thread_binding()
            z = T.alloc_local((1,), T.float32)
            slope = T.alloc_local((1,), T.float32)
            term = T.alloc_local((1,), T.float32)
            mix = T.alloc_local((n,), T.float32)
            out = T.alloc_local((n,), T.float32)
            sums = T.alloc_local((n + 1,), T.float32)
            total = T.alloc_local((1,), T.float32)
            shared = T.alloc_shared(sums_shape(n + 1, THREADS), T.float32)
            for k in T.unroll(n + 1):
                sums[k] = 0.0
            blocks = T.ceildiv(T.ceildiv(tokens, block_tokens), rows)
            for turn in T.serial(T.ceildiv(blocks * block_tokens, THREADS)):
                # Of this row's tokens, where it has all of them one after another.
                own = turn * THREADS + tid
                t = (own // block_tokens * rows + row) * block_tokens + own % block_tokens
                if t < tokens:
                    load_mixes(mixes, t, 0, n, mix)
                    load_mixes(grad, t, 0, n, out)
                    for k in T.unroll(n):
                        logit(mix[k], scale[0], bias[k], z)
                        sigmoid_slope(z[0], slope)
                        term[0] = out[k] * slope[0]
                        sums[k] += term[0]
                        sums[n] += term[0] * mix[k]
                        out[k] = term[0] * T.cast(scale[0], T.float32)
                    store_mixes(out, n, grad_mixes, t, 0)
            block_sums(sums, n + 1, THREADS, shared, total)
            if tid % lanes == 0 and tid < (n + 1) * lanes:
                if tid // lanes < n:
                    bias_rows[row, tid // lanes] = total[0]
                else:
                    scale_rows[row] = total[0]

    return head_mix_rows_bwd_kernel
