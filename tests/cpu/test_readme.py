"""The examples of the README that run anywhere."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def example():
    """What the first example leaves behind, for one seed."""
    (code, *_) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    names = {}
    torch.manual_seed(0)
    exec(compile(code, str(README), "exec"), names)
    return names


def test_first_example_keeps_the_constraint(example):
    """The example asserts it, too: rows and columns of comb_mix sum to one; it is not uniform."""
    comb_mix = example["comb_mix"]
    assert comb_mix.shape == (2, 64, 4, 4)
    assert (comb_mix > 0).all()
    assert (comb_mix.sum(-2) - 1).abs().max() < 1e-5
    assert (comb_mix.sum(-1) - 1).abs().max() < 1e-4
    assert comb_mix.std() > 0.05, "or it shows nothing"


def test_gates_of_the_first_example_are_not_saturated(example):
    post_mix = example["post_mix"] / example["connection"].post_mult
    assert ((post_mix > 1e-4) & (post_mix < 1 - 1e-4)).all()
    assert post_mix.std() > 0.05


def test_first_example_has_a_gradient(example):
    grad = example["connection"].weight.grad
    assert grad.isfinite().all()
    # Streams that are still alike have no gradient of how they are mixed.
    assert (grad[:8].norm(dim=1) > 1e3 * grad[8:].norm(dim=1).max()).all()
    assert example["head"].weight.grad.isfinite().all()
    assert example["hidden"].shape == (2, 64, 2560)
