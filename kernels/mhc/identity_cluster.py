"""Read and write weights of four streams that are not mixed, and the layer input, in one pass over
the streams; and all gradients in another.

As in `contract_cluster`, a cluster of CTAs keeps its tokens in shared memory until their gates are
known: see there for the steps, the one barrier of each, and the warp that adds up what the others
have. Here eight mixes of a weight in two parts are all 16 rows of a tensor core's operand, and a
warp asks for another group as soon as it has finished one: two groups are on their way while a
third one's products are taken.

The backward leaves products with the weight, and those of its gradient, to the tensor cores: thread
by thread they would be 16 of 22 instructions an element.
"""

import tilelang.language as T
from tilelang import tvm

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import VECTOR, builder, follow_previous, weighted_sum
from tile_mhc.kernels._shapes import (
    CLUSTER_SLOTS,
    CLUSTER_TOKENS,
    IDENTITY_BACKWARD_COLUMNS,
    IDENTITY_COLUMNS,
    IDENTITY_MIXES,
    IDENTITY_STREAMS,
    cluster_row,
    identity_cluster_size,
    identity_stages,
    identity_sums,
)
from tile_mhc.kernels.contract_cluster import (
    BARRIER,
    BLOCK,
    BLOCKS,
    CHAIN,
    CHUNKS,
    RING,
    count_steps,
    load_group,
    multiply,
    push_sums,
    stack,
)
from tile_mhc.kernels.mixes import logit, sigmoid, sigmoid_slope
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

GROUP = CLUSTER_TOKENS
N = IDENTITY_STREAMS
MIXES = IDENTITY_MIXES
LOAD_MATRIX = tvm.ir.Op.get("tl.ptx_ldmatrix")
# The backward: vectors of a token in a warp's columns of one stream, and of all.
PIECES = IDENTITY_BACKWARD_COLUMNS // VECTOR
ROW = N * PIECES
# Numbers per token: n gates, 1 / rms, the factor of x / rms, the inverse of the power of two.
FACTORS = 8


@builder(RING)
def identity_cluster_fwd(
    hidden_size: int,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    tokens = T.dynamic("num_tokens")
    size = N * hidden_size
    cluster = identity_cluster_size(N, hidden_size, False, False, limits)
    width = hidden_size // cluster
    warps = width // IDENTITY_COLUMNS
    threads = warps * 32 + 32
    stages = identity_stages(cluster, width, False, False, limits)
    ahead = stages - 1
    products = GROUP * MIXES
    count = identity_sums(False)
    chains = -(-N * IDENTITY_COLUMNS // CHAIN)
    has_norm = norm_weight_dtype != ""

    @T.prim_func
    def identity_cluster_fwd_kernel(
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        scale: T.Tensor[(2,), scale_dtype],
        bias: T.Tensor[(MIXES,), bias_dtype],
        layer_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        post_mix: T.Tensor[(tokens, N), T.float32],
        mixes: T.Tensor[(tokens, MIXES), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        norm_eps: T.float32,
        pre_eps: T.float32,
        post_eps: T.float32,
        post_mult: T.float32,
        tf32: T.int32,
        clusters: T.int32,
    ):
        with T.Kernel(clusters * cluster, threads=threads, cluster_dims=(cluster, 1, 1)) as cta:
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * IDENTITY_COLUMNS
            h = rank * width + column
            ring = T.alloc_shared((stages, GROUP, cluster_row(N, width)), T.bfloat16)
            warp_sums = T.alloc_shared((2, warps, count), T.float32)
            parts = T.alloc_shared((CLUSTER_SLOTS, cluster, count), T.float32)
            mine = T.alloc_shared((CLUSTER_SLOTS, count), T.float32)
            gates = T.alloc_shared((2, GROUP, N), T.float32)
            full = T.alloc_cluster_barrier([cluster] * CLUSTER_SLOTS)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            # Indices of global memory as variables: see `contract_cluster_fwd`.
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((2,), T.int32)
            if warp < warps:
                raw = T.alloc_local((VECTOR,), T.float32)
                high = T.alloc_local((N * BLOCKS * VECTOR,), T.bfloat16)
                low = T.alloc_local((N * BLOCKS * VECTOR,), T.bfloat16)
                values = T.alloc_local((VECTOR,), T.bfloat16)
                a = T.alloc_local((VECTOR,), T.bfloat16)
                sums = T.alloc_local((chains, 4), T.float32)
                squares = T.alloc_local((chains, 4), T.float32)
                mix = T.alloc_local((N,), T.float32)
                streams = T.alloc_local((N, VECTOR), T.bfloat16)
                total = T.alloc_local((VECTOR,), T.float32)
                vectors[0] = (lane // CHUNKS % N * hidden_size + h) // VECTOR + lane % CHUNKS
                vectors[1] = h // VECTOR + lane % CHUNKS
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        load_group(x, t0, vectors[0], N, ring, s, column, width)
                    T.ptx_commit_group()
                # A lane has the weights of one mix, of every block of columns its eight neighbours.
                for b in T.unroll(N * BLOCKS):
                    k = b // BLOCKS * hidden_size + h + b % BLOCKS * BLOCK + lane % 4 * VECTOR
                    for q in T.unroll(VECTOR // 4):
                        for v in T.vectorized(4):
                            raw[q * 4 + v] = T.cast(weight[lane // 4, k + q * 4 + v], T.float32)
                    for v in T.unroll(VECTOR):
                        if has_norm:
                            raw[v] *= T.cast(norm_weight[k + v], T.float32)
                        if tf32 != 0:
                            raw[v] = rounded_to_tf32(raw[v])
                        high[b * VECTOR + v] = high_part(raw[v])
                        low[b * VECTOR + v] = low_part(raw[v])
                for step in T.serial(steps[0] + 1):
                    # Here and not within the condition, past which registers would be kept alive
                    # for what they hold where it is false.
                    for c in T.unroll(chains):
                        for k in T.unroll(4):
                            sums[c, k] = 0.0
                            squares[c, k] = 0.0
                    for v in T.unroll(VECTOR):
                        values[v] = T.cast(0, T.bfloat16)
                    if step < steps[0]:
                        T.ptx_wait_group(ahead - 1)
                        T.sync_warp()
                        # Loops over a tuple: see `contract_cluster_fwd`.
                        for b in tuple(range(N * BLOCKS)):
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
                                chain = (2 * b + at // 4) % chains
                                stack(high, b * VECTOR + at, low, b * VECTOR + at, a)
                                multiply(a, values, at, sums, chain)
                                # The tokens by themselves, for the diagonal.
                                stack(values, at, values, at, a)
                                multiply(a, values, at, squares, chain)
                        for c in tuple(range(1, chains)):
                            for k in T.unroll(4):
                                sums[0, k] += sums[c, k]
                                squares[0, k] += squares[c, k]
                        for k in T.unroll(2):
                            # A lane has two tokens of a mix, by its high part and by its low one.
                            g = lane % 4 * 2 + k
                            warp_sums[step % 2, warp, g * MIXES + lane // 4] = (
                                sums[0, k] + sums[0, 2 + k]
                            )
                            if lane // 4 == g:
                                warp_sums[step % 2, warp, products + g] = squares[0, k]
                    T.sync_threads(BARRIER, threads)
                    if step >= 1:
                        t0[0] = (first + (step - 1) * clusters) * GROUP
                        for j in T.unroll(GROUP * CHUNKS // 32):
                            g = j * (32 // CHUNKS) + lane // CHUNKS
                            c = column + lane % CHUNKS * VECTOR
                            if t0[0] + g < tokens:
                                for i in T.unroll(N):
                                    mix[i] = gates[step % 2, g, i]
                                    for v in T.vectorized(VECTOR):
                                        streams[i, v] = ring[
                                            (step - 1) % stages, g, i * width + c + v
                                        ]
                                weighted_sum(mix, streams, N, total)
                                for v in T.vectorized(VECTOR):
                                    layer_input[t0[0] + g, vectors[1] * VECTOR + v] = T.cast(
                                        total[v], T.bfloat16
                                    )
                    # The ring has a part of each warp's own: what it has read may be overwritten.
                    T.sync_warp()
                    if step + ahead < steps[0]:
                        t0[0] = (first + (step + ahead) * clusters) * GROUP
                        slot = (step + ahead) % stages
                        load_group(x, t0, vectors[0], N, ring, slot, column, width)
                    T.ptx_commit_group()
            else:
                value = T.alloc_local((2,), T.float32)
                exact = T.alloc_local((2,), T.float64)
                z = T.alloc_local((1,), T.float32)
                # Read once: beside the stream of loads a miss costs a microsecond.
                gate_scale = T.alloc_local((1,), T.float32)
                gate_bias = T.alloc_local((1,), T.float32)
                gate_scale[0] = T.cast(scale[lane % MIXES // N], T.float32)
                gate_bias[0] = T.cast(bias[lane % MIXES], T.float32)
                for step in T.serial(steps[0] + 1):
                    if step >= 1:
                        slot = (step - 1) % CLUSTER_SLOTS
                        if cluster > 1:
                            T.mbarrier_wait_parity(full[slot], (step - 1) // CLUSTER_SLOTS % 2)
                        m = lane % MIXES
                        for r in T.unroll(products // 32):
                            g = r * (32 // MIXES) + lane // MIXES
                            t0[0] = (first + (step - 1) * clusters) * GROUP + g
                            value[0] = 0.0
                            value[1] = 0.0
                            for c in T.unroll(cluster):
                                value[0] += parts[slot, c, g * MIXES + m]
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
                            sigmoid(z[0], z)
                            if m < N:
                                gates[step % 2, g, m] = z[0] + pre_eps
                            if rank == 0 and t0[0] < tokens:
                                mixes[t0[0], m] = value[0]
                                if m == 0:
                                    inv_rms[t0[0]] = value[1]
                                if m >= N:
                                    post_mix[t0[0], m - N] = z[0] * post_mult + post_eps
                    T.sync_threads(BARRIER, threads)
                    if step < steps[0]:
                        push_sums(
                            warp_sums,
                            step % 2,
                            mine,
                            parts,
                            full,
                            step % CLUSTER_SLOTS,
                            rank,
                            cluster,
                            warps,
                            count,
                        )
            # Nobody leaves while others may still push to it, or read what it pushed.
            if cluster > 1:
                T.cluster_sync()

    return identity_cluster_fwd_kernel


def place(warp: T.int32, token: T.int32, piece: T.int32):
    """Where vector `piece` of a token's row in a warp's part of a ring lies, in vectors.

    A row is twice as long as a row of all banks of shared memory. With a piece's number changed by
    the bits of the token in reverse, the same piece of all eight tokens lies in eight places (the
    rows of a transposed load), as do two pieces of four tokens, and four of two neighbours. To
    change a piece's number by a power of two is then to change the place by it, with an exclusive
    or: a lane keeps one place, not all that it reads.
    """
    reverse = token % 2 * 4 + token // 2 % 2 * 2 + token // 4
    return (warp * GROUP + token) * ROW + T.bitwise_xor(piece, reverse)


def moved(start: T.int32, pieces: int, tokens: int = 0, unit: int = 1):
    """The place so many pieces and tokens on: numbers whose bits are not in what `start` was made
    of; tokens are even. A place has `unit` to a vector.
    """
    changed = pieces % 8 ^ (tokens // 2 % 2 * 2 + tokens // 4)
    return T.bitwise_xor(start, changed * unit) + (pieces // 8 * 8 + tokens * ROW) * unit


@T.macro
def load_rows(source: T.Tensor, t0: T.Buffer, vector: T.int32, ring: T.Buffer, start: T.int32):
    """Start the loads of a warp's columns of all streams; zeros past the last token.

    `vector` is the index, within a token, of the vector that this lane loads, `start` the place of
    the first one.
    """
    lane = T.get_thread_binding() % 32
    for e in tuple(range(GROUP * ROW // 32)):
        g = e * (32 // ROW) + lane // ROW
        if t0[0] + g < source.shape[0]:
            T.ptx_cp_async(
                T.access_ptr(ring[moved(start, 0, e * (32 // ROW)) * VECTOR], "w", VECTOR),
                T.access_ptr(source[t0[0] + g, vector * VECTOR], "r", VECTOR),
                VECTOR,
            )
        else:
            for v in T.vectorized(VECTOR):
                ring[moved(start, 0, e * (32 // ROW)) * VECTOR + v] = T.cast(0, T.bfloat16)


@T.macro
def load_inputs(
    source: T.Tensor, t0: T.Buffer, vector: T.int32, ring: T.Buffer, slot: T.int32, warp: T.int32
):
    """The same for one stream: a vector a lane."""
    lane = T.get_thread_binding() % 32
    g = lane // PIECES
    at = lane % PIECES * VECTOR
    if t0[0] + g < source.shape[0]:
        T.ptx_cp_async(
            T.access_ptr(ring[slot, warp, g, at], "w", VECTOR),
            T.access_ptr(source[t0[0] + g, vector * VECTOR], "r", VECTOR),
            VECTOR,
        )
    else:
        for v in T.vectorized(VECTOR):
            ring[slot, warp, g, at + v] = T.cast(0, T.bfloat16)


@builder(RING)
def identity_cluster_bwd(
    hidden_size: int,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    held_dtype: str,
    limits: Architecture,
):
    """Gradient of x, on top of `held` if there is one; of weight, bias and scale one row of partial
    sums per cluster.

    d pre_i = grad . x_i;  d z = (d pre, d post * post_mult) * sigmoid'(z);  d mix = d z * scale
    d x_i = pre_i * grad + sum_m (d mix_m * r) w_mi - x_i * r * r * (d mix . mix) / K;  r is inv_rms
    d w_m = sum over tokens of d mix_m * r * x
    """
    tokens = T.dynamic("num_tokens")
    size = N * hidden_size
    has_held = held_dtype != ""
    cluster = identity_cluster_size(N, hidden_size, True, has_held, limits)
    width = hidden_size // cluster
    warps = width // IDENTITY_BACKWARD_COLUMNS
    threads = warps * 32 + 32
    stages = identity_stages(cluster, width, True, has_held, limits)
    ahead = stages - 1
    count = identity_sums(True)
    # Vectors of a group of tokens.
    group = warps * GROUP * ROW
    has_norm = norm_weight_dtype != ""

    @T.prim_func
    def identity_cluster_bwd_kernel(
        grad: T.Tensor[(tokens, hidden_size), T.bfloat16],
        grad_post: T.Tensor[(tokens, N), T.float32],
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        scale: T.Tensor[(2,), scale_dtype],
        bias: T.Tensor[(MIXES,), bias_dtype],
        mixes: T.Tensor[(tokens, MIXES), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        held: T.Tensor[(tokens, size) if has_held else (1,), T.bfloat16],
        grad_x: T.Tensor[(tokens, size), T.bfloat16],
        partials: T.Tensor[(T.dynamic("num_slices"), MIXES, size), T.float32],
        gate_partials: T.Tensor[(T.dynamic("num_partials"), MIXES + 2), T.float32],
        pre_eps: T.float32,
        post_mult: T.float32,
        tf32: T.int32,
        clusters: T.int32,
    ):
        with T.Kernel(clusters * cluster, threads=threads, cluster_dims=(cluster, 1, 1)) as cta:
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            h = rank * width + warp * IDENTITY_BACKWARD_COLUMNS
            # Whole groups one after another; within one, warp by warp.
            ring = T.alloc_shared((stages * group * VECTOR,), T.bfloat16)
            grad_ring = T.alloc_shared((stages, warps, GROUP, PIECES * VECTOR), T.bfloat16)
            if has_held:
                held_ring = T.alloc_shared((stages * group * VECTOR,), T.bfloat16)
            warp_sums = T.alloc_shared((2, warps, count), T.float32)
            parts = T.alloc_shared((CLUSTER_SLOTS, cluster, count), T.float32)
            mine = T.alloc_shared((CLUSTER_SLOTS, count), T.float32)
            # The gradient of the bare product, in two parts: by token and by mix.
            by_token = T.alloc_shared((2, GROUP, 2 * MIXES), T.bfloat16)
            by_mix = T.alloc_shared((2, MIXES, 2 * GROUP), T.bfloat16)
            given = T.alloc_shared((2, GROUP, FACTORS), T.float32)
            full = T.alloc_cluster_barrier([cluster] * CLUSTER_SLOTS)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((3,), T.int32)
            places = T.alloc_local((4,), T.int32)
            at = T.alloc_local((3,), T.int32)
            # Of the ring: where this step's group is, and where the one before was.
            slots = T.alloc_local((2,), T.int32)
            if warp < warps:
                raw = T.alloc_local((2, 4), T.float32)
                # Of a stream two operands of 16 columns and eight mixes, both parts side by side.
                w = T.alloc_local((2 * N * VECTOR,), T.bfloat16)
                grad_w = T.alloc_local((2 * N, 4), T.float32)
                values = T.alloc_local((2 * VECTOR,), T.bfloat16)
                grads = T.alloc_local((VECTOR,), T.bfloat16)
                a = T.alloc_local((VECTOR,), T.bfloat16)
                of_tokens = T.alloc_local((8,), T.bfloat16)
                of_mixes = T.alloc_local((4,), T.bfloat16)
                sums = T.alloc_local((2, 4), T.float32)
                product = T.alloc_local((2, 4), T.float32)
                factor = T.alloc_local((4,), T.float32)
                pre = T.alloc_local((1,), T.float32)
                lifted = T.alloc_local((1,), T.float32)
                streams = T.alloc_local((4,), T.bfloat16)
                outer = T.alloc_local((8,), T.float32)
                element = T.alloc_local((1,), T.float32)
                total = T.alloc_local((4,), T.float32)
                vectors[0] = (lane // PIECES % N * hidden_size + h) // VECTOR + lane % PIECES
                vectors[1] = h // VECTOR + lane % PIECES
                # Four columns of the first stream, in units of four.
                vectors[2] = h // 4 + lane // 4
                # Of the first stream: what this lane loads; multiplies by the gradient; gives to a
                # transposed load; and four columns of a token, of which it finishes two.
                places[0] = place(warp, lane // ROW, lane % ROW)
                places[1] = place(warp, lane // 4, lane % 4)
                places[2] = place(warp, lane % 8, lane // 8 % 2)
                places[3] = place(warp, lane % 4, lane // 8) * 2 + lane // 4 % 2
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        load_rows(x, t0, vectors[0], ring, s * group + places[0])
                        load_inputs(grad, t0, vectors[1], grad_ring, s, warp)
                        if has_held:
                            load_rows(held, t0, vectors[0], held_ring, s * group + places[0])
                    T.ptx_commit_group()
                # Which column a row of an operand stands for does not matter: here a lane has four
                # neighbours of a stream, which it stores at once, and of each two mixes.
                for i in T.unroll(N):
                    for e in T.unroll(2):
                        for v in T.vectorized(4):
                            raw[e, v] = T.cast(
                                weight[
                                    lane % 4 * 2 + e, (i * (hidden_size // 4) + vectors[2]) * 4 + v
                                ],
                                T.float32,
                            )
                        for v in T.unroll(4):
                            if has_norm:
                                raw[e, v] *= T.cast(
                                    norm_weight[(i * (hidden_size // 4) + vectors[2]) * 4 + v],
                                    T.float32,
                                )
                            if tf32 != 0:
                                raw[e, v] = rounded_to_tf32(raw[e, v])
                            w[(i * 4 + v) * 4 + e] = high_part(raw[e, v])
                            w[(i * 4 + v) * 4 + 2 + e] = low_part(raw[e, v])
                for b in T.unroll(2 * N):
                    for k in T.unroll(4):
                        grad_w[b, k] = 0.0
                slots[0] = 0
                for step in T.serial(steps[0] + 1):
                    slots[1] = T.Select(slots[0] == 0, stages - 1, slots[0] - 1)
                    # As in the forward.
                    for p in T.unroll(2):
                        for k in T.unroll(4):
                            sums[p, k] = 0.0
                    for v in T.unroll(VECTOR):
                        grads[v] = T.cast(0, T.bfloat16)
                        for i in T.unroll(2):
                            values[i * VECTOR + v] = T.cast(0, T.bfloat16)
                    if step < steps[0]:
                        T.ptx_wait_group(ahead - 1)
                        T.sync_warp()
                        at[0] = slots[0] * group + places[1]
                        for v in T.vectorized(VECTOR):
                            grads[v] = grad_ring[slots[0], warp, lane // 4, lane % 4 * VECTOR + v]
                        # As in `contract_cluster_bwd`: the tokens of two streams by the gradient's.
                        for p in tuple(range(2)):
                            for i in tuple(range(2)):
                                for v in T.vectorized(VECTOR):
                                    values[i * VECTOR + v] = ring[
                                        moved(at[0], (2 * p + i) * PIECES) * VECTOR + v
                                    ]
                            for half in (0, 4):
                                stack(values, half, values, VECTOR + half, a)
                                multiply(a, grads, half, sums, p)
                        for k in T.unroll(2):
                            if lane // 4 == lane % 4 * 2 + k:
                                for i in T.unroll(N):
                                    warp_sums[step % 2, warp, lane // 4 * N + i] = sums[
                                        i // 2, i % 2 * 2 + k
                                    ]
                    T.sync_threads(BARRIER, threads)
                    if step >= 1:
                        t0[0] = (first + (step - 1) * clusters) * GROUP
                        # Column q of the operand by token is token q // 2 + q % 2 * 4: a lane's two
                        # columns are then the tokens whose rows it reads without conflicts.
                        for part in T.unroll(2):
                            # Each part of it twice, for both parts of the weight.
                            for half in T.unroll(2):
                                for k in T.vectorized(2):
                                    of_tokens[part * 4 + half * 2 + k] = by_token[
                                        step % 2,
                                        lane // 8 + lane // 4 % 2 * 4,
                                        part * MIXES + lane % 4 * 2 + k,
                                    ]
                            for k in T.vectorized(2):
                                of_mixes[part * 2 + k] = by_mix[
                                    step % 2, lane // 4, part * GROUP + lane % 4 * 2 + k
                                ]
                        lifted[0] = given[step % 2, 0, N + 2]
                        for k in tuple(range(2)):
                            g = lane % 4 + k * 4
                            for v in T.vectorized(2):
                                factor[k * 2 + v] = given[step % 2, g, N + v]
                            for v in T.vectorized(4):
                                streams[v] = grad_ring[slots[1], warp, g, lane // 4 * 4 + v]
                            for v in T.unroll(4):
                                outer[k * 4 + v] = T.cast(streams[v], T.float32)
                        at[0] = slots[1] * group + places[2]
                        at[1] = slots[1] * (2 * group) + places[3]
                        at[2] = moved(at[1], 0, 4, 2)
                        for i in tuple(range(N)):
                            # One stream after the other: what is loaded for all of them at once
                            # does not fit the registers.
                            T.sync_warp()
                            for b in tuple(range(2)):
                                # Its eight tokens twice, for both parts of the other one.
                                T.evaluate(
                                    T.call_intrin(
                                        "handle",
                                        LOAD_MATRIX,
                                        T.int32(1),
                                        4,
                                        T.access_ptr(
                                            ring[moved(at[0], i * PIECES + b * 2) * VECTOR],
                                            "r",
                                            VECTOR,
                                        ),
                                        T.access_ptr(a[0], "w", VECTOR),
                                    )
                                )
                                for k in T.unroll(4):
                                    product[b, k] = 0.0
                                multiply(a, of_mixes, 0, product, b)
                                # Tensor cores truncate their sums: a group's, no more.
                                for k in T.unroll(4):
                                    grad_w[i * 2 + b, k] += product[b, k] * lifted[0]
                            # All but the weight's part, to which tensor cores add that.
                            for k in tuple(range(2)):
                                for v in T.vectorized(4):
                                    streams[v] = ring[moved(at[1 + k], i * PIECES, 0, 2) * 4 + v]
                                pre[0] = given[step % 2, lane % 4 + k * 4, i]
                                for v in T.unroll(4):
                                    # x joins one r first: r * r may be lost where x is large.
                                    element[0] = T.cast(streams[v], T.float32) * factor[k * 2]
                                    product[v // 2, v % 2 * 2 + k] = (
                                        pre[0] * outer[k * 4 + v] + element[0] * factor[k * 2 + 1]
                                    )
                            for b in tuple(range(2)):
                                operand = (i * 2 + b) * VECTOR
                                stack(w, operand, w, operand + 4, a)
                                multiply(a, of_tokens, 0, product, b)
                                multiply(a, of_tokens, 4, product, b)
                            for k in tuple(range(2)):
                                for v in T.unroll(4):
                                    total[v] = product[v // 2, v % 2 * 2 + k]
                                if has_held:
                                    for v in T.vectorized(4):
                                        streams[v] = held_ring[
                                            moved(at[1 + k], i * PIECES, 0, 2) * 4 + v
                                        ]
                                    for v in T.unroll(4):
                                        total[v] += T.cast(streams[v], T.float32)
                                if t0[0] + lane % 4 + k * 4 < tokens:
                                    for v in T.vectorized(4):
                                        grad_x[
                                            t0[0] + lane % 4 + k * 4,
                                            (i * (hidden_size // 4) + vectors[2]) * 4 + v,
                                        ] = T.cast(total[v], T.bfloat16)
                    # As in the forward.
                    T.sync_warp()
                    if step + ahead < steps[0]:
                        t0[0] = (first + (step + ahead) * clusters) * GROUP
                        # Its place is that of the group which was finished just now.
                        at[0] = slots[1] * group + places[0]
                        load_rows(x, t0, vectors[0], ring, at[0])
                        load_inputs(grad, t0, vectors[1], grad_ring, slots[1], warp)
                        if has_held:
                            load_rows(held, t0, vectors[0], held_ring, at[0])
                    T.ptx_commit_group()
                    slots[0] = T.Select(slots[0] == stages - 1, 0, slots[0] + 1)
                # Rows of the transposed operand are columns: 8 * q + lane // 4 of a stream.
                for b in T.unroll(2 * N):
                    for k in T.unroll(4):
                        partials[
                            first,
                            lane % 4 * 2 + k % 2,
                            b // 2 * hidden_size + h + (b % 2 * 2 + k // 2) * 8 + lane // 4,
                        ] = grad_w[b, k]
            else:
                mix = T.alloc_local((2,), T.float32)
                rms = T.alloc_local((1,), T.float32)
                post = T.alloc_local((1,), T.float32)
                value = T.alloc_local((2,), T.float32)
                along = T.alloc_local((1,), T.float32)
                z = T.alloc_local((2,), T.float32)
                slope = T.alloc_local((1,), T.float32)
                gate = T.alloc_local((1,), T.float32)
                largest = T.alloc_local((1,), T.float32)
                lift = T.alloc_local((1,), T.int32)
                piece = T.alloc_local((2,), T.bfloat16)
                # By lane: the gradients of its two mixes' biases, and its parts of both scales'.
                gate_sums = T.alloc_local((4,), T.float64)
                gate_scale = T.alloc_local((2,), T.float32)
                gate_bias = T.alloc_local((2,), T.float32)
                for k in T.unroll(2):
                    gate_scale[k] = T.cast(scale[k], T.float32)
                    gate_bias[k] = T.cast(bias[k * N + lane % N], T.float32)
                    mix[k] = 0.0
                rms[0] = 0.0
                post[0] = 0.0
                for k in T.unroll(4):
                    gate_sums[k] = 0.0
                for step in T.serial(steps[0] + 1):
                    if step >= 1:
                        slot = (step - 1) % CLUSTER_SLOTS
                        if cluster > 1:
                            T.mbarrier_wait_parity(full[slot], (step - 1) // CLUSTER_SLOTS % 2)
                        g = lane // N
                        i = lane % N
                        value[0] = 0.0
                        for c in T.unroll(cluster):
                            value[0] += parts[slot, c, lane]
                        value[1] = post[0] * post_mult
                        along[0] = 0.0
                        largest[0] = 0.0
                        for k in T.unroll(2):
                            logit(mix[k], gate_scale[k], gate_bias[k], slope)
                            z[k] = slope[0]
                            sigmoid_slope(z[k], slope)
                            value[k] *= slope[0]
                            if (first + (step - 1) * clusters) * GROUP + g >= tokens:
                                value[k] = 0.0
                            gate_sums[k] += T.cast(value[k], T.float64)
                            gate_sums[2 + k] += T.cast(value[k] * mix[k], T.float64)
                            value[k] *= gate_scale[k]
                            along[0] += value[k] * mix[k]
                            value[k] *= rms[0]
                            if tf32 != 0:
                                value[k] = rounded_to_tf32(value[k])
                            largest[0] = T.max(largest[0], T.abs(value[k]))
                        for level in T.unroll(N.bit_length() - 1):
                            along[0] += T.shfl_xor(along[0], 1 << level)
                        # As in `store_parts`, for the gradient of the weight alone: where products
                        # are so small, their part of the gradient of x is lost beside the rest.
                        largest[0] = T.warp_reduce_max(largest[0])
                        lift[0] = T.max(
                            SMALL_EXPONENT - (T.reinterpret(largest[0], T.int32) >> 23), 0
                        )
                        largest[0] = T.reinterpret((127 + lift[0]) << 23, T.float32)
                        for k in T.unroll(2):
                            piece[0] = high_part(value[k])
                            piece[1] = low_part(value[k])
                            for part in T.unroll(2):
                                by_token[step % 2, g, part * MIXES + k * N + i] = piece[part]
                            value[k] *= largest[0]
                            piece[0] = high_part(value[k])
                            piece[1] = low_part(value[k])
                            for part in T.unroll(2):
                                by_mix[step % 2, k * N + i, part * GROUP + g] = piece[part]
                        sigmoid(z[0], gate)
                        given[step % 2, g, i] = gate[0] + pre_eps
                        if i == 0:
                            given[step % 2, g, N] = rms[0]
                            given[step % 2, g, N + 1] = -along[0] * rms[0] / size
                            given[step % 2, g, N + 2] = T.reinterpret(
                                (127 - lift[0]) << 23, T.float32
                            )
                            given[step % 2, g, N + 3] = 0.0
                    T.sync_threads(BARRIER, threads)
                    if step < steps[0]:
                        # Of the tokens whose gates are made in the next step.
                        t0[0] = (first + step * clusters) * GROUP + lane // N
                        if t0[0] < tokens:
                            for k in T.unroll(2):
                                mix[k] = mixes[t0[0], k * N + lane % N]
                            rms[0] = inv_rms[t0[0]]
                            post[0] = grad_post[t0[0], lane % N]
                        push_sums(
                            warp_sums,
                            step % 2,
                            mine,
                            parts,
                            full,
                            step % CLUSTER_SLOTS,
                            rank,
                            cluster,
                            warps,
                            count,
                        )
                # Over the tokens of a group; then of the scales over the mixes.
                for level in T.unroll(GROUP.bit_length() - 1):
                    for k in T.unroll(4):
                        gate_sums[k] += T.shfl_xor(gate_sums[k], N << level)
                for level in T.unroll(N.bit_length() - 1):
                    for k in T.unroll(2):
                        gate_sums[2 + k] += T.shfl_xor(gate_sums[2 + k], 1 << level)
                if rank == 0 and lane < N:
                    for k in T.unroll(2):
                        gate_partials[first, k * N + lane] = T.cast(gate_sums[k], T.float32)
                        if lane == 0:
                            gate_partials[first, MIXES + k] = T.cast(gate_sums[2 + k], T.float32)
            if cluster > 1:
                T.cluster_sync()

    return identity_cluster_bwd_kernel
