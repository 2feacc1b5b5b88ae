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

With a post the ring has the streams before it, and another one, which is shorter, the layer output.
A lane makes its part of the streams of them, rounded, puts it back in their place, and multiplies
it; it stores it when it weighs it.

With a given pre_mix (`delayed`) nothing waits for gates: a lane weighs and stores what it
multiplies, and all sums of a group go to the one CTA that makes its mixes. There no gates tell a
CTA that what it sent was read: who read it sends a few bytes back.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import VECTOR, builder, follow_previous
from tile_mhc.kernels._push import SOURCE, WIDTH, senders
from tile_mhc.kernels._shapes import (
    CLUSTER_TOKENS,
    PRE_COLUMNS,
    PRE_CREDIT,
    PRE_GATES,
    PRE_MIXES,
    PRE_OPERANDS,
    PRE_SHARED,
    PRE_STREAMS,
    PRE_SUMS,
    pre_cluster,
)
from tile_mhc.kernels._weights import norm_shape, rounded_to_tf32
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
GATES = PRE_GATES
# Vectors of sums that all CTAs get.
SHARED_VECTORS = SHARED // WIDTH


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
    blocks: int,
):
    """Start the loads of this lane's vectors of `count` streams of token t into a ring."""
    hidden_size = source.shape[1] // count
    for i in T.unroll(count):
        for b in T.unroll(blocks):
            T.ptx_cp_async(
                T.access_ptr(ring[slot, warp, b, i, lane, 0], "w", VECTOR),
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
def load_factors(io: Any, t0: T.Buffer, lane: T.int32, out: T.Buffer):
    """out = what this lane reads of the factors of the tokens from t0[0] on: with a post N of
    comb_mix and one of post_mix; last one of a given pre_mix. Zeros past the last token."""
    has_post = io.comb_before is not None
    tokens = io.x.shape[0]
    if has_post:
        for e in T.unroll(N):
            t = t0[0] + e * (32 // (N * N)) + lane // (N * N)
            out[e] = 0.0
            if t < tokens:
                out[e] = io.comb_before[t, lane % (N * N) // N, lane % N]
        out[N] = 0.0
        if t0[0] + lane // N < tokens:
            out[N] = io.post_before[t0[0] + lane // N, lane % N]
    if io.pre_before is not None:
        out[N + 1] = 0.0
        if t0[0] + lane // N < tokens:
            out[N + 1] = io.pre_before[t0[0] + lane // N, lane % N]


@T.macro
def store_factors(io: Any, values: T.Buffer, lane: T.int32, given: T.Buffer, buffer: T.int32):
    """given[buffer, token] = comb_mix by rows of what makes one stream, then post_mix; last a given
    pre_mix."""
    if io.comb_before is not None:
        for e in T.unroll(N):
            g = e * (32 // (N * N)) + lane // (N * N)
            given[buffer, g, lane % N, lane % (N * N) // N] = values[e]
        given[buffer, lane // N, N, lane % N] = values[N]
    if io.pre_before is not None:
        given[buffer, lane // N, given.shape[2] - 1, lane % N] = values[N + 1]


class Given(NamedTuple):
    """What a launch is given; None for what there is not."""

    layer_output: Any
    x: Any
    post_before: Any
    comb_before: Any
    pre_before: Any
    weight: Any
    norm_weight: Any
    scale: Any
    bias: Any
    streams: Any
    layer_input: Any
    pre_mix: Any
    post_mix: Any
    comb_mix: Any
    mixes: Any
    inv_rms: Any
    norm_eps: Any
    pre_eps: Any
    sinkhorn_eps: Any
    post_mult: Any
    repeat: Any
    tf32: Any
    clusters: Any


class Own(NamedTuple):
    """What the warps of a CTA share, the mbarriers `full` among it, and where a lane is."""

    ring: Any
    outputs: Any
    others: Any
    warp_sums: Any
    parts: Any
    rest: Any
    credits: Any
    gates: Any
    logits: Any
    factors: Any
    full: Any
    steps: Any
    first: Any
    rank: Any
    warp: Any
    lane: Any


@builder(RING)
def pre_cluster_fwd(
    hidden_size: int,
    has_post: bool,
    delayed: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    limits: Architecture,
):
    tokens = T.dynamic("num_tokens")
    size = N * hidden_size
    cut = pre_cluster(N, hidden_size, has_post, delayed, limits)
    cluster, blocks, warps, kept, solvers, lag, stages, _ = cut
    width = hidden_size // cluster
    threads = cut.groups * 128
    registers, last_registers = cut.registers
    # Warps of the groups that multiply: some of the others are among them.
    wide_warps = threads // 32 - 4
    # Where a group's gates have come, or with a given pre_mix at once, another one is asked for in
    # its place.
    ahead = stages - lag
    # Who sends the sums of a group has had the gates of `lag` groups before: so many steps before
    # this CTA's next one with the same warp for Sinkhorn that must have read those that it has.
    turns = cluster * solvers
    late = turns - lag
    buffers, slots = cut.buffers, cut.slots
    # The mbarriers. A slot of sums from all CTAs is there, or one of those for Sinkhorn: of these
    # the CTA that gets them announces the bytes. Those for Sinkhorn are read: here, or with a given
    # pre_mix, where no gates tell of it, in another CTA, by its turn. Gates are there, and all sums
    # of that group read. All sums of a CTA's warps are there.
    come = 0 if delayed else slots
    read = come + solvers
    gated = read + (turns if delayed else solvers)
    summed = gated + GATES
    counts = [1] * gated + [1 if delayed else 2] * GATES + [warps] * buffers
    # The first of the sums that one CTA gets, and how many.
    start = 0 if delayed else SQUARES
    sent = COUNT - start
    vectors = sent // WIDTH
    # The first mix of these, and those of a token that a lane of a warp for Sinkhorn makes: four
    # lanes have a token.
    first_mix = 0 if delayed else N
    lane_mixes = (MIXES - first_mix) // N
    rows = N + has_post
    factor_rows = (N + 1) * has_post + delayed
    # Vectors, and halves of them, that a lane multiplies.
    pieces = 2 * N * blocks
    has_norm = norm_weight_dtype != ""
    # A lane adds up its squares where registers are short; else tensor cores do, in two operands
    # more, of which the diagonal is theirs. There a post makes fewer columns at a time, too.
    adds_squares = blocks == 2
    operands = PRE_OPERANDS if adds_squares else PRE_OPERANDS + 2
    at_once = 2 if blocks == 2 else 4
    # Streams of a block of columns, of which a warp asks for the weight before it needs it: as many
    # as leave no register to memory.
    early = 0 if cut.groups > 3 else 1 if has_norm or (has_post and blocks == 2) else 3
    # Warps that send sums or make gates, before those for Sinkhorn.
    senders_of = ("rest",) if delayed else ("shared", "gates", "rest")

    @T.macro
    def load_group(io: Any, own: Any, t: T.Buffer, vector: T.Buffer, slot: T.int32, step: T.int32):
        load_own(io.x, N, t[0], vector[0], own.ring, slot, own.warp, own.lane, blocks)
        if has_post:
            load_own(
                io.layer_output,
                1,
                t[0],
                vector[0],
                own.outputs,
                T.truncmod(step, ahead),
                own.warp,
                own.lane,
                blocks,
            )

    @T.macro
    def make_streams(
        own: Any,
        slot: T.int32,
        b: int,
        step: T.int32,
        wide: T.Buffer,
        made: T.Buffer,
    ):
        """`combine` of a post: made, first of which are the streams then, is put in the place in
        the ring of what it is made of, unless nothing is made of it later."""
        pairs = T.view(made, (rows, VECTOR // 2), T.uint32)
        post = T.alloc_local((N,), T.float32)
        comb = T.alloc_local((N,), T.float32)
        total = T.alloc_local((at_once,), T.float32)
        for k in T.unroll(N):
            for v in T.vectorized(VECTOR):
                made[k, v] = own.ring[slot, own.warp, b, k, own.lane, v]
        for v in T.vectorized(VECTOR):
            made[N, v] = own.outputs[T.truncmod(step, ahead), own.warp, b, 0, own.lane, v]
        for v in T.vectorized(N):
            post[v] = own.factors[step % GATES, own.lane // 4, N, v]
        for q in tuple(range(0, VECTOR, at_once)):
            for k in T.unroll(rows):
                for v in T.unroll(at_once // 2):
                    wide[k, 2 * v] = first_of(pairs[k, q // 2 + v])
                    wide[k, 2 * v + 1] = second_of(pairs[k, q // 2 + v])
            for i in T.unroll(N):
                for v in T.vectorized(N):
                    comb[v] = own.factors[step % GATES, own.lane // 4, i, v]
                for v in T.unroll(at_once):
                    total[v] = post[i] * wide[N, v]
                for k in T.unroll(N):
                    for v in T.unroll(at_once):
                        total[v] += comb[k] * wide[k, v]
                for v in T.vectorized(at_once):
                    made[i, q + v] = T.cast(total[v], T.bfloat16)
        if not delayed:
            for i in T.unroll(N):
                for v in T.vectorized(VECTOR):
                    own.ring[slot, own.warp, b, i, own.lane, v] = made[i, v]

    @T.macro
    def send_shared(own: Any):
        """Add up the sums that every CTA gets, and send them there."""
        total = T.alloc_local((WIDTH,), T.float32)
        groups = senders(SHARED_VECTORS, cluster)
        for step in T.serial(own.steps[0]):
            T.mbarrier_wait_parity(own.full[summed + step % buffers], step // buffers % 2)
            if own.lane < SHARED_VECTORS * groups:
                add_sums(own.warp_sums, step % buffers, own.lane % SHARED_VECTORS, warps, total)
            # What comes of this push tells all that the buffer has been read.
            T.sync_warp()
            before_this = step - late
            if before_this >= 0 and before_this % cluster == own.rank:
                T.mbarrier_wait_parity(
                    own.full[read + before_this // cluster % solvers],
                    before_this // turns % 2,
                )
            if own.lane < SHARED_VECTORS * groups:
                for k in T.unroll(cluster // groups):
                    T.evaluate(
                        T.call_extern(
                            "handle",
                            "push_vector",
                            T.access_ptr(
                                own.parts[
                                    step % slots, own.rank, own.lane % SHARED_VECTORS * WIDTH
                                ],
                                "w",
                                WIDTH,
                            ),
                            T.access_ptr(total[0], "r", WIDTH),
                            k * groups + own.lane // SHARED_VECTORS,
                            own.full[step % slots],
                        )
                    )

    @T.macro
    def make_gates(io: Any, own: Any):
        """Make of what all CTAs have sent the gates of each group."""
        t = T.alloc_local((1,), T.int32)
        two = T.alloc_local((2,), T.float32)
        z = T.alloc_local((1,), T.float32)
        # Read once: beside the stream of loads a miss costs a microsecond.
        gate_scale = T.alloc_local((1,), T.float32)
        gate_bias = T.alloc_local((1,), T.float32)
        gate_scale[0] = T.cast(io.scale[0], T.float32)
        gate_bias[0] = T.cast(io.bias[own.lane // GROUP], T.float32)
        m = own.lane // GROUP
        g = own.lane % GROUP
        for step in T.serial(own.steps[0]):
            slot = step % slots
            if own.lane == 0:
                T.mbarrier_arrive_expect_tx(own.full[slot], cluster * SHARED * 4)
            T.mbarrier_wait_parity(own.full[slot], step // slots % 2)
            t[0] = (own.first + step * io.clusters) * GROUP + g
            two[0] = 0.0
            two[1] = 0.0
            for c in T.unroll(cluster):
                two[0] += own.parts[slot, c, own.lane]
                two[1] += own.parts[slot, c, SQUARES + g]
            if not two[1] < LARGE_SQUARES and t[0] < tokens:
                exact_mix(
                    io.x,
                    io.layer_output,
                    io.post_before,
                    io.comb_before,
                    io.weight,
                    io.norm_weight,
                    norm_weight_dtype,
                    t[0],
                    m,
                    io.tf32,
                    two,
                )
            else:
                two[1] = T.rsqrt(two[1] / size + io.norm_eps)
                two[0] = two[0] * two[1]
            logit(two[0], gate_scale[0], gate_bias[0], z)
            sigmoid(z[0], z)
            own.gates[step % GATES, g, m] = z[0] + io.pre_eps
            signal(own.full, gated + step % GATES, own.lane)
            if step % cluster == own.rank and t[0] < tokens:
                io.mixes[t[0], m] = two[0]
                if m == 0:
                    io.inv_rms[t[0]] = two[1]

    @T.macro
    def send_rest(io: Any, own: Any):
        """Add up the other sums, or all, and send them to the CTA whose turn it is."""
        t = T.alloc_local((1,), T.int32)
        total = T.alloc_local((WIDTH,), T.float32)
        more = T.alloc_local((WIDTH,), T.float32)
        if factor_rows > 0:
            # And stores what is given of each group in time for its products: who has found a
            # buffer of sums free for the group before has it.
            values = T.alloc_local((N + 2,), T.float32)
            for s in T.unroll(GATES + 1):
                t[0] = (own.first + s * io.clusters) * GROUP
                load_factors(io, t, own.lane, values)
                if s < GATES:
                    store_factors(io, values, own.lane, own.factors, s)
            T.sync_threads(BARRIER, warps * 32 + 32)
        for step in T.serial(own.steps[0]):
            T.mbarrier_wait_parity(own.full[summed + step % buffers], step // buffers % 2)
            for turn in tuple(range(-(-vectors // 32))):
                if turn * 32 + own.lane < vectors:
                    add_sums(
                        own.warp_sums,
                        step % buffers,
                        start // WIDTH + turn * 32 + own.lane,
                        warps,
                        more if turn else total,
                    )
            if factor_rows > 0:
                store_factors(io, values, own.lane, own.factors, step % GATES)
                t[0] = (own.first + (step + GATES + 1) * io.clusters) * GROUP
                load_factors(io, t, own.lane, values)
            signal(own.full, gated + step % GATES, own.lane)
            if delayed and step >= turns:
                if own.lane == 0:
                    T.mbarrier_arrive_expect_tx(own.full[read + step % turns], WIDTH * 4)
                T.mbarrier_wait_parity(own.full[read + step % turns], (step // turns - 1) % 2)
            for turn in tuple(range(-(-vectors // 32))):
                if turn * 32 + own.lane < vectors:
                    T.evaluate(
                        T.call_extern(
                            "handle",
                            "push_vector",
                            T.access_ptr(
                                own.rest[
                                    step // cluster % solvers,
                                    own.rank,
                                    (turn * 32 + own.lane) * WIDTH,
                                ],
                                "w",
                                WIDTH,
                            ),
                            T.access_ptr((more if turn else total)[0], "r", WIDTH),
                            step % cluster,
                            own.full[come + step // cluster % solvers],
                        )
                    )

    @T.macro
    def solve(io: Any, own: Any, solver: T.int32):
        """The other mixes, or all, and Sinkhorn's steps, of this warp's groups."""
        t = T.alloc_local((1,), T.int32)
        products = T.alloc_local((lane_mixes,), T.float32)
        squared = T.alloc_local((1,), T.float32)
        value = T.alloc_local((2,), T.float32)
        z = T.alloc_local((1,), T.float32)
        matrix = T.alloc_local((1, N), T.float32)
        gate_scale = T.alloc_local((3,), T.float32)
        gate_bias = T.alloc_local((lane_mixes,), T.float32)
        nothing = T.alloc_local((WIDTH,), T.float32)
        # The mixes of a token are spread over four lanes.
        g = own.lane % GROUP
        own_mix = first_mix + own.lane // GROUP * lane_mixes
        for k in T.unroll(3):
            gate_scale[k] = T.cast(io.scale[k], T.float32)
        for k in T.unroll(lane_mixes):
            gate_bias[k] = T.cast(io.bias[own_mix + k], T.float32)
        if delayed:
            for v in T.unroll(WIDTH):
                nothing[v] = 0.0
        for turn in T.serial(
            T.truncdiv(own.steps[0] - own.rank - solver * cluster + turns - 1, turns)
        ):
            if own.lane == 0:
                T.mbarrier_arrive_expect_tx(own.full[come + solver], cluster * sent * 4)
            T.mbarrier_wait_parity(own.full[come + solver], turn % 2)
            step = (turn * solvers + solver) * cluster + own.rank
            t[0] = (own.first + step * io.clusters) * GROUP + g
            squared[0] = 0.0
            for k in T.unroll(lane_mixes):
                products[k] = 0.0
            for c in T.unroll(cluster):
                squared[0] += own.rest[solver, c, SQUARES - start + g]
                for k in T.unroll(lane_mixes):
                    m = own_mix + k
                    at = m + (T.Select(m < N, 0, 1) if delayed else 1)
                    products[k] += own.rest[solver, c, at * GROUP - start + g]
            T.sync_warp()
            if delayed:
                # What nobody waits for may come when that CTA is gone.
                if own.lane < cluster and step + turns < own.steps[0]:
                    T.evaluate(
                        T.call_extern(
                            "handle",
                            "push_vector",
                            T.access_ptr(own.credits[step % turns, 0], "w", WIDTH),
                            T.access_ptr(nothing[0], "r", WIDTH),
                            own.lane,
                            own.full[read + step % turns],
                        )
                    )
            elif own.lane == 0:
                T.mbarrier_arrive(own.full[read + solver])
            for k in T.unroll(lane_mixes):
                m = own_mix + k
                if not squared[0] < LARGE_SQUARES and t[0] < tokens:
                    exact_mix(
                        io.x,
                        io.layer_output,
                        io.post_before,
                        io.comb_before,
                        io.weight,
                        io.norm_weight,
                        norm_weight_dtype,
                        t[0],
                        m,
                        io.tf32,
                        value,
                    )
                else:
                    value[1] = T.rsqrt(squared[0] / size + io.norm_eps)
                    value[0] = products[k] * value[1]
                logit(
                    value[0],
                    T.Select(
                        m < N, gate_scale[0], T.Select(m < 2 * N, gate_scale[1], gate_scale[2])
                    ),
                    gate_bias[k],
                    z,
                )
                if t[0] < tokens:
                    io.mixes[t[0], m] = value[0]
                    if delayed and m == 0:
                        io.inv_rms[t[0]] = value[1]
                if m >= 2 * N:
                    own.logits[solver, g, m - 2 * N] = z[0]
                elif t[0] < tokens:
                    sigmoid(z[0], z)
                    if delayed and m < N:
                        io.pre_mix[t[0], m] = z[0] + io.pre_eps
                    else:
                        io.post_mix[t[0], m - N] = z[0] * io.post_mult
            T.sync_warp()
            # Four lanes have a token, each a row; also past the last token.
            for j in T.vectorized(N):
                matrix[0, j] = own.logits[solver, g, own.lane // GROUP * N + j]
            sinkhorn_rows(matrix, N, GROUP, io.repeat, io.sinkhorn_eps)
            if t[0] < tokens:
                for j in T.vectorized(N):
                    io.comb_mix[t[0], own.lane // GROUP * N + j] = matrix[0, j]
            T.sync_warp()

    @T.macro
    def help_out(io: Any, own: Any, begin: int, end: int):
        """What one of the warps from `begin` to `end`, behind those that multiply, does."""
        for role in tuple(range(begin, min(end, len(senders_of)))):
            if own.warp == warps + role:
                if senders_of[role] == "shared":
                    send_shared(own)
                elif senders_of[role] == "gates":
                    make_gates(io, own)
                else:
                    send_rest(io, own)
        solver = own.warp - warps - len(senders_of)
        if end > len(senders_of) and solver >= 0 and solver < solvers:
            solve(io, own, solver)

    @T.macro
    def multiply_and_weigh(io: Any, own: Any):
        """What one of the warps that have columns does."""
        # Indices of global memory as variables: see `contract_cluster_fwd`.
        t = T.alloc_local((1,), T.int32)
        raw = T.alloc_local((early + 1, 3, VECTOR), T.float32)
        scales = T.alloc_local((early + 1, VECTOR), T.float32)
        high = T.alloc_local((3, VECTOR), T.bfloat16)
        high_words = T.view(high, (3, VECTOR // 2), T.uint32)
        low = T.alloc_local((3, VECTOR), T.bfloat16)
        w = T.alloc_local((kept * VECTOR,), T.bfloat16)
        values = T.alloc_local((VECTOR,), T.bfloat16)
        a = T.alloc_local((VECTOR,), T.bfloat16)
        # A token's elements by themselves, for the diagonal: as the upper rows the first
        # half of a vector, as the lower rows the second.
        alone = T.alloc_local((VECTOR,), T.bfloat16)
        sums = T.alloc_local((operands, 4), T.float32)
        square = T.alloc_local((2,), T.float32)
        current = T.alloc_local((VECTOR,), T.bfloat16)
        current_words = T.view(current, (VECTOR // 2,), T.uint32)
        pair = T.alloc_local((2,), T.float32)
        mix = T.alloc_local((N,), T.float32)
        # By itself: a product takes no buffer of which there is a view.
        held = T.alloc_local((VECTOR,), T.bfloat16)
        words = T.view(held, (VECTOR // 2,), T.uint32)
        total = T.alloc_local((VECTOR,), T.float32)
        vector = T.alloc_local((1,), T.int32)
        if has_post:
            wide = T.alloc_local((rows, at_once), T.float32)
            made = T.alloc_local((rows, VECTOR), T.bfloat16)
        # Of the ring: where this step's group is.
        slot = T.alloc_local((1,), T.int32)
        warp = own.warp
        lane = own.lane
        row = lane // 4
        vector[0] = (own.rank * width + warp * blocks * PRE_COLUMNS) // VECTOR + lane % 4
        for s in T.unroll(ahead):
            if s < own.steps[0]:
                # Past the last token it again: what comes of it nobody stores.
                t[0] = T.min((own.first + s * io.clusters) * GROUP + row, tokens - 1)
                load_group(io, own, t, vector, s, s)
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
                    io.weight,
                    io.norm_weight,
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
            if has_norm:
                for p in T.unroll(3):
                    for v in T.unroll(VECTOR):
                        raw[now, p, v] *= scales[now, v]
            if io.tf32 != 0:
                for p in T.unroll(3):
                    for v in T.unroll(VECTOR):
                        raw[now, p, v] = rounded_to_tf32(raw[now, p, v])
            # Two values at a time: what a warp does once it waits for, instruction by instruction.
            for p in T.unroll(3):
                for v in T.vectorized(VECTOR):
                    high[p, v] = T.cast(raw[now, p, v], T.bfloat16)
                for v in T.unroll(VECTOR // 2):
                    raw[now, p, 2 * v] -= first_of(high_words[p, v])
                    raw[now, p, 2 * v + 1] -= second_of(high_words[p, v])
                for v in T.vectorized(VECTOR):
                    low[p, v] = T.cast(raw[now, p, v], T.bfloat16)
            # High parts of 16 mixes; both parts of the other eight; low parts of the 16.
            of_rows = ((high, 0, high, 1), (high, 2, low, 2), (low, 0, low, 1))
            for p, half in tuple((p, half) for p in range(PRE_OPERANDS) for half in (0, 1)):
                k = p * pieces + 2 * piece + half
                upper, upper_row, lower, lower_row = of_rows[p]
                for v in tuple(range(4)):
                    a[place(v, False)] = upper[upper_row, half * 4 + v]
                    a[place(v, True)] = lower[lower_row, half * 4 + v]
                if k < kept:
                    for v in T.unroll(VECTOR):
                        w[k * VECTOR + v] = a[v]
                else:
                    for v in T.vectorized(VECTOR):
                        own.others[warp, k - kept, lane, v] = a[v]
        slot[0] = 0
        if factor_rows > 0:
            T.sync_threads(BARRIER, warps * 32 + 32)
        # The first groups' products, then each group's beside what is made of an older one,
        # then what is left: without a condition in between, instructions of both mix. With a given
        # pre_mix all of a group is made in one step.
        phases = ((True, True),) if delayed else ((True, False), (True, True), (False, True))
        for multiplies, finishes in phases:
            for step in T.serial(
                (T.max(own.steps[0], lag) if not multiplies else lag) if finishes else 0,
                (own.steps[0] if multiplies else own.steps[0] + lag)
                if finishes
                else T.min(own.steps[0], lag),
            ):
                if multiplies:
                    T.ptx_wait_group(ahead - 1)
                    for k in T.unroll(4):
                        for p in T.unroll(operands):
                            sums[p, k] = 0.0
                    if adds_squares:
                        square[0] = 0.0
                        square[1] = 0.0
                else:
                    slot[0] = T.truncmod(step, stages)
                older = T.Select(slot[0] < lag, slot[0] + stages, slot[0]) - lag
                if delayed:
                    # What is given is there, and the buffer for the sums read.
                    earlier = step + 2 * GATES - buffers
                    T.mbarrier_wait_parity(own.full[gated + earlier % GATES], earlier // GATES % 2)
                elif finishes:
                    T.mbarrier_wait_parity(
                        own.full[gated + (step - lag) % GATES], (step - lag) // GATES % 2
                    )
                if finishes:
                    t[0] = (own.first + (step - lag) * io.clusters) * GROUP + row
                    for v in T.vectorized(N):
                        if delayed:
                            mix[v] = own.factors[step % GATES, row, factor_rows - 1, v]
                        else:
                            mix[v] = own.gates[(step - lag) % GATES, row, v]
                # Loops over a tuple: see `contract_cluster_fwd`.
                for b, i in tuple((b, i) for b in range(blocks) for i in range(N)):
                    if multiplies and has_post:
                        if i == 0:
                            make_streams(own, slot[0], b, step, wide, made)
                        for v in T.unroll(VECTOR):
                            values[v] = made[i, v]
                    elif multiplies:
                        for v in T.vectorized(VECTOR):
                            values[v] = own.ring[slot[0], warp, b, i, lane, v]
                    if finishes:
                        for v in T.vectorized(VECTOR):
                            if delayed:
                                held[v] = values[v]
                            else:
                                held[v] = own.ring[older, warp, b, i, lane, v]
                    if multiplies and adds_squares:
                        for v in T.vectorized(VECTOR):
                            current[v] = values[v]
                        for k in T.unroll(VECTOR // 2):
                            square[0] += first_of(current_words[k]) * first_of(current_words[k])
                            square[1] += second_of(current_words[k]) * second_of(current_words[k])
                    if multiplies and not adds_squares:
                        for v in T.unroll(4):
                            for u in T.unroll(2):
                                alone[(v % 2 * 2 + v // 2) * 2 + u] = values[v * 2 + u]
                    if multiplies:
                        for half in (0, 1):
                            piece = 2 * (b * N + i) + half
                            for p in tuple(range(PRE_OPERANDS)):
                                k = p * pieces + piece
                                if k < kept:
                                    multiply(w, values, half * 4, sums, p, k * VECTOR)
                                else:
                                    for v in T.vectorized(VECTOR):
                                        a[v] = own.others[warp, k - kept, lane, v]
                                    multiply(a, values, half * 4, sums, p)
                            if not adds_squares:
                                multiply(alone, values, half * 4, sums, PRE_OPERANDS + half)
                    if finishes:
                        if i == 0:
                            for v in T.unroll(VECTOR):
                                total[v] = 0.0
                        weigh(mix[i], words, total)
                        if i == N - 1 and t[0] < tokens:
                            for v in T.vectorized(VECTOR):
                                io.layer_input[t[0], vector[0] * VECTOR + b * PRE_COLUMNS + v] = (
                                    T.cast(total[v], T.bfloat16)
                                )
                        if has_post and t[0] < tokens:
                            for v in T.vectorized(VECTOR):
                                io.streams[
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
                        own.warp_sums[buffer, warp, row * GROUP + row // N * GROUP + g + k] = pair[
                            k
                        ]
                    for k in T.unroll(2):
                        pair[k] = sums[0, 2 + k] + sums[2, 2 + k]
                    for k in T.vectorized(2):
                        own.warp_sums[buffer, warp, (row + 9) * GROUP + g + k] = pair[k]
                    for k in T.unroll(2):
                        pair[k] = sums[1, k] + sums[1, 2 + k]
                    for k in T.vectorized(2):
                        own.warp_sums[buffer, warp, (row + 17) * GROUP + g + k] = pair[k]
                    if adds_squares:
                        square[0] += square[1]
                        square[0] += T.shfl_xor(square[0], 1)
                        square[0] += T.shfl_xor(square[0], 2)
                        if lane % 4 == 0:
                            own.warp_sums[buffer, warp, SQUARES + row] = square[0]
                    else:
                        for k in T.unroll(2):
                            if row == g + k:
                                own.warp_sums[buffer, warp, SQUARES + row] = (
                                    sums[PRE_OPERANDS, k] + sums[PRE_OPERANDS + 1, 2 + k]
                                )
                    signal(own.full, summed + buffer, lane)
                if multiplies:
                    if step + ahead < own.steps[0]:
                        t[0] = T.min(
                            (own.first + (step + ahead) * io.clusters) * GROUP + row,
                            tokens - 1,
                        )
                        load_group(io, own, t, vector, older, step)
                    T.ptx_commit_group()
                    slot[0] = T.Select(slot[0] == stages - 1, 0, slot[0] + 1)

    @T.macro
    def work(io: Any, own: Any):
        """What each warp does, with the registers of its group of four."""
        if own.warp < wide_warps:
            if registers != last_registers:
                T.set_max_nreg(registers, 1)
            count_steps(tokens, own.first, io.clusters, own.steps)
            if own.warp < warps:
                multiply_and_weigh(io, own)
            else:
                help_out(io, own, 0, wide_warps - warps)
        else:
            if registers != last_registers:
                T.set_max_nreg(last_registers, 0)
            count_steps(tokens, own.first, io.clusters, own.steps)
            help_out(io, own, wide_warps - warps, len(senders_of) + solvers)

    @T.prim_func
    def pre_cluster_fwd_kernel(
        layer_output: T.Tensor[(tokens, hidden_size) if has_post else (1,), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        post_before: T.Tensor[(tokens, N) if has_post else (1,), T.float32],
        comb_before: T.Tensor[(tokens, N, N) if has_post else (1,), T.float32],
        pre_before: T.Tensor[(tokens, N) if delayed else (1,), T.float32],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(MIXES,), bias_dtype],
        streams: T.Tensor[(tokens, size) if has_post else (1,), T.bfloat16],
        layer_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        pre_mix: T.Tensor[(tokens, N) if delayed else (1,), T.float32],
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
        with T.Kernel(clusters * cluster, threads=threads, cluster_dims=(cluster, 1, 1)) as cta:
            T.import_source(SOURCE)
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            ring = T.alloc_shared((stages, warps, blocks, N, 32, VECTOR), T.bfloat16)
            outputs = T.alloc_shared(
                (ahead, warps, blocks, 1, 32, VECTOR) if has_post else (1,) * 6, T.bfloat16
            )
            others = T.alloc_shared(
                (warps, cut.operands - kept, 32, VECTOR) if kept < cut.operands else (1,) * 4,
                T.bfloat16,
            )
            warp_sums = T.alloc_shared((buffers, warps, COUNT), T.float32)
            parts = T.alloc_shared((1,) * 3 if delayed else (slots, cluster, SHARED), T.float32)
            rest = T.alloc_shared((solvers, cluster, sent), T.float32)
            credits = T.alloc_shared((turns, PRE_CREDIT) if delayed else (1, 1), T.float32)
            gates = T.alloc_shared((1,) * 3 if delayed else (GATES, GROUP, N), T.float32)
            logits = T.alloc_shared((solvers, GROUP, N * N), T.float32)
            factors = T.alloc_shared(
                (GATES, GROUP, factor_rows, N) if factor_rows else (1,) * 4, T.float32
            )
            full = T.alloc_cluster_barrier(counts)
            steps = T.alloc_local((1,), T.int32)
            work(
                Given(
                    layer_output if has_post else None,
                    x,
                    post_before if has_post else None,
                    comb_before if has_post else None,
                    pre_before if delayed else None,
                    weight,
                    norm_weight,
                    scale,
                    bias,
                    streams,
                    layer_input,
                    pre_mix,
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
                ),
                Own(
                    ring,
                    outputs,
                    others,
                    warp_sums,
                    parts,
                    rest,
                    credits,
                    gates,
                    logits,
                    factors,
                    full,
                    steps,
                    first,
                    rank,
                    warp,
                    lane,
                ),
            )

    return pre_cluster_fwd_kernel
