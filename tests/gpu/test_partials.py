"""Mixes, and a whole pre, from sums over splits of K: the functions of compat.tile_kernels.mhc."""

import pytest
import torch

from parity import calls, plain
from tile_mhc import fused_pre
from tile_mhc.compat.tile_kernels import mhc
from tile_mhc.ops import projection as projection_op

EPS = plain.EPS
# (T, H, n)
SHAPES = ((5, 1280, 4), (513, 2560, 4), (33, 640, 8))


def sums_of(residual, fn, num_splits):
    """The partial sums that tile_mhc's own projection leaves, in TileKernels' layout."""
    return projection_op.split_products(residual, fn, None, num_splits, False)


def inputs(num_tokens, hidden_size, n=4):
    make = plain.Maker("partials", num_tokens, hidden_size, "cuda", n)
    size = n * hidden_size
    fn = make.float32("fn", n * (n + 2), size) * size**-0.5
    return make.streams("residual", n), fn, make.gates()


@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "n"), [(5, 1280, 4), (513, 2560, 4), (33, 640, 8)]
)
def test_the_bits_of_the_ops(num_tokens, hidden_size, n, num_splits):
    """From the sums that `fused_pre` makes by itself, its outputs."""
    residual, fn, gates = inputs(num_tokens, hidden_size, n)
    scale, base = gates.values()
    layer_input, post_mix, comb_mix = fused_pre(
        residual, fn, scale, base, post_mult=2.0, sinkhorn_repeat=20, num_splits=num_splits
    )
    products, squares = sums_of(residual, fn, num_splits)
    outs = [torch.empty_like(out.flatten(1)) for out in (post_mix, comb_mix, layer_input)]
    options = (EPS, EPS, EPS, 2.0, 20, products.shape[0])
    mhc.mhc_pre_big_fuse_fwd(products, squares, scale, base, residual, *outs, *options)
    for found, wanted in zip(outs, (post_mix, comb_mix, layer_input), strict=True):
        assert torch.equal(found, wanted.flatten(1))


@pytest.mark.parametrize("splits", [1, 8, 9, 40])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_fused_pre_has_the_bits_of_its_parts(splits, n):
    make = plain.Maker("parts", 77, 128, "cuda", n)
    sums = make.partials(splits, 1)
    given = {
        "products": sums["products"][:, :, 0].contiguous() * 10,
        "squares": sums["squares"][:, :, 0].contiguous(),
        **make.gates(),
        "residual": make.streams("residual", n),
    }
    parts = plain.big_fuse_by_parts(mhc, given)
    outs = [torch.empty_like(parts[name]) for name in ("post_mix", "comb_mix", "layer_input")]
    mhc.mhc_pre_big_fuse_fwd(*given.values(), *outs, EPS, EPS, EPS, 2.0, 20, splits)
    for found, wanted in zip(outs, parts.values(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("sinkhorn_eps", [0.0, 1e-20])
def test_sinkhorn_without_an_eps(sinkhorn_eps):
    residual, fn, gates = inputs(65, 256)
    products, squares = sums_of(residual, fn, 4)
    _, post_mix, comb_mix = fused_pre(
        residual, fn, *gates.values(), sinkhorn_eps=sinkhorn_eps, num_splits=4, sinkhorn_repeat=20
    )
    outs = [plain.unwritten(fn, 65, 4), plain.unwritten(fn, 65, 16), residual[:, 0].contiguous()]
    options = (EPS, EPS, sinkhorn_eps, 1.0, 20, products.shape[0])
    mhc.mhc_pre_big_fuse_fwd(products, squares, *gates.values(), residual, *outs, *options)
    assert torch.equal(outs[1], comb_mix.flatten(1))
    assert torch.equal(outs[0], post_mix)


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("num_mixes", [24, 80, 6, 5])
@pytest.mark.parametrize("splits", [1, 16])
def test_other_counts(splits, num_mixes, groups):
    """Any number of mixes and of groups, as TileKernels' kernel takes them."""
    for name in ("reduce_partials_fwd", "reduce_partials_bwd"):
        make = plain.Maker(name, 131, 64, "cuda")
        make.num_mixes = num_mixes
        given = make.partials(splits, groups) | plain.sized(make, groups)
        if name.endswith("bwd"):
            given = plain.reduce_bwd_inputs(make, groups)
        call = plain.PLAIN[name]
        found, truth = plain.evaluate(mhc, call, given), plain.evaluate_exactly(call, given)
        for key, exact in truth.items():
            assert calls.relative_error(found[key], exact) <= calls.FLOAT32, key


@pytest.mark.parametrize("name", ["reduce_partials_bwd", "reduce_partials_of_groups_bwd"])
def test_each_gradient_is_rounded_once(name):
    call = plain.PLAIN[name]
    plain.check_rounded_once(mhc, call, call.inputs(plain.Maker(name, 4097, 64, "cuda")))


def test_a_token_that_is_not_finite_stays_by_itself():
    call = plain.PLAIN["pre_big_fuse_fwd"]
    given = call.inputs(plain.Maker(call.name, 65, 128, "cuda"))
    plainly = call.run(mhc, given)
    given["squares"][3, 17] = float("inf")
    given["products"][0, 40, 2] = float("nan")
    poisoned = call.run(mhc, given)
    clean = torch.ones(65, dtype=torch.bool, device="cuda")
    clean[[17, 40]] = False
    for name, tensor in plainly.items():
        assert torch.equal(tensor[clean], poisoned[name][clean]), name
