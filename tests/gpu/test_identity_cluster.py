"""identity_pre in one pass, by clusters of every size, and where two passes are made instead."""

import pytest
import torch

import oracle
import unmixed
from cases import IDENTITY_OUTPUTS, IDENTITY_PRE, PARAMETERS, Case, Dtypes
from launched import launched
from tile_mhc import _device, config, identity_pre, reference, selection
from tile_mhc.kernels._shapes import identity_cluster_size
from unmixed import NONE, SIZES

HIDDEN = pytest.mark.parametrize("hidden", SIZES)
ONE_OF_EACH = pytest.mark.parametrize("hidden", [192, 1280, 2560, 7168])
NORMS = pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])


@pytest.fixture(autouse=True)
def clusters():
    if not _device.limits().ring_bytes:
        pytest.skip("this GPU has no kernels with clusters")


@pytest.mark.parametrize(("n", "hidden_size"), [*((4, hidden) for hidden in SIZES), *NONE], ids=str)
@pytest.mark.parametrize("passes", [False, True], ids=["alone", "passing"])
def test_which_kernels_run(n, hidden_size, passes):
    forward = selection.identity_reads_once(torch.bfloat16, n, hidden_size, False)
    backward = selection.identity_reads_once(torch.bfloat16, n, hidden_size, True, passes)
    tensors = unmixed.inputs(hidden_size, 65, "cuda", n=n)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def run():
        outputs = identity_pre(**leaves, passes_residual=passes)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])

    names = launched(run)
    assert ("identity_cluster_fwd" in names) == forward
    assert ("identity_cluster_bwd" in names) == backward
    assert ("identity_pre_fwd_kernel" in names) == (not forward)
    assert ("identity_gates_bwd" in names) == (not backward)


def test_batch_invariant_clusters_are_those_of_every_gpu():
    """Of 7168 columns the backward has clusters of 16, and in this mode two passes."""
    tensors = unmixed.inputs(7168, 65, "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def run():
        identity_pre(**leaves)[0].sum().backward()

    config.set_batch_invariant(True)
    try:
        names = launched(run)
    finally:
        config.set_batch_invariant(False)
    assert "identity_cluster_fwd" in names
    assert "identity_cluster_bwd" not in names
    assert "identity_cluster_bwd" in launched(run)


def test_a_number_of_splits_asks_for_two_passes():
    names = launched(lambda: identity_pre(**unmixed.inputs(1280, 65, "cuda"), num_splits=1))
    assert "identity_pre_fwd_kernel" in names
    assert "identity_cluster_fwd" not in names


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 65, 1001])
@HIDDEN
def test_tokens(hidden, num_tokens):
    """A part of a group, a whole one and one more; more groups than clusters that run at once."""
    unmixed.check(hidden, num_tokens, "cuda")


@pytest.mark.parametrize("hidden", [2560, 7168])
def test_many_tokens(hidden):
    """Every cluster has many groups: the ring goes round, and sums over tokens are long."""
    unmixed.check(hidden, 4099, "cuda", norm=False)


@ONE_OF_EACH
def test_few_sms(hidden):
    """One cluster has all the groups."""
    config.set_num_sms(1)
    try:
        size = identity_cluster_size(4, hidden, True, True, _device.limits())
        assert selection.num_clusters(200, size, bound_by_memory=False) == 1
        unmixed.check(hidden, 200, "cuda")
    finally:
        config.set_num_sms(0)


@ONE_OF_EACH
@NORMS
def test_same_bits_every_run(hidden, norm):
    tensors = unmixed.inputs(hidden, 777, "cuda", norm)
    for op in (IDENTITY_PRE, unmixed.PASSING):
        oracle.check_repeatable(op, tensors, {})


@ONE_OF_EACH
def test_bits_of_a_token_alone(hidden):
    """What is computed of a token does not depend on the others, nor on how many there are."""
    tensors = unmixed.inputs(hidden, 777, "cuda")
    upstream = oracle.upstream_of(IDENTITY_PRE, tensors, {})
    every = oracle.evaluate(identity_pre, tensors, {}, upstream, IDENTITY_OUTPUTS)
    for rows in (slice(0, 1), slice(5, 30), slice(700, 777)):
        few = tensors | {"residual": tensors["residual"][rows]}
        grads = [grad[rows] for grad in upstream]
        some = oracle.evaluate(identity_pre, few, {}, grads, IDENTITY_OUTPUTS)
        for name in ("layer_input", "post_mix", "grad_residual"):
            assert torch.equal(some[name], every[name][rows]), name


@ONE_OF_EACH
def test_nonfinite_stays_in_its_token(hidden):
    tensors = unmixed.inputs(hidden, 65, "cuda")
    for op in (IDENTITY_PRE, unmixed.PASSING):
        oracle.check_isolation(op, tensors, {}, "residual")


@HIDDEN
@NORMS
def test_tf32_rounds_the_weight(hidden, norm):
    """The same bits as with a weight that has been rounded before; other bits without."""
    tensors = unmixed.inputs(hidden, 130, "cuda", norm)
    tensors["weight"] *= tensors.pop("norm_weight", 1)
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    found, expected = identity_pre(**tensors, tf32=True), identity_pre(**rounded)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[1], identity_pre(**tensors)[1])


@HIDDEN
def test_tf32_both_ways(hidden):
    unmixed.check_tf32(hidden, 1000, "cuda")


@ONE_OF_EACH
@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])
def test_largest_streams(hidden, tf32):
    unmixed.check_largest(hidden, "cuda", tf32)


@ONE_OF_EACH
def test_sizes_of_tokens_side_by_side(hidden):
    unmixed.check_sizes(hidden, "cuda")


@ONE_OF_EACH
def test_small_gradients(hidden):
    unmixed.check_small_gradients(hidden, "cuda")


@HIDDEN
def test_bfloat16_parameters(hidden):
    tensors = unmixed.inputs(hidden, 130, "cuda")
    tensors = Dtypes(torch.bfloat16, PARAMETERS, "all of them").of(tensors)
    ours = oracle.check(IDENTITY_PRE, Case(130, 4, hidden, ""), tensors, {})
    assert all(ours[f"grad_{name}"].dtype == tensor.dtype for name, tensor in tensors.items())
