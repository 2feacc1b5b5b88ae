"""Numbers on which a kernel and its launcher must agree."""

import functools
from typing import NamedTuple

from tile_mhc.kernels._arch import Architecture

# projection: the tile of x that one CTA takes at a time.
BLOCK_TOKENS = 128
BLOCK_K = 128
# Its backward: tokens per tile, and columns per piece. H is a multiple of a piece, so that a piece
# lies in one stream.
BACKWARD_TOKENS = 64
PIECE = 64

# With more splits of K than this, this many threads share the sum over them.
SUM_LANES = 8
# Its fast kernels take bfloat16 streams of a width in whole pieces; `projection_any` the others.
FAST_HIDDEN = PIECE
# projection_any: the tile of x that one CTA takes at a time; in the backward it owns columns.
ANY_TOKENS = BACKWARD_TOKENS
ANY_K = 64
ANY_COLUMNS = 32

# delayed_pre, post_pre: the tile of tokens, and the columns of each stream, that one CTA takes.
DELAYED_TOKENS = 64
DELAYED_COLUMNS = PIECE
# Their backward: tokens per tile; two tiles fit the shared memory beside the weight.
DELAYED_BACKWARD_TOKENS = 32

# few_pre: columns of each stream that one CTA takes, and the length of a token's row of sums.
FEW_COLUMNS = 64
FEW_ROW = 32

# mixes, contract: tokens summed by one CTA into one row of partial sums.
TOKENS_PER_PARTIAL = 128

# padded_projection, padded_mixes: columns of a row of 24 mixes in TransformerEngine's tensors.
PADDED = 32

# sinkhorn, log_sinkhorn: the backward keeps every step in shared memory; kernels are built for a
# multiple of this many, so that the repeat counts in use (10, 20) share one.
HISTORY_STEP = 32
# sinkhorn: the smallest eps that its kernels, which divide by it in float32, can take.
SMALLEST_EPS = 2.0**-100
# The same for `sinkhorn_alone`, which takes products of four sums.
SMALLEST_ALONE = 2.0**-26

# recompute: addresses that one launch of the table kernel takes by value.
TABLE_SLOTS = 48


def is_no_eps(eps: float) -> bool:
    """sinkhorn: whether eps is 0, or too small to be told from it: log_sinkhorn does without."""
    return abs(eps) < SMALLEST_EPS


def backward_layout(
    num_mixes: int, size: int, n: int, limits: Architecture, joins: bool, has_sums: bool
) -> tuple[int, int]:
    """projection: of how many streams one CTA of the backward owns columns, and pieces of each.

    Four pieces fill Hopper's shared memory. The weight gradient lies in registers, where 80 mixes
    leave room for half of that; so does what `joins` the gradient of x, which takes a tile of its
    own, and a gradient of x that goes into an accumulator, which may be twice as wide.

    Of four streams two pieces each of two are rows of 256 bytes. With sums it is a piece of all:
    two stages, as fit the others, do not hide them. H200, 2026-11, us of fused_pre.bwd by pieces of
    all streams, and of two: 446 and 431 at 8192x7168, 97 and 99 at 4096x2560.
    """
    most = limits.matmul_pieces if num_mixes <= 24 else limits.matmul_pieces_of_eight
    if n == 0:
        return 1, min(2 if num_mixes > 24 or joins or size % (4 * PIECE) else 4, most)
    if n != 4 or num_mixes != n * (n + 2) or joins or most < 4:
        return min(2, most), 1
    return (4, 1) if has_sums or size // n % (2 * PIECE) else (2, 2)


def factors_width(n: int) -> int:
    """projection: numbers per token that the backward is handed, in whole 16-byte units.

    inv_rms, the factor of x from the statistic, the inverse of the tile's power of two, pre_mix.
    """
    return -(-(3 + n) // 4) * 4


def padded(num_mixes: int) -> int:
    """projection: columns of one part of a split weight, in whole 8-column tensor core tiles."""
    return -(-num_mixes // 8) * 8


# contract_cluster: tokens that a cluster of CTAs takes at a time, and columns of H per warp.
CLUSTER_TOKENS = 8
CLUSTER_COLUMNS = 64
# More groups than this in a ring gain nothing.
CLUSTER_STAGES = 6
# The most columns of H per CTA: with 16 warps and one for the sums, 96 registers per thread.
CLUSTER_WIDTH = 1024


def cluster_row(rows: int, width: int) -> int:
    """contract_cluster: the length of a token in a ring of `rows` streams of `width` columns.

    32 more than its elements, so that neighbouring tokens lie half of the banks apart.
    """
    return rows * width + 32


def cluster_stages(n: int, width: int, backward: bool, limits: Architecture) -> int:
    """contract_cluster: groups of tokens that fit: n streams and, in the backward, a gradient."""
    row = cluster_row(n, width) + (cluster_row(1, width) if backward else 0)
    return min(limits.ring_bytes // (CLUSTER_TOKENS * row * 2), CLUSTER_STAGES)


@functools.cache
def cluster_size(n: int, hidden_size: int, backward: bool, limits: Architecture) -> int:
    """contract_cluster: CTAs that share a token; 0 where there is no such kernel.

    As few as leave room for three groups of tokens: one whose products are taken, one whose gates
    are awaited, one that comes. The weight of eight streams would not fit the registers.
    """
    for size in (1, 2, 4, 8):
        width = hidden_size // size
        whole = hidden_size % (size * CLUSTER_COLUMNS) == 0 and width <= CLUSTER_WIDTH
        if n <= 4 and whole and cluster_stages(n, width, backward, limits) >= 3:
            return size
    return 0


# identity_cluster: its streams and their mixes, whose weight in two parts fills an operand of a
# tensor core. CLUSTER_TOKENS and CLUSTER_STAGES are those of contract_cluster.
IDENTITY_STREAMS = 4
IDENTITY_MIXES = 2 * IDENTITY_STREAMS
# Slots of sums that CTAs of a cluster push to one another.
CLUSTER_SLOTS = 4
# Columns of H that a warp takes at a time, and how many such blocks a CTA has at most: the weight,
# and in the backward its gradient too, lies in registers, of which 14 warps and one for the sums
# have 128 a thread, and half as many with two blocks each 255.
IDENTITY_COLUMNS = CLUSTER_COLUMNS
IDENTITY_BACKWARD_COLUMNS = 32
IDENTITY_BLOCKS = 14
# Of shared memory beside the rings and the sums: gates, mbarriers.
IDENTITY_BYTES = 4096
# The backward: groups of tokens in a ring from which on warps may be a step apart.
IDENTITY_LATE_STAGES = 6
# The most CTAs of a cluster that every GPU with clusters runs.
PORTABLE_CLUSTER = 8


def identity_columns(backward: bool) -> int:
    return IDENTITY_BACKWARD_COLUMNS if backward else IDENTITY_COLUMNS


def identity_blocks(width: int, backward: bool) -> int:
    """identity_cluster: blocks of columns per warp of a CTA that has `width` columns of H.

    In the backward two, where that divides them: half as many warps do half as often what each does
    once a step, and the addresses that they all need take half of the registers. One where the four
    parts of an SM would then have more to do, and the registers suffice.
    """
    blocks = width // identity_columns(backward)
    if not backward or blocks % 2:
        return 1
    fuller = 2 * -(-blocks // 8) > -(-blocks // 4)
    return 1 if fuller and blocks < 12 else 2


def identity_warps(width: int, backward: bool) -> int:
    """identity_cluster: warps of a CTA that take columns; one more has the sums."""
    return width // (identity_blocks(width, backward) * identity_columns(backward))


def identity_sums(backward: bool) -> int:
    """identity_cluster: sums of a group of tokens that the CTAs of a cluster give one another.

    Products of the mixes and squares; in the backward the gradients of pre_mix.
    """
    per_token = IDENTITY_STREAMS if backward else IDENTITY_MIXES + 1
    return CLUSTER_TOKENS * per_token


def identity_stages(
    size: int,
    width: int,
    backward: bool,
    held: bool,
    limits: Architecture,
) -> int:
    """identity_cluster: groups of tokens that fit a CTA of a cluster of `size`, beside the sums.

    Of four streams; in the backward with the gradient of the layer input and, if `held`, another
    one of the streams.
    """
    warps = identity_warps(width, backward)
    kept = 4 if backward else 2
    sums = identity_sums(backward) * (kept * warps + CLUSTER_SLOTS * size) * 4
    if backward:
        row = (IDENTITY_STREAMS * (2 if held else 1) + 1) * width
    else:
        row = cluster_row(IDENTITY_STREAMS, width)
    room = limits.shared_bytes - IDENTITY_BYTES - sums
    return min(room // (CLUSTER_TOKENS * row * 2), CLUSTER_STAGES)


def identity_lag(stages: int) -> int:
    """identity_cluster: steps from a group's products to what is made of them."""
    return 2 if stages >= 4 else 1


@functools.cache
def identity_cluster_size(
    n: int, hidden_size: int, backward: bool, held: bool, limits: Architecture
) -> int:
    """identity_cluster: CTAs that share a token; 0 where there is no such kernel.

    As few as leave room for three groups of tokens; see `cluster_size`. In the backward up to twice
    PORTABLE_CLUSTER: who launches it asks the GPU.
    """
    if n != IDENTITY_STREAMS or not limits.ring_bytes:
        return 0
    columns = identity_columns(backward)
    for size in (1, 2, 4, 8, 16):
        if size > PORTABLE_CLUSTER and not backward:
            break
        width = hidden_size // size
        whole = hidden_size % (size * columns) == 0 and width <= IDENTITY_BLOCKS * columns
        if whole and identity_stages(size, width, backward, held, limits) >= 3:
            return size
    return 0


# pre_cluster: its streams and their mixes, whose weight in two parts fills three operands of a
# tensor core. CLUSTER_TOKENS is that of contract_cluster.
PRE_STREAMS = 4
PRE_MIXES = PRE_STREAMS * (PRE_STREAMS + 2)
PRE_OPERANDS = 3
# Columns of H that a warp multiplies at a time. Of so many blocks of columns a CTA has at most,
# and a warp has two where there are more than so many.
PRE_COLUMNS = 32
PRE_BLOCKS = 14
PRE_SINGLE_BLOCKS = 11
# Sums of a group of tokens, and those that every CTA of a cluster gets: first mixes, and squares.
PRE_SUMS = (PRE_MIXES + 1) * CLUSTER_TOKENS
PRE_SHARED = (PRE_STREAMS + 1) * CLUSTER_TOKENS
# Steps of which the gates are kept; with more groups than this a ring gains nothing.
PRE_GATES = 4
PRE_STAGES = 8
# With a given pre_mix at least so many: all but one are on their way.
PRE_DELAYED_STAGES = 4
# Of shared memory beside what is counted: gates, mbarriers; and logits or a post's factors.
PRE_BYTES = 1024
PRE_LOGITS = CLUSTER_TOKENS * PRE_STREAMS**2
PRE_FACTORS = CLUSTER_TOKENS * PRE_STREAMS
# Of what a warp for Sinkhorn tells who has sent it sums, with a given pre_mix.
PRE_CREDIT = 4


class PreCluster(NamedTuple):
    """pre_cluster: how it is cut.

    Attributes:
        size: CTAs that share a token; 0 where there is no such kernel.
        blocks: blocks of columns of a warp that multiplies.
        warps: warps of a CTA that multiply.
        kept: operands of the weight that a warp has in registers; the others are in shared memory.
        solvers: warps that take Sinkhorn's steps, of groups of tokens in turn.
        lag: steps from a group's products to what its gates are for; 0 with a given pre_mix.
        stages: groups of tokens that a CTA holds.
        delayed: whether a pre_mix is given.
    """

    size: int = 0
    blocks: int = 0
    warps: int = 0
    kept: int = 0
    solvers: int = 0
    lag: int = 0
    stages: int = 0
    delayed: bool = False

    @property
    def operands(self) -> int:
        """Operands of the weight that a warp multiplies: two halves of each vector."""
        return PRE_OPERANDS * 2 * PRE_STREAMS * self.blocks

    @property
    def buffers(self) -> int:
        """Of the sums of a CTA's warps: whose gates have come, that one is free."""
        return 2 if self.lag in (0, 2) else PRE_GATES

    @property
    def slots(self) -> int:
        """Of the sums of a cluster's CTAs: a CTA that sends those of a group has had the gates of
        `lag` groups before, of which the others had had them when they sent theirs."""
        return 2 * self.buffers

    @property
    def groups(self) -> int:
        """Groups of four warps, for which registers are shared out: those that multiply, maybe with
        some of the other warps, and the last one."""
        return -(-self.warps // 4) + 1

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread of the groups of warps that multiply, and of the last group."""
        each = min(65536 // (128 * self.groups) // 8 * 8, 240)
        last = {2: each, 3: 80 if self.delayed else 72}.get(self.groups, 80)
        return (each * self.groups - last) // (self.groups - 1) // 8 * 8, last

    def bytes_beside(self, has_post: bool) -> int:
        """Of shared memory, beside the ring."""
        turns = self.solvers * self.size
        sums = self.buffers * self.warps * PRE_SUMS + self.solvers * PRE_LOGITS
        factors = has_post * (PRE_STREAMS + 1)
        if self.delayed:
            sums += turns * (PRE_SUMS + PRE_CREDIT)
            factors += 1
        else:
            sums += self.slots * self.size * PRE_SHARED
            sums += turns * (PRE_SUMS - PRE_STREAMS * CLUSTER_TOKENS)
        sums += PRE_GATES * factors * PRE_FACTORS
        return PRE_BYTES + 4 * sums + (self.operands - self.kept) * self.warps * 32 * 16


def pre_kept(warps: int, blocks: int, has_post: bool, delayed: bool, limits: Architecture) -> int:
    """pre_cluster: operands for which a warp has registers; in code for Blackwell it needs more of
    them for all else."""
    if blocks == 2:
        return (32 if delayed else 30) if has_post else 38
    if warps <= 4:
        return PRE_OPERANDS * 2 * PRE_STREAMS
    if warps <= 8:
        return 22 if has_post else 24
    if has_post:
        return 19
    return 22 if limits.has_wgmma else 16


@functools.cache
def pre_cluster(
    n: int, hidden_size: int, has_post: bool, delayed: bool, limits: Architecture
) -> PreCluster:
    """pre_cluster: how it is cut, with as few CTAs sharing a token as hold it.

    Gates take about 2700 cycles to come: two steps of wide CTAs, more of narrow ones. H200,
    2026-11, us of a lag of two, three and four steps: 72.0, 63.6 and 61.7 at 4096x4096, and of two
    and three 197.6 and 196.8 at 8192x7168, where three leave fewer groups on their way. With a
    given pre_mix one step makes all of a group: us of that and of a lag of one at 8192x7168 332 and
    332 of a post, and 178 and 195 of a pre.
    """
    if n != PRE_STREAMS or not limits.ring_bytes:
        return PreCluster()
    for size in (4, 8, 16):
        per_cta, rest = divmod(hidden_size, size * PRE_COLUMNS)
        blocks = 1 if per_cta <= PRE_SINGLE_BLOCKS else 2
        if rest or per_cta > PRE_BLOCKS or per_cta % blocks:
            continue
        warps = per_cta // blocks
        kept = pre_kept(warps, blocks, has_post, delayed, limits)
        # A second one where a CTA's turn comes soon, and a warp is left.
        solvers = 2 if size <= 8 and warps % 4 else 1
        vectors = per_cta * 32 * 16
        for lag in (0,) if delayed else (2,) if blocks == 2 else (4, 3, 2):
            cut = PreCluster(size, blocks, warps, kept, solvers, lag, 0, delayed)
            room = limits.shared_bytes - cut.bytes_beside(has_post)
            # A layer output is read by the products alone.
            room += has_post * lag * vectors
            stages = min(room // ((PRE_STREAMS + has_post) * vectors), PRE_STAGES)
            if stages >= (PRE_DELAYED_STAGES if delayed else lag + 2):
                return cut._replace(stages=stages)
    return PreCluster()
