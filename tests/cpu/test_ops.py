"""The op layer on CPU: registration, gradients, tracing, layouts, destinations."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import far_apart
import oracle
import replaying
import saturation
import tile_mhc
from cases import (
    AGGREGATE,
    CONTRACT,
    DEFAULT_DTYPES,
    DTYPES,
    EXPAND,
    FUSED_PRE,
    IDENTITY_POST,
    IDENTITY_POST_BIAS,
    IDENTITY_PRE,
    OPS,
    PARAMETERS,
    POST,
    POST_PRE_DELAYED,
    PROJECTION,
    STREAM_MEAN,
    Case,
    operator_calls,
    recompute_inputs,
)
from tile_mhc import _device, config, functional, reference, selection
from tile_mhc.kernels._arch import HOPPER
from tile_mhc.kernels._shapes import ANY_K, BLOCK_K
from tile_mhc.ops import _library

CALLS = sorted(operator_calls((2,), 2, 64, "meta"))
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=str)
LEADS = pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 3), (2, 1, 3, 1)], ids=str)


def test_every_operator_is_checked():
    defined = {
        name.removeprefix("tile_mhc::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tile_mhc::")
    }
    assert defined == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    calls = operator_calls((3, 2), 2, 64, "cpu")
    opcheck(getattr(torch.ops.tile_mhc, name), calls[name])


@EVERY_OP
@LEADS
def test_leading_dimensions(op, lead):
    case = Case(0, 2, 64, "any leading dimensions")
    tensors, options = op.inputs(lead, 2, 64, "cpu")
    ours = oracle.check(op, case, tensors, options)
    for name in op.outputs:
        assert ours[name].shape[: len(lead)] == lead


@EVERY_OP
def test_no_token(op):
    tensors, options = op.inputs((0,), 4, 64, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    ours = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    for name in tensors:
        assert ours[f"grad_{name}"].shape == tensors[name].shape
        if name in PARAMETERS:
            assert not ours[f"grad_{name}"].any(), "a sum over no token is zero"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from(OPS),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([64, 128, 192, 1, 65, 100]),
    st.sampled_from([DEFAULT_DTYPES, *DTYPES]),
)
def test_any_shape(op, lead, n, hidden_size, dtypes):
    case = Case(0, n, hidden_size, "whatever comes")
    tensors, options = op.inputs(lead, n, hidden_size, "cpu")
    tensors = dtypes.of(tensors)
    ours = oracle.check(op, case, tensors, options)
    for name, tensor in tensors.items():
        assert ours[f"grad_{name}"].dtype == tensor.dtype


@EVERY_OP
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_fakes_know_the_dtypes(op, dtypes):
    """Under fake tensors every output and gradient has the dtype that it has without."""
    tensors, options = op.inputs((3,), 4, 65, "cpu")
    tensors = dtypes.of(tensors)
    upstream = oracle.upstream_of(op, tensors, options)
    ours = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        grads = [mode.from_tensor(grad) for grad in upstream]
        traced = oracle.evaluate(op.run, fakes, options, grads, op.outputs)
    for name, value in ours.items():
        assert (traced[name].dtype, traced[name].shape) == (value.dtype, value.shape), name


@EVERY_OP
def test_each_gradient_alone(op):
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    every = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    for wanted in tensors:
        inputs = {name: tensor.detach() for name, tensor in tensors.items()}
        inputs[wanted].requires_grad_()
        outputs = oracle.as_tuple(op.run(**inputs, **options))
        pairs = [p for p in zip(outputs, upstream, strict=True) if p[0].requires_grad]
        torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])
        assert torch.equal(inputs[wanted].grad, every[f"grad_{wanted}"])
        assert all(tensor.grad is None for name, tensor in inputs.items() if name != wanted)


@EVERY_OP
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(op, reentrant):
    """Activation checkpointing lets a backward read its saved tensors once."""
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    names = list(tensors)

    def run(**leaves):
        def plain(*values):
            return op.run(**dict(zip(names, values, strict=True)), **options)

        return checkpoint(plain, *leaves.values(), use_reentrant=reentrant)

    results = [
        {name: leaf.detach().requires_grad_() for name, leaf in tensors.items()} for _ in range(2)
    ]
    for function, leaves in zip((op.run, run), results, strict=True):
        arguments = options if function is op.run else {}
        torch.autograd.backward(oracle.as_tuple(function(**leaves, **arguments)), upstream)
    for name in names:
        assert torch.equal(results[0][name].grad, results[1][name].grad)


@EVERY_OP
def test_no_gradient_wanted(op):
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    outputs = oracle.as_tuple(op.run(**tensors, **options))
    assert not any(out.requires_grad for out in outputs)


@pytest.mark.parametrize("used", range(3), ids=FUSED_PRE.outputs)
def test_one_output_used(used):
    tensors, options = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    ours = functional.mhc_pre(**leaves, **options)[used]
    grad = torch.randn_like(ours)
    arguments = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(ours, list(leaves.values()), grad, **arguments)
    with oracle.gate_terms() as terms:
        other = FUSED_PRE.reference(**wide, **options)[used]
        expected = torch.autograd.grad(other, list(wide.values()), grad.double(), **arguments)
    for name, a, b in zip(leaves, grads, expected, strict=True):
        unit = terms.of(wide[name])
        unit = b.abs() if unit is None else unit.maximum(b.abs())
        rtol = 2**-8 if a.dtype == torch.bfloat16 else 1e-4
        assert ((a.double() - b).abs() <= 1e-5 + rtol * unit).all(), name


def test_another_consumer_of_the_residual():
    """The gradient is the sum of both uses, in whichever order they come."""
    tensors, options = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    residual = tensors["residual"].requires_grad_()
    grad = torch.randn(3, 64).bfloat16()
    layer_input = functional.mhc_pre(**tensors, **options)[0]
    (alone,) = torch.autograd.grad(layer_input, residual, grad)
    for before in (True, False):
        extra = residual * 2 if before else None
        layer_input = functional.mhc_pre(**tensors, **options)[0]
        extra = residual * 2 if extra is None else extra
        (both,) = torch.autograd.grad(
            (layer_input, extra), residual, (grad, torch.ones_like(extra))
        )
        torch.testing.assert_close(both, alone + 2, rtol=2**-7, atol=2**-7)


def test_gradients_on_or_off():
    """norm_weight included: dropping it without a gradient would change evaluation alone."""
    tensors, options = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    off = functional.mhc_pre(**tensors, **options)
    for wanted in tensors:
        inputs = {name: tensor.detach() for name, tensor in tensors.items()}
        inputs[wanted].requires_grad_()
        on = functional.mhc_pre(**inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))
    tensors["norm_weight"] = None
    without = functional.mhc_pre(**tensors, **options)
    assert not torch.equal(without[2], off[2])


@pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_gradcheck_of_fused_pre(n, norm):
    """The operator with the backward it registers, in float64: finite differences of its own."""
    tensors, _ = FUSED_PRE.inputs((2,), n, 8, "cpu")
    leaves = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    if not norm:
        leaves["norm_weight"] = None
    names = [name for name in leaves if leaves[name] is not None]

    def run(*values):
        x = leaves | dict(zip(names, values, strict=True))
        inputs = [x[name] for name in ("residual", "weight", "scale", "bias", "norm_weight")]
        options = (0.1, 0.2, 0.3, 2.0, 5, None, False)
        return torch.ops.tile_mhc.fused_pre(*inputs, *options)[:3]

    assert torch.autograd.gradcheck(run, [leaves[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("wanted", [("residual", "bias"), ("norm_weight",), ("weight", "scale")])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_some_gradients_of_some_outputs_of_fused_pre(used, wanted):
    """The bits of all gradients of all outputs, with zeros for the outputs that are not used."""
    tensors, options = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    upstream = [
        grad if i in used else torch.zeros_like(grad)
        for i, grad in enumerate(oracle.upstream_of(FUSED_PRE, tensors, options))
    ]
    every = oracle.evaluate(FUSED_PRE.run, tensors, options, upstream, FUSED_PRE.outputs)
    leaves = [tensors[name].requires_grad_() for name in wanted]
    outputs = FUSED_PRE.run(**tensors, **options)
    torch.autograd.backward([outputs[i] for i in used], [upstream[i] for i in used])
    for name, leaf in zip(wanted, leaves, strict=True):
        assert torch.equal(leaf.grad, every[f"grad_{name}"])
    assert all(t.grad is None for name, t in tensors.items() if name not in wanted)


TF32_OPS = pytest.mark.parametrize("op", [PROJECTION, CONTRACT, FUSED_PRE, IDENTITY_PRE], ids=str)


@TF32_OPS
def test_tf32_rounds_the_weight(op):
    """A weight of TF32 values gives the same outputs either way, any other one does not."""
    tensors, options = op.inputs((16,), 4, 64, "cpu")
    tensors.pop("norm_weight", None)
    native = oracle.as_tuple(op.run(**tensors, **options))
    rounded = oracle.as_tuple(op.run(**tensors, **options, tf32=True))
    tensors["weight"] = reference.round_to_tf32(tensors["weight"])
    for a, b, c in zip(
        rounded,
        oracle.as_tuple(op.run(**tensors, **options)),
        oracle.as_tuple(op.run(**tensors, **options, tf32=True)),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not all(torch.equal(a, b) for a, b in zip(native, rounded, strict=True))


@TF32_OPS
@pytest.mark.parametrize("tf32", [False, True])
def test_backward_knows_of_tf32(op, tf32, monkeypatch):
    """The switch of the forward reaches reference.projection_backward."""
    asked = []
    original = reference.projection_backward

    def watched(*args, **options):
        asked.append(args[6])
        return original(*args, **options)

    monkeypatch.setattr(reference, "projection_backward", watched)
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    oracle.as_tuple(op.run(**leaves, **options, tf32=tf32))[0].float().sum().backward()
    assert asked == [tf32]


def sub_layer(residual, weight, norm_weight, scale, bias):
    layer_input, post_mix, comb_mix = functional.mhc_pre(
        residual, weight, scale, bias, norm_weight=norm_weight
    )
    return functional.mhc_post(torch.tanh(layer_input), residual, post_mix, comb_mix)


def test_compiled_sub_layer():
    tensors, _ = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    grad = torch.randn(3, 4, 64).bfloat16()
    results = []
    for function in (sub_layer, torch.compile(sub_layer, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["expand", "contract", "recompute", "out"])
def test_compiled(name):
    """The ops that a sub-layer does not use."""

    def run(function, *arguments):
        if name == "recompute":
            layer_inputs, residuals = function(*arguments)
            return layer_inputs + residuals
        return [function(*arguments)]

    if name == "recompute":
        function, arguments = tile_mhc.recompute, recompute_inputs(2, 1, (3,), 4, 64, "cpu")
    elif name == "out":
        tensors, _ = POST.inputs((3,), 4, 64, "cpu")
        arguments = (*tensors.values(), torch.empty(3, 4, 64, dtype=torch.bfloat16))

        def function(*values):
            return tile_mhc.post(*values[:-1], out=values[-1])
    elif name == "expand":
        function, arguments = tile_mhc.expand, (torch.randn(3, 64).bfloat16(), 4)
    else:
        tensors, _ = next(op for op in OPS if op.name == name).inputs((3,), 4, 64, "cpu")
        function, arguments = tile_mhc.contract, tuple(tensors.values())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = [tensor.clone() for tensor in run(compiled, *arguments)]
    eager = run(function, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


STREAM_NAMES = ("hidden", "residual", "layer_output")


@EVERY_OP
def test_strided_parameters_and_mixes(op):
    """Everything but the streams may have any layout."""
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    strided = {
        name: tensor if name in STREAM_NAMES else torch.stack((tensor, tensor), -1)[..., 0]
        for name, tensor in tensors.items()
    }
    upstream = oracle.upstream_of(op, tensors, options)
    expected = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    spread = [torch.stack((grad, grad), -1)[..., 0] for grad in upstream]
    ours = oracle.evaluate(op.run, strided, options, spread, op.outputs)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@EVERY_OP
def test_strided_streams_are_refused(op):
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    for name in set(tensors) & set(STREAM_NAMES):
        spread = torch.stack((tensors[name], tensors[name]), -1)[..., 0]
        message = f"{op.run.__name__}: {name} must be contiguous"
        with pytest.raises(tile_mhc.ShapeError, match=message):
            op.run(**{**tensors, name: spread}, **options)


def test_mix_of_a_last_axis_of_one():
    for op, name in ((AGGREGATE, "pre_mix"), (POST, "post_mix"), (IDENTITY_POST, "post_mix")):
        tensors, _ = op.inputs((3,), 4, 64, "cpu")
        expected = op.run(**tensors)
        tensors[name] = tensors[name].unsqueeze(-1).requires_grad_()
        out = op.run(**tensors)
        assert torch.equal(out, expected)
        out.float().sum().backward()
        assert tensors[name].grad.shape == (3, 4, 1)


WITH_OUT = [EXPAND, AGGREGATE, POST, IDENTITY_POST, IDENTITY_POST_BIAS, STREAM_MEAN]


@pytest.mark.parametrize("op", WITH_OUT, ids=str)
def test_out(op):
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    expected = op.run(**tensors, **options)
    out = torch.empty_like(expected)
    assert op.run(**tensors, **options, out=out) is out
    assert torch.equal(out, expected)


def test_out_beside_a_gradient_is_allowed_without_grad():
    tensors, _ = AGGREGATE.inputs((3,), 4, 64, "cpu")
    tensors["residual"].requires_grad_()
    with torch.no_grad():
        out = tile_mhc.aggregate(**tensors, out=torch.empty(3, 64, dtype=torch.bfloat16))
    assert torch.equal(out, tile_mhc.aggregate(**tensors))


def test_out_next_to_an_input_in_one_storage():
    """Neighbours do not overlap."""
    storage = torch.randn(3 * 64 * 5).bfloat16()
    residual, out = storage[: 3 * 4 * 64].view(3, 4, 64), storage[3 * 4 * 64 :].view(3, 64)
    mix = torch.rand(3, 4)
    expected = tile_mhc.aggregate(residual.clone(), mix)
    assert torch.equal(tile_mhc.aggregate(residual, mix, out=out), expected)


@pytest.mark.parametrize(("layers", "posts"), [(1, 0), (1, 1), (3, 2), (3, 3)])
def test_recompute(layers, posts):
    initial, pre, outputs, post_mixes, combs = recompute_inputs(layers, posts, (3,), 4, 64, "cpu")
    destinations = [torch.empty(3, 4, 64, dtype=torch.bfloat16) for _ in range(posts)]
    layer_inputs, residuals = tile_mhc.recompute(
        initial, pre, outputs, post_mixes, combs, residuals=destinations
    )
    assert all(a is b for a, b in zip(residuals, destinations, strict=True))
    residual = initial
    for layer in range(layers):
        assert torch.equal(layer_inputs[layer], tile_mhc.aggregate(residual, pre[layer]))
        if layer < posts:
            residual = tile_mhc.post(outputs[layer], residual, post_mixes[layer], combs[layer])
            assert torch.equal(residuals[layer], residual)


def test_recompute_of_delayed_mixes():
    """Of DeepSeek-V4.1: each layer input by the pre_mix that the boundary before has made."""
    tensors, _ = POST_PRE_DELAYED.inputs((3,), 4, 64, "cpu")
    gates = [tensors[name] for name in ("weight", "scale", "bias")]
    initial, first = tensors["residual"], tensors["pre_mix"]
    layer_input, pre_mix, post_mix, comb_mix = tile_mhc.fused_pre(initial, *gates, pre_mix=first)
    streams, found = initial, ([layer_input], [])
    used: tuple[list, ...] = ([first], [], [], [])
    for _ in range(3):
        output = layer_input.sin()
        for column, value in zip(used, (pre_mix, output, post_mix, comb_mix), strict=True):
            column.append(value)
        streams, layer_input, pre_mix, post_mix, comb_mix = tile_mhc.post_pre(
            output, streams, post_mix, comb_mix, *gates, pre_mix=pre_mix
        )
        found[0].append(layer_input)
        found[1].append(streams)
    made = tile_mhc.recompute(initial, *used)
    for theirs, ours in zip(found, made, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_of_normed_inputs(dtype):
    inputs = recompute_inputs(3, 2, (3,), 4, 64, "cpu")
    weights = [torch.randn(64).to(dtype) for _ in range(3)]
    plain = tile_mhc.recompute(*inputs)
    normed = tile_mhc.recompute(*inputs, layer_norm_weights=weights, layer_norm_eps=1e-3)
    for x, weight, y in zip(plain[0], weights, normed[0], strict=True):
        wide = x.double()
        factor = (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        torch.testing.assert_close(y.double(), wide * factor * weight, rtol=2**-8, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], normed[1], strict=True))


@EVERY_OP
def test_shapes_without_data(op):
    """Meta tensors go through: the fakes are enough."""
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    expected = oracle.as_tuple(op.run(**tensors, **options))
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    for a, b in zip(oracle.as_tuple(op.run(**meta, **options)), expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_destinations_without_data(fake):
    """No address, so nothing that could overlap."""
    with FakeTensorMode() if fake else torch.device("meta"):
        for op in (EXPAND, AGGREGATE, POST):
            tensors, options = op.inputs((3,), 4, 64, "cpu" if fake else "meta")
            out = torch.empty_like(op.run(**tensors, **options))
            assert op.run(**tensors, **options, out=out) is out
        inputs = recompute_inputs(2, 1, (3,), 4, 64, "cpu" if fake else "meta")
        layer_inputs, residuals = tile_mhc.recompute(*inputs)
        assert [out.shape for out in (*layer_inputs, *residuals)] == [(3, 64)] * 2 + [(3, 4, 64)]


def test_first_order_gradient_that_keeps_its_graph():
    """A gradient of the gradient is refused where it is taken, not where it might be."""
    tensors, options = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    grads = []
    for create_graph in (False, True):
        loss = sum(out.float().sum() for out in FUSED_PRE.run(**tensors, **options))
        grads.append(torch.autograd.grad(loss, leaves, create_graph=create_graph))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_recompute_records_no_gradient():
    inputs = recompute_inputs(1, 1, (3,), 4, 64, "cpu")
    inputs[0].requires_grad_()
    layer_inputs, residuals = tile_mhc.recompute(*inputs)
    assert not any(out.requires_grad for out in (*layer_inputs, *residuals))


def prepared(monkeypatch, schema, function):
    """What runs behind CUDA, on CPU tensors: their device has no index."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(_device, "limits_of", lambda _: HOPPER)
    return _library._prepared(schema, function, None, tile_mhc.errors.STREAM_ALIGNMENT)


def test_kernels_get_aligned_inputs(monkeypatch):
    storage = torch.arange(65.0)
    launch = prepared(monkeypatch, "op(Tensor a, Tensor b, int c) -> Tensor", lambda *args: args)
    shifted, aligned, number = launch(storage[1:], storage[:64], 3)
    assert shifted.data_ptr() % 32 == 0
    assert torch.equal(shifted, storage[1:])
    assert aligned.data_ptr() == storage.data_ptr()
    assert number == 3


def test_temporaries_are_apart_and_aligned():
    shapes = [(3, 5), (1, 64), (130, 24), (7, 1), (2, 2)]
    tensors = _library.temporaries(torch.empty(2, dtype=torch.bfloat16), *shapes)
    for value, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() - tensors[0].data_ptr()) % 256 == 0
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(tensors))


@EVERY_OP
def test_eager_autograd_is_the_operators(op, monkeypatch):
    """Around the operator as in it, which is what torch.compile traces."""
    tensors, options = op.inputs((3,), 4, 64, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    eager = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    traced = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    assert eager.keys() == traced.keys()
    assert all(torch.equal(eager[name], traced[name]) for name in eager)


def test_shifted_out_is_refused(monkeypatch):
    storage = torch.zeros(65)
    schema = "op_out(Tensor a, Tensor(a!) out) -> ()"
    launch = prepared(monkeypatch, schema, lambda a, out: out.copy_(a))
    with pytest.raises(tile_mhc.ShapeError, match="op_out: out must start at a multiple of 16"):
        launch(torch.ones(64), storage[1:])
    assert not storage.any()
    launch(torch.ones(61), storage[4:])
    assert storage[4:].all()


def test_out_operators_end_in_their_outs():
    """What `_prepared` goes by: the other mutating operators take lists, or end in `_into`."""
    for name in CALLS:
        if name.endswith("_into"):
            continue
        schema = getattr(torch.ops.tile_mhc, name).default._schema
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        if name == "recompute":
            assert written == ["layer_inputs", "residuals"]
        elif name.endswith(("_out", "_accumulate", "_add")):
            assert written
            assert [a.name for a in schema.arguments[-len(written) :]] == written, name
        else:
            assert not written, name


def test_import_brings_in_neither_compiler_nor_transformers():
    code = (
        "import sys, tile_mhc, tile_mhc.functional, tile_mhc.reference\n"
        "heavy = ('tilelang', 'tvm', 'transformers', 'triton')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("hidden_size", [64, 2560, 16384])
@pytest.mark.parametrize("num_splits", [None, 1, 3, 1000])
@pytest.mark.parametrize(
    ("blocks_per_split", "block"),
    [(selection.blocks_per_split, BLOCK_K), (selection.any_blocks_per_split, ANY_K)],
    ids=["fast", "any"],
)
def test_batch_invariant_split_depends_on_the_width_alone(
    hidden_size, num_splits, blocks_per_split, block, monkeypatch
):
    def splits():
        size = 4 * hidden_size
        found = set()
        for num_sms in (1, 7, 132):
            monkeypatch.setattr(config, "get_num_sms", lambda count=num_sms: count)
            for num_tokens in (1, 128, 129, 4096, 10**6):
                with replaying.on_architecture(HOPPER):
                    found.add(blocks_per_split(num_tokens, size, num_splits))
        return found

    assert len(splits()) > 1 or hidden_size == 64 or num_splits == 1
    config.set_batch_invariant(True)
    try:
        (blocks,) = splits()
    finally:
        config.set_batch_invariant(False)
    splits_of_k = -(-4 * hidden_size // block // blocks)
    assert num_splits is None or splits_of_k <= num_splits


@pytest.mark.parametrize("bad", [1, "yes", None], ids=repr)
def test_bad_batch_invariant(bad):
    with pytest.raises(ValueError, match="set_batch_invariant: enabled must be True or False; got"):
        config.set_batch_invariant(bad)
    assert config.get_batch_invariant() is False


def test_gradients_of_saturated_gates():
    saturation.check_split_mixes("cpu")
    saturation.check_head_mix("cpu")
    saturation.check_fused_pre("cpu")


@pytest.mark.parametrize("gap", far_apart.GAPS)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorn_without_eps(n, gap):
    for repeat in far_apart.REPEATS:
        far_apart.check(n, gap, repeat, "cpu")


def test_fused_pre_without_eps():
    far_apart.check_fused_pre((13, 4, 64), "cpu")
