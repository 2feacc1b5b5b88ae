"""What `projection` launches for streams that its own kernels do not take: any dtype and width."""

import torch
from torch import Tensor

from tile_mhc import config, jit
from tile_mhc.kernels._shapes import ANY_COLUMNS, ANY_K, ANY_TOKENS
from tile_mhc.ops._library import dtype_of

# CTAs of the matmuls on an SM at a time: one waits for its loads while the other multiplies.
CTAS_PER_SM = 2
# Blocks of a split in the batch-invariant mode: the columns of the fast kernels'.
INVARIANT_BLOCKS = 32


def split_products(
    x: Tensor,
    parameters: tuple[Tensor, Tensor],
    dtypes: tuple[str, ...],
    num_splits: int | None,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """The products (S, T, N) and sums of squares (S, T) of S slices of K."""
    num_tokens, size = x.shape
    num_mixes = parameters[0].shape[0]
    block = blocks_per_split(num_tokens, size, num_splits)
    splits = -(-size // (block * ANY_K))
    products = x.new_empty(splits, num_tokens, num_mixes, dtype=torch.float32)
    squares = x.new_empty(splits, num_tokens, dtype=torch.float32)
    jit.kernel("projection_any_fwd", num_mixes, size, dtype_of(x), *dtypes)(
        x, *parameters, products, squares, block, tf32
    )
    return products, squares


def blocks_per_split(num_tokens: int, size: int, num_splits: int | None) -> int:
    """How many K blocks one CTA takes; not less than eight, as the partial sums cost too."""
    blocks = -(-size // ANY_K)
    if config.get_batch_invariant():
        return max(INVARIANT_BLOCKS, -(-blocks // (num_splits or blocks)))
    tiles = -(-num_tokens // ANY_TOKENS)
    wanted = max(1, CTAS_PER_SM * config.get_num_sms() // tiles)
    if num_splits is not None:
        wanted = min(wanted, num_splits)
    return max(8, -(-blocks // wanted))


def norm_kernel(x: Tensor, num_mixes: int, dtypes: tuple[str, ...]) -> jit.Launch:
    return jit.kernel("projection_any_norm", num_mixes, x.shape[1], dtype_of(x), *dtypes)


def backward_kernel(
    x: Tensor, num_mixes: int, streams: int, accumulates: bool, dtypes: tuple[str, ...]
) -> jit.Launch:
    size, dtype = x.shape[1], dtype_of(x)
    return jit.kernel("projection_any_bwd", num_mixes, size, streams, accumulates, dtype, *dtypes)


def weight_kernel(num_mixes: int, size: int, dtypes: tuple[str, ...]) -> jit.Launch:
    return jit.kernel("projection_any_weight_bwd", num_mixes, size, *dtypes)


def backward_slice(num_tokens: int, size: int) -> int:
    """Tokens one CTA of the backward takes (a multiple of its tile): so many that all run at once,
    and at most 16 slices, as each writes a partial gradient of the weight."""
    tiles = -(-num_tokens // ANY_TOKENS)
    blocks = -(-size // ANY_COLUMNS)
    slices = min(tiles, 16, max(1, CTAS_PER_SM * config.get_num_sms() // blocks))
    return -(-tiles // slices) * ANY_TOKENS
