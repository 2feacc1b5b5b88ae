"""fused_pre with a pre_mix, as DeepSeek-V4.1 has it."""

import pytest
import torch

import oracle
from cases import DELAYED_OUTPUTS, DELAYED_PRE, streams, widths
from tile_mhc import aggregate, fused_pre, projection, reference, sinkhorn, split_mixes


def named(outputs):
    return dict(zip(DELAYED_OUTPUTS, outputs, strict=True))


def separate(tensors, options, num_splits, tf32=False):
    tensors = dict(tensors)
    pre_mix, scale, bias = (tensors.pop(name) for name in ("pre_mix", "scale", "bias"))
    mixes = projection(**tensors, num_splits=num_splits, tf32=tf32)
    n = tensors["residual"].shape[-2]
    next_pre, post_mix, logits = split_mixes(
        mixes, scale, bias, num_streams=n, post_mult=options["post_mult"]
    )
    eps = options.get("sinkhorn_eps", 1e-6)
    comb_mix = sinkhorn(logits, repeat=options["sinkhorn_repeat"], eps=eps)
    return aggregate(tensors["residual"], pre_mix), next_pre, post_mix, comb_mix


def check_bits(tensors, options, num_splits, tf32=False):
    ours = fused_pre(**tensors, **options, num_splits=num_splits, tf32=tf32)
    others = separate(tensors, options, num_splits, tf32)
    oracle.check_same_bits(named(ours), named(others), "fused_pre and the four ops:")


@streams
def test_against_float64(case):
    oracle.check(DELAYED_PRE, case, *DELAYED_PRE.inputs(*case.shape, "cuda"))


@widths
def test_any_width(case):
    oracle.check(DELAYED_PRE, case, *DELAYED_PRE.inputs(*case.shape, "cuda"))


@streams
@pytest.mark.parametrize("num_splits", [1, 7, 1000])
def test_same_bits_as_the_ops(case, num_splits):
    check_bits(*DELAYED_PRE.inputs(*case.shape, "cuda"), num_splits)


@pytest.mark.parametrize("num_tokens", [13, 1000])
def test_tf32(num_tokens):
    """With the bits of the ops where they are asked for, and of a rounded weight anyhow."""
    tensors, options = DELAYED_PRE.inputs((num_tokens,), 4, 1280, "cuda")
    check_bits(tensors, options, 1000, tf32=True)
    del tensors["norm_weight"]
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    ours = named(fused_pre(**tensors, **options, tf32=True))
    oracle.check_same_bits(ours, named(fused_pre(**rounded, **options)), "tf32 and rounded:")


@pytest.mark.parametrize("shape", [(1, 64), (63, 64), (65, 192), (700, 1280), (8500, 256)], ids=str)
def test_layer_input_is_the_aggregate(shape):
    """In one pass, too: what is no sum over K has the bits of its own op."""
    tensors, options = DELAYED_PRE.inputs(shape[:1], 4, shape[1], "cuda")
    layer_input, *others = fused_pre(**tensors, **options)
    assert torch.equal(layer_input, aggregate(tensors["residual"], tensors["pre_mix"]))
    expected = separate(tensors, options, None)[1:]
    for a, b in zip(others, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_eps_of_sinkhorn():
    tensors, options = DELAYED_PRE.inputs((130,), 4, 1280, "cuda")
    check_bits(tensors, options | {"sinkhorn_eps": 0.0}, 1000)


@pytest.mark.parametrize("value", [0.0, 1e38, 1e19, 1e-38], ids=str)
def test_extreme_residual(value):
    """Where a sum of squares overflows float32, the products are made again."""
    tensors, options = DELAYED_PRE.inputs((130,), 4, 1280, "cuda")
    tensors["residual"] = (tensors["residual"].sign() * value).bfloat16()
    tensors["pre_mix"] /= 8
    tensors["scale"] *= 0.01
    upstream = oracle.upstream_of(DELAYED_PRE, tensors, options)
    ours = oracle.evaluate(DELAYED_PRE.run, tensors, options, upstream, DELAYED_OUTPUTS)
    torch_result = oracle.evaluate(
        DELAYED_PRE.reference, tensors, options, upstream, DELAYED_OUTPUTS
    )
    truth, _ = oracle.terms_of(DELAYED_PRE, tensors, options, upstream)
    for name in DELAYED_OUTPUTS:
        oracle.check_tensor(DELAYED_PRE.name, name, ours[name], torch_result[name], truth[name], {})


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(DELAYED_PRE, *DELAYED_PRE.inputs((130,), 4, 1280, "cuda"), "residual")


def test_gradient_of_pre_mix_only_where_it_is_wanted():
    tensors, options = DELAYED_PRE.inputs((65,), 4, 192, "cuda")
    upstream = oracle.upstream_of(DELAYED_PRE, tensors, options)
    every = oracle.evaluate(DELAYED_PRE.run, tensors, options, upstream, DELAYED_OUTPUTS)
    leaves = {name: t.requires_grad_(name != "pre_mix") for name, t in tensors.items()}
    outputs = fused_pre(**leaves, **options)
    torch.autograd.backward(outputs, upstream)
    for name, leaf in leaves.items():
        if name == "pre_mix":
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, every[f"grad_{name}"]), name


@pytest.mark.parametrize("num_tokens", [130, 4096])
def test_same_bits_every_run(num_tokens):
    oracle.check_repeatable(DELAYED_PRE, *DELAYED_PRE.inputs((num_tokens,), 4, 1280, "cuda"))
