"""The RMS norm of a row, behind whoever has made it in the same launch, or by itself."""

import tilelang.language as T

from tile_mhc.kernels._common import block_sums, sums_shape


@T.macro
def normed_row(
    layer_input: T.Tensor,
    weight: T.Tensor,
    t: T.int32,
    hidden_size: int,
    threads: int,
    vector: int,
    eps: T.float32,
):
    """layer_input[t, h] *= rsqrt(mean_h layer_input[t, h]**2 + eps) * weight[h], by one CTA.

    A thread has the columns that it has when the CTA makes a row: it reads what it wrote itself.
    """
    tid = T.get_thread_binding()
    square = T.alloc_local((1,), T.float32)
    values = T.alloc_local((vector,), layer_input.dtype)
    shared = T.alloc_shared(sums_shape(1, threads), T.float32)
    factor = T.alloc_shared((1,), T.float32)
    chunks = -(-hidden_size // (threads * vector))
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
                    T.cast(values[v], T.float32) * factor[0] * T.cast(weight[h + v], T.float32),
                    layer_input.dtype,
                )
