import pytest
import torch

import oracle
import saturation
from cases import HEAD_MIX, SPLIT_MIXES, Case, mixes
from tile_mhc import split_mixes

BOTH = pytest.mark.parametrize("op", [SPLIT_MIXES, HEAD_MIX], ids=str)


@BOTH
@mixes
def test_mixes(op, case):
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@BOTH
def test_same_bits_every_run(op):
    oracle.check_repeatable(op, *op.inputs((20000,), 4, 64, "cuda"))


@BOTH
def test_nonfinite_stays_in_its_token(op):
    oracle.check_isolation(op, *op.inputs((130,), 8, 64, "cuda"), "mixes")


@BOTH
@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(op, lead):
    case = Case(0, 4, 64, "any leading dimensions")
    oracle.check(op, case, *op.inputs(lead, 4, 64, "cuda"))


@BOTH
def test_strided(op):
    tensors, options = op.inputs((130,), 4, 64, "cuda")
    tensors["mixes"] = torch.randn(tensors["mixes"].shape[1], 260, device="cuda").mT[::2]
    tensors["bias"] = torch.randn(2 * tensors["bias"].numel(), device="cuda")[::2]
    tensors["scale"] = torch.randn(2 * tensors["scale"].numel(), device="cuda")[::2]
    oracle.check(op, Case(130, 4, 64, "any layout"), tensors, options)


@BOTH
@pytest.mark.parametrize("size", [0.0, 1e4, 1e35], ids=str)
def test_extreme_mixes(op, size):
    """The sigmoid saturates; it does not overflow."""
    tensors, options = op.inputs((130,), 4, 64, "cuda")
    tensors["mixes"] = tensors["mixes"].sign() * size
    oracle.check(op, Case(130, 4, 64, "values of any size"), tensors, options)


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
    saturation.check_head_mix("cuda")
