"""From a kernel of the table to its CUDA source, and to what a launch of it needs. No GPU, no nvcc.

A kernel that TileLang gives TMA copies, mbarriers and wgmma is lowered another way, as its
*sibling*: the same definition with those three switched off, copies that ask for TMA made plain
ones, and pipelines one stage deep, since without warp specialisation TileLang 0.1.15 lowers no
deeper pipeline of a length known at run time. TileLang's prover has quicker settings meanwhile.
"""

import contextlib
import functools
import importlib.metadata
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import z3

from emulator.cache import CACHE, digest_of, made
from tile_mhc import jit, kernels, specs
from tile_mhc.cli._stale import check_source
from tile_mhc.kernels._arch import ARCHITECTURES, DEFAULT

SIBLING_STAGES = 1
# Settings of Z3 with which a sibling takes a quarter less: the older solver for integers. TileLang
# gives each question a number of steps, within which that may leave another open. Of 10 siblings
# 9 came out the same, and in one a loop takes single elements instead of two. Barriers, which the
# emulator is to judge, are placed with the settings that shipped kernels have.
QUICK_PROVER = {"smt.arith.solver": "2", "smt.arith.enable_hnf": "false"}
PLACES_BARRIERS = "tl.ThreadSync"
# After this a buffer is as large as the stages of its pipeline need.
MAKES_STAGES = "tl.InjectSoftwarePipeline"
# What the header does not have, and how it shows in a kernel's source.
NOT_EMULATED = {
    "TMA copies": r"tl::tma_(?:load|store(?!_cluster))",
    "mbarriers": r"\bmbarrier\[",
    "wgmma": r"tl::wgmma_\w+",
    "register reallocation": r"tl::warpgroup_reg_\w+",
}

# Held while tracing: the parser keeps global state, and a sibling swaps a module's language.
_trace_lock = threading.Lock()
# Z3's settings are the process's. For each lowering now under way, whether it is a sibling's.
_lowering: list[bool] = []
_lowering_changed = threading.Condition()
_own_prover = {name: z3.get_param(name) for name in QUICK_PROVER}


@dataclass(frozen=True)
class Lowered:
    """One kernel's source and its launch, with expressions as text over the names of `values`.

    Attributes:
        name: the kernel's name in the table.
        args: its builder's arguments.
        arch: what it is compiled for.
        source: CUDA.
        sibling: whether it was lowered with TMA, warp specialisation and wgmma off.
        inputs: (name, dtype, shape) of each argument of a launch; no shape for a number.
        values: what the host calls the arguments: name -> index into `inputs`.
        arguments: what the device function gets, over the names of inputs and dimensions.
        extents: grid and block.
        cluster: CTAs of a cluster, neighbours in x.
        shared_bytes: dynamic shared memory.
        shared: bytes of each buffer in shared memory.
    """

    name: str
    args: specs.Arguments
    arch: str
    source: str
    sibling: bool
    inputs: list[tuple[str, str, list[str] | None]]
    values: dict[str, int]
    arguments: list[str]
    extents: dict[str, str]
    cluster: int
    shared_bytes: int
    shared: dict[str, int]

    @property
    def title(self) -> str:
        return f"{self.name}({', '.join(map(str, self.args))})"


def lower(name: str, args: specs.Arguments, arch: str = DEFAULT) -> Lowered:
    """The kernel as shipped, or its sibling where the emulator lacks what it uses."""
    without_tma = specs.pass_configs(name, args).get("tl.disable_tma_lower", False)
    sibling = ARCHITECTURES[arch].has_tma and not without_tma
    return _lower(name, args, arch, sibling)


def not_emulated(name: str, args: specs.Arguments, arch: str = DEFAULT) -> list[str]:
    """What the shipped form of a kernel uses that the emulator does not have."""
    source = _lower(name, args, arch, sibling=False).source
    return [what for what, pattern in NOT_EMULATED.items() if re.search(pattern, source)]


def _lower(name: str, args: specs.Arguments, arch: str, sibling: bool) -> Lowered:
    """From the cache by the sources of all kernels, or else by what tracing this one gives.

    Another process need not even trace, and after an edit only kernels that changed are lowered.
    """
    digest = digest_of(_sources(), json.dumps([name, args, arch, sibling]))

    def trace_into(path: Path) -> None:
        path.write_text(_traced_and_lowered(name, args, arch, sibling).name)

    known = made(CACHE / "traced" / f"{name}-{digest}", trace_into)
    described = json.loads((CACHE / "lowered" / known.read_text()).read_text())
    return Lowered(name=name, args=args, arch=arch, sibling=sibling, **described)


@functools.cache
def _sources() -> str:
    files = [*sorted(Path(kernels.__file__).parent.rglob("*.py")), Path(specs.__file__)]
    return digest_of(_toolchain(), *(file.read_text() for file in files))


def _toolchain() -> str:
    return digest_of(importlib.metadata.version("tilelang"), Path(__file__).read_text())


def _traced_and_lowered(name: str, args: specs.Arguments, arch: str, sibling: bool) -> Path:
    """The file of a kernel's description."""
    tilelang = jit.import_tilelang()
    builder = specs.builder(name)
    configs = specs.pass_configs(name, args)
    if sibling:
        off = ("tl.disable_tma_lower", "tl.disable_warp_specialized", "tl.disable_wgmma")
        configs |= dict.fromkeys(off, True)

    def trace() -> Any:
        with _trace_lock, _plain_language(builder) if sibling else contextlib.nullcontext():
            return builder(*args, arch=arch)

    func = jit.undisturbed(trace)

    def lower_into(path: Path) -> None:
        target = tilelang.tvm.target.Target({"kind": "cuda", "arch": arch})
        shared: dict[str, int] = {}
        with _prover_for(sibling) as instruments:
            context = tilelang.tvm.transform.PassContext(
                opt_level=3, config=configs, instruments=[*instruments, _measurer(shared)]
            )
            with context, target:
                artifact = jit.undisturbed(lambda: tilelang.lower(func, target=target))
        check_source(str(artifact.kernel_source))
        path.write_text(json.dumps(_describe(name, func, artifact, shared)))

    digest = digest_of(func.script(), json.dumps([configs, arch]), _toolchain())
    return made(CACHE / "lowered" / f"{name}-{digest}.json", lower_into)


@contextlib.contextmanager
def _prover_for(sibling: bool) -> Iterator[list[Any]]:
    """The prover's settings for a lowering, and the instruments of its passes.

    A sibling is lowered alone, and in the same way every time; shipped kernels together.
    """

    def is_free() -> bool:
        return not _lowering if sibling else True not in _lowering

    with _lowering_changed:
        _lowering_changed.wait_for(is_free)
        _lowering.append(sibling)
    try:
        yield [_quick_prover()] if sibling else []
    finally:
        _set_up(_own_prover)
        with _lowering_changed:
            _lowering.remove(sibling)
            _lowering_changed.notify_all()


def _quick_prover() -> Any:
    @sys.modules["tvm"].instrument.pass_instrument
    class Quick:
        def run_before_pass(self, _: Any, info: Any) -> None:
            _set_up(_own_prover if info.name == PLACES_BARRIERS else QUICK_PROVER)

    return Quick()


def _measurer(shared: dict[str, int]) -> Any:
    """An instrument of passes that fills in the bytes of shared buffers, by name."""

    @sys.modules["tvm"].instrument.pass_instrument
    class Measurer:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name == MAKES_STAGES:
                shared.clear()
                for _, function in module.functions.items():
                    shared.update(_shared_buffers(function))

    return Measurer()


def _set_up(prover: dict[str, str]) -> None:
    for name, value in prover.items():
        z3.set_param(name, value)


@contextlib.contextmanager
def _plain_language(builder: Any) -> Iterator[None]:
    # Its own, and those that it takes parts of a kernel from.
    builders = sys.modules[builder.__module__]
    prefix = f"{kernels.__name__}."
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith(prefix) and hasattr(module, "T")
    ]
    language = builders.T

    class Language:
        def __getattr__(self, name: str) -> Any:
            return getattr(language, name)

        def Pipelined(self, *range_: Any, num_stages: int = 0) -> Any:  # noqa: N802
            return language.Pipelined(*range_, num_stages=min(num_stages, SIBLING_STAGES))

        def tma_copy(self, source: Any, destination: Any) -> Any:
            return language.copy(source, destination)

        def tma_store_wait(self, *_: Any) -> Any:
            return language.evaluate(0)

        def warpgroup_fence_operand(self, *_: Any, **options: Any) -> Any:
            return language.evaluate(0)

    plain = Language()
    for module in modules:
        module.T = plain
    try:
        yield
    finally:
        for module in modules:
            module.T = language


def _describe(name: str, func: Any, artifact: Any, shared: dict[str, int]) -> dict[str, Any]:
    """The fields of Lowered that a lowering gives; their strings may still be TVM's own."""
    inputs: list[tuple[str, str, list[str] | None]] = []
    for param in func.params:
        if param in func.buffer_map:
            buffer = func.buffer_map[param]
            shape = [str(size) for size in buffer.shape]
            inputs.append((str(buffer.name), str(buffer.dtype), shape))
        else:
            inputs.append((str(param.name), str(param.dtype), None))
    ((symbol, device),) = ((v.name_hint, f) for v, f in artifact.device_mod.functions.items())
    extents = {str(tag): str(size) for tag, size in device.attrs["thread_extent"].items()}
    host = artifact.host_mod.script()
    # The host unpacks its arguments by index, then makes one call; both are in its text.
    unpacked = re.findall(r"(\w+): T\.[^=]* = .*?T\.tvm_struct_get\(args, (\d+), 15,", host)
    values = {value: int(index) for value, index in unpacked if not value.endswith("_handle")}
    data = r"(\w+): T\.handle\(.*?\) = T\.tvm_struct_get\((\w+)_handle, 0, 1,"
    names = [name for name, _, _ in inputs]
    values |= {value: names.index(of) for value, of in re.findall(data, host)}
    call = re.search(rf'T\.call_packed\("{symbol}", (.*)\)$', host, re.MULTILINE)
    if call is None:
        raise ValueError(f"{name}: found no launch in TileLang's host code")
    return {
        "source": artifact.kernel_source,
        "inputs": inputs,
        "values": values,
        "arguments": _split(call[1])[: len(device.params)],
        "extents": extents,
        "cluster": _cluster(device),
        "shared_bytes": int(device.attrs.get("dyn_shared_memory_buf", 0)),
        "shared": shared,
    }


def _cluster(device: Any) -> int:
    x, *others = map(int, device.attrs.get("cluster_dims", (1,)))
    if any(size != 1 for size in others):
        raise ValueError(f"the emulator has no clusters of {(x, *others)}")
    return x


def _shared_buffers(func: Any) -> dict[str, int]:
    sizes: dict[str, int] = {}

    def visit(node: Any) -> None:
        for buffer in getattr(node, "alloc_buffers", None) or ():
            if buffer.scope().startswith("shared"):
                bits = tilelang_bits(str(buffer.dtype))
                elements = 1
                for size in buffer.shape:
                    elements *= int(size)
                size = elements * bits // 8
                if sizes.setdefault(str(buffer.name), size) != size:
                    raise ValueError(f"two shared buffers are called {buffer.name}")

    sys.modules["tvm"].tirx.stmt_functor.post_order_visit(func.body, visit)
    return sizes


def tilelang_bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]
