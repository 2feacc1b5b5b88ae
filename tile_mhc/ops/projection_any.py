"""What `projection` launches for streams that its own kernels do not take: any dtype and width."""

from tile_mhc import config
from tile_mhc.kernels._shapes import ANY_COLUMNS, ANY_K, ANY_TOKENS

# CTAs of the matmuls on an SM at a time: one waits for its loads while the other multiplies.
CTAS_PER_SM = 2
# Blocks of a split in the batch-invariant mode: the columns of the fast kernels'.
INVARIANT_BLOCKS = 32


def blocks_per_split(num_tokens: int, size: int, num_splits: int | None) -> int:
    """How many K blocks one CTA takes; not less than eight, as the partial sums cost too."""
    blocks, tiles = -(-size // ANY_K), -(-num_tokens // ANY_TOKENS)
    return divide_blocks(
        blocks, tiles, num_splits, ctas_per_sm=CTAS_PER_SM, least=8, invariant=INVARIANT_BLOCKS
    )


def divide_blocks(
    blocks: int, tiles: int, num_splits: int | None, *, ctas_per_sm: int, least: int, invariant: int
) -> int:
    """Blocks of a split, of at most `num_splits`: so many that all tiles' splits run at once, and
    `least`; in the batch-invariant mode `invariant`, for any number of tiles and SMs."""
    if config.get_batch_invariant():
        return max(invariant, -(-blocks // (num_splits or blocks)))
    wanted = max(1, ctas_per_sm * config.get_num_sms() // tiles)
    if num_splits is not None:
        wanted = min(wanted, num_splits)
    return max(least, -(-blocks // wanted))


def backward_slice(num_tokens: int, size: int) -> int:
    """Tokens one CTA of the backward takes (a multiple of its tile): so many that all run at once,
    and at most 16 slices, as each writes a partial gradient of the weight."""
    tiles = -(-num_tokens // ANY_TOKENS)
    blocks = -(-size // ANY_COLUMNS)
    slices = min(tiles, 16, max(1, CTAS_PER_SM * config.get_num_sms() // blocks))
    return -(-tiles // slices) * ANY_TOKENS
