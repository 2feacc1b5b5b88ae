"""Compile on all cores before the first test; one by one, that takes most of a run."""

import os
import warnings

import pytest
import torch

from gpu_kernels import kernels_of
from tile_mhc import jit

# A few tests compile what they need on their way.
WORTHWHILE = 20


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(request):
    items = [item for item in request.session.items if item.path.parent.name == "gpu"]
    if not torch.cuda.is_available() or not jit.building_allowed() or len(items) < WORTHWHILE:
        return
    arch = jit.device_arch(torch.cuda.current_device())
    # The tests that need one that fails will fail, and only they.
    problems = jit.fill_cache(
        kernels_of({item.path.stem.removeprefix("test_") for item in items}, arch),
        arch,
        os.cpu_count() or 1,
    )
    for problem in problems:
        warnings.warn(problem, stacklevel=1)
