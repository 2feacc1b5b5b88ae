"""Sums that the CTAs of a cluster give one another, from registers.

TileLang 0.1.15 has no `st.async`, only copies from shared memory: they want a fence before them,
and one lane after the other issues them, 40 cycles each, for which a whole cluster waits.
"""

import tilelang.language as T

# Goes with a kernel's source; tests/emulator has functions of these names. `expect_bytes` is the
# one arrival of a phase; `push_vector` writes to the place of `to` in CTA `rank`, and tells the
# barrier there how many bytes have come.
SOURCE = r"""
template <typename Barrier>
static __device__ __forceinline__ void expect_bytes(Barrier &full, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"((unsigned)__cvta_generic_to_shared(&full)), "r"(bytes) : "memory");
}
template <typename Barrier>
static __device__ __forceinline__ void push_vector(float *to, const float *from, int rank,
                                                   Barrier &full) {
  unsigned there, told;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there) : "r"((unsigned)__cvta_generic_to_shared(to)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(told) : "r"((unsigned)__cvta_generic_to_shared(&full)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], "
               "{%1, %2, %3, %4}, [%5];"
               ::"r"(there), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]), "r"(told)
               : "memory");
}
"""
# Floats that one push moves.
WIDTH = 4


def senders(vectors: int, cluster: int) -> int:
    """Groups of lanes that have the same sums, each for other CTAs: as many as a warp has room for,
    a power of two as the cluster is."""
    groups = 1
    while 2 * groups * vectors <= 32 and 2 * groups <= cluster:
        groups *= 2
    return groups


@T.macro
def announce(full: T.Buffer, slot: T.int32, cluster: int, count: int):
    """Tell a CTA's barrier how many bytes a push of all CTAs brings."""
    if T.get_thread_binding() % 32 == 0:
        T.evaluate(
            T.call_extern("handle", "expect_bytes", full[slot], T.uint32(cluster * count * 4))
        )


@T.macro
def push_vectors(
    warp_sums: T.Buffer,
    buffer: T.int32,
    parts: T.Buffer,
    full: T.Buffer,
    slot: T.int32,
    rank: T.int32,
    cluster: int,
    warps: int,
    count: int,
):
    """Add up what the warps of this CTA have, and give it to every CTA of the cluster.

    By one warp; `count` is a multiple of WIDTH, up to 32 of them. A CTA that pushes step s has read
    what all pushed in step s - 1, and who pushed that had read step s - 2: its slot is free. Bytes
    may come to a barrier before it expects them.
    """
    lane = T.get_thread_binding() % 32
    vectors = count // WIDTH
    groups = senders(vectors, cluster)
    total = T.alloc_local((WIDTH,), T.float32)
    addend = T.alloc_local((WIDTH,), T.float32)
    if cluster > 1:
        announce(full, slot, cluster, count)
    if lane < vectors * groups:
        for v in T.unroll(WIDTH):
            total[v] = 0.0
        for q in T.unroll(warps):
            for v in T.vectorized(WIDTH):
                addend[v] = warp_sums[buffer, q, lane % vectors * WIDTH + v]
            for v in T.unroll(WIDTH):
                total[v] += addend[v]
        if cluster == 1:
            for v in T.vectorized(WIDTH):
                parts[slot, 0, lane * WIDTH + v] = total[v]
        else:
            for k in T.unroll(cluster // groups):
                T.evaluate(
                    T.call_extern(
                        "handle",
                        "push_vector",
                        T.access_ptr(parts[slot, rank, lane % vectors * WIDTH], "w", WIDTH),
                        T.access_ptr(total[0], "r", WIDTH),
                        k * groups + lane // vectors,
                        full[slot],
                    )
                )
    if cluster == 1:
        T.sync_warp()


@T.macro
def push_shares(
    warp_sums: T.Buffer,
    buffer: T.int32,
    parts: T.Buffer,
    full: T.Buffer,
    slot: T.int32,
    rank: T.int32,
    warp: T.int32,
    cluster: int,
    warps: int,
    count: int,
):
    """The same of a cluster of several CTAs, by the warps that have the sums.

    Each lane adds up one vector for one CTA; where that takes more than one warp the first ones
    have a part each, so that there must be `vectors // each` warps. Another warp has only to
    announce the bytes.
    """
    lane = T.get_thread_binding() % 32
    vectors = count // WIDTH
    each = min(vectors, 32 // cluster)
    total = T.alloc_local((WIDTH,), T.float32)
    addend = T.alloc_local((WIDTH,), T.float32)
    if warp < vectors // each and lane < each * cluster:
        for v in T.unroll(WIDTH):
            total[v] = 0.0
        vector = warp * each + lane % each
        for q in T.unroll(warps):
            for v in T.vectorized(WIDTH):
                addend[v] = warp_sums[buffer, q, vector * WIDTH + v]
            for v in T.unroll(WIDTH):
                total[v] += addend[v]
        T.evaluate(
            T.call_extern(
                "handle",
                "push_vector",
                T.access_ptr(parts[slot, rank, vector * WIDTH], "w", WIDTH),
                T.access_ptr(total[0], "r", WIDTH),
                lane // each,
                full[slot],
            )
        )
