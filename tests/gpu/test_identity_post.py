import pytest
import torch

import oracle
from cases import DTYPES, IDENTITY_POST, IDENTITY_POST_BIAS, Case, streams, widths
from tile_mhc import GradAccumulator, identity_post

BOTH = pytest.mark.parametrize("op", [IDENTITY_POST, IDENTITY_POST_BIAS], ids=str)


@BOTH
@streams
def test_identity_post(case, op):
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@BOTH
@widths
def test_any_width(case, op):
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes):
    tensors, options = IDENTITY_POST_BIAS.inputs((130,), 4, 1280, "cuda")
    oracle.check(IDENTITY_POST_BIAS, Case(130, 4, 1280, ""), dtypes.of(tensors), options)


@BOTH
def test_same_bits_every_run(op):
    oracle.check_repeatable(op, *op.inputs((130,), 4, 1280, "cuda"))


@pytest.mark.parametrize("poisoned", ["layer_output", "residual", "post_mix"])
def test_nonfinite_stays_in_its_token(poisoned):
    oracle.check_isolation(IDENTITY_POST, *IDENTITY_POST.inputs((65,), 8, 128, "cuda"), poisoned)


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(IDENTITY_POST, case, *IDENTITY_POST.inputs(lead, 4, 192, "cuda"))


def test_strided_mix_of_a_last_axis_of_one():
    tensors, _ = IDENTITY_POST.inputs((13,), 4, 192, "cuda")
    tensors["post_mix"] = torch.rand(4, 26, device="cuda").mT[::2].unsqueeze(-1)
    oracle.check(IDENTITY_POST, Case(13, 4, 192, "mixes in any layout"), tensors, {})


@pytest.mark.parametrize("wanted", ["layer_output", "residual", "post_mix", "bias"])
def test_one_gradient_alone(wanted):
    tensors, _ = IDENTITY_POST_BIAS.inputs((13,), 4, 192, "cuda")
    grad = torch.randn_like(tensors["residual"])
    every = oracle.evaluate(identity_post, tensors, {}, [grad], ["out"])
    tensors[wanted].requires_grad_()
    identity_post(**tensors).backward(grad)
    assert torch.equal(tensors[wanted].grad, every[f"grad_{wanted}"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_the_gradient_of_the_residual_is_that_of_the_output():
    """The same tensor, also where calls are served past the dispatcher."""
    for _ in range(8):
        tensors, _ = IDENTITY_POST.inputs((13,), 4, 192, "cuda")
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        grad = torch.randn_like(tensors["residual"])
        (found,) = torch.autograd.grad(identity_post(**leaves), leaves["residual"], grad)
        assert found.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [1280, 100])
def test_accumulator_of_a_chain(dtype, hidden_size):
    """Twice the same residual: the first backward writes, the second adds."""
    tensors, _ = IDENTITY_POST.inputs((130,), 4, hidden_size, "cuda")
    residual = tensors.pop("residual").requires_grad_()
    accumulator = GradAccumulator(residual, dtype)
    outputs = [
        identity_post(residual=residual, **tensors, grad_accumulator=accumulator) for _ in range(2)
    ]
    grads = [torch.randn_like(out) for out in outputs]
    (found,) = torch.autograd.grad(outputs, residual, grads)
    assert torch.equal(found, (grads[0].float() + grads[1].float()).bfloat16())


def test_out():
    tensors, _ = IDENTITY_POST_BIAS.inputs((13,), 4, 192, "cuda")
    out = torch.empty(13, 4, 192, dtype=torch.bfloat16, device="cuda")
    assert identity_post(**tensors, out=out) is out
    assert torch.equal(out, identity_post(**tensors))
