import pytest
import torch

import oracle
from cases import recompute_inputs
from tile_mhc import aggregate, jit, post, recompute, reference

DEPTHS = [*range(1, 11), 11, 24]  # the address table takes another launch from 11 layers on


def separate(residual, pre_mixes, layer_outputs, post_mixes, comb_mixes):
    layer_inputs, residuals = [], []
    for layer, pre_mix in enumerate(pre_mixes):
        layer_inputs.append(aggregate(residual, pre_mix))
        if layer < len(layer_outputs):
            residual = post(layer_outputs[layer], residual, post_mixes[layer], comb_mixes[layer])
            residuals.append(residual)
    return layer_inputs, residuals


def named(results):
    layer_inputs, residuals = results
    return {f"layer_inputs[{i}]": t for i, t in enumerate(layer_inputs)} | {
        f"residuals[{i}]": t for i, t in enumerate(residuals)
    }


def check_bits(arguments):
    oracle.check_same_bits(
        named(recompute(*arguments)), named(separate(*arguments)), "recompute and the ops:"
    )


@pytest.mark.parametrize("missing", [0, 1], ids=["posts-L", "posts-L-1"])
@pytest.mark.parametrize("layers", DEPTHS)
def test_same_bits_as_the_ops(layers, missing):
    check_bits(recompute_inputs(layers, layers - missing, (65,), 4, 192, "cuda"))


@pytest.mark.parametrize(("num_streams", "hidden_size"), [(2, 64), (8, 128), (8, 2560), (4, 7168)])
@pytest.mark.parametrize("num_tokens", [0, 1, 130])
def test_same_bits_at_other_shapes(num_tokens, num_streams, hidden_size):
    check_bits(recompute_inputs(3, 3, (num_tokens,), num_streams, hidden_size, "cuda"))


def test_against_float64():
    arguments = recompute_inputs(1, 1, (130,), 4, 1280, "cuda")
    wide = [arguments[0].double(), *([t.double() for t in group] for group in arguments[1:])]
    plain, truth = named(reference.recompute(*arguments)), named(reference.recompute(*wide))
    for name, value in named(recompute(*arguments)).items():
        oracle.check_tensor("recompute", name, value, plain[name], truth[name], {})


@pytest.mark.parametrize("lead", [(), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    check_bits(recompute_inputs(2, 2, lead, 4, 192, "cuda"))


def test_destinations():
    arguments = recompute_inputs(3, 2, (65,), 4, 192, "cuda")
    layer_inputs = [torch.empty(65, 192, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    residuals = [torch.empty(65, 4, 192, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    results = recompute(*arguments, layer_inputs=layer_inputs, residuals=residuals)
    for given, returned in zip((layer_inputs, residuals), results, strict=True):
        assert all(a is b for a, b in zip(given, returned, strict=True))
    expected = named(separate(*arguments))
    oracle.check_same_bits(named((layer_inputs, residuals)), expected, "recompute into:")


def test_one_kernel_serves_every_depth():
    recompute(*recompute_inputs(3, 3, (5,), 4, 192, "cuda"))
    ready = jit.statistics()
    for layers in DEPTHS:
        for posts in (layers, layers - 1):
            recompute(*recompute_inputs(layers, posts, (layers,), 4, 192, "cuda"))
    assert jit.statistics() == ready


def test_nonfinite_stays_in_its_token():
    arguments = recompute_inputs(3, 3, (65,), 8, 128, "cuda")
    clean = named(recompute(*arguments))
    arguments[0][20, 1, 3] = float("nan")
    arguments[2][1][40, 5] = float("inf")
    dirty = named(recompute(*arguments))
    good = [token for token in range(65) if token not in (20, 40)]
    oracle.check_same_bits(
        {name: t[good] for name, t in clean.items()},
        {name: t[good] for name, t in dirty.items()},
        "recompute, NaN in another token:",
    )
    assert all(t[20].isnan().any() for t in dirty.values())


def test_same_bits_every_run():
    arguments = recompute_inputs(4, 4, (130,), 4, 1280, "cuda")
    oracle.check_same_bits(named(recompute(*arguments)), named(recompute(*arguments)), "twice:")
