"""Sums over splits of K that another's matmul has left -> mixes, and their gradients.

products[t, g, m] = sum_s partials[s, t, g, m];  squares likewise
mixes[t, m] = sum_g products[t, g, m] * r[t, g],  r[t, g] = rsqrt(squares[t, g] / group_size + eps)

A group g is a part of K with an RMS of its own, of `group_size` columns; of one group the mixes are
the projection's. A row is a group of a token. There is no weight here, so no token can be done
again whose squares overflow: its mixes are 0 or NaN.
"""

import math
from typing import Any

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import READS_LAST, SIMT, builder, follow_previous
from tile_mhc.kernels.fused_pre import pre_kernel
from tile_mhc.kernels.projection import NORM_MIXES, THREADS, scale_sums, split_sums


@builder(SIMT)
def partials_norm_fwd(num_mixes: int, groups: int):
    """The sums and the mixes, by the splits and then the groups in their order."""
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_rows")
    splits = T.dynamic("num_splits")
    width = math.gcd(num_mixes, NORM_MIXES)
    parts = num_mixes // width

    @T.prim_func
    def partials_norm_fwd_kernel(
        split_products: T.Tensor[(splits, rows, num_mixes), T.float32],
        split_squares: T.Tensor[(splits, rows), T.float32],
        products: T.Tensor[(rows, num_mixes), T.float32],
        squares: T.Tensor[(rows,), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        group_size: T.int32,
        eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(tokens * parts, THREADS), threads=THREADS) as block:
            follow_previous()
            index = block * THREADS + T.get_thread_binding()
            t = index // parts
            m = index % parts * width
            sums = T.alloc_local((width + 1,), T.float32)
            scaled = T.alloc_local((width + 1,), T.float32)
            total = T.alloc_local((width,), T.float32)
            size = T.cast(group_size, T.float32)
            if t < tokens:
                for v in T.unroll(width):
                    total[v] = 0.0
                for g in T.serial(groups):
                    row = t * groups + g
                    split_sums(
                        split_products, split_squares, splits, row, m, width, 0, 1, True, sums
                    )
                    scale_sums(sums, width, size, eps, scaled)
                    for v in T.unroll(width):
                        total[v] += scaled[v]
                    for v in T.vectorized(width):
                        products[row, m + v] = sums[v]
                    if m == 0:
                        squares[row] = sums[width]
                for v in T.vectorized(width):
                    mixes[t, m + v] = total[v]

    return partials_norm_fwd_kernel


@builder(SIMT)
def partials_norm_bwd(num_mixes: int, groups: int):
    """One thread per row. grad_products = grad * r;
    grad_squares = -1/2 * sum_m grad[m] * products[m] * r / (squares + eps * group_size)

    In float64 up to the one rounding of each, which is little beside reading and writing them.
    """
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_rows")
    width = math.gcd(num_mixes, 4)

    @T.prim_func
    def partials_norm_bwd_kernel(
        grad: T.Tensor[(tokens, num_mixes), T.float32],
        products: T.Tensor[(rows, num_mixes), T.float32],
        squares: T.Tensor[(rows,), T.float32],
        grad_products: T.Tensor[(rows, num_mixes), T.float32],
        grad_squares: T.Tensor[(rows,), T.float32],
        group_size: T.int32,
        eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(rows, THREADS), threads=THREADS) as block:
            follow_previous()
            row = block * THREADS + T.get_thread_binding()
            given = T.alloc_local((width,), T.float32)
            product = T.alloc_local((width,), T.float32)
            square = T.alloc_local((1,), T.float64)
            inv_rms = T.alloc_local((1,), T.float64)
            along = T.alloc_local((1,), T.float64)
            size = T.cast(group_size, T.float64)
            if row < rows:
                square[0] = T.cast(squares[row], T.float64) + T.cast(eps, T.float64) * size
                inv_rms[0] = T.sqrt(size / square[0])
                along[0] = 0.0
                for k in T.unroll(num_mixes // width):
                    for v in T.vectorized(width):
                        given[v] = grad[row // groups, k * width + v]
                    for v in T.vectorized(width):
                        product[v] = products[row, k * width + v]
                    for v in T.unroll(width):
                        along[0] += T.cast(given[v], T.float64) * T.cast(product[v], T.float64)
                        given[v] = T.cast(T.cast(given[v], T.float64) * inv_rms[0], T.float32)
                    for v in T.vectorized(width):
                        grad_products[row, k * width + v] = given[v]
                along[0] *= -0.5 * inv_rms[0] / square[0]
                grad_squares[row] = T.cast(along[0], T.float32)

    return partials_norm_bwd_kernel


def _pre(
    n: int,
    hidden_size: int,
    streams_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
) -> Any:
    return pre_kernel(
        n,
        hidden_size,
        many_splits=False,
        weight_dtype="",
        norm_weight_dtype="",
        streams_dtype=streams_dtype,
        scale_dtype=scale_dtype,
        bias_dtype=bias_dtype,
        layer_norm_dtype="",
        limits=limits,
    )


@builder(SIMT)
def partials_pre(
    n: int,
    hidden_size: int,
    *,
    streams_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    """`fused_pre` behind sums of another's, without a weight to do a token again with.

    Any number of splits, and the bits of `partials_norm_fwd`.
    """
    return _pre(n, hidden_size, streams_dtype, scale_dtype, bias_dtype, limits)


@builder(READS_LAST)
def partials_last_pre(
    n: int,
    hidden_size: int,
    *,
    streams_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    """The same kernel for streams of which L2 holds a good part: it gives up what has been read."""
    return _pre(n, hidden_size, streams_dtype, scale_dtype, bias_dtype, limits)
