"""When a pre is made in one pass, and that what its clusters hold fits an SM."""

import pytest
import torch

from tile_mhc import config, selection
from tile_mhc.kernels._arch import AMPERE, HOPPER
from tile_mhc.kernels._shapes import (
    CLUSTER_SLOTS,
    CLUSTER_STAGES,
    CLUSTER_TOKENS,
    PRE_COLUMNS,
    PRE_MIXES,
    PRE_OPERANDS,
    PRE_SHARED,
    PRE_WARPS,
    pre_cluster,
)

ENOUGH = 1 << 20
HAS_POST = pytest.mark.parametrize("has_post", [False, True], ids=["pre", "post_pre"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(selection._device, "limits", lambda: HOPPER)
    monkeypatch.setattr(selection, "has_clusters_of", lambda _: True)


def reads_once(has_post, *, tokens=ENOUGH, dtype=torch.bfloat16, n=4, hidden=5120, splits=None):
    return selection.pre_reads_once(dtype, tokens, n, hidden, splits, has_post)


@HAS_POST
def test_when(has_post, monkeypatch):
    assert reads_once(has_post)
    assert not reads_once(has_post, tokens=1)
    assert not reads_once(has_post, dtype=torch.float16)
    assert not reads_once(has_post, n=2)
    assert not reads_once(has_post, hidden=1600)
    assert not reads_once(has_post, splits=1)
    monkeypatch.setattr(selection, "has_clusters_of", lambda size: size <= 8)
    assert reads_once(has_post, hidden=2560)
    assert reads_once(has_post, hidden=1280) == (not has_post)
    assert not reads_once(has_post, hidden=7168)


@HAS_POST
def test_all_numbers_of_tokens_are_alike_in_the_batch_invariant_mode(has_post):
    config.set_batch_invariant(True)
    try:
        assert not reads_once(has_post)
    finally:
        config.set_batch_invariant(False)


@HAS_POST
def test_clusters_fit_an_sm(has_post):
    """Shared memory, registers, and groups enough: some that come, some whose gates do."""
    for hidden in range(64, 16385, 64):
        size, lag, stages, kept = pre_cluster(4, hidden, has_post, HOPPER)
        if size == 0:
            continue
        assert size in (4, 8, 16)
        warps = hidden // size // PRE_COLUMNS
        assert warps * PRE_COLUMNS * size == hidden
        assert warps <= PRE_WARPS
        assert lag + 2 <= stages <= CLUSTER_STAGES
        # A slot of sums is read 2 * lag steps before it comes round again; a CTA's next group for
        # Sinkhorn comes after the one before it has been read.
        assert 2 * lag <= CLUSTER_SLOTS
        assert lag < size
        operand = 2 * 4 * 32 * 16
        registers = kept * 32 + 40
        assert registers <= HOPPER.registers // (32 * -(-(warps + 2) // 4) * 4)
        sums = CLUSTER_TOKENS * (PRE_MIXES + 1)
        floats = 2 * warps * sums + size * (CLUSTER_SLOTS * PRE_SHARED + sums)
        ring = stages * warps * (4 + has_post) * 32 * 16
        low = (PRE_OPERANDS - kept) * warps * operand
        assert ring + low + 4 * floats < HOPPER.shared_bytes
    assert pre_cluster(2, 1024, has_post, HOPPER)[0] == 0
    assert pre_cluster(4, 1024, has_post, AMPERE)[0] == 0
