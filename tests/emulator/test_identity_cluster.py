"""identity_pre in one pass on the emulator: by default in clusters of one, two and four.

As for the readout, barriers are placed by hand: that the emulator sees no race in any order of
threads, with one CTA of a cluster ahead of the others or behind, is what holds them.
"""

import dataclasses
import re

import pytest
import torch

import oracle
import unmixed
from cases import IDENTITY_OUTPUTS, IDENTITY_PRE, PARAMETERS, Case, Dtypes
from emulator import launch
from emulator.launch import FaultError, Kernel
from emulator.ops import emulated
from emulator.suite import PLAIN, some
from tile_mhc import identity_pre, reference
from tile_mhc.kernels._arch import HOPPER
from tile_mhc.kernels._shapes import identity_cluster_size

SEED = 1
FORWARD, BACKWARD = "identity_cluster_fwd", "identity_cluster_bwd"
HIDDEN = pytest.mark.parametrize("hidden", some(unmixed.SIZES, 2))
# With a build of its own for other dtypes.
ONE = pytest.mark.parametrize("hidden", some(unmixed.SIZES))


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED):
        yield


@pytest.mark.parametrize("hidden", unmixed.SIZES)
def test_sizes_of_clusters(hidden):
    choices = ((False, False), (True, False), (True, True))
    sizes = tuple(identity_cluster_size(4, hidden, *choice, HOPPER) for choice in choices)
    assert sizes == unmixed.SIZES[hidden]


@pytest.mark.parametrize("norm", [True, PLAIN], ids=["norm_weight", "plain"])
@HIDDEN
def test_tokens(hidden, norm):
    """A part of a group, a whole one and one more."""
    ran = set()
    with launch.settings(watch=lambda kernel, given: ran.add(kernel.key[0])):
        for num_tokens in (1, 7, 8, 9, 40):
            unmixed.check(hidden, num_tokens, "cpu", norm)
    assert {FORWARD, BACKWARD} <= ran


@HIDDEN
def test_one_cluster_with_all_the_tokens(hidden):
    """Twice around the ring, and twice around the slots of sums."""
    with emulated(seed=SEED, num_sms=1):
        unmixed.check(hidden, 101, "cpu")


@HIDDEN
def test_same_bits_in_every_order_of_threads(hidden):
    tensors = unmixed.inputs(hidden, 60, "cpu")
    upstream = oracle.upstream_of(unmixed.PASSING, tensors, {})
    runs = []
    for seed in range(4):
        with emulated(seed=seed, num_sms=1):
            arguments = tensors, {}, upstream, unmixed.PASSING.outputs
            runs.append(oracle.evaluate(unmixed.PASSING.run, *arguments))
    for run in runs[1:]:
        oracle.check_same_bits(runs[0], run, "in another order:")


@HIDDEN
def test_tf32(hidden):
    unmixed.check_tf32(hidden, 40, "cpu")
    tensors = unmixed.inputs(hidden, 13, "cpu")
    tensors["weight"] *= tensors.pop("norm_weight")
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    for a, b in zip(identity_pre(**tensors, tf32=True), identity_pre(**rounded), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
@HIDDEN
def test_largest_streams(hidden, tf32):
    unmixed.check_largest(hidden, "cpu", tf32)


@HIDDEN
def test_sizes_of_tokens_side_by_side(hidden):
    unmixed.check_sizes(hidden, "cpu")


@HIDDEN
def test_small_gradients(hidden):
    unmixed.check_small_gradients(hidden, "cpu")


@pytest.mark.scheduled
@ONE
def test_bfloat16_parameters(hidden):
    tensors = unmixed.inputs(hidden, 40, "cpu")
    tensors = Dtypes(torch.bfloat16, PARAMETERS, "all of them").of(tensors)
    ours = oracle.check(IDENTITY_PRE, Case(40, 4, hidden, ""), tensors, {})
    assert all(ours[f"grad_{name}"].dtype == tensor.dtype for name, tensor in tensors.items())


@HIDDEN
def test_nonfinite_stays_in_its_token(hidden):
    tensors = unmixed.inputs(hidden, 13, "cpu")
    for op in (IDENTITY_PRE, unmixed.PASSING):
        oracle.check_isolation(op, tensors, {}, "residual")


@HIDDEN
def test_a_token_by_itself(hidden):
    """What is computed of a token does not depend on the others, nor on how many there are."""
    tensors = unmixed.inputs(hidden, 60, "cpu")
    upstream = oracle.upstream_of(IDENTITY_PRE, tensors, {})
    every = oracle.evaluate(identity_pre, tensors, {}, upstream, IDENTITY_OUTPUTS)
    for rows in (slice(0, 1), slice(5, 30)):
        few = tensors | {"residual": tensors["residual"][rows]}
        grads = [grad[rows] for grad in upstream]
        some = oracle.evaluate(identity_pre, few, {}, grads, IDENTITY_OUTPUTS)
        for name in ("layer_input", "post_mix", "grad_residual"):
            assert torch.equal(some[name], every[name][rows]), name


# What is taken out of the sources, and the fault.
BROKEN = {
    "no wait": (r"full\[[^;]*\.wait\([^;]*;", "never written|under way"),
    "no barrier of the warp": (
        r"__syncwarp\(\);(?![\s\S]*__syncwarp)",
        "no barrier|never written|since the last barrier",
    ),
    "no wait for a copy": (r"tl::cp_async_wait<\d+>\(\);", "that nothing waits for|under way"),
}


@pytest.fixture(scope="module")
def launches():
    """A launch of each kernel in clusters: the kernel and its arguments."""
    found = {}

    def watch(kernel, given):
        copies = [g.clone() if torch.is_tensor(g) else g for g in given]
        found.setdefault(kernel.key[0], (kernel, copies))

    tensors = unmixed.inputs(1024, 60, "cpu", norm=False)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with emulated(num_sms=1), launch.settings(watch=watch):
        layer_input, post_mix = identity_pre(**leaves)
        (layer_input.float().sum() + post_mix.sum()).backward()
    return found


# In the backward warps wait for one another by mbarriers: those whose gates they use, whose sums
# they push, and the gates' warp for those that use what it writes over.
STEP = r"full\[[^;]*\+ 4\)\]\.wait\([^;]*;"
BROKEN_STEPS = {
    "no wait for a step": (STEP, "since the last barrier|never written"),
    "no wait but in the gates' warp": (
        STEP + r"(?=[\s\S]*\.wait\([\s\S]*\.wait\([\s\S]*full\[4\]\.wait)",
        "since the last barrier|never written",
    ),
    "no wait in the gates' warp": (
        STEP + r"(?=[^?]*full\[4\]\.wait\()(?![\s\S]*push_vector)",
        "since the last barrier",
    ),
}
EITHER = [(name, what) for name in (FORWARD, BACKWARD) for what in BROKEN]
EITHER += [(BACKWARD, what) for what in BROKEN_STEPS]


@pytest.mark.parametrize(("name", "what"), EITHER)
def test_faults_within_a_cluster(launches, name, what):
    """In some order of threads: most of them hide that a CTA may be ahead."""
    kernel, given = launches[name]
    pattern, message = (BROKEN | BROKEN_STEPS)[what]
    source, count = re.subn(pattern, "", kernel.lowered.source)
    assert count, f"the kernel has no {pattern!r} any more: choose another place to break"
    broken = Kernel(dataclasses.replace(kernel.lowered, source=source))

    def run():
        for seed in range(12):
            with launch.settings(seed=seed):
                broken(*[g.clone() if torch.is_tensor(g) else g for g in given])

    with pytest.raises(FaultError, match=message):
        run()
