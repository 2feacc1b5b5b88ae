"""The specification itself: closed forms, autograd, invariants, extreme values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import far_apart
import oracle
import saturation
from cases import (
    CONTRACT,
    DTYPES,
    FUSED_PRE,
    IDENTITY_POST,
    IDENTITY_POST_BIAS,
    IDENTITY_PRE,
    OPS,
    POST,
    POST_BIAS,
    POST_PRE,
    POST_PRE_DELAYED,
    PROJECTION,
    SPLIT_MIXES,
    STREAM_MEAN,
)
from tile_mhc import reference

F64 = torch.float64
STREAMS = pytest.mark.parametrize("n", [2, 4, 8])
quick = settings(max_examples=25, deadline=None, derandomize=True)
num_streams = st.sampled_from([2, 4, 8])
num_tokens = st.integers(0, 5)


def wide(op, lead, n, hidden_size=3):
    """The inputs of an op in float64."""
    tensors, options = op.inputs(lead, n, hidden_size, "cpu")
    return {name: tensor.double() for name, tensor in tensors.items()}, options


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", [2, 4])
def test_gradcheck(op, n):
    tensors, options = wide(op, (2,), n)
    names = list(tensors)

    def run(*leaves):
        return op.reference(**dict(zip(names, leaves, strict=True)), **options)

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert gradcheck(run, leaves, fast_mode=True)


def fused_pre_backward(grads, tensors, options, tf32=False):
    """The closed form's gradients, in the order of `tensors`."""
    inputs = [tensors.get(name) for name in ("residual", "weight", "scale", "bias", "norm_weight")]
    steps = (options["post_mult"], options["sinkhorn_repeat"], tf32)
    saved = reference.fused_pre_with_mixes(*inputs, 1e-6, 1e-6, 1e-6, *steps)[3:]
    results = reference.fused_pre_backward(*grads, *inputs, *saved, 1e-6, 1e-6, *steps)
    by_name = dict(
        zip(("residual", "weight", "scale", "bias", "norm_weight"), results, strict=True)
    )
    return [by_name[name] for name in tensors]


def identity_pre_backward(grads, tensors, options):
    names = ("residual", "weight", "scale", "bias", "norm_weight")
    inputs = [tensors[name] for name in names]
    given = (1e-6, options["post_eps"], options["post_mult"])
    saved = reference.identity_pre_with_mixes(*inputs, 1e-6, *given)[2:]
    results = reference.identity_pre_backward(*grads, *inputs, *saved, given[0], given[2])
    by_name = dict(zip(names, results, strict=True))
    return [by_name[name] for name in tensors]


def identity_post_backward(grads, tensors):
    """That of the residual is the upstream one."""
    inputs = [tensors.get(name) for name in ("layer_output", "post_mix", "bias")]
    results = reference.identity_post_backward(*grads, *inputs)
    by_name = dict(zip(("layer_output", "post_mix", "bias"), results, strict=True))
    return [by_name.get(name, grads[0]) for name in tensors]


def delayed_pre_backward(grads, tensors, options):
    names = ("residual", "weight", "scale", "bias", "pre_mix", "norm_weight")
    inputs = [tensors[name] for name in names]
    steps = (options["post_mult"], options["sinkhorn_repeat"])
    saved = reference.delayed_pre_with_mixes(*inputs, 1e-6, 1e-6, 1e-6, *steps)[4:]
    results = reference.delayed_pre_backward(*grads, *inputs, *saved, 1e-6, 1e-6, *steps)
    by_name = dict(zip(names, results, strict=True))
    return [by_name[name] for name in tensors]


def post_pre_backward(grads, tensors, options):
    names = ("layer_output", "residual", "post_mix", "comb_mix", "weight", "scale", "bias")
    names = (*names, "pre_mix", "layer_bias", "norm_weight")
    inputs = [tensors.get(name) for name in names]
    steps = (options["post_mult"], options["sinkhorn_repeat"])
    eps = (1e-6, 1e-6, 1e-6)
    outputs = reference.post_pre_with_mixes(*inputs, None, *eps, *steps, 1e-6)
    if len(grads) == 4:
        grads = (*grads[:2], None, *grads[2:])
    saved = (outputs[0], *outputs[5:])
    results = reference.post_pre_backward(*grads, *inputs, *saved, *eps[1:], *steps)
    by_name = dict(zip(names, results, strict=True))
    return [by_name[name] for name in tensors]


def backward_of(op, tensors, options):
    """(closed-form gradients, autograd's) for the same random upstream gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = op.reference(**leaves, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    grads = [torch.randn_like(out) for out in outputs]
    expected = torch.autograd.grad(outputs, list(leaves.values()), grads)
    if op.name == "projection":
        mixes, inv_rms = reference.projection_with_rms(**tensors, norm_eps=1e-6)
        ours = reference.projection_backward(*grads, *tensors.values(), mixes, inv_rms)
    elif op.name == "split_mixes":
        ours = reference.split_mixes_backward(
            *grads, *tensors.values(), options["num_streams"], options["post_mult"]
        )
    elif op.name == "sinkhorn":
        ours = (reference.sinkhorn_backward(*grads, *tensors.values(), **options, eps=1e-6),)
    elif op.name == "fused_pre":
        ours = fused_pre_backward(grads, tensors, options)
    elif op.name == "delayed_pre":
        ours = delayed_pre_backward(grads, tensors, options)
    elif op is IDENTITY_PRE:
        ours = identity_pre_backward(grads, tensors, options)
    elif op in (IDENTITY_POST, IDENTITY_POST_BIAS):
        ours = identity_post_backward(grads, tensors)
    elif op is STREAM_MEAN:
        ours = (reference.stream_mean_backward(*grads, tensors["residual"].shape[-2]),)
    elif op.rounds:
        ours = post_pre_backward(grads, tensors, options)
    elif op.name == "expand":
        ours = (reference.expand_backward(*grads),)
    elif op in (POST, POST_BIAS):
        ours = reference.post_backward(*grads, *tensors.values())
        ours = [grad for grad in ours if grad is not None]  # of a bias that is not there
    else:
        ours = getattr(reference, f"{op.name}_backward")(*grads, *tensors.values())
    return ours, expected


@pytest.mark.parametrize("lead", [(3,), (2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op is not CONTRACT], ids=str)
@STREAMS
def test_backward_is_autograd(op, n, lead):
    ours, expected = backward_of(op, *wide(op, lead, n))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op is not CONTRACT], ids=str)
def test_backward_rounds_once_to_the_dtype_of_its_input(op, dtypes):
    """The gradients of float32 copies, rounded: nothing is summed in what it is stored in."""
    tensors, options = op.inputs((5,), 4, 65, "cpu")
    tensors = dtypes.of(tensors)
    state = torch.get_rng_state()
    ours, _ = backward_of(op, tensors, options)
    torch.set_rng_state(state)
    wide_tensors = {name: tensor.double() for name, tensor in tensors.items()}
    outputs = op.reference(**tensors, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    grads = [torch.randn_like(out).double() for out in outputs]
    streams = outputs[0] if op.rounds else None
    expected, terms = oracle.terms_of(op, wide_tensors, options, grads, streams)
    for (name, tensor), mine in zip(tensors.items(), ours, strict=True):
        assert mine.dtype == tensor.dtype
        exact = expected[f"grad_{name}"]
        unit = torch.finfo(mine.dtype).eps
        # Half a unit of the rounding, and float32's error.
        size = exact.abs().max()
        if f"grad_{name}" in terms:
            size = terms[f"grad_{name}"].maximum(size)
        bound = 0.51 * unit * exact.abs() + 2e-6 * size
        assert ((mine.double() - exact).abs() <= bound).all()


@STREAMS
def test_fused_pre_backward_without_norm_weight(n):
    tensors, options = wide(FUSED_PRE, (3,), n)
    del tensors["norm_weight"]
    ours, expected = backward_of(FUSED_PRE, tensors, options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    grads = [torch.randn(3, 3), torch.randn(3, n), torch.randn(3, n, n)]
    no_norm = [tensors["residual"], tensors["weight"], tensors["scale"], tensors["bias"], None]
    saved = reference.fused_pre_with_mixes(*no_norm, 1e-6, 1e-6, 1e-6, 2.0, 5)[3:]
    assert reference.fused_pre_backward(*grads, *no_norm, *saved, 1e-6, 1e-6, 2.0, 5)[4] is None


def test_fused_pre_backward_rounds_the_residual_once():
    """Its bfloat16 gradient is the float32 one rounded; of two rounded parts the sum is not."""
    tensors, options = FUSED_PRE.inputs((64,), 4, 64, "cpu")
    grads = [torch.randn(64, 64), torch.randn(64, 4), torch.randn(64, 4, 4)]
    once = fused_pre_backward(grads, tensors, options)[0]
    leaves = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    outputs = reference.fused_pre(**leaves, **options)
    (truth,) = torch.autograd.grad(outputs, leaves["residual"], [grad.double() for grad in grads])
    best = (truth.bfloat16().double() - truth).norm()
    assert once.dtype == torch.bfloat16
    assert (once.double() - truth).norm() <= best * (1 + 1e-3)


def test_projection_backward_without_norm_weight():
    tensors, _ = wide(PROJECTION, (3,), 4)
    leaves = [tensors[name].requires_grad_() for name in ("residual", "weight")]
    mixes, inv_rms = reference.projection_with_rms(*leaves, None, 1e-6)
    grad = torch.randn_like(mixes)
    expected = torch.autograd.grad(mixes, leaves, grad, retain_graph=True)
    *ours, none = reference.projection_backward(grad, *leaves, None, mixes, inv_rms)
    assert none is None
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@quick
@given(num_tokens, num_streams, st.integers(1, 9))
def test_expand_then_mean_is_identity(tokens, n, hidden_size):
    hidden = torch.randn(tokens, hidden_size).bfloat16()
    mean = torch.full((tokens, n), 1 / n)
    assert torch.equal(reference.aggregate(reference.expand(hidden, n), mean), hidden)


@quick
@given(num_tokens, num_streams, st.integers(0, 7))
def test_one_hot_mix_reads_one_stream(tokens, n, chosen):
    residual = torch.randn(tokens, n, 5).bfloat16()
    mix = torch.zeros(tokens, n)
    mix[:, chosen % n] = 1
    assert torch.equal(reference.aggregate(residual, mix), residual[:, chosen % n])


@quick
@given(num_tokens, num_streams)
def test_aggregate_is_linear(tokens, n):
    a, b = torch.randn(2, tokens, n, 5, dtype=F64)
    mix = torch.randn(tokens, n, dtype=F64)
    together = reference.aggregate(2 * a - 3 * b, mix)
    apart = 2 * reference.aggregate(a, mix) - 3 * reference.aggregate(b, mix)
    torch.testing.assert_close(together, apart)


@STREAMS
def test_post_without_mixing(n):
    layer_output, residual = torch.randn(3, 5).bfloat16(), torch.randn(3, n, 5).bfloat16()
    identity = torch.eye(n).expand(3, n, n)
    nothing = torch.zeros(3, n)
    assert torch.equal(reference.post(layer_output, residual, nothing, identity), residual)
    wrote = reference.post(layer_output, residual, torch.ones(3, n), torch.zeros(3, n, n))
    assert torch.equal(wrote, reference.expand(layer_output, n))


@STREAMS
def test_comb_mix_is_source_then_destination(n):
    """comb_mix[0, 1] = 1 carries stream 0 to stream 1."""
    residual = torch.randn(3, n, 5).bfloat16()
    comb_mix = torch.zeros(3, n, n)
    comb_mix[:, 0, 1] = 1
    out = reference.post(torch.zeros(3, 5).bfloat16(), residual, torch.zeros(3, n), comb_mix)
    assert torch.equal(out[:, 1], residual[:, 0])
    assert not out[:, [j for j in range(n) if j != 1]].any()


@STREAMS
def test_split_mixes_of_zero(n):
    bias = torch.zeros(n * (n + 2))
    pre, post, comb = reference.split_mixes(
        torch.zeros(3, n * (n + 2)), torch.ones(3), bias, num_streams=n, post_mult=2, pre_eps=0.25
    )
    assert torch.equal(pre, torch.full((3, n), 0.75))
    assert torch.equal(post, torch.ones(3, n))
    assert torch.equal(comb, torch.zeros(3, n, n))


def test_split_mixes_takes_each_scale_and_bias_once():
    n = 2
    mixes = torch.arange(1.0, 9.0, dtype=F64)
    scale = torch.tensor([2.0, 3.0, 5.0], dtype=F64)
    bias = torch.arange(8.0, dtype=F64) / 8
    pre, post, comb = reference.split_mixes(mixes, scale, bias, num_streams=n, pre_eps=0.0)
    logit = [
        m * s + b
        for m, s, b in zip(range(1, 9), (2, 2, 3, 3, 5, 5, 5, 5), bias.tolist(), strict=True)
    ]
    sigmoid = [1 / (1 + math.exp(-z)) for z in logit]
    assert pre.tolist() == pytest.approx(sigmoid[:2], rel=1e-14)
    assert post.tolist() == pytest.approx(sigmoid[2:4], rel=1e-14)
    assert comb.flatten().tolist() == pytest.approx(logit[4:], rel=1e-14)


@quick
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_sinkhorn_of_two_streams(logits):
    """The limit for n = 2: p = r / (1 + r) with r = sqrt(a*d / (b*c)) of exp(logits)."""
    a, b, c, d = logits
    ratio = math.exp((a + d - b - c) / 2)
    p = ratio / (1 + ratio)
    comb = reference.sinkhorn(torch.tensor(logits, dtype=F64).view(2, 2), repeat=500, eps=0.0)
    assert comb.flatten().tolist() == pytest.approx([p, 1 - p, 1 - p, p], abs=1e-9)


@STREAMS
def test_sinkhorn_of_a_doubly_stochastic_matrix(n):
    """It is left as it is: softmax of the logarithm is the matrix itself."""
    shifts = torch.stack([torch.eye(n, dtype=F64).roll(k, 0) for k in range(n)])
    mixture = (torch.rand(n, dtype=F64) + 0.1).softmax(0)
    matrix = (mixture[:, None, None] * shifts).sum(0)
    comb = reference.sinkhorn(matrix.log(), repeat=10, eps=0.0)
    torch.testing.assert_close(comb, matrix, rtol=1e-13, atol=0)


@quick
@given(num_tokens, num_streams, st.integers(1, 30))
def test_sinkhorn_columns_sum_to_one(tokens, n, repeat):
    comb = reference.sinkhorn(torch.randn(tokens, n, n), repeat=repeat)
    ones = torch.ones(tokens, n)
    torch.testing.assert_close(comb.sum(-2), ones, rtol=0, atol=1e-5)
    assert (comb > 0).all()


@STREAMS
def test_sinkhorn_rows_sum_to_one_in_the_limit(n):
    comb = reference.sinkhorn(torch.randn(50, n, n, dtype=F64), repeat=500, eps=1e-9)
    torch.testing.assert_close(comb.sum(-1), torch.ones(50, n, dtype=F64), rtol=0, atol=1e-6)


@STREAMS
def test_sinkhorn_commutes_with_permutations(n):
    logits = torch.randn(5, n, n, dtype=F64)
    rows, columns = torch.randperm(n), torch.randperm(n)
    permuted = reference.sinkhorn(logits[:, rows][:, :, columns])
    expected = reference.sinkhorn(logits)[:, rows][:, :, columns]
    torch.testing.assert_close(permuted, expected)


@STREAMS
def test_sinkhorn_ignores_a_shift_of_a_row(n):
    logits = torch.randn(5, n, n, dtype=F64)
    shifted = logits + 100 * torch.randn(5, n, 1, dtype=F64)
    torch.testing.assert_close(reference.sinkhorn(shifted), reference.sinkhorn(logits))


@STREAMS
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_sinkhorn_of_huge_logits(n, dtype):
    """One winner a row, each in a column of its own: a permutation matrix, up to eps."""
    winners = torch.stack([torch.randperm(n) for _ in range(5)])
    permutation = torch.eye(n, dtype=dtype)[winners]
    logits = (permutation * 2e4 - 1e4).requires_grad_()
    comb = reference.sinkhorn(logits)
    torch.testing.assert_close(comb, permutation, rtol=0, atol=1e-4)
    (grad,) = torch.autograd.grad(comb.sum(), logits)
    assert grad.isfinite().all()


def test_projection_closed_form():
    """Two streams of width one: mixes = W @ x / rms(x)."""
    residual = torch.tensor([[[3.0], [4.0]]], dtype=F64)
    weight = torch.arange(16.0, dtype=F64).view(8, 2)
    rms = math.sqrt((9 + 16) / 2)
    out = reference.projection(residual, weight, norm_eps=0.0)
    expected = [(2 * k * 3 + (2 * k + 1) * 4) / rms for k in range(8)]
    assert out[0].tolist() == pytest.approx(expected, rel=1e-15)
    eps_out = reference.projection(residual, weight, norm_eps=12.5)
    assert eps_out[0].tolist() == pytest.approx([e / math.sqrt(2) for e in expected], rel=1e-15)


def test_norm_weight_is_merged_into_the_weight():
    tensors, _ = wide(PROJECTION, (3,), 4)
    merged = tensors["weight"] * tensors["norm_weight"]
    expected = reference.projection(tensors["residual"], merged)
    torch.testing.assert_close(reference.projection(**tensors), expected)


@quick
@given(st.integers(-60, 60))
def test_projection_has_no_scale(exponent):
    """The norm divides it out, and a power of two costs no bit."""
    residual = torch.randn(3, 4, 8).bfloat16()
    weight = torch.randn(24, 32)
    once = reference.projection(residual, weight, norm_eps=0.0)
    scaled = reference.projection(residual * 2.0**exponent, weight, norm_eps=0.0)
    torch.testing.assert_close(scaled, once, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("size", [3e38, 1e30, 1e19, 1e-20, 1e-38], ids=str)
def test_projection_of_extreme_streams(size):
    residual = (torch.randn(5, 4, 64).sign() * size).bfloat16()
    weight, norm_weight = torch.randn(24, 256) / 16, torch.rand(256)
    arguments = (residual, weight, norm_weight)
    leaves = [tensor.detach().requires_grad_() for tensor in arguments]
    wide_leaves = [tensor.double().detach().requires_grad_() for tensor in arguments]
    grad = torch.randn(5, 24)
    ours = reference.projection(*leaves[:2], norm_weight=leaves[2])
    truth = reference.projection(*wide_leaves[:2], norm_weight=wide_leaves[2])
    tiny = torch.finfo(torch.float32).tiny
    atol = 1e-6 * float(truth.detach().abs().max()) + tiny
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=atol)
    grads = torch.autograd.grad(ours, leaves, grad)
    true_grads = torch.autograd.grad(truth, wide_leaves, grad.double())
    for a, b in zip(grads, true_grads, strict=True):
        rtol = 2**-8 if a.dtype == torch.bfloat16 else 1e-5
        atol = 1e-5 * float(b.abs().max()) + tiny
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def test_projection_of_zeros():
    out = reference.projection(torch.zeros(3, 4, 64).bfloat16(), torch.randn(24, 256))
    assert torch.equal(out, torch.zeros(3, 24))


def test_contract_with_an_open_gate_sums_the_streams():
    residual = torch.randn(3, 4, 64, dtype=F64)
    out = reference.contract(
        residual,
        torch.zeros(4, 256, dtype=F64),
        torch.ones(1, dtype=F64),
        torch.full((4,), 50.0, dtype=F64),
        pre_eps=0.0,
    )
    torch.testing.assert_close(out, residual.sum(-2))


def test_fused_pre_is_the_four_steps():
    tensors, options = wide(FUSED_PRE, (3,), 4)
    mixes = reference.projection(
        tensors["residual"], tensors["weight"], norm_weight=tensors["norm_weight"]
    )
    pre, post, comb = reference.split_mixes(
        mixes, tensors["scale"], tensors["bias"], num_streams=4, post_mult=options["post_mult"]
    )
    expected = (
        reference.aggregate(tensors["residual"], pre),
        post,
        reference.sinkhorn(comb, repeat=options["sinkhorn_repeat"]),
    )
    for a, b in zip(reference.fused_pre(**tensors, **options), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nonfinite_stays_in_its_token(op, value):
    tensors, options = op.inputs((5,), 4, 64, "cpu")
    poisoned = next(iter(tensors))
    clean = op.reference(**tensors, **options)
    tensors[poisoned][2].view(-1)[3] = value
    dirty = op.reference(**tensors, **options)
    if isinstance(clean, torch.Tensor):
        clean, dirty = (clean,), (dirty,)
    others = [0, 1, 3, 4]
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[others], b[others])
    if math.isnan(value):
        assert any(out[2].isnan().any() for out in dirty)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_float64_in_float64_out(op):
    tensors, options = wide(op, (3,), 4)
    outputs = op.reference(**tensors, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    assert all(out.dtype == F64 for out in outputs)


def test_merged_scales_of_split_mixes_have_their_own_gradients():
    """Three scales, each summed over its own group alone."""
    tensors, options = wide(SPLIT_MIXES, (3,), 4)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = reference.split_mixes(**leaves, **options)
    for group, out in enumerate(outputs):
        (grad,) = torch.autograd.grad(out.sum(), leaves["scale"], retain_graph=True)
        assert [bool(g) for g in grad] == [i == group for i in range(3)]


def tf32(values):
    """To 11 bits, halves away from zero: by arithmetic, where the reference works on bits."""
    mantissa, exponent = torch.frexp(values.double())
    rounded = mantissa.sign() * (mantissa.abs() * 2**11 + 0.5).floor() / 2**11
    return torch.ldexp(rounded, exponent).to(values.dtype)


def test_round_to_tf32():
    values = torch.cat((torch.randn(4000) * torch.logspace(-30, 30, 4000), torch.zeros(2)))
    unit = 2.0**-10
    halves = torch.tensor([1 + unit / 2, -1 - unit / 2, 1 + 3 * unit / 2, 2 - unit / 2])
    values = torch.cat((values, halves, halves.nextafter(torch.zeros(4))))
    assert torch.equal(reference.round_to_tf32(values), tf32(values))
    assert torch.equal(reference.round_to_tf32(values.double()), tf32(values).double())
    assert reference.round_to_tf32(halves).tolist() == [1 + unit, -1 - unit, 1 + 2 * unit, 2.0]
    assert reference.round_to_tf32(torch.tensor(torch.nan)).isnan()


def test_round_to_tf32_leaves_the_gradient_alone():
    values = torch.randn(100, requires_grad=True)
    grad = torch.randn(100)
    assert torch.equal(torch.autograd.grad(reference.round_to_tf32(values), values, grad)[0], grad)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm_weight"])
@STREAMS
def test_tf32_rounds_the_merged_weight(n, norm):
    tensors, _ = PROJECTION.inputs((3,), n, 64, "cpu")
    if not norm:
        del tensors["norm_weight"]
    merged = tf32(tensors["weight"] * tensors.get("norm_weight", 1.0))
    residual = tensors["residual"]
    rounded = reference.projection(**tensors, tf32=True)
    assert torch.equal(rounded, reference.projection(residual, merged))
    assert not torch.equal(rounded, reference.projection(**tensors))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm_weight"])
@STREAMS
def test_tf32_rounds_the_gradient_of_the_bare_product(n, norm):
    """By the definition: grad_product = tf32(grad * inv_rms), then the products of float64."""
    tensors, _ = PROJECTION.inputs((3,), n, 64, "cpu")
    if not norm:
        tensors["norm_weight"] = None
    arguments = (tensors["residual"].float(), tensors["weight"], tensors["norm_weight"])
    mixes, inv_rms = reference.projection_with_rms(*arguments, 1e-6, tf32=True)
    grad = torch.randn_like(mixes)
    ours = reference.projection_backward(grad, *arguments, mixes, inv_rms, tf32=True)

    x = arguments[0].double().flatten(1)
    norm_weight = torch.ones(n * 64) if arguments[2] is None else arguments[2]
    merged = tf32(arguments[1] * norm_weight).double()
    product = tf32(grad * inv_rms[:, None]).double()
    through_rms = (grad.double() * mixes).sum(1, keepdim=True) * inv_rms[:, None].double() ** 2
    grad_merged = product.T @ x
    expected = [
        (product @ merged - x * through_rms / x.shape[1]).view(3, n, 64),
        grad_merged * norm_weight,
        (grad_merged * arguments[1]).sum(0),
    ]
    for a, b in zip(ours, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    native = reference.projection_backward(grad, *arguments, mixes, inv_rms)
    assert not torch.equal(native[1], ours[1])


def test_tf32_of_fused_pre_and_contract_is_that_of_the_projection():
    tensors, options = FUSED_PRE.inputs((3,), 4, 64, "cpu")
    merged = tf32(tensors["weight"] * tensors["norm_weight"])
    rounded = {**tensors, "weight": merged, "norm_weight": None}
    ours = reference.fused_pre(**tensors, **options, tf32=True)
    for a, b in zip(ours, reference.fused_pre(**rounded, **options), strict=True):
        assert torch.equal(a, b)
    tensors, _ = CONTRACT.inputs((3,), 4, 64, "cpu")
    rounded = {**tensors, "weight": tf32(tensors["weight"])}
    ours = reference.contract(**tensors, tf32=True)
    assert torch.equal(ours, reference.contract(**rounded))


def test_tf32_of_fused_pre_backward():
    """The gradient of the mixes goes into projection_backward with the same switch."""
    tensors, options = wide(FUSED_PRE, (3,), 4, 64)
    grads = [torch.zeros(3, 64, dtype=F64), *torch.zeros(2, 3, 4, 4, dtype=F64)]
    grads[1:] = [torch.randn(3, 4, dtype=F64), torch.randn(3, 4, 4, dtype=F64)]
    names = ("residual", "weight", "norm_weight")
    leaves = {
        name: tensor if name in names else tensor.requires_grad_()
        for name, tensor in tensors.items()
    }
    arguments = [tensors[name] for name in names]
    mixes, inv_rms = reference.projection_with_rms(*arguments, 1e-6, tf32=True)
    mixes.requires_grad_()
    _, post, comb = reference.split_mixes(
        mixes, leaves["scale"], leaves["bias"], num_streams=4, post_mult=options["post_mult"]
    )
    comb = reference.sinkhorn(comb, repeat=options["sinkhorn_repeat"])
    grad_mixes, *gates = torch.autograd.grad(
        (post, comb), (mixes, leaves["scale"], leaves["bias"]), grads[1:]
    )
    expected = reference.projection_backward(
        grad_mixes, *arguments, mixes.detach(), inv_rms, tf32=True
    )
    ours = fused_pre_backward(
        grads, {name: tensor.detach() for name, tensor in tensors.items()}, options, tf32=True
    )
    for a, b in zip(ours, (*expected, *gates), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_of_saturated_gates():
    """By autograd; the closed forms are those of the ops."""
    saturation.check_split_mixes("cpu", reference.split_mixes)
    saturation.check_head_mix("cpu", reference.head_mix)


def test_gradients_of_gates_in_float64():
    """At z = 30 autograd of torch's sigmoid has three digits of the gradient left, at 40 none."""
    z = torch.linspace(-80, 80, 161, dtype=F64).view(-1, 1).requires_grad_()
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    (grad,) = torch.autograd.grad(reference.head_mix(z, one, zero).sum(), z)
    closed, _, _ = reference.head_mix_backward(torch.ones_like(z), z.detach(), one, zero)
    for ours in (grad, closed):
        torch.testing.assert_close(ours, saturation.slope(z.detach()), rtol=1e-13, atol=0)


def test_gates_are_sigmoids():
    z = torch.cat((torch.linspace(-80, 80, 161), torch.tensor([torch.inf, -torch.inf, torch.nan])))
    gate = reference.head_mix(z.view(-1, 1), torch.ones(1), torch.zeros(1), pre_eps=0.0).view(-1)
    torch.testing.assert_close(
        gate, z.double().sigmoid().float(), rtol=3e-7, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("gap", far_apart.GAPS)
@STREAMS
def test_sinkhorn_without_eps(n, gap, dtype):
    """By autograd, and the closed form, of logits that no softmax in float32 holds."""

    def by_autograd(logits):
        return reference.sinkhorn(logits.to(dtype), repeat=20, eps=0.0)

    far_apart.check(n, gap, 20, "cpu", by_autograd)
    logits = far_apart.logits(n, gap, "cpu").to(dtype).requires_grad_()
    grad = torch.randn_like(logits)
    (expected,) = torch.autograd.grad(by_autograd(logits), logits, grad)
    ours = reference.sinkhorn_backward(grad, logits.detach(), repeat=20, eps=0.0)
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12
    )


@STREAMS
def test_sinkhorn_without_eps_further_apart_than_float64(n):
    """A column that lies lower than any exponential: what lies lower alike changes nothing."""
    logits = torch.randn(50, n, n, dtype=F64)
    low = logits.clone()
    low[..., 0] -= 1e9
    low[:, 1] += 1e7
    expected = reference.sinkhorn(logits, repeat=500, eps=0.0)
    torch.testing.assert_close(
        reference.sinkhorn(low, repeat=500, eps=0.0), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("n", [4, 8])
def test_sinkhorn_without_eps_leaves_out_what_is_minus_infinity(n):
    """As a softmax does; the rest is doubly stochastic with the zero where it was."""
    logits = torch.randn(50, n, n)
    logits[:, 0, 0] = -torch.inf
    comb = reference.sinkhorn(logits, repeat=500, eps=0.0)
    assert not comb[:, 0, 0].any()
    torch.testing.assert_close(comb.sum(-1), torch.ones(50, n), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [2.0**-101, 1e-45, -1e-45])
def test_sinkhorn_of_an_eps_that_counts_as_none(eps):
    logits, grad = torch.randn(2, 5, 4, 4)
    options = {"repeat": 5, "eps": eps}
    zero = {"repeat": 5, "eps": 0.0}
    assert torch.equal(reference.sinkhorn(logits, **options), reference.sinkhorn(logits, **zero))
    ours = reference.sinkhorn_backward(grad, logits, **options)
    assert torch.equal(ours, reference.sinkhorn_backward(grad, logits, **zero))


def delayed_by_hand(streams, gates, before, steps):
    """One token of DeepSeek-V4.1, number by number: the collapse, and three gates for later."""
    (weight, scale, bias), (n, hidden_size) = gates, streams.shape
    flat = [float(x) for x in streams.flatten()]
    rms = math.sqrt(sum(x * x for x in flat) / len(flat) + 1e-20)
    z = [sum(float(w) * x for w, x in zip(row, flat, strict=True)) / rms for row in weight]
    group = [0] * n + [1] * n + [2] * n * n
    z = [value * float(scale[g]) + float(b) for value, g, b in zip(z, group, bias, strict=True)]
    gate = [1 / (1 + math.exp(-value)) for value in z[: 2 * n]]
    rows = [z[2 * n + i * n : 2 * n + (i + 1) * n] for i in range(n)]
    comb = [[math.exp(v) / sum(map(math.exp, row)) + 1e-6 for v in row] for row in rows]
    for step in range(steps):
        if step:
            comb = [[v / (sum(row) + 1e-6) for v in row] for row in comb]
        sums = [sum(row[j] for row in comb) + 1e-6 for j in range(n)]
        comb = [[v / s for v, s in zip(row, sums, strict=True)] for row in comb]
    layer_input = [
        sum(float(before[i] * streams[i, h]) for i in range(n)) for h in range(hidden_size)
    ]
    return layer_input, [g + 1e-6 for g in gate[:n]], [2 * g for g in gate[n:]], comb


def test_delayed_collapse_number_by_number():
    """Entry, a boundary and the exit of DeepSeek-V4.1."""
    n, hidden_size, steps = 4, 6, 3
    options = {"norm_eps": 1e-20, "post_mult": 2.0, "sinkhorn_repeat": steps}
    streams = torch.randn(1, n, hidden_size, dtype=F64)
    gates = [
        (torch.randn(24, n * hidden_size).double(), torch.randn(3).double(), torch.randn(24))
        for _ in range(2)
    ]
    entry = torch.eye(n, dtype=F64)[:1]
    found = reference.fused_pre(streams, *gates[0], pre_mix=entry, **options)
    expected = delayed_by_hand(streams[0], gates[0], entry[0], steps)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[0], torch.tensor(b, dtype=F64))
    assert torch.equal(found[0], streams[:, 0])
    layer_output = torch.tanh(found[0])
    after, *found = reference.post_pre(
        layer_output, streams, *found[2:], *gates[1], pre_mix=found[1], **options
    )
    _, pre_mix, post_mix, comb_mix = expected
    wanted = [
        [
            post_mix[j] * float(layer_output[0, h])
            + sum(comb_mix[i][j] * float(streams[0, i, h]) for i in range(n))
            for h in range(hidden_size)
        ]
        for j in range(n)
    ]
    torch.testing.assert_close(after[0], torch.tensor(wanted, dtype=F64))
    expected = delayed_by_hand(after[0], gates[1], torch.tensor(pre_mix), steps)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[0], torch.tensor(b, dtype=F64))
    # The exit: what the last sub-layer made collapses the streams.
    last = torch.tensor(expected[1], dtype=F64)
    out = reference.aggregate(after, last[None])
    torch.testing.assert_close(out[0], last @ after[0])


@pytest.mark.parametrize("op", [POST_PRE, POST_PRE_DELAYED], ids=str)
def test_boundary_is_the_post_and_the_pre(op):
    """With what only it has: the bias of the layer, and streams that are rounded in between."""
    tensors, options = op.inputs((5,), 4, 64, "cpu")
    of_post = [tensors.pop(name) for name in ("layer_output", "residual", "post_mix", "comb_mix")]
    bias = torch.randn(64)
    streams = reference.post(*of_post, bias=bias)
    assert streams.dtype == torch.bfloat16
    expected = streams, *reference.fused_pre(streams, **tensors, **options)
    found = reference.post_pre(*of_post, **tensors, **options, layer_bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("pre", [False, True], ids=["V4", "V4.1"])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "read by others"])
def test_boundary_backward_of_every_input(pre, others):
    """With a bias of the layer, without a norm weight, and a gradient of the streams or none."""
    op = POST_PRE_DELAYED if pre else POST_PRE
    tensors, options = wide(op, (3,), 4)
    del tensors["norm_weight"]
    tensors["layer_bias"] = torch.randn(3, dtype=F64)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = op.reference(**leaves, **options)
    grads = [torch.randn_like(out) for out in outputs]
    used = slice(0 if others else 1, None)
    expected = torch.autograd.grad(outputs[used], list(leaves.values()), grads[used])
    if not others:
        grads[0] = None
    ours = post_pre_backward(tuple(grads), tensors, options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_norm_of_the_layer_input():
    tensors, options = POST_PRE.inputs((5,), 4, 64, "cpu")
    norm = torch.rand(64) + 0.5
    plain = reference.post_pre(**tensors, **options)
    normed = reference.post_pre(**tensors, **options, layer_norm_weight=norm, layer_norm_eps=0.25)
    wanted = torch.nn.functional.rms_norm(plain[1].float(), (64,), norm, 0.25).bfloat16()
    torch.testing.assert_close(normed[1], wanted)
    assert all(torch.equal(plain[i], normed[i]) for i in (0, 2, 3))
