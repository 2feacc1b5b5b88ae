"""All of a pre with four streams in one pass over them: projection, gates, Sinkhorn, aggregate; and
with it the post before, which makes those streams.

As in `contract_cluster`, a cluster of CTAs keeps its tokens in shared memory until their gates are
known: see there for the steps. What 24 mixes change:

- In two parts they are 48 rows, three operands of a tensor core. What of them does not fit the
  registers lies in shared memory as the lanes need it.
- A lane multiplies, and later weighs, the very vectors that it has loaded: the ring is its own, and
  nobody else waits for it.
- Nobody waits for all warps. Each has an mbarrier to arrive at with its sums, and waits for one of
  the gates, so that some multiply while others weigh; and in a step a warp does both, for two
  groups of tokens, with no branch or wait in between: the compiler mixes their instructions.
- Of the other warps one adds up the sums that every CTA needs, of the first four mixes, and sends
  them; one makes gates of those that come; one sends the other sums to one CTA of the cluster, each
  group's to the next one; and one or two, there, take Sinkhorn's steps while the others go on.
- A group's gates come `lag` steps after its products: what CTAs give one another has these steps to
  arrive in, and CTAs may be as far ahead of others.
- The warps that multiply have most of the registers, once the others have given theirs up.

With a post the ring has the streams before it and the layer output. A lane makes its part of the
streams of them, rounded, puts it back in their place, and multiplies it; it stores it when it
weighs it.
"""

from typing import Any

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import VECTOR, builder, follow_previous
from tile_mhc.kernels._push import SOURCE, WIDTH, senders
from tile_mhc.kernels._shapes import (
    CLUSTER_TOKENS,
    PRE_COLUMNS,
    PRE_GATES,
    PRE_MIXES,
    PRE_OPERANDS,
    PRE_SHARED,
    PRE_STREAMS,
    PRE_SUMS,
    pre_cluster,
)
from tile_mhc.kernels._weights import high_part, low_part, norm_shape, rounded_to_tf32
from tile_mhc.kernels.contract_cluster import (
    BARRIER,
    RING,
    count_steps,
    first_of,
    multiply,
    second_of,
)
from tile_mhc.kernels.mixes import logit, sigmoid
from tile_mhc.kernels.projection import LARGE_SQUARES, RESCUE_SCALE, weight_value
from tile_mhc.kernels.sinkhorn import sinkhorn_rows

GROUP = CLUSTER_TOKENS
N = PRE_STREAMS
MIXES = PRE_MIXES
# Sums of a group of tokens: the first N mixes, squares, then the other mixes, all tokens of each.
# Every CTA gets the first SHARED of them; one gets those from SQUARES on.
SQUARES = N * GROUP
SHARED = PRE_SHARED
COUNT = PRE_SUMS
REST = COUNT - SQUARES
# Mixes of a token that a lane of a warp for Sinkhorn makes: four lanes have a token.
LANE_MIXES = (MIXES - N) // N
GATES = PRE_GATES
# Vectors of sums: those that all CTAs get, and the others.
SHARED_VECTORS = SHARED // WIDTH
REST_VECTORS = REST // WIDTH


def place(v: int, lower: bool):
    """Where value v of half a lane's vector lies in an operand, for the rows from 0 or 8 on. Which
    columns a lane's values come from does not matter, as long as both operands agree: here it has
    eight neighbours, where the tensor core's layout has pairs."""
    return v // 2 * 4 + 2 * lower + v % 2


def vector_of(vector: T.int32, i: int, hidden_size: int):
    """The element of stream i at which a lane's vector begins; `vector` counts in vectors."""
    return (vector + i * (hidden_size // VECTOR)) * VECTOR


@T.macro
def load_own(
    source: T.Tensor,
    count: int,
    t: T.int32,
    vector: T.int32,
    ring: T.Buffer,
    slot: T.int32,
    warp: T.int32,
    lane: T.int32,
    to: int,
    blocks: int,
):
    """Start the loads of this lane's vectors of `count` streams of token t, into those of the ring
    from `to` on in each block."""
    hidden_size = source.shape[1] // count
    for i in T.unroll(count):
        for b in T.unroll(blocks):
            T.ptx_cp_async(
                T.access_ptr(ring[slot, warp, b, to + i, lane, 0], "w", VECTOR),
                T.access_ptr(
                    source[t, vector_of(vector, i, hidden_size) + b * PRE_COLUMNS], "r", VECTOR
                ),
                VECTOR,
            )


@T.macro
def load_weight(
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_weight_dtype: str,
    row: T.int32,
    vector: T.int32,
    i: int,
    b: int,
    hidden_size: int,
    raw: T.Buffer,
    scales: T.Buffer,
    k: int,
):
    """raw[k], scales[k] = a lane's vector of stream i in block b: of mixes `row`, row + 8 and
    row + 16, and of the norm's weight if there is one."""
    for q in T.unroll(VECTOR // 4):
        for p in T.unroll(3):
            for v in T.vectorized(4):
                raw[k, p, q * 4 + v] = T.cast(
                    weight[
                        row + p * 8,
                        (vector * 2 + i * (hidden_size // 4) + q) * 4 + b * PRE_COLUMNS + v,
                    ],
                    T.float32,
                )
        if norm_weight_dtype != "":
            for v in T.vectorized(4):
                scales[k, q * 4 + v] = T.cast(
                    norm_weight[
                        (vector * 2 + i * (hidden_size // 4) + q) * 4 + b * PRE_COLUMNS + v
                    ],
                    T.float32,
                )


@T.macro
def weigh(mix: T.float32, words: T.Buffer, out: T.Buffer):
    """out += mix times a stream's elements, which lie in pairs: an instruction each to unpack."""
    for k in T.unroll(VECTOR // 2):
        out[2 * k] += mix * first_of(words[k])
        out[2 * k + 1] += mix * second_of(words[k])


@T.macro
def add_sums(warp_sums: T.Buffer, buffer: T.int32, vector: T.int32, warps: int, total: T.Buffer):
    """total = a vector of sums of all warps of this CTA."""
    addend = T.alloc_local((WIDTH,), T.float32)
    for v in T.unroll(WIDTH):
        total[v] = 0.0
    for q in T.unroll(warps):
        for v in T.vectorized(WIDTH):
            addend[v] = warp_sums[buffer, q, vector * WIDTH + v]
        for v in T.unroll(WIDTH):
            total[v] += addend[v]


@T.macro
def signal(barriers: T.Buffer, k: T.int32, lane: T.int32):
    """What the lanes of a warp have written or read is done, for who waits for the mbarrier."""
    T.sync_warp()
    if lane == 0:
        T.mbarrier_arrive(barriers[k])


@T.macro
def exact_mix(
    x: T.Tensor,
    layer_output: T.Tensor,
    post_before: T.Tensor,
    comb_before: T.Tensor,
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_weight_dtype: str,
    t: T.int32,
    m: T.int32,
    tf32: T.int32,
    out: T.Buffer,
):
    """out = (mix, inv_rms) of a token whose squares may have overflowed: as in `token_mix`."""
    size = x.shape[1]
    hidden_size = size // N
    exact = T.alloc_local((2,), T.float64)
    element = T.alloc_local((1,), T.float32)
    exact[0] = 0.0
    exact[1] = 0.0
    for k in T.unroll(size, unroll_factor=1):
        if layer_output is None:
            element[0] = T.cast(x[t, k], T.float32)
        else:
            # What the others make is not stored yet.
            j = k // hidden_size
            element[0] = post_before[t, j] * T.cast(layer_output[t, k % hidden_size], T.float32)
            for i in T.unroll(N):
                element[0] += comb_before[t, i, j] * T.cast(
                    x[t, i * hidden_size + k % hidden_size], T.float32
                )
            element[0] = T.cast(T.cast(element[0], T.bfloat16), T.float32)
        element[0] *= RESCUE_SCALE
        exact[0] += T.cast(element[0] * element[0], T.float64)
        exact[1] += T.cast(element[0], T.float64) * T.cast(
            weight_value(weight, norm_weight, norm_weight_dtype, m, k, tf32), T.float64
        )
    element[0] = T.rsqrt(T.cast(exact[0], T.float32) / size)
    out[0] = T.cast(exact[1], T.float32) * element[0]
    out[1] = element[0] * RESCUE_SCALE


@T.macro
def load_factors(
    post_before: T.Tensor, comb_before: T.Tensor, t0: T.Buffer, lane: T.int32, out: T.Buffer
):
    """out = what this lane reads of the post's factors of the tokens from t0[0] on: N of comb_mix
    and one of post_mix; zeros past the last token."""
    for e in T.unroll(N):
        t = t0[0] + e * (32 // (N * N)) + lane // (N * N)
        out[e] = 0.0
        if t < post_before.shape[0]:
            out[e] = comb_before[t, lane % (N * N) // N, lane % N]
    out[N] = 0.0
    if t0[0] + lane // N < post_before.shape[0]:
        out[N] = post_before[t0[0] + lane // N, lane % N]


@T.macro
def store_factors(values: T.Buffer, lane: T.int32, given: T.Buffer, buffer: T.int32):
    """given[buffer, token] = comb_mix by rows of what makes one stream, then post_mix."""
    for e in T.unroll(N):
        g = e * (32 // (N * N)) + lane // (N * N)
        given[buffer, g, lane % N, lane % (N * N) // N] = values[e]
    given[buffer, lane // N, N, lane % N] = values[N]


def one_pass(
    hidden_size: int,
    has_post: bool,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
) -> Any:
    """The prim_func, with the post before it or without."""
    tokens = T.dynamic("num_tokens")
    size = N * hidden_size
    cut = pre_cluster(N, hidden_size, has_post, limits)
    cluster, blocks, warps, kept, solvers, lag, stages = cut
    width = hidden_size // cluster
    threads = cut.groups * 128
    registers, last_registers = cut.registers
    # Warps of the groups that multiply: some of the others are among them.
    wide_warps = threads // 32 - 4
    # Where a group's gates have come, another one is asked for in its place.
    ahead = stages - lag
    # Who sends the sums of a group has had the gates of `lag` groups before: so many steps before
    # this CTA's next one with the same warp for Sinkhorn that must have read those that it has.
    late = cluster * solvers - lag
    buffers, slots = cut.buffers, cut.slots
    # The mbarriers. A slot of sums from all CTAs is there, or one of those for Sinkhorn: of these
    # the CTA that gets them announces the bytes. Those for Sinkhorn are read. Gates are there, and
    # all sums of that group read. All sums of a CTA's warps are there.
    come = slots
    read = come + solvers
    gated = read + solvers
    summed = gated + GATES
    rows = N + has_post
    # Vectors, and halves of them, that a lane multiplies.
    pieces = 2 * N * blocks
    has_norm = norm_weight_dtype != ""
    # Streams of a block of columns, of which a warp asks for the weight before it needs it: as many
    # as leave no register to memory.
    early = 0 if cut.groups > 3 else 1 if has_norm else 3

    @T.macro
    def make_streams(
        slot: T.int32,
        b: int,
        step: T.int32,
        ring: T.Buffer,
        given: T.Buffer,
        warp: T.int32,
        lane: T.int32,
        before: T.Buffer,
        wide: T.Buffer,
        made: T.Buffer,
    ):
        """`combine` of a post: made is put in the place in the ring of what it is made of."""
        pairs = T.view(before, (rows, VECTOR // 2), T.uint32)
        post = T.alloc_local((N,), T.float32)
        comb = T.alloc_local((N,), T.float32)
        total = T.alloc_local((4,), T.float32)
        for k in T.unroll(rows):
            for v in T.vectorized(VECTOR):
                before[k, v] = ring[slot, warp, b, k, lane, v]
        for v in T.vectorized(N):
            post[v] = given[step % GATES, lane // 4, N, v]
        for half in (0, 1):
            for k in T.unroll(rows):
                for v in T.unroll(2):
                    wide[k, 2 * v] = first_of(pairs[k, half * 2 + v])
                    wide[k, 2 * v + 1] = second_of(pairs[k, half * 2 + v])
            for i in T.unroll(N):
                for v in T.vectorized(N):
                    comb[v] = given[step % GATES, lane // 4, i, v]
                for v in T.unroll(4):
                    total[v] = post[i] * wide[N, v]
                for k in T.unroll(N):
                    for v in T.unroll(4):
                        total[v] += comb[k] * wide[k, v]
                for v in T.vectorized(4):
                    made[i, half * 4 + v] = T.cast(total[v], T.bfloat16)
        for i in T.unroll(N):
            for v in T.vectorized(VECTOR):
                ring[slot, warp, b, i, lane, v] = made[i, v]

    @T.macro
    def send_shared(
        warp_sums: T.Buffer,
        parts: T.Buffer,
        full: T.Buffer,
        steps: T.Buffer,
        rank: T.int32,
        lane: T.int32,
    ):
        """Add up the sums that every CTA gets, and send them there."""
        total = T.alloc_local((WIDTH,), T.float32)
        groups = senders(SHARED_VECTORS, cluster)
        for step in T.serial(steps[0]):
            T.mbarrier_wait_parity(full[summed + step % buffers], step // buffers % 2)
            if lane < SHARED_VECTORS * groups:
                add_sums(warp_sums, step % buffers, lane % SHARED_VECTORS, warps, total)
            # What comes of this push tells all that the buffer has been read.
            T.sync_warp()
            before_this = step - late
            if before_this >= 0 and before_this % cluster == rank:
                T.mbarrier_wait_parity(
                    full[read + before_this // cluster % solvers],
                    before_this // (cluster * solvers) % 2,
                )
            if lane < SHARED_VECTORS * groups:
                for k in T.unroll(cluster // groups):
                    T.evaluate(
                        T.call_extern(
                            "handle",
                            "push_vector",
                            T.access_ptr(
                                parts[step % slots, rank, lane % SHARED_VECTORS * WIDTH],
                                "w",
                                WIDTH,
                            ),
                            T.access_ptr(total[0], "r", WIDTH),
                            k * groups + lane // SHARED_VECTORS,
                            full[step % slots],
                        )
                    )

    @T.macro
    def make_gates(
        x: T.Tensor,
        layer_output: T.Tensor,
        post_before: T.Tensor,
        comb_before: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        scale: T.Tensor,
        bias: T.Tensor,
        mixes: T.Tensor,
        inv_rms: T.Tensor,
        parts: T.Buffer,
        gates: T.Buffer,
        full: T.Buffer,
        steps: T.Buffer,
        first: T.int32,
        clusters: T.int32,
        rank: T.int32,
        lane: T.int32,
        norm_eps: T.float32,
        pre_eps: T.float32,
        tf32: T.int32,
    ):
        """Make of what all CTAs have sent the gates of each group."""
        t = T.alloc_local((1,), T.int32)
        two = T.alloc_local((2,), T.float32)
        z = T.alloc_local((1,), T.float32)
        # Read once: beside the stream of loads a miss costs a microsecond.
        gate_scale = T.alloc_local((1,), T.float32)
        gate_bias = T.alloc_local((1,), T.float32)
        gate_scale[0] = T.cast(scale[0], T.float32)
        gate_bias[0] = T.cast(bias[lane // GROUP], T.float32)
        m = lane // GROUP
        g = lane % GROUP
        for step in T.serial(steps[0]):
            slot = step % slots
            if lane == 0:
                T.mbarrier_arrive_expect_tx(full[slot], cluster * SHARED * 4)
            T.mbarrier_wait_parity(full[slot], step // slots % 2)
            t[0] = (first + step * clusters) * GROUP + g
            two[0] = 0.0
            two[1] = 0.0
            for c in T.unroll(cluster):
                two[0] += parts[slot, c, lane]
                two[1] += parts[slot, c, SQUARES + g]
            if not two[1] < LARGE_SQUARES and t[0] < tokens:
                exact_mix(
                    x,
                    layer_output,
                    post_before,
                    comb_before,
                    weight,
                    norm_weight,
                    norm_weight_dtype,
                    t[0],
                    m,
                    tf32,
                    two,
                )
            else:
                two[1] = T.rsqrt(two[1] / size + norm_eps)
                two[0] = two[0] * two[1]
            logit(two[0], gate_scale[0], gate_bias[0], z)
            sigmoid(z[0], z)
            gates[step % GATES, g, m] = z[0] + pre_eps
            signal(full, gated + step % GATES, lane)
            if step % cluster == rank and t[0] < tokens:
                mixes[t[0], m] = two[0]
                if m == 0:
                    inv_rms[t[0]] = two[1]

    @T.macro
    def send_rest(
        post_before: T.Tensor,
        comb_before: T.Tensor,
        warp_sums: T.Buffer,
        rest: T.Buffer,
        given: T.Buffer,
        full: T.Buffer,
        steps: T.Buffer,
        first: T.int32,
        clusters: T.int32,
        rank: T.int32,
        lane: T.int32,
    ):
        """Add up the other sums, and send them to the CTA whose turn it is."""
        t = T.alloc_local((1,), T.int32)
        total = T.alloc_local((WIDTH,), T.float32)
        more = T.alloc_local((WIDTH,), T.float32)
        if has_post:
            # And stores a post's factors of each group in time for its products: who has
            # found a buffer of sums free for the group before has them.
            factors = T.alloc_local((N + 1,), T.float32)
            for s in T.unroll(GATES + 1):
                t[0] = (first + s * clusters) * GROUP
                load_factors(post_before, comb_before, t, lane, factors)
                if s < GATES:
                    store_factors(factors, lane, given, s)
            T.sync_threads(BARRIER, warps * 32 + 32)
        for step in T.serial(steps[0]):
            T.mbarrier_wait_parity(full[summed + step % buffers], step // buffers % 2)
            for turn in tuple(range(-(-REST_VECTORS // 32))):
                if turn * 32 + lane < REST_VECTORS:
                    add_sums(
                        warp_sums,
                        step % buffers,
                        SQUARES // WIDTH + turn * 32 + lane,
                        warps,
                        more if turn else total,
                    )
            if has_post:
                store_factors(factors, lane, given, step % GATES)
                t[0] = (first + (step + GATES + 1) * clusters) * GROUP
                load_factors(post_before, comb_before, t, lane, factors)
            signal(full, gated + step % GATES, lane)
            for turn in tuple(range(-(-REST_VECTORS // 32))):
                if turn * 32 + lane < REST_VECTORS:
                    T.evaluate(
                        T.call_extern(
                            "handle",
                            "push_vector",
                            T.access_ptr(
                                rest[
                                    step // cluster % solvers,
                                    rank,
                                    (turn * 32 + lane) * WIDTH,
                                ],
                                "w",
                                WIDTH,
                            ),
                            T.access_ptr((more if turn else total)[0], "r", WIDTH),
                            step % cluster,
                            full[come + step // cluster % solvers],
                        )
                    )

    @T.macro
    def solve(
        x: T.Tensor,
        layer_output: T.Tensor,
        post_before: T.Tensor,
        comb_before: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        scale: T.Tensor,
        bias: T.Tensor,
        post_mix: T.Tensor,
        comb_mix: T.Tensor,
        mixes: T.Tensor,
        rest: T.Buffer,
        logits: T.Buffer,
        full: T.Buffer,
        steps: T.Buffer,
        first: T.int32,
        clusters: T.int32,
        rank: T.int32,
        lane: T.int32,
        norm_eps: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        repeat: T.int32,
        tf32: T.int32,
        solver: T.int32,
    ):
        """The other mixes, and Sinkhorn's steps, of this warp's groups."""
        t = T.alloc_local((1,), T.int32)
        sinkhorns = T.alloc_local((LANE_MIXES,), T.float32)
        squared = T.alloc_local((1,), T.float32)
        value = T.alloc_local((2,), T.float32)
        z = T.alloc_local((1,), T.float32)
        matrix = T.alloc_local((1, N), T.float32)
        gate_scale = T.alloc_local((2,), T.float32)
        gate_bias = T.alloc_local((LANE_MIXES,), T.float32)
        # The mixes of a token are spread over four lanes.
        g = lane % GROUP
        own_mix = lane // GROUP * LANE_MIXES
        for k in T.unroll(2):
            gate_scale[k] = T.cast(scale[1 + k], T.float32)
        for k in T.unroll(LANE_MIXES):
            gate_bias[k] = T.cast(bias[N + own_mix + k], T.float32)
        for turn in T.serial(
            T.truncdiv(
                steps[0] - rank - solver * cluster + cluster * solvers - 1,
                cluster * solvers,
            )
        ):
            if lane == 0:
                T.mbarrier_arrive_expect_tx(full[come + solver], cluster * REST * 4)
            T.mbarrier_wait_parity(full[come + solver], turn % 2)
            t[0] = (first + ((turn * solvers + solver) * cluster + rank) * clusters) * GROUP + g
            squared[0] = 0.0
            for k in T.unroll(LANE_MIXES):
                sinkhorns[k] = 0.0
            for c in T.unroll(cluster):
                squared[0] += rest[solver, c, g]
                for k in T.unroll(LANE_MIXES):
                    sinkhorns[k] += rest[solver, c, (own_mix + k + 1) * GROUP + g]
            T.sync_warp()
            if lane == 0:
                T.mbarrier_arrive(full[read + solver])
            for k in T.unroll(LANE_MIXES):
                if not squared[0] < LARGE_SQUARES and t[0] < tokens:
                    exact_mix(
                        x,
                        layer_output,
                        post_before,
                        comb_before,
                        weight,
                        norm_weight,
                        norm_weight_dtype,
                        t[0],
                        N + own_mix + k,
                        tf32,
                        value,
                    )
                else:
                    value[0] = sinkhorns[k] * T.rsqrt(squared[0] / size + norm_eps)
                logit(
                    value[0],
                    T.Select(own_mix + k < N, gate_scale[0], gate_scale[1]),
                    gate_bias[k],
                    z,
                )
                if t[0] < tokens:
                    mixes[t[0], N + own_mix + k] = value[0]
                if own_mix + k >= N:
                    logits[solver, g, own_mix + k - N] = z[0]
                elif t[0] < tokens:
                    sigmoid(z[0], z)
                    post_mix[t[0], own_mix + k] = z[0] * post_mult
            T.sync_warp()
            # Four lanes have a token, each a row; also past the last token.
            for j in T.vectorized(N):
                matrix[0, j] = logits[solver, g, lane // GROUP * N + j]
            sinkhorn_rows(matrix, N, GROUP, repeat, sinkhorn_eps)
            if t[0] < tokens:
                for j in T.vectorized(N):
                    comb_mix[t[0], lane // GROUP * N + j] = matrix[0, j]
            T.sync_warp()

    @T.macro
    def help_out(
        start: int,
        stop: int,
        x: T.Tensor,
        layer_output: T.Tensor,
        post_before: T.Tensor,
        comb_before: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        scale: T.Tensor,
        bias: T.Tensor,
        post_mix: T.Tensor,
        comb_mix: T.Tensor,
        mixes: T.Tensor,
        inv_rms: T.Tensor,
        warp_sums: T.Buffer,
        parts: T.Buffer,
        rest: T.Buffer,
        gates: T.Buffer,
        logits: T.Buffer,
        given: T.Buffer,
        full: T.Buffer,
        steps: T.Buffer,
        first: T.int32,
        clusters: T.int32,
        rank: T.int32,
        warp: T.int32,
        lane: T.int32,
        norm_eps: T.float32,
        pre_eps: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        repeat: T.int32,
        tf32: T.int32,
    ):
        """What one of the warps from `start` to `stop`, behind those that multiply, does."""
        for role in tuple(range(start, min(stop, 3))):
            if warp == warps + role:
                if role == 0:
                    send_shared(warp_sums, parts, full, steps, rank, lane)
                elif role == 1:
                    make_gates(
                        x,
                        layer_output,
                        post_before,
                        comb_before,
                        weight,
                        norm_weight,
                        scale,
                        bias,
                        mixes,
                        inv_rms,
                        parts,
                        gates,
                        full,
                        steps,
                        first,
                        clusters,
                        rank,
                        lane,
                        norm_eps,
                        pre_eps,
                        tf32,
                    )
                else:
                    send_rest(
                        post_before,
                        comb_before,
                        warp_sums,
                        rest,
                        given,
                        full,
                        steps,
                        first,
                        clusters,
                        rank,
                        lane,
                    )
        if stop > 3 and warp >= warps + 3 and warp < warps + stop:
            solve(
                x,
                layer_output,
                post_before,
                comb_before,
                weight,
                norm_weight,
                scale,
                bias,
                post_mix,
                comb_mix,
                mixes,
                rest,
                logits,
                full,
                steps,
                first,
                clusters,
                rank,
                lane,
                norm_eps,
                sinkhorn_eps,
                post_mult,
                repeat,
                tf32,
                warp - warps - 3,
            )

    @T.macro
    def multiply_and_weigh(
        x: T.Tensor,
        layer_output: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        streams: T.Tensor,
        layer_input: T.Tensor,
        ring: T.Buffer,
        others: T.Buffer,
        warp_sums: T.Buffer,
        gates: T.Buffer,
        given: T.Buffer,
        full: T.Buffer,
        steps: T.Buffer,
        first: T.int32,
        clusters: T.int32,
        rank: T.int32,
        warp: T.int32,
        lane: T.int32,
        tf32: T.int32,
    ):
        """What one of the warps that have columns does."""
        # Indices of global memory as variables: see `contract_cluster_fwd`.
        t = T.alloc_local((1,), T.int32)
        raw = T.alloc_local((early + 1, 3, VECTOR), T.float32)
        scales = T.alloc_local((early + 1, VECTOR), T.float32)
        w = T.alloc_local((kept * VECTOR,), T.bfloat16)
        values = T.alloc_local((VECTOR,), T.bfloat16)
        a = T.alloc_local((VECTOR,), T.bfloat16)
        # A token's elements by themselves, for the diagonal: as the upper rows the first
        # half of a vector, as the lower rows the second.
        own = T.alloc_local((VECTOR,), T.bfloat16)
        sums = T.alloc_local((PRE_OPERANDS + 2, 4), T.float32)
        pair = T.alloc_local((2,), T.float32)
        mix = T.alloc_local((N,), T.float32)
        held = T.alloc_local((VECTOR,), T.bfloat16)
        words = T.view(held, (VECTOR // 2,), T.uint32)
        results = T.alloc_local((blocks * VECTOR,), T.bfloat16)
        total = T.alloc_local((VECTOR,), T.float32)
        vector = T.alloc_local((1,), T.int32)
        if has_post:
            before = T.alloc_local((rows, VECTOR), T.bfloat16)
            wide = T.alloc_local((rows, 4), T.float32)
            made = T.alloc_local((N, VECTOR), T.bfloat16)
        # Of the ring: where this step's group is.
        slot = T.alloc_local((1,), T.int32)
        row = lane // 4
        vector[0] = (rank * width + warp * blocks * PRE_COLUMNS) // VECTOR + lane % 4
        for s in T.unroll(ahead):
            if s < steps[0]:
                # Past the last token it again: what comes of it nobody stores.
                t[0] = T.min((first + s * clusters) * GROUP + row, tokens - 1)
                load_own(x, N, t[0], vector[0], ring, s, warp, lane, 0, blocks)
                if has_post:
                    load_own(layer_output, 1, t[0], vector[0], ring, s, warp, lane, N, blocks)
            T.ptx_commit_group()
        # A lane has eight columns of every stream, of mixes `row`, row + 8 and row + 16. Some are
        # asked for ahead: each by itself would wait for memory.
        of_lane = tuple((b, i) for b in range(blocks) for i in range(N))
        for piece in tuple(range(-early, len(of_lane))):
            # The compiler would ask for more than there are registers for.
            T.sync_warp()
            if piece + early < len(of_lane):
                b, i = of_lane[piece + early]
                load_weight(
                    weight,
                    norm_weight,
                    norm_weight_dtype,
                    row,
                    vector[0],
                    i,
                    b,
                    hidden_size,
                    raw,
                    scales,
                    (piece + early) % (early + 1),
                )
            if piece < 0:
                continue
            now = piece % (early + 1)
            for p in T.unroll(3):
                for v in T.unroll(VECTOR):
                    if has_norm:
                        raw[now, p, v] *= scales[now, v]
                    if tf32 != 0:
                        raw[now, p, v] = rounded_to_tf32(raw[now, p, v])
            # High parts of 16 mixes; both parts of the other eight; low parts of the 16.
            for p, half in tuple((p, half) for p in range(PRE_OPERANDS) for half in (0, 1)):
                k = p * pieces + 2 * piece + half
                for v in tuple(range(4)):
                    if p == 0:
                        a[place(v, False)] = high_part(raw[now, 0, half * 4 + v])
                        a[place(v, True)] = high_part(raw[now, 1, half * 4 + v])
                    elif p == 1:
                        a[place(v, False)] = high_part(raw[now, 2, half * 4 + v])
                        a[place(v, True)] = low_part(raw[now, 2, half * 4 + v])
                    else:
                        a[place(v, False)] = low_part(raw[now, 0, half * 4 + v])
                        a[place(v, True)] = low_part(raw[now, 1, half * 4 + v])
                if k < kept:
                    for v in T.unroll(VECTOR):
                        w[k * VECTOR + v] = a[v]
                else:
                    for v in T.vectorized(VECTOR):
                        others[warp, k - kept, lane, v] = a[v]
        slot[0] = 0
        if has_post:
            T.sync_threads(BARRIER, warps * 32 + 32)
        # The first groups' products, then each group's beside what is made of an older one,
        # then what is left: without a condition in between, instructions of both mix.
        for multiplies, finishes in ((True, False), (True, True), (False, True)):
            for step in T.serial(
                (T.max(steps[0], lag) if not multiplies else lag) if finishes else 0,
                (steps[0] if multiplies else steps[0] + lag) if finishes else T.min(steps[0], lag),
            ):
                if multiplies:
                    T.ptx_wait_group(ahead - 1)
                    for k in T.unroll(4):
                        for p in T.unroll(PRE_OPERANDS + 2):
                            sums[p, k] = 0.0
                else:
                    slot[0] = T.truncmod(step, stages)
                older = T.Select(slot[0] < lag, slot[0] + stages, slot[0]) - lag
                if finishes:
                    T.mbarrier_wait_parity(
                        full[gated + (step - lag) % GATES], (step - lag) // GATES % 2
                    )
                    t[0] = (first + (step - lag) * clusters) * GROUP + row
                    for v in T.vectorized(N):
                        mix[v] = gates[(step - lag) % GATES, row, v]
                # Loops over a tuple: see `contract_cluster_fwd`.
                for b, i in tuple((b, i) for b in range(blocks) for i in range(N)):
                    if multiplies and has_post:
                        if i == 0:
                            make_streams(
                                slot[0],
                                b,
                                step,
                                ring,
                                given,
                                warp,
                                lane,
                                before,
                                wide,
                                made,
                            )
                        for v in T.unroll(VECTOR):
                            values[v] = made[i, v]
                    elif multiplies:
                        for v in T.vectorized(VECTOR):
                            values[v] = ring[slot[0], warp, b, i, lane, v]
                    if finishes:
                        for v in T.vectorized(VECTOR):
                            held[v] = ring[older, warp, b, i, lane, v]
                    if multiplies:
                        for v in T.unroll(4):
                            for u in T.unroll(2):
                                own[(v % 2 * 2 + v // 2) * 2 + u] = values[v * 2 + u]
                        for half in (0, 1):
                            piece = 2 * (b * N + i) + half
                            for p in tuple(range(PRE_OPERANDS)):
                                k = p * pieces + piece
                                if k < kept:
                                    multiply(w, values, half * 4, sums, p, k * VECTOR)
                                else:
                                    for v in T.vectorized(VECTOR):
                                        a[v] = others[warp, k - kept, lane, v]
                                    multiply(a, values, half * 4, sums, p)
                            multiply(own, values, half * 4, sums, PRE_OPERANDS + half)
                    if finishes:
                        if i == 0:
                            for v in T.unroll(VECTOR):
                                total[v] = 0.0
                        weigh(mix[i], words, total)
                        if i == N - 1:
                            for v in T.vectorized(VECTOR):
                                results[b * VECTOR + v] = T.cast(total[v], T.bfloat16)
                        if has_post and t[0] < tokens:
                            for v in T.vectorized(VECTOR):
                                streams[
                                    t[0],
                                    vector_of(vector[0], i, hidden_size) + b * PRE_COLUMNS + v,
                                ] = held[v]
                if multiplies:
                    # A lane has two tokens of each of its mixes, by high and low parts.
                    buffer = step % buffers
                    g = lane % 4 * 2
                    for k in T.unroll(2):
                        pair[k] = sums[0, k] + sums[2, k]
                    for k in T.vectorized(2):
                        warp_sums[buffer, warp, row * GROUP + row // N * GROUP + g + k] = pair[k]
                    for k in T.unroll(2):
                        pair[k] = sums[0, 2 + k] + sums[2, 2 + k]
                    for k in T.vectorized(2):
                        warp_sums[buffer, warp, (row + 9) * GROUP + g + k] = pair[k]
                    for k in T.unroll(2):
                        pair[k] = sums[1, k] + sums[1, 2 + k]
                    for k in T.vectorized(2):
                        warp_sums[buffer, warp, (row + 17) * GROUP + g + k] = pair[k]
                    for k in T.unroll(2):
                        if row == g + k:
                            warp_sums[buffer, warp, SQUARES + row] = (
                                sums[PRE_OPERANDS, k] + sums[PRE_OPERANDS + 1, 2 + k]
                            )
                    signal(full, summed + buffer, lane)
                if finishes and t[0] < tokens:
                    for b in tuple(range(blocks)):
                        for v in T.vectorized(VECTOR):
                            layer_input[t[0], vector[0] * VECTOR + b * PRE_COLUMNS + v] = results[
                                b * VECTOR + v
                            ]
                if multiplies:
                    if step + ahead < steps[0]:
                        t[0] = T.min(
                            (first + (step + ahead) * clusters) * GROUP + row,
                            tokens - 1,
                        )
                        load_own(x, N, t[0], vector[0], ring, older, warp, lane, 0, blocks)
                        if has_post:
                            load_own(
                                layer_output,
                                1,
                                t[0],
                                vector[0],
                                ring,
                                older,
                                warp,
                                lane,
                                N,
                                blocks,
                            )
                    T.ptx_commit_group()
                    slot[0] = T.Select(slot[0] == stages - 1, 0, slot[0] + 1)

    @T.macro
    def body(
        x: T.Tensor,
        layer_output: T.Tensor,
        post_before: T.Tensor,
        comb_before: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        scale: T.Tensor,
        bias: T.Tensor,
        streams: T.Tensor,
        layer_input: T.Tensor,
        post_mix: T.Tensor,
        comb_mix: T.Tensor,
        mixes: T.Tensor,
        inv_rms: T.Tensor,
        norm_eps: T.float32,
        pre_eps: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        repeat: T.int32,
        tf32: T.int32,
        clusters: T.int32,
    ):
        with T.Kernel(clusters * cluster, threads=threads, cluster_dims=(cluster, 1, 1)) as cta:
            T.import_source(SOURCE)
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            ring = T.alloc_shared((stages, warps, blocks, rows, 32, VECTOR), T.bfloat16)
            others = T.alloc_shared(
                (warps, cut.operands - kept, 32, VECTOR) if kept < cut.operands else (1,) * 4,
                T.bfloat16,
            )
            warp_sums = T.alloc_shared((buffers, warps, COUNT), T.float32)
            parts = T.alloc_shared((slots, cluster, SHARED), T.float32)
            rest = T.alloc_shared((solvers, cluster, REST), T.float32)
            gates = T.alloc_shared((GATES, GROUP, N), T.float32)
            logits = T.alloc_shared((solvers, GROUP, N * N), T.float32)
            given = T.alloc_shared((GATES, GROUP, N + 1, N) if has_post else (1,) * 4, T.float32)
            full = T.alloc_cluster_barrier([1] * gated + [2] * GATES + [warps] * buffers)
            steps = T.alloc_local((1,), T.int32)
            if warp < wide_warps:
                if registers != last_registers:
                    T.set_max_nreg(registers, 1)
                count_steps(tokens, first, clusters, steps)
                if warp < warps:
                    multiply_and_weigh(
                        x,
                        layer_output,
                        weight,
                        norm_weight,
                        streams,
                        layer_input,
                        ring,
                        others,
                        warp_sums,
                        gates,
                        given,
                        full,
                        steps,
                        first,
                        clusters,
                        rank,
                        warp,
                        lane,
                        tf32,
                    )
                else:
                    help_out(
                        0,
                        wide_warps - warps,
                        x,
                        layer_output,
                        post_before,
                        comb_before,
                        weight,
                        norm_weight,
                        scale,
                        bias,
                        post_mix,
                        comb_mix,
                        mixes,
                        inv_rms,
                        warp_sums,
                        parts,
                        rest,
                        gates,
                        logits,
                        given,
                        full,
                        steps,
                        first,
                        clusters,
                        rank,
                        warp,
                        lane,
                        norm_eps,
                        pre_eps,
                        sinkhorn_eps,
                        post_mult,
                        repeat,
                        tf32,
                    )
            else:
                if registers != last_registers:
                    T.set_max_nreg(last_registers, 0)
                count_steps(tokens, first, clusters, steps)
                help_out(
                    wide_warps - warps,
                    3 + solvers,
                    x,
                    layer_output,
                    post_before,
                    comb_before,
                    weight,
                    norm_weight,
                    scale,
                    bias,
                    post_mix,
                    comb_mix,
                    mixes,
                    inv_rms,
                    warp_sums,
                    parts,
                    rest,
                    gates,
                    logits,
                    given,
                    full,
                    steps,
                    first,
                    clusters,
                    rank,
                    warp,
                    lane,
                    norm_eps,
                    pre_eps,
                    sinkhorn_eps,
                    post_mult,
                    repeat,
                    tf32,
                )

    weight_shape = T.Tensor[(MIXES, size), weight_dtype]
    norm_type = T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32]
    if not has_post:

        @T.prim_func
        def pre_cluster_fwd_kernel(
            x: T.Tensor[(tokens, size), T.bfloat16],
            weight: weight_shape,
            norm_weight: norm_type,
            scale: T.Tensor[(3,), scale_dtype],
            bias: T.Tensor[(MIXES,), bias_dtype],
            layer_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
            post_mix: T.Tensor[(tokens, N), T.float32],
            comb_mix: T.Tensor[(tokens, N * N), T.float32],
            mixes: T.Tensor[(tokens, MIXES), T.float32],
            inv_rms: T.Tensor[(tokens,), T.float32],
            norm_eps: T.float32,
            pre_eps: T.float32,
            sinkhorn_eps: T.float32,
            post_mult: T.float32,
            repeat: T.int32,
            tf32: T.int32,
            clusters: T.int32,
        ):
            body(
                x,
                None,
                None,
                None,
                weight,
                norm_weight,
                scale,
                bias,
                None,
                layer_input,
                post_mix,
                comb_mix,
                mixes,
                inv_rms,
                norm_eps,
                pre_eps,
                sinkhorn_eps,
                post_mult,
                repeat,
                tf32,
                clusters,
            )

        return pre_cluster_fwd_kernel

    @T.prim_func
    def post_pre_cluster_fwd_kernel(
        layer_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        post_before: T.Tensor[(tokens, N), T.float32],
        comb_before: T.Tensor[(tokens, N, N), T.float32],
        weight: weight_shape,
        norm_weight: norm_type,
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(MIXES,), bias_dtype],
        streams: T.Tensor[(tokens, size), T.bfloat16],
        layer_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        post_mix: T.Tensor[(tokens, N), T.float32],
        comb_mix: T.Tensor[(tokens, N * N), T.float32],
        mixes: T.Tensor[(tokens, MIXES), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        norm_eps: T.float32,
        pre_eps: T.float32,
        sinkhorn_eps: T.float32,
        post_mult: T.float32,
        repeat: T.int32,
        tf32: T.int32,
        clusters: T.int32,
    ):
        body(
            x,
            layer_output,
            post_before,
            comb_before,
            weight,
            norm_weight,
            scale,
            bias,
            streams,
            layer_input,
            post_mix,
            comb_mix,
            mixes,
            inv_rms,
            norm_eps,
            pre_eps,
            sinkhorn_eps,
            post_mult,
            repeat,
            tf32,
            clusters,
        )

    return post_pre_cluster_fwd_kernel


@builder(RING)
def pre_cluster_fwd(
    hidden_size: int,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    return one_pass(
        hidden_size, False, weight_dtype, norm_weight_dtype, scale_dtype, bias_dtype, limits
    )


@builder(RING)
def post_pre_cluster_fwd(
    hidden_size: int,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    return one_pass(
        hidden_size, True, weight_dtype, norm_weight_dtype, scale_dtype, bias_dtype, limits
    )
