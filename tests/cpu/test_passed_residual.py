"""fused_pre(passes_residual=True): the gradient of the residual that comes back through the op."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases import FUSED_PRE
from tile_mhc import functional
from tile_mhc.ops.fused_pre import _passed

NAMES = ("residual", "weight", "scale", "bias", "norm_weight")
EVERY = (0, 1, 2, 3)
SUBSETS = [used for size in EVERY for used in itertools.combinations(EVERY, size + 1)]


def leaves(*, wide=False):
    tensors, options = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    dtype = torch.float64 if wide else None
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}, options


def by_autograd(residual, **arguments):
    """The same outputs, with autograd left to add the two gradients of the residual."""
    return (*functional.mhc_pre(residual, **arguments), residual.view_as(residual))


def passing(residual, **arguments):
    return functional.mhc_pre(residual, **arguments, passes_residual=True)


def test_outputs_are_those_without():
    tensors, options = leaves()
    *outputs, through = passing(**tensors, **options)
    for a, b in zip(outputs, functional.mhc_pre(**tensors, **options), strict=True):
        assert torch.equal(a, b)
    assert through.data_ptr() == tensors["residual"].data_ptr()
    assert through.shape == tensors["residual"].shape


@pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])
def test_gradcheck(norm):
    tensors, _ = leaves(wide=True)
    values = [tensors[name] for name in NAMES]
    if not norm:
        values[-1] = None

    def run(*inputs):
        inputs = [*inputs, None] if len(inputs) < len(NAMES) else inputs
        return _passed(*inputs, 0.1, 0.2, 0.3, 2.0, 5, None, False)

    wanted = [value for value in values if value is not None]
    assert torch.autograd.gradcheck(run, wanted, fast_mode=True)


@pytest.mark.parametrize("used", SUBSETS, ids=str)
def test_any_outputs_used(used):
    """Beside plain autograd in the same dtypes, which rounds the residual's gradient once more."""
    tensors, options = leaves()
    found, expected = (f(**tensors, **options) for f in (passing, by_autograd))
    upstream = [torch.randn_like(found[i]) for i in used]
    arguments = {"allow_unused": True, "materialize_grads": True}
    inputs = list(tensors.values())
    ours = torch.autograd.grad([found[i] for i in used], inputs, upstream, **arguments)
    theirs = torch.autograd.grad([expected[i] for i in used], inputs, upstream, **arguments)
    for name, a, b in zip(tensors, ours, theirs, strict=True):
        if name == "residual":
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(a, b), name
    if used == (3,):
        assert torch.equal(ours[0], upstream[0])


def test_residual_gradient_is_rounded_once_for_all():
    """Its distance to float64 is that of rounding the float64 sum, given the post's gradient."""
    tensors, options = leaves()
    outputs = passing(**tensors, **options)
    upstream = [torch.randn_like(out) for out in outputs]
    (found,) = torch.autograd.grad(outputs, tensors["residual"], upstream)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    truth = FUSED_PRE.reference(**wide, **options)
    wide_upstream = [grad.double() for grad in upstream]
    (exact,) = torch.autograd.grad(truth, wide["residual"], wide_upstream[:3])
    exact = exact + wide_upstream[3]
    error = (found.double() - exact).norm()
    assert error <= 1.03 * (exact.bfloat16().double() - exact).norm()


def test_other_consumers_of_the_residual():
    """The residual itself, and what came through, read by others too: the sum of all."""
    tensors, options = leaves()
    residual = tensors["residual"]
    layer_input, *_, through = passing(**tensors, **options)
    grad = torch.randn_like(layer_input)
    (alone,) = torch.autograd.grad(layer_input, residual, grad, retain_graph=True)
    uses = (layer_input, residual * 2, through * 4, through.flip(-1) * 8)
    ones = [torch.ones_like(use) for use in uses[1:]]
    (every,) = torch.autograd.grad(uses, residual, (grad, *ones))
    torch.testing.assert_close(every, alone + 14, rtol=2**-7, atol=2**-5)


def sub_layer(residual, weight, norm_weight, scale, bias):
    layer_input, post_mix, comb_mix, residual = functional.mhc_pre(
        residual, weight, scale, bias, norm_weight=norm_weight, passes_residual=True
    )
    return functional.mhc_post(torch.tanh(layer_input), residual, post_mix, comb_mix)


@pytest.mark.parametrize("kind", ["compiled", "checkpointed"])
def test_elsewhere(kind):
    tensors, _ = leaves()
    inputs = [tensors[name] for name in ("residual", "weight", "norm_weight", "scale", "bias")]
    out = sub_layer(*inputs)
    grad = torch.randn_like(out)
    expected = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    if kind == "compiled":
        out = torch.compile(sub_layer, fullgraph=True, backend="aot_eager")(*inputs)
    else:
        out = checkpoint(sub_layer, *inputs, use_reentrant=False)
    found = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_must_be_a_bool():
    tensors, options = leaves()
    with pytest.raises(ValueError, match="fused_pre: passes_residual must be"):
        functional.mhc_pre(**tensors, **options, passes_residual=1)
