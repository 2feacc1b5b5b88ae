"""Gradients of the product of a weight and a norm weight, added to what is there.

grad_weight[m, k] += grad[m, k] * norm_weight[k];  grad_norm_weight[k] += sum_m grad * weight
Each is rounded once: the first as one fused multiply-add, the second after a sum in float64.
"""

import math

import tilelang.language as T

from tile_mhc.kernels._common import SIMT, builder, follow_previous

# A thread takes its columns through all rows: a warp per CTA spreads few columns over all SMs.
THREADS = 32
# Rows that a thread loads before it adds the first.
AT_ONCE = 4


@builder(SIMT)
def norm_weight_bwd(num_mixes: int, size: int):
    vector = math.gcd(size, 4)

    @T.prim_func
    def norm_weight_bwd_kernel(
        grad: T.Tensor[(num_mixes, size), T.float32],
        weight: T.Tensor[(num_mixes, size), T.float32],
        norm_weight: T.Tensor[(size,), T.float32],
        grad_weight: T.Tensor[(num_mixes, size), T.float32],
        grad_norm_weight: T.Tensor[(size,), T.float32],
    ):
        with T.Kernel(T.ceildiv(size, THREADS * vector), threads=THREADS) as block:
            follow_previous()
            k = (block * THREADS + T.get_thread_binding()) * vector
            factor = T.alloc_local((vector,), T.float32)
            given = T.alloc_local((AT_ONCE, vector), T.float32)
            value = T.alloc_local((AT_ONCE, vector), T.float32)
            total = T.alloc_local((AT_ONCE, vector), T.float32)
            norm = T.alloc_local((vector,), T.float64)
            rounded = T.alloc_local((vector,), T.float32)
            if k < size:
                for v in T.vectorized(vector):
                    factor[v] = norm_weight[k + v]
                for v in T.vectorized(vector):
                    rounded[v] = grad_norm_weight[k + v]
                for v in T.unroll(vector):
                    norm[v] = T.cast(rounded[v], T.float64)
                for turn in T.serial(T.ceildiv(num_mixes, AT_ONCE)):
                    for i in T.unroll(AT_ONCE):
                        if turn * AT_ONCE + i < num_mixes:
                            for v in T.vectorized(vector):
                                given[i, v] = grad[turn * AT_ONCE + i, k + v]
                            for v in T.vectorized(vector):
                                value[i, v] = weight[turn * AT_ONCE + i, k + v]
                            for v in T.vectorized(vector):
                                total[i, v] = grad_weight[turn * AT_ONCE + i, k + v]
                    for i in T.unroll(AT_ONCE):
                        if turn * AT_ONCE + i < num_mixes:
                            for v in T.unroll(vector):
                                norm[v] += T.cast(given[i, v], T.float64) * T.cast(
                                    value[i, v], T.float64
                                )
                                total[i, v] = T.ieee_fmaf(given[i, v], factor[v], total[i, v])
                            for v in T.vectorized(vector):
                                grad_weight[turn * AT_ONCE + i, k + v] = total[i, v]
                for v in T.unroll(vector):
                    rounded[v] = T.cast(norm[v], T.float32)
                for v in T.vectorized(vector):
                    grad_norm_weight[k + v] = rounded[v]

    return norm_weight_bwd_kernel
