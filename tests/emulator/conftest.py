"""Build the kernels of the collected tests on all cores before the first of them."""

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import summary
from cases import Case
from emulator import launch, lowering
from emulator.suite import PAIRS, VARIED, WIDE, WIDE_OPS
from tile_mhc import specs
from tile_mhc.kernels._arch import DEFAULT

HERE = Path(__file__).parent


def _missing():
    if platform.machine() != "x86_64":
        return "the emulator switches x86-64 stacks"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    info = Path("/proc/cpuinfo")
    if info.exists() and " fma " not in info.read_text():
        return "the emulator needs a CPU with fused multiply-add"
    return None


def pytest_collection_modifyitems(items):
    reason = _missing()
    for item in items:
        if item.path.parent != HERE:
            continue
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        if _has_other_sizes(item):
            item.add_marker(pytest.mark.scheduled)


def _has_other_sizes(item):
    """Whether it takes builds of its own for sizes at which few tests run."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        pair = (value.num_streams, value.hidden_size) if isinstance(value, Case) else value
        if isinstance(pair, tuple) and pair in PAIRS and pair not in VARIED:
            return True
    return False


@pytest.fixture(scope="session")
def built_kernels():
    """Lowering releases the GIL, and g++ is a process of its own.

    With several workers of pytest-xdist each test builds what it needs: that keeps all cores busy.
    """
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
        return
    kernels = specs.select([specs.Sizes(*pair) for pair in VARIED])
    # At the other pairs no test has many splits.
    others = specs.select([specs.Sizes(*pair) for pair in PAIRS])
    kernels += [kernel for kernel in others if kernel not in kernels and True not in kernel[1]]
    kernels += specs.select([specs.Sizes(*WIDE)], WIDE_OPS)
    # The slowest first: none of them is left alone at the end.
    kernels.sort(key=lambda kernel: not kernel[0].startswith("projection"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda kernel: launch.kernel(kernel[0], *kernel[1]), kernels))


def pytest_sessionfinish(session):
    """Say which kernels ran in another form than the shipped one, and why."""
    launched = [key for key in launch.launched if key[2] == DEFAULT]
    siblings = {key[0] for key in launched if lowering.lower(*key).sibling}
    # The first of a name in the table stands for all, so that workers lower the same ones.
    table = specs.select([specs.Sizes(*VARIED[0])])
    for name in sorted(siblings):
        args = next(args for kernel, args, *_ in [*table, *launched] if kernel == name)
        summary.add(
            session.config,
            f"emulator: {name} ran as its sibling; not emulated: "
            f"{', '.join(lowering.not_emulated(name, args))}",
        )
