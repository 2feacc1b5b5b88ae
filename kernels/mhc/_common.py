"""What the kernels share: pass configurations, block shapes, and macros used by two ops or more."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import tilelang.language as T
from tilelang import PassConfigKey

from tile_mhc.kernels._arch import ARCHITECTURES, DEFAULT, Architecture
from tile_mhc.kernels._dtypes import Dtypes, split_arguments

# Bytes of the widest access of a thread, and bfloat16 values in one.
ACCESS = 16
VECTOR = 8

# Of an element, by dtype; "" is that of a tensor that a kernel does not have.
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "": 0}

# The kernels written thread by thread: there is no tile copy to hand to a producer warp.
SIMT = {
    PassConfigKey.TL_DISABLE_WARP_SPECIALIZED: True,
    PassConfigKey.TL_DISABLE_TMA_LOWER: True,
}
# Those of them that read the streams for the last time in a while: what a load brings is the first
# that L2 gives up again, before what it still holds for these very loads, or has yet to write back.
# H100, 2026-11, T=4096: fused_pre 79.3 -> 72.0 us at H=2560 and 116.3 -> 110.1 at 4096, aggregate
# 41.0 -> 39.5 by itself and 78.9 -> 72.2 with the projection before it. The backwards, posts and
# recompute lose 1 to 3 % by it, as do these where there is much more than L2 holds: fused_pre 1 %,
# aggregate, which has another kernel for that, and expand's backward 2 % at T=8192 H=7168. Where L2
# holds all of the streams nothing is gained but dirty lines left to the next, and the next reads
# the streams from HBM: H200, T=256 H=7168, fused_pre and post 24.8 us with usual loads, 26.4 so.
READS_LAST = SIMT | {PassConfigKey.TL_DEVICE_COMPILE_FLAGS: ["-Xptxas", "-dlcm=cs"]}

# Without TMA a stage of a pipeline is one more copy of its loop's body.
MOST_STAGES = 3

# What the kernel that is being traced is compiled for; see `builder`.
_limits: ContextVar[Architecture] = ContextVar("limits", default=ARCHITECTURES[DEFAULT])


def builder(
    pass_configs: dict[Any, Any] | Callable[..., dict[Any, Any]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a builder of a function of numbers and, by keyword, of the dtypes that its kernel has.

    It is called with a kernel's arguments: the numbers, then the words of `Dtypes`. A word for a
    tensor that the kernel does not have is a TypeError: it would be a second key of one kernel. A
    function that asks for `limits` gets the `Architecture` that the kernel is compiled for; what
    all kernels call, such as `follow_previous`, knows it without.

    Args:
        pass_configs: what the kernel is compiled with, or a function of the arguments that tells
            it: see `tile_mhc.specs.pass_configs`.
    """

    def attach(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters
        keywords = {name[: -len("_dtype")] for name in parameters if name.endswith("_dtype")}

        @functools.wraps(function)
        def build(*args: int | str, arch: str = DEFAULT) -> Any:
            numbers, words = split_arguments(args)
            dtypes = Dtypes.parse(words)
            if unknown := dtypes.given.keys() - keywords:
                raise TypeError(f"{function.__name__}: has no dtype of {', '.join(unknown)}")
            given = {f"{name}_dtype": getattr(dtypes, name) for name in keywords}
            if "limits" in parameters:
                given["limits"] = ARCHITECTURES[arch]
            before = _limits.set(ARCHITECTURES[arch])
            try:
                return function(*numbers, **given)
            finally:
                _limits.reset(before)

        build.pass_configs = pass_configs  # type: ignore[attr-defined]
        return build

    return attach


def row_vector(hidden_size: int, dtype: str) -> int:
    """Elements of one access to a row of H: as many as are aligned in every row, up to 16 bytes.

    One where H is odd: slower, and right.
    """
    vector = ACCESS // BYTES[dtype]
    while hidden_size % vector:
        vector //= 2
    return vector


def row_threads(hidden_size: int, vector: int, limit: int = 256) -> int:
    """The thread count, in warps, that covers H in accesses with the fewest idle lanes.

    Among equals the largest: more loads of one token in flight.
    """
    lanes = -(-hidden_size // vector)

    def idle(threads: int) -> int:
        return -(-lanes // threads) * threads - lanes

    return min(range(32, limit + 1, 32), key=lambda threads: (idle(threads), -threads))


def row_chunks(hidden_size: int, threads: int, vector: int) -> int:
    """CTAs per token; each takes one access per thread.

    They vary fastest in the CTA index: the CTAs that run at one time then cover whole tokens, one
    stretch of memory, and not a piece each of a thousand tokens.
    """
    return -(-hidden_size // (threads * vector))


def as_float(bits: Any):
    """The float32 value of a word. Not by T.reinterpret: where a register is taken twice, and
    written in between, that gives the first value again; see tile_mhc.cli._stale."""
    kind = "uint" if bits.dtype == "uint32" else "int"
    return T.call_pure_extern("float32", f"__{kind}_as_float", bits)


def as_int(value: T.float32):
    """The word of a float32 value; see `as_float`."""
    return T.call_pure_extern("int32", "__float_as_int", value)


@T.macro
def follow_previous():
    """Wait for the kernel before this one in the stream; from then on the next may be launched.

    The first statement of nearly every kernel. With it, a kernel is put on the GPU while its
    predecessor still runs (programmatic dependent launch), so that a sub-layer's dozen small
    launches do not each add the 1 to 2 us of a start. Before it nothing may be written, and nothing
    read but what is `early` in the table of kernels: where the predecessor is always one of ours,
    of the same call, that does not write this. All that came before the predecessor has ended then,
    as it waited here itself before this kernel could start. Before Hopper a kernel starts when its
    predecessor has ended, and there is nothing to wait for.
    """
    if _limits.get().has_tma:
        T.pdl_sync()
        T.pdl_trigger()


@T.macro
def follow_previous_unless(beside: T.int32):
    """`follow_previous`, but for a launch beside a kernel with whose tensors it has nothing to do.

    That one waits itself before it lets this start, so that all that came before it has ended. This
    one waits with `follow_previous_at_last`, for what comes behind to find both ended.
    """
    if beside == 0:
        follow_previous()


@T.macro
def follow_previous_at_last(beside: T.int32):
    if beside != 0:
        follow_previous()


@T.macro
def fence_shared():
    """Let TMA, and Hopper's tensor cores, see what threads have written to shared memory: they read
    it through another path than the threads."""
    if _limits.get().has_tma:
        T.fence_proxy_async()


def pipelined(count: Any, num_stages: int) -> Any:
    """T.Pipelined, of a count that is known at run time.

    TileLang 0.1.15 gives the copies to a warp of their own where there is TMA. Elsewhere it starts
    them ahead with cp.async, and ends the loop with the iterations that start none, each of which
    waits for one copy less: unless they are unrolled, the number is no constant, and lowering
    fails; see findings/tilelang-dynamic-pipeline.sh.
    """
    if _limits.get().has_tma:
        return T.Pipelined(count, num_stages=num_stages)
    stages = min(num_stages, MOST_STAGES)
    return T.Pipelined(count, num_stages=stages, annotations={"pragma_unroll_explicit": True})


@T.macro
def load_mixes(source: T.Tensor, t: T.int32, first: T.int32, count: int, local: T.Buffer):
    """local[k] = source[t, first + k] for k < count, in steps of up to 16 bytes."""
    width = 4 if count % 4 == 0 else 2
    for k in T.unroll(count // width):
        for v in T.vectorized(width):
            local[k * width + v] = source[t, first + k * width + v]


@T.macro
def store_mixes(local: T.Buffer, count: int, out: T.Tensor, t: T.int32, first: T.int32):
    """out[t, first + k] = local[k] for k < count."""
    width = 4 if count % 4 == 0 else 2
    for k in T.unroll(count // width):
        for v in T.vectorized(width):
            out[t, first + k * width + v] = local[k * width + v]


@T.macro
def load_streams(streams: T.Tensor, token: T.int32, h: T.int32, n: int, local: T.Buffer):
    """local[i, :] = streams[token, i, h : h + vector], n independent loads."""
    for i in T.unroll(n):
        for v in T.vectorized(local.shape[1]):
            local[i, v] = streams[token, i, h + v]


@T.macro
def add_streams(streams: T.Tensor, token: T.int32, i: T.int32, h: T.int32, local: T.Buffer):
    """local[:] += streams[token, i, h : h + vector], in float32."""
    for v in T.vectorized(local.shape[0]):
        local[v] += T.cast(streams[token, i, h + v], T.float32)


@T.macro
def weighted_sum(mix: T.Buffer, streams: T.Buffer, n: int, out: T.Buffer):
    """out[v] = sum_i mix[i] * streams[i, v] in fp32, i ascending: every aggregate's arithmetic."""
    for v in T.unroll(out.shape[0]):
        out[v] = 0.0
    for i in T.unroll(n):
        for v in T.unroll(out.shape[0]):
            out[v] += mix[i] * T.cast(streams[i, v], T.float32)


@T.macro
def reciprocal(divisor: T.float32, out: T.Buffer, index: T.int32):
    """out[index] = 1 / divisor, to the last bit or so, for a divisor far from the ends of float32.

    The compiler's division branches to a slow path for those ends, and a branch a division keeps
    neighbouring divisions from overlapping: half of Sinkhorn's time on an H200.
    """
    estimate = T.alloc_local((1,), T.float32)
    estimate[0] = T.fast_rcp(divisor)
    out[index] = T.ieee_fmaf(
        estimate[0], T.ieee_fmaf(-divisor, estimate[0], T.float32(1)), estimate[0]
    )


def sum_lanes(count: int, threads: int) -> int:
    """Threads that add up one of `count` sums of a CTA: a power of two, at most a warp."""
    lanes = 1
    while lanes < 32 and 2 * lanes * count <= threads:
        lanes *= 2
    return lanes


def sums_shape(count: int, threads: int) -> tuple[int, int]:
    """Shape of the shared buffer of `block_sums`; the padding keeps its reads free of conflicts."""
    return count, threads + sum_lanes(count, threads)


@T.macro
def block_sums(values: T.Buffer, count: int, threads: int, shared: T.Buffer, out: T.Buffer):
    """Sum values[k] over the CTA, in float64 and in a fixed order: exact to the last bit or so, and
    the same bits always.

    Afterwards thread k * sum_lanes(count, threads) holds sum k in out[0].
    """
    tid = T.get_thread_binding()
    lanes = sum_lanes(count, threads)
    total = T.alloc_local((1,), T.float64)
    for k in T.unroll(count):
        shared[k, tid] = values[k]
    T.sync_threads()
    total[0] = 0.0
    if tid < count * lanes:
        for step in T.serial(threads // lanes):
            total[0] += T.cast(shared[tid // lanes, step * lanes + tid % lanes], T.float64)
    for level in T.unroll(lanes.bit_length() - 1):
        total[0] += T.shfl_xor(total[0], 1 << level)
    out[0] = T.cast(total[0], T.float32)


@T.macro
def store_partials(values: T.Buffer, count: int, threads: int, row: T.int32, partials: T.Tensor):
    """partials[row, k] = the sum of values[k] over the CTA, by `block_sums`."""
    tid = T.get_thread_binding()
    lanes = sum_lanes(count, threads)
    partial = T.alloc_local((1,), T.float32)
    sums_shared = T.alloc_shared(sums_shape(count, threads), T.float32)
    block_sums(values, count, threads, sums_shared, partial)
    if tid % lanes == 0 and tid < count * lanes:
        partials[row, tid // lanes] = partial[0]
