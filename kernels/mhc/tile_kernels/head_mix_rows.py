"""Gradients of the readout's gate, those of scale and bias in as many rows of sums as asked for.

Blocks of `block_tokens` tokens go to the rows in turn, as TileKernels deals them to its CTAs. It is
float64 up to the one rounding of each result, as in `exact_mixes`.
"""

import tilelang.language as T

from tile_mhc.kernels._common import SIMT, builder, follow_previous, load_mixes, store_mixes
from tile_mhc.kernels.mixes import THREADS
from tile_mhc.kernels.tile_kernels.exact_mixes import (
    WARPS,
    exact,
    exact_slope,
    sum_of_warps,
    warp_sum,
)


@builder(SIMT)
def head_mix_rows_bwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_rows")

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
            term = T.alloc_local((1,), T.float64)
            mix = T.alloc_local((n,), T.float32)
            out = T.alloc_local((n,), T.float32)
            sums = T.alloc_local((n + 1,), T.float64)
            shared = T.alloc_shared((WARPS, n + 1), T.float64)
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
                        exact_slope(mix[k], scale[0], bias[k], term)
                        term[0] *= exact(out[k])
                        sums[k] += term[0]
                        sums[n] += term[0] * exact(mix[k])
                        out[k] = T.cast(term[0] * exact(scale[0]), T.float32)
                    store_mixes(out, n, grad_mixes, t, 0)
            for k in T.unroll(n + 1):
                term[0] = sums[k]
                warp_sum(term, k, shared)
            T.sync_threads()
            if tid <= n:
                sum_of_warps(shared, tid, term)
                if tid < n:
                    bias_rows[row, tid] = T.cast(term[0], T.float32)
                else:
                    scale_rows[row] = T.cast(term[0], T.float32)

    return head_mix_rows_bwd_kernel
