import dataclasses

import pytest
import torch

import oracle
from cases import CONTRACT, Case, few_streams, norm_weight
from tile_mhc import aggregate, contract, head_mix, projection, reference

# More splits than any of these sizes has: as many as there would be without a cap.
MANY = 1000


@few_streams
def test_contract(case):
    oracle.check(CONTRACT, case, *CONTRACT.inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])
@few_streams
def test_bits_of_the_three_ops(case, norm):
    tensors, _ = CONTRACT.inputs(*case.shape, "cuda")
    residual, weight, scale, bias = tensors.values()
    size = weight.shape[1]
    given = norm_weight(size, "cuda") if norm else None
    mixes = projection(residual, weight, norm_weight=given, num_splits=MANY)
    expected = aggregate(residual, head_mix(mixes, scale, bias))
    assert torch.equal(contract(**tensors, norm_weight=given, num_splits=MANY), expected)


def test_norm_weight():
    tensors, options = CONTRACT.inputs((130,), 4, 1280, "cuda")
    tensors["norm_weight"] = norm_weight(4 * 1280, "cuda")
    oracle.check(CONTRACT, Case(130, 4, 1280, "a weight of the norm"), tensors, options)


def test_tf32():
    """The same bits as with a weight that has been rounded before; other bits without."""
    tensors, _ = CONTRACT.inputs((130,), 4, 1280, "cuda")
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    assert torch.equal(contract(**tensors, tf32=True), contract(**rounded))
    assert not torch.equal(contract(**tensors, tf32=True), contract(**tensors))


@pytest.mark.parametrize("num_splits", [1, 3, MANY])
def test_capped_splits(num_splits):
    tensors, options = CONTRACT.inputs((130,), 4, 1280, "cuda")

    def run(**arguments):
        return contract(**arguments, num_splits=num_splits)

    op = dataclasses.replace(CONTRACT, run=run)
    oracle.check(op, Case(130, 4, 1280, "a cap on the splits"), tensors, options)


def test_same_bits_every_run():
    oracle.check_repeatable(CONTRACT, *CONTRACT.inputs((130,), 4, 1280, "cuda"))


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(CONTRACT, *CONTRACT.inputs((65,), 8, 128, "cuda"), "residual")


@pytest.mark.parametrize("lead", [(), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(CONTRACT, case, *CONTRACT.inputs(lead, 4, 192, "cuda"))


@pytest.mark.parametrize("wanted", ["residual", "weight", "scale", "bias"])
def test_one_gradient_alone(wanted):
    tensors, _ = CONTRACT.inputs((65,), 8, 128, "cuda")
    grad = torch.randn_like(tensors["residual"][:, 0])
    every = oracle.evaluate(contract, tensors, {}, [grad], ["out"])
    tensors[wanted].requires_grad_()
    contract(**tensors).backward(grad)
    assert torch.equal(tensors[wanted].grad, every[f"grad_{wanted}"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)
