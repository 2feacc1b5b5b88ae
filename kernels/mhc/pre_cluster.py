"""All of a pre with four streams in one pass over them: projection, gates, Sinkhorn, aggregate; and
with it the post before, which makes those streams.

As in `contract_cluster`, a cluster of CTAs keeps its tokens in shared memory until their gates are
known: see there for the steps, and the one barrier of each. What 24 mixes change:

- In two parts they are 48 rows, three operands of a tensor core. What of them does not fit the
  registers lies in shared memory as the lanes need it.
- A lane multiplies, and later weighs, the very vectors that it has loaded: the ring is its own, and
  nobody else waits for it.
- Every CTA needs the first four mixes of all tokens. The others go to one CTA of the cluster, each
  group of tokens to the next one, where a warp of its own, which does not take part in the barrier
  of the steps, takes Sinkhorn's steps while the others go on.
- The sums are added up, and sent, by all warps that multiply: for one warp that would take longer
  than all else in a step. What goes to another CTA is stored there by st.async, which waits for
  nothing.
- A group's gates come `lag` steps after its products: with two, what CTAs give one another has a
  step of its own to arrive in.

With a post the ring has the streams before it and the layer output. A lane makes its part of the
streams of them, rounded, puts it back in their place, and multiplies it; it stores it when it
weighs it.
"""

from typing import Any

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import VECTOR, builder, follow_previous
from tile_mhc.kernels._shapes import (
    CLUSTER_SLOTS,
    CLUSTER_TOKENS,
    PRE_COLUMNS,
    PRE_MIXES,
    PRE_OPERANDS,
    PRE_SHARED,
    PRE_STREAMS,
    pre_cluster,
)
from tile_mhc.kernels.contract_cluster import BARRIER, RING, count_steps, multiply
from tile_mhc.kernels.mixes import logit, sigmoid
from tile_mhc.kernels.projection import (
    LARGE_SQUARES,
    RESCUE_SCALE,
    high_part,
    low_part,
    norm_shape,
    rounded_to_tf32,
    weight_value,
)
from tile_mhc.kernels.sinkhorn import sinkhorn_token

GROUP = CLUSTER_TOKENS
N = PRE_STREAMS
MIXES = PRE_MIXES
SLOTS = CLUSTER_SLOTS
# Sums of a group of tokens: the first N mixes, squares, then the other mixes, all tokens of each.
# Every CTA gets the first SHARED of them; one gets those from SQUARES on.
SQUARES = N * GROUP
SHARED = PRE_SHARED
COUNT = (MIXES + 1) * GROUP
REST = COUNT - SQUARES
# Mixes of a token that a lane of the last warp makes: four lanes have a token.
LANE_MIXES = (MIXES - N) // N
# Of the mbarriers behind those of the slots: the other sums have come; and have been read. Those of
# sums have bytes to come, which the CTA that gets them announces.
COME, READ = SLOTS, SLOTS + 1
# Vectors, and halves of them, that a lane multiplies: one per stream.
PIECES = 2 * N


def place(piece: int, v: int, lower: bool):
    """Where value v of a lane's vector lies in operand 2 * piece + v // 4, for the rows from 0 or 8
    on. Which columns a lane's values come from does not matter, as long as both operands agree:
    here it has eight neighbours, where the tensor core's layout has pairs."""
    return (2 * piece + v // 4) * VECTOR + v % 4 // 2 * 4 + 2 * lower + v % 2


def vector_of(vector: T.int32, i: int, hidden_size: int):
    """The element of stream i at which a lane's vector begins; `vector` counts in vectors."""
    return (vector + i * (hidden_size // VECTOR)) * VECTOR


@T.macro
def load_own(
    source: T.Tensor,
    count: int,
    t: T.Buffer,
    vector: T.int32,
    ring: T.Buffer,
    slot: T.int32,
    warp: T.int32,
    lane: T.int32,
    to: int,
):
    """Start the loads of this lane's vectors of `count` streams of token t[0], into those of the
    ring from `to` on; zeros past the last token."""
    hidden_size = source.shape[1] // count
    if t[0] < source.shape[0]:
        for i in T.unroll(count):
            T.ptx_cp_async(
                T.access_ptr(ring[slot, warp, to + i, lane, 0], "w", VECTOR),
                T.access_ptr(source[t[0], vector_of(vector, i, hidden_size)], "r", VECTOR),
                VECTOR,
            )
    else:
        for i in T.unroll(count):
            for v in T.vectorized(VECTOR):
                ring[slot, warp, to + i, lane, v] = T.cast(0, T.bfloat16)


@T.macro
def weigh(mix: T.Buffer, words: T.Buffer, out: T.Buffer):
    """`weighted_sum` of streams whose elements lie in pairs: an instruction each to unpack them."""
    for v in T.unroll(VECTOR):
        out[v] = 0.0
    for i in T.unroll(N):
        for k in T.unroll(VECTOR // 2):
            out[2 * k] += mix[i] * first_of(words[i, k])
            out[2 * k + 1] += mix[i] * second_of(words[i, k])


def first_of(word: T.uint32):
    return T.reinterpret(word << 16, T.float32)


def second_of(word: T.uint32):
    return T.reinterpret(word & 0xFFFF0000, T.float32)


@T.macro
def send(value: T.float32, target: T.PrimExpr, cta: T.int32, full: T.PrimExpr):
    """Store a number in a CTA of the cluster, and tell `full` there that its bytes have come.

    Of a register, and nothing is waited for. TileLang's own copy to another CTA, as in `push_sums`,
    arrives at the barrier there first, and waits until that has been seen before it sends anything.
    """
    T.evaluate(
        T.call_extern(
            "handle",
            "cute::store_shared_remote",
            T.reinterpret(value, T.uint32),
            T.call_extern("uint32", "smem_ptr_to_uint", T.access_ptr(target, "w", 1)),
            T.call_extern("uint32", "smem_ptr_to_uint", T.access_ptr(full, "rw", 1)),
            T.cast(cta, T.uint32),
        )
    )


@T.macro
def share_sums(
    warp_sums: T.Buffer,
    step: T.int32,
    parts: T.Buffer,
    rest: T.Buffer,
    full: T.Buffer,
    rank: T.int32,
    warp: T.int32,
    lane: T.int32,
    cluster: int,
    warps: int,
    total: T.Buffer,
):
    """Add up some of what the warps of this CTA have, and send it to those who need it.

    Each warp takes as many sums: 16 at a time, of two lanes each, which share the warps and, of
    what goes to all, the CTAs; or 32, where warps are few.
    """
    sharing = 2 if warps * 16 >= COUNT else 1
    each = 32 // sharing
    part = lane // each
    targets = cluster // sharing
    for turn in T.unroll(-(-COUNT // (warps * each))):
        k = (turn * warps + warp) * each + lane % each
        total[0] = 0.0
        if k < COUNT:
            for q in T.unroll(-(-warps // sharing)):
                if q * sharing + part < warps:
                    total[0] += warp_sums[step % 2, q * sharing + part, k]
        if sharing == 2:
            total[0] += T.shfl_xor(total[0], each)
        if k < SHARED:
            for c in T.unroll(targets):
                send(
                    total[0],
                    parts[step % SLOTS, rank, k],
                    part * targets + c,
                    full[step % SLOTS],
                )
        if k >= SQUARES and k < COUNT and part == 0:
            send(total[0], rest[rank, k - SQUARES], step % cluster, full[COME])


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
    cluster, lag, stages, kept = pre_cluster(N, hidden_size, has_post, limits)
    width = hidden_size // cluster
    warps = width // PRE_COLUMNS
    # Of the barrier of the steps: all but the last warp.
    members = warps * 32 + 32
    threads = members + 32
    # Where a group's gates have come, another one is asked for in its place.
    ahead = stages - lag
    # Who sends the sums of a group has seen what all sent `lag` groups before: so many steps before
    # this CTA's next one its last warp must have read those that it has.
    late = cluster - lag
    rows = N + has_post
    # Whether registers have room for what is weighed before its gates are there.
    early = kept == PRE_OPERANDS and not has_post
    has_norm = norm_weight_dtype != ""

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
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            rank = cta % cluster
            first = cta // cluster
            ring = T.alloc_shared((stages, warps, rows, 32, VECTOR), T.bfloat16)
            if kept < PRE_OPERANDS:
                low = T.alloc_shared((warps, PIECES, 32, VECTOR), T.bfloat16)
            warp_sums = T.alloc_shared((2, warps, COUNT), T.float32)
            parts = T.alloc_shared((SLOTS, cluster, SHARED), T.float32)
            rest = T.alloc_shared((cluster, REST), T.float32)
            gates = T.alloc_shared((2, GROUP, N), T.float32)
            logits = T.alloc_shared((GROUP, N * N), T.float32)
            if has_post:
                given = T.alloc_shared((2, GROUP, N + 1, N), T.float32)
            full = T.alloc_cluster_barrier([1] * (SLOTS + 2))
            steps = T.alloc_local((1,), T.int32)
            count_steps(tokens, first, clusters, steps)
            # Indices of global memory as variables: see `contract_cluster_fwd`.
            t = T.alloc_local((1,), T.int32)
            if warp < warps:
                raw = T.alloc_local((3, VECTOR), T.float32)
                w = T.alloc_local((kept * PIECES * VECTOR,), T.bfloat16)
                values = T.alloc_local((VECTOR,), T.bfloat16)
                a = T.alloc_local((VECTOR,), T.bfloat16)
                # A token's elements by themselves, for the diagonal; its other rows are zero.
                own = T.alloc_local((VECTOR,), T.bfloat16)
                sums = T.alloc_local((PRE_OPERANDS + 1, 4), T.float32)
                pair = T.alloc_local((2,), T.float32)
                mix = T.alloc_local((N,), T.float32)
                held = T.alloc_local((N, VECTOR), T.bfloat16)
                words = T.view(held, (N, VECTOR // 2), T.uint32)
                total = T.alloc_local((VECTOR,), T.float32)
                vector = T.alloc_local((1,), T.int32)
                if has_post:
                    before = T.alloc_local((rows, 4), T.bfloat16)
                    pairs = T.view(before, (rows, 2), T.uint32)
                    wide = T.alloc_local((rows, 4), T.float32)
                    post = T.alloc_local((N,), T.float32)
                    comb = T.alloc_local((N,), T.float32)
                # Of the ring: where this step's group is, and where that of `lag` steps before.
                slots = T.alloc_local((2,), T.int32)
                row = lane // 4
                vector[0] = (rank * width + warp * PRE_COLUMNS) // VECTOR + lane % 4
                for s in T.unroll(ahead):
                    if s < steps[0]:
                        t[0] = (first + s * clusters) * GROUP + row
                        load_own(x, N, t, vector[0], ring, s, warp, lane, 0)
                        if has_post:
                            load_own(layer_output, 1, t, vector[0], ring, s, warp, lane, N)
                    T.ptx_commit_group()
                # A lane has eight columns of every stream, of mixes `row`, row + 8 and row + 16.
                for i in tuple(range(N)):
                    for p in T.unroll(3):
                        for q in T.unroll(VECTOR // 4):
                            for v in T.vectorized(4):
                                raw[p, q * 4 + v] = T.cast(
                                    weight[
                                        row + p * 8,
                                        (vector[0] * 2 + i * (hidden_size // 4) + q) * 4 + v,
                                    ],
                                    T.float32,
                                )
                        for v in T.unroll(VECTOR):
                            if has_norm:
                                raw[p, v] *= T.cast(
                                    norm_weight[vector_of(vector[0], i, hidden_size) + v],
                                    T.float32,
                                )
                            if tf32 != 0:
                                raw[p, v] = rounded_to_tf32(raw[p, v])
                    # High parts of 16 mixes; both parts of the other eight; low parts of the 16.
                    for v in tuple(range(VECTOR)):
                        w[place(i, v, False)] = high_part(raw[0, v])
                        w[place(i, v, True)] = high_part(raw[1, v])
                        w[place(i + N, v, False)] = high_part(raw[2, v])
                        w[place(i + N, v, True)] = low_part(raw[2, v])
                        if kept == PRE_OPERANDS:
                            w[place(i + 2 * N, v, False)] = low_part(raw[0, v])
                            w[place(i + 2 * N, v, True)] = low_part(raw[1, v])
                    if kept < PRE_OPERANDS:
                        for half in (0, 1):
                            for v in tuple(range(4)):
                                a[place(0, v, False)] = low_part(raw[0, half * 4 + v])
                                a[place(0, v, True)] = low_part(raw[1, half * 4 + v])
                            for v in T.vectorized(VECTOR):
                                low[warp, 2 * i + half, lane, v] = a[v]
                for v in T.unroll(VECTOR):
                    own[v] = T.cast(0, T.bfloat16)
                slots[0] = 0
                slots[1] = stages - lag
                if has_post:
                    T.sync_threads(BARRIER, members)
                for step in T.serial(steps[0] + lag):
                    # Here and not within the condition, past which registers would be kept alive
                    # for what they hold where it is false.
                    for k in T.unroll(4):
                        for p in T.unroll(PRE_OPERANDS + 1):
                            sums[p, k] = 0.0
                    for v in T.unroll(VECTOR):
                        values[v] = T.cast(0, T.bfloat16)
                    if step < steps[0]:
                        T.ptx_wait_group(ahead - 1)
                        # Loops over a tuple: see `contract_cluster_fwd`.
                        for half, i in tuple((half, i) for half in (0, 1) for i in range(N)):
                            if has_post:
                                if i == 0:
                                    for k in T.unroll(rows):
                                        for v in T.vectorized(4):
                                            before[k, v] = ring[
                                                slots[0], warp, k, lane, half * 4 + v
                                            ]
                                        for v in T.unroll(2):
                                            wide[k, 2 * v] = first_of(pairs[k, v])
                                            wide[k, 2 * v + 1] = second_of(pairs[k, v])
                                    for v in T.vectorized(N):
                                        post[v] = given[step % 2, row, N, v]
                                # `combine` of a post.
                                for v in T.vectorized(N):
                                    comb[v] = given[step % 2, row, i, v]
                                for v in T.unroll(4):
                                    total[v] = post[i] * wide[N, v]
                                for k in T.unroll(N):
                                    for v in T.unroll(4):
                                        total[v] += comb[k] * wide[k, v]
                                for v in T.vectorized(4):
                                    values[v] = T.cast(total[v], T.bfloat16)
                                for v in T.vectorized(4):
                                    ring[slots[0], warp, i, lane, half * 4 + v] = values[v]
                            else:
                                for v in T.vectorized(4):
                                    values[v] = ring[slots[0], warp, i, lane, half * 4 + v]
                            for p in tuple(range(kept)):
                                operand = p * PIECES + 2 * i + half
                                multiply(w, values, 0, sums, p, operand * VECTOR)
                            if kept < PRE_OPERANDS:
                                for v in T.vectorized(VECTOR):
                                    a[v] = low[warp, 2 * i + half, lane, v]
                                multiply(a, values, 0, sums, kept)
                            for v in T.unroll(4):
                                own[v // 2 * 4 + v % 2] = values[v]
                            multiply(own, values, 0, sums, PRE_OPERANDS)
                        # A lane has two tokens of each of its mixes, by high and by low parts.
                        g = lane % 4 * 2
                        for k in T.unroll(2):
                            pair[k] = sums[0, k] + sums[2, k]
                        for k in T.vectorized(2):
                            warp_sums[step % 2, warp, row * GROUP + row // N * GROUP + g + k] = (
                                pair[k]
                            )
                        for k in T.unroll(2):
                            pair[k] = sums[0, 2 + k] + sums[2, 2 + k]
                        for k in T.vectorized(2):
                            warp_sums[step % 2, warp, (row + 9) * GROUP + g + k] = pair[k]
                        for k in T.unroll(2):
                            pair[k] = sums[1, k] + sums[1, 2 + k]
                        for k in T.vectorized(2):
                            warp_sums[step % 2, warp, (row + 17) * GROUP + g + k] = pair[k]
                        for k in T.unroll(2):
                            if row == g + k:
                                warp_sums[step % 2, warp, SQUARES + row] = sums[PRE_OPERANDS, k]
                    # Nobody else writes them: they come while others are waited for.
                    if early and step >= lag:
                        for i in T.unroll(N):
                            for v in T.vectorized(VECTOR):
                                held[i, v] = ring[slots[1], warp, i, lane, v]
                    T.sync_threads(BARRIER, members)
                    if step < steps[0]:
                        share_sums(
                            warp_sums,
                            step,
                            parts,
                            rest,
                            full,
                            rank,
                            warp,
                            lane,
                            cluster,
                            warps,
                            pair,
                        )
                    if step >= lag:
                        t[0] = (first + (step - lag) * clusters) * GROUP + row
                        for v in T.vectorized(N):
                            mix[v] = gates[(step - lag) % 2, row, v]
                        if not early:
                            for i in T.unroll(N):
                                for v in T.vectorized(VECTOR):
                                    held[i, v] = ring[slots[1], warp, i, lane, v]
                        weigh(mix, words, total)
                        if t[0] < tokens:
                            for v in T.vectorized(VECTOR):
                                layer_input[t[0], vector[0] * VECTOR + v] = T.cast(
                                    total[v], T.bfloat16
                                )
                            if has_post:
                                for i in T.unroll(N):
                                    for v in T.vectorized(VECTOR):
                                        streams[t[0], vector_of(vector[0], i, hidden_size) + v] = (
                                            held[i, v]
                                        )
                    if step + ahead < steps[0]:
                        t[0] = (first + (step + ahead) * clusters) * GROUP + row
                        load_own(x, N, t, vector[0], ring, slots[1], warp, lane, 0)
                        if has_post:
                            load_own(layer_output, 1, t, vector[0], ring, slots[1], warp, lane, N)
                    T.ptx_commit_group()
                    for k in T.unroll(2):
                        slots[k] = T.Select(slots[k] == stages - 1, 0, slots[k] + 1)
            elif warp == warps:
                two = T.alloc_local((2,), T.float32)
                z = T.alloc_local((1,), T.float32)
                # Read once: beside the stream of loads a miss costs a microsecond.
                gate_scale = T.alloc_local((1,), T.float32)
                gate_bias = T.alloc_local((1,), T.float32)
                gate_scale[0] = T.cast(scale[0], T.float32)
                gate_bias[0] = T.cast(bias[lane // GROUP], T.float32)
                if has_post:
                    # A group's factors are stored two barriers before they are read, and asked for
                    # a step before that.
                    factors = T.alloc_local((N + 1,), T.float32)
                    for s in T.unroll(3):
                        t[0] = (first + s * clusters) * GROUP
                        load_factors(post_before, comb_before, t, lane, factors)
                        if s < 2:
                            store_factors(factors, lane, given, s)
                    T.sync_threads(BARRIER, members)
                for step in T.serial(steps[0] + lag):
                    T.sync_threads(BARRIER, members)
                    if step < steps[0]:
                        if lane == 0:
                            T.mbarrier_arrive_expect_tx(full[step % SLOTS], cluster * SHARED * 4)
                        if has_post:
                            store_factors(factors, lane, given, step % 2)
                            t[0] = (first + (step + 3) * clusters) * GROUP
                            load_factors(post_before, comb_before, t, lane, factors)
                    group = step - (lag - 1)
                    if group >= 0 and group < steps[0]:
                        slot = group % SLOTS
                        T.mbarrier_wait_parity(full[slot], group // SLOTS % 2)
                        m = lane // GROUP
                        g = lane % GROUP
                        t[0] = (first + group * clusters) * GROUP + g
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
                        gates[group % 2, g, m] = z[0] + pre_eps
                        if group % cluster == rank and t[0] < tokens:
                            mixes[t[0], m] = two[0]
                            if m == 0:
                                inv_rms[t[0]] = two[1]
                    # Before this CTA sends the sums of the next step.
                    read = step + 1 - late
                    if read >= 0 and read % cluster == rank and step + 1 < steps[0]:
                        T.mbarrier_wait_parity(full[READ], read // cluster % 2)
            else:
                sinkhorns = T.alloc_local((LANE_MIXES,), T.float32)
                squared = T.alloc_local((1,), T.float32)
                value = T.alloc_local((2,), T.float32)
                z = T.alloc_local((1,), T.float32)
                matrix = T.alloc_local((N, N), T.float32)
                gate_scale = T.alloc_local((2,), T.float32)
                gate_bias = T.alloc_local((LANE_MIXES,), T.float32)
                # The mixes of a token are spread over four lanes.
                g = lane % GROUP
                own_mix = lane // GROUP * LANE_MIXES
                for k in T.unroll(2):
                    gate_scale[k] = T.cast(scale[1 + k], T.float32)
                for k in T.unroll(LANE_MIXES):
                    gate_bias[k] = T.cast(bias[N + own_mix + k], T.float32)
                for turn in T.serial(T.truncdiv(steps[0] - rank + cluster - 1, cluster)):
                    if lane == 0:
                        T.mbarrier_arrive_expect_tx(full[COME], cluster * REST * 4)
                    T.mbarrier_wait_parity(full[COME], turn % 2)
                    t[0] = (first + (turn * cluster + rank) * clusters) * GROUP + g
                    squared[0] = 0.0
                    for k in T.unroll(LANE_MIXES):
                        sinkhorns[k] = 0.0
                    for c in T.unroll(cluster):
                        squared[0] += rest[c, g]
                        for k in T.unroll(LANE_MIXES):
                            sinkhorns[k] += rest[c, (own_mix + k + 1) * GROUP + g]
                    T.sync_warp()
                    if lane == 0:
                        T.mbarrier_arrive(full[READ])
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
                            logits[g, own_mix + k - N] = z[0]
                        elif t[0] < tokens:
                            sigmoid(z[0], z)
                            post_mix[t[0], own_mix + k] = z[0] * post_mult
                    T.sync_warp()
                    if lane < GROUP and t[0] < tokens:
                        for i in T.unroll(N):
                            for j in T.vectorized(N):
                                matrix[i, j] = logits[g, i * N + j]
                        sinkhorn_token(matrix, N, repeat, sinkhorn_eps)
                        for i in T.unroll(N):
                            for j in T.vectorized(N):
                                comb_mix[t[0], i * N + j] = matrix[i, j]
                    T.sync_warp()

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
