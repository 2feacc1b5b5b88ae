"""What kernels may take of an SM, by architecture. Imports no other module of ours.

How many SMs there are is asked of the device, as GPUs of one architecture differ in that: see
`tile_mhc.config.get_num_sms`.
"""

from dataclasses import dataclass, replace

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, eq=False)
class Architecture:
    """The limits of the hardware, and what was measured to be best within them.

    A row is equal to itself alone, so that a cache can have it for a key.

    Attributes:
        registers: per SM.
        threads: per CTA, at most.
        threads_per_sm: per SM, at most.
        ctas: per SM, at most.
        shared_bytes: shared memory per CTA, at most.
        shared_bytes_per_sm: shared memory per SM; each CTA takes one KiB more than it asks for.
        l2_bytes: of the largest GPU.
        matmul_bytes: projection: shared memory for the pipeline and the tiles beside it.
        matmul_columns: projection: columns of x and of the weight in a stage of the pipeline.
        matmul_tokens: projection: tokens in a stage of the backward's.
        matmul_pieces: projection: pieces of columns that a CTA of the backward owns, at most.
        matmul_pieces_of_eight: the same with eight streams, whose weight is three times as wide.
        history_bytes: sinkhorn, log_sinkhorn: shared memory for the steps of a CTA's tokens.
        ring_bytes: contract_cluster: shared memory for the rings of tokens; the rest is for sums. 0
            where there are no clusters, or none that would hold a token of a usual width.
        sinkhorn_registers: fused_pre: what a thread of Sinkhorn's CTAs needs at n = 4; the others
            need less, and more of them hide latency better.
        post_ctas: post: CTAs of the backward per SM that the compiler is to leave registers for.
        post_ctas_of_eight: the same with eight streams.
        post_slices: post with a bias: slices of tokens per SM, as many as run at one time. With
            eight streams this is twice `post_ctas_of_eight`; another number would give grad_bias
            other last bits.
        interleaved_post_ctas: interleaved_post: as `post_ctas`.
        any_ctas: projection_any: CTAs of the matmuls per SM: one waits for its loads
            while the other multiplies.
        kept_bytes: aggregate: streams of more bytes are read as if for the last time.
        last_read_bytes: aggregate: those of more bytes, about five times L2, as usual again.
        has_wgmma: whether matrix products are asynchronous, as Hopper's wgmma; others' are done
            when the next statement runs.
        has_tma: whether there is what came with Hopper: TMA, mbarriers, and launches beside the
            kernel before.
        has_one_pass: delayed_pre, post_pre: whether shared memory has room for the tiles of a pass
            over all streams.
    """

    registers: int
    threads: int
    threads_per_sm: int
    ctas: int
    shared_bytes: int
    shared_bytes_per_sm: int
    l2_bytes: int
    matmul_bytes: int
    matmul_columns: int
    matmul_tokens: int
    matmul_pieces: int
    matmul_pieces_of_eight: int
    history_bytes: int
    ring_bytes: int
    sinkhorn_registers: int
    post_ctas: int
    post_ctas_of_eight: int
    post_slices: int
    interleaved_post_ctas: int
    any_ctas: int
    kept_bytes: int
    last_read_bytes: int
    has_wgmma: bool
    has_tma: bool
    has_one_pass: bool

    def warps(self, registers: int) -> int:
        """Warps that fit an SM with so many registers per thread; its four parts share none."""
        return min(4 * (self.registers // 4 // (32 * registers)), self.threads_per_sm // 32)


# Measured on H100 and H200; the reasons stand where the numbers are used.
HOPPER = Architecture(
    registers=65536,
    threads=1024,
    threads_per_sm=2048,
    ctas=32,
    shared_bytes=227 * KIB,
    shared_bytes_per_sm=228 * KIB,
    l2_bytes=50 * MIB,
    matmul_bytes=224 * KIB,
    matmul_columns=128,
    matmul_tokens=64,
    matmul_pieces=4,
    matmul_pieces_of_eight=2,
    history_bytes=200 * KIB,
    ring_bytes=214 * KIB,
    sinkhorn_registers=48,
    post_ctas=4,
    post_ctas_of_eight=2,
    post_slices=4,
    interleaved_post_ctas=4,
    any_ctas=2,
    kept_bytes=40 * MIB,
    last_read_bytes=256 * MIB,
    has_wgmma=True,
    has_tma=True,
    has_one_pass=True,
)
# All below are compiled for, and not measured: what is not a limit is Hopper's choice, or the
# nearest to it that fits. Of L2 as large a part is counted on as on Hopper.
BLACKWELL = replace(HOPPER, l2_bytes=126 * MIB, has_wgmma=False)
# Smaller tiles: two or three of them are in flight, by cp.async.
AMPERE = replace(
    HOPPER,
    shared_bytes=163 * KIB,
    shared_bytes_per_sm=164 * KIB,
    l2_bytes=40 * MIB,
    matmul_bytes=160 * KIB,
    matmul_columns=64,
    matmul_tokens=32,
    matmul_pieces=2,
    history_bytes=144 * KIB,
    ring_bytes=0,
    kept_bytes=32 * MIB,
    last_read_bytes=200 * MIB,
    has_wgmma=False,
    has_tma=False,
)
# A10, A40, GeForce 30: an SM with less of everything but registers.
SMALL_AMPERE = replace(
    AMPERE,
    threads_per_sm=1536,
    ctas=16,
    shared_bytes=99 * KIB,
    shared_bytes_per_sm=100 * KIB,
    l2_bytes=6 * MIB,
    matmul_bytes=96 * KIB,
    matmul_pieces_of_eight=1,
    history_bytes=80 * KIB,
    kept_bytes=5 * MIB,
    last_read_bytes=30 * MIB,
    has_one_pass=False,
)
# L4, L40, GeForce 40.
ADA = replace(
    SMALL_AMPERE,
    ctas=24,
    l2_bytes=96 * MIB,
    kept_bytes=76 * MIB,
    last_read_bytes=480 * MIB,
)
# RTX PRO and GeForce 50. Its clusters would hold tokens of up to 2048 columns.
SMALL_BLACKWELL = replace(
    ADA,
    l2_bytes=128 * MIB,
    kept_bytes=102 * MIB,
    last_read_bytes=640 * MIB,
    has_tma=True,
)

# By the names that a compiler gives them.
ARCHITECTURES = {
    "sm_80": AMPERE,
    "sm_86": SMALL_AMPERE,
    "sm_89": ADA,
    "sm_90a": HOPPER,
    "sm_100a": BLACKWELL,
    "sm_103a": BLACKWELL,
    "sm_120a": SMALL_BLACKWELL,
}
# Where none is named.
DEFAULT = "sm_90a"
