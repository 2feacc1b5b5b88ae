"""What a boundary between two sub-layers has beside the kernels of post and of pre.

layer_input[t, h] = layer_input[t, h] * rsqrt(mean_h layer_input[t, h]**2 + eps) * norm_weight[h]
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    block_sums,
    builder,
    follow_previous,
    row_threads,
    row_vector,
    sums_shape,
)


@builder(SIMT)
def input_norm(hidden_size: int, *, streams_dtype: str, norm_weight_dtype: str):
    """The RMS norm of a layer's input, in place; a CTA has one token."""
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)
    chunks = -(-hidden_size // (threads * vector))

    @T.prim_func
    def input_norm_kernel(
        layer_input: T.Tensor[(tokens, hidden_size), streams_dtype],
        norm_weight: T.Tensor[(hidden_size,), norm_weight_dtype],
        eps: T.float32,
    ):
        with T.Kernel(tokens, threads=threads) as t:
            follow_previous()
            tid = T.get_thread_binding()
            square = T.alloc_local((1,), T.float32)
            values = T.alloc_local((vector,), streams_dtype)
            shared = T.alloc_shared(sums_shape(1, threads), T.float32)
            factor = T.alloc_shared((1,), T.float32)
            square[0] = 0.0
            for c in T.serial(chunks):
                h = (c * threads + tid) * vector
                if h < hidden_size:
                    for v in T.vectorized(vector):
                        values[v] = layer_input[t, h + v]
                    for v in T.unroll(vector):
                        square[0] += T.cast(values[v], T.float32) * T.cast(values[v], T.float32)
            block_sums(square, 1, threads, shared, square)
            if tid == 0:
                factor[0] = T.rsqrt(square[0] / hidden_size + eps)
            T.sync_threads()
            for c in T.serial(chunks):
                h = (c * threads + tid) * vector
                if h < hidden_size:
                    for v in T.vectorized(vector):
                        values[v] = layer_input[t, h + v]
                    for v in T.vectorized(vector):
                        layer_input[t, h + v] = T.cast(
                            T.cast(values[v], T.float32)
                            * factor[0]
                            * T.cast(norm_weight[h + v], T.float32),
                            streams_dtype,
                        )

    return input_norm_kernel
