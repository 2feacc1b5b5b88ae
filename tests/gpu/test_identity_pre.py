import dataclasses

import pytest
import torch

import oracle
import unmixed
from cases import DTYPES, IDENTITY_OUTPUTS, IDENTITY_PRE, Case, few_streams, streams, widths
from tile_mhc import (
    GradAccumulator,
    aggregate,
    identity_post,
    identity_pre,
    projection,
    reference,
)

# More splits than any of these sizes has: as many as there would be without a cap.
MANY = 1000


def in_two_passes(num_splits):
    def run(**arguments):
        return identity_pre(**arguments, num_splits=num_splits)

    return dataclasses.replace(IDENTITY_PRE, run=run)


@streams
def test_identity_pre(case):
    """By clusters where those hold a token, else in two passes."""
    oracle.check(IDENTITY_PRE, case, *IDENTITY_PRE.inputs(*case.shape, "cuda"))


@few_streams
def test_residual_passed_through(case):
    oracle.check(unmixed.PASSING, case, *IDENTITY_PRE.inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("num_splits", [1, 3, MANY])
@few_streams
def test_two_passes(case, num_splits):
    oracle.check(in_two_passes(num_splits), case, *IDENTITY_PRE.inputs(*case.shape, "cuda"))


@few_streams
def test_observed_gates(case):
    unmixed.check_observed_gates(*case.shape, "cuda")


@few_streams
def test_mixes_are_those_of_the_projection(case):
    """As many rows of it as of no other op, by the first rows of a block's: the same bits."""
    tensors, _ = IDENTITY_PRE.inputs(*case.shape, "cuda")
    n = case.num_streams
    wide = torch.zeros(n * (n + 2), tensors["weight"].shape[1], device="cuda")
    wide[: 2 * n] = tensors["weight"]
    mixes = projection(
        tensors["residual"], wide, norm_weight=tensors["norm_weight"], num_splits=MANY
    )[..., : 2 * n]
    z = mixes.double() * tensors["scale"].double().repeat_interleave(n) + tensors["bias"].double()
    layer_input, post_mix = identity_pre(**tensors, num_splits=MANY, post_eps=0.5)
    torch.testing.assert_close(post_mix, (z[..., n:].sigmoid() + 0.5).float(), rtol=1e-6, atol=1e-6)
    pre_mix = (z[..., :n].sigmoid() + 1e-6).float()
    expected = aggregate(tensors["residual"], pre_mix)
    torch.testing.assert_close(layer_input, expected, rtol=2**-7, atol=2**-7)


@widths
def test_any_width(case):
    tensors, options = IDENTITY_PRE.inputs(*case.shape, "cuda")
    for op in (IDENTITY_PRE, unmixed.PASSING):
        oracle.check(op, case, tensors, options)


@pytest.mark.parametrize("hidden_size", [1280, 100])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes, hidden_size):
    tensors, options = IDENTITY_PRE.inputs((130,), 4, hidden_size, "cuda")
    case = Case(130, 4, hidden_size, "")
    for op in (IDENTITY_PRE, unmixed.PASSING):
        oracle.check(op, case, dtypes.of(tensors), options)


def test_tf32():
    """The same bits as with a weight that has been rounded before; other bits without."""
    tensors, _ = IDENTITY_PRE.inputs((130,), 4, 1280, "cuda")
    tensors["weight"] *= tensors.pop("norm_weight")
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    for num_splits in (None, MANY):
        found, expected, other = (
            identity_pre(**given, num_splits=num_splits, tf32=tf32)
            for given, tf32 in ((tensors, True), (rounded, False), (tensors, False))
        )
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(found[1], other[1])


@pytest.mark.parametrize("value", [0.0, 1e35, 1e19, 1e-19, 1e-38], ids=str)
@pytest.mark.parametrize("op", [IDENTITY_PRE, in_two_passes(MANY)], ids=["one", "two"])
def test_gradients_of_an_extreme_residual(value, op):
    tensors, options = IDENTITY_PRE.inputs((13,), 4, 1280, "cuda")
    tensors["residual"] = (tensors["residual"].sign() * value).bfloat16()
    oracle.check(op, Case(13, 4, 1280, "values of any size"), tensors, options)


@pytest.mark.parametrize("shape", [(130, 4, 1280), (65, 8, 128), (65, 2, 192)], ids=str)
@pytest.mark.parametrize("wanted", unmixed.NAMES)
def test_one_gradient_alone(wanted, shape):
    num_tokens, n, hidden_size = shape
    tensors, options = IDENTITY_PRE.inputs((num_tokens,), n, hidden_size, "cuda")
    upstream = oracle.upstream_of(IDENTITY_PRE, tensors, options)
    every = oracle.evaluate(identity_pre, tensors, options, upstream, IDENTITY_OUTPUTS)
    tensors[wanted].requires_grad_()
    outputs = identity_pre(**tensors, **options)
    torch.autograd.backward(outputs, upstream)
    assert torch.equal(tensors[wanted].grad, every[f"grad_{wanted}"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_strided_gradients():
    tensors, options = IDENTITY_PRE.inputs((65,), 4, 192, "cuda")
    upstream = oracle.upstream_of(unmixed.PASSING, tensors, options)
    arguments = tensors, options
    outputs = unmixed.PASSING.outputs
    expected = oracle.evaluate(unmixed.PASSING.run, *arguments, upstream, outputs)
    spread = [torch.stack((grad, grad), -1)[..., 0] for grad in upstream]
    ours = oracle.evaluate(unmixed.PASSING.run, *arguments, spread, outputs)
    oracle.check_same_bits(ours, expected, "identity_pre, strided gradients:")


@pytest.mark.parametrize("num_splits", [None, MANY])
@pytest.mark.parametrize("num_tokens", [130, 4096])
def test_same_bits_every_run(num_tokens, num_splits):
    op = in_two_passes(num_splits)
    oracle.check_repeatable(op, *op.inputs((num_tokens,), 4, 1280, "cuda"))


def test_gradients_on_or_off():
    tensors, options = IDENTITY_PRE.inputs((130,), 4, 1280, "cuda")
    off = identity_pre(**tensors, **options)
    on = identity_pre(**{name: t.requires_grad_() for name, t in tensors.items()}, **options)
    assert all(torch.equal(a.detach(), b) for a, b in zip(on, off, strict=True))


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    tensors, options = IDENTITY_PRE.inputs(lead, 4, 192, "cuda")
    case = Case(0, 4, 192, "any leading dimensions")
    for op in (IDENTITY_PRE, unmixed.PASSING, in_two_passes(MANY)):
        given = op.inputs(lead, 4, 192, "cuda")
        oracle.check(op, case, *given)
    assert identity_pre(**tensors, **options)[1].shape == (*lead, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulators_of_a_chain(dtype):
    """Two sub-layers, beside the residual passed through, which rounds as often or more."""
    tensors, options = IDENTITY_PRE.inputs((130,), 4, 1280, "cuda")
    residual = tensors.pop("residual").requires_grad_()

    def run(accumulates):
        streams = residual
        for _ in range(2):
            if accumulates:
                given = {"grad_accumulator": GradAccumulator(streams, dtype)}
                layer_input, post_mix = identity_pre(streams, **tensors, **options, **given)
            else:
                given = {}
                layer_input, post_mix, streams = identity_pre(
                    streams, **tensors, **options, passes_residual=True
                )
            streams = identity_post(layer_input.tanh(), streams, post_mix, **given)
        return streams

    ours, plain = run(True), run(False)
    assert torch.equal(ours, plain)
    grad = torch.randn_like(ours)
    (found,) = torch.autograd.grad(ours, residual, grad)
    (expected,) = torch.autograd.grad(plain, residual, grad)
    assert oracle.relative_error(found, expected.double()) < 1e-2
