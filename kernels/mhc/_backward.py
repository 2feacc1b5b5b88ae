"""The pass of a projection's backward over the streams, and what it shares with its forward.

See `projection` for what is computed, and how a weight is split in two parts.
"""

from collections.abc import Callable
from typing import Any

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._common import (
    BYTES,
    VECTOR,
    as_float,
    fence_shared,
    follow_previous,
    pipelined,
)
from tile_mhc.kernels._shapes import PIECE, backward_layout, factors_width, padded
from tile_mhc.kernels._weights import high_part, low_part, rounded_to_tf32

# Goes with the source of a pass, of which a file may have several; tests/emulator has a function of
# this name. It is called for the coordinate of a copy by TMA: the warp that issues those must wait,
# and TileLang 0.1.15 gives it nothing but copies. The first time it is `follow_previous`, and then
# nothing.
AFTER_PREVIOUS = r"""
#ifndef TILE_MHC_AFTER_PREVIOUS
#define TILE_MHC_AFTER_PREVIOUS
static __device__ __forceinline__ int after_previous(int token) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  return token;
}
#endif
"""

# Two warpgroups of 64 tokens each: while one waits for its product the other works.
MATMUL_THREADS = 256
FULL_ROW = T.GemmWarpPolicy.FullRow
FULL_COLUMN = T.GemmWarpPolicy.FullCol
SQUARE = T.GemmWarpPolicy.Square


@T.macro
def store_weight_parts(
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_weight_dtype: str,
    column_of: Callable[[T.int32], T.int32],
    tf32: T.int32,
    local: T.Buffer,
    high_twice: T.Buffer,
    low_then_zero: T.Buffer,
):
    """Split the columns of the weight that a CTA of the backward owns, for its products.

    `column_of` maps a column of the CTA to its column of x. A thread loads as many rows of a column
    as `local` holds before it stores the first part: left to the compiler, it waits for each load
    in turn (H100, 2026-11: 0.7 to 1.4 us of a backward with 24 mixes).
    Called before `follow_previous`, as the kernel before does not write the weight.
    """
    both, columns = high_twice.shape
    num_mixes, size = weight.shape
    part_rows = both // 2
    rows = local.shape[0]
    has_norm = norm_weight_dtype != ""
    for group, c in T.Parallel(part_rows // rows, columns):
        k = column_of(c)
        if has_norm:
            norm = T.if_then_else(k < size, T.cast(norm_weight[k], T.float32), 0.0)
        for r in T.unroll(rows):
            m = group * rows + r
            local[r] = T.if_then_else(
                m < num_mixes and k < size, T.cast(weight[m, k], T.float32), 0.0
            )
        for r in T.unroll(rows):
            m = group * rows + r
            # The arithmetic of `weight_value`.
            if has_norm:
                local[r] *= norm
            local[r] = T.Select(tf32 != 0, rounded_to_tf32(local[r]), local[r])
            high_twice[m, c] = high_part(local[r])
            high_twice[part_rows + m, c] = high_part(local[r])
            low_then_zero[m, c] = low_part(local[r])
            low_then_zero[part_rows + m, c] = T.cast(0, T.bfloat16)


@T.macro
def halve(values: T.Buffer, count: int, lane_bit: T.int32, distance: int):
    """Of `count` sums a lane keeps a half, and gives the other to the lane that keeps that one."""
    half = count // 2
    for k in T.unroll(half):
        kept = T.Select(lane_bit != 0, values[half + k], values[k])
        given = T.Select(lane_bit != 0, values[k], values[half + k])
        values[k] = kept + T.shfl_xor(given, distance)


def words_of(values: T.Buffer) -> T.Buffer:
    """The same registers of bfloat16 values, two to a word."""
    rows, count = (1, *values.shape)[-2:]
    return T.view(values, (rows, count // 2), T.uint32)


def element(words: T.Buffer, row: T.int32, v: T.int32) -> T.float32:
    """Value v of a row of `words_of` as float32, in one instruction.

    Of a bfloat16 value in the upper half of a register nvcc takes two, a move and a shift. With an
    index known when compiled this is a shift or a mask.
    """
    shifted = words[row, v // 2] << T.cast((1 - v % 2) * 16, T.uint32)
    return as_float(shifted & T.uint32(0xFFFF0000))


@T.macro
def still_read(shared: T.Buffer, last: T.Buffer):
    """Keep the pipeline from loading the next tile over one that the tensor cores still read.

    It hands a buffer back after the last statement that names it, done or not. nvcc drops the load.
    """
    last[0] = shared[0, 0]


@T.macro
def tile_sums(
    x_shared: T.Buffer,
    wide_shared: T.Buffer,
    streams: int,
    tid: T.int32,
    added: T.Buffer,
):
    """Sums over the columns of this CTA of its streams, times what `wide_shared` has for all.

    As many threads as `wide_shared` has vectors in a row share the sums of some tokens, which they
    halve until each has one: added[0] is sum tid % lanes // (lanes // count) of the `count`, by
    turns of tokens and then by streams.
    """
    block, columns = wide_shared.shape
    lanes = columns // VECTOR
    turns = block * lanes // MATMUL_THREADS
    count = turns * streams
    x = T.alloc_local((VECTOR,), T.bfloat16)
    wide = T.alloc_local((VECTOR,), T.bfloat16)
    x_words = words_of(x)
    wide_words = words_of(wide)
    c = tid % lanes * VECTOR
    for turn in T.unroll(turns):
        row = turn * (MATMUL_THREADS // lanes) + tid // lanes
        for v in T.vectorized(VECTOR):
            wide[v] = wide_shared[row, c + v]
        for i in T.unroll(streams):
            for v in T.vectorized(VECTOR):
                x[v] = x_shared[row, i * columns + c + v]
            added[turn * streams + i] = 0.0
            for v in T.unroll(VECTOR):
                added[turn * streams + i] += element(x_words, 0, v) * element(wide_words, 0, v)
    for level in tuple(range(count.bit_length() - 1)):
        distance = lanes >> (level + 1)
        halve(added, count >> level, tid & distance, distance)
    for level in tuple(range((lanes // count).bit_length() - 1)):
        added[0] += T.shfl_xor(added[0], 1 << level)


def projection_backward(
    num_mixes: int,
    size: int,
    n: int,
    has_sums: bool,
    held_dtype: str,
    norm_weight_dtype: str,
    into_dtype: str,
    limits: Architecture,
) -> tuple[Any, ...]:
    """Gradients of x and, per slice of tokens, of the weight, in one pass over x.

    A CTA owns some columns: their weights stay in shared memory, their weight gradient in
    registers, and tokens stream through.
    grad_x = G_high w_high + G_low w_high + G_high w_low + (x * r) * along;  grad_w = G^T x
    With n > 0 streams, the gradient of their aggregate joins before the one rounding of grad_x:
    pre_mix[t, i] * grad_input[t, h]. So does a gradient that x already has, of `held_dtype`.
    grad_x is of `into_dtype`, without one as x, and may be the memory of the one held. If it
    `has_sums`, the gradient of pre_mix is made too: sums over the columns of a CTA, by rows.
    """
    tokens = T.dynamic("num_tokens")
    slices = T.dynamic("num_slices")
    part_rows = padded(num_mixes)
    has_held = held_dtype != ""
    both = 2 * part_rows
    width = factors_width(n)
    hidden_size = size // max(n, 1)
    block = limits.matmul_tokens
    joins = has_held or into_dtype != ""
    streams, stream_pieces = backward_layout(num_mixes, size, n, limits, joins, has_sums)
    num_pieces = streams * stream_pieces
    # A tuple is unrolled as the kernel is traced: TMA wants its pieces one by one.
    pieces = tuple(range(num_pieces))
    columns = num_pieces * PIECE
    # Columns of a stream: a CTA takes the same of several, to read grad_input once for all of them.
    wide = stream_pieces * PIECE
    groups = max(n // streams, 1)
    out_dtype = into_dtype or "bfloat16"
    # A box of TMA has rows of 128 bytes.
    out_columns = 128 // BYTES[out_dtype]
    held_columns = 128 // BYTES[held_dtype] if has_held else PIECE
    fixed = (2 * both * 2 + block * BYTES[out_dtype]) * columns
    stage = block * (
        columns * (2 + BYTES[held_dtype]) + both * 2 + width * 4 + (wide * 2 if n else 0)
    )
    stages = min(4, (limits.matmul_bytes - fixed) // stage)
    # Of a tensor core's operand a warp has 16 columns, or more.
    weight_policy = FULL_ROW if columns >= 16 * MATMUL_THREADS // 32 else SQUARE
    store_tile = T.tma_copy if limits.has_tma else T.copy
    # Whether all products are on their way at once: so it was measured with four pieces of streams,
    # and with others as it is there.
    at_once = n > 0 and num_pieces == 4
    # Whether x and grad_input are asked for before the kernel before this has ended. On Hopper, of
    # whose code it was seen that all of these copies are by TMA.
    reads_early = at_once and limits.has_wgmma
    waits_later = {"wg_wait": -1 if at_once else 0}
    # Threads that share a token in its sums, and how many tokens each has then.
    lanes = wide // VECTOR
    turns = block * lanes // MATMUL_THREADS

    def after_previous(token: T.int32):
        return T.call_extern("int32", "after_previous", token)

    def start(column: T.int32, piece: int):
        """The column of x at which a piece of a CTA's columns starts."""
        stream = column % groups * streams + piece // stream_pieces
        return stream * hidden_size + column // groups * wide + piece % stream_pieces * PIECE

    @T.macro
    def body(
        grad_parts: T.Tensor,
        factors: T.Tensor,
        x: T.Tensor,
        weight: T.Tensor,
        norm_weight: T.Tensor,
        grad_input: T.Tensor,
        accumulated: T.Tensor,
        grad_x: T.Tensor,
        sums: T.Tensor,
        partials: T.Tensor,
        slice_tokens: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(size // columns, slices, threads=MATMUL_THREADS) as (column, slot):
            # The rows of G are [high | low]; against these they give all products but low x low.
            high_twice = T.alloc_shared((both, columns), T.bfloat16)
            low_then_zero = T.alloc_shared((both, columns), T.bfloat16)
            x_shared = T.alloc_shared((block, columns), T.bfloat16)
            g_shared = T.alloc_shared((block, both), T.bfloat16)
            factors_shared = T.alloc_shared((block, width), T.float32)
            out_shared = T.alloc_shared((block, columns), out_dtype)
            w_local = T.alloc_local((part_rows * columns // MATMUL_THREADS,), T.float32)
            grad_local = T.alloc_fragment((block, columns), T.float32)
            weight_local = T.alloc_fragment((columns, both), T.float32)
            tile_weight = T.alloc_fragment((columns, both), T.float32)
            last = T.alloc_local((1,), T.bfloat16)
            if has_sums:
                added = T.alloc_local((turns * streams,), T.float32)
            if n > 0:
                wide_shared = T.alloc_shared((block, wide), T.bfloat16)
                T.annotate_layout({wide_shared: make_swizzled_layout(wide_shared)})
            if has_held:
                sum_shared = T.alloc_shared((block, columns), held_dtype)
                T.annotate_layout({sum_shared: make_swizzled_layout(sum_shared)})
            tid = T.get_thread_binding()
            if reads_early:
                T.import_source(AFTER_PREVIOUS)
            store_weight_parts(
                weight,
                norm_weight,
                norm_weight_dtype,
                lambda c: start(column, c // PIECE) + c % PIECE,
                tf32,
                w_local,
                high_twice,
                low_then_zero,
            )
            if not reads_early:
                follow_previous()
            fence_shared()
            T.sync_threads()
            T.clear(weight_local)
            first = slot * slice_tokens
            for step in pipelined(T.ceildiv(T.min(slice_tokens, tokens - first), block), stages):
                t0 = first + step * block
                t1 = t0 + block
                for p in pieces:
                    k0 = start(column, p)
                    c0 = p * PIECE
                    T.copy(x[t0:t1, k0 : k0 + PIECE], x_shared[0:block, c0 : c0 + PIECE])
                    if has_held:
                        for k in tuple(range(0, PIECE, held_columns)):
                            T.copy(
                                accumulated[t0:t1, k0 + k : k0 + k + held_columns],
                                sum_shared[0:block, c0 + k : c0 + k + held_columns],
                            )
                if not at_once:
                    T.copy(grad_parts[t0, 0], g_shared)
                    T.copy(factors[t0, 0], factors_shared)
                if n > 0:
                    for k in tuple(range(0, wide, PIECE)):
                        h0 = column // groups * wide + k
                        T.copy(
                            grad_input[t0:t1, h0 : h0 + PIECE],
                            wide_shared[0:block, k : k + PIECE],
                        )
                if at_once:
                    if reads_early:
                        # Who multiplies writes nothing before it has these.
                        T.copy(grad_parts[after_previous(t0), 0], g_shared)
                    else:
                        T.copy(grad_parts[t0, 0], g_shared)
                    T.copy(factors[t0, 0], factors_shared)
                else:
                    T.gemm(
                        x_shared,
                        g_shared,
                        tile_weight,
                        transpose_A=True,
                        clear_accum=True,
                        policy=weight_policy,
                    )
                T.gemm(
                    g_shared,
                    high_twice,
                    grad_local,
                    clear_accum=True,
                    policy=FULL_COLUMN,
                    annotations={"wg_wait": -1},
                )
                T.gemm(
                    g_shared,
                    low_then_zero,
                    grad_local,
                    policy=FULL_COLUMN,
                    annotations=waits_later,
                )
                if at_once:
                    T.gemm(
                        x_shared,
                        g_shared,
                        tile_weight,
                        transpose_A=True,
                        clear_accum=True,
                        policy=weight_policy,
                        annotations=waits_later,
                    )
                if has_sums:
                    # Beside the products.
                    tile_sums(x_shared, wide_shared, streams, tid, added)
                    turn = tid % lanes // (lanes // turns)
                    t = t0 + turn * (MATMUL_THREADS // lanes) + tid // lanes
                    if tid % (lanes // (turns * streams)) == 0 and t < tokens:
                        stream = tid % lanes // (lanes // (turns * streams)) % streams
                        sums[column // groups, t, column % groups * streams + stream] = added[0]
                if at_once and limits.has_wgmma:
                    T.wait_wgmma(0)
                    still_read(g_shared, last)
                for k, m in T.Parallel(columns, both):
                    weight_local[k, m] += tile_weight[k, m] * factors_shared[0, 2]
                for i, k in T.Parallel(block, columns):
                    grad_local[i, k] = (
                        grad_local[i, k] * factors_shared[0, 2]
                        + (T.cast(x_shared[i, k], T.float32) * factors_shared[i, 0])
                        * factors_shared[i, 1]
                    )
                if n > 0:
                    for i, k in T.Parallel(block, columns):
                        grad_local[i, k] += factors_shared[
                            i, 3 + column % groups * streams + k // wide
                        ] * T.cast(wide_shared[i, k % wide], T.float32)
                if has_held:
                    for i, k in T.Parallel(block, columns):
                        grad_local[i, k] += T.cast(sum_shared[i, k], T.float32)
                if limits.has_tma:
                    # The tile before has left out_shared: its store ran beside these products.
                    T.tma_store_wait(0)
                T.copy(grad_local, out_shared)
                for p in pieces:
                    k0 = start(column, p)
                    c0 = p * PIECE
                    for k in tuple(range(0, PIECE, out_columns)):
                        store_tile(
                            out_shared[0:block, c0 + k : c0 + k + out_columns],
                            grad_x[t0:t1, k0 + k : k0 + k + out_columns],
                        )
            if limits.has_tma:
                T.tma_store_wait(0)
            if reads_early:
                # Long done: for TileLang, which launches beside the kernel before if this is there.
                follow_previous()
            # By rows of the weight, as they are written. A lane has two neighbours of every eighth
            # column: with 4 floats between rows all lanes store to banks of their own.
            weight_shared = T.alloc_shared((both, columns + 4), T.float32)
            for k, m in T.Parallel(columns, both):
                weight_shared[m, k] = weight_local[k, m]
            for p in pieces:
                for m, k in T.Parallel(num_mixes, PIECE):
                    c = p * PIECE + k
                    partials[slot, m, start(column, p) + k] = (
                        weight_shared[m, c] + weight_shared[part_rows + m, c]
                    )

    return body, tokens, slices
