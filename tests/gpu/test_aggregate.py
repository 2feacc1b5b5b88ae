import pytest
import torch

import oracle
from cases import AGGREGATE, Case, streams
from tile_mhc import aggregate, selection


@streams
def test_aggregate(case):
    oracle.check(AGGREGATE, case, *AGGREGATE.inputs(*case.shape, "cuda"))


def test_same_bits_every_run():
    oracle.check_repeatable(AGGREGATE, *AGGREGATE.inputs((130,), 4, 1280, "cuda"))


def test_same_bits_by_the_kernel_of_a_last_read(monkeypatch):
    tensors, _ = AGGREGATE.inputs((130,), 4, 1280, "cuda")
    expected = aggregate(**tensors)
    monkeypatch.setattr(selection, "reads_last", lambda nbytes: True)
    assert torch.equal(aggregate(**tensors), expected)


@pytest.mark.parametrize("poisoned", ["residual", "pre_mix"])
def test_nonfinite_stays_in_its_token(poisoned):
    oracle.check_isolation(AGGREGATE, *AGGREGATE.inputs((65,), 8, 128, "cuda"), poisoned)


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (2, 3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(AGGREGATE, case, *AGGREGATE.inputs(lead, 4, 192, "cuda"))


def test_mix_of_a_last_axis_of_one():
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cuda")
    tensors["pre_mix"] = tensors["pre_mix"].unsqueeze(-1)
    oracle.check(AGGREGATE, Case(13, 4, 192, "(..., n, 1)"), tensors, {})


def test_strided_mix():
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cuda")
    tensors["pre_mix"] = torch.rand(4, 26, device="cuda").mT[::2]
    oracle.check(AGGREGATE, Case(13, 4, 192, "a mix in any layout"), tensors, {})


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-38], ids=str)
def test_extreme_residual(value):
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cuda")
    tensors["residual"] = torch.full_like(tensors["residual"], value)
    tensors["pre_mix"] = tensors["pre_mix"] / 4  # the sum stays within bfloat16
    # Small upstream gradients: those of the mixes are sums over H, and stay within float32.
    oracle.check(AGGREGATE, Case(13, 4, 192, "values of any size"), tensors, {}, 1e-6)


@pytest.mark.parametrize("wanted", [("residual",), ("pre_mix",)], ids=str)
def test_some_gradients(wanted):
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cuda")
    grad = torch.randn_like(tensors["residual"][:, 0])
    every = oracle.evaluate(aggregate, tensors, {}, [grad], ["out"])
    for name in wanted:
        tensors[name].requires_grad_()
    aggregate(**tensors).backward(grad)
    for name, tensor in tensors.items():
        if name in wanted:
            assert torch.equal(tensor.grad, every[f"grad_{name}"])
        else:
            assert tensor.grad is None


def test_out():
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cuda")
    out = torch.empty(13, 192, dtype=torch.bfloat16, device="cuda")
    assert aggregate(**tensors, out=out) is out
    assert torch.equal(out, aggregate(**tensors))
