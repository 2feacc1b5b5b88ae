import dataclasses

import pytest
import torch

import oracle
from cases import PROJECTION, Case, few_streams, streams
from tile_mhc import config, projection, reference


def check(case, tensors, **options):
    """`num_splits` is not an argument of the reference: bind it to our side alone."""

    def run(**arguments):
        return projection(**arguments, **options)

    oracle.check(dataclasses.replace(PROJECTION, run=run), case, tensors, {})


@streams
def test_projection(case):
    oracle.check(PROJECTION, case, *PROJECTION.inputs(*case.shape, "cuda"))


@few_streams
def test_without_norm_weight(case):
    tensors, options = PROJECTION.inputs(*case.shape, "cuda")
    del tensors["norm_weight"]
    oracle.check(PROJECTION, case, tensors, options)


@pytest.mark.parametrize(("num_streams", "hidden_size"), [(2, 64), (4, 1280), (8, 128)])
def test_head_weight(num_streams, hidden_size):
    """n rows in place of n * (n + 2): padded to a tile of 8."""
    tensors, options = PROJECTION.inputs((65,), num_streams, hidden_size, "cuda")
    tensors["weight"] = tensors["weight"][:num_streams].contiguous()
    case = Case(65, num_streams, hidden_size, "the weight of the head")
    oracle.check(PROJECTION, case, tensors, options)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 128, 257, 1000, 2112, 8448, 17000])
def test_every_number_of_splits(num_tokens):
    """From as many slices of K as there are, at one token, down to a single one."""
    tensors, options = PROJECTION.inputs((num_tokens,), 4, 1280, "cuda")
    case = Case(num_tokens, 4, 1280, "splits follow from T")
    oracle.check(PROJECTION, case, tensors, options)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 1000])
def test_capped_splits(num_splits):
    tensors, _ = PROJECTION.inputs((130,), 4, 1280, "cuda")
    check(Case(130, 4, 1280, "a cap on the splits"), tensors, num_splits=num_splits)


@pytest.mark.parametrize("norm_eps", [0.0, 1e-6, 1.0])
def test_norm_eps(norm_eps):
    tensors, _ = PROJECTION.inputs((65,), 4, 192, "cuda")
    case = Case(65, 4, 192, "eps of the norm")
    oracle.check(PROJECTION, case, tensors, {"norm_eps": norm_eps})


def test_fewer_sms():
    tensors, _ = PROJECTION.inputs((130,), 4, 1280, "cuda")
    try:
        config.set_num_sms(7)
        check(Case(130, 4, 1280, "SMs left to others"), tensors)
    finally:
        config.set_num_sms(0)


@pytest.mark.parametrize("bad", [-1, 10**6, 1.0, True], ids=repr)
def test_bad_num_sms(bad):
    with pytest.raises(ValueError, match=r"set_num_sms: num_sms must be from 0 to \d+; got"):
        config.set_num_sms(bad)


@pytest.mark.parametrize("num_splits", [None, 1])
def test_same_bits_every_run(num_splits):
    def run(**arguments):
        return projection(**arguments, num_splits=num_splits)

    op = dataclasses.replace(PROJECTION, run=run)
    oracle.check_repeatable(op, *PROJECTION.inputs((130,), 4, 1280, "cuda"))


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(PROJECTION, *PROJECTION.inputs((130,), 4, 1280, "cuda"), "residual")


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (2, 3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(PROJECTION, case, *PROJECTION.inputs(lead, 4, 192, "cuda"))


def test_strided_parameters():
    tensors, options = PROJECTION.inputs((65,), 4, 192, "cuda")
    tensors["weight"] = tensors["weight"].mT.contiguous().mT
    tensors["norm_weight"] = torch.rand(2 * 4 * 192, device="cuda")[::2]
    oracle.check(PROJECTION, Case(65, 4, 192, "parameters in any layout"), tensors, options)


@pytest.mark.parametrize("value", [0.0, 3e38, 1e30, 1e19, 1e-30, 1e-38], ids=str)
def test_one_size_of_residual(value):
    """Sums of squares that float32 cannot hold, and those it rounds to zero."""
    tensors, options = PROJECTION.inputs((13,), 4, 1280, "cuda")
    tensors["residual"] = (tensors["residual"].sign() * value).bfloat16()
    case = Case(13, 4, 1280, "values of any size")
    oracle.check(PROJECTION, case, tensors, options)


def test_sizes_of_residual_side_by_side():
    """A token near the bfloat16 maximum does not change its neighbours' results."""
    tensors, options = PROJECTION.inputs((65,), 4, 1280, "cuda")
    sizes = torch.tensor([1.0, 3e37, 1e-20, 0.0, 1e15], device="cuda").repeat(13)
    tensors["residual"] *= sizes[:, None, None]
    with torch.no_grad():
        ours = projection(**tensors, **options)
        plain = reference.projection(**tensors)
        truth = reference.projection(**{name: t.double() for name, t in tensors.items()})
    for token in range(5):
        rows = slice(token, None, 5)
        oracle.check_tensor("projection", "out", ours[rows], plain[rows], truth[rows], {})


@pytest.mark.parametrize("wanted", ["residual", "weight", "norm_weight"])
def test_one_gradient_alone(wanted):
    tensors, _ = PROJECTION.inputs((65,), 4, 192, "cuda")
    grad = torch.randn(65, 24, device="cuda")
    every = oracle.evaluate(projection, tensors, {}, [grad], ["out"])
    tensors[wanted].requires_grad_()
    projection(**tensors).backward(grad)
    assert torch.equal(tensors[wanted].grad, every[f"grad_{wanted}"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)
