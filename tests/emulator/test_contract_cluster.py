"""The readout in one pass on the emulator: by default in clusters of one and two, with all in any.

Its barriers are placed by hand: that the emulator sees no race in any order of threads, with one
CTA of a cluster ahead of the others or behind, is what holds them.
"""

import dataclasses
import re

import pytest
import torch

import oracle
import readout
from cases import CONTRACT, PARAMETERS, Case, Dtypes
from emulator import launch
from emulator.launch import FaultError, Kernel
from emulator.ops import emulated
from emulator.suite import PLAIN, some
from tile_mhc import contract, reference
from tile_mhc.kernels._arch import HOPPER
from tile_mhc.kernels._shapes import cluster_size

SEED = 1
# CTAs a token. The ring of (4, 896) has three stages, the fewest; the others' more.
SIZES = {(4, 896): 1, (2, 64): 1, (4, 1280): 2, (2, 2560): 4, (4, 7168): 8}
PAIRS = pytest.mark.parametrize("pair", some(SIZES, 3), ids=str)
# With a build of its own for other dtypes.
ONE = pytest.mark.parametrize("pair", some(SIZES), ids=str)


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED):
        yield


def check(pair, num_tokens, norm=True):
    case = Case(num_tokens, *pair, "")
    ran = set()
    with launch.settings(watch=lambda kernel, given: ran.add(kernel.key[0])):
        oracle.check(CONTRACT, case, readout.inputs(pair, num_tokens, "cpu", norm), {})
    assert {"contract_cluster_fwd", "contract_cluster_bwd"} <= ran


@pytest.mark.parametrize("pair", SIZES, ids=str)
def test_sizes_of_clusters(pair):
    assert {cluster_size(*pair, backward, HOPPER) for backward in (False, True)} == {SIZES[pair]}


@pytest.mark.parametrize("norm", [True, PLAIN], ids=["norm_weight", "plain"])
@PAIRS
def test_tokens(pair, norm):
    """A part of a group, a whole one and one more."""
    for num_tokens in (1, 7, 8, 9, 40):
        check(pair, num_tokens, norm)


@PAIRS
def test_one_cluster_with_all_the_tokens(pair):
    """Twice around the ring, and twice around the slots of sums."""
    with emulated(seed=SEED, num_sms=1):
        check(pair, 101)


@PAIRS
def test_same_bits_in_every_order_of_threads(pair):
    tensors = readout.inputs(pair, 60, "cpu")
    grad = torch.randn_like(tensors["residual"][:, 0])
    runs = []
    for seed in range(4):
        with emulated(seed=seed, num_sms=1):
            runs.append(oracle.evaluate(contract, tensors, {}, [grad], ["out"]))
    for run in runs[1:]:
        oracle.check_same_bits(runs[0], run, "in another order:")


@PAIRS
def test_tf32(pair):
    readout.check_tf32(pair, 40, "cpu")
    tensors = readout.inputs(pair, 13, "cpu")
    tensors["weight"] *= tensors.pop("norm_weight")
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    assert torch.equal(contract(**tensors, tf32=True), contract(**rounded))


@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
@PAIRS
def test_largest_streams(pair, tf32):
    readout.check_largest(pair, "cpu", tf32)


@PAIRS
def test_sizes_of_tokens_side_by_side(pair):
    readout.check_sizes(pair, "cpu")


@ONE
@pytest.mark.scheduled
def test_bfloat16_parameters(pair):
    tensors = readout.inputs(pair, 40, "cpu")
    tensors = Dtypes(torch.bfloat16, PARAMETERS, "all of them").of(tensors)
    ours = oracle.check(CONTRACT, Case(40, *pair, ""), tensors, {})
    assert all(ours[f"grad_{name}"].dtype == tensor.dtype for name, tensor in tensors.items())


@PAIRS
def test_nonfinite_stays_in_its_token(pair):
    oracle.check_isolation(CONTRACT, readout.inputs(pair, 13, "cpu"), {}, "residual")


SLOT, SLOT_BEFORE = "((step_1 & 3) * 80)", "(((step_1 + 3) & 3) * 80)"
# Of the forward's source in clusters of two: what becomes of what, and the fault.
BROKEN = {
    "no wait": ((r"full\[[^;]*\.wait\([^;]*;", ""), "never written|under way"),
    "no barrier of the warp": (
        (r"__syncwarp\(\);(?![\s\S]*__syncwarp)", ""),
        "never written|since the last barrier",
    ),
    "one slot of sums": (
        (f"{re.escape(SLOT)}|{re.escape(SLOT_BEFORE)}", "0"),
        "no wait between|under way",
    ),
}


@pytest.fixture(scope="module")
def forward():
    """A launch of it: the kernel and its arguments."""
    launches = []

    def watch(kernel, given):
        if kernel.key[0] == "contract_cluster_fwd":
            launches.append((kernel, [g.clone() if torch.is_tensor(g) else g for g in given]))

    tensors = readout.inputs((4, 1280), 60, "cpu", norm=False)
    with emulated(num_sms=1), launch.settings(watch=watch):
        contract(**tensors)
    return launches[0]


@pytest.mark.parametrize("what", BROKEN)
def test_faults_within_a_cluster(forward, what):
    """In some order of threads: most of them hide that a CTA may be ahead."""
    kernel, given = forward
    (old, new), message = BROKEN[what]
    source, count = re.subn(old, new, kernel.lowered.source)
    assert count, f"the kernel has no {old!r} any more: choose another place to break"
    broken = Kernel(dataclasses.replace(kernel.lowered, source=source))

    def run():
        for seed in range(12):
            with launch.settings(seed=seed):
                broken(*[g.clone() if torch.is_tensor(g) else g for g in given])

    with pytest.raises(FaultError, match=message):
        run()
