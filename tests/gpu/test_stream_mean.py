import pytest
import torch

import oracle
from cases import STREAM_MEAN, Case, stream, streams, widths
from tile_mhc import expand, stream_mean


@streams
def test_stream_mean(case):
    oracle.check(STREAM_MEAN, case, *STREAM_MEAN.inputs(*case.shape, "cuda"))


@widths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_width(case, dtype):
    tensors, options = STREAM_MEAN.inputs(*case.shape, "cuda")
    tensors["residual"] = tensors["residual"].to(dtype)
    oracle.check(STREAM_MEAN, case, tensors, options)


def test_mean_of_an_embedding():
    hidden = stream(13, 192, device="cuda")
    assert torch.equal(stream_mean(expand(hidden, 4)), hidden)


def test_same_bits_every_run():
    oracle.check_repeatable(STREAM_MEAN, *STREAM_MEAN.inputs((130,), 4, 1280, "cuda"))


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(STREAM_MEAN, *STREAM_MEAN.inputs((65,), 8, 128, "cuda"), "residual")


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(STREAM_MEAN, case, *STREAM_MEAN.inputs(lead, 4, 192, "cuda"))


def test_gradient_from_an_expanded_tensor():
    residual = stream(13, 4, 192, device="cuda").requires_grad_()
    stream_mean(residual).sum().backward()  # .sum() sends back one element with strides of 0
    assert torch.equal(residual.grad, torch.full_like(residual, 0.25))


def test_out():
    residual = stream(13, 4, 192, device="cuda")
    out = torch.empty(13, 192, dtype=torch.bfloat16, device="cuda")
    assert stream_mean(residual, out=out) is out
    assert torch.equal(out, stream_mean(residual))
