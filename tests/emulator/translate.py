"""CUDA source as TileLang writes it -> C++ for `device.h`, line for line.

The generated code is regular, so a few patterns suffice: pointers to global and shared memory
become checked addresses, and each statement says which line it is. Everything else is C++ already.
"""

import re

from emulator.lowering import Lowered

_SIGNATURE = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\((.*)\) \{'
)
_PROTOTYPE = re.compile(r'extern "C" __global__ void .*\);')
_POINTER = re.compile(r"(?:const )?(\w+)\s*\*\s*(?:__restrict__ )?(\w+)")
_SHARED = re.compile(r"(?:extern )?__shared__ __align__\(\d+\) (\w+) (\w+)\[(\d*)\];")
_PART = re.compile(r"void\* (\w+) = \(\(void\*\)\(\(char\*\)(\w+) \+ (\d+)\)\);")
_MBARRIERS = re.compile(r"auto (\w+) = reinterpret_cast<Barrier\*>\((\w+)\);")
# `*(float4*)(`, but not the `*(void* *)(` that reads an address from a register.
_ACCESS = re.compile(r"\*\((\w+) ?\*\)\(")
_CAST = re.compile(r"\(\((\w+)\*\)(\w+)\)")
_STATEMENT = re.compile(r"^(\s*)(?=[\w*(][^{}]*;$|if \(|for \()")


def translate(lowered: Lowered) -> str:
    """One C++ file that defines `emu_run`."""
    lines = lowered.source.split("\n")
    (at,) = (i for i, line in enumerate(lines) if _SIGNATURE.match(line))
    if len(_MBARRIERS.findall(lowered.source)) > 1:
        raise ValueError(f"{lowered.name}: the emulator has one array of mbarriers")
    signature = _SIGNATURE.match(lines[at])
    body = ["" if line.startswith("#") or _PROTOTYPE.match(line) else line for line in lines]
    body[:at] = [""] * at
    unpacked = _parameters(signature[2])
    body[at] = f"static void body(void **arguments) {{ {unpacked}"
    for i in range(at + 1, len(body)):
        body[i] = _line(body[i], i + 1, lowered)
    dependent = bool(re.search("cudaGridDependencySynchronize|after_previous", lowered.source))
    entry = _ENTRY.replace("DEPENDENT", str(dependent).lower())
    return "\n".join(['#include "device.h"', '#line 1 "kernel.cu"', *body, entry])


def _parameters(text: str) -> str:
    """Declarations of the kernel's parameters; tensors are numbered among themselves."""
    unpacked, tensors = [], 0
    for index, parameter in enumerate(text.split(", ")):
        pointer = _POINTER.fullmatch(parameter.strip())
        if pointer:
            unpacked.append(f"auto {pointer[2]} = emu::global<{pointer[1]}>({tensors});")
            tensors += 1
        else:
            kind, name = parameter.strip().rsplit(" ", 1)
            unpacked.append(f"{kind} {name} = *({kind} *)arguments[{index}];")
    return " ".join(unpacked)


def _line(line: str, number: int, lowered: Lowered) -> str:
    if line.lstrip().startswith("#"):
        return ""
    mbarriers = _MBARRIERS.search(line)
    if mbarriers:
        return f"auto {mbarriers[1]} = emu::mbarriers({mbarriers[2]});"
    shared = _SHARED.search(line)
    if shared:
        kind, name, count = shared.groups()
        size = f"{count} * sizeof({kind})" if count else str(lowered.shared_bytes)
        if name == "buf_dyn_shmem":
            return ""
        if f"reinterpret_cast<Barrier*>({name})" in lowered.source:
            return f"const int {name} = {count};"
        return f'auto {name} = emu::shared<{kind}>("{name}", 0, {size});'
    part = _PART.search(line)
    if part:
        name, _, offset = part.groups()
        size = lowered.shared.get(name, lowered.shared_bytes - int(offset))
        return f'auto {name} = emu::shared<char>("{name}", {offset}, {size});'
    line = _ACCESS.sub(lambda m: m[0] if m[1] == "void" else f"emu::as<{m[1]}>(", line)
    line = _CAST.sub(r"emu::cast<\1>(\2)", line)
    return _STATEMENT.sub(rf"\1emu::state.line = {number}; ", line)


_ENTRY = """
extern "C" __attribute__((visibility("default")))
int emu_run(const emu::Tensor *tensors, int num_tensors, void **arguments, const int32_t *grid,
            int block, int cluster, int64_t shared_bytes, uint64_t seed, int seconds,
            char *message, int message_bytes) {
  emu::state.dependent = DEPENDENT;
  return emu::launch(body, tensors, num_tensors, arguments, grid, block, cluster, shared_bytes,
                     seed, seconds, message, message_bytes);
}
"""
