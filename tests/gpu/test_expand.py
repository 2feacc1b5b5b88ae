import pytest
import torch

import oracle
from cases import EXPAND, Case, stream, streams
from tile_mhc import expand


@streams
def test_expand(case):
    tensors, options = EXPAND.inputs(*case.shape, "cuda")
    ours = oracle.check(EXPAND, case, tensors, options)
    wide = tensors["hidden"].unsqueeze(-2)
    assert torch.equal(ours["out"], wide.expand_as(ours["out"])), "a copy changes no bit"


def test_same_bits_every_run():
    oracle.check_repeatable(EXPAND, *EXPAND.inputs((130,), 4, 1280, "cuda"))


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(EXPAND, *EXPAND.inputs((65,), 8, 128, "cuda"), "hidden")


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (2, 3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(EXPAND, case, *EXPAND.inputs(lead, 4, 192, "cuda"))


def test_gradient_from_an_expanded_tensor():
    hidden = stream(13, 192, device="cuda").requires_grad_()
    expand(hidden, 4).sum().backward()  # .sum() sends back one element with strides of 0
    assert torch.equal(hidden.grad, torch.full_like(hidden, 4.0))


def test_out():
    hidden = stream(13, 192, device="cuda")
    out = torch.empty(13, 4, 192, dtype=torch.bfloat16, device="cuda")
    assert expand(hidden, 4, out=out) is out
    assert torch.equal(out, expand(hidden, 4))
