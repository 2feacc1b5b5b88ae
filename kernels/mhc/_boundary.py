"""Passes over the streams of a pre with a given pre_mix, which may be made by a post on the way.

A CTA has 64 columns of all four streams, so that it needs nothing of another for what is pointwise
in h: the post, the collapse, and their gradients. Streams are bfloat16, H a multiple of 64.
"""

from typing import Any

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._backward import (
    element,
    halve,
    still_read,
    store_weight_parts,
    words_of,
)
from tile_mhc.kernels._common import BYTES, VECTOR, fence_shared, follow_previous, pipelined
from tile_mhc.kernels._shapes import (
    DELAYED_BACKWARD_TOKENS,
    DELAYED_COLUMNS,
    DELAYED_TOKENS,
    factors_width,
    padded,
)
from tile_mhc.kernels._weights import high_part, low_part, norm_shape, rounded_to_tf32

THREADS = 256
STREAMS = 4
MIXES = STREAMS * (STREAMS + 2)
# Rows of a tensor core's operand: the high parts of the weight, the low ones, and some that nobody
# writes, whose products nobody reads.
PART_ROWS = 64
FULL_ROW = T.GemmWarpPolicy.FullRow
FULL_COLUMN = T.GemmWarpPolicy.FullCol


def forward_pass(
    hidden_size: int,
    makes: bool,
    collapses: bool,
    splits_weight: bool,
    weight_dtype: str,
    norm_weight_dtype: str,
    limits: Architecture,
) -> tuple[Any, ...]:
    """A CTA has a tile of tokens and a range of H, in steps of the same columns of all streams.

    Where it `makes` the streams, by a post, they are read rounded by all that follows. It
    `collapses` them where the pre_mix is known. Thread t has eight columns of the tokens t // 8 and
    t // 8 + 32; what is by token stays in registers. The mixes are the rows of the product, high
    and low part apart: as columns, 48 of them, TileLang would take three times the instructions.

    `weight` has both parts, by `weight_parts`, unless the pass `splits_weight` itself: where tokens
    are few a launch before costs more.
    """
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    size = STREAMS * hidden_size
    block, columns = DELAYED_TOKENS, DELAYED_COLUMNS
    wide = STREAMS * columns
    steps = hidden_size // columns
    per_row = columns // VECTOR
    rows = THREADS // per_row
    turns = block // rows
    streams_of = tuple(range(STREAMS))
    has_norm = norm_weight_dtype != ""
    has_tma = limits.has_tma
    fixed = block * (columns * (collapses and has_tma) + wide * makes) * 2
    stage = block * (wide + (columns if makes else 0)) * 2
    if splits_weight:
        fixed += PART_ROWS * wide * 2
        stage += (MIXES * BYTES[weight_dtype] + BYTES[norm_weight_dtype]) * wide
    else:
        stage += PART_ROWS * wide * 2
    stages = min(4, (limits.matmul_bytes - fixed) // stage)

    def has_tokens(turn: T.int32, t0: T.int32):
        return t0 + turn * rows < tokens if splits_weight else True

    @T.macro
    def body(
        layer_output: T.Tensor,
        x: T.Tensor,
        post_mix: T.Tensor,
        comb_mix: T.Tensor,
        pre_mix: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        out: T.Tensor,
        layer_input: T.Tensor,
        products: T.Tensor,
        squares: T.Tensor,
        blocks: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(splits * T.ceildiv(tokens, block), threads=THREADS) as cta:
            follow_previous()
            s = T.truncmod(cta, splits)
            t0 = T.truncdiv(cta, splits) * block
            tid = T.get_thread_binding()
            x_shared = T.alloc_shared((block, wide), T.bfloat16)
            w_shared = T.alloc_shared((PART_ROWS, wide), T.bfloat16)
            if splits_weight:
                # Stream by stream: a copy of TMA fills whole rows.
                raw_shared = T.alloc_shared((STREAMS * MIXES, columns), weight_dtype)
                w_local = T.alloc_fragment((STREAMS * MIXES, columns), T.float32)
                if has_norm:
                    norm_shared = T.alloc_shared((wide,), norm_weight_dtype)
            if collapses and has_tma:
                input_shared = T.alloc_shared((block, columns), T.bfloat16)
                T.annotate_layout({input_shared: make_swizzled_layout(input_shared)})
            if makes:
                f_shared = T.alloc_shared((block, columns), T.bfloat16)
                made_shared = T.alloc_shared((block, wide), T.bfloat16)
                T.annotate_layout(
                    {
                        f_shared: make_swizzled_layout(f_shared),
                        x_shared: make_swizzled_layout(x_shared),
                    }
                )
            else:
                made_shared = x_shared
            product = T.alloc_fragment((PART_ROWS, block), T.float32)
            step_product = T.alloc_fragment((PART_ROWS, block), T.float32)
            pre = T.alloc_local((turns, STREAMS), T.float32)
            post = T.alloc_local((turns, STREAMS), T.float32)
            comb = T.alloc_local((turns, STREAMS, STREAMS), T.float32)
            # Two chains of sums: one would wait for itself.
            square = T.alloc_local((turns, 2), T.float32)
            output = T.alloc_local((VECTOR,), T.bfloat16)
            streams = T.alloc_local((STREAMS, VECTOR), T.bfloat16)
            rounded = T.alloc_local((VECTOR,), T.bfloat16)
            total = T.alloc_local((VECTOR,), T.float32)
            collapsed = T.alloc_local((VECTOR,), T.float32)
            own = T.alloc_local((2,), T.int32)
            own[0] = s
            own[1] = t0
            for turn in T.unroll(turns):
                square[turn, 0] = 0.0
                square[turn, 1] = 0.0
                t = T.min(t0 + turn * rows + tid // per_row, tokens - 1)
                if collapses:
                    for i in T.unroll(STREAMS):
                        pre[turn, i] = pre_mix[t, i]
                if makes:
                    for i in T.unroll(STREAMS):
                        post[turn, i] = post_mix[t, i]
                        for j in T.vectorized(STREAMS):
                            comb[turn, i, j] = comb_mix[t, i, j]
            T.clear(product)
            for step in pipelined(T.min(blocks, steps - s * blocks), stages):
                h0 = (s * blocks + step) * columns
                for i in streams_of:
                    k0 = i * hidden_size + h0
                    c0 = i * columns
                    T.copy(
                        x[t0 : t0 + block, k0 : k0 + columns], x_shared[0:block, c0 : c0 + columns]
                    )
                    if splits_weight:
                        T.copy(
                            weight[0:MIXES, k0 : k0 + columns],
                            raw_shared[i * MIXES : (i + 1) * MIXES, 0:columns],
                        )
                        if has_norm:
                            T.copy(norm_weight[k0 : k0 + columns], norm_shared[c0 : c0 + columns])
                    else:
                        T.copy(
                            weight[0 : 2 * MIXES, k0 : k0 + columns],
                            w_shared[0 : 2 * MIXES, c0 : c0 + columns],
                        )
                if makes:
                    T.copy(layer_output[t0, h0], f_shared)
                if has_tma:
                    # The tile before has left these: its stores ran beside the loads.
                    T.tma_store_wait(0)
                T.sync_threads()
                for turn in T.unroll(turns):
                    # Where tokens are few a tile may have none for this turn.
                    if has_tokens(turn, t0):
                        row = turn * rows + tid // per_row
                        c = tid % per_row * VECTOR
                        for v in T.unroll(VECTOR):
                            collapsed[v] = 0.0
                        for i in T.unroll(STREAMS):
                            for v in T.vectorized(VECTOR):
                                streams[i, v] = x_shared[row, i * columns + c + v]
                        if makes:
                            for v in T.vectorized(VECTOR):
                                output[v] = f_shared[row, c + v]
                        for j in T.unroll(STREAMS):
                            if makes:
                                # In the order of `combine` of a post: the same bits.
                                for v in T.unroll(VECTOR):
                                    total[v] = post[turn, j] * T.cast(output[v], T.float32)
                                for i in T.unroll(STREAMS):
                                    for v in T.unroll(VECTOR):
                                        total[v] += comb[turn, i, j] * T.cast(
                                            streams[i, v], T.float32
                                        )
                                for v in T.vectorized(VECTOR):
                                    rounded[v] = T.cast(total[v], T.bfloat16)
                                for v in T.vectorized(VECTOR):
                                    made_shared[row, j * columns + c + v] = rounded[v]
                                if not has_tma and t0 + row < tokens:
                                    k = j * hidden_size + h0 + c
                                    for v in T.vectorized(VECTOR):
                                        out[t0 + row, k + v] = rounded[v]
                            else:
                                for v in T.vectorized(VECTOR):
                                    rounded[v] = streams[j, v]
                            if collapses:
                                for v in T.unroll(VECTOR):
                                    collapsed[v] += pre[turn, j] * T.cast(rounded[v], T.float32)
                            for v in T.unroll(VECTOR):
                                square[turn, v % 2] += T.cast(rounded[v], T.float32) * T.cast(
                                    rounded[v], T.float32
                                )
                        if collapses and has_tma:
                            for v in T.vectorized(VECTOR):
                                input_shared[row, c + v] = T.cast(collapsed[v], T.bfloat16)
                        if collapses and not has_tma and t0 + row < tokens:
                            for v in T.vectorized(VECTOR):
                                layer_input[t0 + row, h0 + c + v] = T.cast(collapsed[v], T.bfloat16)
                if splits_weight:
                    T.copy(raw_shared, w_local)
                    if has_norm:
                        for r, k in T.Parallel(STREAMS * MIXES, columns):
                            w_local[r, k] *= T.cast(
                                norm_shared[r // MIXES * columns + k], T.float32
                            )
                    if tf32 != 0:
                        for r, k in T.Parallel(STREAMS * MIXES, columns):
                            w_local[r, k] = rounded_to_tf32(w_local[r, k])
                    for r, k in T.Parallel(STREAMS * MIXES, columns):
                        at = r // MIXES * columns + k
                        w_shared[r % MIXES, at] = high_part(w_local[r, k])
                        w_shared[MIXES + r % MIXES, at] = low_part(w_local[r, k])
                fence_shared()
                T.sync_threads()
                if makes and has_tma:
                    for i in streams_of:
                        k0 = i * hidden_size + h0
                        c0 = i * columns
                        T.tma_copy(
                            made_shared[0:block, c0 : c0 + columns],
                            out[t0 : t0 + block, k0 : k0 + columns],
                        )
                if collapses and has_tma:
                    T.tma_copy(input_shared, layer_input[t0 : t0 + block, h0 : h0 + columns])
                # The tensor cores truncate what they add up: only within a step.
                T.gemm(
                    w_shared,
                    made_shared,
                    step_product,
                    transpose_B=True,
                    clear_accum=True,
                    policy=FULL_COLUMN,
                )
                for m, i in T.Parallel(PART_ROWS, block):
                    product[m, i] += step_product[m, i]
            if has_tma:
                T.tma_store_wait(0)
            for turn in T.unroll(turns):
                square[turn, 0] += square[turn, 1]
                for level in T.unroll(per_row.bit_length() - 1):
                    square[turn, 0] += T.shfl_xor(square[turn, 0], 1 << level)
                row = turn * rows + tid // per_row
                if tid % per_row == 0 and own[1] + row < tokens:
                    squares[own[0], own[1] + row] = square[turn, 0]
            sums = T.alloc_shared((PART_ROWS, block + 4), T.float32)
            for m, i in T.Parallel(PART_ROWS, block):
                sums[m, i] = product[m, i]
            for i, m in T.Parallel(block, MIXES):
                if own[1] + i < tokens:
                    products[own[0], own[1] + i, m] = sums[m, i] + sums[MIXES + m, i]

    return body, tokens, splits, size


def weight_shapes(
    hidden_size: int, splits_weight: bool, weight_dtype: str, norm_weight_dtype: str
) -> tuple[Any, ...]:
    """(shape, dtype) of the weight that a forward pass reads, and of its norm weight."""
    size = STREAMS * hidden_size
    norm = norm_shape(size, norm_weight_dtype), norm_weight_dtype or "float32"
    if splits_weight:
        return ((MIXES, size), weight_dtype), norm
    return ((2 * MIXES, size), "bfloat16"), norm


def num_sums(makes: bool) -> int:
    """By token: the gradients of comb_mix, post_mix and pre_mix, or that of pre_mix alone."""
    return STREAMS * (STREAMS + 2) if makes else STREAMS


def backward_pass(
    hidden_size: int,
    makes: bool,
    has_held: bool,
    norm_weight_dtype: str,
    limits: Architecture,
) -> tuple[Any, ...]:
    """Gradients of what the forward read, in one pass, with the gradient of the mixes known.

    d = G w + (streams * r) * along + pre_mix * grad_input + held: that of the streams, in float32.
    Where the pass `makes` the streams again, d goes on through the post and is never rounded; else
    it is what is written. A CTA owns 64 columns of all streams, and a slice of tokens comes by:
    their weights stay in shared memory, their gradient in registers. Thread t has eight columns of
    token t // 8 of the tile. Sums over H are left in a row of partial sums a CTA's columns.

    Two warps on a scheduler hide no latency of each other, so that of the tensor cores is hidden by
    what a thread has to do meanwhile: G w by the streams, the weight's gradient by the sums.
    """
    tokens = T.dynamic("num_tokens")
    slices = T.dynamic("num_slices")
    size = STREAMS * hidden_size
    block, columns = DELAYED_BACKWARD_TOKENS, DELAYED_COLUMNS
    wide = STREAMS * columns
    per_row = columns // VECTOR
    part_rows = padded(MIXES)
    both = 2 * part_rows
    width = factors_width(STREAMS)
    sums_count = num_sums(makes)
    product_row = wide + VECTOR // 2
    fixed = 2 * both * wide * 2 + block * product_row * 4
    has_tma = limits.has_tma
    fixed += block * wide * 2
    if has_tma:
        fixed += block * (wide * 2 + (columns * 2 if makes else 0))
    stage = block * (
        wide * 2 * (1 + has_held)
        + columns * 2 * (1 + makes)
        + both * 2
        + width * 4
        + (STREAMS * (STREAMS + 1) * 4 if makes else 0)
    )
    stages = max(1, min(3, (limits.matmul_bytes - fixed) // stage))

    def at(k: T.int32) -> T.int32:
        """Where column k of the product lies: of eight neighbours four in each half of the row.

        Eight threads then read 16 bytes each in a row. Those that write a column at a time have
        eight neighbours of four tokens, two apart: all banks, as a half is four banks on, and two
        tokens are eight.
        """
        half = k // 4 % 2 * (wide // 2 + VECTOR // 2)
        return half + k // VECTOR * 4 + k % 4

    @T.macro
    def body(
        grad_parts: T.Tensor,
        factors: T.Tensor,
        layer_output: T.Tensor,
        x: T.Tensor,
        post_mix: T.Tensor,
        comb_mix: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        grad_input: T.Tensor,
        held: T.Tensor,
        grad_output: T.Tensor,
        grad_x: T.Tensor,
        sums: T.Tensor,
        partials: T.Tensor,
        slice_tokens: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(hidden_size // columns, slices, threads=THREADS) as (column, slot):
            if has_tma:
                T.annotate_consumer_reg_alloc(240)
                T.annotate_producer_reg_dealloc(24)
            high_twice = T.alloc_shared((both, wide), T.bfloat16)
            low_then_zero = T.alloc_shared((both, wide), T.bfloat16)
            # A copy of all streams waits at one barrier; a row of them is whole in the banks.
            x_shared = T.alloc_shared((block, STREAMS, columns), T.bfloat16)
            g_shared = T.alloc_shared((block, both), T.bfloat16)
            factors_shared = T.alloc_shared((block, width), T.float32)
            input_shared = T.alloc_shared((block, columns), T.bfloat16)
            product_shared = T.alloc_shared((block, product_row), T.float32)
            if has_tma:
                out_shared = T.alloc_shared((block, STREAMS, columns), T.bfloat16)
            made_shared = T.alloc_shared((block, wide), T.bfloat16)
            if makes:
                f_shared = T.alloc_shared((block, columns), T.bfloat16)
                if has_tma:
                    of_output_shared = T.alloc_shared((block, columns), T.bfloat16)
                post_shared = T.alloc_shared((block, STREAMS), T.float32)
                comb_shared = T.alloc_shared((block, STREAMS * STREAMS), T.float32)
            if has_held:
                held_shared = T.alloc_shared((block, STREAMS, columns), T.bfloat16)
            product = T.alloc_fragment((wide, block), T.float32)
            weight_local = T.alloc_fragment((wide, both), T.float32)
            tile_weight = T.alloc_fragment((wide, both), T.float32)
            w_local = T.alloc_local((part_rows * wide // THREADS,), T.float32)
            streams = T.alloc_local((STREAMS, VECTOR), T.bfloat16)
            rounded = T.alloc_local((STREAMS, VECTOR), T.bfloat16)
            output = T.alloc_local((VECTOR,), T.bfloat16)
            wide_grad = T.alloc_local((VECTOR,), T.bfloat16)
            others = T.alloc_local((VECTOR,), T.bfloat16)
            total = T.alloc_local((VECTOR,), T.float32)
            of_output = T.alloc_local((VECTOR,), T.float32)
            of_streams = T.alloc_local((STREAMS, VECTOR), T.float32)
            post = T.alloc_local((STREAMS,), T.float32)
            comb = T.alloc_local((STREAMS, STREAMS), T.float32)
            per_token = T.alloc_local((width,), T.float32)
            added = T.alloc_local((sums_count,), T.float32)
            last = T.alloc_local((1,), T.bfloat16)
            term = T.alloc_local((1,), T.float32)
            stream_words = words_of(streams)
            rounded_words = words_of(rounded)
            output_words = words_of(output)
            wide_words = words_of(wide_grad)
            other_words = words_of(others)
            store_weight_parts(
                weight,
                norm_weight,
                norm_weight_dtype,
                lambda c: c // columns * hidden_size + column * columns + c % columns,
                tf32,
                w_local,
                high_twice,
                low_then_zero,
            )
            follow_previous()
            fence_shared()
            T.sync_threads()
            T.clear(weight_local)
            tid = T.get_thread_binding()
            row = tid // per_row
            c = tid % per_row * VECTOR
            first = slot * slice_tokens
            h0 = column * columns
            for step in pipelined(T.ceildiv(T.min(slice_tokens, tokens - first), block), stages):
                t0 = first + step * block
                t1 = t0 + block
                T.copy(grad_parts[t0, 0], g_shared)
                T.copy(x[t0:t1, 0:STREAMS, h0 : h0 + columns], x_shared)
                if makes:
                    T.copy(layer_output[t0, h0], f_shared)
                    T.copy(post_mix[t0, 0], post_shared)
                    T.copy(comb_mix[t0, 0], comb_shared)
                T.copy(factors[t0, 0], factors_shared)
                T.copy(grad_input[t0, h0], input_shared)
                if has_held:
                    T.copy(held[t0:t1, 0:STREAMS, h0 : h0 + columns], held_shared)
                T.gemm(
                    high_twice,
                    g_shared,
                    product,
                    transpose_A=True,
                    transpose_B=True,
                    clear_accum=True,
                    policy=FULL_ROW,
                    annotations={"wg_wait": -1},
                )
                T.gemm(
                    low_then_zero,
                    g_shared,
                    product,
                    transpose_A=True,
                    transpose_B=True,
                    policy=FULL_ROW,
                    annotations={"wg_wait": -1},
                )
                for i in T.unroll(STREAMS):
                    for v in T.vectorized(VECTOR):
                        streams[i, v] = x_shared[row, i, c + v]
                if makes:
                    for v in T.vectorized(VECTOR):
                        output[v] = f_shared[row, c + v]
                    for v in T.vectorized(STREAMS):
                        post[v] = post_shared[row, v]
                    for i in T.unroll(STREAMS):
                        for v in T.vectorized(STREAMS):
                            comb[i, v] = comb_shared[row, i * STREAMS + v]
                for j in T.unroll(STREAMS):
                    if makes:
                        # In the order of a post's forward: the streams that were projected.
                        for v in T.unroll(VECTOR):
                            total[v] = post[j] * element(output_words, 0, v)
                        for i in T.unroll(STREAMS):
                            for v in T.unroll(VECTOR):
                                total[v] += comb[i, j] * element(stream_words, i, v)
                        for v in T.vectorized(VECTOR):
                            rounded[j, v] = T.cast(total[v], T.bfloat16)
                    else:
                        for v in T.vectorized(VECTOR):
                            rounded[j, v] = streams[j, v]
                    for v in T.vectorized(VECTOR):
                        made_shared[row, j * columns + c + v] = rounded[j, v]
                if limits.has_wgmma:
                    T.wait_wgmma(0)
                for k, t in T.Parallel(wide, block):
                    product_shared[t, at(k)] = product[k, t]
                if has_tma:
                    # The tile before has left these: its stores ran beside this tile's products.
                    T.tma_store_wait(0)
                T.sync_threads()
                for v in T.vectorized(4):
                    per_token[v] = factors_shared[row, v]
                for v in T.vectorized(4):
                    per_token[4 + v] = factors_shared[row, 4 + v]
                for v in T.vectorized(VECTOR):
                    wide_grad[v] = input_shared[row, c + v]
                if makes and not has_tma:
                    # No thread there has registers for more of another: read again, not kept.
                    for v in T.vectorized(STREAMS):
                        post[v] = post_shared[row, v]
                    for i in T.unroll(STREAMS):
                        for v in T.vectorized(STREAMS):
                            comb[i, v] = comb_shared[row, i * STREAMS + v]
                if makes:
                    for v in T.unroll(VECTOR):
                        of_output[v] = 0.0
                    for i in T.unroll(STREAMS):
                        for v in T.unroll(VECTOR):
                            of_streams[i, v] = 0.0
                for k in T.unroll(sums_count):
                    added[k] = 0.0
                for j in T.unroll(STREAMS):
                    for v in T.vectorized(4):
                        total[v] = product_shared[row, at(j * columns + c) + v]
                    for v in T.vectorized(4):
                        total[4 + v] = product_shared[row, at(j * columns + c + 4) + v]
                    if has_held:
                        for v in T.vectorized(VECTOR):
                            others[v] = held_shared[row, j, c + v]
                    for v in T.unroll(VECTOR):
                        term[0] = per_token[3 + j] * element(wide_words, 0, v)
                        if has_held:
                            term[0] += element(other_words, 0, v)
                        total[v] = total[v] * per_token[2] + term[0]
                        # A stream joins 1 / rms first: both factors at once may be lost.
                        term[0] = element(rounded_words, j, v) * per_token[0]
                        total[v] += term[0] * per_token[1]
                    for v in T.unroll(VECTOR):
                        added[sums_count - STREAMS + j] += element(rounded_words, j, v) * element(
                            wide_words, 0, v
                        )
                    if makes:
                        for v in T.unroll(VECTOR):
                            of_output[v] += post[j] * total[v]
                            added[STREAMS * STREAMS + j] += element(output_words, 0, v) * total[v]
                        for i in T.unroll(STREAMS):
                            for v in T.unroll(VECTOR):
                                of_streams[i, v] += comb[i, j] * total[v]
                                added[i * STREAMS + j] += element(stream_words, i, v) * total[v]
                    elif has_tma:
                        for v in T.vectorized(VECTOR):
                            out_shared[row, j, c + v] = T.cast(total[v], T.bfloat16)
                    elif t0 + row < tokens:
                        for v in T.vectorized(VECTOR):
                            grad_x[t0 + row, j, h0 + c + v] = T.cast(total[v], T.bfloat16)
                if makes and has_tma:
                    for i in T.unroll(STREAMS):
                        for v in T.vectorized(VECTOR):
                            out_shared[row, i, c + v] = T.cast(of_streams[i, v], T.bfloat16)
                    for v in T.vectorized(VECTOR):
                        of_output_shared[row, c + v] = T.cast(of_output[v], T.bfloat16)
                if makes and not has_tma and t0 + row < tokens:
                    for i in T.unroll(STREAMS):
                        for v in T.vectorized(VECTOR):
                            grad_x[t0 + row, i, h0 + c + v] = T.cast(of_streams[i, v], T.bfloat16)
                    for v in T.vectorized(VECTOR):
                        grad_output[t0 + row, h0 + c + v] = T.cast(of_output[v], T.bfloat16)
                fence_shared()
                T.sync_threads()
                if has_tma:
                    T.tma_copy(out_shared, grad_x[t0:t1, 0:STREAMS, h0 : h0 + columns])
                if makes and has_tma:
                    T.tma_copy(of_output_shared, grad_output[t0:t1, h0 : h0 + columns])
                T.gemm(
                    made_shared,
                    g_shared,
                    tile_weight,
                    transpose_A=True,
                    clear_accum=True,
                    policy=FULL_ROW,
                    annotations={"wg_wait": -1},
                )
                # Eight neighbours share a token.
                halve(added, sums_count, tid & 4, 4)
                halve(added, sums_count // 2, tid & 2, 2)
                if makes:
                    halve(added, sums_count // 4, tid & 1, 1)
                    if t0 + row < tokens:
                        for k in T.unroll(sums_count // 8):
                            sums[column, t0 + row, tid % 8 * (sums_count // 8) + k] = added[k]
                else:
                    added[0] += T.shfl_xor(added[0], 1)
                    if tid % 2 == 0 and t0 + row < tokens:
                        sums[column, t0 + row, tid % 8 // 2] = added[0]
                if limits.has_wgmma:
                    T.wait_wgmma(0)
                still_read(g_shared, last)
                for k, m in T.Parallel(wide, both):
                    weight_local[k, m] += tile_weight[k, m] * factors_shared[0, 2]
            if has_tma:
                T.tma_store_wait(0)
            # By rows of the weight, as they are written; see `projection_bwd`.
            weight_shared = T.alloc_shared((both, wide + 4), T.float32)
            for k, m in T.Parallel(wide, both):
                weight_shared[m, k] = weight_local[k, m]
            for i in range(STREAMS):
                for m, k in T.Parallel(MIXES, columns):
                    partials[slot, m, i * hidden_size + h0 + k] = (
                        weight_shared[m, i * columns + k]
                        + weight_shared[part_rows + m, i * columns + k]
                    )

    return body, tokens, slices, size
