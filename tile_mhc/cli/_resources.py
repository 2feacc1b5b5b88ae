"""What a compiled kernel takes of an SM: registers, shared memory, spills. No GPU needed.

Registers, static shared memory and the stack come from the very cubin that will be loaded; dynamic
shared memory is an attribute of the lowered kernel. A kernel without a stack cannot spill; for one
with a stack, ptxas is asked, since the cubin does not tell spills from local arrays.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tile_mhc import jit, specs
from tile_mhc.cli._stale import check_source

CACHE_NAME = "tile_mhc_resources.json"
LIBRARY_NAME = "executable.so"
SOURCE_NAME = "device_kernel.cu"

ELF_MAGIC = b"\x7fELF"
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
EM_CUDA = 190
# Attributes in a cubin's .nv.info section: (format, attribute) of a sized record.
SIZED = 4
REGISTER_COUNT = 0x2F
FRAME_SIZE = 0x11
# From Hopper on the driver keeps this much of each CTA's shared memory, and ptxas counts it in.
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Resources:
    """Bytes, but for `registers`, which counts them per thread. None: could not be found out."""

    registers: int
    shared_memory: int
    stack: int
    spill_stores: int | None
    spill_loads: int | None


def measure(compiled: jit.Compiled) -> Resources:
    """The resources of a kernel; kept beside it in the cache."""
    record = compiled.path / CACHE_NAME
    try:
        return Resources(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    image = (compiled.path / LIBRARY_NAME).read_bytes()
    usages = [_usage(cubin, compiled.arch) for cubin in _cubins(image)]
    if not usages:
        raise jit.CompileError(f"{compiled.path / LIBRARY_NAME}: holds no cubin")
    registers = max(usage[0] for usage in usages)
    stack = max(usage[1] for usage in usages)
    spills: tuple[int | None, int | None] = (0, 0)
    if stack:
        spills = _spills(compiled, registers)
    artifact = compiled.source.artifact
    if artifact is None:
        # Loaded from a cache that was not filled by `tile-mhc compile`: lower it again, no nvcc.
        artifact = lower(compiled.name, compiled.args, compiled.arch)
    resources = Resources(
        registers=registers,
        shared_memory=max(usage[2] for usage in usages) + dynamic_shared_memory(artifact),
        stack=stack,
        spill_stores=spills[0],
        spill_loads=spills[1],
    )
    # Only a record for next time: a cache that cannot be written is no error.
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=compiled.path)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(resources), file)
        os.replace(temporary, record)
    return resources


def _cubins(image: bytes) -> Iterator[bytes]:
    """The device binaries embedded in a host library."""
    at = image.find(ELF_MAGIC)
    while at >= 0:
        header = image[at : at + ELF_HEADER.size]
        if len(header) == ELF_HEADER.size and ELF_HEADER.unpack(header)[2] == EM_CUDA:
            yield image[at:]
        at = image.find(ELF_MAGIC, at + 1)


def _usage(cubin: bytes, arch: str) -> tuple[int, int, int]:
    """(registers, stack, static shared memory): the largest of the kernels in a cubin."""
    header = ELF_HEADER.unpack_from(cubin)
    start, count, names_index = header[6], header[12], header[13]
    sections = [
        SECTION_HEADER.unpack_from(cubin, start + i * SECTION_HEADER.size) for i in range(count)
    ]
    names = sections[names_index][4]
    registers = stack = shared = 0
    for section in sections:
        begin = names + section[0]
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        offset, size = section[4], section[5]
        if name == ".nv.info":
            for attribute, value in _attributes(cubin[offset : offset + size]):
                if attribute == REGISTER_COUNT:
                    registers = max(registers, value)
                elif attribute == FRAME_SIZE:
                    stack = max(stack, value)
        elif name.startswith(".nv.shared.") and not name.startswith(".nv.shared.reserved"):
            reserved = RESERVED_SHARED if _generation(arch) >= 90 else 0
            shared = max(shared, size - reserved)
    return registers, stack, shared


def _attributes(info: bytes) -> Iterator[tuple[int, int]]:
    """(attribute, value) of the records that give a function a number."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == SIZED:
            if size == 8:
                yield attribute, struct.unpack_from("<II", info, at)[1]
            at += size


def _generation(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def lower(name: str, args: specs.Arguments, arch: str) -> Any:
    """TileLang's artifact of a kernel, with its CUDA source; no nvcc."""
    tilelang = jit.import_tilelang()
    func = jit.trace(specs.builder(name), args, arch)
    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": arch})
    configs = specs.pass_configs(name, args)
    with tilelang.tvm.transform.PassContext(opt_level=3, config=configs), target:
        artifact = jit.undisturbed(lambda: tilelang.lower(func, target=target))
    check_source(str(artifact.kernel_source))
    return artifact


def dynamic_shared_memory(artifact: Any) -> int:
    sizes = [
        int(function.attrs["dyn_shared_memory_buf"])
        for _, function in artifact.device_mod.functions.items()
        if function.attrs and "dyn_shared_memory_buf" in function.attrs
    ]
    return max(sizes, default=0)


def nvcc_flags(name: str, args: specs.Arguments) -> list[str]:
    """What TileLang adds to nvcc's command line for a kernel."""
    configs = specs.pass_configs(name, args)
    flags = configs.get("tl.device_compile_flags") or []
    flags = shlex.split(flags if isinstance(flags, str) else " ".join(map(str, flags)))
    if configs.get("tl.enable_fast_math"):
        flags.append("--use_fast_math")
    if (level := configs.get("tl.ptxas_register_usage_level")) is not None:
        flags.append(f"--ptxas-options=--register-usage-level={int(level)}")
    return flags


def nvcc_command(source: Path, cubin: Path, arch: str, flags: Sequence[str]) -> list[str]:
    """Compile as TileLang does, with what ptxas says of each kernel on stderr."""
    nvcc = jit.find_nvcc()
    if nvcc is None:
        raise jit.CompileError("measuring needs nvcc, and none was found")
    env = importlib.import_module("tilelang.env")
    return [
        str(nvcc), "--cubin", "-O3", "-lineinfo", "-w", f"-arch={arch}", "-std=c++20",
        f"-I{env.TILELANG_TEMPLATE_PATH}", f"-I{env.CUTLASS_INCLUDE_DIR}", *flags,
        "--ptxas-options=-v", "-o", str(cubin), str(source),
    ]  # fmt: skip


def _spills(compiled: jit.Compiled, registers: int) -> tuple[int | None, int | None]:
    """(stores, loads) that ptxas reports when the kernel's source is compiled as TileLang did."""
    source = compiled.path / SOURCE_NAME
    if jit.find_nvcc() is None or not source.exists():
        return None, None
    flags = nvcc_flags(compiled.name, compiled.args)
    with tempfile.TemporaryDirectory() as folder:
        command = nvcc_command(source, Path(folder, "kernel.cubin"), compiled.arch, flags)
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    used = [int(count) for count in re.findall(r"Used (\d+) registers", run.stderr)]
    # Another register count means that this was not the same compilation.
    if run.returncode or not found or max(used, default=-1) != registers:
        return None, None
    return sum(int(stores) for stores, _ in found), sum(int(loads) for _, loads in found)
