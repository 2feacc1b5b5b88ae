"""What decides which kernels an op launches, and on how many CTAs: for the ops and for `specs`.

By shapes, dtypes, `config` and the architecture alone; no tensor is looked at. A split, a slice or
a cluster is one of several CTAs that share a sum, so what is decided here decides its last bits.

The table names an architecture; to a launcher it is that of the current device.
"""

import torch

from tile_mhc import _device, _occupancy, config
from tile_mhc.kernels._arch import Architecture
from tile_mhc.kernels._shapes import (
    ANY_COLUMNS,
    ANY_K,
    ANY_TOKENS,
    BACKWARD_TOKENS,
    BLOCK_K,
    BLOCK_TOKENS,
    CLUSTER_TOKENS,
    DELAYED_COLUMNS,
    DELAYED_TOKENS,
    FAST_HIDDEN,
    FEW_COLUMNS,
    HISTORY_STEP,
    PORTABLE_CLUSTER,
    SUM_LANES,
    TOKENS_PER_PARTIAL,
    cluster_size,
    identity_cluster_size,
    is_no_eps,
    pre_cluster,
)

# What the start of the backward's pipeline costs a CTA, in tiles.
START_TILES = 3
# delayed_pre, post_pre: up to so many tokens every CTA of a pass splits the weight that it reads, a
# quarter more instructions; with more a kernel does before, for all. Not measured yet.
SPLIT_WEIGHT_TOKENS = 1024
# The same as START_TILES, in steps; and that of their backward, in tiles of START_TILES: H200,
# 2026-11, 8192x7168, 112 CTAs at a time and six times 131: 779 and 717 us, 442 and 420.
DELAYED_START = 2
DELAYED_START_TILES = 0.5
# The same where the pass has sums for a pre_mix. H200, 2026-11, us of delayed_pre.bwd: 350, 329 and
# 339 of one, seven and eight slices at 8192x7168, 106 and 112 of two and four at 4096x4096, 76 and
# 82 of three and six at 4096x2560.
SUMS_START_TILES = 1.5
# SMs of a GPU that has at least one GPC of 16: of eight GPCs with 14 or fewer it would have 112.
LARGE_CLUSTER_SMS = 113
# fused_pre, post_pre: tokens times columns of a stream from which one pass over them is faster than
# two. H200, 2026-11, us of one and of two: 198 and 268 at 8192x7168, 60 and 84 at
# 4096x4096, 48 and 61 at 8192x1280; 31 and 29 at 512x7168.
ONCE_ELEMENTS = 1 << 23
# fused_pre, post_pre: the most tokens of `is_few`. H200, 2026-11, us of post_pre with a norm, L2
# warm, by these kernels and by those for more: 15.7 and 20.6 at 128x7168, 14.4 and 15.7 at
# 128x4096; 28.2 and 26.8 at 256x7168, 18.2 and 18.4 at 256x4096.
FEW_TOKENS = 128
# The same: streams of which a warp of the first launch has some columns; all four where there are
# more tokens than the second number: 7.6 and 9.2 us of one and of four at 1x7168, 9.1 and 9.8 at
# 16x7168, 9.9 of two and of four at 32x7168, 22.7 and 15.7 at 128x7168.
FEW_STREAMS = (1, 4)
FEW_TOKENS_OF_ONE = 16
# post_pre: the least width for which it is. H200, 2026-11, us of one pass and of two: 78 and 92 at
# 4096x2560, 111 and 144 at 4096x4096, 342 and 488 at 8192x7168.
POST_ONCE_HIDDEN = 2560
# The same with a given pre_mix, where two launches read the streams once, too: the least width and
# the least elements of a stream for which clusters do it. H200, 2026-11, us of clusters and of two
# launches: post_pre 332 and 373 at 8192x7168, 114 and 128 at 2400x7168, 118 and 113 at 4096x4096;
# fused_pre 178 and 184 at 8192x7168, 67 and 72 at 2400x7168, 67 and 64 at 4096x4096.
DELAYED_ONCE_HIDDEN = 7168
DELAYED_ONCE_ELEMENTS = 1 << 24
# Blocks of a split in the batch-invariant mode: more of them leave a GPU with few tokens idle,
# fewer make more partial sums where there are many.
INVARIANT_BLOCKS = 16
# projection_any: blocks of a split in the batch-invariant mode: the columns of the fast kernels'.
ANY_INVARIANT_BLOCKS = 32


def reads_last(nbytes: int) -> bool:
    """aggregate: whether its streams, of so many bytes, are read as if for the last time.

    Streams of more bytes than the first leave L2 to what it holds of them; of more than the second,
    about five times L2, they are read as usual again. H100, 2026-11, us of such loads and of usual
    ones: 39.2 and 41.8 at 84 MB, 78.5 and 79.3 at 176, 102.8 and 102.7 at 235, 151.6 and 149.1 at
    352. H200, 2026-11, of projection, aggregate and post, which reads the streams once more: 27.9
    and 26.3 at 15 MB, 31.6 and 29.9 at 21, 50.2 and 49.7 at 37, 57.6 and 58.6 at 44.
    """
    limits = _device.limits()
    return limits.kept_bytes < nbytes <= limits.last_read_bytes


def is_fast(dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether the kernels of `projection` take these streams; else those of `projection_any`."""
    return dtype == torch.bfloat16 and hidden_size % FAST_HIDDEN == 0


def is_one_pass(
    dtype: torch.dtype,
    n: int,
    hidden_size: int,
    num_splits: int | None,
    limits: Architecture | None = None,
) -> bool:
    """Whether a pre with a given pre_mix takes one pass over these streams.

    Not with an explicit `num_splits`, which asks for the bits of `projection`: a pass sums by
    columns of all streams at once, and splits those.
    """
    taken = n == 4 and is_fast(dtype, hidden_size) and num_splits is None
    return taken and (limits or _device.limits()).has_one_pass


def is_few(num_tokens: int) -> bool:
    """fused_pre, post_pre: whether so few tokens take the kernels that wait for latency alone.

    Where `is_one_pass`, and not in the batch-invariant mode, in which all numbers of tokens have
    the same kernels.
    """
    return num_tokens <= FEW_TOKENS and not config.get_batch_invariant()


def few_streams(num_tokens: int) -> int:
    """fused_pre, post_pre: of FEW_STREAMS, what so few tokens take."""
    return FEW_STREAMS[num_tokens > FEW_TOKENS_OF_ONE]


def few_steps(num_tokens: int, hidden_size: int, streams: int) -> int:
    """fused_pre, post_pre: steps, of `streams` groups of tokens, that a CTA takes one after the
    other: so many that each SM has one CTA, and with all streams some have two."""
    groups = -(-num_tokens // (streams * CLUSTER_TOKENS))
    sms, splits = config.get_num_sms(), hidden_size // FEW_COLUMNS
    at_once = max(1, sms // splits) if streams == 1 else -(-sms // splits)
    return -(-groups // at_once)


def has_many_splits(splits: int) -> bool:
    """Whether several threads share the sum over the splits; see `split_sums` of the kernels."""
    return splits > SUM_LANES


def reads_once(
    dtype: torch.dtype,
    n: int,
    hidden_size: int,
    backward: bool,
    limits: Architecture | None = None,
) -> bool:
    """contract: whether clusters of CTAs hold these streams; any number of tokens."""
    limits = limits or _device.limits()
    return dtype == torch.bfloat16 and cluster_size(n, hidden_size, backward, limits) > 0


def identity_reads_once(
    dtype: torch.dtype,
    n: int,
    hidden_size: int,
    backward: bool,
    held: bool = False,
    limits: Architecture | None = None,
) -> bool:
    """identity_pre: whether a kernel's clusters of CTAs hold these streams; any number of tokens.

    With a gradient that the streams have from others, `held`, they may not fit.
    """
    limits = limits or _device.limits()
    size = identity_cluster_size(n, hidden_size, backward, held, limits)
    return dtype == torch.bfloat16 and size > 0


def identity_reads_twice(
    dtype: torch.dtype, n: int, hidden_size: int, held: bool, limits: Architecture
) -> bool:
    """identity_pre: whether some GPU, or mode, takes two passes in the backward."""
    size = identity_cluster_size(n, hidden_size, True, held, limits)
    once = identity_reads_once(dtype, n, hidden_size, True, held, limits)
    return not once or size > PORTABLE_CLUSTER


def has_pre_cluster(
    dtype: torch.dtype,
    n: int,
    hidden_size: int,
    has_post: bool,
    delayed: bool,
    limits: Architecture,
) -> bool:
    """fused_pre, post_pre: whether a kernel's clusters of CTAs hold these streams."""
    size = pre_cluster(n, hidden_size, has_post, delayed, limits).size
    return dtype == torch.bfloat16 and size > 0


def pre_reads_once(
    dtype: torch.dtype,
    num_tokens: int,
    n: int,
    hidden_size: int,
    num_splits: int | None,
    has_post: bool,
    delayed: bool,
) -> bool:
    """fused_pre, post_pre: whether they are made in one pass over the streams.

    Not of few tokens, not with an explicit `num_splits`, which asks for the bits of `projection`,
    and not in the batch-invariant mode, in which all numbers of tokens have the same kernels.
    """
    limits = _device.limits()
    if delayed:
        least_hidden, least = DELAYED_ONCE_HIDDEN, DELAYED_ONCE_ELEMENTS
    else:
        least_hidden, least = POST_ONCE_HIDDEN if has_post else 0, ONCE_ELEMENTS
    return (
        num_splits is None
        and num_tokens * hidden_size >= least
        and hidden_size >= least_hidden
        and not config.get_batch_invariant()
        and has_pre_cluster(dtype, n, hidden_size, has_post, delayed, limits)
        and has_clusters_of(pre_cluster(n, hidden_size, has_post, delayed, limits).size)
    )


def has_clusters_of(size: int) -> bool:
    """identity_pre, fused_pre, post_pre: whether clusters of so many CTAs are launched.

    Of more than PORTABLE_CLUSTER where a GPC of the GPU has enough SMs, and not in the
    batch-invariant mode, whose bits are those of every GPU.
    """
    if size <= PORTABLE_CLUSTER:
        return True
    if config.get_batch_invariant():
        return False
    at_once = _clusters_at_once(size)
    if at_once is None:
        return config._device_num_sms(torch.cuda.current_device()) >= LARGE_CLUSTER_SMS
    return at_once > 0


def history_capacity(repeat: int) -> int:
    """Steps for which a backward of Sinkhorn is built, so that many counts share one kernel."""
    return -(-repeat // HISTORY_STEP) * HISTORY_STEP


def has_gates_at_once(n: int, repeat: int, eps: float, limits: Architecture | None = None) -> bool:
    """gates: whether one kernel takes all gates' gradients: its CTAs, of as many tokens as are one
    row of partial sums, keep the steps of all of them. Eight streams leave no room for that."""
    history = 2 * history_capacity(repeat) * n * TOKENS_PER_PARTIAL * 4
    return history <= (limits or _device.limits()).history_bytes and not is_no_eps(eps)


def partial_rows(num_tokens: int) -> int:
    return -(-num_tokens // TOKENS_PER_PARTIAL)


def is_one_token_per_sm(num_tokens: int) -> bool:
    """post: whether the backward's CTAs, of a token each, get an SM each and many threads.

    Not in the batch-invariant mode, as it decides how a token's sums are split.
    """
    return num_tokens <= config.get_num_sms() and not config.get_batch_invariant()


def bias_slices(num_tokens: int) -> int:
    """post: CTAs of the backward with a bias, each with a sum of its own: all run at once."""
    return min(num_tokens, _device.limits().post_slices * config.get_num_sms())


def _clusters_at_once(size: int) -> int | None:
    """Clusters of `size` CTAs that the current device runs at one time, if its driver can say.

    Each CTA takes so much shared memory that an SM has room for one.
    """
    device = torch.cuda.current_device()
    return _occupancy.clusters_at_once(device, size, _device.limits().shared_bytes)


def num_clusters(num_tokens: int, size: int, *, bound_by_memory: bool) -> int:
    """How many clusters of `size` CTAs to launch: as many as have tokens, and as run at once.

    One cluster more than fits doubles the time. An H200's 132 SMs hold 30 of four CTAs and 15 of
    eight, as GPCs with fewer than 16 SMs leave some out: the driver is asked. Where it cannot be,
    or `set_num_sms` leaves some SMs to others, nobody knows which, an eighth is left. So it is for
    a kernel that waits for memory alone: H200, 2026-11, 8192x7168, us of 14 and 15 clusters:
    contract 148 and 152, its backward, which has more to compute, 304 and 291; fused_pre at
    4096x2560 48.2 and 46.4. At least one, also where that leaves fewer than `size`.
    """
    at_once = None if bound_by_memory or config._leaves_sms() else _clusters_at_once(size)
    if at_once is None:
        sms = config.get_num_sms()
        at_once = (sms * 7 // 8 if size > 2 else sms) // size
    return max(1, min(-(-num_tokens // CLUSTER_TOKENS), at_once))


def blocks_per_split(num_tokens: int, size: int, num_splits: int | None) -> int:
    """How many K blocks one CTA takes, so that token tiles x splits make one CTA an SM.

    Not less than four: a shorter split would cost more in partial sums than it gains.
    """
    blocks, tiles = -(-size // BLOCK_K), -(-num_tokens // BLOCK_TOKENS)
    return divide_blocks(
        blocks, tiles, num_splits, ctas_per_sm=1, least=4, invariant=INVARIANT_BLOCKS
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


def splits_weight(num_tokens: int) -> bool:
    """delayed_pre, post_pre: whether a pass splits the weight itself, and needs no launch before.

    The same parts either way.
    """
    return num_tokens <= SPLIT_WEIGHT_TOKENS


def delayed_blocks_per_split(num_tokens: int, hidden_size: int) -> int:
    """delayed_pre, post_pre: how many steps of H one CTA takes; there is one CTA on an SM.

    Where the tiles of tokens leave SMs idle, as many splits as fill them, and else those that take
    the least time, counted in steps: whole waves of CTAs, each with the start of its pipeline.
    """
    steps, tiles = hidden_size // DELAYED_COLUMNS, -(-num_tokens // DELAYED_TOKENS)
    if config.get_batch_invariant():
        return min(steps, INVARIANT_BLOCKS)
    sms = config.get_num_sms()
    splits = max(1, sms // tiles)
    if splits < 4:

        def time(splits: int) -> int:
            return -(-tiles * splits // sms) * (DELAYED_START + -(-steps // splits))

        splits = min(range(1, min(steps, 8) + 1), key=time)
    return -(-steps // splits)


def any_blocks_per_split(num_tokens: int, size: int, num_splits: int | None) -> int:
    """How many K blocks one CTA takes; not less than eight, as the partial sums cost too."""
    blocks, tiles = -(-size // ANY_K), -(-num_tokens // ANY_TOKENS)
    return divide_blocks(
        blocks,
        tiles,
        num_splits,
        ctas_per_sm=_device.limits().any_ctas,
        least=8,
        invariant=ANY_INVARIANT_BLOCKS,
    )


def backward_slice(
    num_tokens: int, size: int, num_mixes: int, columns: int, start: float = START_TILES
) -> int:
    """Tokens one CTA of the backward takes (a multiple of its tile).

    CTAs are column blocks x token slices, one on an SM at a time. The slices are those that take
    the least time, counted in tiles: whole waves of CTAs, each with the start of its pipeline, and
    the partial weight gradients, which each slice writes and the sum reads (a tile of x and of its
    gradient is the unit of bytes). `start` is that of a pipeline, in tiles.
    """
    sms = config.get_num_sms()
    blocks = size // columns
    tiles = -(-num_tokens // BACKWARD_TOKENS)
    per_slice = num_mixes * size * 4 * 2 / (2 * BACKWARD_TOKENS * columns * 2 * sms)

    def time(slices: int) -> float:
        waves = -(-blocks * slices // sms)
        return waves * (start + -(-tiles // slices)) + slices * per_slice

    return -(-tiles // min(range(1, min(tiles, 16) + 1), key=time)) * BACKWARD_TOKENS


def any_backward_slice(num_tokens: int, size: int) -> int:
    """Tokens one CTA of the backward takes (a multiple of its tile): so many that all run at once,
    and at most 16 slices, as each writes a partial gradient of the weight."""
    tiles = -(-num_tokens // ANY_TOKENS)
    blocks = -(-size // ANY_COLUMNS)
    slices = min(tiles, 16, max(1, _device.limits().any_ctas * config.get_num_sms() // blocks))
    return -(-tiles // slices) * ANY_TOKENS
