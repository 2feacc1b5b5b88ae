"""When a pre is made in one pass, and that what its clusters hold fits an SM."""

import pytest
import torch

from tile_mhc import config, selection
from tile_mhc.kernels._arch import AMPERE, HOPPER
from tile_mhc.kernels._shapes import (
    PRE_COLUMNS,
    PRE_GATES,
    PRE_STAGES,
    pre_cluster,
)

ENOUGH = 1 << 20
HAS_POST = pytest.mark.parametrize("has_post", [False, True], ids=["pre", "post_pre"])
DELAYED = pytest.mark.parametrize("delayed", [False, True], ids=["", "delayed"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(selection._device, "limits", lambda: HOPPER)
    monkeypatch.setattr(selection, "has_clusters_of", lambda _: True)


def reads_once(
    has_post, delayed, *, tokens=ENOUGH, dtype=torch.bfloat16, n=4, hidden=7168, splits=None
):
    return selection.pre_reads_once(dtype, tokens, n, hidden, splits, has_post, delayed)


@HAS_POST
@DELAYED
def test_when(has_post, delayed, monkeypatch):
    assert reads_once(has_post, delayed)
    assert not reads_once(has_post, delayed, tokens=1)
    assert not reads_once(has_post, delayed, dtype=torch.float16)
    assert not reads_once(has_post, delayed, n=2)
    assert not reads_once(has_post, delayed, hidden=1600)
    assert not reads_once(has_post, delayed, splits=1)
    monkeypatch.setattr(selection, "has_clusters_of", lambda size: size <= 8)
    assert reads_once(has_post, delayed, hidden=2560) == (not delayed)
    assert reads_once(has_post, delayed, hidden=1280) == (not has_post and not delayed)
    assert not reads_once(has_post, delayed)


@HAS_POST
@DELAYED
def test_all_numbers_of_tokens_are_alike_in_the_batch_invariant_mode(has_post, delayed):
    config.set_batch_invariant(True)
    try:
        assert not reads_once(has_post, delayed)
    finally:
        config.set_batch_invariant(False)


@HAS_POST
@DELAYED
def test_clusters_fit_an_sm(has_post, delayed):
    """Shared memory, registers, and groups enough: some that come, some whose gates do."""
    for hidden in range(64, 16385, 64):
        cut = pre_cluster(4, hidden, has_post, delayed, HOPPER)
        if cut.size == 0:
            continue
        assert cut.size in (4, 8, 16)
        assert cut.warps * cut.blocks * PRE_COLUMNS * cut.size == hidden
        assert cut.lag + 2 <= cut.stages <= PRE_STAGES
        # Sums of a group are read before the buffer, or the slot, comes round again, and gates; a
        # CTA's next group for Sinkhorn comes after the one before it has been read.
        assert (cut.lag == 0) == cut.delayed == delayed
        assert cut.lag <= cut.buffers <= PRE_GATES
        assert 2 * cut.lag <= cut.slots
        assert cut.lag <= cut.size * cut.solvers
        # Whole groups of four warps, with what is launched of registers; those that multiply have
        # their operands and others.
        assert cut.warps + 3 + cut.solvers <= 4 * cut.groups
        registers, last = cut.registers
        launched = 65536 // (128 * cut.groups) // 8 * 8
        assert registers * (cut.groups - 1) + last <= launched * cut.groups
        assert cut.kept * 4 + 56 <= registers <= 240
        assert last >= 72
        assert cut.kept <= cut.operands
        rows = cut.stages * 4 + (cut.stages - cut.lag) * has_post
        ring = rows * cut.warps * cut.blocks * 32 * 16
        assert ring + cut.bytes_beside(has_post) <= HOPPER.shared_bytes
    assert pre_cluster(2, 1024, has_post, delayed, HOPPER).size == 0
    assert pre_cluster(4, 1024, has_post, delayed, AMPERE).size == 0
