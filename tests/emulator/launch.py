"""Build a kernel's C++ and run it on CPU tensors, with TileLang's own checks of the arguments."""

import contextlib
import ctypes
import functools
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from emulator.cache import CACHE, digest_of, made
from emulator.lowering import Lowered, lower
from emulator.translate import translate
from tile_mhc import specs
from tile_mhc.kernels._arch import DEFAULT

HERE = Path(__file__).parent
# Contracted to fused multiply-adds, as nvcc does. Registers that nothing wrote hold a pattern, and
# an index past a register array traps.
FLAGS = (
    "-std=c++17", "-O1", "-mfma", "-mf16c", "-ffp-contract=fast", "-fno-strict-aliasing", "-w",
    "-ftrivial-auto-var-init=pattern", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error",
    "-fPIC", "-fvisibility=hidden",
)  # fmt: skip
HEADERS = ("device.h", "runtime.h")  # the first includes the other
RUNTIME = "runtime.cpp"
_TYPES = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
launched: set[tuple[str, specs.Arguments, str]] = set()
# One launch at a time: a library holds its launch's state, and signals are the process's.
_launch_lock = threading.Lock()
# What the launch before may have written: kept, so that no other tensor gets its memory.
_written: list[Tensor] = []
# The same of what it may have read.
_read: list[Tensor] = []


class FaultError(RuntimeError):
    """The kernel did what it must not; the message says which, where, and shows the line."""


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writable", ctypes.c_int32),
        ("early", ctypes.c_int32),
    )


class Settings:
    """What a launch takes besides its arguments."""

    time_limit = 120  # seconds a launch
    seed = 0  # of the order in which threads run; 0: by index
    known: Sequence[Tensor] = ()  # tensors that a kernel may reach by their address
    watch: Callable[["Kernel", Sequence[Any]], Any] | None = None  # called before each launch; what
    # it returns is called after it


@contextlib.contextmanager
def settings(**values: Any) -> Iterator[None]:
    before = {name: getattr(Settings, name) for name in values}
    for name, value in values.items():
        setattr(Settings, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(Settings, name, value)


def kernel(name: str, *args: int | str, arch: str = DEFAULT) -> "Kernel":
    """The emulated kernel; stands in for `tile_mhc.jit.kernel`."""
    return _kernel(name, args, arch)


@functools.cache
def _kernel(name: str, args: specs.Arguments, arch: str) -> "Kernel":
    return Kernel(lower(name, args, arch))


class Kernel:
    """A kernel to call with tensors and numbers, like one that TileLang compiled."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.key = (lowered.name, lowered.args)
        self.library = build(translate(lowered), lowered.name)

    def __call__(self, *given: Any) -> None:
        after = Settings.watch(self, given) if Settings.watch else None
        self._launch(given)
        launched.add((*self.key, self.lowered.arch))
        if after:
            after()

    def _launch(self, given: Sequence[Any]) -> None:
        lowered = self.lowered
        values = self._bind(given)
        scope = {name: given[index] for name, index in lowered.values.items()} | values
        arguments = [_evaluate(text, scope) for text in lowered.arguments]
        device_types = _device_types(lowered.source)
        tensors, holders, written, read = [], [], [], []
        early_names = specs.BY_NAME[lowered.name].early
        beside = False
        for value, kind in zip(arguments, device_types, strict=True):
            if isinstance(value, Tensor):
                name = next(n for n, i in lowered.values.items() if given[i] is value)
                writable = not kind.startswith("const")
                taken = [*_written, *_read] if writable else _written
                early = name in early_names and not any(_overlap(value, w) for w in taken)
                # Then not all of this kernel waits: what comes behind may find two at work.
                beside |= early and writable
                tensors.append(_span(name, value, writable, early))
                (written if writable else read).append(value)
                holders.append(ctypes.c_int(0))
            else:
                holders.append(_C_TYPES[kind](value))
        tensors += [_span("a tensor of the op", tensor, True, False) for tensor in Settings.known]
        extents = {tag: _evaluate(text, scope) for tag, text in lowered.extents.items()}
        grid = [int(extents.get(f"blockIdx.{axis}", 1)) for axis in "xyz"]
        if min(grid) < 1 or max(grid[1:]) > 65535:
            raise FaultError(f"{lowered.title}: a grid of {grid} cannot be launched")
        pointers = (ctypes.c_void_p * len(holders))(*(ctypes.addressof(h) for h in holders))
        message = ctypes.create_string_buffer(1024)
        with _launch_lock:
            failed = self.library.emu_run(
                (_Tensor * len(tensors))(*tensors),
                len(tensors),
                pointers,
                (ctypes.c_int32 * 3)(*grid),
                int(extents["threadIdx.x"]),
                lowered.cluster,
                ctypes.c_int64(lowered.shared_bytes),
                ctypes.c_uint64(Settings.seed),
                Settings.time_limit,
                message,
                len(message),
            )
            _written[:] = [*_written, *written] if beside else written
            _read[:] = [*_read, *read] if beside else read
        if failed:
            raise FaultError(self._explain(message.value.decode()))

    def _bind(self, given: Sequence[Any]) -> dict[str, int]:
        """Check the arguments as TileLang's host code does; return the dimensions."""
        lowered = self.lowered
        if len(given) != len(lowered.inputs):
            raise ValueError(f"{lowered.title}: takes {len(lowered.inputs)}, got {len(given)}")
        values: dict[str, int] = {}
        for (name, dtype, shape), value in zip(lowered.inputs, given, strict=True):
            if shape is None:
                if isinstance(value, Tensor):
                    raise TypeError(f"{lowered.title}: {name} must be a number; got a tensor")
                continue
            what = f"{lowered.title}: {name}"
            if str(value.dtype).removeprefix("torch.") != {"handle": "int64"}.get(dtype, dtype):
                raise RuntimeError(f"{what} dtype mismatch, expected {dtype}; got {value.dtype}")
            if value.ndim != len(shape) or not value.is_contiguous():
                raise RuntimeError(f"{what} must be {shape}, contiguous; got {value.shape}")
            for text, size in zip(shape, value.shape, strict=True):
                if text.isidentifier():
                    values.setdefault(text, size)
                if _evaluate(text, values) != size:
                    raise RuntimeError(f"{what} must be {shape}; got {tuple(value.shape)}")
        return values

    def _explain(self, message: str) -> str:
        line, _, text = message.partition(":")
        code = self.lowered.source.split("\n")[int(line) - 1].strip() if int(line) else ""
        return f"{self.lowered.title}: {text}\n  line {line} of its CUDA source: {code[:400]}"


_C_TYPES = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def _device_types(source: str) -> list[str]:
    signature = next(
        line for line in source.split("\n") if line.startswith('extern "C"') and line.endswith("{")
    )
    parameters = signature[signature.rindex("_kernel(") + 8 : -3].split(", ")
    return [p if "*" in p else p.rsplit(" ", 1)[0] for p in parameters]


def _evaluate(text: str, scope: dict[str, Any]) -> Any:
    return eval(text, {"__builtins__": {}, "T": _Language}, scope)


class _Language:
    """The functions of TileLang that occur in a launch's expressions."""

    min = staticmethod(min)
    max = staticmethod(max)

    @staticmethod
    def Cast(dtype: str, value: Any) -> Any:  # noqa: N802
        return int(value) if "int" in dtype else float(value)

    int64 = int32 = staticmethod(int)


def _span(name: str, tensor: Tensor, writable: bool, early: bool) -> _Tensor:
    return _Tensor(name.encode(), tensor.data_ptr(), _bytes(tensor), writable, early)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = sorted((a, b), key=Tensor.data_ptr)
    return first.data_ptr() + _bytes(first) > second.data_ptr()


def build(code: str, name: str) -> ctypes.CDLL:
    """The shared library of a translated kernel, from the cache or from g++."""
    digest = digest_of(code, _headers_digest())
    path = CACHE / "built" / f"{name}-{digest}.so"

    def compile_into(library: Path) -> None:
        source = path.with_suffix(".cpp")
        source.write_text(code)
        header = f"-I{_precompiled_header()}"
        run = _gcc("-shared", header, "-o", library, source, _compiled_runtime())
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if "error" in line][:8]
            raise RuntimeError(f"{name}: the emulator lacks a name?\n" + "\n".join(errors))

    return ctypes.CDLL(str(made(path, compile_into)))


@functools.cache
def _precompiled_header() -> Path:
    """The folder to include `device.h` from, with its compiled form."""
    # GCC takes only what it made itself, and would silently compile the text each time.
    version = subprocess.run(["g++", "-v"], capture_output=True, text=True, check=True).stderr
    folder = CACHE / "header" / digest_of(_headers_digest(), version)

    def compile_into(header: Path) -> None:
        for name in HEADERS:
            shutil.copyfile(HERE / name, folder / name)
        run = _gcc("-x", "c++-header", "-o", header, folder / HEADERS[0])
        if run.returncode:
            raise RuntimeError(f"the emulator's header does not compile\n{run.stderr}")

    return made(folder / f"{HEADERS[0]}.gch", compile_into).parent


@functools.cache
def _compiled_runtime() -> Path:
    """What every kernel's library has; compiled with each, it was a third of a build's time."""

    def compile_into(compiled: Path) -> None:
        run = _gcc("-c", "-o", compiled, HERE / RUNTIME)
        if run.returncode:
            raise RuntimeError(f"the emulator's runtime does not compile\n{run.stderr}")

    return made(CACHE / "header" / f"runtime-{_headers_digest()}.o", compile_into)


def _gcc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["g++", *FLAGS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@functools.cache
def _headers_digest() -> str:
    return digest_of(*((HERE / name).read_text() for name in (*HEADERS, RUNTIME)), *FLAGS)
