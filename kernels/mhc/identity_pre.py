"""Read and write weights of streams that are not mixed, in two passes over the streams.

pre = sigmoid(z_pre) + pre_eps;  post = post_mult * sigmoid(z_post) + post_eps

The forward is `projection` with 2n rows; the sum of its splits, the gates and `aggregate` are one
kernel. The backward is that of `aggregate` for pre alone, the gates', and `projection`'s, which
takes the rest along.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    READS_LAST,
    SIMT,
    builder,
    follow_previous,
    load_mixes,
    row_threads,
    row_vector,
    store_partials,
)
from tile_mhc.kernels._shapes import SUM_LANES, TOKENS_PER_PARTIAL, factors_width, padded
from tile_mhc.kernels._weights import norm_shape
from tile_mhc.kernels.fused_pre import gated_aggregate
from tile_mhc.kernels.mixes import logit, sigmoid, sigmoid_slope
from tile_mhc.kernels.projection import product_gradient, store_parts

THREADS = TOKENS_PER_PARTIAL


@builder(READS_LAST)
def identity_pre_fwd(
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
    num_mixes = 2 * n
    size = n * hidden_size
    vector = row_vector(hidden_size, streams_dtype)
    threads = max(row_threads(hidden_size, vector), num_mixes * SUM_LANES)

    @T.prim_func
    def identity_pre_fwd_kernel(
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        scale: T.Tensor[(2,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        x: T.Tensor[(tokens, size), streams_dtype],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        layer_input: T.Tensor[(tokens, hidden_size), streams_dtype],
        post_mix: T.Tensor[(tokens, n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        norm_eps: T.float32,
        pre_eps: T.float32,
        post_eps: T.float32,
        post_mult: T.float32,
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
                layer_input,
                mixes,
                inv_rms,
                norm_eps,
                pre_eps,
                tf32,
                post_mix,
                post_eps,
                post_mult,
            )

    return identity_pre_fwd_kernel


@builder(SIMT)
def identity_gates_bwd(n: int, *, scale_dtype: str, bias_dtype: str):
    """A thread a token: what `split_mixes_bwd` and `projection_norm_bwd` do where comb is, too."""
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_partials")
    num_mixes = 2 * n
    part_rows = padded(num_mixes)
    width = factors_width(n)

    @T.prim_func
    def identity_gates_bwd_kernel(
        grad_pre: T.Tensor[(tokens, n), T.float32],
        grad_post: T.Tensor[(tokens, n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        scale: T.Tensor[(2,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        partials: T.Tensor[(rows, num_mixes + 2), T.float32],
        grad_parts: T.Tensor[(tokens, 2 * part_rows), T.bfloat16],
        factors: T.Tensor[(tokens, width), T.float32],
        size: T.float32,
        pre_eps: T.float32,
        post_mult: T.float32,
        tf32: T.int32,
    ):
        with T.Kernel(rows, threads=THREADS) as row:
            follow_previous()
            t = row * THREADS + T.get_thread_binding()
            mix = T.alloc_local((num_mixes,), T.float32)
            pre = T.alloc_local((n,), T.float32)
            post = T.alloc_local((n,), T.float32)
            sums = T.alloc_local((num_mixes + 2,), T.float32)
            values = T.alloc_local((part_rows,), T.float32)
            per_token = T.alloc_local((width,), T.float32)
            z = T.alloc_local((1,), T.float32)
            gate = T.alloc_local((1,), T.float32)
            for k in T.unroll(num_mixes + 2):
                sums[k] = 0.0
            for k in T.unroll(part_rows):
                values[k] = 0.0
            for c in T.unroll(width):
                per_token[c] = 0.0
            if t < tokens:
                load_mixes(mixes, t, 0, num_mixes, mix)
                load_mixes(grad_pre, t, 0, n, pre)
                load_mixes(grad_post, t, 0, n, post)
                per_token[0] = inv_rms[t]
                for k in T.unroll(n):
                    logit(mix[k], scale[0], bias[k], z)
                    sigmoid(z[0], gate)
                    per_token[3 + k] = gate[0] + pre_eps
                    sigmoid_slope(z[0], gate)
                    sums[k] = pre[k] * gate[0]
                for k in T.unroll(n):
                    logit(mix[n + k], scale[1], bias[n + k], z)
                    sigmoid_slope(z[0], gate)
                    sums[n + k] = post[k] * post_mult * gate[0]
                for k in T.unroll(num_mixes):
                    sums[num_mixes + k // n] += sums[k] * mix[k]
                    values[k] = sums[k] * T.cast(scale[k // n], T.float32)
                product_gradient(values, mix, per_token, size, tf32)
            store_partials(sums, num_mixes + 2, THREADS, row, partials)
            store_parts(values, per_token, t, tokens, grad_parts, factors)

    return identity_gates_bwd_kernel
