"""Bare products and mean squares, as TransformerEngine has them, around the matmuls of projection.

h[t, m] = sum_k x[t, k] * w[m, k], rows padded with zeros to PADDED columns;  ms[t] = mean_k x**2
grad_x = grad_h w + x * (2 / K) * grad_ms;  grad_w = grad_h^T x
"""

import tilelang.language as T

from tile_mhc.kernels._common import SIMT, VECTOR, builder, follow_previous, load_mixes, store_mixes
from tile_mhc.kernels._shapes import BACKWARD_TOKENS, PADDED, factors_width, padded

THREADS = 128
# Columns a thread sums.
COLUMNS = 4


@builder(SIMT)
def padded_projection_fwd(num_mixes: int, size: int):
    """Sum the splits, in order."""
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    # The first group of padding has the mean square to do.
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
