"""RMS statistic + (n*H) -> n(n+2) matmul, and its gradients.

mixes[t, m] = (sum_k x[t, k] * w[m, k]) * r[t],  r[t] = rsqrt(mean_k x[t, k]**2 + eps)

The streams are exact in bfloat16. A weight, or a gradient, is split into two bfloat16 parts,
high = bf16(w) and low = bf16(w - high), which lie side by side as columns of one bfloat16 matmul:
near-fp32 products at the tensor core cost of TF32, which would keep 11 bits. With a norm weight, w
is weight * norm_weight in float32, formed wherever a kernel reads the weight.

`norm_weight_dtype` is empty without a norm weight. A kernel gets one element in place of a tensor
that it does not read.
"""

import math

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._backward import FULL_ROW, MATMUL_THREADS, projection_backward
from tile_mhc.kernels._common import (
    BYTES,
    SIMT,
    VECTOR,
    as_float,
    as_int,
    builder,
    fence_shared,
    follow_previous,
    load_mixes,
    pipelined,
    store_mixes,
)
from tile_mhc.kernels._shapes import (
    BACKWARD_TOKENS,
    BLOCK_K,
    BLOCK_TOKENS,
    SUM_LANES,
    factors_width,
    padded,
)
from tile_mhc.kernels._weights import high_part, low_part, norm_shape, rounded_to_tf32

THREADS = 128
# Sums over splits or slices: values that a thread loads before it adds the first.
AT_ONCE = 4
# projection_norm: mixes per thread, in one access. H200, 2026-11, us of projection.fwd with one,
# two and four: 36.4, 36.1 and 36.4 at T=4096 H=2560, 79.2, 78.0 and 78.3 there with n=8, 17.1, 16.6
# and 17.0 at 1024x2560, 11.1, 11.2 and 11.4 at 16x7168.
NORM_MIXES = 2
# Past this a sum of squares may have overflowed float32: such a token is done again on scaled
# streams. Inf and NaN come here too, and stay what they are.
LARGE_SQUARES = 1e37
RESCUE_SCALE = 2.0**-76
# Where the gradient of the bare product is below 2**-60 in a whole tile, as beside streams near
# the bfloat16 maximum, a power of two lifts it: its low part would be subnormal otherwise. This is
# 2**-60's exponent field.
SMALL_EXPONENT = 127 - 60


def weight_value(
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_weight_dtype: str,
    m: T.int32,
    k: T.int32,
    tf32: T.int32,
):
    """The float32 that the two parts of a weight stand for."""
    value = T.cast(weight[m, k], T.float32)
    if norm_weight_dtype:
        value = value * T.cast(norm_weight[k], T.float32)
    return T.Select(tf32 != 0, rounded_to_tf32(value), value)


@builder({})
def projection_fwd(
    num_mixes: int, size: int, *, weight_dtype: str, norm_weight_dtype: str, limits: Architecture
):
    """Products and sums of squares, by slices of K: split s takes `blocks` blocks of it."""
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    part_rows = padded(num_mixes)
    num_blocks = size // BLOCK_K
    # Columns at a time, of which a block has several where shared memory is small.
    depth = limits.matmul_columns
    turns = BLOCK_K // depth
    # One CTA per SM (its registers fill it): a deep pipeline keeps the memory busy.
    has_norm = norm_weight_dtype != ""
    weight_bytes = num_mixes * BYTES[weight_dtype] + BYTES[norm_weight_dtype]
    stage = (BLOCK_TOKENS * 2 + weight_bytes) * depth
    stages = min(6, (limits.matmul_bytes - 4 * part_rows * depth) // stage)

    @T.prim_func
    def projection_fwd_kernel(
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        blocks: T.int32,
        tf32: T.int32,
    ):
        # The split is the fastest index: the splits of one token tile run together. On one axis, as
        # the other two of a grid end at 65535.
        tiles = T.ceildiv(tokens, BLOCK_TOKENS)
        with T.Kernel(splits * tiles, threads=MATMUL_THREADS) as cta:
            follow_previous()
            s = T.truncmod(cta, splits)
            x_shared = T.alloc_shared((BLOCK_TOKENS, depth), T.bfloat16)
            w_shared = T.alloc_shared((num_mixes, depth), weight_dtype)
            if has_norm:
                norm_shared = T.alloc_shared((depth,), norm_weight_dtype)
            w_local = T.alloc_fragment((num_mixes, depth), T.float32)
            # Rows [high; low], split as they are read: no pass of its own over the weight. Rows of
            # padding stay unwritten, and make columns of the product that nobody reads.
            parts = T.alloc_shared((2 * part_rows, depth), T.bfloat16)
            product = T.alloc_fragment((BLOCK_TOKENS, 2 * part_rows), T.float32)
            block_product = T.alloc_fragment((BLOCK_TOKENS, 2 * part_rows), T.float32)
            x_local = T.alloc_fragment((BLOCK_TOKENS, depth), T.bfloat16)
            total = T.alloc_shared((BLOCK_TOKENS, 2 * part_rows), T.float32)
            square = T.alloc_fragment((BLOCK_TOKENS, 8), T.float32)
            square_sum = T.alloc_fragment((BLOCK_TOKENS,), T.float32)
            T.annotate_layout({x_shared: make_swizzled_layout(x_shared)})
            # The last tokens first: whoever reads x next begins with the first, still in L2.
            t0 = (tiles - 1 - T.truncdiv(cta, splits)) * BLOCK_TOKENS
            T.clear(product)
            T.clear(square)
            for b in pipelined(T.min(blocks, num_blocks - s * blocks) * turns, stages):
                k0 = (s * blocks * turns + b) * depth
                T.copy(x[t0, k0], x_shared)
                T.copy(weight[0, k0], w_shared)
                if has_norm:
                    T.copy(norm_weight[k0], norm_shared)
                T.copy(w_shared, w_local)
                if has_norm:
                    for m, k in T.Parallel(num_mixes, depth):
                        w_local[m, k] *= T.cast(norm_shared[k], T.float32)
                if tf32 != 0:
                    for m, k in T.Parallel(num_mixes, depth):
                        w_local[m, k] = rounded_to_tf32(w_local[m, k])
                for m, k in T.Parallel(num_mixes, depth):
                    parts[m, k] = high_part(w_local[m, k])
                    parts[part_rows + m, k] = low_part(w_local[m, k])
                fence_shared()
                T.copy(x_shared, x_local)
                # Eight columns at a time, as the tensor core's operand lies across the lanes: the
                # registers that feed the product feed the statistic too.
                for g in T.serial(depth // 8):
                    for i, v in T.Parallel(BLOCK_TOKENS, 8):
                        square[i, v] += T.cast(x_local[i, g * 8 + v], T.float32) * T.cast(
                            x_local[i, g * 8 + v], T.float32
                        )
                # Tensor cores truncate their sums: they add only within a block.
                T.gemm(
                    x_local,
                    parts,
                    block_product,
                    transpose_B=True,
                    clear_accum=True,
                    policy=FULL_ROW,
                )
                for i, m in T.Parallel(BLOCK_TOKENS, 2 * part_rows):
                    product[i, m] += block_product[i, m]
            # s and t0, as variables: each index written out below would divide by the number of
            # splits again, in 64 bits. 5 of 85 us with n = 8 at T=4096 H=2560, elsewhere 0.5.
            own = T.alloc_local((2,), T.int32)
            own[0] = s
            own[1] = t0
            T.reduce_sum(square, square_sum, dim=1)
            for i in T.Parallel(BLOCK_TOKENS):
                if own[1] + i < tokens:
                    squares[own[0], own[1] + i] = square_sum[i]
            T.copy(product, total)
            for i, m in T.Parallel(BLOCK_TOKENS, num_mixes):
                if own[1] + i < tokens:
                    products[own[0], own[1] + i, m] = total[i, m] + total[i, part_rows + m]

    return projection_fwd_kernel


@T.macro
def split_sums(
    products: T.Tensor,
    squares: T.Tensor,
    splits: T.int32,
    t: T.int32,
    m: T.int32,
    width: int,
    lane: T.int32,
    sharing: int,
    any_splits: bool,
    out: T.Buffer,
):
    """out = (products m to m + width - 1 of token t, its sum of squares), summed over the splits.

    Where there are more than SUM_LANES, which is where tokens are few, SUM_LANES neighbours share a
    mix, each with its own `lane`: the rounds of loads of one thread would be most of the time. The
    number of splits alone decides, so that every kernel adds in the same order. Alone, `lane` is 0.
    `any_splits` is for another's, of which one thread takes any number, in their order.
    """
    for k in T.unroll(width + 1):
        out[k] = 0.0
    # All loads of a round come before its first sum; a loop over single splits would wait for each.
    at_once = SUM_LANES if sharing == 1 else AT_ONCE
    one_round = sharing == 1 and not any_splits
    rounds = 1 if one_round else T.ceildiv(splits, sharing * at_once)
    parts = T.alloc_local((at_once, width), T.float32)
    squared = T.alloc_local((at_once,), T.float32)
    for turn in T.unroll(rounds, unroll_factor=1):
        for k in T.unroll(at_once):
            s = (turn * at_once + k) * sharing + lane
            if s < splits:
                for v in T.vectorized(width):
                    parts[k, v] = products[s, t, m + v]
                squared[k] = squares[s, t]
        for k in T.unroll(at_once):
            if (turn * at_once + k) * sharing + lane < splits:
                for v in T.unroll(width):
                    out[v] += parts[k, v]
                out[width] += squared[k]
    if sharing > 1:
        for level in T.unroll(sharing.bit_length() - 1):
            for k in T.unroll(width + 1):
                out[k] += T.shfl_xor(out[k], 1 << level)


@T.macro
def scale_sums(sums: T.Buffer, width: int, size: T.float32, eps: T.float32, out: T.Buffer):
    """out = (products times r, r), r the RMS factor: sums are those of `split_sums`."""
    out[width] = T.rsqrt(sums[width] / size + eps)
    for v in T.unroll(width):
        out[v] = sums[v] * out[width]


@T.macro
def token_mix(
    products: T.Tensor,
    squares: T.Tensor,
    x: T.Tensor,
    weight: T.Tensor,
    norm_weight: T.Tensor,
    norm_weight_dtype: str,
    splits: T.int32,
    t: T.int32,
    m: T.int32,
    width: int,
    lane: T.int32,
    sharing: int,
    size: int,
    eps: T.float32,
    tf32: T.int32,
    out: T.Buffer,
):
    """out = (mixes m to m + width - 1 of token t, its inv_rms): the arithmetic of every mix but
    those of the readout in one pass, which has no splits. See `split_sums`.

    Where the products are another's there is no weight, of which one element stands here, and no
    token can be done again.
    """
    sums = T.alloc_local((width + 1,), T.float32)
    exact = T.alloc_local((width + 1,), T.float64)
    value = T.alloc_local((1,), T.float32)
    has_weight = weight.shape[0] > 1
    split_sums(products, squares, splits, t, m, width, lane, sharing, not has_weight, sums)
    if not has_weight:
        scale_sums(sums, width, size, eps, out)
    elif not sums[width] < LARGE_SQUARES:
        for k in T.unroll(width + 1):
            exact[k] = 0.0
        # Rolled up: unrolled it would take registers from the many that never come here.
        for k in T.unroll(size, unroll_factor=1):
            value[0] = T.cast(x[t, k], T.float32) * RESCUE_SCALE
            for v in T.unroll(width):
                exact[v] += T.cast(value[0], T.float64) * T.cast(
                    weight_value(weight, norm_weight, norm_weight_dtype, m + v, k, tf32), T.float64
                )
            exact[width] += T.cast(value[0] * value[0], T.float64)
        # eps is far below the mean square here, and its scaled value below float32.
        value[0] = T.rsqrt(T.cast(exact[width], T.float32) / size)
        for v in T.unroll(width):
            out[v] = T.cast(exact[v], T.float32) * value[0]
        out[width] = value[0] * RESCUE_SCALE
    else:
        scale_sums(sums, width, size, eps, out)


@builder(SIMT)
def projection_norm(
    num_mixes: int,
    size: int,
    many_splits: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    streams_dtype: str,
):
    """Sum the splits and apply the RMS factor."""
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    sharing = SUM_LANES if many_splits else 1
    width = math.gcd(num_mixes, NORM_MIXES)
    groups = num_mixes // width

    @T.prim_func
    def projection_norm_kernel(
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        x: T.Tensor[(tokens, size), streams_dtype],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        eps: T.float32,
        tf32: T.int32,
    ):
        with T.Kernel(T.ceildiv(tokens * groups * sharing, THREADS), threads=THREADS) as block:
            follow_previous()
            index = (block * THREADS + T.get_thread_binding()) // sharing
            # A variable, as in `projection_fwd`. A thread past the end does the last token again:
            # its neighbours may need its sums.
            t = T.alloc_local((1,), T.int32)
            t[0] = T.min(index // groups, tokens - 1)
            m = index % groups * width
            lane = T.get_thread_binding() % sharing
            out = T.alloc_local((width + 1,), T.float32)
            token_mix(
                products,
                squares,
                x,
                weight,
                norm_weight,
                norm_weight_dtype,
                splits,
                t[0],
                m,
                width,
                lane,
                sharing,
                size,
                eps,
                tf32,
                out,
            )
            if index < tokens * groups and lane == 0:
                for v in T.vectorized(width):
                    mixes[t[0], m + v] = out[v]
                if m == 0:
                    inv_rms[t[0]] = out[width]

    return projection_norm_kernel


@T.macro
def store_parts(
    values: T.Buffer,
    per_token: T.Buffer,
    t: T.int32,
    tokens: T.int32,
    grad_parts: T.Tensor,
    factors: T.Tensor,
):
    """The gradient of the bare product in two bfloat16 parts, and the token's factors beside it.

    Called by one thread per token, in CTAs of THREADS, whole tiles. `values` are zero past
    the last token. A tile gets a common power of two, whose inverse is the third factor.
    """
    part_rows = values.shape[0]
    tile_warps = BACKWARD_TOKENS // 32
    tid = T.get_thread_binding()
    row = T.alloc_local((2 * part_rows,), T.bfloat16)
    largest = T.alloc_local((1,), T.float32)
    lift = T.alloc_local((1,), T.int32)
    shared = T.alloc_shared((THREADS // 32,), T.float32)
    largest[0] = 0.0
    for m in T.unroll(part_rows):
        largest[0] = T.max(largest[0], T.abs(values[m]))
    largest[0] = T.warp_reduce_max(largest[0])
    if tid % 32 == 0:
        shared[tid // 32] = largest[0]
    T.sync_threads()
    for warp in T.unroll(tile_warps):
        largest[0] = T.max(largest[0], shared[tid // BACKWARD_TOKENS * tile_warps + warp])
    lift[0] = T.max(SMALL_EXPONENT - (as_int(largest[0]) >> 23), 0)
    largest[0] = as_float((127 + lift[0]) << 23)
    per_token[2] = as_float((127 - lift[0]) << 23)
    if t < tokens:
        for m in T.unroll(part_rows):
            values[m] *= largest[0]
            row[m] = T.cast(values[m], T.bfloat16)
            row[part_rows + m] = T.cast(values[m] - T.cast(row[m], T.float32), T.bfloat16)
        for m in T.unroll(2 * part_rows // VECTOR):
            for v in T.vectorized(VECTOR):
                grad_parts[t, m * VECTOR + v] = row[m * VECTOR + v]
        store_mixes(per_token, per_token.shape[0], factors, t, 0)


@T.macro
def product_gradient(
    values: T.Buffer, mixed: T.Buffer, per_token: T.Buffer, size: T.float32, tf32: T.int32
):
    """values, a token's gradient of its mixes, becomes that of the bare product.

    per_token has inv_rms, and zero for the factor of x from the statistic.
    """
    for m in T.unroll(mixed.shape[0]):
        per_token[1] += values[m] * mixed[m]
        values[m] *= per_token[0]
        if tf32 != 0:
            values[m] = rounded_to_tf32(values[m])
    per_token[1] = -per_token[1] * per_token[0] / size


@builder(SIMT)
def projection_norm_bwd(num_mixes: int, size: int, n: int):
    """Gradient of the bare product, in two parts, and what else `projection_bwd` needs per token.

    d mixes/d product = r;  d mixes/d x through r = -x * r**2 / K * mixes: here the factor without
    one r, which joins x first where it is used, so that it cannot overflow. A tile of tokens gets a
    common power of two; its inverse goes along. With n > 0 streams, so does pre_mix.
    """
    tokens = T.dynamic("num_tokens")
    part_rows = padded(num_mixes)
    width = factors_width(n)

    @T.prim_func
    def projection_norm_bwd_kernel(
        grad: T.Tensor[(tokens, num_mixes), T.float32],
        mixes: T.Tensor[(tokens, num_mixes), T.float32],
        inv_rms: T.Tensor[(tokens,), T.float32],
        pre_mix: T.Tensor[(tokens, n) if n else (1,), T.float32],
        grad_parts: T.Tensor[(tokens, 2 * part_rows), T.bfloat16],
        factors: T.Tensor[(tokens, width), T.float32],
        tf32: T.int32,
    ):
        # One thread per token; a CTA takes whole tiles of tokens.
        with T.Kernel(T.ceildiv(tokens, THREADS), threads=THREADS) as block:
            follow_previous()
            tid = T.get_thread_binding()
            t = block * THREADS + tid
            values = T.alloc_local((part_rows,), T.float32)
            mixed = T.alloc_local((num_mixes,), T.float32)
            per_token = T.alloc_local((width,), T.float32)
            for m in T.unroll(part_rows):
                values[m] = 0.0
            for c in T.unroll(width):
                per_token[c] = 0.0
            if t < tokens:
                load_mixes(grad, t, 0, num_mixes, values)
                load_mixes(mixes, t, 0, num_mixes, mixed)
                per_token[0] = inv_rms[t]
                product_gradient(values, mixed, per_token, size, tf32)
                if n > 0:
                    for i in T.unroll(n):
                        per_token[3 + i] = pre_mix[t, i]
            store_parts(values, per_token, t, tokens, grad_parts, factors)

    return projection_norm_bwd_kernel


@builder({})
def projection_bwd(
    num_mixes: int,
    size: int,
    n: int,
    *,
    held_dtype: str,
    weight_dtype: str,
    norm_weight_dtype: str,
    into_dtype: str,
    limits: Architecture,
):
    """`projection_backward`, with n > 0 streams whose mix has a gradient already."""
    has_held = held_dtype != ""
    of_tensors = (held_dtype, norm_weight_dtype, into_dtype)
    body, tokens, slices = projection_backward(num_mixes, size, n, False, *of_tensors, limits)
    wide_shape = (tokens, size // n) if n else (1,)

    @T.prim_func
    def projection_bwd_kernel(
        grad_parts: T.Tensor[(tokens, 2 * padded(num_mixes)), T.bfloat16],
        factors: T.Tensor[(tokens, factors_width(n)), T.float32],
        x: T.Tensor[(tokens, size), T.bfloat16],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        grad_input: T.Tensor[wide_shape, T.bfloat16],
        accumulated: T.Tensor[(tokens, size) if has_held else (1,), held_dtype or T.bfloat16],
        grad_x: T.Tensor[(tokens, size), into_dtype or T.bfloat16],
        partials: T.Tensor[(slices, num_mixes, size), T.float32],
        slice_tokens: T.int32,
        tf32: T.int32,
    ):
        body(
            grad_parts,
            factors,
            x,
            weight,
            norm_weight,
            grad_input,
            accumulated,
            grad_x,
            None,
            partials,
            slice_tokens,
            tf32,
        )

    return projection_bwd_kernel


@builder(SIMT)
def projection_weight_bwd(
    num_mixes: int,
    size: int,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    into_weight_dtype: str,
    into_norm_weight_dtype: str,
):
    """Sum the slices in order; with a norm weight, part the gradient between the two factors.

    With `into_weight_dtype` the two have destinations: each is written or, if it `adds`, added to.
    """
    slices = T.dynamic("num_slices")
    vector = math.gcd(size, 4)
    has_norm = norm_weight_dtype != ""
    directed = into_weight_dtype != ""
    # A thread takes one row of the weight; with a norm weight all, as it sums over them.
    rows = num_mixes if has_norm else 1
    threads = 32 if has_norm else THREADS

    @T.prim_func
    def projection_weight_bwd_kernel(
        partials: T.Tensor[(slices, num_mixes, size), T.float32],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        grad_weight: T.Tensor[(num_mixes, size), into_weight_dtype or weight_dtype],
        grad_norm_weight: T.Tensor[
            norm_shape(size, norm_weight_dtype),
            into_norm_weight_dtype or norm_weight_dtype or T.float32,
        ],
        adds: T.int32,
        adds_norm: T.int32,
    ):
        with T.Kernel(T.ceildiv(size, threads * vector), num_mixes // rows, threads=threads) as (
            block,
            first,
        ):
            follow_previous()
            k = (block * threads + T.get_thread_binding()) * vector
            total = T.alloc_local((vector,), T.float32)
            norm = T.alloc_local((vector,), T.float32)
            parts = T.alloc_local((AT_ONCE, vector), T.float32)
            if k < size:
                for v in T.unroll(vector):
                    norm[v] = 0.0
                for row in T.serial(rows):
                    m = first * rows + row
                    for v in T.unroll(vector):
                        total[v] = 0.0
                    for turn in T.serial(T.ceildiv(slices, AT_ONCE)):
                        for i in T.unroll(AT_ONCE):
                            if turn * AT_ONCE + i < slices:
                                for v in T.vectorized(vector):
                                    parts[i, v] = partials[turn * AT_ONCE + i, m, k + v]
                        for i in T.unroll(AT_ONCE):
                            if turn * AT_ONCE + i < slices:
                                for v in T.unroll(vector):
                                    total[v] += parts[i, v]
                    if has_norm:
                        for v in T.vectorized(vector):
                            norm[v] += total[v] * T.cast(weight[m, k + v], T.float32)
                        for v in T.vectorized(vector):
                            total[v] *= T.cast(norm_weight[k + v], T.float32)
                    if directed and adds != 0:
                        for v in T.vectorized(vector):
                            total[v] += T.cast(grad_weight[m, k + v], T.float32)
                    for v in T.vectorized(vector):
                        grad_weight[m, k + v] = T.cast(total[v], grad_weight.dtype)
                if has_norm:
                    if directed and adds_norm != 0:
                        for v in T.vectorized(vector):
                            norm[v] += T.cast(grad_norm_weight[k + v], T.float32)
                    for v in T.vectorized(vector):
                        grad_norm_weight[k + v] = T.cast(norm[v], grad_norm_weight.dtype)

    return projection_weight_bwd_kernel
