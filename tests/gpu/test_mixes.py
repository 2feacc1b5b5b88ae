import pytest
import torch

import gates
import oracle
import saturation
from cases import SPLIT_MIXES, mixes
from tile_mhc import split_mixes


@mixes
def test_mixes(case):
    oracle.check(SPLIT_MIXES, case, *SPLIT_MIXES.inputs(*case.shape, "cuda"))


def test_same_bits_every_run():
    gates.check_repeatable(SPLIT_MIXES)


def test_nonfinite_stays_in_its_token():
    gates.check_isolation(SPLIT_MIXES)


@pytest.mark.parametrize("lead", gates.LEADS, ids=str)
def test_leading_dimensions(lead):
    gates.check_lead(SPLIT_MIXES, lead)


def test_strided():
    gates.check_strided(SPLIT_MIXES)


@pytest.mark.parametrize("size", gates.SIZES, ids=str)
def test_extreme_mixes(size):
    gates.check_extreme(SPLIT_MIXES, size)


@pytest.mark.parametrize("used", range(3), ids=SPLIT_MIXES.outputs)
def test_one_output_used(used):
    tensors, options = SPLIT_MIXES.inputs((130,), 4, 64, "cuda")
    upstream = oracle.upstream_of(SPLIT_MIXES, tensors, options)
    only = [grad if i == used else torch.zeros_like(grad) for i, grad in enumerate(upstream)]
    every = oracle.evaluate(split_mixes, tensors, options, only, SPLIT_MIXES.outputs)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    split_mixes(**leaves, **options)[used].backward(upstream[used])
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    oracle.check_same_bits(grads, every, f"split_mixes, only {SPLIT_MIXES.outputs[used]}:")


def test_gradients_of_saturated_gates():
    saturation.check_split_mixes("cuda")
