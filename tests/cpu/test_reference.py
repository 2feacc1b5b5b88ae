"""The specification itself: closed forms, autograd, invariants, extreme values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cases import CONTRACT, FUSED_PRE, OPS, PROJECTION, SPLIT_MIXES
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


@pytest.mark.parametrize("op", [*OPS, FUSED_PRE], ids=str)
@pytest.mark.parametrize("n", [2, 4])
def test_gradcheck(op, n):
    tensors, options = wide(op, (2,), n)
    names = list(tensors)

    def run(*leaves):
        return op.reference(**dict(zip(names, leaves, strict=True)), **options)

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert gradcheck(run, leaves, fast_mode=True)


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
    elif op.name == "expand":
        ours = (reference.expand_backward(*grads),)
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


@pytest.mark.parametrize("op", [*OPS, FUSED_PRE], ids=str)
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
