"""One kernel for the gradients of all gates, beside the kernels of the separate ops."""

import pytest
import torch

import gates
from emulator import launch
from emulator.ops import emulated
from tile_mhc import config

OPTIONS = (
    {},
    {"tf32": True},
    {"sinkhorn_repeat": 1},
    {"sinkhorn_repeat": 2, "pre_eps": 0.25, "post_mult": 2.0, "sinkhorn_eps": 1e-2},
)


@pytest.fixture
def ran():
    names = set()
    with emulated(seed=1), launch.settings(watch=lambda kernel, given: names.add(kernel.key[0])):
        yield names


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.scheduled), 4])
@pytest.mark.parametrize("num_tokens", [1, 13, 128, 200])
def test_same_bits(ran, num_tokens, n):
    gates.check_at_once(num_tokens, n, "cpu")
    assert {"gates_bwd", "delayed_gates_bwd", "split_mixes_bwd", "projection_norm_bwd"} <= ran


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_bits_with_options(ran, options):
    gates.check_at_once(70, 4, "cpu", **options)


@pytest.mark.scheduled
def test_same_bits_with_bfloat16_parameters(ran):
    gates.check_at_once(70, 4, "cpu", torch.bfloat16)


def test_same_bits_in_batch_invariant_mode(ran):
    before = config.get_batch_invariant()
    config.set_batch_invariant(True)
    try:
        gates.check_at_once(200, 4, "cpu")
    finally:
        config.set_batch_invariant(before)
