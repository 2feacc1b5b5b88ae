"""All of a pre in one pass on the emulator, with the post before it and without.

As for the readout, barriers are placed by hand, here mbarriers that some warps wait for: that the
emulator sees no race in any order of threads, with one CTA of a cluster ahead of the others or
behind, is what holds them.
"""

import dataclasses
import re

import pytest
import torch

import oracle
import whole_pre
from cases import DELAYED_PRE, FUSED_PRE, POST_PRE, POST_PRE_DELAYED
from emulator import launch
from emulator.launch import FaultError, Kernel
from emulator.ops import emulated
from emulator.suite import PLAIN, some
from tile_mhc.kernels._arch import HOPPER
from tile_mhc.kernels._shapes import pre_cluster
from whole_pre import KERNEL, OPTIONS, of_op

SEED = 1
OPS = pytest.mark.parametrize("op", whole_pre.OPS, ids=str)
HIDDEN = pytest.mark.parametrize("hidden", some(whole_pre.SIZES, 1))


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED), whole_pre.always():
        yield


@OPS
@pytest.mark.parametrize("hidden", whole_pre.SIZES)
def test_sizes_of_clusters(op, hidden):
    assert pre_cluster(4, hidden, *of_op(op), HOPPER).size == whole_pre.SIZES[hidden]


@OPS
@pytest.mark.parametrize(("n", "hidden"), whole_pre.NONE, ids=str)
def test_widths_without_a_kernel(op, n, hidden):
    assert not pre_cluster(n, hidden, *of_op(op), HOPPER).size


@OPS
@pytest.mark.parametrize("norm", [True, PLAIN], ids=["norm_weight", "plain"])
@HIDDEN
def test_tokens(op, hidden, norm):
    """A part of a group, a whole one and one more."""
    ran = set()
    with launch.settings(watch=lambda kernel, given: ran.add(kernel.key[0])):
        for num_tokens in (1, 7, 8, 9, 40):
            whole_pre.check(op, hidden, num_tokens, "cpu", norm)
    assert KERNEL in ran


@OPS
@HIDDEN
def test_one_cluster_with_all_the_tokens(op, hidden):
    """Several times around the ring, the slots of sums, and the CTAs with a group for Sinkhorn."""
    with emulated(seed=SEED, num_sms=1):
        whole_pre.check(op, hidden, 101, "cpu", sinkhorn_repeat=1)
        whole_pre.check(op, hidden, 101, "cpu", sinkhorn_repeat=30)


@HIDDEN
def test_bits_of_two_ops(hidden):
    whole_pre.check_two_ops(hidden, 40, "cpu")


@OPS
@HIDDEN
def test_same_bits_in_every_order_of_threads(op, hidden):
    tensors = whole_pre.inputs(op, hidden, 100, "cpu")
    runs = []
    for seed in range(4):
        with emulated(seed=seed, num_sms=1):
            outputs = op.run(**tensors, **OPTIONS)
            runs.append(dict(zip(op.outputs, outputs, strict=True)))
    for run in runs[1:]:
        oracle.check_same_bits(runs[0], run, "in another order:")


@OPS
@HIDDEN
def test_tf32(op, hidden):
    whole_pre.check_tf32(op, hidden, 13, "cpu")


@OPS
@HIDDEN
def test_largest_streams(op, hidden):
    whole_pre.check_largest(op, hidden, "cpu")


@OPS
@HIDDEN
def test_without_eps_of_sinkhorn(op, hidden):
    whole_pre.check(op, hidden, 13, "cpu", sinkhorn_eps=0.0)


@pytest.mark.scheduled
@OPS
@HIDDEN
def test_bfloat16_parameters(op, hidden):
    whole_pre.check_bfloat16(op, hidden, 40, "cpu")


@OPS
@HIDDEN
def test_nonfinite_stays_in_its_token(op, hidden):
    tensors = whole_pre.inputs(op, hidden, 13, "cpu")
    oracle.check_isolation(op, tensors, OPTIONS, "residual")


@OPS
@HIDDEN
def test_a_token_by_itself(op, hidden):
    whole_pre.check_alone(op, hidden, 60, "cpu")


# What is taken out of the sources, and the fault.
RACE = "never written|under way|since the last barrier"
BROKEN = {
    "no wait": (r"full\[[^;]*\.wait\([^;]*;", f"{RACE}|more than the mbarrier counts"),
    "sums for Sinkhorn are not waited for": (r"full\[[^;]*\.wait\(\(turn[^;]*;", RACE),
    "no wait for a copy": (r"tl::cp_async_wait<\d+>\(\);", "that nothing waits for|under way"),
}
OF_GATES = {
    "a CTA's sums are not waited for": (r"full\[[^;]* \+ 16\)\]\.wait\([^;]*;", RACE),
    "gates are not waited for": (r"full\[[^;]* \+ 12\)\]\.wait\([^;]*;", RACE),
    "nobody says that they were read": (r"full\[\(+int\)[^;]*\.arrive\(\);", "never will"),
    "a buffer may still be read": (r"__syncwarp\(\);(?=\s*if \(\(\d+ <= step_)", RACE),
}
# With a given pre_mix.
OF_CREDITS = {
    "a CTA's sums are not waited for": (r"full\[[^;]* \+ 14\)\]\.wait\([^;]*;", RACE),
    "a buffer may still be read": (r"full\[[^;]* \+ 10\)\]\.wait\([^;]*;", RACE),
    "sums for Sinkhorn may still be read": (
        r"full\[[^;]* \+ 2\)\]\.wait\([^;]*;",
        f"{RACE}|no wait between",
    ),
    "nobody says that they were read": (
        r"push_vector\(\(&\(\(\(float\*\)credits[^;]*;",
        "never will",
    ),
}
FAULTS = [
    *((op, what) for op in whole_pre.OPS for what in BROKEN),
    *((op, what) for op in (FUSED_PRE, POST_PRE) for what in OF_GATES),
    *((op, what) for op in (DELAYED_PRE, POST_PRE_DELAYED) for what in OF_CREDITS),
]


@pytest.fixture(scope="module")
def launches():
    """A launch by each op: the kernel and its arguments."""
    found = {}
    with emulated(num_sms=1), whole_pre.always():
        for op in whole_pre.OPS:

            def watch(kernel, given, name=op.name):
                copies = [g.clone() if torch.is_tensor(g) else g for g in given]
                if kernel.key[0] == KERNEL:
                    found[name] = kernel, copies

            with launch.settings(watch=watch):
                op.run(**whole_pre.inputs(op, 256, 150, "cpu", norm=False), sinkhorn_repeat=30)
    return found


@pytest.mark.parametrize(("op", "what"), FAULTS, ids=str)
def test_faults_within_a_cluster(launches, op, what):
    """In some order of threads: most of them hide that a CTA may be ahead."""
    kernel, given = launches[op.name]
    faults = OF_CREDITS if whole_pre.of_op(op)[1] else OF_GATES
    pattern, message = (BROKEN | faults)[what]
    source, count = re.subn(pattern, "", kernel.lowered.source)
    assert count, f"the kernel has no {pattern!r} any more: choose another place to break"
    broken = Kernel(dataclasses.replace(kernel.lowered, source=source))

    def run():
        for seed in range(12):
            with launch.settings(seed=seed):
                broken(*[g.clone() if torch.is_tensor(g) else g for g in given])

    with pytest.raises(FaultError, match=message):
        run()
