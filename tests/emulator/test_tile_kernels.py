"""The plain functions of compat.tile_kernels.mhc, run by the kernels on the CPU: float64, bits."""

from unittest import mock

import pytest
import torch

import own_norm
from emulator import launch
from emulator.ops import emulated
from emulator.suite import VARIED
from parity import calls, plain
from tile_mhc import selection, specs
from tile_mhc.compat.tile_kernels import mhc

SEED = 1
# Two rows of blocks, and a ragged block; one token.
TOKENS = (7 * 32 * 2 + 13, 1)


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED):
        yield


@pytest.mark.parametrize("pair", VARIED, ids=str)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("call", plain.PLAIN.values(), ids=str)
def test_function(call, num_tokens, pair):
    n, hidden_size = pair
    make = plain.Maker(call.name, num_tokens, hidden_size, "cpu", n)
    inputs = call.inputs(make)
    found = plain.evaluate(mhc, call, inputs)
    truth = plain.evaluate_exactly(call, inputs)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        error = calls.relative_error(found[name].view(exact.shape), exact)
        assert error <= call.bound(name), f"{name}: {error:.3e}"


@own_norm.CASES
def test_matmuls(sizes):
    own_norm.check(*sizes, "cpu")


def test_the_matmul_adds_to_the_gradient_of_x():
    own_norm.check_added("cpu")


@pytest.mark.parametrize("pair", VARIED, ids=str)
@pytest.mark.parametrize("name", plain.ROUNDED_ONCE)
def test_a_gradient_is_rounded_once(name, pair):
    n, hidden_size = pair
    call = plain.PLAIN[name]
    make = plain.Maker(name, 1001, hidden_size, "cpu", n)
    plain.check_rounded_once(mhc, call, call.inputs(make))


@pytest.mark.parametrize("bias", [-80.0, 80.0])
def test_a_gate_at_its_ends(bias):
    """Where 1 - sigmoid(z) keeps no bit; the logits of comb would hide it."""
    call = plain.PLAIN["pre_split_mixes_bwd"]
    inputs = call.inputs(plain.Maker(call.name, 130, 64, "cpu"))
    inputs["base"] += bias
    inputs["grad_2"].zero_()
    plain.check_rounded_once(mhc, call, inputs)


@pytest.mark.parametrize("reads_last", [False, True])
def test_the_fused_pre_has_the_bits_of_its_parts(reads_last):
    """TileKernels' own test asks for it."""
    call = plain.PLAIN["pre_big_fuse_fwd"]
    inputs = call.inputs(plain.Maker(call.name, 13, 192, "cpu"))
    with mock.patch.object(selection, "reads_last", return_value=reads_last):
        fused = call.run(mhc, inputs)
        parts = plain.big_fuse_by_parts(mhc, inputs)
    for name, tensor in fused.items():
        assert torch.equal(tensor, parts[name]), name


def test_the_fused_pre_without_an_eps():
    """Sinkhorn has kernels of its own then."""
    call = plain.PLAIN["pre_big_fuse_fwd"]
    inputs = call.inputs(plain.Maker(call.name, 13, 192, "cpu"))
    with mock.patch.object(plain, "EPS", 0.0):
        fused, parts = call.run(mhc, inputs), plain.big_fuse_by_parts(mhc, inputs)
        truth = plain.evaluate_exactly(call, inputs)
    for name, tensor in fused.items():
        assert torch.equal(tensor, parts[name]), name
        assert calls.relative_error(tensor, truth[name].flatten(1)) <= call.bound(name), name


@pytest.mark.parametrize("name", ["head_compute_mix_bwd", "reduce_partials_of_groups_fwd"])
def test_same_bits_in_every_order_of_threads(name):
    call = plain.PLAIN[name]
    inputs = call.inputs(plain.Maker(name, 130, 192, "cpu"))
    runs = []
    for seed in (0, 1, 2):
        with launch.settings(seed=seed):
            runs.append(call.run(mhc, inputs))
    for run in runs[1:]:
        for key, tensor in run.items():
            assert torch.equal(tensor, runs[0][key]), key


def test_what_is_launched_can_be_compiled_ahead_of_time():
    """By `tile-mhc compile --ops tile_kernels --grad-dtype bfloat16`."""
    ran = set()
    with launch.settings(watch=lambda kernel, given: ran.add(kernel.key)):
        for call in plain.PLAIN.values():
            # Several groups have an RMS each, as no model has: those compile when they are used.
            if "of_groups" not in call.name:
                call.run(mhc, call.inputs(plain.Maker(call.name, 130, 192, "cpu")))
    sizes = specs.Sizes(4, 192, grads=("bfloat16",))
    assert ran <= set(specs.select([sizes], ["tile_kernels"]))


def test_no_token():
    """Nothing is launched; sums over no token are zero."""
    with launch.settings(watch=lambda kernel, given: pytest.fail(f"{kernel} was launched")):
        for call in plain.PLAIN.values():
            if call.name.startswith("fn_normw"):
                continue
            found = plain.evaluate(mhc, call, call.inputs(plain.Maker(call.name, 0, 64, "cpu")))
            for name, tensor in found.items():
                assert not tensor.any(), name
                assert not tensor.isnan().any(), name
