"""Compiled kernels by name: from this process, else from TileLang's disk cache, else built.

The first use of a kernel compiles it and leaves it in the cache; `tile-mhc compile` fills the same
cache ahead of time, also on a machine without a GPU. Environment:

- ``TILE_MHC_JIT=0`` forbids building; a kernel that is not in the cache then raises. With
  ``TILE_MHC_JIT=warn`` it is built, and the logger ``tile_mhc`` says so. `config.set_jit` overrides
  it.
- ``TILELANG_CACHE_DIR`` is the cache; not set, or empty (with a warning), ``~/.tilelang/cache``. A
  ``~`` at its start is the home folder. A relative one is of the working directory at first use,
  and stays that folder. TileLang, which would take the value as it stands, is told the outcome.

TileLang, and with it the compiler, is imported only when the first kernel is asked for.
"""

import atexit
import contextlib
import errno
import importlib
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tile_mhc import _device, config, specs
from tile_mhc.errors import UnsupportedError

Launch = Callable[..., Any]
Kernel = tuple[str, specs.Arguments]
Result = TypeVar("Result")

_log = logging.getLogger("tile_mhc")

# What CPython says then; see `undisturbed`.
_DISTURBED = "recursion depth mismatch"
_DISTURBANCES = 10

_CACHE_VARIABLE = "TILELANG_CACHE_DIR"
_CACHE_DEFAULT = os.path.join("~", ".tilelang", "cache")


class CompileError(RuntimeError):
    """A kernel could not be built."""


class NotCompiledError(CompileError):
    """A kernel is not in the cache, and building it now is not allowed."""


@dataclass(frozen=True)
class Compiled:
    """One kernel, ready to launch.

    Attributes:
        name: its name in the table of `tile_mhc.specs`.
        args: the arguments its builder got.
        arch: the architecture it was compiled for.
        launch: the callable that takes tensors and numbers.
        built: True when this process compiled it, False when it came from the disk cache.
        seconds: what that took.
        key: TileLang's cache key.
        path: the cache entry.
        source: TileLang's own kernel object.
    """

    name: str
    args: specs.Arguments
    arch: str
    launch: Launch
    built: bool
    seconds: float
    key: str
    path: Path
    source: Any


@dataclass(frozen=True)
class Statistics:
    """How the kernels of this process were obtained.

    Attributes:
        built: compiled here.
        loaded: found in the disk cache.
        resident: (kernel, device) pairs that now answer from memory.
    """

    built: int
    loaded: int
    resident: int


_Key = tuple[str, specs.Arguments, str]

_ready: dict[tuple[str, specs.Arguments, int], Launch] = {}
_compiled: dict[_Key, Compiled] = {}
_locks: dict[_Key, threading.Lock] = {}
# Held while tracing (TileLang's parser keeps global state) and while the cache folder is swapped.
_trace_lock = threading.Lock()
_swap_lock = threading.Lock()
_import_lock = threading.Lock()
_count_lock = threading.Lock()
_counts = {"built": 0, "loaded": 0}
_thread = threading.local()


def kernel(name: str, *args: int | str) -> Launch:
    """The compiled kernel `name` for the current CUDA device.

    Args:
        name: a kernel of `tile_mhc.specs`.
        *args: the arguments of its builder.

    Returns:
        A callable that launches on the current device and stream.

    Raises:
        NotCompiledError: it would have to be built while that is forbidden, or it is first used
            inside a CUDA graph capture.
        CompileError: building it failed.
        UnsupportedError: there are no kernels for this GPU.
    """
    asked_for = getattr(_thread, "asked_for", None)
    if asked_for is not None:
        asked_for[name, args] = None
        return _no_launch
    launch = resident(name, args)
    note = getattr(_thread, "note", None)
    return launch if note is None else note(launch)


@contextlib.contextmanager
def noted(note: Callable[[Launch], Launch]) -> Iterator[None]:
    """Within, `kernel` gives what `note` makes of the kernel, in this thread."""
    _thread.note = note
    try:
        yield
    finally:
        _thread.note = None


@contextlib.contextmanager
def asking() -> Iterator[dict[Kernel, None]]:
    """Within, in this thread, `kernel` takes down what it is asked for, and gives what launches
    nothing. Operators then launch for tensors on any device, the meta device too."""
    before = getattr(_thread, "asked_for", None)
    asked_for: dict[Kernel, None] = {}
    _thread.asked_for = asked_for
    try:
        yield asked_for
    finally:
        _thread.asked_for = before


def is_asking() -> bool:
    return getattr(_thread, "asked_for", None) is not None


def _no_launch(*_: Any) -> None:
    pass


def resident(name: str, args: specs.Arguments) -> Launch:
    """The kernel for the current device, in memory; see `kernel`."""
    device = torch.cuda.current_device()
    launch = _ready.get((name, args, device))
    if launch is not None:
        return launch
    # A module is loaded onto a device at its first launch there, which a capture does not allow:
    # that is why residency counts per device, and why even a disk hit is refused.
    if torch.cuda.is_current_stream_capturing():
        raise NotCompiledError(
            f"{_call(name, args)}: must have run on cuda:{device} before a CUDA graph capture; "
            "got its first use inside one. Run the op once with these sizes before capturing"
        )
    arch = device_arch(device)
    if arch not in specs.ARCHS:
        raise UnsupportedError(f"{_call(name, args)}: {_device.problem_of(device)}")
    launch = compile_kernel(name, args, arch).launch
    _ready[name, args, device] = launch
    return launch


def is_compiled(name: str, args: specs.Arguments, arch: str) -> bool:
    """Whether the kernel is in memory."""
    return (name, args, arch) in _compiled


def compile_kernel(name: str, args: specs.Arguments, arch: str) -> Compiled:
    """The kernel for `arch`, from memory, the disk cache or the compiler; needs no GPU.

    Args:
        name: a kernel of `tile_mhc.specs`.
        args: the arguments of its builder.
        arch: the target, such as "sm_90a".

    Returns:
        The kernel and how it was obtained.

    Raises:
        NotCompiledError: it is not in the cache, and building it is forbidden.
        CompileError: building it failed.
    """
    key = (name, args, arch)
    with _locks.setdefault(key, threading.Lock()):
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = _load_or_build(name, args, arch)
            with _count_lock:
                _counts["built" if found.built else "loaded"] += 1
            if config.get_jit() == "warn" and not is_expected():
                _log.warning(
                    "%s: was %s now, which took %.2f s; tile_mhc.warm_up does it beforehand",
                    _call(name, args),
                    "compiled" if found.built else "loaded from the cache",
                    found.seconds,
                )
        return found


@contextlib.contextmanager
def expected() -> Iterator[None]:
    """Within, in this thread, a kernel that is built or loaded is nothing to warn of."""
    before = is_expected()
    _thread.expected = True
    try:
        yield
    finally:
        _thread.expected = before


def is_expected() -> bool:
    return getattr(_thread, "expected", False)


def fill_cache(kernels: Iterable[Kernel], arch: str, jobs: int) -> list[str]:
    """Compile into the disk cache in `jobs` processes, as tracing holds the interpreter.

    Args:
        kernels: names and arguments.
        arch: the target, such as "sm_90a".
        jobs: how many processes.

    Returns:
        What went wrong, one message per kernel; asked for again, such a kernel raises it.
    """
    context = multiprocessing.get_context("spawn")
    # TileLang may have been told another folder in Python, of which a new process knows nothing.
    folder = (str(cache_directory()),)
    with ProcessPoolExecutor(jobs, context, _use_cache, folder) as pool:
        futures = [pool.submit(_problem_compiling, *kernel, arch) for kernel in kernels]
        return [problem for future in futures if (problem := future.result())]


def _use_cache(folder: str) -> None:
    os.environ[_CACHE_VARIABLE] = folder


def _problem_compiling(name: str, args: specs.Arguments, arch: str) -> str | None:
    try:
        compile_kernel(name, args, arch)
    except CompileError as error:
        return str(error)
    return None


def statistics() -> Statistics:
    """How many kernels this process built, loaded from disk, and holds in memory."""
    with _count_lock:
        return Statistics(_counts["built"], _counts["loaded"], len(_ready))


def building_allowed() -> bool:
    return config.get_jit() != "forbid"


def device_arch(device: int) -> str:
    """The architecture TileLang resolves for a device; see `specs.ARCHS`."""
    return _device.arch_of(device)


def cache_directory() -> Path:
    """The root of TileLang's cache, absolute; need not exist."""
    setting = _cache_setting()
    return cache_path(os.environ.get(_CACHE_VARIABLE) if setting is None else setting.get())


def cache_path(value: str | None) -> Path:
    """The folder that a value of TILELANG_CACHE_DIR means; see the module."""
    return Path(os.path.expanduser(value or _CACHE_DEFAULT)).absolute()


def cache_problem(root: Path) -> str | None:
    """Why kernels cannot be stored under `root`, or None; tried, as permissions do not say all."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for folder in (root, *filter(os.path.lexists, _cache_folders(root))):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _cache_folders(root: Path) -> list[Path]:
    """The folders below `root` that TileLang writes to; what else lies there is not its own."""
    public, _, local = importlib.metadata.version("tilelang").partition("+")
    names = [re.sub(r"[^\w.-]", "_", public).strip("._-"), re.sub(r"\W", "_", local).strip("_")]
    version = root / "_".join(filter(None, names))
    host = version / f"{sys.platform}-{platform.machine()}"
    binaries = "cuda-binaries"
    inside = (host, host / "kernels", host / ".staging", version / binaries)
    return [version, *inside, version / ".staging", version / ".staging" / binaries]


def _cache_setting() -> Any:
    """TileLang's own record of the variable, which may have a value of its own set in Python.

    None as long as TileLang is not imported.
    """
    env = getattr(sys.modules.get("tilelang.env"), "env", None)
    return None if env is None else vars(type(env))[_CACHE_VARIABLE]


def _settle_cache() -> Path:
    """Have TileLang use the folder that `cache_directory` says, which it returns."""
    root, setting = cache_directory(), _cache_setting()
    if setting is not None and setting._forced_value is not None:
        setting._forced_value = str(root)
    elif os.environ.get(_CACHE_VARIABLE) == "":
        del os.environ[_CACHE_VARIABLE]
        # Most likely a variable that a script meant to have set.
        warnings.warn(
            f"tile_mhc: {_CACHE_VARIABLE} must be a folder or not set; got '', and kernels are "
            f"kept in {root}",
            RuntimeWarning,
            stacklevel=2,
        )
    elif _CACHE_VARIABLE in os.environ:
        os.environ[_CACHE_VARIABLE] = str(root)
    return root


def import_tilelang() -> Any:
    """Import TileLang quietly, also where its cache folder cannot be made."""
    with _import_lock:
        os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")
        root = _settle_cache()
        if "tilelang" not in sys.modules and cache_problem(root) is not None:
            # TileLang creates its cache folders on import and fails where it cannot.
            with _cache_moved_to(_scratch()):
                tilelang = importlib.import_module("tilelang")
        else:
            tilelang = importlib.import_module("tilelang")
        importlib.import_module("tilelang.instrumentation").register_pass_instrumentation_tool(
            "tile_mhc", _watch_compile
        )
    return tilelang


class _BuildNeededError(Exception):
    """Raised inside TileLang when it is about to compile what should only be loaded."""


def _watch_compile() -> Any:
    # TileLang calls this when a compilation starts, that is, after its cache had no entry.
    if getattr(_thread, "only_load", False):
        raise _BuildNeededError
    return importlib.import_module("tilelang.instrumentation").PassInstrumentationTool()


def _load_or_build(name: str, args: specs.Arguments, arch: str) -> Compiled:
    start = time.perf_counter()
    tilelang = import_tilelang()
    builder = specs.builder(name)
    try:
        func = trace(builder, args, arch)
    except Exception as error:
        raise CompileError(
            f"{_call(name, args)}: the builder failed: {_first_line(error)}"
        ) from error

    def compile_func() -> Any:
        return tilelang.compile(
            func,
            target={"kind": "cuda", "arch": arch},
            execution_backend="tvm_ffi",
            pass_configs=specs.pass_configs(name, args),
        )

    try:
        built_by = undisturbed(lambda: _compile(compile_func, tilelang))
    except _BuildNeededError:
        where, remedy = f"in {cache_directory()}", _remedy(name, args, arch)
        if not tilelang.env.is_cache_enabled():
            where, remedy = "while TileLang's cache is off", "unset TILELANG_DISABLE_CACHE"
        raise NotCompiledError(
            f"{_call(name, args)}: is not compiled for {arch} {where}, and "
            f"{_forbidden_by()} forbids building it now; {remedy}"
        ) from None
    except Exception as error:
        problem = _nvcc_problem()
        reason = problem or f"building for {arch} failed: {_first_line(error)}"
        raise CompileError(f"{_call(name, args)}: {reason}") from error

    return Compiled(
        name=name,
        args=args,
        arch=arch,
        launch=_launcher(built_by),
        built=built_by.artifact is not None,
        seconds=time.perf_counter() - start,
        key=getattr(built_by, "_tilelang_cache_key", ""),
        path=Path(getattr(built_by, "_tilelang_cache_path", "")),
        source=built_by,
    )


def trace(builder: Callable[..., Any], args: specs.Arguments, arch: str) -> Any:
    """The builder's prim_func for an architecture; one at a time in a process."""

    def trace_alone() -> Any:
        with _trace_lock:
            return builder(*args, arch=arch)

    return undisturbed(trace_alone)


def undisturbed(function: Callable[[], Result]) -> Result:
    """`function`, again where another thread upset a parse of it.

    CPython up to 3.12 counts how deep a parse is for all threads together, and TileLang parses
    Python while it traces and while it lowers.
    """
    for _ in range(_DISTURBANCES):
        try:
            return function()
        except Exception as error:
            if _DISTURBED not in str(error):
                raise
    return function()


def _compile(compile_func: Callable[[], Any], tilelang: Any) -> Any:
    """Run `compile_func`; where the cache cannot be written, load from it and build elsewhere."""
    with _swap_lock:
        root = _settle_cache()
    if not building_allowed():
        return _only_load(compile_func)
    if not tilelang.env.is_cache_enabled():
        return compile_func()
    problem = _problem_of(root)
    if problem is None:
        try:
            return compile_func()
        except Exception as error:
            # TileLang turns some OSErrors into RuntimeErrors, so the text has to tell a full disk.
            full = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
            problem = cache_problem(root) or (_first_line(error) if full else None)
            if problem is None:
                raise
            _problems[root] = problem
    _warn_once(root, problem)
    with _swap_lock:
        try:
            return _only_load(compile_func)
        except _BuildNeededError:
            with _cache_moved_to(_scratch()):
                return compile_func()


def _only_load(compile_func: Callable[[], Any]) -> Any:
    _thread.only_load = True
    try:
        return compile_func()
    finally:
        _thread.only_load = False


def _launcher(kernel: Any) -> Launch:
    """The packed function behind a TileLang kernel.

    All our kernels write to tensors they are given, so TileLang's Python wrapper, which looks for
    outputs to allocate, would only add microseconds to each launch.
    """
    if kernel.adapter.result_idx:
        return kernel  # type: ignore[no-any-return]
    function: Launch = kernel.adapter.get_exportable_executable()["main"]
    return function


_problems: dict[Path, str | None] = {}
_warned: set[Path] = set()


def _problem_of(root: Path) -> str | None:
    if root not in _problems:
        _problems[root] = cache_problem(root)
    return _problems[root]


def _warn_once(root: Path, problem: str) -> None:
    if root not in _warned:
        _warned.add(root)
        warnings.warn(
            f"tile_mhc: kernels cannot be stored in {root} ({problem}); those not found there are "
            "built again in every process. Set TILELANG_CACHE_DIR to a writable folder",
            RuntimeWarning,
            stacklevel=2,
        )


_scratch_path: str | None = None


def _scratch() -> str:
    """A cache folder for this process only."""
    global _scratch_path
    if _scratch_path is None:
        _scratch_path = tempfile.mkdtemp(prefix="tile_mhc-")
        atexit.register(shutil.rmtree, _scratch_path, ignore_errors=True)
    return _scratch_path


@contextlib.contextmanager
def _cache_moved_to(folder: str) -> Iterator[None]:
    setting = _cache_setting()
    if setting is not None:
        # TileLang reads this at each use, before the environment, which others read too.
        before, setting._forced_value = setting._forced_value, folder
        try:
            yield
        finally:
            setting._forced_value = before
        return
    value = os.environ.get(_CACHE_VARIABLE)
    os.environ[_CACHE_VARIABLE] = folder
    try:
        yield
    finally:
        if value is None:
            del os.environ[_CACHE_VARIABLE]
        else:
            os.environ[_CACHE_VARIABLE] = value


def find_nvcc() -> Path | None:
    """The nvcc that TileLang runs."""
    home = importlib.import_module("tilelang.env").CUDA_HOME
    path = Path(home, "bin", "nvcc")
    return path if home and path.exists() else None


def _nvcc_problem() -> str | None:
    if find_nvcc() is not None:
        return None
    return (
        "building it needs nvcc, and none was found in CUDA_HOME, on PATH or in /usr/local/cuda; "
        "install the CUDA toolkit, or compile on another machine with `tile-mhc compile` and set "
        "TILELANG_CACHE_DIR to a copy of its cache"
    )


def _remedy(name: str, args: specs.Arguments, arch: str) -> str:
    command = specs.compile_command(name, args, arch)
    return f"run `{command}`" if command else "allow it"


def _forbidden_by() -> str:
    return "TILE_MHC_JIT=0" if config._jit is None else "config.set_jit('forbid')"


def _call(name: str, args: specs.Arguments) -> str:
    return f"kernel {name}({', '.join(map(str, args))})"


def _first_line(error: BaseException) -> str:
    # nvcc failures carry the whole source before the message that matters.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    chosen = next((line for line in lines if ": error" in line or "fatal" in line), None)
    return f"{type(error).__name__}: {chosen or (lines[0] if lines else '')}"
