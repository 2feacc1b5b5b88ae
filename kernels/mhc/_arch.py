"""What kernels may take of an SM, by architecture. Imports no other module of ours.

How many SMs there are is asked of the device, as GPUs of one architecture differ in that: see
`tile_mhc.config.get_num_sms`.
"""

from dataclasses import dataclass, replace

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Architecture:
    """The limits of the hardware, and what was measured to be best within them.

    Attributes:
        registers: per SM.
        threads: per CTA, at most.
        ctas: per SM, at most.
        shared_bytes: shared memory per CTA, at most.
        shared_bytes_per_sm: shared memory per SM; each CTA takes one KiB more than it asks for.
        l2_bytes: of the largest GPU.
        matmul_bytes: projection: shared memory for the pipeline and the tiles beside it.
        history_bytes: sinkhorn, log_sinkhorn: shared memory for the steps of a CTA's tokens.
        ring_bytes: contract_cluster: shared memory for the rings of tokens; the rest is for sums.
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
    """

    registers: int
    threads: int
    ctas: int
    shared_bytes: int
    shared_bytes_per_sm: int
    l2_bytes: int
    matmul_bytes: int
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

    def warps(self, registers: int) -> int:
        """Warps that fit an SM with so many registers per thread; its four parts share none."""
        return 4 * (self.registers // 4 // (32 * registers))


# Measured on H100 and H200; the reasons stand where the numbers are used.
HOPPER = Architecture(
    registers=65536,
    threads=1024,
    ctas=32,
    shared_bytes=227 * KIB,
    shared_bytes_per_sm=228 * KIB,
    l2_bytes=50 * MIB,
    matmul_bytes=224 * KIB,
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
)
# Compiled for, and not measured: an SM has the same limits, and Hopper's choices stand.
BLACKWELL = replace(HOPPER, l2_bytes=126 * MIB, has_wgmma=False)

# By the names that a compiler gives them.
ARCHITECTURES = {"sm_90a": HOPPER, "sm_100a": BLACKWELL, "sm_103a": BLACKWELL}
# Launchers size their launches by this one, so the others agree with it in what a launch reads.
DEFAULT = "sm_90a"
