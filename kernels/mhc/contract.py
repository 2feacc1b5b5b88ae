"""The learned n -> 1 readout in two passes.

The readout is `projection` with n rows, the gate of `head_mix` and `aggregate`; the last two, and
the sum of the splits before them, are one kernel.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    READS_LAST,
    builder,
    follow_previous,
    row_threads,
    row_vector,
)
from tile_mhc.kernels._shapes import SUM_LANES
from tile_mhc.kernels._weights import norm_shape
from tile_mhc.kernels.fused_pre import gated_aggregate


@builder(READS_LAST)
def contract_fwd(
    n: int,
    hidden_size: int,
    many_splits: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    streams_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
):
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    size = n * hidden_size
    vector = row_vector(hidden_size, streams_dtype)
    threads = max(row_threads(hidden_size, vector), n * SUM_LANES)

    @T.prim_func
    def contract_fwd_kernel(
        products: T.Tensor[(splits, tokens, n), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        scale: T.Tensor[(1,), scale_dtype],
        bias: T.Tensor[(n,), bias_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        x: T.Tensor[(tokens, size), streams_dtype],
        weight: T.Tensor[(n, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        out: T.Tensor[(tokens, hidden_size), streams_dtype],
        mixes: T.Tensor[(tokens, n), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        norm_eps: T.float32,
        pre_eps: T.float32,
        tf32: T.int32,
    ):
        with T.Kernel(tokens, threads=threads) as t:
            follow_previous()
            gated_aggregate(
                products,
                squares,
                x,
                weight,
                norm_weight,
                norm_weight_dtype,
                splits,
                SUM_LANES if many_splits else 1,
                t,
                n,
                hidden_size,
                threads,
                vector,
                scale,
                bias,
                residual,
                out,
                mixes,
                inv_rms,
                norm_eps,
                pre_eps,
                tf32,
            )

    return contract_fwd_kernel
