"""The boundary between two sub-layers, of DeepSeek-V4 and of V4.1."""

import pytest
import torch

import oracle
from cases import DELAYED_PRE, FUSED_PRE, POST_PRE, POST_PRE_DELAYED, Case, streams, widths
from tile_mhc import GradAccumulator, config, fused_pre, post, post_pre

BOTH = pytest.mark.parametrize("op", [POST_PRE, POST_PRE_DELAYED], ids=str)
OF_POST = ("layer_output", "residual", "post_mix", "comb_mix")


def separate(tensors, options, layer_bias=None):
    tensors = dict(tensors)
    ends = post(*(tensors.pop(name) for name in OF_POST), bias=layer_bias)
    return ends, *fused_pre(ends, **tensors, **options)


def check_bits(op, tensors, options):
    names = op.outputs
    ours = dict(zip(names, post_pre(**tensors, **options), strict=True))
    others = dict(zip(names, separate(tensors, options), strict=True))
    oracle.check_same_bits(ours, others, f"{op} and the two ops:")


@BOTH
@streams
def test_against_float64(op, case):
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@BOTH
@widths
def test_any_width(op, case):
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


@BOTH
@streams
@pytest.mark.parametrize("num_splits", [1, 1000])
def test_same_bits_as_the_ops(op, case, num_splits):
    tensors, options = op.inputs(*case.shape, "cuda")
    check_bits(op, tensors, options | {"num_splits": num_splits})


@BOTH
@pytest.mark.parametrize("shape", [(1, 64), (63, 64), (700, 1280), (8500, 256)], ids=str)
def test_what_is_no_sum_over_k_has_the_bits_of_the_ops(op, shape):
    """With any splits: the streams, and the layer input by a pre_mix that was given."""
    tensors, options = op.inputs(shape[:1], 4, shape[1], "cuda")
    ours, others = post_pre(**tensors, **options), separate(tensors, options)
    assert torch.equal(ours[0], others[0])
    if op is POST_PRE_DELAYED:
        assert torch.equal(ours[1], others[1])
    for a, b in zip(ours[2:], others[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BOTH
def test_bias_of_the_layer(op):
    tensors, options = op.inputs((130,), 4, 192, "cuda")
    tensors["layer_bias"] = torch.randn(192, device="cuda")
    oracle.check(op, Case(130, 4, 192, "with a bias of the layer"), tensors, options)


@BOTH
def test_accumulator(op):
    """What autograd gives, by other kernels: they round the gradient of the streams on its way."""
    tensors, options = op.inputs((130,), 4, 192, "cuda")
    upstream = oracle.upstream_of(op, tensors, options)
    plain = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    accumulator = GradAccumulator(leaves["residual"])
    outputs = op.run(**leaves, **options, grad_accumulator=accumulator)
    torch.autograd.backward(outputs, upstream)
    for name, leaf in leaves.items():
        expected = plain[f"grad_{name}"].float()
        assert (leaf.grad.float() - expected).norm() < 1e-2 * expected.norm(), name


@BOTH
def test_a_token_does_not_depend_on_its_batch(op):
    tensors, options = op.inputs((700,), 4, 1280, "cuda")
    by_token = [name for name, tensor in tensors.items() if tensor.shape[0] == 700]
    config.set_batch_invariant(True)
    try:
        every = op.run(**tensors, **options)
        few = op.run(**tensors | {name: tensors[name][:5] for name in by_token}, **options)
    finally:
        config.set_batch_invariant(False)
    assert all(torch.equal(a[:5], b) for a, b in zip(every, few, strict=True))


@pytest.mark.parametrize("op", [FUSED_PRE, DELAYED_PRE, POST_PRE, POST_PRE_DELAYED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_of_the_layer_input(op, dtype):
    layer_input = op.outputs.index("layer_input")
    for hidden_size in (65, 1280, 7168):
        tensors, options = op.inputs((13,), 4, hidden_size, "cuda")
        norm = (torch.rand(hidden_size, device="cuda") + 0.5).to(dtype)
        plain = op.run(**tensors, **options)
        normed = op.run(**tensors, **options, layer_norm_weight=norm, layer_norm_eps=0.25)
        wide = plain[layer_input].double()
        factor = (wide.square().mean(-1, keepdim=True) + 0.25).rsqrt()
        wanted = (wide * factor * norm.double()).bfloat16()
        torch.testing.assert_close(normed[layer_input], wanted, rtol=2**-7, atol=2**-12)
        others = [i for i in range(len(plain)) if i != layer_input]
        assert all(torch.equal(plain[i], normed[i]) for i in others)


@BOTH
def test_replayed_graph(op):
    tensors, options = op.inputs((130,), 4, 192, "cuda")
    expected = op.run(**tensors, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op.run(**tensors, **options)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@BOTH
@pytest.mark.parametrize("num_tokens", [130, 4096])
def test_same_bits_every_run(op, num_tokens):
    oracle.check_repeatable(op, *op.inputs((num_tokens,), 4, 1280, "cuda"))


@BOTH
def test_nonfinite_stays_in_its_token(op):
    oracle.check_isolation(op, *op.inputs((130,), 4, 1280, "cuda"), "residual")
