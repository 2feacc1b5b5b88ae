"""The gradients of the gates of a pre, at once.

What `split_mixes_fwd`, `sinkhorn_bwd`, `split_mixes_bwd` and `projection_norm_bwd` compute one
after another, to the same bits. One thread per token keeps in registers what would go through
memory between them; only the sums over rows of partials are left, to `column_sums`.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    builder,
    follow_previous,
    load_mixes,
    store_partials,
)
from tile_mhc.kernels._shapes import TOKENS_PER_PARTIAL, factors_width, padded
from tile_mhc.kernels.mixes import gate_gradients, logit, sigmoid
from tile_mhc.kernels.projection import product_gradient, store_parts
from tile_mhc.kernels.sinkhorn import softmax_rows, undo_sinkhorn, undo_softmax_row

THREADS = TOKENS_PER_PARTIAL


@T.macro
def comb_logits(mix: T.Buffer, scale: T.Tensor, bias: T.Tensor, comb: T.Buffer):
    """comb = the logits of a token's comb_mix."""
    n = comb.shape[0]
    z = T.alloc_local((1,), T.float32)
    for i in T.unroll(n):
        for j in T.unroll(n):
            logit(mix[(2 + i) * n + j], scale[2], bias[(2 + i) * n + j], z)
            comb[i, j] = z[0]


@T.macro
def logit_gradients(
    grad_comb: T.Tensor,
    t: T.int32,
    mix: T.Buffer,
    scale: T.Tensor,
    bias: T.Tensor,
    n: int,
    capacity: int,
    repeat: T.int32,
    eps: T.float32,
    out: T.Buffer,
):
    """out = a token's gradient of the logits of comb_mix, from its mixes and that of comb_mix."""
    comb = T.alloc_local((n, n), T.float32)
    delta = T.alloc_local((n, n), T.float32)
    a = T.alloc_local((n,), T.float32)
    b = T.alloc_local((n,), T.float32)
    inv_a = T.alloc_local((n,), T.float32)
    inv_b = T.alloc_local((n,), T.float32)
    along = T.alloc_local((1,), T.float32)
    history_a = T.alloc_shared((capacity, n, THREADS), T.float32)
    history_b = T.alloc_shared((capacity, n, THREADS), T.float32)
    for i in T.unroll(n):
        for j in T.vectorized(n):
            delta[i, j] = grad_comb[t, i * n + j]
    comb_logits(mix, scale, bias, comb)
    undo_sinkhorn(comb, delta, a, b, inv_a, inv_b, along, history_a, history_b, repeat, eps)
    comb_logits(mix, scale, bias, comb)
    softmax_rows(comb, n)
    for i in T.unroll(n):
        undo_softmax_row(comb, delta, i, along)
        for j in T.unroll(n):
            out[i * n + j] = delta[i, j]


@T.macro
def mix_gradients(
    mix: T.Buffer,
    grad_pre: T.Buffer,
    grad_post: T.Buffer,
    grad_logits: T.Buffer,
    scale: T.Tensor,
    bias: T.Tensor,
    post_mult: T.float32,
    size: T.float32,
    tf32: T.int32,
    sums: T.Buffer,
    values: T.Buffer,
    per_token: T.Buffer,
):
    """A token's terms of the sums, its gradient of the bare product, and the factor beside that."""
    n, num_mixes = grad_pre.shape[0], mix.shape[0]
    z = T.alloc_local((1,), T.float32)
    slope = T.alloc_local((1,), T.float32)
    gate_gradients(mix, grad_pre, grad_post, grad_logits, scale, bias, post_mult, z, slope, sums)
    for k in T.unroll(num_mixes):
        values[k] = sums[k] * T.cast(scale[T.min(k // n, 2)], T.float32)
    product_gradient(values, mix, per_token, size, tf32)


@builder(SIMT)
def gates_bwd(n: int, capacity: int, *, scale_dtype: str, bias_dtype: str):
    """Behind `aggregate_mix_first_bwd`, which makes the gradient of pre_mix. All but that is read
    before the wait: Sinkhorn's long chain of a few threads runs beside the sums over H.
    """
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_partials")
    num_mixes = n * (n + 2)
    part_rows = padded(num_mixes)
    width = factors_width(n)

    @T.prim_func
    def gates_bwd_kernel(
        grad_pre: T.Tensor[(tokens, n), T.float32],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        partials: T.Tensor[(rows, num_mixes + 3), T.float32],
        grad_parts: T.Tensor[(tokens, 2 * part_rows), T.bfloat16],
        factors: T.Tensor[(tokens, width), T.float32],
        size: T.float32,
        pre_eps: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        repeat: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(rows, threads=THREADS) as row:
            tid = T.get_thread_binding()
            t = row * THREADS + tid
            mix = T.alloc_local((num_mixes,), T.float32)
            pre = T.alloc_local((n,), T.float32)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n * n,), T.float32)
            sums = T.alloc_local((num_mixes + 3,), T.float32)
            values = T.alloc_local((part_rows,), T.float32)
            per_token = T.alloc_local((width,), T.float32)
            z = T.alloc_local((1,), T.float32)
            gate = T.alloc_local((1,), T.float32)
            for k in T.unroll(num_mixes + 3):
                sums[k] = 0.0
            for k in T.unroll(part_rows):
                values[k] = 0.0
            for c in T.unroll(width):
                per_token[c] = 0.0
            if t < tokens:
                load_mixes(mixes, t, 0, num_mixes, mix)
                load_mixes(grad_post, t, 0, n, post)
                per_token[0] = inv_rms[t]
                for i in T.unroll(n):
                    logit(mix[i], scale[0], bias[i], z)
                    sigmoid(z[0], gate)
                    per_token[3 + i] = gate[0] + pre_eps
                logit_gradients(
                    grad_comb, t, mix, scale, bias, n, capacity, repeat, sinkhorn_eps, comb
                )
            follow_previous()
            if t < tokens:
                load_mixes(grad_pre, t, 0, n, pre)
                mix_gradients(
                    mix,
                    pre,
                    post,
                    comb,
                    scale,
                    bias,
                    post_mult,
                    size,
                    tf32,
                    sums,
                    values,
                    per_token,
                )
            store_partials(sums, num_mixes + 3, THREADS, row, partials)
            store_parts(values, per_token, t, tokens, grad_parts, factors)

    return gates_bwd_kernel


@builder(SIMT)
def delayed_gates_bwd(n: int, capacity: int, *, scale_dtype: str, bias_dtype: str):
    """The same where the gradient of pre_mix is given, and where the layer input has another
    pre_mix, which goes along in its place.
    """
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_partials")
    num_mixes = n * (n + 2)
    part_rows = padded(num_mixes)
    width = factors_width(n)

    @T.prim_func
    def delayed_gates_bwd_kernel(
        grad_pre: T.Tensor[(tokens, n), T.float32],
        pre_mix: T.Tensor[(tokens, n), T.float32],
        grad_post: T.Tensor[(tokens, n), T.float32],
        grad_comb: T.Tensor[(tokens, n * n), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(num_mixes,), bias_dtype],
        partials: T.Tensor[(rows, num_mixes + 3), T.float32],
        grad_parts: T.Tensor[(tokens, 2 * part_rows), T.bfloat16],
        factors: T.Tensor[(tokens, width), T.float32],
        size: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        repeat: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(rows, threads=THREADS) as row:
            follow_previous()
            tid = T.get_thread_binding()
            t = row * THREADS + tid
            mix = T.alloc_local((num_mixes,), T.float32)
            pre = T.alloc_local((n,), T.float32)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n * n,), T.float32)
            sums = T.alloc_local((num_mixes + 3,), T.float32)
            values = T.alloc_local((part_rows,), T.float32)
            per_token = T.alloc_local((width,), T.float32)
            for k in T.unroll(num_mixes + 3):
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
                for i in T.unroll(n):
                    per_token[3 + i] = pre_mix[t, i]
                logit_gradients(
                    grad_comb, t, mix, scale, bias, n, capacity, repeat, sinkhorn_eps, comb
                )
                mix_gradients(
                    mix,
                    pre,
                    post,
                    comb,
                    scale,
                    bias,
                    post_mult,
                    size,
                    tf32,
                    sums,
                    values,
                    per_token,
                )
            store_partials(sums, num_mixes + 3, THREADS, row, partials)
            store_parts(values, per_token, t, tokens, grad_parts, factors)

    return delayed_gates_bwd_kernel
