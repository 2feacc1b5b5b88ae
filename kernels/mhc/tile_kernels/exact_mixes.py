"""Gradients of scale, bias and sigmoid for TileKernels' plain backward of `split_mixes`.

Those of `mixes`, but float64 from what is read to the one rounding of what is written, sums over
tokens too: beside TileKernels' none may be less exact. In float32 the rounding of a large logit
alone would be more than that of the result. Beside reading and writing a token this is little.
"""

import tilelang.language as T

from tile_mhc.kernels._common import SIMT, builder, follow_previous, load_mixes, store_mixes
from tile_mhc.kernels.mixes import THREADS

WARPS = THREADS // 32


def exact(value: T.PrimExpr):
    """In float64, by way of float32, which holds all of a parameter's dtype."""
    return T.cast(T.cast(value, T.float32), T.float64)


@T.macro
def exact_slope(mix: T.float32, scale: T.PrimExpr, bias: T.PrimExpr, out: T.Buffer):
    """out[0] = the derivative of sigmoid(z), z = mix * scale + bias, in float64.

    e / (1 + e)**2 with e = exp(-|z|): the same for z and -z, and nothing overflows or cancels.
    """
    out[0] = exact(mix) * exact(scale) + exact(bias)
    out[0] = T.exp(-T.abs(out[0]))
    out[0] = out[0] / ((1.0 + out[0]) * (1.0 + out[0]))


@T.macro
def warp_sum(value: T.Buffer, k: T.int32, shared: T.Buffer):
    """shared[warp, k] = the sum of value[0], float64, over the warp; by all its threads."""
    tid = T.get_thread_binding()
    for level in T.unroll(5):
        value[0] += T.shfl_xor(value[0], 1 << level)
    if tid % 32 == 0:
        shared[tid // 32, k] = value[0]


@T.macro
def sum_of_warps(shared: T.Buffer, k: T.int32, out: T.Buffer):
    """out[0] = sum k of the CTA, float64, in a fixed order; after a barrier."""
    out[0] = shared[0, k]
    for warp in T.unroll(WARPS - 1):
        out[0] += shared[warp + 1, k]


@T.macro
def mix_gradient(
    term: T.Buffer,
    k: T.int32,
    group: T.int32,
    scale: T.Tensor,
    mix: T.Buffer,
    of_scale: T.Buffer,
):
    """From a logit's gradient, term[0]: its part of that of scale, and in mix[k] the mix's."""
    of_scale[group] += term[0] * exact(mix[k])
    mix[k] = T.cast(term[0] * exact(scale[group]), T.float32)


@builder(SIMT)
def exact_mixes_bwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_partials")
    num_mixes = n * (n + 2)

    @T.prim_func
    def exact_mixes_bwd_kernel(
        grad_pre: T.Tensor[(tokens, n), T.float32],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        grad_mixes: T.Tensor[(tokens, num_mixes), T.float32],
        partials: T.Tensor[(rows, num_mixes + 3), T.float64],
        post_mult: T.float32,
    ):
        # One thread per token; the sums of a CTA are one row of partials: bias, then scale.
        with T.Kernel(rows, threads=THREADS) as row:
            follow_previous()
            tid = T.get_thread_binding()
            t = row * THREADS + tid
            term = T.alloc_local((1,), T.float64)
            of_scale = T.alloc_local((3,), T.float64)
            mix = T.alloc_local((num_mixes,), T.float32)
            pre = T.alloc_local((n,), T.float32)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n * n,), T.float32)
            shared = T.alloc_shared((WARPS, num_mixes + 3), T.float64)
            if t < tokens:
                load_mixes(mixes, t, 0, num_mixes, mix)
                load_mixes(grad_pre, t, 0, n, pre)
                load_mixes(grad_post, t, 0, n, post)
                load_mixes(grad_comb, t, 0, n * n, comb)
            for group in T.unroll(3):
                of_scale[group] = 0.0
            # Each sum over the warp as soon as it has its term: together they would take the
            # registers of twice as many float32.
            for k in T.unroll(n):
                term[0] = 0.0
                if t < tokens:
                    exact_slope(mix[k], scale[0], bias[k], term)
                    term[0] *= exact(pre[k])
                    mix_gradient(term, k, 0, scale, mix, of_scale)
                warp_sum(term, k, shared)
            for k in T.unroll(n):
                term[0] = 0.0
                if t < tokens:
                    exact_slope(mix[n + k], scale[1], bias[n + k], term)
                    term[0] *= exact(post[k]) * exact(post_mult)
                    mix_gradient(term, n + k, 1, scale, mix, of_scale)
                warp_sum(term, n + k, shared)
            for k in T.unroll(n * n):
                term[0] = 0.0
                if t < tokens:
                    term[0] = exact(comb[k])
                    mix_gradient(term, 2 * n + k, 2, scale, mix, of_scale)
                warp_sum(term, 2 * n + k, shared)
            for group in T.unroll(3):
                term[0] = of_scale[group]
                warp_sum(term, num_mixes + group, shared)
            if t < tokens:
                store_mixes(mix, num_mixes, grad_mixes, t, 0)
            T.sync_threads()
            if tid < num_mixes + 3:
                sum_of_warps(shared, tid, term)
                partials[row, tid] = term[0]

    return exact_mixes_bwd_kernel


@builder(SIMT)
def exact_sums(biases: int, scales: int, *, scale_dtype: str, bias_dtype: str):
    """Sums over the rows of partials in float64: the gradients of bias, then of scale."""
    rows = T.dynamic("num_partials")
    columns = biases + scales

    @T.prim_func
    def exact_sums_kernel(
        partials: T.Tensor[(rows, columns), T.float64],
        grad_bias: T.Tensor[(biases,), bias_dtype],
        grad_scale: T.Tensor[(scales,), scale_dtype],
    ):
        # One CTA per column: each thread sums every THREADS-th row.
        with T.Kernel(columns, threads=THREADS) as column:
            follow_previous()
            tid = T.get_thread_binding()
            total = T.alloc_local((1,), T.float64)
            rounded = T.alloc_local((1,), T.float32)
            shared = T.alloc_shared((WARPS, 1), T.float64)
            total[0] = 0.0
            for step in T.serial(T.ceildiv(rows, THREADS)):
                if step * THREADS + tid < rows:
                    total[0] += partials[step * THREADS + tid, column]
            warp_sum(total, 0, shared)
            T.sync_threads()
            if tid == 0:
                sum_of_warps(shared, 0, total)
                rounded[0] = T.cast(total[0], T.float32)
                if column < biases:
                    grad_bias[column] = T.cast(rounded[0], bias_dtype)
                else:
                    grad_scale[column - biases] = T.cast(rounded[0], scale_dtype)

    return exact_sums_kernel
