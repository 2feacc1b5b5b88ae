"""Streams that are not mixed: identity_pre and identity_post, and the mean of the streams."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import oracle
from accumulation import ROUNDED_ONCE, rounding_of
from cases import IDENTITY_POST, IDENTITY_POST_BIAS, IDENTITY_PRE, normal
from tile_mhc import (
    GradAccumulator,
    aggregate,
    config,
    expand,
    identity_post,
    identity_pre,
    post,
    reference,
    selection,
    stream_mean,
)
from tile_mhc.kernels._arch import AMPERE, HOPPER
from tile_mhc.kernels._shapes import (
    CLUSTER_SLOTS,
    CLUSTER_STAGES,
    CLUSTER_TOKENS,
    IDENTITY_BLOCKS,
    PORTABLE_CLUSTER,
    identity_blocks,
    identity_cluster_size,
    identity_columns,
    identity_stages,
    identity_sums,
    identity_warps,
)
from tile_mhc.ops.identity_pre import _passed

NAMES = ("residual", "weight", "scale", "bias", "norm_weight")
EVERY = (0, 1, 2)
SUBSETS = [used for size in EVERY for used in itertools.combinations(EVERY, size + 1)]
F64 = torch.float64


def leaves(dtype=None, lead=(3,), n=4):
    tensors, options = IDENTITY_PRE.inputs(lead, n, 64, "cpu")
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}, options


def hy_v4(streams, weight, scale, bias, layer, *, magnitude, eps, norm_eps):
    """A sub-layer as HY-V4 defines it, stream by stream."""
    n = streams.shape[-2]
    flat = streams.flatten(-2)
    normed = flat / (flat.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    gates = [
        torch.sigmoid((normed * weight[m]).sum(-1) * scale[m // n] + bias[m]) for m in range(2 * n)
    ]
    layer_input = sum((gates[i] + eps).unsqueeze(-1) * streams[..., i, :] for i in range(n))
    out = layer(layer_input)
    return torch.stack(
        [
            (magnitude * gates[n + j] + eps).unsqueeze(-1) * out + streams[..., j, :]
            for j in range(n)
        ],
        -2,
    )


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_sub_layer_of_hy_v4(n):
    tensors, _ = leaves(F64, n=n)
    del tensors["norm_weight"]
    values = list(tensors.values())
    expected = hy_v4(*values, torch.tanh, magnitude=1.5, eps=0.01, norm_eps=0.1)
    layer_input, post_mix = reference.identity_pre(
        *values, norm_eps=0.1, pre_eps=0.01, post_eps=0.01, post_mult=1.5
    )
    found = reference.identity_post(torch.tanh(layer_input), tensors["residual"], post_mix)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, values, grad),
        torch.autograd.grad(expected, values, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", [IDENTITY_POST, IDENTITY_POST_BIAS], ids=str)
def test_identity_post_is_a_post_of_the_identity(op):
    tensors, _ = op.inputs((3,), 4, 64, "cpu")
    eye = torch.eye(4).expand(3, 4, 4)
    upstream = [torch.randn_like(tensors["residual"])]
    found = oracle.evaluate(op.run, tensors, {}, upstream, op.outputs)
    expected = oracle.evaluate(post, tensors, {"comb_mix": eye.contiguous()}, upstream, ["out"])
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_the_gradient_of_the_residual_is_that_of_the_output():
    """The same tensor, on every way: nothing is copied."""
    tensors, _ = IDENTITY_POST.inputs((3,), 4, 64, "cpu")
    residual = tensors["residual"].requires_grad_()
    for wanted in ((), ("layer_output",), ("layer_output", "post_mix")):
        for name in wanted:
            tensors[name].requires_grad_()
        grad = torch.randn_like(residual)
        (found,) = torch.autograd.grad(identity_post(**tensors), residual, grad)
        assert found.data_ptr() == grad.data_ptr()


def test_identity_post_saves_no_streams():
    tensors, _ = IDENTITY_POST.inputs((3,), 4, 64, "cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        identity_post(**{name: t.requires_grad_() for name, t in tensors.items()})
    assert {t.data_ptr() for t in saved} == {
        tensors[name].data_ptr() for name in ("layer_output", "post_mix")
    }


def test_post_eps_and_post_mult():
    tensors, _ = leaves()
    plain = identity_pre(**tensors, post_eps=0.0)[1]
    other = identity_pre(**tensors, post_eps=0.25, post_mult=3.0)[1]
    torch.testing.assert_close(other, 3 * plain + 0.25)


@pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_gradcheck_of_identity_pre(n, norm):
    """The operator with its backward, and with the residual passed, in float64."""
    tensors, _ = leaves(F64, lead=(2,), n=n)
    values = [tensors[name] for name in NAMES[: 5 if norm else 4]]
    options = (0.1, 0.2, 0.3, 2.0, None, False)

    def inputs(given):
        return (*given, *([] if norm else [None]), *options)

    def run(*given):
        return torch.ops.tile_mhc.identity_pre(*inputs(given))[:2]

    def passing(*given):
        return _passed(*inputs(given))

    for function in (run, passing):
        assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_gradcheck_of_identity_post():
    tensors, _ = IDENTITY_POST_BIAS.inputs((2,), 2, 8, "cpu")
    names = ("layer_output", "post_mix", "bias", "residual")
    values = [tensors[name].double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(torch.ops.tile_mhc.identity_post, values)


@pytest.mark.parametrize("used", SUBSETS, ids=str)
def test_any_outputs_used(used):
    """Beside plain autograd in the same dtypes, which rounds the residual's gradient once more."""
    tensors, options = leaves()
    passing = identity_pre(**tensors, **options, passes_residual=True)
    residual = tensors["residual"]
    plain = (*identity_pre(**tensors, **options), residual.view_as(residual))
    assert passing[2].data_ptr() == residual.data_ptr()
    for a, b in zip(passing, plain, strict=True):
        assert torch.equal(a, b)
    upstream = [torch.randn_like(passing[i]) for i in used]
    arguments = {"allow_unused": True, "materialize_grads": True}
    inputs = list(tensors.values())
    ours = torch.autograd.grad([passing[i] for i in used], inputs, upstream, **arguments)
    theirs = torch.autograd.grad([plain[i] for i in used], inputs, upstream, **arguments)
    for name, a, b in zip(tensors, ours, theirs, strict=True):
        if name == "residual":
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(a, b), name
    if used == (2,):
        assert torch.equal(ours[0], upstream[0])


def test_passed_gradient_is_rounded_once():
    tensors, options = leaves()
    outputs = identity_pre(**tensors, **options, passes_residual=True)
    upstream = [torch.randn_like(out) for out in outputs]
    (found,) = torch.autograd.grad(outputs, tensors["residual"], upstream)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    truth = reference.identity_pre(**wide, **options)
    (exact,) = torch.autograd.grad(
        truth, wide["residual"], [grad.double() for grad in upstream[:2]]
    )
    exact = exact + upstream[2].double()
    error = (found.double() - exact).norm()
    assert error <= 1.03 * (exact.bfloat16().double() - exact).norm()


def sub_layer(residual, weight, norm_weight, scale, bias):
    layer_input, post_mix, residual = identity_pre(
        residual, weight, scale, bias, norm_weight=norm_weight, passes_residual=True
    )
    return stream_mean(identity_post(torch.tanh(layer_input), residual, post_mix))


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


READERS = {
    "identity_pre": lambda x, g, **a: identity_pre(x, *g[:3], **a)[0],
    "identity_post": lambda x, g, **a: identity_post(g[3], x, g[4], **a),
    "aggregate": lambda x, g, **a: aggregate(x, g[5], **a),
}
ORDERS = [order for size in (1, 2, 3) for order in itertools.permutations(READERS, size)]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_accumulator(order):
    """The residual's gradient of all readers, in any order, rounded once; the others' bits stay."""
    tensors, _ = leaves()
    del tensors["norm_weight"]
    residual, *gates = tensors.values()
    lead = residual.shape[:-2]
    gates += [normal(*lead, 64, device="cpu").bfloat16(), torch.rand(*lead, 4)]
    gates = [gate.detach().requires_grad_() for gate in (*gates, torch.rand(*lead, 4))]
    upstream = None
    results = []
    for kind in ("accumulator", "autograd", "float64"):
        x, given = residual, gates
        if kind == "float64":
            x = residual.detach().double().requires_grad_()
            given = [gate.detach().double() for gate in gates]
        options = {"grad_accumulator": GradAccumulator(x)} if kind == "accumulator" else {}
        if kind == "float64":
            outputs = [_exact(name, x, given) for name in order]
        else:
            outputs = [READERS[name](x, given, **options) for name in order]
        upstream = upstream or [torch.randn_like(out) for out in outputs]
        grads = [grad.to(out.dtype) for grad, out in zip(upstream, outputs, strict=True)]
        wanted = [x] if kind == "float64" else [x, *given]
        results.append(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    (found, *others), (_, *same), (truth,) = results
    assert oracle.relative_error(found, truth) <= ROUNDED_ONCE * rounding_of(truth)
    for a, b in zip(others, same, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def _exact(name, residual, gates):
    if name == "identity_pre":
        return reference.identity_pre(residual, *gates[:3])[0]
    if name == "identity_post":
        return reference.identity_post(gates[3], residual, gates[4])
    return reference.aggregate(residual, gates[5])


def test_a_chain_of_accumulators():
    """Three sub-layers, each with a buffer of its own."""
    tensors, options = leaves()
    residual = tensors.pop("residual")

    def run(make):
        streams = residual
        for _ in range(3):
            given = make(streams)
            layer_input, post_mix = identity_pre(streams, **tensors, **options, **given)
            streams = identity_post(torch.tanh(layer_input), streams, post_mix, **given)
        return streams

    ours = run(lambda streams: {"grad_accumulator": GradAccumulator(streams)})
    plain = run(lambda streams: {})
    assert torch.equal(ours, plain)
    grad = torch.randn_like(ours)
    (found,) = torch.autograd.grad(ours, residual, grad)
    (expected,) = torch.autograd.grad(plain, residual, grad)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stream_mean(n, dtype):
    """Of an expanded embedding it is the embedding, and its gradient is spread over the streams."""
    hidden = torch.randn(5, 64).to(dtype)
    residual = expand(hidden, n).requires_grad_()
    out = stream_mean(residual)
    # Sums of 16-bit values are exact in float32, those of its own are not.
    exact = dtype != torch.float32
    torch.testing.assert_close(out, hidden, rtol=0 if exact else 2**-22, atol=0)
    grad = torch.randn(5, 64).to(dtype)
    out.backward(grad)
    assert torch.equal(residual.grad, expand((grad.float() / n).to(dtype), n))


def test_stream_mean_is_rounded_once():
    residual = torch.randn(100, 4, 64).bfloat16()
    exact = residual.double().mean(-2)
    assert oracle.relative_error(stream_mean(residual), exact) <= 1.01 * rounding_of(exact)


def test_stream_mean_of_large_streams():
    """A sum in the dtype of the streams would be infinite."""
    residual = torch.full((1, 8, 64), 3e4, dtype=torch.float16)
    assert torch.equal(stream_mean(residual), residual[:, 0])


def test_large_clusters_only_where_every_gpu_of_the_size_has_them(monkeypatch):
    """And not where the bits are to be those of any GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(selection, "_clusters_at_once", lambda size: None)
    for sms, large in ((132, True), (114, True), (112, False), (78, False)):
        monkeypatch.setattr(config, "_device_num_sms", lambda _, sms=sms: sms)
        assert all(selection.has_clusters_of(size) for size in (1, 2, 4, PORTABLE_CLUSTER))
        assert selection.has_clusters_of(16) == large
    for at_once in (7, 0):
        monkeypatch.setattr(selection, "_clusters_at_once", lambda size, n=at_once: n)
        assert selection.has_clusters_of(16) == (at_once > 0)
    monkeypatch.setattr(selection, "_clusters_at_once", lambda size: 7)
    config.set_batch_invariant(True)
    try:
        assert not selection.has_clusters_of(16)
    finally:
        config.set_batch_invariant(False)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_clusters_fit_an_sm(backward, held):
    """Shared memory and registers; a width has clusters of the fewest CTAs that do."""
    for hidden in range(64, 16385, 64):
        size = identity_cluster_size(4, hidden, backward, held, HOPPER)
        assert size <= (16 if backward else PORTABLE_CLUSTER)
        if size == 0:
            continue
        width = hidden // size
        blocks = width // identity_columns(backward)
        assert blocks * identity_columns(backward) * size == hidden
        assert blocks <= IDENTITY_BLOCKS
        warps, each = identity_warps(width, backward), identity_blocks(width, backward)
        assert warps * each == blocks
        # And one for the sums: 255 registers a thread with two blocks, 128 with one.
        assert warps + 1 <= HOPPER.warps(255 if each == 2 else 128)
        stages = identity_stages(size, width, backward, held, HOPPER)
        assert 3 <= stages <= CLUSTER_STAGES
        rows = (4 * (1 + held) + 1) if backward else 4
        ring = stages * CLUSTER_TOKENS * rows * width * 2
        sums = 4 * identity_sums(backward) * (2 * warps + CLUSTER_SLOTS * size)
        assert ring + sums < HOPPER.shared_bytes
    assert identity_cluster_size(2, 256, backward, held, HOPPER) == 0
    assert identity_cluster_size(8, 256, backward, held, HOPPER) == 0
    assert identity_cluster_size(4, 256, backward, held, AMPERE) == 0
