"""What is generated for other architectures than Hopper, forward and backward.

Before Hopper there is no TMA, so what runs is what ships: cp.async, pipelines of their full depth
and mma.sync. By default two ops stand for all: those whose kernels differ most from Hopper's. With
TILE_MHC_EMULATOR=full every kernel of the table runs.
"""

import pytest

import oracle
from cases import DELAYED_PRE, PROJECTION, Case
from emulator import launch
from emulator.ops import emulated
from emulator.suite import FULL, PAIRS, run_everything
from tile_mhc import specs
from tile_mhc.kernels._arch import ARCHITECTURES

SEED = 1
# With eight streams sm_86 has tiles of its own; sm_120a's run as siblings.
EVERYWHERE = [
    *(("sm_80", pair) for pair in PAIRS),
    *(("sm_86", pair) for pair in PAIRS[1:]),
    ("sm_120a", PAIRS[1]),
]


@pytest.mark.parametrize("op", [PROJECTION, DELAYED_PRE], ids=str)
def test_op(op):
    """One CTA has all the work, so that pipelines run full, and end as they should."""
    case = Case(130, 4, 192, "a block and a pair")
    ran = []
    with (
        emulated(seed=SEED, num_sms=1, arch="sm_80"),
        launch.settings(watch=lambda kernel, given: ran.append(kernel.lowered)),
    ):
        oracle.check(op, case, *op.inputs(*case.shape, "cpu"))
    assert not any(lowered.sibling or "cudaGrid" in lowered.source for lowered in ran)
    matmul = "projection_bwd" if op is PROJECTION else "delayed_pre_bwd"
    (source,) = {lowered.source for lowered in ran if lowered.name == matmul}
    # Several copies in flight, and then one less with each tile.
    assert all(f"cp_async_wait<{count}>" in source for count in (0, 1, 2))


@pytest.mark.skipif(not FULL, reason="TILE_MHC_EMULATOR=full builds every kernel")
@pytest.mark.parametrize(("arch", "pair"), EVERYWHERE, ids=str)
def test_every_kernel_runs(arch, pair):
    """What the ops launch is the table, no less and no more."""
    ran = set()
    with (
        emulated(seed=SEED, arch=arch),
        launch.settings(watch=lambda kernel, given: ran.add(kernel.key)),
    ):
        run_everything(Case(130, *pair, "several slices"))
    assert ran == set(specs.select([specs.Sizes(*pair)], arch=arch))


def test_only_hopper_and_later_have_siblings():
    assert [arch for arch, limits in ARCHITECTURES.items() if limits.has_tma] == [
        "sm_90a",
        "sm_100a",
        "sm_103a",
        "sm_120a",
    ]
