"""Read and write weights of four streams that are not mixed, and the layer input, in one pass over
the streams; and all gradients in another.

As in `contract_cluster`, a cluster of CTAs keeps its tokens in shared memory until their gates are
known: see there for the steps, the one barrier of each, and the warp that adds up what the others
have. Here eight mixes of a weight in two parts are all 16 rows of a tensor core's operand, and a
warp asks for another group as soon as it has finished one: two groups are on their way while a
third one's products are taken.

The backward leaves products with the weight, and those of its gradient, to the tensor cores: thread
by thread they would be 16 of 22 instructions an element.

A step is bound by the instructions of its warps, and by the way of a group's sums through the
cluster and back, for which all wait. So: no condition around a product, which TileLang puts before
each statement; the last group, the only one that may have fewer tokens, by itself after the loop;
values of the ring by twos, each unpacked by one instruction; and the warp with the sums does before
its wait, or past its push, all that can be done there. Where the ring has room for a group more,
the sums have two steps for their way (`lag`).

With room for six groups the warps of the backward do not all meet once a step. Each tells an
mbarrier that it has come, and waits for all to have come to the step before: what one does late in
a step, another need not wait for at once. What passes between warps has a buffer more for that.
"""

from typing import Any

import tilelang.language as T
from tilelang import tvm

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import (
    VECTOR,
    as_float,
    as_int,
    builder,
    follow_previous,
    reciprocal,
)
from tile_mhc.kernels._push import SOURCE, announce, push_shares, push_vectors
from tile_mhc.kernels._shapes import (
    CLUSTER_SLOTS,
    CLUSTER_TOKENS,
    IDENTITY_BACKWARD_COLUMNS,
    IDENTITY_COLUMNS,
    IDENTITY_LATE_STAGES,
    IDENTITY_MIXES,
    IDENTITY_STREAMS,
    cluster_row,
    identity_blocks,
    identity_cluster_size,
    identity_lag,
    identity_stages,
    identity_sums,
    identity_warps,
)
from tile_mhc.kernels._weights import high_part, low_part, norm_shape, rounded_to_tf32
from tile_mhc.kernels.contract_cluster import (
    BARRIER,
    BLOCK,
    BLOCKS,
    CHUNKS,
    RING,
    WORDS,
    count_steps,
    first_of,
    multiply,
    second_of,
    token_to_load,
)
from tile_mhc.kernels.mixes import logit, sigmoid
from tile_mhc.kernels.projection import LARGE_SQUARES, RESCUE_SCALE, SMALL_EXPONENT, weight_value

GROUP = CLUSTER_TOKENS
N = IDENTITY_STREAMS
MIXES = IDENTITY_MIXES
LOAD_MATRIX = tvm.ir.Op.get("tl.ptx_ldmatrix")
# The backward: vectors of a token in a block of columns of one stream, and of all.
PIECES = IDENTITY_BACKWARD_COLUMNS // VECTOR
ROW = N * PIECES
# Numbers per token: n gates, 1 / rms, the factor of x / rms, the inverse of the power of two.
FACTORS = 8


def mean(total: T.float32, count: int):
    """total / count as IEEE divides, of a finite total: a division has a branch for the others."""
    estimate = total * T.float32(1 / count)
    rest = T.ieee_fmaf(-estimate, T.float32(count), total)
    return T.ieee_fmaf(rest, T.float32(1 / count), estimate)


@T.macro
def slope_of_sigmoid(z: T.float32, out: T.Buffer, index: T.int32):
    """out[index] = sigmoid(z) * sigmoid(-z), as `sigmoid_slope` but with one exponential."""
    small = T.alloc_local((1,), T.float32)
    inverse = T.alloc_local((1,), T.float32)
    small[0] = T.exp(-T.abs(z))
    reciprocal(1.0 + small[0], inverse, 0)
    out[index] = small[0] * inverse[0] * inverse[0]


@T.macro
def load_tokens(
    source: T.Tensor,
    t: T.int32,
    last: Any,
    vector: T.int32,
    ring: T.Buffer,
    start: T.int32,
    length: int,
):
    """Start the loads of a block of columns, of the tokens from t on; see `token_to_load`.

    `vector` is the index, within a token, of the vector that this lane loads, `start` its place in
    the ring, where a token has `length` elements.
    """
    for g in tuple(range(GROUP)):
        T.ptx_cp_async(
            T.access_ptr(ring[start + g * length], "w", VECTOR),
            T.access_ptr(source[token_to_load(t + g, last), vector * VECTOR], "r", VECTOR),
            VECTOR,
        )


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
    warps = identity_warps(width, False)
    blocks = tuple(range(identity_blocks(width, False)))
    threads = warps * 32 + 32
    stages = identity_stages(cluster, width, False, False, limits)
    # Steps from a group's products to its weighted sum. With two, no CTA of the cluster waits for
    # another one's sums of the step before; loads are then one group less ahead.
    lag = identity_lag(stages)
    ahead = stages - lag
    length = cluster_row(N, width)
    group = GROUP * length
    products = GROUP * MIXES
    rounds = products // 32
    count = identity_sums(False)
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
            T.import_source(SOURCE if cluster > 1 else None)
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            column = warp * (len(blocks) * IDENTITY_COLUMNS)
            h = rank * width + column
            ring = T.alloc_shared((stages * group,), T.bfloat16)
            # The same in pairs of neighbours.
            words = T.view(ring, (stages * group // 2,), T.int32)
            warp_sums = T.alloc_shared((2, warps, count), T.float32)
            parts = T.alloc_shared((CLUSTER_SLOTS, cluster, count), T.float32)
            gates = T.alloc_shared((2, GROUP, N), T.float32)
            full = T.alloc_cluster_barrier([1] * CLUSTER_SLOTS)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            # Indices of global memory as variables: see `contract_cluster_fwd`.
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((2,), T.int32)
            if warp < warps:
                raw = T.alloc_local((VECTOR,), T.float32)
                # Operands of the tensor cores: of four neighbours their high and low parts.
                w = T.alloc_local((len(blocks) * N * BLOCKS * 2 * VECTOR,), T.bfloat16)
                values = T.alloc_local((WORDS,), T.int32)
                pairs = T.alloc_local((WORDS,), T.int32)
                sums = T.alloc_local((2, 4), T.float32)
                squares = T.alloc_local((2, 4), T.float32)
                streams = T.alloc_local((N, WORDS), T.int32)
                mix = T.alloc_local((N,), T.float32)
                total = T.alloc_local((VECTOR,), T.float32)
                places = T.alloc_local((3,), T.int32)
                at = T.alloc_local((1,), T.int32)
                vectors[0] = (lane // CHUNKS % N * hidden_size + h) // VECTOR + lane % CHUNKS
                vectors[1] = h // VECTOR + lane % CHUNKS
                # Within a group: what this lane loads; in words what it multiplies, and finishes.
                places[0] = lane // CHUNKS * width + column + lane % CHUNKS * VECTOR
                places[1] = (lane // 4 * length + column + lane % 4 * VECTOR) // 2
                places[2] = (lane // CHUNKS * length + column + lane % CHUNKS * VECTOR) // 2
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        for c in blocks:
                            load_tokens(
                                x,
                                t0[0],
                                tokens - 1,
                                vectors[0] + c * CHUNKS,
                                ring,
                                s * group + c * IDENTITY_COLUMNS + places[0],
                                length,
                            )
                    T.ptx_commit_group()
                # A lane has the weights of one mix, of every 32 columns its eight neighbours.
                for b in T.unroll(len(blocks) * N * BLOCKS):
                    k = (
                        b // BLOCKS % N * hidden_size
                        + h
                        + b // (N * BLOCKS) * IDENTITY_COLUMNS
                        + b % BLOCKS * BLOCK
                        + lane % 4 * VECTOR
                    )
                    for q in T.unroll(VECTOR // 4):
                        for v in T.vectorized(4):
                            raw[q * 4 + v] = T.cast(weight[lane // 4, k + q * 4 + v], T.float32)
                    for v in T.unroll(VECTOR):
                        if has_norm:
                            raw[v] *= T.cast(norm_weight[k + v], T.float32)
                        if tf32 != 0:
                            raw[v] = rounded_to_tf32(raw[v])
                        # Both parts of a pair of neighbours, then those of the next.
                        e = (b * VECTOR + v // 2 * 2) * 2 + v % 2
                        w[e] = high_part(raw[v])
                        w[e + 2] = low_part(raw[v])
                for last in (False, True):
                    for step in T.serial(
                        steps[0] if last else 0, steps[0] + lag if last else steps[0]
                    ):
                        if not last:
                            T.ptx_wait_group(ahead - 1)
                            T.sync_warp()
                            at[0] = step % stages * (group // 2) + places[1]
                            for c in T.unroll(2):
                                for k in T.unroll(4):
                                    sums[c, k] = 0.0
                                    squares[c, k] = 0.0
                            # Loops over a tuple: see `contract_cluster_fwd`.
                            for b in tuple(range(len(blocks) * N * BLOCKS)):
                                k = (
                                    b // BLOCKS % N * width
                                    + b // (N * BLOCKS) * IDENTITY_COLUMNS
                                    + b % BLOCKS * BLOCK
                                )
                                for v in T.vectorized(WORDS):
                                    values[v] = words[at[0] + k // 2 + v]
                                # The tokens by themselves, for a diagonal: as the pairs lie in
                                # registers, the first and third are upper rows, the others lower.
                                for half in (0, 1):
                                    pairs[half * 2] = values[half]
                                    pairs[half * 2 + 1] = values[half + 2]
                                for half in (0, 1):
                                    operand = (b * 2 + half) * VECTOR
                                    multiply(w, values, half * 2, sums, half, operand)
                                    multiply(values, pairs, half * 2, squares, half)
                            for k in T.unroll(4):
                                sums[0, k] += sums[1, k]
                            for k in T.unroll(2):
                                squares[0, k] += squares[1, 2 + k]
                                # A lane has two tokens of a mix, by its high part and its low one.
                                g = lane % 4 * 2 + k
                                warp_sums[step % 2, warp, g * MIXES + lane // 4] = (
                                    sums[0, k] + sums[0, 2 + k]
                                )
                                if lane // 4 == g:
                                    warp_sums[step % 2, warp, products + g] = squares[0, k]
                        T.sync_threads(BARRIER, threads)
                        if step >= lag:
                            t0[0] = (first + (step - lag) * clusters) * GROUP + lane // CHUNKS
                            at[0] = (step - lag) % stages * (group // 2) + places[2]
                            for j in tuple(range(len(blocks) * GROUP * CHUNKS // 32)):
                                c = j % len(blocks)
                                g = j // len(blocks) * (32 // CHUNKS)
                                k = (g * length + c * IDENTITY_COLUMNS) // 2
                                for i in T.unroll(N):
                                    mix[i] = gates[(step + lag) % 2, g + lane // CHUNKS, i]
                                    for v in T.vectorized(WORDS):
                                        streams[i, v] = words[at[0] + k + i * (width // 2) + v]
                                # As `weighted_sum`.
                                for v in T.unroll(VECTOR):
                                    total[v] = 0.0
                                for i in T.unroll(N):
                                    for v in T.unroll(WORDS):
                                        total[2 * v] += mix[i] * first_of(streams[i, v])
                                        total[2 * v + 1] += mix[i] * second_of(streams[i, v])
                                k = (vectors[1] + c * CHUNKS) * VECTOR
                                if last:
                                    if t0[0] + g < tokens:
                                        for v in T.vectorized(VECTOR):
                                            layer_input[t0[0] + g, k + v] = T.cast(
                                                total[v], T.bfloat16
                                            )
                                else:
                                    for v in T.vectorized(VECTOR):
                                        layer_input[t0[0] + g, k + v] = T.cast(total[v], T.bfloat16)
                        if not last:
                            # The ring has a part of each warp's own: what it has read may be
                            # overwritten.
                            T.sync_warp()
                            if step + ahead < steps[0]:
                                t0[0] = (first + (step + ahead) * clusters) * GROUP
                                at[0] = (step + ahead) % stages * group + places[0]
                                # Both ways past one condition: addresses have much in common.
                                if t0[0] + GROUP <= tokens:
                                    for c in blocks:
                                        load_tokens(
                                            x,
                                            t0[0],
                                            None,
                                            vectors[0] + c * CHUNKS,
                                            ring,
                                            at[0] + c * IDENTITY_COLUMNS,
                                            length,
                                        )
                                else:
                                    for c in blocks:
                                        load_tokens(
                                            x,
                                            t0[0],
                                            tokens - 1,
                                            vectors[0] + c * CHUNKS,
                                            ring,
                                            at[0] + c * IDENTITY_COLUMNS,
                                            length,
                                        )
                            T.ptx_commit_group()
            else:
                # All of a lane's mixes side by side: everyone waits for this warp.
                value = T.alloc_local((rounds,), T.float32)
                square = T.alloc_local((rounds,), T.float32)
                opened = T.alloc_local((rounds,), T.float32)
                large = T.alloc_local((rounds,), T.int32)
                exact = T.alloc_local((2,), T.float64)
                z = T.alloc_local((1,), T.float32)
                # Read once: beside the stream of loads a miss costs a microsecond.
                gate_scale = T.alloc_local((1,), T.float32)
                gate_bias = T.alloc_local((1,), T.float32)
                gate_scale[0] = T.cast(scale[lane % MIXES // N], T.float32)
                gate_bias[0] = T.cast(bias[lane % MIXES], T.float32)
                for step in T.serial(steps[0] + lag):
                    if step >= lag:
                        slot = (step - lag) % CLUSTER_SLOTS
                        if cluster > 1:
                            T.mbarrier_wait_parity(full[slot], (step - lag) // CLUSTER_SLOTS % 2)
                        m = lane % MIXES
                        t0[0] = (first + (step - lag) * clusters) * GROUP + lane // MIXES
                        for r in T.unroll(rounds):
                            value[r] = 0.0
                            square[r] = 0.0
                        for c in T.unroll(cluster):
                            for r in T.unroll(rounds):
                                g = r * (32 // MIXES) + lane // MIXES
                                value[r] += parts[slot, c, g * MIXES + m]
                                square[r] += parts[slot, c, products + g]
                        for r in T.unroll(rounds):
                            large[r] = T.Select(square[r] < LARGE_SQUARES, 0, 1)
                            square[r] = T.rsqrt(mean(square[r], size) + norm_eps)
                            value[r] = value[r] * square[r]
                        if large[0] + large[1] > 0:
                            for r in T.unroll(rounds):
                                t = t0[0] + r * (32 // MIXES)
                                if large[r] > 0 and t < tokens:
                                    # As in `token_mix`.
                                    exact[0] = 0.0
                                    exact[1] = 0.0
                                    for k in T.unroll(size, unroll_factor=1):
                                        z[0] = T.cast(x[t, k], T.float32) * RESCUE_SCALE
                                        exact[0] += T.cast(z[0] * z[0], T.float64)
                                        exact[1] += T.cast(z[0], T.float64) * T.cast(
                                            weight_value(
                                                weight, norm_weight, norm_weight_dtype, m, k, tf32
                                            ),
                                            T.float64,
                                        )
                                    z[0] = T.rsqrt(T.cast(exact[0], T.float32) / size)
                                    value[r] = T.cast(exact[1], T.float32) * z[0]
                                    square[r] = z[0] * RESCUE_SCALE
                        for r in T.unroll(rounds):
                            logit(value[r], gate_scale[0], gate_bias[0], z)
                            sigmoid(z[0], z)
                            opened[r] = z[0]
                            if m < N:
                                gates[(step + lag) % 2, r * (32 // MIXES) + lane // MIXES, m] = (
                                    z[0] + pre_eps
                                )
                    T.sync_threads(BARRIER, threads)
                    if step < steps[0]:
                        push_vectors(
                            warp_sums,
                            step % 2,
                            parts,
                            full,
                            step % CLUSTER_SLOTS,
                            rank,
                            cluster,
                            warps,
                            count,
                        )
                    # Past the push, for which the other CTAs wait.
                    if step >= lag and rank == 0:
                        for r in T.unroll(rounds):
                            t = t0[0] + r * (32 // MIXES)
                            m = lane % MIXES
                            if t < tokens:
                                mixes[t, m] = value[r]
                                if m == 0:
                                    inv_rms[t] = square[r]
                                if m >= N:
                                    post_mix[t, m - N] = opened[r] * post_mult + post_eps
            # Nobody leaves while others may push to it, or what it pushed may be under way.
            if cluster > 1:
                T.cluster_sync()

    return identity_cluster_fwd_kernel


def place(block: T.int32, token: T.int32, piece: T.int32):
    """Where vector `piece` of a token's row in a block of columns lies in a ring, in vectors.

    A row is twice as long as a row of all banks of shared memory. With a piece's number changed by
    the bits of the token in reverse, the same piece of all eight tokens lies in eight places (the
    rows of a transposed load), as do two pieces of four tokens, and four of two neighbours. To
    change a piece's number by a power of two is then to change the place by it, with an exclusive
    or: a lane keeps one place, not all that it reads.
    """
    return (block * GROUP + token) * ROW + T.bitwise_xor(piece, reverse(token))


def reverse(token: Any):
    """The three bits of a token's number in reverse."""
    return token % 2 * 4 + token // 2 % 2 * 2 + token // 4


def moved(start: T.int32, pieces: int, tokens: int = 0, unit: int = 1):
    """The place so many pieces and tokens on: numbers whose bits are not in what `start` was made
    of. A place has `unit` to a vector.
    """
    changed = pieces % 8 ^ reverse(tokens)
    return T.bitwise_xor(start, changed * unit) + (pieces // 8 * 8 + tokens * ROW) * unit


@T.macro
def load_rows(
    source: T.Tensor,
    t: T.int32,
    last: Any,
    vector: T.int32,
    ring: T.Buffer,
    start: T.int32,
    each: int,
):
    """Start the loads of a warp's columns of all streams, of a group of tokens: `each` at a time.

    `vector` and `last` are as in `load_tokens`; t is the first token that this lane loads of, and
    `start` its place.
    """
    for tokens in tuple(range(0, GROUP, each)):
        T.ptx_cp_async(
            T.access_ptr(ring[moved(start, 0, tokens) * VECTOR], "w", VECTOR),
            T.access_ptr(source[token_to_load(t + tokens, last), vector * VECTOR], "r", VECTOR),
            VECTOR,
        )


@T.macro
def load_inputs(
    source: T.Tensor,
    t: T.int32,
    last: Any,
    vector: T.int32,
    ring: T.Buffer,
    start: T.int32,
    each: int,
):
    """The same of one stream."""
    for tokens in tuple(range(0, GROUP, each)):
        T.ptx_cp_async(
            T.access_ptr(ring[(start + tokens * PIECES) * VECTOR], "w", VECTOR),
            T.access_ptr(source[token_to_load(t + tokens, last), vector * VECTOR], "r", VECTOR),
            VECTOR,
        )


@T.macro
def arrive(full: T.Buffer, step: T.int32):
    """A warp has come to the mbarrier of a step; it does not wait for the others."""
    T.sync_warp()
    if T.get_thread_binding() % 32 == 0:
        T.mbarrier_arrive(full[CLUSTER_SLOTS + step % 2])


@T.macro
def wait_for(full: T.Buffer, step: T.int32):
    """Until all warps have come to it."""
    T.mbarrier_wait_parity(full[CLUSTER_SLOTS + step % 2], step // 2 % 2)


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
    warps = identity_warps(width, True)
    blocks = tuple(range(identity_blocks(width, True)))
    threads = warps * 32 + 32
    stages = identity_stages(cluster, width, True, has_held, limits)
    # Whether warps wait for one another by mbarriers, a step late: they may be as far apart. Sums
    # are then pushed in the next step, and what is made of them is finished in the step after that
    # of the gates.
    # Measured on Hopper; for Blackwell the compiler would spill three registers.
    fits = limits.has_wgmma and stages >= IDENTITY_LATE_STAGES
    late = int(cluster > 1 and not has_held and fits)
    # As in the forward.
    lag = 3 if late else identity_lag(stages)
    # Steps from a group's products to its gates.
    made = lag - late
    ahead = stages - lag
    # Buffers of what the gates' warp makes, and of the warps' sums: nobody is in one any more when
    # it is written again.
    buffers = 2 + late
    kept = 2 + 2 * late
    count = identity_sums(True)
    # Vectors of a block of columns, and of all, of a group of tokens.
    block = GROUP * ROW
    group = warps * len(blocks) * block
    grad_block = GROUP * PIECES
    grad_group = warps * len(blocks) * grad_block
    # Vectors of a warp's columns of one stream, and tokens of all streams and of one that a warp
    # loads at a time.
    wide = len(blocks) * PIECES
    at_once = 32 // (N * wide)
    inputs_at_once = 32 // wide
    # Neighbours of a stream that a lane finishes.
    each = len(blocks) * 4
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
            T.import_source(SOURCE if cluster > 1 else None)
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            h = rank * width + warp * (len(blocks) * IDENTITY_BACKWARD_COLUMNS)
            # Whole groups one after another; within one, warp by warp.
            ring = T.alloc_shared((stages * group * VECTOR,), T.bfloat16)
            grad_ring = T.alloc_shared((stages * grad_group * VECTOR,), T.bfloat16)
            # The same in pairs of neighbours.
            words = T.view(ring, (stages * group * WORDS,), T.int32)
            grad_words = T.view(grad_ring, (stages * grad_group * WORDS,), T.int32)
            if has_held:
                held_ring = T.alloc_shared((stages * group * VECTOR,), T.bfloat16)
                held_words = T.view(held_ring, (stages * group * WORDS,), T.int32)
            warp_sums = T.alloc_shared((kept, warps, count), T.float32)
            parts = T.alloc_shared((CLUSTER_SLOTS, cluster, count), T.float32)
            # The gradient of the bare product, in two parts, by token and mix. A lane takes in one
            # access, of two mixes of a token, each part twice; of two tokens of a mix, both parts.
            by_token = T.alloc_shared((buffers, GROUP, MIXES // 2, 8), T.bfloat16)
            by_mix = T.alloc_shared((buffers, MIXES, GROUP // 2, 4), T.bfloat16)
            given = T.alloc_shared((buffers, GROUP, FACTORS), T.float32)
            # Those of the sums; then, of even steps and of odd ones, whether all warps have come.
            full = T.alloc_cluster_barrier([1] * CLUSTER_SLOTS + [warps + 1] * 2)
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            t0 = T.alloc_local((1,), T.int32)
            vectors = T.alloc_local((3,), T.int32)
            places = T.alloc_local((7,), T.int32)
            at = T.alloc_local((3,), T.int32)
            # Of what the gates' warp makes, by the group's number.
            buffer = T.alloc_local((1,), T.int32)
            # Of the ring: where this step's group is, and where the one is that it finishes.
            slots = T.alloc_local((2,), T.int32)
            if warp < warps:
                raw = T.alloc_local((2, 4), T.float32)
                both = T.alloc_local((2,), T.float32)
                # Of a stream two operands of 16 columns and eight mixes, both parts side by side.
                w = T.alloc_local((len(blocks) * 2 * N * VECTOR,), T.bfloat16)
                grad_w = T.alloc_local((len(blocks) * 2 * N, 4), T.float32)
                values = T.alloc_local((WORDS,), T.int32)
                grads = T.alloc_local((WORDS,), T.int32)
                pairs = T.alloc_local((len(blocks) * WORDS,), T.int32)
                a = T.alloc_local((VECTOR,), T.bfloat16)
                of_tokens = T.alloc_local((8,), T.bfloat16)
                of_mixes = T.alloc_local((4,), T.bfloat16)
                sums = T.alloc_local((2, 4), T.float32)
                diagonal = T.alloc_local((2 * N,), T.float32)
                product = T.alloc_local((2 * len(blocks), 4), T.float32)
                factor = T.alloc_local((4,), T.float32)
                pre = T.alloc_local((2, N), T.float32)
                lifted = T.alloc_local((1,), T.float32)
                streams = T.alloc_local((each // 2,), T.int32)
                outer = T.alloc_local((2 * each,), T.float32)
                element = T.alloc_local((each,), T.float32)
                total = T.alloc_local((each,), T.float32)
                # The vector that this lane loads, of all streams and of one; and, in units of their
                # number, the columns that it finishes.
                vectors[0] = (lane // wide % N * hidden_size + h) // VECTOR + lane % wide
                vectors[1] = h // VECTOR + lane % wide
                vectors[2] = h // each + lane // 4
                # What this lane loads; of the first stream what it multiplies by the gradient, what
                # it gives to a transposed load and, in words, what it finishes of a token, of two.
                first_block = warp * len(blocks)
                load_of = first_block + lane % wide // PIECES
                places[0] = place(
                    load_of, lane // (N * wide), lane // wide % N * PIECES + lane % PIECES
                )
                places[1] = place(first_block, lane // 4, lane % 4)
                places[2] = place(first_block, lane % 8, lane // 8 % 2)
                mine = first_block + lane // 4 * each // IDENTITY_BACKWARD_COLUMNS
                piece = lane // 4 * each % IDENTITY_BACKWARD_COLUMNS // VECTOR
                half = lane // 4 * each % VECTOR // 2
                places[3] = place(mine, lane % 4, piece) * WORDS + half
                # Of the gradient: what this lane loads; multiplies; and, in words, finishes.
                places[4] = load_of * grad_block + lane // wide * PIECES + lane % PIECES
                places[5] = first_block * grad_block + lane
                places[6] = (mine * grad_block + lane % 4 * PIECES + piece) * WORDS + half
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t0[0] = (first + s * clusters) * GROUP
                        at[0] = s * group + places[0]
                        at[1] = s * grad_group + places[4]
                        load_rows(
                            x,
                            t0[0] + lane // (N * wide),
                            tokens - 1,
                            vectors[0],
                            ring,
                            at[0],
                            at_once,
                        )
                        load_inputs(
                            grad,
                            t0[0] + lane // wide,
                            tokens - 1,
                            vectors[1],
                            grad_ring,
                            at[1],
                            inputs_at_once,
                        )
                        if has_held:
                            load_rows(
                                held,
                                t0[0] + lane // (N * wide),
                                tokens - 1,
                                vectors[0],
                                held_ring,
                                at[0],
                                at_once,
                            )
                    T.ptx_commit_group()
                # Which column a row of an operand stands for does not matter: here a lane has
                # neighbours of a stream, which it stores at once, and of each two mixes.
                for i in T.unroll(N * len(blocks)):
                    # Four of them, as two operands.
                    k = (i // len(blocks) * (hidden_size // each) + vectors[2]) * each + i % len(
                        blocks
                    ) * 4
                    for e in T.unroll(2):
                        for v in T.vectorized(4):
                            raw[e, v] = T.cast(weight[lane % 4 * 2 + e, k + v], T.float32)
                    for v in T.unroll(4):
                        for e in T.unroll(2):
                            both[e] = raw[e, v]
                            if has_norm:
                                both[e] *= T.cast(norm_weight[k + v], T.float32)
                            if tf32 != 0:
                                both[e] = rounded_to_tf32(both[e])
                        # Two high parts, of rows above and below, then two low ones.
                        at_w = (i * 2 + v // 2) * VECTOR + v % 2 * 2
                        for e in T.vectorized(2):
                            w[at_w + e] = T.cast(both[e], T.bfloat16)
                        for e in T.unroll(2):
                            both[e] -= T.cast(w[at_w + e], T.float32)
                        for e in T.vectorized(2):
                            w[at_w + 4 + e] = T.cast(both[e], T.bfloat16)
                for b in T.unroll(len(blocks) * 2 * N):
                    for k in T.unroll(4):
                        grad_w[b, k] = 0.0
                slots[0] = 0
                slots[1] = stages - lag
                # The last groups by themselves: only there may one have fewer tokens.
                for last in (False, True):
                    for step in T.serial(
                        steps[0] if last else 0, steps[0] + lag if last else steps[0]
                    ):
                        if not last:
                            T.ptx_wait_group(ahead - 1)
                            T.sync_warp()
                            at[0] = slots[0] * group + places[1]
                            for c in blocks:
                                for v in T.vectorized(WORDS):
                                    grads[v] = grad_words[
                                        (slots[0] * grad_group + c * grad_block + places[5]) * WORDS
                                        + v
                                    ]
                                # As in the forward: the first and third pair are upper rows.
                                for half in (0, 1):
                                    pairs[c * WORDS + half * 2] = grads[half]
                                    pairs[c * WORDS + half * 2 + 1] = grads[half + 2]
                            # As in `contract_cluster_bwd`: the tokens of a stream by those of the
                            # gradient.
                            for i in tuple(range(N)):
                                if len(blocks) == 1 and i % 2 == 0:
                                    T.sync_warp()
                                for half in (0, 1):
                                    for k in T.unroll(4):
                                        sums[half, k] = 0.0
                                for c in blocks:
                                    for v in T.vectorized(WORDS):
                                        values[v] = words[
                                            (moved(at[0], i * PIECES) + c * block) * WORDS + v
                                        ]
                                    for half in (0, 1):
                                        multiply(values, pairs, c * WORDS + half * 2, sums, half)
                                for k in T.unroll(2):
                                    diagonal[k * N + i] = sums[0, k] + sums[1, 2 + k]
                            for k in T.unroll(2):
                                if lane // 4 == lane % 4 * 2 + k:
                                    for i in T.vectorized(N):
                                        warp_sums[step % kept, warp, lane // 4 * N + i] = diagonal[
                                            k * N + i
                                        ]
                        if late:
                            if step < steps[0] + lag - 1:
                                arrive(full, step)
                            if step >= 1:
                                wait_for(full, step - 1)
                        else:
                            T.sync_threads(BARRIER, threads)
                        # The gates' warp has enough to do between two barriers.
                        if cluster > 1 and step >= late and step < steps[0] + late:
                            push_shares(
                                warp_sums,
                                (step - late) % kept,
                                parts,
                                full,
                                (step - late) % CLUSTER_SLOTS,
                                rank,
                                warp,
                                cluster,
                                warps,
                                count,
                            )
                        if step >= lag:
                            t0[0] = (first + (step - lag) * clusters) * GROUP + lane % 4
                            buffer[0] = (step - lag) % buffers
                            # Column q of the operand by token is token q // 2 + q % 2 * 4: a lane's
                            # two columns are then the tokens whose rows it reads without conflicts.
                            for v in T.vectorized(8):
                                of_tokens[v] = by_token[
                                    buffer[0], lane // 8 + lane // 4 % 2 * 4, lane % 4, v
                                ]
                            for v in T.vectorized(4):
                                of_mixes[v] = by_mix[buffer[0], lane // 4, lane % 4, v]
                            lifted[0] = given[buffer[0], 0, N + 2]
                            for k in tuple(range(2)):
                                for v in T.vectorized(N):
                                    pre[k, v] = given[buffer[0], lane % 4 + k * 4, v]
                                for v in T.vectorized(2):
                                    factor[k * 2 + v] = given[buffer[0], lane % 4 + k * 4, N + v]
                                for v in T.vectorized(each // 2):
                                    streams[v] = grad_words[
                                        slots[1] * (grad_group * WORDS)
                                        + places[6]
                                        + k * (4 * PIECES * WORDS)
                                        + v
                                    ]
                                for v in T.unroll(each // 2):
                                    outer[k * each + 2 * v] = first_of(streams[v])
                                    outer[k * each + 2 * v + 1] = second_of(streams[v])
                            at[0] = slots[1] * group + places[2]
                            at[1] = slots[1] * (group * WORDS) + places[3]
                            at[2] = moved(at[1], 0, 4, WORDS)
                            for i in tuple(range(N)):
                                # What is loaded for all of a group at once does not fit the
                                # registers of fourteen warps.
                                if len(blocks) == 1:
                                    T.sync_warp()
                                for b in tuple(range(2 * len(blocks))):
                                    # Its eight tokens twice, for both parts of the other one.
                                    piece = i * PIECES + b % 2 * 2
                                    T.evaluate(
                                        T.call_intrin(
                                            "handle",
                                            LOAD_MATRIX,
                                            T.int32(1),
                                            4,
                                            T.access_ptr(
                                                ring[
                                                    (moved(at[0], piece) + b // 2 * block) * VECTOR
                                                ],
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
                                        grad_w[i * 2 * len(blocks) + b, k] += (
                                            product[b, k] * lifted[0]
                                        )
                                # All but the weight's part, to which tensor cores add that.
                                for k in (0, 1):
                                    for v in T.vectorized(each // 2):
                                        streams[v] = words[
                                            moved(at[1 + k], i * PIECES, 0, WORDS) + v
                                        ]
                                    for v in T.unroll(each // 2):
                                        element[2 * v] = first_of(streams[v])
                                        element[2 * v + 1] = second_of(streams[v])
                                    for v in T.unroll(each):
                                        # x joins one r first: r * r may be lost where x is large.
                                        element[v] *= factor[k * 2]
                                        product[v // 2, v % 2 * 2 + k] = (
                                            pre[k, i] * outer[k * each + v]
                                            + element[v] * factor[k * 2 + 1]
                                        )
                                for b in tuple(range(2 * len(blocks))):
                                    operand = (i * 2 * len(blocks) + b) * VECTOR
                                    multiply(w, of_tokens, 0, product, b, operand)
                                    multiply(w, of_tokens, 4, product, b, operand)
                                for k in (0, 1):
                                    for v in T.unroll(each):
                                        total[v] = product[v // 2, v % 2 * 2 + k]
                                    if has_held:
                                        for v in T.vectorized(each // 2):
                                            streams[v] = held_words[
                                                moved(at[1 + k], i * PIECES, 0, WORDS) + v
                                            ]
                                        for v in T.unroll(each // 2):
                                            total[2 * v] += first_of(streams[v])
                                            total[2 * v + 1] += second_of(streams[v])
                                    column = i * (hidden_size // each) + vectors[2]
                                    if last:
                                        if t0[0] + k * 4 < tokens:
                                            for v in T.vectorized(each):
                                                grad_x[t0[0] + k * 4, column * each + v] = T.cast(
                                                    total[v], T.bfloat16
                                                )
                                    else:
                                        for v in T.vectorized(each):
                                            grad_x[t0[0] + k * 4, column * each + v] = T.cast(
                                                total[v], T.bfloat16
                                            )
                        if not last:
                            # As in the forward.
                            T.sync_warp()
                            if step + ahead < steps[0]:
                                t0[0] = (first + (step + ahead) * clusters) * GROUP
                                # Its place is that of the group which was finished just now.
                                at[0] = slots[1] * group + places[0]
                                at[1] = slots[1] * grad_group + places[4]
                                if t0[0] + GROUP <= tokens:
                                    load_rows(
                                        x,
                                        t0[0] + lane // (N * wide),
                                        None,
                                        vectors[0],
                                        ring,
                                        at[0],
                                        at_once,
                                    )
                                    load_inputs(
                                        grad,
                                        t0[0] + lane // wide,
                                        None,
                                        vectors[1],
                                        grad_ring,
                                        at[1],
                                        inputs_at_once,
                                    )
                                    if has_held:
                                        load_rows(
                                            held,
                                            t0[0] + lane // (N * wide),
                                            None,
                                            vectors[0],
                                            held_ring,
                                            at[0],
                                            at_once,
                                        )
                                else:
                                    load_rows(
                                        x,
                                        t0[0] + lane // (N * wide),
                                        tokens - 1,
                                        vectors[0],
                                        ring,
                                        at[0],
                                        at_once,
                                    )
                                    load_inputs(
                                        grad,
                                        t0[0] + lane // wide,
                                        tokens - 1,
                                        vectors[1],
                                        grad_ring,
                                        at[1],
                                        inputs_at_once,
                                    )
                                    if has_held:
                                        load_rows(
                                            held,
                                            t0[0] + lane // (N * wide),
                                            tokens - 1,
                                            vectors[0],
                                            held_ring,
                                            at[0],
                                            at_once,
                                        )
                            T.ptx_commit_group()
                        slots[0] = T.Select(slots[0] == stages - 1, 0, slots[0] + 1)
                        slots[1] = T.Select(slots[1] == stages - 1, 0, slots[1] + 1)
                # Rows of the transposed operand are columns: 8 * q + lane // 4 of a stream.
                for b in T.unroll(len(blocks) * 2 * N):
                    for k in T.unroll(4):
                        partials[
                            first,
                            lane % 4 * 2 + k % 2,
                            b // (2 * len(blocks)) * hidden_size
                            + h
                            + (b % (2 * len(blocks)) * 2 + k // 2) * 8
                            + lane // 4,
                        ] = grad_w[b, k]
            else:
                # Of the group that comes, and of the next: loads take longer than a step's rest.
                mix = T.alloc_local((2,), T.float32)
                rms = T.alloc_local((1,), T.float32)
                post = T.alloc_local((1,), T.float32)
                next_mix = T.alloc_local((2,), T.float32)
                next_rms = T.alloc_local((1,), T.float32)
                next_post = T.alloc_local((1,), T.float32)
                slope = T.alloc_local((2,), T.float32)
                value = T.alloc_local((2,), T.float32)
                along = T.alloc_local((1,), T.float32)
                z = T.alloc_local((1,), T.float32)
                gate = T.alloc_local((1,), T.float32)
                largest = T.alloc_local((1,), T.float32)
                lift = T.alloc_local((1,), T.int32)
                piece = T.alloc_local((2,), T.bfloat16)
                # By lane: the gradients of its two mixes' biases, and its parts of both scales'; of
                # one group, and of all.
                gate_grads = T.alloc_local((4,), T.float32)
                gate_sums = T.alloc_local((4,), T.float64)
                gate_scale = T.alloc_local((2,), T.float32)
                gate_bias = T.alloc_local((2,), T.float32)
                g = lane // N
                i = lane % N
                for k in T.unroll(2):
                    gate_scale[k] = T.cast(scale[k], T.float32)
                    gate_bias[k] = T.cast(bias[k * N + i], T.float32)
                    mix[k] = 0.0
                    slope[k] = 0.0
                    next_mix[k] = 0.0
                rms[0] = 0.0
                post[0] = 0.0
                next_rms[0] = 0.0
                next_post[0] = 0.0
                gate[0] = 0.0
                for k in T.unroll(4):
                    gate_sums[k] = 0.0
                t0[0] = first * GROUP + g
                if t0[0] < tokens:
                    for k in T.unroll(2):
                        next_mix[k] = mixes[t0[0], k * N + i]
                    next_rms[0] = inv_rms[t0[0]]
                    next_post[0] = grad_post[t0[0], i]
                for step in T.serial(steps[0] + made):
                    buffer[0] = (step + buffers - made) % buffers
                    if step >= made:
                        slot = (step - made) % CLUSTER_SLOTS
                        if cluster > 1:
                            T.mbarrier_wait_parity(full[slot], (step - made) // CLUSTER_SLOTS % 2)
                        value[0] = 0.0
                        for c in T.unroll(cluster):
                            value[0] += parts[slot, c, lane]
                        value[1] = post[0]
                        along[0] = 0.0
                        largest[0] = 0.0
                        for k in T.unroll(2):
                            value[k] *= slope[k]
                            if (first + (step - made) * clusters) * GROUP + g >= tokens:
                                value[k] = 0.0
                            gate_grads[k] = value[k]
                            gate_grads[2 + k] = value[k] * mix[k]
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
                        lift[0] = T.max(SMALL_EXPONENT - (as_int(largest[0]) >> 23), 0)
                        largest[0] = as_float((127 + lift[0]) << 23)
                        if late:
                            wait_for(full, step - 1)
                        given[buffer[0], g, i] = gate[0]
                        for k in T.unroll(2):
                            piece[0] = high_part(value[k])
                            piece[1] = low_part(value[k])
                            for part in T.unroll(2):
                                for twice in T.unroll(2):
                                    by_token[
                                        buffer[0], g, (k * N + i) // 2, part * 4 + twice * 2 + i % 2
                                    ] = piece[part]
                            value[k] *= largest[0]
                            piece[0] = high_part(value[k])
                            piece[1] = low_part(value[k])
                            for part in T.unroll(2):
                                by_mix[buffer[0], k * N + i, g // 2, part * 2 + g % 2] = piece[part]
                        if i == 0:
                            given[buffer[0], g, N] = rms[0]
                            given[buffer[0], g, N + 1] = -along[0] * rms[0] * (1.0 / size)
                            given[buffer[0], g, N + 2] = as_float((127 - lift[0]) << 23)
                            given[buffer[0], g, N + 3] = 0.0
                    if late:
                        # Whose phase but one before this was waited for.
                        if step == 1:
                            wait_for(full, 0)
                        arrive(full, step)
                    else:
                        T.sync_threads(BARRIER, threads)
                    if step < steps[0]:
                        if cluster > 1:
                            announce(full, step % CLUSTER_SLOTS, cluster, count)
                        else:
                            push_vectors(
                                warp_sums,
                                step % 2,
                                parts,
                                full,
                                step % CLUSTER_SLOTS,
                                rank,
                                cluster,
                                warps,
                                count,
                            )
                    # What nobody waits for, or does not depend on the others' sums.
                    if step >= made:
                        for k in T.unroll(4):
                            gate_sums[k] += T.cast(gate_grads[k], T.float64)
                    # Of the group whose gates are made in the next step.
                    if made - 1 <= step and step < steps[0] + made - 1:
                        for k in T.unroll(2):
                            mix[k] = next_mix[k]
                            logit(mix[k], gate_scale[k], gate_bias[k], z)
                            slope_of_sigmoid(z[0], slope, k)
                            if k == 0:
                                sigmoid(z[0], gate)
                                gate[0] += pre_eps
                        rms[0] = next_rms[0]
                        post[0] = next_post[0] * post_mult
                        t0[0] = (first + (step + 2 - made) * clusters) * GROUP + g
                        if t0[0] < tokens:
                            for k in T.unroll(2):
                                next_mix[k] = mixes[t0[0], k * N + i]
                            next_rms[0] = inv_rms[t0[0]]
                            next_post[0] = grad_post[t0[0], i]
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
