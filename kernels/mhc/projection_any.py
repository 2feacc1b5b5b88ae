"""The matmuls of the projection for streams of any streams_dtype and width.

The kernels of `projection` copy whole 16-byte units of bfloat16; these load element by element
under a mask, as wide as the rows are aligned. Streams are split as the weight is: float16 is
exactly two bfloat16 parts, float32 is so to 2**-17. The products of all parts are summed, so that
one element of a mix is as near to float64 as with bfloat16 streams.
"""

import tilelang.language as T
from tilelang import PassConfigKey

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._backward import MATMUL_THREADS, store_weight_parts
from tile_mhc.kernels._common import SIMT, builder, follow_previous
from tile_mhc.kernels._shapes import ANY_COLUMNS, ANY_K, ANY_TOKENS, factors_width, padded
from tile_mhc.kernels._weights import high_part, low_part, norm_shape
from tile_mhc.kernels.projection import weight_value

# The operands come through registers, which wgmma would want in another layout and a proxy fence.
MATMUL = SIMT | {PassConfigKey.TL_DISABLE_WGMMA: True}
LARGEST_BFLOAT16 = 255.0 * 2.0**120


def high_stream(value: T.float32):
    """The high part of a stream's value; the largest of float32 do not round to infinity."""
    return high_part(T.max(T.min(value, LARGEST_BFLOAT16), -LARGEST_BFLOAT16))


def low_stream(value: T.float32):
    return T.cast(value - T.cast(high_stream(value), T.float32), T.bfloat16)


@T.macro
def split_streams(x: T.Buffer, high: T.Buffer, low: T.Buffer):
    """high + low = x, both bfloat16; of bfloat16 streams there is no low part."""
    if low is None:
        T.copy(x, high)
    else:
        for i, k in T.Parallel(high.shape[0], high.shape[1]):
            high[i, k] = high_stream(T.cast(x[i, k], T.float32))
            low[i, k] = low_stream(T.cast(x[i, k], T.float32))


@builder(MATMUL)
def projection_any_fwd(
    num_mixes: int,
    size: int,
    *,
    streams_dtype: str,
    weight_dtype: str,
    norm_weight_dtype: str,
    limits: Architecture,
):
    """Products and sums of squares, by slices of K: split s takes `blocks` blocks of it."""
    tokens = T.dynamic("num_tokens")
    splits = T.dynamic("num_splits")
    part_rows = padded(num_mixes)
    num_blocks = -(-size // ANY_K)
    ctas = limits.any_ctas
    has_low = streams_dtype != "bfloat16"

    @T.prim_func
    def projection_any_fwd_kernel(
        x: T.Tensor[(tokens, size), streams_dtype],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        products: T.Tensor[(splits, tokens, num_mixes), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        blocks: T.int32,
        tf32: T.int32,
    ):
        tiles = T.ceildiv(tokens, ANY_TOKENS)
        with T.Kernel(tiles, splits, threads=MATMUL_THREADS) as (tile, s):
            follow_previous()
            if num_mixes <= 24:
                T.annotate_min_blocks_per_sm(ctas)
            x_local = T.alloc_fragment((ANY_TOKENS, ANY_K), streams_dtype)
            x_high = T.alloc_shared((ANY_TOKENS, ANY_K), T.bfloat16)
            x_low = T.alloc_shared((ANY_TOKENS, ANY_K), T.bfloat16) if has_low else None
            # Rows of padding stay unwritten, and make columns of the product that nobody reads.
            parts = T.alloc_shared((2 * part_rows, ANY_K), T.bfloat16)
            product = T.alloc_fragment((ANY_TOKENS, 2 * part_rows), T.float32)
            block_product = T.alloc_fragment((ANY_TOKENS, 2 * part_rows), T.float32)
            total = T.alloc_shared((ANY_TOKENS, 2 * part_rows), T.float32)
            square = T.alloc_fragment((ANY_TOKENS, ANY_K), T.float32)
            square_sum = T.alloc_fragment((ANY_TOKENS,), T.float32)
            # The last tokens first: whoever reads x next begins with the first, still in L2.
            t0 = (tiles - 1 - tile) * ANY_TOKENS
            count = T.min(blocks, num_blocks - s * blocks)
            T.clear(product)
            T.clear(square)
            T.copy(x[t0, s * blocks * ANY_K], x_local)
            for b in T.serial(count):
                k0 = (s * blocks + b) * ANY_K
                split_streams(x_local, x_high, x_low)
                for i, k in T.Parallel(ANY_TOKENS, ANY_K):
                    square[i, k] += T.cast(x_local[i, k], T.float32) * T.cast(
                        x_local[i, k], T.float32
                    )
                for m, k in T.Parallel(num_mixes, ANY_K):
                    w = T.if_then_else(
                        k0 + k < size,
                        weight_value(weight, norm_weight, norm_weight_dtype, m, k0 + k, tf32),
                        0.0,
                    )
                    parts[m, k] = high_part(w)
                    parts[part_rows + m, k] = low_part(w)
                # Asked for before the products: they hide its latency.
                if b + 1 < count:
                    T.copy(x[t0, k0 + ANY_K], x_local)
                # Tensor cores truncate their sums: they add only within a block.
                T.gemm(x_high, parts, block_product, transpose_B=True, clear_accum=True)
                if has_low:
                    T.gemm(x_low, parts, block_product, transpose_B=True)
                for i, m in T.Parallel(ANY_TOKENS, 2 * part_rows):
                    product[i, m] += block_product[i, m]
            T.reduce_sum(square, square_sum, dim=1)
            for i in T.Parallel(ANY_TOKENS):
                if t0 + i < tokens:
                    squares[s, t0 + i] = square_sum[i]
            T.copy(product, total)
            for i, m in T.Parallel(ANY_TOKENS, num_mixes):
                if t0 + i < tokens:
                    products[s, t0 + i, m] = total[i, m] + total[i, part_rows + m]

    return projection_any_fwd_kernel


@builder(MATMUL)
def projection_any_bwd(
    num_mixes: int,
    size: int,
    n: int,
    *,
    held_dtype: str,
    streams_dtype: str,
    weight_dtype: str,
    norm_weight_dtype: str,
    into_dtype: str,
):
    """Gradients of x and, per slice of tokens, of the weight, in one pass over x.

    As `projection_bwd`: a CTA owns some columns, and tokens stream through. A column lies in stream
    column // H, at column % H of the aggregate's gradient.
    """
    tokens = T.dynamic("num_tokens")
    slices = T.dynamic("num_slices")
    part_rows = padded(num_mixes)
    both = 2 * part_rows
    width = factors_width(n)
    hidden_size = size // max(n, 1)
    has_low = streams_dtype != "bfloat16"
    has_held = held_dtype != ""
    out_dtype = into_dtype or streams_dtype
    columns = ANY_COLUMNS
    # Two CTAs per SM, by their registers; 80 mixes would not fit those of 128 threads.
    threads = 128 if num_mixes <= 24 else 256

    @T.prim_func
    def projection_any_bwd_kernel(
        grad_parts: T.Tensor[(tokens, both), T.bfloat16],
        factors: T.Tensor[(tokens, width), T.float32],
        x: T.Tensor[(tokens, size), streams_dtype],
        weight: T.Tensor[(num_mixes, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        grad_input: T.Tensor[(tokens, hidden_size) if n else (1,), streams_dtype],
        accumulated: T.Tensor[(tokens, size) if has_held else (1,), held_dtype or streams_dtype],
        grad_x: T.Tensor[(tokens, size), out_dtype],
        partials: T.Tensor[(slices, num_mixes, size), T.float32],
        slice_tokens: T.int32,
        tf32: T.int32,
    ):
        with T.Kernel(T.ceildiv(size, columns), slices, threads=threads) as (column, slot):
            # The rows of G are [high | low]; against these they give all products but low x low.
            high_twice = T.alloc_shared((both, columns), T.bfloat16)
            low_then_zero = T.alloc_shared((both, columns), T.bfloat16)
            x_local = T.alloc_fragment((ANY_TOKENS, columns), streams_dtype)
            x_high = T.alloc_shared((ANY_TOKENS, columns), T.bfloat16)
            x_low = T.alloc_shared((ANY_TOKENS, columns), T.bfloat16) if has_low else None
            g_shared = T.alloc_shared((ANY_TOKENS, both), T.bfloat16)
            factors_shared = T.alloc_shared((ANY_TOKENS, width), T.float32)
            grad_local = T.alloc_fragment((ANY_TOKENS, columns), T.float32)
            grad_shared = T.alloc_shared((ANY_TOKENS, columns), T.float32)
            weight_local = T.alloc_fragment((columns, both), T.float32)
            tile_weight = T.alloc_fragment((columns, both), T.float32)
            # Rows padded by two elements: those of a column then lie in different banks.
            weight_shared = T.alloc_shared((columns, both + 2), T.float32)
            w_local = T.alloc_local((part_rows * columns // threads,), T.float32)
            k0 = column * columns
            store_weight_parts(
                weight,
                norm_weight,
                norm_weight_dtype,
                lambda c: k0 + c,
                tf32,
                w_local,
                high_twice,
                low_then_zero,
            )
            follow_previous()
            T.clear(weight_local)
            first = slot * slice_tokens
            for step in T.serial(T.ceildiv(T.min(slice_tokens, tokens - first), ANY_TOKENS)):
                t0 = first + step * ANY_TOKENS
                T.copy(x[t0, k0], x_local)
                T.copy(grad_parts[t0, 0], g_shared)
                T.copy(factors[t0, 0], factors_shared)
                split_streams(x_local, x_high, x_low)
                T.gemm(x_high, g_shared, tile_weight, transpose_A=True, clear_accum=True)
                if has_low:
                    T.gemm(x_low, g_shared, tile_weight, transpose_A=True)
                T.gemm(g_shared, high_twice, grad_local, clear_accum=True)
                T.gemm(g_shared, low_then_zero, grad_local)
                for k, m in T.Parallel(columns, both):
                    weight_local[k, m] += tile_weight[k, m] * factors_shared[0, 2]
                # Through shared memory: what is read from and written to global memory lies as
                # its rows do. One loop a term, as each is vectorised for itself.
                T.copy(grad_local, grad_shared)
                for i, k in T.Parallel(ANY_TOKENS, columns):
                    grad_shared[i, k] = (
                        grad_shared[i, k] * factors_shared[0, 2]
                        + (T.cast(x_local[i, k], T.float32) * factors_shared[i, 0])
                        * factors_shared[i, 1]
                    )
                if n > 0:
                    for i, k in T.Parallel(ANY_TOKENS, columns):
                        if t0 + i < tokens and k0 + k < size:
                            grad_shared[i, k] += factors_shared[
                                i, 3 + (k0 + k) // hidden_size
                            ] * T.cast(grad_input[t0 + i, (k0 + k) % hidden_size], T.float32)
                if has_held:
                    for i, k in T.Parallel(ANY_TOKENS, columns):
                        if t0 + i < tokens and k0 + k < size:
                            grad_shared[i, k] += T.cast(accumulated[t0 + i, k0 + k], T.float32)
                T.copy(grad_shared, grad_x[t0, k0])
            T.copy(weight_local, weight_shared[0:columns, 0:both])
            for m, k in T.Parallel(num_mixes, columns):
                if k0 + k < size:
                    partials[slot, m, k0 + k] = (
                        weight_shared[k, m] + weight_shared[k, part_rows + m]
                    )

    return projection_any_bwd_kernel
