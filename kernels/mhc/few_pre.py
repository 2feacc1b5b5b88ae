"""A pre of few tokens with four streams, and the post before it: two launches, which wait for
latency and not for memory.

The first has the columns of H: a CTA takes FEW_COLUMNS of every stream, of one group of tokens or
several at a time, and a warp makes and multiplies one stream of a part of them, so that what it has
to do before its first result is short; of more tokens all four. The second has the tokens: a CTA
adds up what the columns have left of one token, all of it asked for at once, weighs its streams and
takes their norm, while one warp takes Sinkhorn's steps.

With a given pre_mix the second weighs by that, and returns the next; but where a warp of the first
has all four streams, that weighs them, and the second only takes the norm.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    ACCESS,
    BYTES,
    VECTOR,
    builder,
    follow_previous,
)
from tile_mhc.kernels._shapes import FEW_COLUMNS, FEW_ROW, PRE_MIXES, PRE_STREAMS, SMALLEST_ALONE
from tile_mhc.kernels._weights import high_part, low_part, norm_shape, rounded_to_tf32
from tile_mhc.kernels.contract_cluster import BARRIER, RING, first_of, multiply, second_of
from tile_mhc.kernels.mixes import logit, sigmoid
from tile_mhc.kernels.pre_cluster import exact_mix, place, vector_of
from tile_mhc.kernels.projection import LARGE_SQUARES
from tile_mhc.kernels.sinkhorn import sinkhorn_alone, sinkhorn_token

N = PRE_STREAMS
MIXES = PRE_MIXES
# Tokens that the tensor cores take at a time, and columns that a warp does.
GROUP = 8
COLUMNS = 32
BLOCKS = FEW_COLUMNS // COLUMNS
WARPS = BLOCKS * N
# Of the weight of one stream and COLUMNS columns: three pieces, each of two halves.
OPERANDS = 6
# Of a row of sums, what is written: the mixes, the squares, and zeros up to a whole vector.
WRITTEN = MIXES + 4
# Where a token's sums begin in shared memory: its lanes then write to all banks.
PITCH = FEW_ROW + 4
# Warps of the second launch that take the columns of a token, at most, by whether these are weighed
# already: BARRIER is theirs, the next one that of all of its warps.
ROW_WARPS = {False: 15, True: 16}
EVERYBODY = BARRIER + 1
# Of so many threads an SM holds a CTA of the second launch as often as it says, which then waits
# beside one of the first: not at H = 7168, whose registers would have no room for the streams.
# H200, 2026-11, 128x4096, us with 16 warps and with 8 of fewer registers: 16.1 and 14.3.
THREADS = 900


def operand_of(piece: int, v: int, lower: bool):
    """Where value v of a lane's vector lies in operands 2 * piece and the next: see `place`."""
    return (2 * piece + v // 4) * VECTOR + place(v % 4, lower)


@T.macro
def load_step(
    layer_output: T.Tensor,
    x: T.Tensor,
    post_mix: T.Tensor,
    comb_mix: T.Tensor,
    t: T.Buffer,
    vector: T.Buffer,
    first: T.int32,
    before: T.Buffer,
    post: T.Buffer,
    comb: T.Buffer,
    given_mix: T.Tensor,
    given: T.Buffer,
):
    """A lane's vectors of token t[0]: of all streams and the layer output, with the factors of its
    own streams, which are those from `first` on; without a post of its own streams alone. Its
    pre_mix, if that is given."""
    hidden_size = x.shape[1] // N
    own = post.shape[0]
    has_post = len(comb_mix.shape) > 1
    start = 0 if has_post else first
    for i in T.unroll(N if has_post else own):
        for v in T.vectorized(VECTOR):
            before[i, v] = x[t[0], vector_of(vector[0], start + i, hidden_size) + v]
    if has_post:
        for v in T.vectorized(VECTOR):
            before[N, v] = layer_output[t[0], vector[0] * VECTOR + v]
        for v in T.vectorized(own):
            post[v] = post_mix[t[0], first + v]
        for i in T.unroll(N):
            for v in T.vectorized(own):
                comb[i, v] = comb_mix[t[0], i, first + v]
    if len(given_mix.shape) > 1:
        for v in T.vectorized(N):
            given[v] = given_mix[t[0], v]


@builder(RING)
def few_project(
    hidden_size: int,
    has_post: bool,
    own: int,
    collapses: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
):
    """The streams after a post, and their products and squares by columns.

    A warp has some columns of `own` streams of a group of tokens, and the CTA `own` groups at a
    time: a warp with all four reads them once, where each of four reads all of them.
    """
    tokens = T.dynamic("num_tokens")
    size = N * hidden_size
    splits = hidden_size // FEW_COLUMNS
    rows = N + 1 if has_post else own
    # Groups of tokens at a time, each of which so many warps have.
    sets = own
    members = WARPS // sets
    has_norm = norm_weight_dtype != ""
    # Where a warp has all streams, the weight's operands are in shared memory, of which each warp
    # makes one stream's: of all four they would take most of its registers.
    shares = own == N

    @T.prim_func
    def few_project_kernel(
        layer_output: T.Tensor[(tokens, hidden_size) if has_post else (1,), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        post_mix: T.Tensor[(tokens, N) if has_post else (1,), T.float32],
        comb_mix: T.Tensor[(tokens, N, N) if has_post else (1,), T.float32],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        given_mix: T.Tensor[(tokens, N) if collapses else (1,), T.float32],
        streams: T.Tensor[(tokens, size) if has_post else (1,), T.bfloat16],
        layer_input: T.Tensor[(tokens, hidden_size) if collapses else (1,), T.bfloat16],
        sums: T.Tensor[(splits, tokens, FEW_ROW), T.float32],
        steps: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(splits * T.ceildiv(tokens, steps * sets * GROUP), threads=WARPS * 32) as cta:
            follow_previous()
            lane = T.get_thread_binding() % 32
            warp = T.get_thread_binding() // 32
            warp_sums = T.alloc_shared((2, WARPS, GROUP, PITCH), T.float32)
            # Indices of global memory as variables: see `contract_cluster_fwd`.
            place_of = T.alloc_local((3,), T.int32)
            vector = T.alloc_local((1,), T.int32)
            t = T.alloc_local((1,), T.int32)
            raw = T.alloc_local((3, VECTOR), T.float32)
            w = T.alloc_local((OPERANDS * VECTOR,), T.bfloat16)
            if shares:
                operands = T.alloc_shared((WARPS, OPERANDS, 32, VECTOR), T.bfloat16)
            before = T.alloc_local((rows, VECTOR), T.bfloat16)
            words = T.view(before, (rows, VECTOR // 2), T.uint32)
            post = T.alloc_local((own,), T.float32)
            comb = T.alloc_local((N, own), T.float32)
            given = T.alloc_local((N,), T.float32)
            total = T.alloc_local((VECTOR,), T.float32)
            made = T.alloc_local((own * VECTOR,), T.bfloat16)
            if collapses:
                # Another's words: the tensor cores take `made` by its values.
                copied = T.alloc_local((own * VECTOR,), T.bfloat16)
                made_words = T.view(copied, (own, VECTOR // 2), T.uint32)
                rounded = T.alloc_local((VECTOR,), T.bfloat16)
            # A token's elements by themselves, for the diagonal; its other rows are zero.
            alone = T.alloc_local((VECTOR,), T.bfloat16)
            products = T.alloc_local((4, 4), T.float32)
            pair = T.alloc_local((2,), T.float32)
            row = lane // 4
            block = warp % BLOCKS
            # The stream whose weight this warp takes, and the first of those that it multiplies.
            mine = warp // BLOCKS % N
            first = 0 if shares else mine
            group = warp // members
            place_of[0] = T.truncmod(cta, splits)
            place_of[1] = T.truncdiv(cta, splits) * steps * (sets * GROUP)
            # Steps that this CTA has tokens for.
            place_of[2] = T.min(
                steps, T.truncdiv(tokens - place_of[1] + sets * GROUP - 1, sets * GROUP)
            )
            vector[0] = (place_of[0] * FEW_COLUMNS + block * COLUMNS) // VECTOR + lane % 4
            # Past the last token it again, which nobody stores.
            t[0] = T.min(place_of[1] + group * GROUP + row, tokens - 1)
            load_step(
                layer_output,
                x,
                post_mix,
                comb_mix,
                t,
                vector,
                first,
                before,
                post,
                comb,
                given_mix,
                given,
            )
            # A lane has eight columns of a stream, of mixes `row`, row + 8 and row + 16.
            for p in T.unroll(3):
                for q in T.unroll(VECTOR // 4):
                    for v in T.vectorized(4):
                        raw[p, q * 4 + v] = T.cast(
                            weight[
                                row + p * 8,
                                (vector[0] * 2 + mine * (hidden_size // 4) + q) * 4 + v,
                            ],
                            T.float32,
                        )
            if has_norm:
                for v in T.unroll(VECTOR):
                    for p in T.unroll(3):
                        raw[p, v] *= T.cast(
                            norm_weight[vector_of(vector[0], mine, hidden_size) + v], T.float32
                        )
            if tf32 != 0:
                for p in T.unroll(3):
                    for v in T.unroll(VECTOR):
                        raw[p, v] = rounded_to_tf32(raw[p, v])
            # High parts of 16 mixes; both parts of the other eight; low parts of the 16.
            for v in tuple(range(VECTOR)):
                w[operand_of(0, v, False)] = high_part(raw[0, v])
                w[operand_of(0, v, True)] = high_part(raw[1, v])
                w[operand_of(1, v, False)] = high_part(raw[2, v])
                w[operand_of(1, v, True)] = low_part(raw[2, v])
                w[operand_of(2, v, False)] = low_part(raw[0, v])
                w[operand_of(2, v, True)] = low_part(raw[1, v])
            if shares:
                for e in T.unroll(OPERANDS):
                    for v in T.vectorized(VECTOR):
                        operands[warp, e, lane, v] = w[e * VECTOR + v]
                T.sync_threads()
            for v in T.unroll(VECTOR):
                alone[v] = T.cast(0, T.bfloat16)
            for step in T.serial(place_of[2]):
                if has_post:
                    t[0] = place_of[1] + (step * sets + group) * GROUP + row
                    for k in tuple(range(own)):
                        # `combine` of a post.
                        for v in T.unroll(VECTOR // 2):
                            total[2 * v] = post[k] * first_of(words[N, v])
                            total[2 * v + 1] = post[k] * second_of(words[N, v])
                        for i in T.unroll(N):
                            for v in T.unroll(VECTOR // 2):
                                total[2 * v] += comb[i, k] * first_of(words[i, v])
                                total[2 * v + 1] += comb[i, k] * second_of(words[i, v])
                        for v in T.vectorized(VECTOR):
                            made[k * VECTOR + v] = T.cast(total[v], T.bfloat16)
                        if t[0] < tokens:
                            for v in T.vectorized(VECTOR):
                                streams[t[0], vector_of(vector[0], first + k, hidden_size) + v] = (
                                    made[k * VECTOR + v]
                                )
                else:
                    for k in tuple(range(own)):
                        for v in T.vectorized(VECTOR):
                            made[k * VECTOR + v] = before[k, v]
                if collapses:
                    t[0] = place_of[1] + (step * sets + group) * GROUP + row
                    # `weighted_sum`.
                    for k in T.unroll(own):
                        for v in T.vectorized(VECTOR):
                            copied[k * VECTOR + v] = made[k * VECTOR + v]
                    for v in T.unroll(VECTOR):
                        total[v] = 0.0
                    for i in T.unroll(N):
                        for v in T.unroll(VECTOR // 2):
                            total[2 * v] += given[i] * first_of(made_words[i, v])
                            total[2 * v + 1] += given[i] * second_of(made_words[i, v])
                    for v in T.vectorized(VECTOR):
                        rounded[v] = T.cast(total[v], T.bfloat16)
                    if t[0] < tokens:
                        for v in T.vectorized(VECTOR):
                            layer_input[t[0], vector[0] * VECTOR + v] = rounded[v]
                    # Of these the squares, for the norm.
                    pair[0] = 0.0
                    pair[1] = 0.0
                    for v in T.unroll(VECTOR):
                        total[v] = T.cast(rounded[v], T.float32)
                        pair[v % 2] += total[v] * total[v]
                    pair[0] += pair[1]
                    pair[0] += T.shfl_xor(pair[0], 1)
                    pair[0] += T.shfl_xor(pair[0], 2)
                    if lane % 4 == 0:
                        warp_sums[step % 2, warp, row, MIXES + 1] = pair[0]
                # What the next step needs, while this one's is multiplied.
                if step + 1 < place_of[2]:
                    t[0] = T.min(
                        place_of[1] + ((step + 1) * sets + group) * GROUP + row, tokens - 1
                    )
                    load_step(
                        layer_output,
                        x,
                        post_mix,
                        comb_mix,
                        t,
                        vector,
                        first,
                        before,
                        post,
                        comb,
                        given_mix,
                        given,
                    )
                for k in T.unroll(4):
                    for p in T.unroll(4):
                        products[p, k] = 0.0
                for k, half in tuple((k, half) for k in range(own) for half in (0, 1)):
                    at = k * VECTOR + half * 4
                    for p in (0, 1, 2):
                        if shares:
                            for v in T.vectorized(VECTOR):
                                w[v] = operands[k * BLOCKS + block, 2 * p + half, lane, v]
                            multiply(w, made, at, products, p)
                        else:
                            multiply(w, made, at, products, p, (2 * p + half) * VECTOR)
                    for v in T.unroll(4):
                        alone[v // 2 * 4 + v % 2] = made[at + v]
                    multiply(alone, made, at, products, 3)
                # A lane has two tokens of each of its mixes, by high and by low parts.
                for k in T.unroll(2):
                    token = lane % 4 * 2 + k
                    warp_sums[step % 2, warp, token, row] = products[0, k] + products[2, k]
                    warp_sums[step % 2, warp, token, row + 8] = (
                        products[0, 2 + k] + products[2, 2 + k]
                    )
                    warp_sums[step % 2, warp, token, row + 16] = products[1, k] + products[1, 2 + k]
                    if row == token:
                        warp_sums[step % 2, warp, token, MIXES] = products[3, k]
                # What is written here is read before the next but one step's barrier.
                T.sync_threads()
                # Each warp has the sums of as many tokens as there are groups.
                for e in T.unroll(sets):
                    token = warp * sets + e
                    pair[0] = 0.0
                    pair[1] = 0.0
                    if lane <= MIXES + collapses:
                        for q in T.unroll(members):
                            pair[q % 2] += warp_sums[
                                step % 2, token // GROUP * members + q, token % GROUP, lane
                            ]
                    t[0] = place_of[1] + step * (sets * GROUP) + token
                    if lane < WRITTEN and t[0] < tokens:
                        sums[place_of[0], t[0], lane] = pair[0] + pair[1]

    return few_project_kernel


@T.macro
def summed_mix(
    row_sums: T.Buffer,
    x: T.Tensor,
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_weight_dtype: str,
    t: T.int32,
    m: T.int32,
    size: int,
    norm_eps: T.float32,
    tf32: T.int32,
    out: T.Buffer,
):
    """out = (mix m of token t, its inv_rms), of what the warps of this CTA have added up."""
    warps = row_sums.shape[0]
    chain = T.alloc_local((2, 2), T.float32)
    for k in T.unroll(2):
        chain[k, 0] = 0.0
        chain[k, 1] = 0.0
    for q in T.unroll(warps):
        chain[q % 2, 0] += row_sums[q, m]
        chain[q % 2, 1] += row_sums[q, MIXES]
    out[0] = chain[0, 0] + chain[1, 0]
    out[1] = chain[0, 1] + chain[1, 1]
    if not out[1] < LARGE_SQUARES:
        exact_mix(x, None, None, None, weight, norm_weight, norm_weight_dtype, t, m, tf32, out)
    else:
        out[1] = T.rsqrt(out[1] / size + norm_eps)
        out[0] = out[0] * out[1]


@builder(RING)
def few_pre(
    hidden_size: int,
    delayed: bool,
    collapsed: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    scale_dtype: str,
    bias_dtype: str,
    layer_norm_dtype: str,
):
    """Mixes, gates, Sinkhorn, the layer input and its norm from the sums of `few_project`."""
    tokens = T.dynamic("num_tokens")
    size = N * hidden_size
    splits = hidden_size // FEW_COLUMNS
    # As few vectors a thread as these warps allow: all are asked for at once.
    vectors = hidden_size // VECTOR
    chunks = -(-vectors // (ROW_WARPS[collapsed] * 32))
    warps = -(-vectors // (chunks * 32))
    threads = warps * 32
    # A warp takes four splits at a time: a vector of four sums a lane.
    turns = -(-splits // (4 * warps))
    whole = splits % (4 * warps) == 0
    full = vectors % threads == 0
    norms = layer_norm_dtype != ""
    # Where two vectors a thread or fewer are all: more of them need their registers.
    blocks = THREADS // (threads + 32) if chunks <= 2 else 1
    # Streams of which a thread has vectors: those of the layer input itself, where that is there.
    rows = 0 if collapsed and not norms else 1 if collapsed else N
    # Weights of the norm in one access.
    access = ACCESS // (BYTES[layer_norm_dtype] or 4)

    @T.prim_func
    def few_pre_kernel(
        sums: T.Tensor[(splits, tokens, FEW_ROW), T.float32],
        scale: T.Tensor[(3,), scale_dtype],
        bias: T.Tensor[(MIXES,), bias_dtype],
        layer_norm_weight: T.Tensor[(hidden_size if norms else 1,), layer_norm_dtype or T.float32],
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        given_mix: T.Tensor[(tokens, N) if delayed and not collapsed else (1,), T.float32],
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
        layer_norm_eps: T.float32,
        repeat: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(tokens, threads=threads + 32) as t:
            tid = T.get_thread_binding()
            lane = tid % 32
            warp = tid // 32
            row_sums = T.alloc_shared((warps, FEW_ROW), T.float32)
            if blocks > 1:
                T.annotate_min_blocks_per_sm(blocks)
            gates = T.alloc_shared((N,), T.float32)
            logits = T.alloc_shared((N * N,), T.float32)
            squares = T.alloc_shared((warps,), T.float32)
            two = T.alloc_local((2,), T.float32)
            z = T.alloc_local((1,), T.float32)
            gate_scale = T.alloc_local((1,), T.float32)
            gate_bias = T.alloc_local((1,), T.float32)
            m = T.min(lane, MIXES - 1)
            # In vectors, as a variable: see `contract_cluster_fwd`.
            own = T.alloc_local((1,), T.int32)
            if norms:
                # Each thread's own: registers have no room for what is asked for so early.
                norm = T.alloc_shared((chunks, VECTOR // access, threads, access), layer_norm_dtype)
                factor = T.alloc_local((VECTOR,), layer_norm_dtype)
            mix = T.alloc_local((N,), T.float32)
            # What the launch before does not write, before it has ended.
            gate_scale[0] = T.cast(scale[T.min(m // N, 2)], T.float32)
            gate_bias[0] = T.cast(bias[m], T.float32)
            if delayed and not collapsed:
                for v in T.vectorized(N):
                    mix[v] = given_mix[t, v]
            if norms and warp < warps:
                for c in T.unroll(chunks):
                    own[0] = c * threads + tid
                    if full or own[0] < vectors:
                        for q in T.unroll(VECTOR // access):
                            T.ptx_cp_async(
                                T.access_ptr(norm[c, q, tid, 0], "w", access),
                                T.access_ptr(
                                    layer_norm_weight[(own[0] * (VECTOR // access) + q) * access],
                                    "r",
                                    access,
                                ),
                                access,
                            )
                T.ptx_commit_group()
            follow_previous()
            if warp < warps:
                if rows > 0:
                    held = T.alloc_local((chunks, rows, VECTOR), T.bfloat16)
                    words = T.view(held, (chunks, rows, VECTOR // 2), T.uint32)
                part = T.alloc_local((turns, 4), T.float32)
                total = T.alloc_local((chunks, VECTOR), T.float32)
                rounded = T.alloc_local((chunks, VECTOR), T.bfloat16)
                square = T.alloc_local((2,), T.float32)
                for turn in T.unroll(turns):
                    s = (turn * warps + warp) * 4 + lane // 8
                    for v in T.unroll(4):
                        part[turn, v] = 0.0
                    if (whole or s < splits) and lane % 8 < WRITTEN // 4:
                        for v in T.vectorized(4):
                            part[turn, v] = sums[s, t, lane % 8 * 4 + v]
                if not collapsed:
                    # All sums of the token are on their way before the first of its streams: others
                    # wait for the sums.
                    T.sync_threads(BARRIER, threads)
                if rows > 0:
                    for c in T.unroll(chunks):
                        own[0] = c * threads + tid
                        if full or own[0] < vectors:
                            for i in T.unroll(rows):
                                for v in T.vectorized(VECTOR):
                                    if collapsed:
                                        held[c, i, v] = layer_input[t, own[0] * VECTOR + v]
                                    else:
                                        held[c, i, v] = x[t, vector_of(own[0], i, hidden_size) + v]
                for turn in T.unroll(turns - 1):
                    for v in T.unroll(4):
                        part[0, v] += part[turn + 1, v]
                for v in T.unroll(4):
                    part[0, v] += T.shfl_xor(part[0, v], 8)
                    part[0, v] += T.shfl_xor(part[0, v], 16)
                if lane < 8:
                    for v in T.vectorized(4):
                        row_sums[warp, lane * 4 + v] = part[0, v]
                T.sync_threads(EVERYBODY, threads + 32)
                if warp == 0:
                    summed_mix(
                        row_sums,
                        x,
                        weight,
                        norm_weight,
                        norm_weight_dtype,
                        t,
                        m,
                        size,
                        norm_eps,
                        tf32,
                        two,
                    )
                    logit(two[0], gate_scale[0], gate_bias[0], z)
                    sigmoid(z[0], z)
                    if not delayed and lane < N:
                        gates[lane] = z[0] + pre_eps
                if not delayed:
                    T.sync_threads(BARRIER, threads)
                    for v in T.vectorized(N):
                        mix[v] = gates[v]
                if warp == 0:
                    if lane < MIXES:
                        mixes[t, lane] = two[0]
                    if lane == 0:
                        inv_rms[t] = two[1]
                    if delayed and lane < N:
                        pre_mix[t, lane] = z[0] + pre_eps
                    if lane >= N and lane < 2 * N:
                        post_mix[t, lane - N] = z[0] * post_mult
                square[0] = 0.0
                square[1] = 0.0
                if collapsed and norms:
                    for c in T.unroll(chunks):
                        for v in T.unroll(VECTOR // 2):
                            total[c, 2 * v] = first_of(words[c, 0, v])
                            total[c, 2 * v + 1] = second_of(words[c, 0, v])
                    T.ptx_wait_group(0)
                    for q in T.unroll(warps):
                        square[q % 2] += row_sums[q, MIXES + 1]
                if not collapsed:
                    for c in T.unroll(chunks):
                        own[0] = c * threads + tid
                        if full or own[0] < vectors:
                            # `weighted_sum`.
                            for v in T.unroll(VECTOR):
                                total[c, v] = 0.0
                            for i in T.unroll(N):
                                for v in T.unroll(VECTOR // 2):
                                    total[c, 2 * v] += mix[i] * first_of(words[c, i, v])
                                    total[c, 2 * v + 1] += mix[i] * second_of(words[c, i, v])
                            for v in T.vectorized(VECTOR):
                                rounded[c, v] = T.cast(total[c, v], T.bfloat16)
                            if norms:
                                for v in T.unroll(VECTOR):
                                    total[c, v] = T.cast(rounded[c, v], T.float32)
                                    square[v % 2] += total[c, v] * total[c, v]
                            else:
                                for v in T.vectorized(VECTOR):
                                    layer_input[t, own[0] * VECTOR + v] = rounded[c, v]
                    if norms:
                        square[0] += square[1]
                        for level in T.unroll(5):
                            square[0] += T.shfl_xor(square[0], 1 << level)
                        if lane == 0:
                            squares[warp] = square[0]
                        T.ptx_wait_group(0)
                        T.sync_threads(BARRIER, threads)
                        square[0] = 0.0
                        square[1] = 0.0
                        for q in T.unroll(warps):
                            square[q % 2] += squares[q]
                if norms:
                    square[0] = T.rsqrt((square[0] + square[1]) / hidden_size + layer_norm_eps)
                    for c in T.unroll(chunks):
                        own[0] = c * threads + tid
                        if full or own[0] < vectors:
                            for q in T.unroll(VECTOR // access):
                                for v in T.vectorized(access):
                                    factor[q * access + v] = norm[c, q, tid, v]
                            for v in T.unroll(VECTOR):
                                total[c, v] *= square[0] * T.cast(factor[v], T.float32)
                            for v in T.vectorized(VECTOR):
                                layer_input[t, own[0] * VECTOR + v] = T.cast(
                                    total[c, v], T.bfloat16
                                )
            else:
                comb = T.alloc_local((N, N), T.float32)
                T.sync_threads(EVERYBODY, threads + 32)
                summed_mix(
                    row_sums,
                    x,
                    weight,
                    norm_weight,
                    norm_weight_dtype,
                    t,
                    m,
                    size,
                    norm_eps,
                    tf32,
                    two,
                )
                logit(two[0], gate_scale[0], gate_bias[0], z)
                if lane >= 2 * N and lane < MIXES:
                    logits[lane - 2 * N] = z[0]
                T.sync_warp()
                if lane == 0:
                    for i in T.unroll(N):
                        for j in T.vectorized(N):
                            comb[i, j] = logits[i * N + j]
                    if sinkhorn_eps >= SMALLEST_ALONE and sinkhorn_eps <= 1.0:
                        sinkhorn_alone(comb, repeat, sinkhorn_eps)
                    else:
                        sinkhorn_token(comb, N, repeat, sinkhorn_eps)
                    for i in T.unroll(N):
                        for j in T.vectorized(N):
                            comb_mix[t, i * N + j] = comb[i, j]

    return few_pre_kernel
