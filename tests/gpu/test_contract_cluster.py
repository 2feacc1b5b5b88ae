"""The readout in one pass, by clusters of every size, and where the two passes are made instead."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import oracle
import tolerances
from cases import CONTRACT, PARAMETERS, Case, Dtypes, norm_weight
from tile_mhc import config, contract, reference
from tile_mhc.kernels._shapes import CLUSTER_TOKENS, cluster_size
from tile_mhc.ops import contract_cluster

# CTAs a token, forward and backward.
SIZES = {
    (4, 256): (1, 1),
    (2, 256): (1, 1),
    (4, 1280): (2, 2),
    (4, 2560): (4, 4),
    (2, 2560): (4, 4),
    (4, 7168): (8, 8),
    (2, 7168): (8, 8),
}
NONE = {(8, 256): "most streams", (4, 4160): "a width in 65 pieces", (4, 100): "no whole piece"}
PAIRS = pytest.mark.parametrize("pair", SIZES, ids=str)
ONE_OF_EACH = pytest.mark.parametrize("pair", [(4, 256), *list(SIZES)[2:4], (4, 7168)], ids=str)
NORMS = pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])


def inputs(num_tokens, n, hidden_size, norm=True):
    tensors, options = CONTRACT.inputs((num_tokens,), n, hidden_size, "cuda")
    if norm:
        tensors["norm_weight"] = norm_weight(n * hidden_size, "cuda")
    return tensors, options


def launched(function):
    """The names of the device functions."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return " ".join(event.key for event in recorded.key_averages())


@pytest.mark.parametrize("pair", [*SIZES, *NONE], ids=str)
def test_which_kernels_run(pair):
    sizes = tuple(cluster_size(*pair, backward) for backward in (False, True))
    assert sizes == SIZES.get(pair, (0, 0))
    tensors, _ = inputs(65, *pair)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    grad = torch.randn_like(tensors["residual"][:, 0])
    names = launched(lambda: contract(**leaves).backward(grad))
    assert ("contract_cluster_fwd" in names) == ("contract_cluster_bwd" in names) == (pair in SIZES)
    assert ("contract_fwd_kernel" in names) == (pair in NONE)
    names = launched(lambda: contract(**leaves, num_splits=1))
    assert "contract_fwd_kernel" in names
    assert "contract_cluster_fwd" not in names


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 65, 1001])
@PAIRS
def test_tokens(pair, num_tokens):
    """A part of a group, a whole one and one more; more groups than clusters that run at once."""
    case = Case(num_tokens, *pair, "")
    oracle.check(CONTRACT, case, *inputs(num_tokens, *pair))


@pytest.mark.parametrize("pair", [(4, 2560), (4, 7168)], ids=str)
def test_many_tokens(pair):
    """Every cluster has many groups: the ring goes round, and sums over tokens are long."""
    oracle.check(CONTRACT, Case(4099, *pair, ""), *inputs(4099, *pair, norm=False))


@ONE_OF_EACH
def test_few_sms(pair):
    """One cluster has all the groups."""
    tensors, options = inputs(200, *pair)
    config.set_num_sms(1)
    try:
        assert contract_cluster.num_clusters(200, cluster_size(*pair, False)) == 1
        oracle.check(CONTRACT, Case(200, *pair, ""), tensors, options)
    finally:
        config.set_num_sms(0)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("pair", NONE, ids=str)
def test_two_passes(pair, num_splits):
    def run(**arguments):
        return contract(**arguments, num_splits=num_splits)

    tensors, options = inputs(130, *pair)
    case = Case(130, *pair, NONE[pair])
    oracle.check(CONTRACT, case, tensors, options)
    oracle.check(dataclasses.replace(CONTRACT, run=run), case, tensors, options)


@ONE_OF_EACH
@NORMS
def test_same_bits_every_run(pair, norm):
    oracle.check_repeatable(CONTRACT, *inputs(777, *pair, norm=norm))


@ONE_OF_EACH
def test_bits_of_a_token_alone(pair):
    """What is computed of a token does not depend on the others, nor on how many there are."""
    tensors, _ = inputs(777, *pair)
    grad = torch.randn_like(tensors["residual"][:, 0])
    every = oracle.evaluate(contract, tensors, {}, [grad], ["out"])
    for rows in (slice(0, 1), slice(5, 30), slice(700, 777)):
        few = tensors | {"residual": tensors["residual"][rows]}
        some = oracle.evaluate(contract, few, {}, [grad[rows]], ["out"])
        for name in ("out", "grad_residual"):
            assert torch.equal(some[name], every[name][rows]), name


@ONE_OF_EACH
def test_nonfinite_stays_in_its_token(pair):
    oracle.check_isolation(CONTRACT, *inputs(65, *pair), "residual")


@PAIRS
@NORMS
def test_tf32_rounds_the_weight(pair, norm):
    """The same bits as with a weight that has been rounded before; other bits without."""
    tensors, _ = inputs(130, *pair, norm=norm)
    tensors["weight"] *= tensors.pop("norm_weight", 1)
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    assert torch.equal(contract(**tensors, tf32=True), contract(**rounded))
    assert not torch.equal(contract(**tensors, tf32=True), contract(**tensors))


@PAIRS
def test_tf32_backward(pair):
    """The closed form, as autograd would not round the gradient."""
    tensors, _ = inputs(1000, *pair)
    grad = torch.randn_like(tensors["residual"][:, 0])
    ours = oracle.evaluate(contract, tensors, {"tf32": True}, [grad], ["out"])
    wide = [tensors[name].double() for name in ("residual", "weight", "scale", "bias")]
    wide.append(tensors["norm_weight"].double())
    saved = reference.contract_with_mixes(*wide, 1e-6, 1e-6, True)[1:]
    truth = reference.contract_backward(grad.double(), *wide, *saved, 1e-6, True)
    names = ("residual", "weight", "scale", "bias", "norm_weight")
    for name, expected in zip(names, truth, strict=True):
        found = ours[f"grad_{name}"]
        bar = tolerances.ROUNDING * oracle.relative_error(expected.to(found.dtype), expected)
        # Both sides round to TF32: a gradient near a midpoint may go the other way.
        assert oracle.relative_error(found, expected) <= max(bar, 5e-5), name
    exact = oracle.evaluate(contract, tensors, {}, [grad], ["out"])
    error = oracle.relative_error(exact["grad_weight"], truth[1])
    assert error > 5e-5, "it rounds nothing"


@ONE_OF_EACH
@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
def test_streams_whose_squares_overflow(pair, tf32):
    """Up to the largest of bfloat16, beside tokens near 1, in the forward."""
    tensors, _ = inputs(40, *pair)
    huge = [0, 3, 8, 39]
    alone = tensors["residual"][huge, 0].sign() * 3e38
    tensors["residual"][huge] = 0
    # One stream alone: a sum of several would overflow.
    tensors["residual"][huge, 0] = alone
    out = contract(**tensors, tf32=tf32)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = reference.contract(**wide, tf32=tf32)
    for t in range(40):
        bar = tolerances.ROUNDING * oracle.relative_error(truth[t].bfloat16(), truth[t])
        assert oracle.relative_error(out[t], truth[t]) <= bar, t


@ONE_OF_EACH
def test_sizes_of_tokens_side_by_side(pair):
    """Each as near float64 as if it were alone, forward and backward."""
    tensors, _ = inputs(65, *pair)
    sizes = torch.tensor([1.0, 1e30, 1e-20, 0.0, 1e15], device="cuda").repeat(13)
    tensors["residual"] = (tensors["residual"].double() * sizes[:, None, None]).bfloat16()
    grad = torch.randn_like(tensors["residual"][:, 0])
    ours = oracle.evaluate(contract, tensors, {}, [grad], ["out"])
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = oracle.evaluate(reference.contract, wide, {}, [grad.double()], ["out"])
    for name in ("out", "grad_residual"):
        for t in range(65):
            found, expected = ours[name][t].double(), truth[name][t]
            rounded = (expected.bfloat16().double() - expected).norm()
            assert (found - expected).norm() <= tolerances.ROUNDING * rounded, (name, t)
    for name in ("grad_weight", "grad_norm_weight", "grad_bias"):
        assert oracle.relative_error(ours[name], truth[name]) < 1e-4, name


@PAIRS
def test_bfloat16_parameters(pair):
    tensors, options = inputs(130, *pair)
    tensors = Dtypes(torch.bfloat16, PARAMETERS, "all of them").of(tensors)
    ours = oracle.check(CONTRACT, Case(130, *pair, ""), tensors, options)
    assert all(ours[f"grad_{name}"].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_clusters_that_run_at_once(size):
    sms = config.get_num_sms()
    assert contract_cluster.num_clusters(1, size) == 1
    assert contract_cluster.num_clusters(CLUSTER_TOKENS + 1, size) == min(2, sms // size)
    assert size * contract_cluster.num_clusters(10**6, size) <= sms
