"""The learned n -> 1 readout and its gradients, each in one pass over the streams.

A token's weighted sum waits for its mixes, which need all of the token. Here a cluster of CTAs keeps
the token in shared memory meanwhile: each CTA has a slice of H, whose weight stays in registers, and
the dot products of the slices meet through shared memory of the cluster. x crosses HBM once, where
`projection` and `contract_fwd`, one after the other, read it twice.

A warp has CLUSTER_COLUMNS columns of every stream, and takes them of a group of tokens at a time:
in step s it asks for a later group, takes the products of group s, and finishes group s - 1, whose
gates have come by then. One more warp adds up the products of the others, pushes the sums to every
CTA of the cluster, and makes gates of what came from there. One barrier a step lets each see what
the other wrote. TileLang adds no barriers of its own to these kernels (RING).
"""

import tilelang.language as T
from tilelang import PassConfigKey
from tvm.ir import Op

from tile_mhc.kernels._common import SIMT, VECTOR, builder, follow_previous, weighted_sum
from tile_mhc.kernels._shapes import (
    CLUSTER_COLUMNS,
    CLUSTER_TOKENS,
    cluster_size,
    cluster_stages,
)
from tile_mhc.kernels.mixes import logit
from tile_mhc.kernels.projection import (
    LARGE_SQUARES,
    RESCUE_SCALE,
    SMALL_EXPONENT,
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
# What a tensor core multiplies at a time, of a warp's columns.
BLOCK = 32
BLOCKS = CLUSTER_COLUMNS // BLOCK
# Vectors in a warp's columns of one stream.
CHUNKS = CLUSTER_COLUMNS // VECTOR
# Columns whose products a tensor core adds up before float32 does: see `projection_fwd`.
CHAIN = 128
# Sums are pushed to a CTA that may still read those of two steps before; see `push_sums`.
SLOTS = 4
MAX_STAGES = 6
# What the backward says of a token: gates, d mix * r, then r, the factor of x * r, the inverse of the
# group's power of two.
FACTORS = 12
STORE_TO_CTA = Op.get("tl.tma_store_cluster")


def swizzled(g: T.int32, chunk: T.int32):
    """Where the vector `chunk` of a token's 64 columns lies among their eight.

    The rows of two neighbours, four lanes each, are in different banks then, and so are eight rows.
    """
    return (chunk ^ ((g & 1) << 2 | g >> 1)) * VECTOR


def packed(first: T.bfloat16, second: T.bfloat16):
    """The two in one register."""
    low = T.cast(T.reinterpret(first, T.uint16), T.uint32)
    return low | T.cast(T.reinterpret(second, T.uint16), T.uint32) << 16


@T.macro
def load_columns(
    source: T.Tensor,
    t0: T.int32,
    h: T.int32,
    rows: int,
    hidden_size: int,
    ring: T.Buffer,
    slot: T.int32,
    column: T.int32,
    width: int,
):
    """Ask for a warp's columns of a group of tokens: source[t0 + g, row * hidden_size + h + ...].

    Zeros past the last token: products over tokens see them.
    """
    lane = T.get_thread_binding() % 32
    for e in T.unroll(GROUP * rows * CHUNKS // 32):
        g = (e * 32 + lane) // (rows * CHUNKS)
        row = (e * 32 + lane) // CHUNKS % rows
        at = row * width + column + swizzled(g, lane % CHUNKS)
        k = row * hidden_size + h + lane % CHUNKS * VECTOR
        if t0 + g < source.shape[0]:
            T.ptx_cp_async(
                T.access_ptr(ring[slot, g, at], "w", VECTOR),
                T.access_ptr(source[t0 + g, k], "r", VECTOR),
                VECTOR,
            )
        else:
            for v in T.vectorized(VECTOR):
                ring[slot, g, at + v] = T.cast(0, T.bfloat16)


@T.macro
def load_weight(
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_dtype: str,
    m: T.int32,
    k: T.int32,
    tf32: T.int32,
    out: T.Buffer,
):
    """out[v] = `weight_value` of column k + v, in two accesses."""
    for q in T.unroll(VECTOR // 4):
        for v in T.vectorized(4):
            out[q * 4 + v] = T.cast(weight[m, k + q * 4 + v], T.float32)
    if norm_dtype != "":
        for v in T.unroll(VECTOR):
            out[v] *= T.cast(norm_weight[k + v], T.float32)
    if tf32 != 0:
        for v in T.unroll(VECTOR):
            out[v] = rounded_to_tf32(out[v])


@T.macro
def multiply(a: T.Buffer, first: int, b: T.Buffer, second: int, out: T.Buffer, chain: int):
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
        first,
        b.data,
        second,
        out.data,
        chain * 4,
        T.bool(False),
    )


@T.macro
def stack(upper: T.Buffer, u: int, lower: T.Buffer, v: int, a: T.Buffer):
    """The operand whose rows 0 to 7 are of `upper`, and 8 to 15 of `lower`, four values a lane.

    Which columns a lane's values are of does not matter, as long as both operands agree: a lane has
    eight neighbours, in one access, where the tensor core has pairs.
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

    By one warp. A CTA that pushes step s has read what all pushed in step s - 2, and who pushed that
    had read step s - 4: SLOTS steps are enough. A slot's barrier is full when all have come.
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
    if cluster > 1:
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
    weight_dtype: str = "float32",
    norm_dtype: str = "",
    scale_dtype: str = "float32",
    bias_dtype: str = "float32",
):
    tokens = T.dynamic("num_tokens")
    size = n * hidden_size
    cluster = cluster_size(n, hidden_size, False)
    width = hidden_size // cluster
    warps = width // CLUSTER_COLUMNS
    stages = min(cluster_stages(n, width, False), MAX_STAGES)
    ahead = stages - 2
    products = GROUP * n
    # Products, then squares; a push moves multiples of 16 bytes.
    count = products + GROUP
    chains = -(-n * CLUSTER_COLUMNS // CHAIN)
    has_norm = norm_dtype != ""

    @T.prim_func
    def contract_cluster_fwd_kernel(
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(n, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_dtype), norm_dtype or T.float32],
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
        with T.Kernel(
            clusters * cluster, threads=warps * 32 + 32, cluster_dims=(cluster, 1, 1)
        ) as cta:
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * CLUSTER_COLUMNS
            h = rank * width + column
            ring = T.alloc_shared((stages, GROUP, n * width), T.bfloat16)
            warp_sums = T.alloc_shared((2, warps, count), T.float32)
            parts = T.alloc_shared((SLOTS, cluster, count), T.float32)
            mine = T.alloc_shared((SLOTS, count), T.float32)
            gates = T.alloc_shared((2, products), T.float32)
            full = T.alloc_cluster_barrier([cluster] * SLOTS)
            steps = T.alloc_local((1,), T.int32)
            steps[0] = T.truncdiv(
                T.truncdiv(tokens + GROUP - 1, GROUP) - first + clusters - 1, clusters
            )
            # Read once: beside the stream of loads a miss costs a microsecond.
            gate_scale = T.alloc_local((1,), T.float32)
            gate_bias = T.alloc_local((1,), T.float32)
            gate_scale[0] = T.cast(scale[0], T.float32)
            gate_bias[0] = T.cast(bias[lane % n], T.float32)
            raw = T.alloc_local((VECTOR,), T.float32)
            w = T.alloc_local((n * BLOCKS * VECTOR,), T.bfloat16)
            values = T.alloc_local((VECTOR,), T.bfloat16)
            a = T.alloc_local((VECTOR,), T.bfloat16)
            sums = T.alloc_local((chains, 4), T.float32)
            value = T.alloc_local((2,), T.float32)
            exact = T.alloc_local((2,), T.float64)
            z = T.alloc_local((1,), T.float32)
            mix = T.alloc_local((n,), T.float32)
            streams = T.alloc_local((n, VECTOR), T.bfloat16)
            total = T.alloc_local((VECTOR,), T.float32)
            if warp < warps:
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0 = (first + s * clusters) * GROUP
                        load_columns(x, t0, h, n, hidden_size, ring, s, column, width)
                    T.ptx_commit_group()
                # The rows of the operand: high parts, then low parts, then zeros.
                row = lane // 4
                for b in T.unroll(n * BLOCKS):
                    k = b // BLOCKS * hidden_size + h + b % BLOCKS * BLOCK + lane % 4 * VECTOR
                    load_weight(weight, norm_weight, norm_dtype, row % n, k, tf32, raw)
                    for v in T.unroll(VECTOR):
                        w[b * VECTOR + v] = T.if_then_else(
                            row < n,
                            high_part(raw[v]),
                            T.if_then_else(row < 2 * n, low_part(raw[v]), T.cast(0, T.bfloat16)),
                        )
            for step in T.serial(steps[0] + 1):
                if warp < warps:
                    if step < steps[0]:
                        T.ptx_wait_group(ahead - 1)
                        T.sync_warp()
                        for c in T.unroll(chains):
                            for k in T.unroll(4):
                                sums[c, k] = 0.0
                        # Below the weights' rows the tokens themselves: their squares come along.
                        for b in tuple(range(n * BLOCKS)):
                            for v in T.vectorized(VECTOR):
                                values[v] = ring[
                                    step % stages,
                                    lane // 4,
                                    b // BLOCKS * width
                                    + column
                                    + swizzled(lane // 4, b % BLOCKS * 4 + lane % 4)
                                    + v,
                                ]
                            for at in (0, 4):
                                stack(w, b * VECTOR + at, values, at, a)
                                multiply(a, 0, values, at, sums, (2 * b + at // 4) % chains)
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
                else:
                    if step >= 1:
                        slot = (step - 1) % SLOTS
                        if cluster > 1:
                            T.mbarrier_wait_parity(full[slot], (step - 1) // SLOTS % 2)
                        g = lane % products // n
                        m = lane % n
                        t = (first + (step - 1) * clusters) * GROUP + g
                        value[0] = 0.0
                        value[1] = 0.0
                        for c in T.unroll(cluster):
                            value[0] += parts[slot, c, g * n + m]
                            value[1] += parts[slot, c, products + g]
                        if not value[1] < LARGE_SQUARES and t < tokens:
                            # As in `token_mix`.
                            exact[0] = 0.0
                            exact[1] = 0.0
                            for k in T.unroll(size, unroll_factor=1):
                                z[0] = T.cast(x[t, k], T.float32) * RESCUE_SCALE
                                exact[0] += T.cast(z[0] * z[0], T.float64)
                                exact[1] += T.cast(z[0], T.float64) * T.cast(
                                    weight_value(weight, norm_weight, norm_dtype, m, k, tf32),
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
                            if rank == 0 and t < tokens:
                                mixes[t, m] = value[0]
                                if m == 0:
                                    inv_rms[t] = value[1]
                T.sync_threads()
                if warp < warps:
                    if step + ahead < steps[0]:
                        t0 = (first + (step + ahead) * clusters) * GROUP
                        slot = (step + ahead) % stages
                        load_columns(x, t0, h, n, hidden_size, ring, slot, column, width)
                    T.ptx_commit_group()
                    if step >= 1:
                        for j in T.unroll(GROUP * CHUNKS // 32):
                            g = j * (32 // CHUNKS) + lane // CHUNKS
                            t = (first + (step - 1) * clusters) * GROUP + g
                            for i in T.unroll(n):
                                mix[i] = gates[step % 2, g * n + i]
                                for v in T.vectorized(VECTOR):
                                    streams[i, v] = ring[
                                        (step - 1) % stages,
                                        g,
                                        i * width + column + swizzled(g, lane % CHUNKS) + v,
                                    ]
                            weighted_sum(mix, streams, n, total)
                            if t < tokens:
                                for v in T.vectorized(VECTOR):
                                    out[t, h + lane % CHUNKS * VECTOR + v] = T.cast(
                                        total[v], T.bfloat16
                                    )
                else:
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
    weight_dtype: str = "float32",
    norm_dtype: str = "",
    scale_dtype: str = "float32",
    bias_dtype: str = "float32",
):
    """Gradient of x, and of weight, bias and scale a row of partial sums a cluster.

    d gate_i = grad . x_i;  d mix = d gate * sigmoid'(z) * scale
    d x_i = gate_i * grad + (d mix * r) w_i - x_i * r * r * (d mix . mix) / K
    """
    tokens = T.dynamic("num_tokens")
    size = n * hidden_size
    cluster = cluster_size(n, hidden_size, True)
    width = hidden_size // cluster
    warps = width // CLUSTER_COLUMNS
    stages = min(cluster_stages(n, width, True), MAX_STAGES)
    ahead = stages - 2
    products = GROUP * n
    has_norm = norm_dtype != ""

    @T.prim_func
    def contract_cluster_bwd_kernel(
        grad: T.Tensor[(tokens, hidden_size), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(n, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_dtype), norm_dtype or T.float32],
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
        with T.Kernel(
            clusters * cluster, threads=warps * 32 + 32, cluster_dims=(cluster, 1, 1)
        ) as cta:
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * CLUSTER_COLUMNS
            h = rank * width + column
            ring = T.alloc_shared((stages, GROUP, n * width), T.bfloat16)
            grad_ring = T.alloc_shared((stages, GROUP, width), T.bfloat16)
            warp_sums = T.alloc_shared((2, warps, products), T.float32)
            parts = T.alloc_shared((SLOTS, cluster, products), T.float32)
            mine = T.alloc_shared((SLOTS, products), T.float32)
            given = T.alloc_shared((2, GROUP, FACTORS), T.float32)
            full = T.alloc_cluster_barrier([cluster] * SLOTS)
            steps = T.alloc_local((1,), T.int32)
            steps[0] = T.truncdiv(
                T.truncdiv(tokens + GROUP - 1, GROUP) - first + clusters - 1, clusters
            )
            gate_scale = T.alloc_local((1,), T.float32)
            gate_bias = T.alloc_local((1,), T.float32)
            gate_scale[0] = T.cast(scale[0], T.float32)
            gate_bias[0] = T.cast(bias[lane % n], T.float32)
            # The products.
            values = T.alloc_local((n * VECTOR,), T.bfloat16)
            grads = T.alloc_local((VECTOR,), T.bfloat16)
            a = T.alloc_local((VECTOR,), T.bfloat16)
            sums = T.alloc_local((n // 2, 4), T.float32)
            # The gates.
            mix = T.alloc_local((1,), T.float32)
            rms = T.alloc_local((1,), T.float32)
            value = T.alloc_local((2,), T.float32)
            z = T.alloc_local((1,), T.float32)
            gate_sums = T.alloc_local((2,), T.float64)
            lift = T.alloc_local((1,), T.int32)
            # The gradients.
            w = T.alloc_local((n * BLOCKS, 4), T.uint32)
            grad_w = T.alloc_local((n * BLOCKS, 4), T.float32)
            raw = T.alloc_local((2,), T.float32)
            token_parts = T.alloc_local((2 * VECTOR,), T.bfloat16)
            mix_parts = T.alloc_local((8,), T.bfloat16)
            columns = T.alloc_local((VECTOR,), T.float32)
            pair = T.alloc_local((2, 4), T.bfloat16)
            low = T.alloc_local((1,), T.bfloat16)
            transposed = T.alloc_local((VECTOR,), T.bfloat16)
            tile = T.alloc_local((1, 4), T.float32)
            grad_tile = T.alloc_local((1, 4), T.float32)
            factor = T.alloc_local((4,), T.float32)
            total = T.alloc_local((VECTOR,), T.float32)
            mix[0] = 0.0
            rms[0] = 0.0
            for k in T.unroll(2):
                gate_sums[k] = 0.0
            if warp < warps:
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0 = (first + s * clusters) * GROUP
                        load_columns(x, t0, h, n, hidden_size, ring, s, column, width)
                        load_columns(grad, t0, h, 1, hidden_size, grad_ring, s, column, width)
                    T.ptx_commit_group()
                # Two mixes a lane, high parts in lanes 0 and 1 of four, low parts in 2 and 3; of the
                # columns those that make a lane's columns of all four tiles neighbours.
                for b in T.unroll(n * BLOCKS):
                    k = b // BLOCKS * hidden_size + h + b % BLOCKS * BLOCK + lane // 8 * VECTOR
                    for e in T.unroll(2):
                        m = lane % 2 * 2 + e
                        load_weight(
                            weight, norm_weight, norm_dtype, T.min(m, n - 1), k, tf32, columns
                        )
                        for j in T.unroll(4):
                            raw[0] = T.Select(
                                lane // 4 % 2 == 0, columns[2 * j], columns[2 * j + 1]
                            )
                            if n < 4:
                                raw[0] = T.Select(m < n, raw[0], 0.0)
                            pair[e, j] = T.Select(
                                lane % 4 < 2, high_part(raw[0]), low_part(raw[0])
                            )
                    for j in T.unroll(4):
                        w[b, j] = packed(pair[0, j], pair[1, j])
                    for k in T.unroll(4):
                        grad_w[b, k] = 0.0
            for step in T.serial(steps[0] + 1):
                if warp < warps:
                    if step < steps[0]:
                        T.ptx_wait_group(ahead - 1)
                        T.sync_warp()
                        for p in T.unroll(n // 2):
                            for k in T.unroll(4):
                                sums[p, k] = 0.0
                        for b in tuple(range(BLOCKS)):
                            c = column + swizzled(lane // 4, b * 4 + lane % 4)
                            for v in T.vectorized(VECTOR):
                                grads[v] = grad_ring[step % stages, lane // 4, c + v]
                            for i in T.unroll(n):
                                for v in T.vectorized(VECTOR):
                                    values[i * VECTOR + v] = ring[
                                        step % stages, lane // 4, i * width + c + v
                                    ]
                            # Two streams a product, their tokens against those of the gradient.
                            for p in tuple(range(n // 2)):
                                for at in (0, 4):
                                    upper = 2 * p * VECTOR + at
                                    stack(values, upper, values, upper + VECTOR, a)
                                    multiply(a, 0, grads, at, sums, p)
                        for k in T.unroll(2):
                            if lane // 4 == lane % 4 * 2 + k:
                                for i in T.unroll(n):
                                    warp_sums[step % 2, warp, lane // 4 * n + i] = sums[
                                        i // 2, i % 2 * 2 + k
                                    ]
                else:
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
                        if (first + (step - 1) * clusters) * GROUP + g < tokens:
                            gate_sums[0] += T.cast(value[0], T.float64)
                            gate_sums[1] += T.cast(value[0] * mix[0], T.float64)
                        value[0] *= gate_scale[0]
                        value[1] = value[0] * mix[0]
                        for level in T.unroll(n.bit_length() - 1):
                            value[1] += T.shfl_xor(value[1], 1 << level)
                        value[0] *= rms[0]
                        if tf32 != 0:
                            value[0] = rounded_to_tf32(value[0])
                        if (first + (step - 1) * clusters) * GROUP + g >= tokens:
                            value[0] = 0.0
                        # As in `store_parts`: a power of two for the group, where all is small.
                        raw[0] = T.warp_reduce_max(T.abs(value[0]))
                        lift[0] = T.max(SMALL_EXPONENT - (T.reinterpret(raw[0], T.int32) >> 23), 0)
                        if lane < products:
                            given[step % 2, g, m] = T.sigmoid(z[0]) + pre_eps
                            given[step % 2, g, 4 + m] = value[0] * T.reinterpret(
                                (127 + lift[0]) << 23, T.float32
                            )
                            if m == 0:
                                given[step % 2, g, 8] = rms[0]
                                given[step % 2, g, 9] = -value[1] * rms[0] / size
                                given[step % 2, g, 10] = T.reinterpret(
                                    (127 - lift[0]) << 23, T.float32
                                )
                            if n < 4:
                                given[step % 2, g, 4 + n + m] = 0.0
                T.sync_threads()
                if warp < warps:
                    if step + ahead < steps[0]:
                        t0 = (first + (step + ahead) * clusters) * GROUP
                        slot = (step + ahead) % stages
                        load_columns(x, t0, h, n, hidden_size, ring, slot, column, width)
                        load_columns(grad, t0, h, 1, hidden_size, grad_ring, slot, column, width)
                    T.ptx_commit_group()
                    if step >= 1:
                        old = (step - 1) % stages
                        t = (first + (step - 1) * clusters) * GROUP + lane // 4
                        for v in T.vectorized(4):
                            factor[v] = given[step % 2, lane // 4, 8 + v]
                        # d mix * r of a token, times weights [high; low]: its high parts with both, and
                        # in the eight rows below its low parts with the high ones. A weight's operand
                        # is of two tiles: the zeros choose one.
                        for e in T.unroll(2):
                            raw[e] = given[step % 2, lane // 4, 4 + lane % 2 * 2 + e]
                            low[0] = T.Select(lane % 4 < 2, low_part(raw[e]), T.cast(0, T.bfloat16))
                            for j in (0, 1):
                                token_parts[8 * j + 4 * j + e] = high_part(raw[e])
                                token_parts[8 * j + 4 * j + 2 + e] = low[0]
                                token_parts[8 * j + 4 * (1 - j) + e] = T.cast(0, T.bfloat16)
                                token_parts[8 * j + 4 * (1 - j) + 2 + e] = T.cast(0, T.bfloat16)
                        # And of a mix two tokens, against columns 0 to 15 or 16 to 31 of a block.
                        for e in T.unroll(2):
                            raw[e] = given[step % 2, lane % 4 * 2 + e, 4 + lane // 4 % 4]
                            for half in T.unroll(2):
                                here = lane // 16 == half
                                mix_parts[half * 2 + e] = T.if_then_else(
                                    here, high_part(raw[e]), T.cast(0, T.bfloat16)
                                )
                                mix_parts[4 + half * 2 + e] = T.if_then_else(
                                    here, low_part(raw[e]), T.cast(0, T.bfloat16)
                                )
                        for half in tuple(range(BLOCKS)):
                            c = column + swizzled(lane // 4, half * 4 + lane % 4)
                            for v in T.vectorized(VECTOR):
                                grads[v] = grad_ring[old, lane // 4, c + v]
                            for i in tuple(range(n)):
                                b = i * BLOCKS + half
                                T.ptx_ldmatrix(
                                    T.bool(True),
                                    4,
                                    T.access_ptr(
                                        ring[
                                            old,
                                            lane % 8,
                                            i * width
                                            + column
                                            + swizzled(lane % 8, half * 4 + lane // 8),
                                        ],
                                        "r",
                                        VECTOR,
                                    ),
                                    T.access_ptr(transposed[0], "w", VECTOR),
                                )
                                for k in T.unroll(4):
                                    grad_tile[0, k] = 0.0
                                multiply(transposed, 0, mix_parts, 0, grad_tile, 0)
                                multiply(transposed, 0, mix_parts, 4, grad_tile, 0)
                                for k in T.unroll(4):
                                    grad_w[b, k] += grad_tile[0, k] * factor[2]
                                for v in T.vectorized(VECTOR):
                                    values[v] = ring[old, lane // 4, i * width + c + v]
                                raw[0] = given[step % 2, lane // 4, i]
                                for j in (0, 1, 2, 3):
                                    for k in T.unroll(4):
                                        tile[0, k] = 0.0
                                    multiply(
                                        token_parts, j % 2 * 8, w, b * 4 + j // 2 * 2, tile, 0
                                    )
                                    for e in T.unroll(2):
                                        v = 2 * j + e
                                        total[v] = raw[0] * T.cast(grads[v], T.float32)
                                        total[v] += (
                                            T.cast(values[v], T.float32) * factor[0]
                                        ) * factor[1]
                                        total[v] += (tile[0, e] + tile[0, 2 + e]) * factor[2]
                                if t < tokens:
                                    k = i * hidden_size + h + half * BLOCK + lane % 4 * VECTOR
                                    for v in T.vectorized(VECTOR):
                                        grad_x[t, k + v] = T.cast(total[v], T.bfloat16)
                else:
                    if step < steps[0]:
                        # For the next step, whose gates they are.
                        t = (first + step * clusters) * GROUP + lane % products // n
                        if t < tokens:
                            mix[0] = mixes[t, lane % n]
                            rms[0] = inv_rms[t]
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
            if warp < warps:
                # Rows 0 to 7 and 8 to 15 of columns 0 to 15, then of 16 to 31; two mixes a lane.
                for b in T.unroll(n * BLOCKS):
                    for k in T.unroll(4):
                        m = lane % 2 * 2 + k % 2
                        c = lane % 4 // 2 * 16 + k // 2 * 8 + lane // 4
                        if m < n:
                            partials[
                                first,
                                m,
                                b // BLOCKS * hidden_size + h + b % BLOCKS * BLOCK + c,
                            ] = grad_w[b, k]
            else:
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
