import pytest
import torch

import oracle
from cases import POST, Case, streams
from tile_mhc import post


@streams
def test_post(case):
    oracle.check(POST, case, *POST.inputs(*case.shape, "cuda"))


def test_same_bits_every_run():
    oracle.check_repeatable(POST, *POST.inputs((130,), 4, 1280, "cuda"))


@pytest.mark.parametrize("poisoned", ["layer_output", "residual", "post_mix", "comb_mix"])
def test_nonfinite_stays_in_its_token(poisoned):
    oracle.check_isolation(POST, *POST.inputs((65,), 8, 128, "cuda"), poisoned)


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (2, 3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(POST, case, *POST.inputs(lead, 4, 192, "cuda"))


def test_mix_of_a_last_axis_of_one():
    tensors, _ = POST.inputs((13,), 4, 192, "cuda")
    tensors["post_mix"] = tensors["post_mix"].unsqueeze(-1)
    oracle.check(POST, Case(13, 4, 192, "(..., n, 1)"), tensors, {})


def test_strided_mixes():
    tensors, _ = POST.inputs((13,), 4, 192, "cuda")
    tensors["post_mix"] = torch.rand(4, 26, device="cuda").mT[::2]
    tensors["comb_mix"] = torch.rand(13, 4, 4, device="cuda").mT
    oracle.check(POST, Case(13, 4, 192, "mixes in any layout"), tensors, {})


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-38], ids=str)
def test_extreme_streams(value):
    tensors, _ = POST.inputs((13,), 4, 192, "cuda")
    for name in ("layer_output", "residual"):
        tensors[name] = torch.full_like(tensors[name], value)
    for name in ("post_mix", "comb_mix"):
        tensors[name] = tensors[name] / 8  # the sum stays within bfloat16
    # Small upstream gradients: those of the mixes are sums over H, and stay within float32.
    oracle.check(POST, Case(13, 4, 192, "values of any size"), tensors, {}, 1e-6)


@pytest.mark.parametrize("wanted", ["layer_output", "residual", "post_mix", "comb_mix"])
def test_one_gradient_alone(wanted):
    tensors, _ = POST.inputs((13,), 4, 192, "cuda")
    grad = torch.randn_like(tensors["residual"])
    every = oracle.evaluate(post, tensors, {}, [grad], ["out"])
    tensors[wanted].requires_grad_()
    post(**tensors).backward(grad)
    assert torch.equal(tensors[wanted].grad, every[f"grad_{wanted}"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_gradient_from_an_expanded_tensor():
    tensors, _ = POST.inputs((13,), 4, 192, "cuda")
    ones = torch.ones_like(tensors["residual"])
    every = oracle.evaluate(post, tensors, {}, [ones], ["out"])
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    post(**leaves).sum().backward()  # .sum() sends back one element with strides of 0
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    oracle.check_same_bits(grads, every, "post, strides of 0:")


def test_out():
    tensors, _ = POST.inputs((13,), 4, 192, "cuda")
    out = torch.empty(13, 4, 192, dtype=torch.bfloat16, device="cuda")
    assert post(**tensors, out=out) is out
    assert torch.equal(out, post(**tensors))
