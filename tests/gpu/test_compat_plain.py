"""TileKernels 2.1.0's plain functions on the kernels: every test of the CPU."""

import pytest

from cpu.test_compat_plain import *  # noqa: F403


@pytest.fixture
def device() -> str:
    return "cuda"
