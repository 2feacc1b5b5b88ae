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

import tilelang.language as T
from tilelang import PassConfigKey, tvm

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import SIMT, VECTOR, builder, follow_previous, weighted_sum
from tile_mhc.kernels._shapes import (
    CLUSTER_COLUMNS,
    CLUSTER_TOKENS,
    cluster_row,
    cluster_size,
    cluster_stages,
)
from tile_mhc.kernels.mixes import logit
from tile_mhc.kernels.projection import (
    LARGE_SQUARES,
    RESCUE_SCALE,
    high_part,
    low_part,
    norm_shape,
    rounded_to_tf32,
    weight_value,
)

RING = {
    **SIMT,
    PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
}
GROUP = CLUSTER_TOKENS
# Columns of a warp that the tensor cores multiply at a time.
BLOCK = 32
BLOCKS = CLUSTER_COLUMNS // BLOCK
# Vectors per stream in a warp's columns.
CHUNKS = CLUSTER_COLUMNS // VECTOR
# Columns whose products a tensor core adds up before float32 does: see `projection_fwd`.
CHAIN = 128
# Two would do: see `push_sums`.
SLOTS = 4
# The barrier of every step; warps arrive at it from two different loops.
BARRIER = 1
STORE_TO_CTA = tvm.ir.Op.get("tl.tma_store_cluster")


@T.macro
def load_group(
    source: T.Tensor,
    t0: T.Buffer,
    vector: T.int32,
    rows: int,
    ring: T.Buffer,
    slot: T.int32,
    column: T.int32,
    width: int,
):
    """Start the loads of a warp's columns of the tokens from t0[0] on; zeros past the last token.

    `vector` is the index, within a token, of the vector that this lane loads.
    """
    lane = T.get_thread_binding() % 32
    at = lane // CHUNKS % rows * width + column + lane % CHUNKS * VECTOR
    for e in T.unroll(GROUP * rows * CHUNKS // 32):
        g = e * (32 // (rows * CHUNKS)) + lane // (rows * CHUNKS)
        if t0[0] + g < source.shape[0]:
            T.ptx_cp_async(
                T.access_ptr(ring[slot, g, at], "w", VECTOR),
                T.access_ptr(source[t0[0] + g, vector * VECTOR], "r", VECTOR),
                VECTOR,
            )
        else:
            for v in T.vectorized(VECTOR):
                ring[slot, g, at + v] = T.cast(0, T.bfloat16)


@T.macro
def count_steps(tokens: T.int32, first: T.int32, clusters: T.int32, out: T.Buffer):
    """out[0] = groups of tokens that the cluster `first` takes: every `clusters`-th."""
    out[0] = T.truncdiv(T.truncdiv(tokens + GROUP - 1, GROUP) - first + clusters - 1, clusters)


@T.macro
def multiply(a: T.Buffer, b: T.Buffer, at: int, out: T.Buffer, chain: int):
    """out[chain] += A B for one m16n8k16 product of bfloat16, of which each lane has its part."""
    T.ptx_mma(
        "float32",
        "m16n8k16",
        "row",
        "col",
        "bf16",
        "bf16",
        "fp32",
        a.data,
        0,
        b.data,
        at,
        out.data,
        chain * 4,
        T.bool(False),
    )


@T.macro
def stack(upper: T.Buffer, u: int, lower: T.Buffer, v: int, a: T.Buffer):
    """The operand whose rows 0 to 7 are of `upper`, and 8 to 15 of `lower`, four values per lane.

    Which columns a lane's values come from does not matter, as long as both operands agree: here a
    lane has eight neighbours, loaded in one access, where the tensor core's layout has pairs.
    """
    for k in T.vectorized(2):
        a[k] = upper[u + k]
    for k in T.vectorized(2):
        a[2 + k] = lower[v + k]
    for k in T.vectorized(2):
        a[4 + k] = upper[u + 2 + k]
    for k in T.vectorized(2):
        a[6 + k] = lower[v + 2 + k]


@T.macro
def push_sums(
    warp_sums: T.Buffer,
    buffer: T.int32,
    mine: T.Buffer,
    parts: T.Buffer,
    full: T.Buffer,
    slot: T.int32,
    rank: T.int32,
    cluster: int,
    warps: int,
    count: int,
):
    """Add up what the warps of this CTA have, and give it to every CTA of the cluster.

    By one warp. A CTA that pushes step s has read what all pushed in step s - 1, and who pushed
    that had read step s - 2: its slot is free. A slot's barrier is full when all have come.
    """
    lane = T.get_thread_binding() % 32
    total = T.alloc_local((1,), T.float32)
    for r in T.unroll(-(-count // 32)):
        k = r * 32 + lane
        if k < count:
            total[0] = 0.0
            for q in T.unroll(warps):
                total[0] += warp_sums[buffer, q, k]
            if cluster > 1:
                mine[slot, k] = total[0]
            else:
                parts[slot, 0, k] = total[0]
    if cluster == 1:
        T.sync_warp()
    else:
        T.fence_proxy_async()
        T.sync_warp()
        # Not T.copy_cluster, of which one lane would issue all, one after the other.
        if lane < cluster:
            T.evaluate(
                T.call_intrin(
                    "handle",
                    STORE_TO_CTA,
                    T.access_ptr(parts[slot, rank, 0], "w", mine.shape[1]),
                    T.access_ptr(mine[slot, 0], "r", mine.shape[1]),
                    lane,
                    T.uint32(mine.shape[1] * 4),
                    full[slot],
                )
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
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * CLUSTER_COLUMNS
            h = rank * width + column
            ring = T.alloc_shared((stages, GROUP, cluster_row(n, width)), T.bfloat16)
            warp_sums = T.alloc_shared((2, warps, count), T.float32)
            parts = T.alloc_shared((SLOTS, cluster, count), T.float32)
            mine = T.alloc_shared((SLOTS, count), T.float32)
            gates = T.alloc_shared((2, products), T.float32)
            full = T.alloc_cluster_barrier([cluster] * SLOTS)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            # Indices of global memory are variables: written out where they are used they become
            # sums of many 64-bit terms, each of which the compiler keeps.
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((2,), T.int32)
            if warp < warps:
                raw = T.alloc_local((VECTOR,), T.float32)
                w = T.alloc_local((n * BLOCKS * VECTOR,), T.bfloat16)
                values = T.alloc_local((VECTOR,), T.bfloat16)
                a = T.alloc_local((VECTOR,), T.bfloat16)
                sums = T.alloc_local((chains, 4), T.float32)
                mix = T.alloc_local((n,), T.float32)
                streams = T.alloc_local((n, VECTOR), T.bfloat16)
                total = T.alloc_local((VECTOR,), T.float32)
                vectors[0] = (lane // CHUNKS % n * hidden_size + h) // VECTOR + lane % CHUNKS
                vectors[1] = h // VECTOR + lane % CHUNKS
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        load_group(x, t0, vectors[0], n, ring, s, column, width)
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
                for step in T.serial(steps[0] + 1):
                    # Here and not within the condition, past which registers would be kept alive
                    # for what they hold where it is false.
                    for c in T.unroll(chains):
                        for k in T.unroll(4):
                            sums[c, k] = 0.0
                    for v in T.unroll(VECTOR):
                        values[v] = T.cast(0, T.bfloat16)
                    if step < steps[0]:
                        T.ptx_wait_group(ahead - 1)
                        T.sync_warp()
                        # Below the weights' rows the tokens themselves: their squares come along.
                        # Loops over a tuple are unrolled as they are traced: operands of products
                        # are chosen by a number, not by an expression.
                        for b in tuple(range(n * BLOCKS)):
                            for v in T.vectorized(VECTOR):
                                values[v] = ring[
                                    step % stages,
                                    lane // 4,
                                    b // BLOCKS * width
                                    + column
                                    + b % BLOCKS * BLOCK
                                    + lane % 4 * VECTOR
                                    + v,
                                ]
                            for at in (0, 4):
                                stack(w, b * VECTOR + at, values, at, a)
                                multiply(a, values, at, sums, (2 * b + at // 4) % chains)
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
                        t0[0] = (first + (step - 1) * clusters) * GROUP
                        for j in T.unroll(GROUP * CHUNKS // 32):
                            g = j * (32 // CHUNKS) + lane // CHUNKS
                            c = column + lane % CHUNKS * VECTOR
                            if t0[0] + g < tokens:
                                for i in T.unroll(n):
                                    mix[i] = gates[step % 2, g * n + i]
                                    for v in T.vectorized(VECTOR):
                                        streams[i, v] = ring[
                                            (step - 1) % stages, g, i * width + c + v
                                        ]
                                weighted_sum(mix, streams, n, total)
                                for v in T.vectorized(VECTOR):
                                    out[t0[0] + g, vectors[1] * VECTOR + v] = T.cast(
                                        total[v], T.bfloat16
                                    )
                    # The ring has a part of each warp's own: what it has read may be overwritten.
                    T.sync_warp()
                    if step + ahead < steps[0]:
                        t0[0] = (first + (step + ahead) * clusters) * GROUP
                        slot = (step + ahead) % stages
                        load_group(x, t0, vectors[0], n, ring, slot, column, width)
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
                        push_sums(
                            warp_sums,
                            step % 2,
                            mine,
                            parts,
                            full,
                            step % SLOTS,
                            rank,
                            cluster,
                            warps,
                            count,
                        )
            # Nobody leaves while others may still push to it, or read what it pushed.
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
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * CLUSTER_COLUMNS
            h = rank * width + column
            ring = T.alloc_shared((stages, GROUP, cluster_row(n, width)), T.bfloat16)
            grad_ring = T.alloc_shared((stages, GROUP, cluster_row(1, width)), T.bfloat16)
            warp_sums = T.alloc_shared((2, warps, products), T.float32)
            parts = T.alloc_shared((SLOTS, cluster, products), T.float32)
            mine = T.alloc_shared((SLOTS, products), T.float32)
            given = T.alloc_shared((2, GROUP, factors), T.float32)
            full = T.alloc_cluster_barrier([cluster] * SLOTS)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((3,), T.int32)
            if warp < warps:
                values = T.alloc_local((2 * VECTOR,), T.bfloat16)
                grads = T.alloc_local((VECTOR,), T.bfloat16)
                a = T.alloc_local((VECTOR,), T.bfloat16)
                sums = T.alloc_local((n // 2, 4), T.float32)
                w = T.alloc_local((n, vector), T.float32)
                grad_w = T.alloc_local((n, vector), T.float32)
                streams = T.alloc_local((vector,), T.bfloat16)
                outer = T.alloc_local((vector,), T.bfloat16)
                factor = T.alloc_local((factors,), T.float32)
                element = T.alloc_local((1,), T.float32)
                pre = T.alloc_local((1,), T.float32)
                total = T.alloc_local((vector,), T.float32)
                stream = lane // owners
                vectors[0] = (lane // CHUNKS % n * hidden_size + h) // VECTOR + lane % CHUNKS
                vectors[1] = h // VECTOR + lane % CHUNKS
                vectors[2] = (stream * hidden_size + h) // vector + lane % owners
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        load_group(x, t0, vectors[0], n, ring, s, column, width)
                        load_group(grad, t0, vectors[1], 1, grad_ring, s, column, width)
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
                for step in T.serial(steps[0] + 1):
                    # As in the forward.
                    for p in T.unroll(n // 2):
                        for k in T.unroll(4):
                            sums[p, k] = 0.0
                    for v in T.unroll(VECTOR):
                        grads[v] = T.cast(0, T.bfloat16)
                        for i in T.unroll(2):
                            values[i * VECTOR + v] = T.cast(0, T.bfloat16)
                    if step < steps[0]:
                        T.ptx_wait_group(ahead - 1)
                        T.sync_warp()
                        for b in tuple(range(BLOCKS)):
                            c = column + b * BLOCK + lane % 4 * VECTOR
                            for v in T.vectorized(VECTOR):
                                grads[v] = grad_ring[step % stages, lane // 4, c + v]
                            # Each product multiplies the tokens of two streams with those of the
                            # gradient; its diagonals pair a token with itself.
                            for p in tuple(range(n // 2)):
                                for i in T.unroll(2):
                                    for v in T.vectorized(VECTOR):
                                        values[i * VECTOR + v] = ring[
                                            step % stages, lane // 4, (2 * p + i) * width + c + v
                                        ]
                                for at in (0, 4):
                                    stack(values, at, values, VECTOR + at, a)
                                    multiply(a, grads, at, sums, p)
                        for k in T.unroll(2):
                            if lane // 4 == lane % 4 * 2 + k:
                                for i in T.unroll(n):
                                    warp_sums[step % 2, warp, lane // 4 * n + i] = sums[
                                        i // 2, i % 2 * 2 + k
                                    ]
                    T.sync_threads(BARRIER, threads)
                    if step >= 1:
                        t0[0] = (first + (step - 1) * clusters) * GROUP
                        c = column + lane % owners * vector
                        for g in T.unroll(GROUP):
                            for q in T.unroll(factors // 4):
                                for v in T.vectorized(4):
                                    factor[q * 4 + v] = given[step % 2, g, q * 4 + v]
                            pre[0] = given[step % 2, g, stream]
                            for v in T.vectorized(vector):
                                streams[v] = ring[(step - 1) % stages, g, stream * width + c + v]
                            for v in T.vectorized(vector):
                                outer[v] = grad_ring[(step - 1) % stages, g, c + v]
                            for v in T.unroll(vector):
                                element[0] = T.cast(streams[v], T.float32)
                                total[v] = pre[0] * T.cast(outer[v], T.float32)
                                # x joins one r first: r * r may be lost where x is large.
                                total[v] += (element[0] * factor[2 * n]) * factor[2 * n + 1]
                                for m in T.unroll(n):
                                    total[v] += factor[n + m] * w[m, v]
                                    grad_w[m, v] += factor[n + m] * element[0]
                            if t0[0] + g < tokens:
                                for v in T.vectorized(vector):
                                    grad_x[t0[0] + g, vectors[2] * vector + v] = T.cast(
                                        total[v], T.bfloat16
                                    )
                    # As in the forward.
                    T.sync_warp()
                    if step + ahead < steps[0]:
                        t0[0] = (first + (step + ahead) * clusters) * GROUP
                        slot = (step + ahead) % stages
                        load_group(x, t0, vectors[0], n, ring, slot, column, width)
                        load_group(grad, t0, vectors[1], 1, grad_ring, slot, column, width)
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
                        push_sums(
                            warp_sums,
                            step % 2,
                            mine,
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
