"""The boundary as one op: autograd, main_grad and accumulators around it, on the reference."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import oracle
from cases import DELAYED_PRE, FUSED_PRE, POST_PRE, POST_PRE_DELAYED, normal
from tile_mhc import (
    GradAccumulator,
    ShapeError,
    UnsupportedError,
    fused_pre,
    post,
    post_pre,
    reference,
)

BOTH = pytest.mark.parametrize("op", [POST_PRE, POST_PRE_DELAYED], ids=str)
EVERY = pytest.mark.parametrize("op", [DELAYED_PRE, POST_PRE, POST_PRE_DELAYED], ids=str)
OF_POST = ("layer_output", "residual", "post_mix", "comb_mix")
INPUTS = (*OF_POST, "weight", "scale", "bias", "pre_mix", "layer_bias", "norm_weight")


def leaves(op, n=4, hidden_size=64):
    tensors, options = op.inputs((3,), n, hidden_size, "cpu")
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, options


def separate(tensors, options):
    tensors = dict(tensors)
    streams = post(*(tensors.pop(name) for name in OF_POST), bias=tensors.pop("layer_bias", None))
    return streams, *fused_pre(streams, **tensors, **options)


@BOTH
def test_outputs_are_those_of_the_two_ops(op):
    tensors, options = leaves(op)
    tensors["layer_bias"] = torch.randn(64)
    for a, b in zip(post_pre(**tensors, **options), separate(tensors, options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("delayed", [False, True], ids=["V4", "V4.1"])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "bias and norm"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_gradcheck(n, more, delayed):
    """The operator with the backward it registers, in float64: finite differences of its own."""
    op = POST_PRE_DELAYED if delayed else POST_PRE
    tensors, _ = op.inputs((2,), n, 5, "cpu")
    tensors["layer_bias"] = normal(5, device="cpu")
    if not more:
        del tensors["layer_bias"], tensors["norm_weight"]
    names = [name for name in INPUTS if name in tensors]

    def run(*values):
        given = dict(zip(names, values, strict=True))
        inputs = [given.get(name) for name in INPUTS]
        outputs = torch.ops.tile_mhc.post_pre(
            *inputs, None, 0.1, 0.2, 0.3, 2.0, 5, 1e-6, None, False
        )
        return outputs[:5] if delayed else (*outputs[:2], *outputs[3:5])

    values = [tensors[name].double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@EVERY
def test_any_outputs_used(op):
    """The gradients are those with zeros for the outputs that are not used."""
    tensors, options = leaves(op)
    upstream = oracle.upstream_of(op, tensors, options)
    count = len(op.outputs)
    for size in (1, 2, count - 1):
        for used in itertools.combinations(range(count), size):
            outputs = op.run(**tensors, **options)
            grads = [g if i in used else torch.zeros_like(g) for i, g in enumerate(upstream)]
            expected = torch.autograd.grad(outputs, list(tensors.values()), grads)
            outputs = op.run(**tensors, **options)
            found = torch.autograd.grad(
                [outputs[i] for i in used], list(tensors.values()), [upstream[i] for i in used]
            )
            for name, a, b in zip(tensors, found, expected, strict=True):
                assert torch.equal(a, b), (used, name)


@BOTH
def test_gradients_of_the_streams_are_rounded_once(op):
    """Of residual and layer_output: as far from float64 as a rounding of it, no further."""
    tensors, options = op.inputs((64,), 4, 64, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    ours = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    truth, _ = oracle.terms_of(op, tensors, options, upstream, ours["streams"])
    for name in ("grad_residual", "grad_layer_output"):
        best = oracle.relative_error(truth[name].bfloat16(), truth[name])
        assert oracle.relative_error(ours[name], truth[name]) <= best * (1 + 1e-3)


@pytest.mark.parametrize(
    ("op", "passes"),
    [(DELAYED_PRE, False), (DELAYED_PRE, True), (POST_PRE, False), (POST_PRE_DELAYED, False)],
    ids=["delayed_pre", "passing", "post_pre", "post_pre_delayed"],
)
def test_main_grad(op, passes):
    """What autograd gives, added to what is there; beside an accumulator where there is one."""
    tensors, options = leaves(op)
    options |= {"passes_residual": True} if passes else {}
    outputs = op.run(**tensors, **options)
    upstream = [torch.randn_like(out) for out in outputs]
    expected = dict(
        zip(tensors, torch.autograd.grad(outputs, list(tensors.values()), upstream), strict=True)
    )
    given = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    for name in ("weight", "scale", "bias", "norm_weight"):
        given[name] = torch.nn.Parameter(given[name].detach())
        given[name].main_grad = torch.ones_like(given[name])
        given[name].grad_added_to_main_grad = False
    if op is not DELAYED_PRE:
        options["grad_accumulator"] = GradAccumulator(given["residual"])
    torch.autograd.backward(op.run(**given, **options), upstream)
    for name, tensor in given.items():
        if hasattr(tensor, "main_grad"):
            assert tensor.grad_added_to_main_grad
            torch.testing.assert_close(tensor.main_grad, expected[name] + 1)
        else:
            torch.testing.assert_close(tensor.grad, expected[name])


@BOTH
def test_two_boundaries_and_an_accumulator(op):
    """The streams between two boundaries are an output, the next one's residual, and read again."""
    tensors, options = leaves(op)
    first = post_pre(**tensors, **options)
    streams = first[0]
    mixes = first[2:] if op is POST_PRE_DELAYED else (None, *first[2:])
    accumulator = GradAccumulator(streams)
    rest = {k: v for k, v in tensors.items() if k not in (*OF_POST, "pre_mix")}
    second = post_pre(
        torch.tanh(first[1]), streams, *mixes[1:], **rest, **options, pre_mix=mixes[0],
        grad_accumulator=accumulator,
    )  # fmt: skip
    loss = sum(out.float().square().sum() for out in second) + streams.float().sin().sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    first = separate(tensors, options)
    streams = first[0]
    mixes = first[2:] if op is POST_PRE_DELAYED else (None, *first[2:])
    values = dict(zip(OF_POST, (torch.tanh(first[1]), streams, *mixes[1:]), strict=True))
    second = separate({**values, **rest, "pre_mix": mixes[0]}, options)
    loss = sum(out.float().square().sum() for out in second) + streams.float().sin().sum()
    for name, a, b in zip(
        tensors, grads, torch.autograd.grad(loss, list(tensors.values())), strict=True
    ):
        error = (a - b).float().norm() / b.float().norm()
        assert error < 2e-2, name


def test_a_pre_mix_without_gradient():
    """Its gradient is not made; the others are as they were."""
    tensors, options = leaves(DELAYED_PRE)
    outputs = fused_pre(**tensors, **options)
    upstream = [torch.randn_like(out) for out in outputs]
    expected = torch.autograd.grad(outputs, list(tensors.values()), upstream)
    tensors["pre_mix"].requires_grad_(False)
    torch.autograd.backward(fused_pre(**tensors, **options), upstream)
    for (name, tensor), grad in zip(tensors.items(), expected, strict=True):
        assert (tensor.grad is None) if name == "pre_mix" else torch.equal(tensor.grad, grad)


@EVERY
def test_mixes_of_a_last_axis_of_one(op):
    tensors, options = leaves(op)
    expected = op.run(**tensors, **options)
    names = [name for name in ("pre_mix", "post_mix") if name in tensors]
    for name in names:
        tensors[name] = tensors[name].detach().unsqueeze(-1).requires_grad_()
    outputs = op.run(**tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    sum(out.float().sum() for out in outputs).backward()
    assert all(tensors[name].grad.shape == (3, 4, 1) for name in names)


@pytest.mark.parametrize("used", [(0, 1, 2, 3, 4), (4,), (0, 4)], ids=str)
def test_residual_passed_through_a_delayed_pre(used):
    tensors, options = leaves(DELAYED_PRE)
    found = fused_pre(**tensors, **options, passes_residual=True)
    assert found[-1].data_ptr() == tensors["residual"].data_ptr()
    plain = (*fused_pre(**tensors, **options), tensors["residual"].view(3, 4, 64))
    upstream = [torch.randn_like(plain[i]) for i in used]
    inputs, more = list(tensors.values()), {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad([found[i] for i in used], inputs, upstream, **more)
    theirs = torch.autograd.grad([plain[i] for i in used], inputs, upstream, **more)
    for name, a, b in zip(tensors, ours, theirs, strict=True):
        if name == "residual":
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(a, b), name


@BOTH
def test_compiled(op):
    def run(*values):
        tensors = dict(zip(names, values, strict=True))
        return tuple(out.float() * 2 for out in post_pre(**tensors, **options))

    tensors, options = leaves(op)
    names = list(tensors)
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        outputs = function(*tensors.values())
        grads = [torch.full_like(out, 0.5) for out in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, list(tensors.values()), grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", [FUSED_PRE, DELAYED_PRE, POST_PRE, POST_PRE_DELAYED], ids=str)
def test_norm_of_the_layer_input(op):
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    layer_input = op.outputs.index("layer_input")
    norm = torch.rand(64) + 0.5
    plain = op.run(**tensors, **options)
    normed = op.run(**tensors, **options, layer_norm_weight=norm, layer_norm_eps=0.25)
    for i, (a, b) in enumerate(zip(normed, plain, strict=True)):
        expected = reference.input_norm(b, norm, eps=0.25) if i == layer_input else b
        assert torch.equal(a, expected), op.outputs[i]
    tensors["scale"].requires_grad_()
    with torch.no_grad():
        again = op.run(**tensors, **options, layer_norm_weight=norm, layer_norm_eps=0.25)
    assert torch.equal(again[layer_input], normed[layer_input])


@pytest.mark.parametrize("op", [FUSED_PRE, DELAYED_PRE], ids=str)
def test_passed_residual_beside_a_norm_of_the_layer_input(op):
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    options |= {"layer_norm_weight": torch.rand(64)}
    *outputs, passed = op.run(**tensors, **options, passes_residual=True)
    assert passed.data_ptr() == tensors["residual"].data_ptr()
    assert all(map(torch.equal, outputs, op.run(**tensors, **options)))
    with pytest.raises(ShapeError, match="fused_pre: passes_residual must be True or False"):
        op.run(**tensors, **options, passes_residual=1)


@pytest.mark.parametrize("name", ["post_pre", "normed_pre"])
def test_operators_refuse_the_gradient_of_a_norm_by_themselves(name):
    tensors, _ = POST_PRE.inputs((3,), 4, 64, "cpu")
    tensors["scale"].requires_grad_()
    norm = torch.rand(64)
    names = INPUTS if name == "post_pre" else ("residual", "weight", "scale", "bias", "", "")
    inputs = [tensors.get(name) for name in names]
    operator = getattr(torch.ops.tile_mhc, name)
    with pytest.raises(UnsupportedError, match="layer_norm_weight must be None"):
        operator(*inputs, norm, *[1e-6] * 3, 1.0, 5, 1e-6, None, False)


@BOTH
def test_flops_are_those_of_the_two_ops(op):
    tensors, options = leaves(op)
    counts = []
    for run in (post_pre, lambda **t: separate(t, options)):
        arguments = options if run is post_pre else {}
        with FlopCounterMode(display=False) as counter:
            outputs = run(**tensors, **arguments)
            torch.autograd.grad(outputs, list(tensors.values()), outputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@BOTH
def test_no_token(op):
    tensors, options = op.inputs((0,), 4, 64, "cpu")
    tensors["layer_bias"] = torch.randn(64)
    given = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = post_pre(**given, **options)
    sum(out.sum() for out in outputs).backward()
    assert [out.shape[0] for out in outputs] == [0] * len(outputs)
    assert not any(given[name].grad.any() for name in ("weight", "scale", "bias", "layer_bias"))
