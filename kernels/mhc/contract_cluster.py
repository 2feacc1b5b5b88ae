"""The learned n -> 1 readout and its gradients, each in one pass over the streams.

A token's weighted sum waits for its mixes, which need all of the token. Here a cluster of CTAs
keeps the token in shared memory meanwhile: each CTA has a slice of H, whose weight stays in
registers, and the dot products of the slices meet through shared memory of the cluster. x crosses
HBM once, where `projection` and `contract_fwd`, one after the other, read it twice.

A warp has CLUSTER_COLUMNS columns of every stream, and takes them of a group of tokens at a time:
in step s it takes the products of group s, finishes group s - 1, whose gates have come by then, and
asks for a later one in its place. One more warp adds up the products of the others, pushes the sums
to every CTA of the cluster, and computes the gates from what all CTAs pushed. One barrier per step,
for all warps, lets each see what the others wrote. TileLang adds none but that after the setup of
the mbarriers (RING).
"""

from typing import Any

import tilelang.language as T
from tilelang import PassConfigKey

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import SIMT, VECTOR, as_float, builder, follow_previous
from tile_mhc.kernels._push import SOURCE, push_vectors
from tile_mhc.kernels._shapes import (
    CLUSTER_COLUMNS,
    CLUSTER_TOKENS,
    cluster_row,
    cluster_size,
    cluster_stages,
)
from tile_mhc.kernels._weights import high_part, low_part, norm_shape, rounded_to_tf32
from tile_mhc.kernels.mixes import logit
from tile_mhc.kernels.projection import LARGE_SQUARES, RESCUE_SCALE, weight_value

RING = {
    **SIMT,
    PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
}
GROUP = CLUSTER_TOKENS
# A vector has so many pairs.
WORDS = VECTOR // 2
# Columns of a warp that the tensor cores multiply at a time.
BLOCK = 32
BLOCKS = CLUSTER_COLUMNS // BLOCK
# Vectors per stream in a warp's columns.
CHUNKS = CLUSTER_COLUMNS // VECTOR
# Columns whose products a tensor core adds up before float32 does: see `projection_fwd`.
CHAIN = 128
# Two would do: see `push_vectors`.
SLOTS = 4
# The barrier of every step; warps arrive at it from two different loops.
BARRIER = 1


def first_of(pair: Any):
    """The first of two bfloat16 values side by side in a word, in float32: one instruction, and
    three where a value is taken by itself."""
    return as_float(pair << 16)


def second_of(pair: Any):
    upper = -0x10000 if pair.dtype == "int32" else 0xFFFF0000
    return as_float(pair & upper)


def token_to_load(t: T.int32, last: Any):
    """t or, past `last` if that is given, it again: what comes of it nobody stores, and a condition
    for each token costs more than the load."""
    return t if last is None else T.min(t, last)


@T.macro
def load_tokens(
    source: T.Tensor,
    t: T.int32,
    last: Any,
    vector: T.int32,
    rows: int,
    ring: T.Buffer,
    slot: T.int32,
    column: T.int32,
    width: int,
):
    """Start the loads of a warp's columns of the tokens from t on; see `token_to_load`.

    `vector` is the index, within a token, of the vector that this lane loads.
    """
    lane = T.get_thread_binding() % 32
    at = lane // CHUNKS % rows * width + column + lane % CHUNKS * VECTOR
    each = 32 // (rows * CHUNKS)
    # Where there are few registers, tokens that may be past the last one come one by one.
    for e in (
        tuple(range(GROUP // each)) if last is None else T.unroll(GROUP // each, unroll_factor=1)
    ):
        T.ptx_cp_async(
            T.access_ptr(ring[slot, e * each + lane // (rows * CHUNKS), at], "w", VECTOR),
            T.access_ptr(
                source[
                    token_to_load(t + e * each + lane // (rows * CHUNKS), last), vector * VECTOR
                ],
                "r",
                VECTOR,
            ),
            VECTOR,
        )


@T.macro
def count_steps(tokens: T.int32, first: T.int32, clusters: T.int32, out: T.Buffer):
    """out[0] = groups of tokens that the cluster `first` takes: every `clusters`-th."""
    out[0] = T.truncdiv(T.truncdiv(tokens + GROUP - 1, GROUP) - first + clusters - 1, clusters)


@T.macro
def multiply(a: T.Buffer, b: T.Buffer, at: int, out: T.Buffer, chain: int, start: int = 0):
    """out[chain] += A B for one m16n8k16 product of bfloat16, of which each lane has its part: of A
    from `start` on, of B from `at` on."""
    T.ptx_mma(
        "float32",
        "m16n8k16",
        "row",
        "col",
        "bf16",
        "bf16",
        "fp32",
        a.data,
        start,
        b.data,
        at,
        out.data,
        chain * 4,
        T.bool(False),
    )


@builder(RING)
def contract_cluster_fwd(
    n: int,
    hidden_size: int,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    tokens = T.dynamic("num_tokens")
    size = n * hidden_size
    cluster = cluster_size(n, hidden_size, False, limits)
    width = hidden_size // cluster
    warps = width // CLUSTER_COLUMNS
    threads = warps * 32 + 32
    stages = cluster_stages(n, width, False, limits)
    ahead = stages - 1
    products = GROUP * n
    # Products, then squares; a push moves multiples of 16 bytes.
    count = products + GROUP
    chains = -(-n * CLUSTER_COLUMNS // CHAIN)
    has_norm = norm_weight_dtype != ""

    @T.prim_func
    def contract_cluster_fwd_kernel(
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(n, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        scale: T.Tensor[(1,), scale_dtype],
        bias: T.Tensor[(n,), bias_dtype],
        out: T.Tensor[(tokens, hidden_size), T.bfloat16],
        mixes: T.Tensor[(tokens, n), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        norm_eps: T.float32,
        pre_eps: T.float32,
        tf32: T.int32,
        clusters: T.int32,
    ):
        with T.Kernel(clusters * cluster, threads=threads, cluster_dims=(cluster, 1, 1)) as cta:
            T.import_source(SOURCE if cluster > 1 else None)
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * CLUSTER_COLUMNS
            h = rank * width + column
            ring = T.alloc_shared((stages, GROUP, cluster_row(n, width)), T.bfloat16)
            # The same in pairs of neighbours.
            words = T.view(ring, (stages, GROUP, cluster_row(n, width) // 2), T.int32)
            warp_sums = T.alloc_shared((2, warps, count), T.float32)
            parts = T.alloc_shared((SLOTS, cluster, count), T.float32)
            gates = T.alloc_shared((2, products), T.float32)
            full = T.alloc_cluster_barrier([1] * SLOTS)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            # Indices of global memory are variables: written out where they are used they become
            # sums of many 64-bit terms, each of which the compiler keeps.
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((2,), T.int32)
            if warp < warps:
                raw = T.alloc_local((VECTOR,), T.float32)
                w = T.alloc_local((n * BLOCKS * VECTOR,), T.bfloat16)
                weights = T.view(w, (n * BLOCKS * WORDS,), T.int32)
                values = T.alloc_local((WORDS,), T.int32)
                a = T.alloc_local((4,), T.int32)
                sums = T.alloc_local((chains, 4), T.float32)
                mix = T.alloc_local((n,), T.float32)
                streams = T.alloc_local((n, WORDS), T.int32)
                total = T.alloc_local((VECTOR,), T.float32)
                vectors[0] = (lane // CHUNKS % n * hidden_size + h) // VECTOR + lane % CHUNKS
                vectors[1] = h // VECTOR + lane % CHUNKS
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        load_tokens(x, t0[0], tokens - 1, vectors[0], n, ring, s, column, width)
                    T.ptx_commit_group()
                # The rows of the operand: high parts, then low parts, then zeros.
                row = lane // 4
                for b in T.unroll(n * BLOCKS):
                    k = b // BLOCKS * hidden_size + h + b % BLOCKS * BLOCK + lane % 4 * VECTOR
                    for q in T.unroll(VECTOR // 4):
                        for v in T.vectorized(4):
                            raw[q * 4 + v] = T.cast(weight[row % n, k + q * 4 + v], T.float32)
                    for v in T.unroll(VECTOR):
                        if has_norm:
                            raw[v] *= T.cast(norm_weight[k + v], T.float32)
                        if tf32 != 0:
                            raw[v] = rounded_to_tf32(raw[v])
                        w[b * VECTOR + v] = T.if_then_else(
                            row < n,
                            high_part(raw[v]),
                            T.if_then_else(row < 2 * n, low_part(raw[v]), T.cast(0, T.bfloat16)),
                        )
                # No condition around the products: TileLang puts it before each statement. The last
                # group, the only one that may have fewer tokens, is finished after the loop.
                for last in (False, True):
                    for step in T.serial(
                        steps[0] if last else 0, steps[0] + 1 if last else steps[0]
                    ):
                        if not last:
                            T.ptx_wait_group(ahead - 1)
                            T.sync_warp()
                            for c in T.unroll(chains):
                                for k in T.unroll(4):
                                    sums[c, k] = 0.0
                            # Below the weights' rows the tokens themselves: their squares come
                            # along. Loops over a tuple are unrolled as they are traced: operands of
                            # products are chosen by a number, not by an expression.
                            for b in tuple(range(n * BLOCKS)):
                                c = b // BLOCKS * width + column + b % BLOCKS * BLOCK
                                for v in T.vectorized(WORDS):
                                    values[v] = words[
                                        step % stages, lane // 4, c // 2 + lane % 4 * WORDS + v
                                    ]
                                for half in (0, 1):
                                    # Which columns a lane's values come from does not matter, as
                                    # long as both operands agree: a lane has eight neighbours,
                                    # where the tensor core's layout has pairs.
                                    for k in (0, 1):
                                        a[k * 2] = weights[b * WORDS + half * 2 + k]
                                        a[k * 2 + 1] = values[half * 2 + k]
                                    multiply(a, values, half * 2, sums, (2 * b + half) % chains)
                            for c in tuple(range(1, chains)):
                                for k in T.unroll(4):
                                    sums[0, k] += sums[c, k]
                            for k in T.unroll(2):
                                # A lane has two tokens of a row; the low part's row is n rows on.
                                g = lane % 4 * 2 + k
                                sums[0, k] += T.shfl_xor(sums[0, k], 4 * n)
                                if lane // 4 < n:
                                    warp_sums[step % 2, warp, g * n + lane // 4] = sums[0, k]
                                if lane // 4 == g:
                                    warp_sums[step % 2, warp, products + g] = sums[0, 2 + k]
                        T.sync_threads(BARRIER, threads)
                        if step >= 1:
                            t0[0] = (first + (step - 1) * clusters) * GROUP + lane // CHUNKS
                            for j in T.unroll(GROUP * CHUNKS // 32):
                                g = j * (32 // CHUNKS)
                                c = column // 2 + lane % CHUNKS * WORDS
                                for i in T.unroll(n):
                                    mix[i] = gates[step % 2, (g + lane // CHUNKS) * n + i]
                                    for v in T.vectorized(WORDS):
                                        streams[i, v] = words[
                                            (step - 1) % stages,
                                            g + lane // CHUNKS,
                                            i * (width // 2) + c + v,
                                        ]
                                # As `weighted_sum`.
                                for v in T.unroll(VECTOR):
                                    total[v] = 0.0
                                for i in T.unroll(n):
                                    for v in T.unroll(WORDS):
                                        total[2 * v] += mix[i] * first_of(streams[i, v])
                                        total[2 * v + 1] += mix[i] * second_of(streams[i, v])
                                if last:
                                    if t0[0] + g < tokens:
                                        for v in T.vectorized(VECTOR):
                                            out[t0[0] + g, vectors[1] * VECTOR + v] = T.cast(
                                                total[v], T.bfloat16
                                            )
                                else:
                                    for v in T.vectorized(VECTOR):
                                        out[t0[0] + g, vectors[1] * VECTOR + v] = T.cast(
                                            total[v], T.bfloat16
                                        )
                        if not last:
                            # The ring has a part of each warp's own: what it has read may be
                            # overwritten.
                            T.sync_warp()
                            if step + ahead < steps[0]:
                                t0[0] = (first + (step + ahead) * clusters) * GROUP
                                slot = (step + ahead) % stages
                                # Both ways past one condition: addresses have much in common.
                                if t0[0] + GROUP <= tokens:
                                    load_tokens(
                                        x, t0[0], None, vectors[0], n, ring, slot, column, width
                                    )
                                else:
                                    load_tokens(
                                        x,
                                        t0[0],
                                        tokens - 1,
                                        vectors[0],
                                        n,
                                        ring,
                                        slot,
                                        column,
                                        width,
                                    )
                            T.ptx_commit_group()
            else:
                value = T.alloc_local((2,), T.float32)
                exact = T.alloc_local((2,), T.float64)
                z = T.alloc_local((1,), T.float32)
                # Read once: beside the stream of loads a miss costs a microsecond.
                gate_scale = T.alloc_local((1,), T.float32)
                gate_bias = T.alloc_local((1,), T.float32)
                gate_scale[0] = T.cast(scale[0], T.float32)
                gate_bias[0] = T.cast(bias[lane % n], T.float32)
                for step in T.serial(steps[0] + 1):
                    if step >= 1:
                        slot = (step - 1) % SLOTS
                        if cluster > 1:
                            T.mbarrier_wait_parity(full[slot], (step - 1) // SLOTS % 2)
                        g = lane % products // n
                        m = lane % n
                        t0[0] = (first + (step - 1) * clusters) * GROUP + g
                        value[0] = 0.0
                        value[1] = 0.0
                        for c in T.unroll(cluster):
                            value[0] += parts[slot, c, g * n + m]
                            value[1] += parts[slot, c, products + g]
                        if not value[1] < LARGE_SQUARES and t0[0] < tokens:
                            # As in `token_mix`.
                            exact[0] = 0.0
                            exact[1] = 0.0
                            for k in T.unroll(size, unroll_factor=1):
                                z[0] = T.cast(x[t0[0], k], T.float32) * RESCUE_SCALE
                                exact[0] += T.cast(z[0] * z[0], T.float64)
                                exact[1] += T.cast(z[0], T.float64) * T.cast(
                                    weight_value(
                                        weight, norm_weight, norm_weight_dtype, m, k, tf32
                                    ),
                                    T.float64,
                                )
                            z[0] = T.rsqrt(T.cast(exact[0], T.float32) / size)
                            value[0] = T.cast(exact[1], T.float32) * z[0]
                            value[1] = z[0] * RESCUE_SCALE
                        else:
                            value[1] = T.rsqrt(value[1] / size + norm_eps)
                            value[0] = value[0] * value[1]
                        logit(value[0], gate_scale[0], gate_bias[0], z)
                        if lane < products:
                            gates[step % 2, lane] = T.sigmoid(z[0]) + pre_eps
                            if rank == 0 and t0[0] < tokens:
                                mixes[t0[0], m] = value[0]
                                if m == 0:
                                    inv_rms[t0[0]] = value[1]
                    T.sync_threads(BARRIER, threads)
                    if step < steps[0]:
                        push_vectors(
                            warp_sums,
                            step % 2,
                            parts,
                            full,
                            step % SLOTS,
                            rank,
                            cluster,
                            warps,
                            count,
                        )
            # Nobody leaves while others may push to it, or what it pushed may be under way.
            if cluster > 1:
                T.cluster_sync()

    return contract_cluster_fwd_kernel


@builder(RING)
def contract_cluster_bwd(
    n: int,
    hidden_size: int,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    """Gradient of x; of weight, bias and scale one row of partial sums per cluster.

    d gate_i = grad . x_i;  d mix = d gate * sigmoid'(z) * scale;  r is inv_rms
    d x_i = gate_i * grad + (d mix * r) . w_i - x_i * r * r * (d mix . mix) / K
    d w_m = sum over tokens of d mix_m * r * x
    """
    tokens = T.dynamic("num_tokens")
    size = n * hidden_size
    cluster = cluster_size(n, hidden_size, True, limits)
    width = hidden_size // cluster
    warps = width // CLUSTER_COLUMNS
    threads = warps * 32 + 32
    stages = cluster_stages(n, width, True, limits)
    ahead = stages - 1
    products = GROUP * n
    # A thread keeps the weight, and its gradient, of columns of one stream.
    vector = n * CLUSTER_COLUMNS // 32
    owners = CLUSTER_COLUMNS // vector
    # Numbers per token: n gates, n times d mix * r, r, and the factor of x * r.
    factors = -(-(2 * n + 2) // 4) * 4
    has_norm = norm_weight_dtype != ""

    @T.prim_func
    def contract_cluster_bwd_kernel(
        grad: T.Tensor[(tokens, hidden_size), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(n, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        scale: T.Tensor[(1,), scale_dtype],
        bias: T.Tensor[(n,), bias_dtype],
        mixes: T.Tensor[(tokens, n), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        grad_x: T.Tensor[(tokens, size), T.bfloat16],
        partials: T.Tensor[(T.dynamic("num_slices"), n, size), T.float32],
        gate_partials: T.Tensor[(T.dynamic("num_partials"), n + 1), T.float32],
        pre_eps: T.float32,
        tf32: T.int32,
        clusters: T.int32,
    ):
        with T.Kernel(clusters * cluster, threads=threads, cluster_dims=(cluster, 1, 1)) as cta:
            T.import_source(SOURCE if cluster > 1 else None)
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * CLUSTER_COLUMNS
            h = rank * width + column
            ring = T.alloc_shared((stages, GROUP, cluster_row(n, width)), T.bfloat16)
            grad_ring = T.alloc_shared((stages, GROUP, cluster_row(1, width)), T.bfloat16)
            # The same in pairs of neighbours.
            words = T.view(ring, (stages, GROUP, cluster_row(n, width) // 2), T.int32)
            grad_words = T.view(grad_ring, (stages, GROUP, cluster_row(1, width) // 2), T.int32)
            warp_sums = T.alloc_shared((2, warps, products), T.float32)
            parts = T.alloc_shared((SLOTS, cluster, products), T.float32)
            given = T.alloc_shared((2, GROUP, factors), T.float32)
            full = T.alloc_cluster_barrier([1] * SLOTS)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((3,), T.int32)
            if warp < warps:
                values = T.alloc_local((WORDS,), T.int32)
                grads = T.alloc_local((WORDS,), T.int32)
                pairs = T.alloc_local((WORDS,), T.int32)
                sums = T.alloc_local((2 * n, 4), T.float32)
                w = T.alloc_local((n, vector), T.float32)
                grad_w = T.alloc_local((n, vector), T.float32)
                streams = T.alloc_local((vector // 2,), T.int32)
                outer = T.alloc_local((vector // 2,), T.int32)
                factor = T.alloc_local((factors,), T.float32)
                element = T.alloc_local((2,), T.float32)
                given_to = T.alloc_local((2,), T.float32)
                pre = T.alloc_local((1,), T.float32)
                total = T.alloc_local((vector,), T.float32)
                stream = lane // owners
                vectors[0] = (lane // CHUNKS % n * hidden_size + h) // VECTOR + lane % CHUNKS
                vectors[1] = h // VECTOR + lane % CHUNKS
                vectors[2] = (stream * hidden_size + h) // vector + lane % owners
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        load_tokens(x, t0[0], tokens - 1, vectors[0], n, ring, s, column, width)
                        load_tokens(
                            grad, t0[0], tokens - 1, vectors[1], 1, grad_ring, s, column, width
                        )
                    T.ptx_commit_group()
                for m in T.unroll(n):
                    for q in T.unroll(vector // 4):
                        for v in T.vectorized(4):
                            w[m, q * 4 + v] = T.cast(
                                weight[m, vectors[2] * vector + q * 4 + v], T.float32
                            )
                    for v in T.unroll(vector):
                        if has_norm:
                            w[m, v] *= T.cast(norm_weight[vectors[2] * vector + v], T.float32)
                        if tf32 != 0:
                            w[m, v] = rounded_to_tf32(w[m, v])
                        grad_w[m, v] = 0.0
                for last in (False, True):
                    for step in T.serial(
                        steps[0] if last else 0, steps[0] + 1 if last else steps[0]
                    ):
                        if not last:
                            T.ptx_wait_group(ahead - 1)
                            T.sync_warp()
                            for p in T.unroll(2 * n):
                                for k in T.unroll(4):
                                    sums[p, k] = 0.0
                            for b in tuple(range(BLOCKS)):
                                c = (column + b * BLOCK) // 2 + lane % 4 * WORDS
                                for v in T.vectorized(WORDS):
                                    grads[v] = grad_words[step % stages, lane // 4, c + v]
                                # Each product multiplies the tokens of a stream with those of the
                                # gradient; its diagonal pairs a token with itself. As pairs lie in
                                # registers, the first and third are upper rows, the others lower.
                                for half in (0, 1):
                                    pairs[half * 2] = grads[half]
                                    pairs[half * 2 + 1] = grads[half + 2]
                                for i in tuple(range(n)):
                                    for v in T.vectorized(WORDS):
                                        values[v] = words[
                                            step % stages, lane // 4, i * (width // 2) + c + v
                                        ]
                                    for half in (0, 1):
                                        multiply(values, pairs, half * 2, sums, i * 2 + half)
                            for k in T.unroll(2):
                                if lane // 4 == lane % 4 * 2 + k:
                                    for i in T.unroll(n):
                                        warp_sums[step % 2, warp, lane // 4 * n + i] = (
                                            sums[i * 2, k] + sums[i * 2 + 1, 2 + k]
                                        )
                        T.sync_threads(BARRIER, threads)
                        if step >= 1:
                            t0[0] = (first + (step - 1) * clusters) * GROUP
                            c = (column + lane % owners * vector) // 2
                            for g in T.unroll(GROUP):
                                for q in T.unroll(factors // 4):
                                    for v in T.vectorized(4):
                                        factor[q * 4 + v] = given[step % 2, g, q * 4 + v]
                                pre[0] = given[step % 2, g, stream]
                                for v in T.vectorized(vector // 2):
                                    streams[v] = words[
                                        (step - 1) % stages, g, stream * (width // 2) + c + v
                                    ]
                                for v in T.vectorized(vector // 2):
                                    outer[v] = grad_words[(step - 1) % stages, g, c + v]
                                for p in T.unroll(vector // 2):
                                    element[0] = first_of(streams[p])
                                    element[1] = second_of(streams[p])
                                    given_to[0] = first_of(outer[p])
                                    given_to[1] = second_of(outer[p])
                                    for k in T.unroll(2):
                                        v = 2 * p + k
                                        total[v] = pre[0] * given_to[k]
                                        # x joins one r first: r * r may be lost where x is large.
                                        total[v] += (element[k] * factor[2 * n]) * factor[2 * n + 1]
                                        for m in T.unroll(n):
                                            total[v] += factor[n + m] * w[m, v]
                                            grad_w[m, v] += factor[n + m] * element[k]
                                if last:
                                    if t0[0] + g < tokens:
                                        for v in T.vectorized(vector):
                                            grad_x[t0[0] + g, vectors[2] * vector + v] = T.cast(
                                                total[v], T.bfloat16
                                            )
                                else:
                                    for v in T.vectorized(vector):
                                        grad_x[t0[0] + g, vectors[2] * vector + v] = T.cast(
                                            total[v], T.bfloat16
                                        )
                        if not last:
                            # As in the forward.
                            T.sync_warp()
                            if step + ahead < steps[0]:
                                t0[0] = (first + (step + ahead) * clusters) * GROUP
                                slot = (step + ahead) % stages
                                if t0[0] + GROUP <= tokens:
                                    load_tokens(
                                        x, t0[0], None, vectors[0], n, ring, slot, column, width
                                    )
                                    load_tokens(
                                        grad,
                                        t0[0],
                                        None,
                                        vectors[1],
                                        1,
                                        grad_ring,
                                        slot,
                                        column,
                                        width,
                                    )
                                else:
                                    load_tokens(
                                        x,
                                        t0[0],
                                        tokens - 1,
                                        vectors[0],
                                        n,
                                        ring,
                                        slot,
                                        column,
                                        width,
                                    )
                                    load_tokens(
                                        grad,
                                        t0[0],
                                        tokens - 1,
                                        vectors[1],
                                        1,
                                        grad_ring,
                                        slot,
                                        column,
                                        width,
                                    )
                            T.ptx_commit_group()
                for m in T.unroll(n):
                    for q in T.unroll(vector // 4):
                        for v in T.vectorized(4):
                            partials[first, m, vectors[2] * vector + q * 4 + v] = grad_w[
                                m, q * 4 + v
                            ]
            else:
                mix = T.alloc_local((1,), T.float32)
                rms = T.alloc_local((1,), T.float32)
                value = T.alloc_local((2,), T.float32)
                z = T.alloc_local((1,), T.float32)
                gate_sums = T.alloc_local((2,), T.float64)
                gate_scale = T.alloc_local((1,), T.float32)
                gate_bias = T.alloc_local((1,), T.float32)
                gate_scale[0] = T.cast(scale[0], T.float32)
                gate_bias[0] = T.cast(bias[lane % n], T.float32)
                mix[0] = 0.0
                rms[0] = 0.0
                for k in T.unroll(2):
                    gate_sums[k] = 0.0
                for step in T.serial(steps[0] + 1):
                    if step >= 1:
                        slot = (step - 1) % SLOTS
                        if cluster > 1:
                            T.mbarrier_wait_parity(full[slot], (step - 1) // SLOTS % 2)
                        g = lane % products // n
                        m = lane % n
                        value[0] = 0.0
                        for c in T.unroll(cluster):
                            value[0] += parts[slot, c, g * n + m]
                        logit(mix[0], gate_scale[0], gate_bias[0], z)
                        # As in `head_mix_bwd`, then `projection_norm_bwd`.
                        value[0] *= T.sigmoid(z[0]) * T.sigmoid(-z[0])
                        if (first + (step - 1) * clusters) * GROUP + g >= tokens:
                            value[0] = 0.0
                        gate_sums[0] += T.cast(value[0], T.float64)
                        gate_sums[1] += T.cast(value[0] * mix[0], T.float64)
                        value[0] *= gate_scale[0]
                        value[1] = value[0] * mix[0]
                        for level in T.unroll(n.bit_length() - 1):
                            value[1] += T.shfl_xor(value[1], 1 << level)
                        value[0] *= rms[0]
                        if tf32 != 0:
                            value[0] = rounded_to_tf32(value[0])
                        if lane < products:
                            given[step % 2, g, m] = T.sigmoid(z[0]) + pre_eps
                            given[step % 2, g, n + m] = value[0]
                            if m == 0:
                                given[step % 2, g, 2 * n] = rms[0]
                                given[step % 2, g, 2 * n + 1] = -value[1] * rms[0] / size
                                for k in T.unroll(factors - 2 * n - 2):
                                    given[step % 2, g, 2 * n + 2 + k] = 0.0
                    T.sync_threads(BARRIER, threads)
                    if step < steps[0]:
                        # Of the tokens whose gates are made in the next step.
                        t0[0] = (first + step * clusters) * GROUP + lane % products // n
                        if t0[0] < tokens:
                            mix[0] = mixes[t0[0], lane % n]
                            rms[0] = inv_rms[t0[0]]
                        push_vectors(
                            warp_sums,
                            step % 2,
                            parts,
                            full,
                            step % SLOTS,
                            rank,
                            cluster,
                            warps,
                            products,
                        )
                # A lane has one mix of one token of a group: over those tokens, then all mixes.
                for level in T.unroll(GROUP.bit_length() - 1):
                    for k in T.unroll(2):
                        gate_sums[k] += T.shfl_xor(gate_sums[k], n << level)
                for level in T.unroll(n.bit_length() - 1):
                    gate_sums[1] += T.shfl_xor(gate_sums[1], 1 << level)
                if rank == 0 and lane < n:
                    gate_partials[first, lane] = T.cast(gate_sums[0], T.float32)
                    if lane == 0:
                        gate_partials[first, n] = T.cast(gate_sums[1], T.float32)
            if cluster > 1:
                T.cluster_sync()

    return contract_cluster_bwd_kernel
