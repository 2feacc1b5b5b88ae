"""The resources of many kernels at once, with nothing linked, loaded or cached.

Reading TileLang's and CUTLASS's headers is nine tenths of nvcc's time for a kernel, so that many of
them are one file, and what ptxas prints says which takes what. As one file a kernel they take the
same.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tile_mhc import jit, specs
from tile_mhc.cli import _resources
from tile_mhc.cli._resources import Resources

Kernel = tuple[str, specs.Arguments, str]
Measured = Resources | str  # or why there are none

# Kernels per file: with more, cores would be idle at the end.
TOGETHER = 16

_ENTRY = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')
_REPORT = re.compile(
    r"Function properties for (\w+)\n"
    r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*Used (\d+) registers(.*)"
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class _Source:
    kernel: Kernel
    text: str
    dynamic_shared_memory: int

    def named(self, index: int) -> tuple[str, str]:
        """A name that no other kernel of a file has, and the source with it."""
        found = _ENTRY.search(self.text)
        if found is None:
            raise jit.CompileError(f"{self.kernel[0]}: found no kernel in its source")
        name = f"{found[1]}_{index}"
        return name, re.sub(rf"\b{found[1]}\b", name, self.text)


def measure(kernels: list[Kernel], jobs: int) -> Iterator[tuple[Kernel, Measured]]:
    """Each kernel with its resources, or with what went wrong, as it is known."""
    with ThreadPoolExecutor(jobs) as pool:
        sources: dict[tuple[str, tuple[str, ...]], list[_Source]] = {}
        for kernel, source in zip(kernels, pool.map(_lower, kernels), strict=True):
            if isinstance(source, str):
                yield kernel, source
                continue
            name, args, arch = kernel
            flags = tuple(_resources.nvcc_flags(name, args))
            sources.setdefault((arch, flags), []).append(source)
        compiled: list[Future[dict[Kernel, Measured]]] = []
        for (arch, flags), alike in sources.items():
            for start in range(0, len(alike), TOGETHER):
                file = alike[start : start + TOGETHER]
                compiled.append(pool.submit(_compile, file, arch, flags))
        yield from itertools.chain.from_iterable(found.result().items() for found in compiled)


def _lower(kernel: Kernel) -> _Source | str:
    try:
        artifact = _resources.lower(*kernel)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return _Source(kernel, str(artifact.kernel_source), _resources.dynamic_shared_memory(artifact))


def _compile(sources: list[_Source], arch: str, flags: tuple[str, ...]) -> dict[Kernel, Measured]:
    names, texts = zip(*(source.named(i) for i, source in enumerate(sources)), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cu")
        file.write_text("\n".join(texts))
        command = _resources.nvcc_command(file, Path(folder, "kernels.cubin"), arch, flags)
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode and len(sources) > 1:
        # One of them is at fault, and the others have resources.
        return {k: m for source in sources for k, m in _compile([source], arch, flags).items()}
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if "error" in line] or [run.stderr]
        return {sources[0].kernel: f"nvcc: {lines[0].strip()}"}
    reports = {report[1]: report for report in _REPORT.finditer(run.stderr)}
    return {
        source.kernel: _resources_of(source, reports.get(name))
        for name, source in zip(names, sources, strict=True)
    }


def _resources_of(source: _Source, report: re.Match[str] | None) -> Measured:
    if report is None:
        return "ptxas says nothing of it"
    shared = _SHARED.search(report[6])
    # Unlike the sections of a cubin, without what the driver keeps of it.
    static = int(shared[1]) if shared else 0
    return Resources(
        registers=int(report[5]),
        shared_memory=static + source.dynamic_shared_memory,
        stack=int(report[2]),
        spill_stores=int(report[3]),
        spill_loads=int(report[4]),
    )
