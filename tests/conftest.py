"""What every test gets: a seed of its own, NaN in unwritten memory, float32 that is float32."""

import os
import zlib
from pathlib import Path

# Deterministic mode wants this before cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

TESTS = Path(__file__).parent


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: in tests/parity, needs no CUDA device")
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic.*:UserWarning")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if TESTS in item.path.parents else ""
        if folder == "gpu" or (folder == "parity" and not item.get_closest_marker("cpu")):
            item.add_marker(skip)


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
