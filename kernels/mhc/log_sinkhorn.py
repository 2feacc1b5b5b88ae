"""n x n logits -> a doubly stochastic matrix, without eps, however far apart the logits are.

repeat times: f[i] = -logsumexp_j(logits + g), g[j] = -logsumexp_i(logits + f), from g = 0;
out = exp(f + logits + g). Here on scalings a = exp(f + r), b = exp(g + c) of
E = exp(logits - r[i] - c[j]), r the maximum of a row, c then that of a column: every row and every
column of E has a one and nothing above it, so that no sum is zero. The first b, exp(c), may be:
what it scales is nothing beside the row's one.

Where no matrix of ones alone can be doubly stochastic, the scalings grow with every step until
elements of any size count, which float32 cannot hold. So every few steps, which are a group,
their powers of two go into E, which is made anew. Its exponents are taken in float64: those of
logits 300 apart would be off by 1e-5 in float32.

One thread per token, all in registers, as in sinkhorn.
"""

import math

import tilelang.language as T
from tilelang import PassConfigKey

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import SIMT, as_float, as_int, builder, follow_previous, reciprocal
from tile_mhc.kernels.sinkhorn import THREADS, divide

LOG_2 = math.log(2.0)


def steps_of_a_group(n: int) -> int:
    """Steps with one E, in which no scaling, nor a product of two, leaves the range of float32.

    After the first normalisation of columns every sum is between 1 / n**2, as each row and each
    column has kept an element that was 1 / n before, and n. So a step multiplies a scaling by n**2
    at most, and within a group it stays below 2**48, a product of two below 2**96: what an
    element of E that underflows would count is less than 2**-30.
    """
    return 24 // (n.bit_length() - 1)


@T.macro
def move_powers(scalings: T.Buffer, shifts: T.Buffer, n: int):
    """Move the powers of two of the scalings into the shifts: what is left is from 1 to 2."""
    power = T.alloc_local((1,), T.int32)
    for k in T.unroll(n):
        power[0] = (as_int(scalings[k]) >> 23) - 127
        shifts[k] += power[0]
        scalings[k] *= as_float((127 - power[0]) << 23)


@T.macro
def shifted_exponentials(
    logits: T.Tensor,
    t: T.int32,
    n: int,
    group: T.int32,
    shift_a: T.Buffer,
    shift_b: T.Buffer,
    matrix: T.Buffer,
    b: T.Buffer,
):
    """matrix = E with row i times 2**shift_a[i] and column j times 2**shift_b[j].

    In the first group b is what makes of E the exponentials of logits - r.
    """
    row = T.alloc_local((n,), T.float32)
    column = T.alloc_local((1,), T.float64)
    for i in T.unroll(n):
        for j in T.vectorized(n):
            matrix[i, j] = logits[t, i * n + j]
        row[i] = matrix[i, 0]
        for j in T.unroll(n - 1):
            row[i] = T.max(row[i], matrix[i, j + 1])
    for j in T.unroll(n):
        column[0] = T.cast(matrix[0, j], T.float64) - T.cast(row[0], T.float64)
        for i in T.unroll(n - 1):
            column[0] = T.max(
                column[0], T.cast(matrix[i + 1, j], T.float64) - T.cast(row[i + 1], T.float64)
            )
        for i in T.unroll(n):
            matrix[i, j] = T.exp(
                T.cast(
                    (T.cast(matrix[i, j], T.float64) - T.cast(row[i], T.float64))
                    - column[0]
                    + LOG_2 * T.cast(shift_a[i] + shift_b[j], T.float64),
                    T.float32,
                )
            )
        if group == 0:
            b[j] = T.exp(T.cast(column[0], T.float32))


@T.macro
def row_scalings(matrix: T.Buffer, n: int, b: T.Buffer, a: T.Buffer):
    """a[i] = 1 / sum_j matrix[i, j] * b[j]."""
    pair = T.alloc_local((2,), T.float32)
    for i in T.unroll(n):
        for j in T.unroll(2):
            pair[j] = matrix[i, j] * b[j]
        for j in T.unroll(n - 2):
            pair[j % 2] += matrix[i, j + 2] * b[j + 2]
        reciprocal(pair[0] + pair[1], a, i)


@T.macro
def column_sums_of(matrix: T.Buffer, n: int, a: T.Buffer, out: T.Buffer):
    """out[j] = sum_i a[i] * matrix[i, j]: the inverse of b."""
    pair = T.alloc_local((2,), T.float32)
    for j in T.unroll(n):
        for i in T.unroll(2):
            pair[i] = a[i] * matrix[i, j]
        for i in T.unroll(n - 2):
            pair[i % 2] += a[i + 2] * matrix[i + 2, j]
        out[j] = pair[0] + pair[1]


@builder(SIMT)
def log_sinkhorn_fwd(n: int):
    tokens = T.dynamic("num_tokens")
    steps = steps_of_a_group(n)

    @T.prim_func
    def log_sinkhorn_fwd_kernel(
        logits: T.Tensor[(tokens, n * n), T.float32],
        out: T.Tensor[(tokens, n * n), T.float32],
        repeat: T.int32,
    ):
        with T.Kernel(T.ceildiv(tokens, THREADS), threads=THREADS) as block:
            follow_previous()
            t = block * THREADS + T.get_thread_binding()
            matrix = T.alloc_local((n, n), T.float32)
            a = T.alloc_local((n,), T.float32)
            b = T.alloc_local((n,), T.float32)
            inv_b = T.alloc_local((n,), T.float32)
            shift_a = T.alloc_local((n,), T.int32)
            shift_b = T.alloc_local((n,), T.int32)
            if t < tokens:
                for k in T.unroll(n):
                    a[k] = 1.0
                    b[k] = 1.0
                    shift_a[k] = 0
                    shift_b[k] = 0
                for group in T.serial(T.ceildiv(repeat, steps)):
                    move_powers(a, shift_a, n)
                    move_powers(b, shift_b, n)
                    shifted_exponentials(logits, t, n, group, shift_a, shift_b, matrix, b)
                    for _ in T.serial(T.min(steps, repeat - group * steps)):
                        row_scalings(matrix, n, b, a)
                        column_sums_of(matrix, n, a, inv_b)
                        for j in T.unroll(n):
                            reciprocal(inv_b[j], b, j)
                # The last division is made on the elements: no error of b is left in them.
                for i in T.unroll(n):
                    for j in T.unroll(n):
                        matrix[i, j] *= a[i]
                        divide(matrix, i, j, inv_b[j], b[j])
                    for j in T.vectorized(n):
                        out[t, i * n + j] = matrix[i, j]

    return log_sinkhorn_fwd_kernel


# No barrier where TileLang cannot tell that threads share nothing: it warns of one in a branch.
@builder(SIMT | {PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True})
def log_sinkhorn_bwd(n: int, capacity: int, *, limits: Architecture):
    """The gradient of the `repeat`-step map (repeat <= capacity).

    With Y the matrix after a step and the gradient kept as that of its logarithm, G = dY * Y,
    undoing a normalisation of row i is G[i, :] -= Y[i, :] * sum_j G[i, j], likewise for columns;
    what is left in the end is the gradient of the logits. The scalings of every step are kept in
    shared memory, with the shifts of every group, and E in registers.
    """
    tokens = T.dynamic("num_tokens")
    steps = steps_of_a_group(n)
    groups = -(-capacity // steps)
    threads = THREADS
    while threads > 1 and groups * (2 * steps + 3) * n * threads * 4 > limits.history_bytes:
        threads //= 2

    @T.prim_func
    def log_sinkhorn_bwd_kernel(
        grad: T.Tensor[(tokens, n * n), T.float32],
        logits: T.Tensor[(tokens, n * n), T.float32],
        grad_logits: T.Tensor[(tokens, n * n), T.float32],
        repeat: T.int32,
    ):
        with T.Kernel(T.ceildiv(tokens, threads), threads=threads) as block:
            follow_previous()
            tid = T.get_thread_binding()
            t = block * threads + tid
            matrix = T.alloc_local((n, n), T.float32)
            delta = T.alloc_local((n, n), T.float32)
            a = T.alloc_local((n,), T.float32)
            b = T.alloc_local((n,), T.float32)
            inv_b = T.alloc_local((n,), T.float32)
            shift_a = T.alloc_local((n,), T.int32)
            shift_b = T.alloc_local((n,), T.int32)
            along = T.alloc_local((1,), T.float32)
            # Each thread reads back only what it wrote: no barrier is needed.
            history_a = T.alloc_shared((groups * steps, n, threads), T.float32)
            history_b = T.alloc_shared((groups * steps, n, threads), T.float32)
            # Of a group: the b that its first rows are summed with, and its shifts.
            first_b = T.alloc_shared((groups, n, threads), T.float32)
            history_shift_a = T.alloc_shared((groups, n, threads), T.int32)
            history_shift_b = T.alloc_shared((groups, n, threads), T.int32)
            if t < tokens:
                for k in T.unroll(n):
                    a[k] = 1.0
                    b[k] = 1.0
                    shift_a[k] = 0
                    shift_b[k] = 0
                for group in T.serial(T.ceildiv(repeat, steps)):
                    move_powers(a, shift_a, n)
                    move_powers(b, shift_b, n)
                    shifted_exponentials(logits, t, n, group, shift_a, shift_b, matrix, b)
                    for k in T.unroll(n):
                        first_b[group, k, tid] = b[k]
                        history_shift_a[group, k, tid] = shift_a[k]
                        history_shift_b[group, k, tid] = shift_b[k]
                    for step in T.serial(T.min(steps, repeat - group * steps)):
                        row_scalings(matrix, n, b, a)
                        column_sums_of(matrix, n, a, inv_b)
                        for k in T.unroll(n):
                            reciprocal(inv_b[k], b, k)
                            history_a[group * steps + step, k, tid] = a[k]
                            history_b[group * steps + step, k, tid] = b[k]
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        delta[i, j] = grad[t, i * n + j]
                    for j in T.unroll(n):
                        delta[i, j] *= a[i] * matrix[i, j] * b[j]
                for back in T.serial(groups):
                    group = groups - 1 - back
                    # The last group's E is still there.
                    if (group + 1) * steps < repeat:
                        for k in T.unroll(n):
                            shift_a[k] = history_shift_a[group, k, tid]
                            shift_b[k] = history_shift_b[group, k, tid]
                        shifted_exponentials(logits, t, n, group, shift_a, shift_b, matrix, b)
                    for undone in T.serial(steps):
                        step = group * steps + steps - 1 - undone
                        if step < repeat:
                            for k in T.unroll(n):
                                a[k] = history_a[step, k, tid]
                                b[k] = history_b[step, k, tid]
                            for j in T.unroll(n):
                                along[0] = 0.0
                                for i in T.unroll(n):
                                    along[0] += delta[i, j]
                                for i in T.unroll(n):
                                    delta[i, j] -= a[i] * matrix[i, j] * (b[j] * along[0])
                            for k in T.unroll(n):
                                if undone < steps - 1:
                                    b[k] = history_b[step - 1, k, tid]
                                else:
                                    b[k] = first_b[group, k, tid]
                            for i in T.unroll(n):
                                along[0] = 0.0
                                for j in T.unroll(n):
                                    along[0] += delta[i, j]
                                for j in T.unroll(n):
                                    delta[i, j] -= b[j] * matrix[i, j] * (a[i] * along[0])
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        grad_logits[t, i * n + j] = delta[i, j]

    return log_sinkhorn_bwd_kernel
