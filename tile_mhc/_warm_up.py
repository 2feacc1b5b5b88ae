"""Kernels compiled and loaded before the first call that needs them."""

import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from tile_mhc import _device, errors, jit

_log = logging.getLogger("tile_mhc")

Call = Callable[[int, torch.device], object]


@dataclass(frozen=True)
class WarmUp:
    """What `warm_up` has done.

    Attributes:
        kernels: those that the calls launch, by name and arguments.
        built: how many of them were compiled now.
        loaded: how many came from the disk cache now; the others were in memory.
        seconds: what it took.
        token_counts: the numbers of tokens that were asked for.
    """

    kernels: tuple[jit.Kernel, ...]
    built: int
    loaded: int
    seconds: float
    token_counts: tuple[int, ...]
    _call: Call = field(repr=False, compare=False)

    def covers(self, num_tokens: int) -> bool:
        """Whether the calls with another number of tokens launch only kernels that are there.

        Which kernels they are depends on the number in few places, so that most numbers are covered
        by any; what a launch is sized by is no part of a kernel.
        """
        errors.check_positive_int("covers", "num_tokens", num_tokens, minimum=0)
        return set(_asked_for(self._call, num_tokens)) <= set(self.kernels)


def warm_up(
    call: Call,
    token_counts: Iterable[int],
    *,
    device: torch.device | str | int | None = None,
    jobs: int | None = None,
) -> WarmUp:
    """Compile all kernels that calls will launch, several at a time, and load them onto the GPU.

    Afterwards these calls compile nothing, load nothing, and can be captured in a CUDA graph as
    they are; `config.set_jit("forbid")` makes sure of it. On a device other than CUDA, and on a GPU
    that there are no kernels for, there is nothing to do.

    First `call` is run with each of `token_counts` on the meta device, which takes a millisecond
    an op, to see what it launches under the settings of `tile_mhc.config`; then, of the numbers
    that launch the same, with the smallest on the GPU.

    Args:
        call: runs the ops that will be served, forward, without gradients: it gets a number of
            tokens and a device, and makes its inputs there, with the shapes, dtypes and options of
            what will be served. Their values do not matter.
        token_counts: the numbers of tokens, at least one.
        device: the CUDA device, by default the current one.
        jobs: how many kernels are compiled at a time, by default one a CPU core. Each runs nvcc.

    Returns:
        What was done; it is also written to the logger "tile_mhc".

    Raises:
        ShapeError: a number is not an integer of at least 0, or there is none.
        CompileError: compiling a kernel failed, or `config.set_jit` or TILE_MHC_JIT forbids it.
        UnsupportedError: there are no kernels for this GPU, and `config.set_require_kernels` wants
            them.
    """
    counts = tuple(dict.fromkeys(token_counts))
    if not counts:
        raise errors.ShapeError("warm_up: token_counts must have at least one number; got none")
    for count in counts:
        errors.check_positive_int("warm_up", "each of token_counts", count, minimum=0)
    if jobs is not None:
        errors.check_positive_int("warm_up", "jobs", jobs)
    chosen = _chosen(device)
    if chosen.type != "cuda":
        return WarmUp((), 0, 0, 0.0, counts, call)
    if _device.limits_of(chosen.index) is None:
        _device.refer("warm_up", chosen.index)
        return WarmUp((), 0, 0, 0.0, counts, call)
    start = time.perf_counter()
    with torch.no_grad(), torch.cuda.device(chosen), jit.expected():
        smallest: dict[tuple[jit.Kernel, ...], int] = {}
        for count in sorted(counts):
            smallest.setdefault(tuple(_asked_for(call, count)), count)
        kernels = tuple(dict.fromkeys(kernel for launched in smallest for kernel in launched))
        compiled = _compile(kernels, jit.device_arch(chosen.index), jobs or _cores())
        for count in smallest.values():
            call(count, chosen)
        torch.cuda.synchronize(chosen)
    built = sum(new and kernel.built for kernel, new in compiled)
    loaded = sum(new for _, new in compiled) - built
    done = WarmUp(kernels, built, loaded, time.perf_counter() - start, counts, call)
    _log.info(
        "warm_up: %d kernels for %s tokens on %s: %d compiled, %d loaded from the cache, in %.1f s",
        len(kernels),
        ", ".join(map(str, counts)),
        chosen,
        built,
        loaded,
        done.seconds,
    )
    return done


def _chosen(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, int):
        return torch.device("cuda", device)
    # Without an index the current one is meant.
    is_current = torch.device(device) == torch.device("cuda")
    return torch.device("cuda", torch.cuda.current_device()) if is_current else torch.device(device)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _asked_for(call: Call, num_tokens: int) -> list[jit.Kernel]:
    with torch.no_grad(), jit.asking() as asked_for:
        call(num_tokens, torch.device("meta"))
    return list(asked_for)


def _compile(
    kernels: Iterable[jit.Kernel], arch: str, jobs: int
) -> list[tuple[jit.Compiled, bool]]:
    """Each kernel, and whether it was not in memory.

    In threads, as in `tile-mhc compile`: a worker of a server is often not allowed processes of its
    own, and nvcc, which takes most of the time, is one anyway.
    """

    def compile_one(kernel: jit.Kernel) -> tuple[jit.Compiled, bool]:
        new = not jit.is_compiled(*kernel, arch)
        with jit.expected():
            return jit.compile_kernel(*kernel, arch), new

    pool = ThreadPoolExecutor(jobs)
    try:
        return list(pool.map(compile_one, kernels))
    finally:
        pool.shutdown(cancel_futures=True)
