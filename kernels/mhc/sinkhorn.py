"""n x n logits -> a doubly stochastic matrix, one thread per token, all in registers.

`sinkhorn_alone` and `sinkhorn_rows` are for other kernels, which have few tokens at a time.

Every iterate of Sinkhorn is diag(a) * E * diag(b) with E = softmax(logits) + eps, so the kernels
iterate the scalings a and b alone: a normalisation costs n*n multiply-adds and n reciprocals
instead of n*n divisions, and errors of a scaling are corrected by the next.
"""

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import SIMT, builder, follow_previous, reciprocal

# One warp per CTA: 8192 tokens make 256 CTAs, enough for every SM.
THREADS = 32


@T.macro
def divide(numerators: T.Buffer, i: T.int32, j: T.int32, divisor: T.float32, inverse: T.float32):
    """numerators[i, j] /= divisor as IEEE rounds it, given its reciprocal."""
    quotient = T.alloc_local((1,), T.float32)
    quotient[0] = numerators[i, j] * inverse
    numerators[i, j] = T.ieee_fmaf(
        T.ieee_fmaf(-divisor, quotient[0], numerators[i, j]), inverse, quotient[0]
    )


@T.macro
def softmax_rows(comb: T.Buffer, n: int):
    """comb[i, :] = softmax(comb[i, :]), in place."""
    row = T.alloc_local((1,), T.float32)
    inverse = T.alloc_local((1,), T.float32)
    for i in T.unroll(comb.shape[0]):
        row[0] = comb[i, 0]
        for j in T.unroll(n - 1):
            row[0] = T.max(row[0], comb[i, j + 1])
        for j in T.unroll(n):
            comb[i, j] = T.exp(comb[i, j] - row[0])
        row[0] = 0.0
        for j in T.unroll(n):
            row[0] += comb[i, j]
        reciprocal(row[0], inverse, 0)
        for j in T.unroll(n):
            divide(comb, i, j, row[0], inverse[0])


@T.macro
def scale_rows(comb: T.Buffer, a: T.Buffer, inv_a: T.Buffer, b: T.Buffer, n: int, eps: T.float32):
    """a[i] such that row i of diag(a) comb diag(b) is divided by its sum + eps.

    a / (a * sum + eps) = 1 / (sum + eps / a), so that 1 / a is what is kept and inverted: one
    rounding, and a shorter chain of dependent operations, which is what the kernel's time is.
    """
    pair = T.alloc_local((2,), T.float32)
    for i in T.unroll(comb.shape[0]):
        for j in T.unroll(2):
            pair[j] = comb[i, j] * b[j]
        for j in T.unroll(n - 2):
            pair[j % 2] += comb[i, j + 2] * b[j + 2]
        inv_a[i] = T.ieee_fmaf(eps, inv_a[i], pair[0] + pair[1])
        reciprocal(inv_a[i], a, i)


@T.macro
def column_divisors(comb: T.Buffer, a: T.Buffer, inv_b: T.Buffer, n: int, eps: T.float32):
    """inv_b[j] = the inverse of the scaling that divides column j by its sum + eps."""
    pair = T.alloc_local((2,), T.float32)
    for j in T.unroll(n):
        for i in T.unroll(2):
            pair[i] = a[i] * comb[i, j]
        for i in T.unroll(n - 2):
            pair[i % 2] += a[i + 2] * comb[i + 2, j]
        inv_b[j] = T.ieee_fmaf(eps, inv_b[j], pair[0] + pair[1])


@T.macro
def sinkhorn_token(comb: T.Buffer, n: int, repeat: T.int32, eps: T.float32):
    """Logits to the doubly stochastic matrix, in place in registers."""
    a = T.alloc_local((n,), T.float32)
    b = T.alloc_local((n,), T.float32)
    inv_a = T.alloc_local((n,), T.float32)
    inv_b = T.alloc_local((n,), T.float32)
    softmax_rows(comb, n)
    for i in T.unroll(n):
        a[i] = 1.0
        inv_a[i] = 1.0
        inv_b[i] = 1.0
        for j in T.unroll(n):
            comb[i, j] += eps
    column_divisors(comb, a, inv_b, n, eps)
    for _ in T.serial(repeat - 1):
        for j in T.unroll(n):
            reciprocal(inv_b[j], b, j)
        scale_rows(comb, a, inv_a, b, n, eps)
        column_divisors(comb, a, inv_b, n, eps)
    # The last division is made on the elements: no error of b is left in them.
    for j in T.unroll(n):
        reciprocal(inv_b[j], b, j)
        for i in T.unroll(n):
            comb[i, j] *= a[i]
            divide(comb, i, j, inv_b[j], b[j])


@T.macro
def products_of_others(values: T.Buffer, out: T.Buffer, inverse: T.Buffer):
    """out[i] * inverse[0] = 1 / values[i], of four."""
    pair = T.alloc_local((2,), T.float32)
    for k in T.unroll(2):
        pair[k] = values[2 * k] * values[2 * k + 1]
    inverse[0] = T.fast_rcp(pair[0] * pair[1])
    for i in T.unroll(4):
        out[i] = values[i // 2 * 2 + 1 - i % 2] * pair[1 - i // 2]


@T.macro
def sinkhorn_alone(comb: T.Buffer, repeat: T.int32, eps: T.float32):
    """`sinkhorn_token` of four streams, for a thread that nobody helps to hide its latency.

    A scaling is the inverse of a sum: here the product of the other three by the inverse of all
    four, which one chain of operations gets while another takes the sums. Half as long as four
    reciprocals; where that inverse is off, it is so for all four, and the next scaling undoes it.
    Products of four must not leave float32: for an eps from SMALLEST_ALONE to 1.
    """
    others = T.alloc_local((4,), T.float32)
    inverse = T.alloc_local((1,), T.float32)
    inv_a = T.alloc_local((4,), T.float32)
    inv_b = T.alloc_local((4,), T.float32)
    b = T.alloc_local((1,), T.float32)
    pair = T.alloc_local((2,), T.float32)
    softmax_rows(comb, 4)
    for i in T.unroll(4):
        others[i] = 1.0
        inv_a[i] = 1.0
        inv_b[i] = 1.0
        for j in T.unroll(4):
            comb[i, j] += eps
    inverse[0] = 1.0
    column_divisors(comb, others, inv_b, 4, eps)
    for _ in T.serial(repeat - 1):
        products_of_others(inv_b, others, inverse)
        for i in T.unroll(4):
            for k in T.unroll(2):
                pair[k] = comb[i, k] * others[k]
            for k in T.unroll(2):
                pair[k] += comb[i, k + 2] * others[k + 2]
            inv_a[i] = T.ieee_fmaf(pair[0] + pair[1], inverse[0], eps * inv_a[i])
        products_of_others(inv_a, others, inverse)
        for j in T.unroll(4):
            for k in T.unroll(2):
                pair[k] = comb[k, j] * others[k]
            for k in T.unroll(2):
                pair[k] += comb[k + 2, j] * others[k + 2]
            inv_b[j] = T.ieee_fmaf(pair[0] + pair[1], inverse[0], eps * inv_b[j])
    for j in T.unroll(4):
        reciprocal(inv_b[j], b, 0)
        for i in T.unroll(4):
            comb[i, j] *= others[i] * inverse[0]
            divide(comb, i, j, inv_b[j], b[0])


@T.macro
def add_rows(comb: T.Buffer, a: T.Buffer, inv_b: T.Buffer, n: int, apart: int, eps: T.float32):
    """`column_divisors`, of lanes that have a row each: the sum goes to all of them."""
    total = T.alloc_local((n,), T.float32)
    for j in T.unroll(n):
        total[j] = a[0] * comb[0, j]
    for level in T.unroll(n.bit_length() - 1):
        for j in T.unroll(n):
            total[j] += T.shfl_xor(total[j], apart << level)
    for j in T.unroll(n):
        inv_b[j] = T.ieee_fmaf(eps, inv_b[j], total[j])


@T.macro
def sinkhorn_rows(comb: T.Buffer, n: int, apart: int, repeat: T.int32, eps: T.float32):
    """`sinkhorn_token` of lanes that have a row each, `apart` from one another: comb is (1, n).

    For a warp that has few tokens: half of the instructions of a lane's by itself.
    """
    a = T.alloc_local((1,), T.float32)
    b = T.alloc_local((n,), T.float32)
    inv_a = T.alloc_local((1,), T.float32)
    inv_b = T.alloc_local((n,), T.float32)
    softmax_rows(comb, n)
    a[0] = 1.0
    inv_a[0] = 1.0
    for j in T.unroll(n):
        inv_b[j] = 1.0
        comb[0, j] += eps
    add_rows(comb, a, inv_b, n, apart, eps)
    for _ in T.serial(repeat - 1):
        for j in T.unroll(n):
            reciprocal(inv_b[j], b, j)
        scale_rows(comb, a, inv_a, b, n, eps)
        add_rows(comb, a, inv_b, n, apart, eps)
    for j in T.unroll(n):
        reciprocal(inv_b[j], b, j)
        comb[0, j] *= a[0]
        divide(comb, 0, j, inv_b[j], b[j])


@builder(SIMT)
def sinkhorn_fwd(n: int):
    tokens = T.dynamic("num_tokens")

    @T.prim_func
    def sinkhorn_fwd_kernel(
        logits: T.Tensor[(tokens, n * n), T.float32],
        out: T.Tensor[(tokens, n * n), T.float32],
        repeat: T.int32,
        eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(tokens, THREADS), threads=THREADS) as block:
            follow_previous()
            t = block * THREADS + T.get_thread_binding()
            comb = T.alloc_local((n, n), T.float32)
            if t < tokens:
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        comb[i, j] = logits[t, i * n + j]
                sinkhorn_token(comb, n, repeat, eps)
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        out[t, i * n + j] = comb[i, j]

    return sinkhorn_fwd_kernel


@T.macro
def undo_sinkhorn(
    comb: T.Buffer,
    delta: T.Buffer,
    a: T.Buffer,
    b: T.Buffer,
    inv_a: T.Buffer,
    inv_b: T.Buffer,
    along: T.Buffer,
    history_a: T.Buffer,
    history_b: T.Buffer,
    repeat: T.int32,
    eps: T.float32,
):
    """delta, a token's gradient of the matrix, becomes that of the softmax; comb, its logits, is
    overwritten.

    With Y = diag(a) E diag(b) after a step and the gradient kept as G = dY * a * b, undoing a
    normalisation of row i is G[i, :] -= a[i] * b * sum_j E[i, j] * G[i, j], likewise for columns:
    no division. The scalings of every step are kept in shared memory, E in registers. Each thread
    reads back only what it wrote: no barrier is needed.
    """
    n = comb.shape[0]
    tid = T.get_thread_binding()
    softmax_rows(comb, n)
    for i in T.unroll(n):
        a[i] = 1.0
        inv_a[i] = 1.0
        inv_b[i] = 1.0
        for j in T.unroll(n):
            comb[i, j] += eps
    for step in T.serial(repeat):
        for i in T.unroll(n):
            history_a[step, i, tid] = a[i]
        column_divisors(comb, a, inv_b, n, eps)
        for j in T.unroll(n):
            reciprocal(inv_b[j], b, j)
            history_b[step, j, tid] = b[j]
        if step + 1 < repeat:
            scale_rows(comb, a, inv_a, b, n, eps)
    for i in T.unroll(n):
        for j in T.unroll(n):
            delta[i, j] *= a[i] * b[j]
    for back in T.serial(repeat):
        step = repeat - 1 - back
        for i in T.unroll(n):
            a[i] = history_a[step, i, tid]
            b[i] = history_b[step, i, tid]
        for j in T.unroll(n):
            along[0] = 0.0
            for i in T.unroll(n):
                along[0] += comb[i, j] * delta[i, j]
            for i in T.unroll(n):
                delta[i, j] -= a[i] * (b[j] * along[0])
        if step > 0:
            for j in T.unroll(n):
                b[j] = history_b[step - 1, j, tid]
            for i in T.unroll(n):
                along[0] = 0.0
                for j in T.unroll(n):
                    along[0] += comb[i, j] * delta[i, j]
                for j in T.unroll(n):
                    delta[i, j] -= b[j] * (a[i] * along[0])


@T.macro
def undo_softmax_row(comb: T.Buffer, delta: T.Buffer, i: T.int32, along: T.Buffer):
    """delta[i, :], the gradient of comb[i, :], becomes that of what comb is the softmax of."""
    n = comb.shape[0]
    along[0] = 0.0
    for j in T.unroll(n):
        along[0] += comb[i, j] * delta[i, j]
    for j in T.unroll(n):
        delta[i, j] = comb[i, j] * (delta[i, j] - along[0])


@builder(SIMT)
def sinkhorn_bwd(n: int, capacity: int, *, limits: Architecture):
    """The gradient of the `repeat`-step map (repeat <= capacity)."""
    tokens = T.dynamic("num_tokens")
    threads = THREADS
    while threads > 1 and 2 * capacity * n * threads * 4 > limits.history_bytes:
        threads //= 2

    @T.prim_func
    def sinkhorn_bwd_kernel(
        grad: T.Tensor[(tokens, n * n), T.float32],
        logits: T.Tensor[(tokens, n * n), T.float32],
        grad_logits: T.Tensor[(tokens, n * n), T.float32],
        repeat: T.int32,
        eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(tokens, threads), threads=threads) as block:
            follow_previous()
            tid = T.get_thread_binding()
            t = block * threads + tid
            comb = T.alloc_local((n, n), T.float32)
            delta = T.alloc_local((n, n), T.float32)
            a = T.alloc_local((n,), T.float32)
            b = T.alloc_local((n,), T.float32)
            inv_a = T.alloc_local((n,), T.float32)
            inv_b = T.alloc_local((n,), T.float32)
            along = T.alloc_local((1,), T.float32)
            history_a = T.alloc_shared((capacity, n, threads), T.float32)
            history_b = T.alloc_shared((capacity, n, threads), T.float32)
            if t < tokens:
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        comb[i, j] = logits[t, i * n + j]
                    for j in T.vectorized(n):
                        delta[i, j] = grad[t, i * n + j]
                undo_sinkhorn(
                    comb, delta, a, b, inv_a, inv_b, along, history_a, history_b, repeat, eps
                )
                # The softmax again: to take eps off E would leave E's rounding in it.
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        comb[i, j] = logits[t, i * n + j]
                softmax_rows(comb, n)
                for i in T.unroll(n):
                    undo_softmax_row(comb, delta, i, along)
                    for j in T.vectorized(n):
                        grad_logits[t, i * n + j] = delta[i, j]

    return sinkhorn_bwd_kernel
