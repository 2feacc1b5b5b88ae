"""A pre of few tokens on the emulator, with the post before it and without, of both kinds."""

from unittest import mock

import pytest
import torch

import oracle
import whole_pre
from cases import DELAYED_PRE, FUSED_PRE, POST_PRE, POST_PRE_DELAYED, Case
from emulator import launch
from emulator.ops import emulated
from emulator.suite import some
from tile_mhc import config, reference, selection
from whole_pre import OPTIONS

SEED = 1
EVERY = (FUSED_PRE, DELAYED_PRE, POST_PRE, POST_PRE_DELAYED)
OPS = pytest.mark.parametrize("op", EVERY, ids=str)
KERNELS = {"few_project", "few_pre"}
# Widths: one CTA; warps that not all have splits; two vectors a thread, the last of them past the
# end.
HIDDEN = pytest.mark.parametrize("hidden", some({64: 1, 320: 5, 4160: 65}, 2))
NARROW = pytest.mark.parametrize("hidden", some({64: 1, 320: 5}, 1))


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED):
        yield


def ran(call):
    names = set()
    with launch.settings(watch=lambda kernel, given: names.add(kernel.key[0])):
        call()
    return names


@OPS
def test_which_kernels_run(op):
    tensors = whole_pre.inputs(op, 64, 5, "cpu")
    assert ran(lambda: op.run(**tensors)) == KERNELS
    assert not KERNELS & ran(lambda: op.run(**tensors, num_splits=1))
    most = whole_pre.inputs(op, 64, selection.FEW_TOKENS + 1, "cpu")
    assert not KERNELS & ran(lambda: op.run(**most))
    config.set_batch_invariant(True)
    try:
        assert not KERNELS & ran(lambda: op.run(**tensors))
    finally:
        config.set_batch_invariant(False)


@OPS
@HIDDEN
def test_tokens(op, hidden):
    """A part of a group, a whole one and one more; and of many groups at a time."""
    for num_tokens in (1, 8, 9, 39) if hidden < 4096 else (9,):
        whole_pre.check(op, hidden, num_tokens, "cpu")


@OPS
@NARROW
@pytest.mark.parametrize("streams", selection.FEW_STREAMS)
def test_few_sms(op, hidden, streams):
    """A CTA has all groups, one after the other."""
    few_streams = mock.patch.object(selection, "few_streams", return_value=streams)
    with emulated(seed=SEED, num_sms=1), few_streams:
        whole_pre.check(op, hidden, 43, "cpu", sinkhorn_repeat=1)


@OPS
@pytest.mark.parametrize("eps", [0.0, 2.0**-60, 2.0**-26, 1e-3, 3.0], ids=str)
def test_eps_of_sinkhorn(op, eps):
    """Products of four sums stay in float32, or are not taken."""
    tensors = whole_pre.inputs(op, 64, 20, "cpu")
    tensors["bias"] *= 20
    options = OPTIONS | {"sinkhorn_eps": eps, "sinkhorn_repeat": 20}
    oracle.check(op, Case(20, 4, 64, ""), tensors, options)


@OPS
@NARROW
def test_same_bits_in_every_order_of_threads(op, hidden):
    tensors = whole_pre.inputs(op, hidden, 40, "cpu")
    norm = torch.rand(hidden)
    runs = []
    for seed in range(4):
        with emulated(seed=seed, num_sms=1 + seed):
            outputs = op.run(**tensors, **OPTIONS, layer_norm_weight=norm)
            runs.append(dict(zip(op.outputs, outputs, strict=True)))
    for run in runs[1:]:
        oracle.check_same_bits(runs[0], run, "in another order:")


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", some({320: 5, 4160: 65}, 1))
def test_norm_of_the_layer_input(op, dtype, hidden):
    tensors = whole_pre.inputs(op, hidden, 3, "cpu")
    norm = (torch.rand(hidden) + 0.5).to(dtype)
    plain = op.run(**tensors, **OPTIONS)
    normed = op.run(**tensors, **OPTIONS, layer_norm_weight=norm, layer_norm_eps=0.25)
    for name, a, b in zip(op.outputs, normed, plain, strict=True):
        if name == "layer_input":
            wanted = reference.input_norm(b, norm, eps=0.25)
            torch.testing.assert_close(a, wanted, rtol=2**-7, atol=1e-5)
        else:
            assert torch.equal(a, b), name


@OPS
def test_tf32(op):
    whole_pre.check_tf32(op, 320, 13, "cpu")


@OPS
@NARROW
def test_largest_streams(op, hidden):
    whole_pre.check_largest(op, hidden, "cpu")


@pytest.mark.scheduled
@OPS
def test_bfloat16_parameters(op):
    whole_pre.check_bfloat16(op, 320, 40, "cpu")


@OPS
def test_nonfinite_stays_in_its_token(op):
    oracle.check_isolation(op, whole_pre.inputs(op, 320, 13, "cpu"), OPTIONS, "residual")


@OPS
def test_a_token_by_itself(op):
    """The order of the sums is the same for as many tokens as have the same kernels."""
    with mock.patch.object(selection, "FEW_TOKENS_OF_ONE", 0):
        whole_pre.check_alone(op, 320, 60, "cpu")
