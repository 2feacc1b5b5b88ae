"""All of a pre in one pass, with the post before it and without, by clusters of every size."""

import pytest
import torch

import oracle
import whole_pre
from launched import launched
from tile_mhc import _device, config, selection
from tile_mhc.kernels._shapes import pre_cluster
from whole_pre import KERNEL, OPTIONS, SIZES

OPS = pytest.mark.parametrize("op", whole_pre.OPS, ids=str)
HIDDEN = pytest.mark.parametrize("hidden", SIZES)
ONE_OF_EACH = pytest.mark.parametrize("hidden", [1280, 2560, 7168])
NORMS = pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])


@pytest.fixture(autouse=True)
def clusters():
    if not _device.limits().ring_bytes:
        pytest.skip("this GPU has no kernels with clusters")
    with whole_pre.always():
        yield


@OPS
@pytest.mark.parametrize(
    ("n", "hidden"), [*((4, hidden) for hidden in SIZES), *whole_pre.NONE], ids=str
)
def test_which_kernels_run(op, n, hidden):
    tensors = whole_pre.inputs(op, hidden, 65, "cuda", n=n)
    size = pre_cluster(n, hidden, *whole_pre.of_op(op), _device.limits()).size
    assert size == (0 if (n, hidden) in whole_pre.NONE else SIZES[hidden])
    expected = size > 0 and selection.has_clusters_of(size)
    assert (KERNEL in launched(lambda: op.run(**tensors))) == expected


@OPS
def test_when_two_passes_are_made(op):
    """Splits that are given, the batch-invariant mode, and few tokens."""
    tensors = whole_pre.inputs(op, 1280, 65, "cuda")
    assert KERNEL in launched(lambda: op.run(**tensors))
    assert KERNEL not in launched(lambda: op.run(**tensors, num_splits=1))
    config.set_batch_invariant(True)
    try:
        assert KERNEL not in launched(lambda: op.run(**tensors))
    finally:
        config.set_batch_invariant(False)


@OPS
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 65, 1001])
@HIDDEN
def test_tokens(op, hidden, num_tokens):
    """A part of a group, a whole one and one more; more groups than clusters that run at once."""
    whole_pre.check(op, hidden, num_tokens, "cuda")


@OPS
@ONE_OF_EACH
def test_many_tokens(op, hidden):
    """Every cluster has many groups: the ring goes round, and so do those with Sinkhorn's."""
    whole_pre.check(op, hidden, 4099, "cuda", norm=False, sinkhorn_repeat=20)


@OPS
@ONE_OF_EACH
@pytest.mark.parametrize("repeat", [1, 300])
def test_few_sms(op, hidden, repeat):
    """One cluster has all the groups; and waits for Sinkhorn, where that takes long."""
    config.set_num_sms(1)
    try:
        assert selection.num_clusters(400, SIZES[hidden], bound_by_memory=False) == 1
        whole_pre.check(op, hidden, 400, "cuda", sinkhorn_repeat=repeat)
    finally:
        config.set_num_sms(0)


@HIDDEN
def test_bits_of_two_ops(hidden):
    whole_pre.check_two_ops(hidden, 777, "cuda")


@OPS
@ONE_OF_EACH
@NORMS
def test_same_bits_every_run(op, hidden, norm):
    oracle.check_repeatable(op, whole_pre.inputs(op, hidden, 777, "cuda", norm), OPTIONS)


@OPS
@ONE_OF_EACH
def test_bits_of_a_token_alone(op, hidden):
    whole_pre.check_alone(op, hidden, 777, "cuda")


@OPS
@ONE_OF_EACH
def test_nonfinite_stays_in_its_token(op, hidden):
    oracle.check_isolation(op, whole_pre.inputs(op, hidden, 65, "cuda"), OPTIONS, "residual")


@OPS
@HIDDEN
def test_tf32(op, hidden):
    whole_pre.check_tf32(op, hidden, 130, "cuda")


@OPS
@ONE_OF_EACH
def test_largest_streams(op, hidden):
    whole_pre.check_largest(op, hidden, "cuda")


@OPS
@ONE_OF_EACH
def test_without_eps_of_sinkhorn(op, hidden):
    whole_pre.check(op, hidden, 130, "cuda", sinkhorn_eps=0.0)


@OPS
@ONE_OF_EACH
def test_replayed_graph(op, hidden):
    tensors = whole_pre.inputs(op, hidden, 777, "cuda")
    expected = op.run(**tensors, **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op.run(**tensors, **OPTIONS)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@OPS
@HIDDEN
def test_bfloat16_parameters(op, hidden):
    whole_pre.check_bfloat16(op, hidden, 130, "cuda")
