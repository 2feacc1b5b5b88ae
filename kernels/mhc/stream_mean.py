"""The mean of the streams, n -> 1, and its gradient: what `expand` does, with a factor.

out[t, h] = sum_i residual[t, i, h] / n;  grad_residual[t, i, h] = grad[t, h] / n
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    READS_LAST,
    SIMT,
    builder,
    follow_previous,
    row_chunks,
    row_threads,
    row_vector,
)
from tile_mhc.kernels.expand import spread, spreading_ctas, sum_streams


@builder(READS_LAST)
def stream_mean_fwd(n: int, hidden_size: int, *, streams_dtype: str):
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    chunks = row_chunks(hidden_size, threads, vector)

    @T.prim_func
    def stream_mean_fwd_kernel(
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        out: T.Tensor[(tokens, hidden_size), streams_dtype],
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            sum_streams(residual, out, block, threads, 1 / n)

    return stream_mean_fwd_kernel


@builder(SIMT)
def stream_mean_bwd(n: int, hidden_size: int, *, streams_dtype: str):
    tokens = T.dynamic("num_tokens")
    threads = row_threads(hidden_size, row_vector(hidden_size, streams_dtype))
    ctas = spreading_ctas(n, hidden_size, streams_dtype)

    @T.prim_func
    def stream_mean_bwd_kernel(
        grad: T.Tensor[(tokens, hidden_size), streams_dtype],
        grad_residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
    ):
        with T.Kernel(tokens * ctas, threads=threads) as block:
            follow_previous()
            spread(grad, grad_residual, block, threads, 1 / n)

    return stream_mean_bwd_kernel
