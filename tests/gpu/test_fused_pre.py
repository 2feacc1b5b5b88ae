import pytest
import torch

import oracle
from cases import FUSED_PRE, PRE_OUTPUTS, Case, streams
from tile_mhc import aggregate, fused_pre, projection, sinkhorn, split_mixes
from tile_mhc.functional import mhc_pre


def unfused(residual, weight, scale, bias, norm_weight, num_splits, options):
    mixes = projection(residual, weight, norm_weight=norm_weight, num_splits=num_splits)
    pre_mix, post_mix, logits = split_mixes(
        mixes, scale, bias, num_streams=residual.shape[-2], post_mult=options["post_mult"]
    )
    comb_mix = sinkhorn(logits, repeat=options["sinkhorn_repeat"])
    return aggregate(residual, pre_mix), post_mix, comb_mix


def named(outputs):
    return dict(zip(PRE_OUTPUTS, outputs, strict=True))


def check_bits(tensors, options, num_splits):
    fused = fused_pre(**tensors, **options, num_splits=num_splits)
    separate = unfused(**tensors, num_splits=num_splits, options=options)
    oracle.check_same_bits(named(fused), named(separate), "fused_pre and the four ops:")


@streams
def test_against_float64(case):
    tensors, options = FUSED_PRE.inputs(*case.shape, "cuda")
    ours = fused_pre(**tensors, **options)
    plain = FUSED_PRE.reference(**tensors, **options)
    truth = FUSED_PRE.reference(**{name: t.double() for name, t in tensors.items()}, **options)
    # Sinkhorn turns the 1e-6 of the logits into as much in comb_mix: no bar of its own here.
    for name, *values in zip(PRE_OUTPUTS, ours, plain, truth, strict=True):
        oracle.check_tensor("fused_pre", name, *values, {})


@streams
def test_same_bits_as_the_ops(case):
    tensors, options = FUSED_PRE.inputs(*case.shape, "cuda")
    check_bits(tensors, options, None)


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 130, 1000])
@pytest.mark.parametrize("num_splits", [1, 2, 7, 1000])
def test_same_bits_for_any_split(num_tokens, num_splits):
    tensors, options = FUSED_PRE.inputs((num_tokens,), 4, 1280, "cuda")
    check_bits(tensors, options, num_splits)


@pytest.mark.parametrize("repeat", [1, 2, 10])
def test_same_bits_without_norm_weight(repeat):
    tensors, options = FUSED_PRE.inputs((130,), 4, 1280, "cuda")
    tensors["norm_weight"] = None
    check_bits(tensors, options | {"sinkhorn_repeat": repeat}, None)


def test_gradients_on_or_off():
    """`mhc_pre` picks `fused_pre` when nothing needs a gradient: the same bits either way."""
    tensors, options = FUSED_PRE.inputs((130,), 4, 1280, "cuda")
    off = mhc_pre(**tensors, **options)
    on = mhc_pre(**{name: t.requires_grad_() for name, t in tensors.items()}, **options)
    assert all(out.requires_grad for out in on)
    on = [out.detach() for out in on]
    oracle.check_same_bits(named(on), named(off), "mhc_pre with and without gradients:")


def test_same_bits_every_run():
    tensors, options = FUSED_PRE.inputs((4096,), 4, 1280, "cuda")
    first = fused_pre(**tensors, **options)
    second = fused_pre(**tensors, **options)
    oracle.check_same_bits(named(first), named(second), "fused_pre, run twice:")


def test_nonfinite_stays_in_its_token():
    tensors, options = FUSED_PRE.inputs((130,), 4, 1280, "cuda")
    clean = fused_pre(**tensors, **options)
    tensors["residual"][70, 1, 3] = float("nan")
    tensors["residual"][71, 2, 5] = float("inf")
    dirty = fused_pre(**tensors, **options)
    good = [token for token in range(130) if token not in (70, 71)]
    oracle.check_same_bits(
        {name: out[good] for name, out in named(clean).items()},
        {name: out[good] for name, out in named(dirty).items()},
        "fused_pre, NaN in another token:",
    )
    assert all(out[70].isnan().any() for out in dirty)


@pytest.mark.parametrize("value", [0.0, 1e38, 1e19, 1e-38], ids=str)
def test_extreme_residual(value):
    tensors, options = FUSED_PRE.inputs((13,), 4, 1280, "cuda")
    tensors["residual"] = (tensors["residual"].sign() * value).bfloat16()
    tensors["bias"][:4] = -3.0  # pre_mix below 1/4 or so: the sum stays within bfloat16
    tensors["scale"] *= 0.01
    check_bits(tensors, options, None)
    assert all(out.isfinite().all() for out in fused_pre(**tensors, **options))


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    tensors, options = FUSED_PRE.inputs(lead, 4, 192, "cuda")
    check_bits(tensors, options, None)
    assert fused_pre(**tensors, **options)[2].shape == (*lead, 4, 4)


def test_against_float64_with_other_options():
    tensors, _ = FUSED_PRE.inputs((65,), 4, 192, "cuda")
    options = {
        "norm_eps": 0.5,
        "pre_eps": 0.25,
        "sinkhorn_eps": 0.125,
        "post_mult": 3.0,
        "sinkhorn_repeat": 3,
    }
    case = Case(65, 4, 192, "every option away from its default")
    ours = fused_pre(**tensors, **options)
    plain = FUSED_PRE.reference(**tensors, **options)
    truth = FUSED_PRE.reference(**{name: t.double() for name, t in tensors.items()}, **options)
    for name, *values in zip(PRE_OUTPUTS, ours, plain, truth, strict=True):
        oracle.check_tensor("fused_pre", f"{name} of {case}", *values, {})
    with torch.enable_grad():
        on = mhc_pre(**{name: t.requires_grad_() for name, t in tensors.items()}, **options)
    oracle.check_same_bits(named([out.detach() for out in on]), named(ours), "mhc_pre:")
