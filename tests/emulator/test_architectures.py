"""What is generated for other architectures than Hopper, forward and backward.

Before Hopper there is no TMA, so what runs is what ships: cp.async, pipelines of their full depth
and mma.sync. By default one op stands for all, whose kernels differ most from Hopper's.
"""

import re

import pytest

import oracle
from cases import DELAYED_PRE, POST_PRE_DELAYED, PROJECTION, Case
from emulator import launch
from emulator.ops import emulated
from emulator.suite import run_everything, some
from tile_mhc import specs

SEED = 1
# With eight streams sm_86 has tiles of its own; sm_120a's run as siblings.
SIZES = {
    ("sm_80", (4, 192)): "",
    ("sm_80", (2, 64)): "",
    ("sm_80", (8, 128)): "",
    ("sm_86", (4, 192)): "",
    ("sm_86", (8, 128)): "",
    ("sm_120a", (4, 192)): "",
}


# The kernel of each whose pipeline is looked at.
MATMULS = {
    PROJECTION.name: "projection_bwd",
    DELAYED_PRE.name: "delayed_pre_bwd",
    POST_PRE_DELAYED.name: "post_pre_bwd",
}


@pytest.mark.parametrize(
    "op",
    [
        PROJECTION,
        pytest.param(DELAYED_PRE, marks=pytest.mark.scheduled),
        pytest.param(POST_PRE_DELAYED, marks=pytest.mark.scheduled),
    ],
    ids=str,
)
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
    (source,) = {lowered.source for lowered in ran if lowered.name == MATMULS[op.name]}
    # Several copies are in flight, and then fewer and fewer.
    waits = set(map(int, re.findall(r"cp_async_wait<(\d+)>", source)))
    assert min(waits) == 0
    assert len(waits) > 2


@pytest.mark.scheduled
@pytest.mark.parametrize(("arch", "pair"), some(SIZES), ids=str)
def test_every_kernel_runs(arch, pair):
    """What the ops launch is the table, no less and no more."""
    ran = set()
    with (
        emulated(seed=SEED, arch=arch),
        launch.settings(watch=lambda kernel, given: ran.add(kernel.key)),
    ):
        run_everything(Case(130, *pair, "several slices"))
    assert ran == set(specs.select([specs.Sizes(*pair)], arch=arch))
