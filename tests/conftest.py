"""What every test gets: a seed of its own, NaN in unwritten memory, float32 that is float32."""

import os
import zlib
from pathlib import Path

# Deterministic mode wants this before cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import summary

TESTS = Path(__file__).parent
MUTANTS = "test_mutants.py"
# Or "all": see scripts/check.sh.
CHECKS = os.environ.get("TILE_MHC_CHECKS", "usual")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: in tests/parity, needs no CUDA device")
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic.*:UserWarning")


def _folder(path):
    return path.relative_to(TESTS).parts[0] if TESTS in path.parents else ""


# After that of the emulator, which marks some by their sizes.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    # Several workers end together where what takes longest has come first.
    items.sort(key=lambda item: (_folder(item.path) != "emulator", item.path.name != MUTANTS))
    if CHECKS != "all":
        later = pytest.mark.skip(reason="scheduled: scripts/check.sh --all")
        for item in items:
            if item.get_closest_marker("scheduled"):
                item.add_marker(later)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        folder = _folder(item.path)
        if folder == "gpu" or (folder == "parity" and not item.get_closest_marker("cpu")):
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file at a time, so that its fixtures are set up once, but of the emulator a test.

    What uses a GPU stays in one process, as its memory and its time are measured there.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            folder = _folder(config.rootpath / nodeid.split("::")[0])
            if folder == "emulator" and MUTANTS not in nodeid:
                return nodeid
            if torch.cuda.is_available() and folder in ("gpu", "parity"):
                return "gpu"
            return nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    summary.take_over(node.config, getattr(node, "workeroutput", None) or {})


def pytest_terminal_summary(terminalreporter, config):
    for text in summary.of(config):
        for line in text.split("\n"):
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """torch.empty and new_empty give NaN: an element that no kernel writes cannot pass.

    torch fills them in deterministic mode; warn_only forbids nothing.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.zeros(1, device=device).new_empty(8).isnan().all():
        raise RuntimeError("this torch does not fill new_empty: the tests would miss holes")
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
