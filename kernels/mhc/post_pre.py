"""The post of a sub-layer with the pre of the next, and the norm of that one's input.

layer_input[t, h] = layer_input[t, h] * rsqrt(mean_h layer_input[t, h]**2 + eps) * norm_weight[h]
"""

import tilelang.language as T

from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._boundary import (
    MIXES,
    STREAMS,
    backward_pass,
    forward_pass,
    num_sums,
    weight_shapes,
)
from tile_mhc.kernels._common import (
    SIMT,
    builder,
    follow_previous,
    row_threads,
    row_vector,
)
from tile_mhc.kernels._norm import normed_row
from tile_mhc.kernels._shapes import DELAYED_COLUMNS, factors_width, padded
from tile_mhc.kernels._weights import norm_shape


@builder({})
def post_pre_fwd(
    hidden_size: int,
    splits_weight: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    limits: Architecture,
):
    """The streams after a post, with their products, squares and the layer input."""
    of_weight = (splits_weight, weight_dtype, norm_weight_dtype)
    body, tokens, splits, size = forward_pass(hidden_size, True, True, *of_weight, limits)
    read, norm = weight_shapes(hidden_size, *of_weight)

    @T.prim_func
    def post_pre_fwd_kernel(
        layer_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        post_mix: T.Tensor[(tokens, STREAMS), T.float32],
        comb_mix: T.Tensor[(tokens, STREAMS, STREAMS), T.float32],
        pre_mix: T.Tensor[(tokens, STREAMS), T.float32],
        weight: T.Tensor[read[0], read[1]],
        norm_weight: T.Tensor[norm[0], norm[1]],
        out: T.Tensor[(tokens, size), T.bfloat16],
        layer_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        products: T.Tensor[(splits, tokens, MIXES), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        blocks: T.int32,
        tf32: T.int32,
    ):
        body(
            layer_output,
            x,
            post_mix,
            comb_mix,
            pre_mix,
            weight,
            norm_weight,
            out,
            layer_input,
            products,
            squares,
            blocks,
            tf32,
        )

    return post_pre_fwd_kernel


@builder({})
def post_project_fwd(
    hidden_size: int,
    splits_weight: bool,
    *,
    weight_dtype: str,
    norm_weight_dtype: str,
    limits: Architecture,
):
    """The streams after a post, with their products and squares: their pre_mix comes of these."""
    of_weight = (splits_weight, weight_dtype, norm_weight_dtype)
    body, tokens, splits, size = forward_pass(hidden_size, True, False, *of_weight, limits)
    read, norm = weight_shapes(hidden_size, *of_weight)

    @T.prim_func
    def post_project_fwd_kernel(
        layer_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        x: T.Tensor[(tokens, size), T.bfloat16],
        post_mix: T.Tensor[(tokens, STREAMS), T.float32],
        comb_mix: T.Tensor[(tokens, STREAMS, STREAMS), T.float32],
        weight: T.Tensor[read[0], read[1]],
        norm_weight: T.Tensor[norm[0], norm[1]],
        out: T.Tensor[(tokens, size), T.bfloat16],
        products: T.Tensor[(splits, tokens, MIXES), T.float32],
        squares: T.Tensor[(splits, tokens), T.float32],
        blocks: T.int32,
        tf32: T.int32,
    ):
        body(
            layer_output,
            x,
            post_mix,
            comb_mix,
            None,
            weight,
            norm_weight,
            out,
            None,
            products,
            squares,
            blocks,
            tf32,
        )

    return post_project_fwd_kernel


@builder({})
def post_pre_bwd(
    hidden_size: int,
    *,
    held_dtype: str,
    weight_dtype: str,
    norm_weight_dtype: str,
    limits: Architecture,
):
    """All gradients of a boundary in one pass over what its post has read.

    Those of the weight by slices of tokens, those of the mixes by columns.
    """
    has_held = held_dtype != ""
    body, tokens, slices, size = backward_pass(
        hidden_size, True, has_held, norm_weight_dtype, limits
    )

    @T.prim_func
    def post_pre_bwd_kernel(
        grad_parts: T.Tensor[(tokens, 2 * padded(MIXES)), T.bfloat16],
        factors: T.Tensor[(tokens, factors_width(STREAMS)), T.float32],
        layer_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        x: T.Tensor[(tokens, STREAMS, hidden_size), T.bfloat16],
        post_mix: T.Tensor[(tokens, STREAMS), T.float32],
        comb_mix: T.Tensor[(tokens, STREAMS * STREAMS), T.float32],
        weight: T.Tensor[(MIXES, size), weight_dtype],
        norm_weight: T.Tensor[norm_shape(size, norm_weight_dtype), norm_weight_dtype or T.float32],
        grad_input: T.Tensor[(tokens, hidden_size), T.bfloat16],
        held: T.Tensor[(tokens, STREAMS, hidden_size) if has_held else (1,), T.bfloat16],
        grad_output: T.Tensor[(tokens, hidden_size), T.bfloat16],
        grad_x: T.Tensor[(tokens, STREAMS, hidden_size), T.bfloat16],
        sums: T.Tensor[(hidden_size // DELAYED_COLUMNS, tokens, num_sums(True)), T.float32],
        partials: T.Tensor[(slices, MIXES, size), T.float32],
        slice_tokens: T.int32,
        tf32: T.int32,
    ):
        body(
            grad_parts,
            factors,
            layer_output,
            x,
            post_mix,
            comb_mix,
            weight,
            norm_weight,
            grad_input,
            held,
            grad_output,
            grad_x,
            sums,
            partials,
            slice_tokens,
            tf32,
        )

    return post_pre_bwd_kernel


@builder(SIMT)
def input_norm(hidden_size: int, *, streams_dtype: str, layer_norm_dtype: str):
    """The RMS norm of a layer's input, in place; a CTA has one token."""
    tokens = T.dynamic("num_tokens")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector)

    @T.prim_func
    def input_norm_kernel(
        layer_input: T.Tensor[(tokens, hidden_size), streams_dtype],
        layer_norm_weight: T.Tensor[(hidden_size,), layer_norm_dtype],
        eps: T.float32,
    ):
        with T.Kernel(tokens, threads=threads) as t:
            follow_previous()
            normed_row(layer_input, layer_norm_weight, t, hidden_size, threads, vector, eps)

    return input_norm_kernel
