"""Bare products and mean squares, as TransformerEngine has them, around the matmuls of projection.

h[t, m] = sum_k x[t, k] * w[m, k], rows padded with zeros to PADDED columns;  ms[t] = mean_k x**2
grad_x = grad_h w + x * (2 / K) * grad_ms;  grad_w = grad_h^T x
"""

import tilelang.language as T

from tile_mhc.kernels._common import SIMT, builder, follow_previous, load_mixes
from tile_mhc.kernels._shapes import PADDED, factors_width, padded
from tile_mhc.kernels.projection import THREADS, store_parts

# Columns that one thread sums.
COLUMNS = 4


@builder(SIMT)
def padded_projection_fwd(num_mixes: int, size: int):
    """Sum the splits, in order."""
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    # The first group of padding columns has no products: its thread computes the mean square.
    groups = PADDED // COLUMNS
    block = THREADS // groups

    @T.prim_func
    def padded_projection_fwd_kernel(
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        h: T.Tensor[(tokens, PADDED), T.float32],
        ms: T.Tensor[(tokens,), T.float32],
    ):
        with T.Kernel(T.ceildiv(tokens, block), threads=THREADS) as b:
            follow_previous()
            t = b * block + T.get_thread_binding() // groups
            m = T.get_thread_binding() % groups * COLUMNS
            total = T.alloc_local((COLUMNS,), T.float32)
            part = T.alloc_local((COLUMNS,), T.float32)
            square = T.alloc_local((1,), T.float32)
            if t < tokens:
                for v in T.unroll(COLUMNS):
                    total[v] = 0.0
                if m < num_mixes:
                    for s in T.serial(splits):
                        for v in T.vectorized(COLUMNS):
                            part[v] = products[s, t, m + v]
                        for v in T.unroll(COLUMNS):
                            total[v] += part[v]
                if m == num_mixes:
                    square[0] = 0.0
                    for s in T.serial(splits):
                        square[0] += squares[s, t]
                    ms[t] = square[0] / size
                for v in T.vectorized(COLUMNS):
                    h[t, m + v] = total[v]

    return padded_projection_fwd_kernel


@builder(SIMT)
def padded_projection_pack(num_mixes: int, size: int):
    """The gradients in the form that `projection_bwd` takes: see `projection_norm_bwd`.

    Its inv_rms is one here, and the factor of x from the statistic 2 / K * grad_ms.
    """
    tokens = T.dynamic("num_tokens")
    part_rows = padded(num_mixes)
    width = factors_width(0)

    @T.prim_func
    def padded_projection_pack_kernel(
        grad_h: T.Tensor[(tokens, PADDED), T.float32],
        grad_ms: T.Tensor[(tokens,), T.float32],
        grad_parts: T.Tensor[(tokens, 2 * part_rows), T.bfloat16],
        factors: T.Tensor[(tokens, width), T.float32],
    ):
        # One thread per token; a CTA takes whole tiles of tokens.
        with T.Kernel(T.ceildiv(tokens, THREADS), threads=THREADS) as block:
            follow_previous()
            t = block * THREADS + T.get_thread_binding()
            values = T.alloc_local((part_rows,), T.float32)
            per_token = T.alloc_local((width,), T.float32)
            for m in T.unroll(part_rows):
                values[m] = 0.0
            for c in T.unroll(width):
                per_token[c] = 0.0
            if t < tokens:
                load_mixes(grad_h, t, 0, num_mixes, values)
                per_token[0] = 1.0
                per_token[1] = grad_ms[t] * T.float32(2 / size)
            store_parts(values, per_token, t, tokens, grad_parts, factors)

    return padded_projection_pack_kernel
