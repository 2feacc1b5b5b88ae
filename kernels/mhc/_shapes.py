"""Numbers on which a kernel and its launcher must agree. Imports nothing: launchers read it too."""

# projection: the tile of x that one CTA takes at a time.
BLOCK_TOKENS = 128
BLOCK_K = 128

# mixes, contract: tokens summed by one CTA into one row of partial sums.
TOKENS_PER_PARTIAL = 128

# sinkhorn: the backward keeps every step in shared memory; its kernels are built for a multiple of
# this many, so that the repeat counts in use (10, 20) share one.
HISTORY_STEP = 32

# recompute: addresses that one launch of the table kernel takes by value.
TABLE_SLOTS = 48


def backward_tile(num_mixes: int) -> tuple[int, int]:
    """projection: (tokens, columns) a CTA of the backward takes at a time.

    The weight gradient lies in registers: 80 mixes leave room for half as many columns.
    """
    return (BLOCK_TOKENS, BLOCK_K) if num_mixes <= 24 else (BLOCK_TOKENS // 2, BLOCK_K // 2)


def padded(num_mixes: int) -> int:
    """projection: columns of one part of a split weight, in whole 8-column tensor core tiles."""
    return -(-num_mixes // 8) * 8
