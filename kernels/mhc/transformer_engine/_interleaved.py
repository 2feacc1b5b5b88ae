"""What the kernels on streams that lie innermost, (T, C, n), share. Accesses are whole channels."""

import tilelang.language as T

ACCESS = 16
BYTES = {"bfloat16": 2, "float32": 4}
# Accesses to one tensor that a thread keeps in flight.
STEPS = 4


def channels_per_access(n: int, channels: int, dtype: str) -> int:
    """Channels of one access to a row of streams: as many as are aligned in every row, 16 bytes.

    Half of that in bfloat16 where the number of channels is odd. A kernel that has streams in two
    dtypes asks for the wider: then the accesses of a warp leave no gaps in either.
    """
    count = max(ACCESS // (n * BYTES[dtype]), 1)
    while channels % count:
        count //= 2
    return count


def wider(first: str, second: str) -> str:
    return max(first, second, key=BYTES.__getitem__)


def row_shape(accesses: int, limit: int = 256, most_steps: int = STEPS) -> tuple[int, int]:
    """(threads, steps): a CTA takes tiles of `threads * steps` accesses; the fewest are idle.

    Neighbouring threads take neighbouring accesses, steps are `threads` of them apart: every access
    of a warp is one stretch of memory, of the layer's tensors too. Among equals the largest; below
    128 threads only where the row has no more.
    """
    steps = min(most_steps, -(-accesses // 32))
    lanes = -(-accesses // steps)
    least = min(128, -(-lanes // 32) * 32)

    def idle(threads: int) -> int:
        return -(-accesses // (threads * steps)) * threads * steps - accesses

    threads = min(range(least, limit + 1, 32), key=lambda count: (idle(count), -count))
    return threads, steps


@T.macro
def load_access(source: T.Tensor, t: T.int32, first: T.int32, s: int, local: T.Buffer):
    """local[s, :] = source[t, first : first + its width], in one access."""
    for v in T.vectorized(local.shape[1]):
        local[s, v] = source[t, first + v]


@T.macro
def load_held(buffer: T.Tensor, adds: T.int32, t: T.int32, first: T.int32, s: int, held: T.Buffer):
    """held[s, :] = what a buffer of gradients holds, if `adds`."""
    if adds != 0:
        load_access(buffer, t, first, s, held)


@T.macro
def add_held(held: T.Buffer, s: int, adds: T.int32, local: T.Buffer):
    """local += held[s, :], if `adds`."""
    if adds != 0:
        for v in T.unroll(local.shape[0]):
            local[v] += held[s, v]


@T.macro
def store_access(local: T.Buffer, out: T.Tensor, t: T.int32, first: T.int32):
    """out[t, first : first + its width] = local, rounded to the dtype of out."""
    for v in T.vectorized(local.shape[0]):
        out[t, first + v] = T.cast(local[v], out.dtype)
