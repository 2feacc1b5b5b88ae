"""The readout in one pass, by clusters of every size, and where the two passes are made instead."""

import dataclasses
import importlib.util

import pytest
import torch

import oracle
import readout
from cases import CONTRACT, PARAMETERS, Case, Dtypes
from launched import launched
from readout import NONE, SIZES
from tile_mhc import _device, config, contract, reference, selection
from tile_mhc.kernels._shapes import CLUSTER_TOKENS, cluster_size

PAIRS = pytest.mark.parametrize("pair", SIZES, ids=str)
ONE_OF_EACH = pytest.mark.parametrize(
    "pair", [(4, 256), (4, 1280), (4, 2560), (4, 4096), (4, 7168)], ids=str
)
NORMS = pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])


@pytest.fixture(autouse=True)
def clusters():
    if not _device.limits().ring_bytes:
        pytest.skip("this GPU has no kernels with clusters")


def inputs(pair, num_tokens, norm=True):
    return readout.inputs(pair, num_tokens, "cuda", norm)


@pytest.mark.parametrize("pair", [*SIZES, *NONE], ids=str)
def test_which_kernels_run(pair):
    sizes = tuple(cluster_size(*pair, backward, _device.limits()) for backward in (False, True))
    assert sizes == SIZES.get(pair, (0, 0))
    forward, backward = (size > 0 for size in sizes)
    tensors = inputs(pair, 65)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    grad = torch.randn_like(tensors["residual"][:, 0])
    names = launched(lambda: contract(**leaves).backward(grad))
    assert ("contract_cluster_fwd" in names) == forward
    assert ("contract_cluster_bwd" in names) == backward
    assert ("contract_fwd_kernel" in names) == (not forward)
    assert ("aggregate_mix_bwd" in names) == (not backward)


def test_a_number_of_splits_asks_for_two_passes():
    names = launched(lambda: contract(**inputs((4, 1280), 65), num_splits=1))
    assert "contract_fwd_kernel" in names
    assert "contract_cluster_fwd" not in names


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 65, 1001])
@PAIRS
def test_tokens(pair, num_tokens):
    """A part of a group, a whole one and one more; more groups than clusters that run at once."""
    case = Case(num_tokens, *pair, "")
    oracle.check(CONTRACT, case, inputs(pair, num_tokens), {})


@pytest.mark.parametrize("pair", [(4, 2560), (4, 7168)], ids=str)
def test_many_tokens(pair):
    """Every cluster has many groups: the ring goes round, and sums over tokens are long."""
    oracle.check(CONTRACT, Case(4099, *pair, ""), inputs(pair, 4099, norm=False), {})


@ONE_OF_EACH
def test_few_sms(pair):
    """One cluster has all the groups."""
    tensors = inputs(pair, 200)
    config.set_num_sms(1)
    try:
        assert (
            selection.num_clusters(
                200, cluster_size(*pair, False, _device.limits()), bound_by_memory=False
            )
            == 1
        )
        oracle.check(CONTRACT, Case(200, *pair, ""), tensors, {})
    finally:
        config.set_num_sms(0)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("pair", NONE, ids=str)
def test_two_passes(pair, num_splits):
    def run(**arguments):
        return contract(**arguments, num_splits=num_splits)

    tensors = inputs(pair, 130)
    case = Case(130, *pair, NONE[pair])
    oracle.check(CONTRACT, case, tensors, {})
    oracle.check(dataclasses.replace(CONTRACT, run=run), case, tensors, {})


@ONE_OF_EACH
@NORMS
def test_same_bits_every_run(pair, norm):
    oracle.check_repeatable(CONTRACT, inputs(pair, 777, norm), {})


@ONE_OF_EACH
def test_bits_of_a_token_alone(pair):
    """What is computed of a token does not depend on the others, nor on how many there are."""
    tensors = inputs(pair, 777)
    grad = torch.randn_like(tensors["residual"][:, 0])
    every = oracle.evaluate(contract, tensors, {}, [grad], ["out"])
    for rows in (slice(0, 1), slice(5, 30), slice(700, 777)):
        few = tensors | {"residual": tensors["residual"][rows]}
        some = oracle.evaluate(contract, few, {}, [grad[rows]], ["out"])
        for name in ("out", "grad_residual"):
            assert torch.equal(some[name], every[name][rows]), name


@ONE_OF_EACH
def test_nonfinite_stays_in_its_token(pair):
    oracle.check_isolation(CONTRACT, inputs(pair, 65), {}, "residual")


@PAIRS
@NORMS
def test_tf32_rounds_the_weight(pair, norm):
    """The same bits as with a weight that has been rounded before; other bits without."""
    tensors = inputs(pair, 130, norm)
    tensors["weight"] *= tensors.pop("norm_weight", 1)
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    assert torch.equal(contract(**tensors, tf32=True), contract(**rounded))
    assert not torch.equal(contract(**tensors, tf32=True), contract(**tensors))


@PAIRS
def test_tf32_both_ways(pair):
    readout.check_tf32(pair, 1000, "cuda")


@ONE_OF_EACH
@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
def test_largest_streams(pair, tf32):
    readout.check_largest(pair, "cuda", tf32)


@ONE_OF_EACH
def test_sizes_of_tokens_side_by_side(pair):
    readout.check_sizes(pair, "cuda")


@PAIRS
def test_bfloat16_parameters(pair):
    tensors = inputs(pair, 130)
    tensors = Dtypes(torch.bfloat16, PARAMETERS, "all of them").of(tensors)
    ours = oracle.check(CONTRACT, Case(130, *pair, ""), tensors, {})
    assert all(ours[f"grad_{name}"].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_clusters_that_run_at_once(size):
    sms = config.get_num_sms()
    assert selection.num_clusters(1, size, bound_by_memory=False) == 1
    assert selection.num_clusters(CLUSTER_TOKENS + 1, size, bound_by_memory=False) == min(
        2, sms // size
    )
    most = selection.num_clusters(10**6, size, bound_by_memory=False)
    assert size * most <= sms
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
        assert most == selection._clusters_at_once(size)
    config.set_num_sms(sms - 1)
    try:
        assert selection.num_clusters(10**6, size, bound_by_memory=False) <= most
    finally:
        config.set_num_sms(0)
