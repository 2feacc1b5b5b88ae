"""Scale, bias and sigmoid: mixes -> pre, post and the logits of comb.

z = mixes * scale[group] + bias;  pre = sigmoid(z) + pre_eps;  post = post_mult * sigmoid(z);
comb = z. Gradients of scale and bias are sums over tokens: one row of partial sums per CTA,
then `column_sums` over the rows.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    block_sums,
    builder,
    follow_previous,
    follow_previous_at_last,
    follow_previous_unless,
    load_mixes,
    reciprocal,
    store_mixes,
    store_partials,
    sums_shape,
)
from tile_mhc.kernels._shapes import TOKENS_PER_PARTIAL

# One thread per token.
THREADS = TOKENS_PER_PARTIAL
# Tokens per CTA where each row of n mixes has a warp of its own: the lanes of a warp take the same
# branch, and store to adjacent addresses.
WARP_TOKENS = 32


@T.macro
def logit(mix: T.float32, scale: T.PrimExpr, bias: T.PrimExpr, out: T.Buffer):
    """out[0] = mix * scale + bias: every gate's argument, rounded alike in every kernel."""
    out[0] = T.ieee_fmaf(mix, T.cast(scale, T.float32), T.cast(bias, T.float32))


@T.macro
def sigmoid(z: T.float32, out: T.Buffer):
    """out[0] = 1 / (1 + exp(-z)) to the bits of T.sigmoid, but 2**-126 where that would be less."""
    divisor = T.alloc_local((1,), T.float32)
    divisor[0] = 1.0 + T.exp(-z)
    # Not T.min, which would make a number of NaN.
    divisor[0] = T.Select(divisor[0] > 2.0**126, T.float32(2.0**126), divisor[0])
    reciprocal(divisor[0], out, 0)


@T.macro
def sigmoid_slope(z: T.float32, out: T.Buffer):
    """out[0] = sigmoid(z) * sigmoid(-z), the derivative of the sigmoid.

    Not gate * (1 - gate): where the gate is near 1, that difference keeps few bits, and none from
    z = 17 on.
    """
    out[0] = T.sigmoid(z) * T.sigmoid(-z)


@builder(SIMT)
def split_mixes_fwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    num_mixes = n * (n + 2)
    rows = n + 2

    @T.prim_func
    def split_mixes_fwd_kernel(
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        pre: T.Tensor[(tokens, n), T.float32],
        post: T.Tensor[(tokens, n), T.float32],
        comb: T.Tensor[(tokens, n * n), T.float32],
        post_mult: T.float32,
        pre_eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(tokens, WARP_TOKENS), threads=WARP_TOKENS * rows) as block:
            follow_previous()
            t = block * WARP_TOKENS + T.get_thread_binding() % WARP_TOKENS
            row = T.get_thread_binding() // WARP_TOKENS
            z = T.alloc_local((n,), T.float32)
            gate = T.alloc_local((1,), T.float32)
            if t < tokens:
                load_mixes(mixes, t, row * n, n, z)
                for k in T.unroll(n):
                    logit(z[k], scale[T.min(row, 2)], bias[row * n + k], gate)
                    z[k] = gate[0]
                if row < 2:
                    for k in T.unroll(n):
                        sigmoid(z[k], gate)
                        z[k] = gate[0]
                if row == 0:
                    for k in T.unroll(n):
                        z[k] += pre_eps
                    store_mixes(z, n, pre, t, 0)
                elif row == 1:
                    for k in T.unroll(n):
                        z[k] *= post_mult
                    store_mixes(z, n, post, t, 0)
                else:
                    store_mixes(z, n, comb, t, (row - 2) * n)

    return split_mixes_fwd_kernel


@T.macro
def gate_gradients(
    mix: T.Buffer,
    pre: T.Buffer,
    post: T.Buffer,
    comb: T.Buffer,
    scale: T.Tensor,
    bias: T.Tensor,
    post_mult: T.float32,
    z: T.Buffer,
    slope: T.Buffer,
    sums: T.Buffer,
):
    """A token's terms of the gradients of bias, then of scale, from those of pre, post and logits.

    Those of bias, times scale, are the gradients of the mixes. The terms of scale start from what
    sums has.
    """
    n = pre.shape[0]
    num_mixes = mix.shape[0]
    for k in T.unroll(n):
        logit(mix[k], scale[0], bias[k], z)
        sigmoid_slope(z[0], slope)
        sums[k] = pre[k] * slope[0]
    for k in T.unroll(n):
        logit(mix[n + k], scale[1], bias[n + k], z)
        sigmoid_slope(z[0], slope)
        sums[n + k] = post[k] * post_mult * slope[0]
    for k in T.unroll(n * n):
        sums[2 * n + k] = comb[k]
    for k in T.unroll(n):
        sums[num_mixes] += sums[k] * mix[k]
        sums[num_mixes + 1] += sums[n + k] * mix[n + k]
    for k in T.unroll(n * n):
        sums[num_mixes + 2] += sums[2 * n + k] * mix[2 * n + k]


@builder(SIMT)
def split_mixes_bwd(n: int, *, scale_dtype: str, bias_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_partials")
    num_mixes = n * (n + 2)

    @T.prim_func
    def split_mixes_bwd_kernel(
        grad_pre: T.Tensor[(tokens, n), T.float32],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        grad_mixes: T.Tensor[(tokens, num_mixes), T.float32],
        partials: T.Tensor[(rows, num_mixes + 3), T.float32],
        post_mult: T.float32,
    ):
        # One thread per token; the sums of a CTA are one row of partials: bias, then scale.
        with T.Kernel(rows, threads=THREADS) as row:
            follow_previous()
            tid = T.get_thread_binding()
            t = row * THREADS + tid
            z = T.alloc_local((1,), T.float32)
            slope = T.alloc_local((1,), T.float32)
            mix = T.alloc_local((num_mixes,), T.float32)
            pre = T.alloc_local((n,), T.float32)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n * n,), T.float32)
            sums = T.alloc_local((num_mixes + 3,), T.float32)
            for k in T.unroll(num_mixes + 3):
                sums[k] = 0.0
            if t < tokens:
                load_mixes(mixes, t, 0, num_mixes, mix)
                load_mixes(grad_pre, t, 0, n, pre)
                load_mixes(grad_post, t, 0, n, post)
                load_mixes(grad_comb, t, 0, n * n, comb)
                gate_gradients(mix, pre, post, comb, scale, bias, post_mult, z, slope, sums)
                for k in T.unroll(num_mixes):
                    mix[k] = sums[k] * T.cast(scale[T.min(k // n, 2)], T.float32)
                store_mixes(mix, num_mixes, grad_mixes, t, 0)
            store_partials(sums, num_mixes + 3, THREADS, row, partials)

    return split_mixes_bwd_kernel


@T.macro
def sum_column(
    partials: T.Tensor,
    column: T.int32,
    threads: int,
    directed: bool,
    grad_bias: T.Tensor,
    grad_scale: T.Tensor,
    adds_bias: T.int32,
    adds_scale: T.int32,
):
    """What a CTA does for a column: each thread sums every threads-th row, then all their sums."""
    rows, biases = partials.shape[0], grad_bias.shape[0]
    tid = T.get_thread_binding()
    total = T.alloc_local((1,), T.float32)
    shared = T.alloc_shared(sums_shape(1, threads), T.float32)
    total[0] = 0.0
    for step in T.serial(T.ceildiv(rows, threads)):
        if step * threads + tid < rows:
            total[0] += partials[step * threads + tid, column]
    block_sums(total, 1, threads, shared, total)
    if tid == 0:
        if column < biases:
            if directed and adds_bias != 0:
                total[0] += T.cast(grad_bias[column], T.float32)
            grad_bias[column] = T.cast(total[0], grad_bias.dtype)
        else:
            if directed and adds_scale != 0:
                total[0] += T.cast(grad_scale[column - biases], T.float32)
            grad_scale[column - biases] = T.cast(total[0], grad_scale.dtype)


@builder(SIMT)
def column_sums(biases: int, scales: int, directed: bool, *, scale_dtype: str, bias_dtype: str):
    """Sums over the rows of partials: the bias gradients, then the scale gradients.

    If `directed`, each of the two may be added to what is there. It may run `beside` the kernel
    before it, if that one is behind the one that made the partials; see `follow_previous_unless`.
    """
    rows = T.dynamic("num_partials")
    columns = biases + scales

    @T.prim_func
    def column_sums_kernel(
        partials: T.Tensor[(rows, columns), T.float32],
        grad_bias: T.Tensor[(biases,), bias_dtype],
        grad_scale: T.Tensor[(scales,), scale_dtype],
        adds_bias: T.int32,
        adds_scale: T.int32,
        beside: T.int32,
    ):
        with T.Kernel(columns, threads=THREADS) as column:
            follow_previous_unless(beside)
            sum_column(
                partials, column, THREADS, directed, grad_bias, grad_scale, adds_bias, adds_scale
            )
            follow_previous_at_last(beside)

    return column_sums_kernel
