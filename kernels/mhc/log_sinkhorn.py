"""n x n logits -> a doubly stochastic matrix, without eps: what a loop of logsumexps converges to.

repeat times: f[i] = -logsumexp_j(logits + g), g[j] = -logsumexp_i(logits + f), from g = 0;
out = exp(f + logits + g). Here on scalings a = exp(f + r), b = exp(g + c) of
E = exp(logits - r[i] - c[j]), r the maximum of a row, c then that of a column: every row and every
column of E has a one and nothing above it, so that no sum is zero, however far apart the logits
are. The first b, exp(c), may be: what it scales is nothing beside the row's one.

One token a thread, all of it in registers, as in sinkhorn.
"""

import tilelang.language as T

from tile_mhc.kernels._common import SIMT, builder, follow_previous, reciprocal
from tile_mhc.kernels.sinkhorn import SHARED_BYTES, THREADS, divide


@T.macro
def shifted_exponentials(matrix: T.Buffer, n: int, b: T.Buffer):
    """Logits to E, in place, and the first b."""
    largest = T.alloc_local((1,), T.float32)
    for i in T.unroll(n):
        largest[0] = matrix[i, 0]
        for j in T.unroll(n - 1):
            largest[0] = T.max(largest[0], matrix[i, j + 1])
        for j in T.unroll(n):
            matrix[i, j] -= largest[0]
    for j in T.unroll(n):
        largest[0] = matrix[0, j]
        for i in T.unroll(n - 1):
            largest[0] = T.max(largest[0], matrix[i + 1, j])
        b[j] = T.exp(largest[0])
        for i in T.unroll(n):
            matrix[i, j] = T.exp(matrix[i, j] - largest[0])


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
            if t < tokens:
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        matrix[i, j] = logits[t, i * n + j]
                shifted_exponentials(matrix, n, b)
                for _ in T.serial(repeat):
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


@builder(SIMT)
def log_sinkhorn_bwd(n: int, capacity: int):
    """The gradient of the `repeat`-step map (repeat <= capacity).

    With Y the matrix after a step and the gradient kept as that of its logarithm, G = dY * Y,
    undoing a normalisation of row i is G[i, :] -= Y[i, :] * sum_j G[i, j], likewise for columns;
    what is left in the end is the gradient of the logits. The scalings of every step are kept in
    shared memory, E in registers.
    """
    tokens = T.dynamic("num_tokens")
    threads = THREADS
    while threads > 1 and (2 * capacity + 1) * n * threads * 4 > SHARED_BYTES:
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
            along = T.alloc_local((1,), T.float32)
            # Each thread reads back only what it wrote: no barrier is needed.
            history_a = T.alloc_shared((capacity, n, threads), T.float32)
            history_b = T.alloc_shared((capacity + 1, n, threads), T.float32)
            if t < tokens:
                for i in T.unroll(n):
                    for j in T.vectorized(n):
                        matrix[i, j] = logits[t, i * n + j]
                    for j in T.vectorized(n):
                        delta[i, j] = grad[t, i * n + j]
                shifted_exponentials(matrix, n, b)
                for step in T.serial(repeat):
                    row_scalings(matrix, n, b, a)
                    for i in T.unroll(n):
                        history_b[step, i, tid] = b[i]
                        history_a[step, i, tid] = a[i]
                    column_sums_of(matrix, n, a, inv_b)
                    for j in T.unroll(n):
                        reciprocal(inv_b[j], b, j)
                for i in T.unroll(n):
                    history_b[repeat, i, tid] = b[i]
                    for j in T.unroll(n):
                        delta[i, j] *= a[i] * matrix[i, j] * b[j]
                for back in T.serial(repeat):
                    step = repeat - 1 - back
                    for i in T.unroll(n):
                        a[i] = history_a[step, i, tid]
                        b[i] = history_b[step + 1, i, tid]
                    for j in T.unroll(n):
                        along[0] = 0.0
                        for i in T.unroll(n):
                            along[0] += delta[i, j]
                        for i in T.unroll(n):
                            delta[i, j] -= a[i] * matrix[i, j] * (b[j] * along[0])
                    for j in T.unroll(n):
                        b[j] = history_b[step, j, tid]
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
