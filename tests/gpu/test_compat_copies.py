"""Rearranged streams and strided gradients on the kernels: every test of the CPU."""

import pytest

from cpu.test_compat_copies import *  # noqa: F403


@pytest.fixture
def device() -> str:
    return "cuda"
