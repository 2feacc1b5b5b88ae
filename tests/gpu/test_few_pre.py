"""A pre of few tokens, with the post before it and without, of both kinds."""

import pytest
import torch

import oracle
import whole_pre
from cases import DELAYED_PRE, FUSED_PRE, POST_PRE, POST_PRE_DELAYED, Case
from launched import launched
from tile_mhc import _device, config, selection
from whole_pre import OPTIONS

EVERY = (FUSED_PRE, DELAYED_PRE, POST_PRE, POST_PRE_DELAYED)
OPS = pytest.mark.parametrize("op", EVERY, ids=str)
# One CTA of columns; warps that not all have splits; two vectors a thread; the widest.
HIDDEN = pytest.mark.parametrize("hidden", [64, 320, 7168, 16384])
ONE_OF_EACH = pytest.mark.parametrize("hidden", [320, 7168])


@pytest.fixture(autouse=True)
def few():
    if not _device.limits().has_one_pass:
        pytest.skip("this GPU has no such kernels")


@OPS
def test_which_kernels_run(op):
    """Not with splits that are given, in the batch-invariant mode, and of more tokens."""
    tensors = whole_pre.inputs(op, 320, 5, "cuda")
    names = ("few_project", "few_pre")
    assert all(name in launched(lambda: op.run(**tensors)) for name in names)
    assert not any(name in launched(lambda: op.run(**tensors, num_splits=1)) for name in names)
    most = whole_pre.inputs(op, 320, selection.FEW_TOKENS + 1, "cuda")
    assert not any(name in launched(lambda: op.run(**most)) for name in names)
    config.set_batch_invariant(True)
    try:
        assert not any(name in launched(lambda: op.run(**tensors)) for name in names)
    finally:
        config.set_batch_invariant(False)


@OPS
@pytest.mark.parametrize("num_tokens", [1, 9, 40, 128])
@HIDDEN
def test_tokens(op, hidden, num_tokens):
    """A part of a group, one more than a whole one, and as many groups as there are; those up to
    FEW_TOKENS_OF_ONE have a kernel of their own."""
    whole_pre.check(op, hidden, num_tokens, "cuda")


@OPS
@ONE_OF_EACH
def test_few_sms(op, hidden):
    """A CTA has all groups, one after the other."""
    config.set_num_sms(1)
    try:
        whole_pre.check(op, hidden, 128, "cuda", norm=False, sinkhorn_repeat=1)
    finally:
        config.set_num_sms(0)


@OPS
@pytest.mark.parametrize("eps", [0.0, 2.0**-60, 2.0**-26, 1e-3, 3.0], ids=str)
def test_eps_of_sinkhorn(op, eps):
    """Products of four sums stay in float32, or are not taken."""
    tensors = whole_pre.inputs(op, 320, 40, "cuda")
    tensors["bias"] *= 20
    options = OPTIONS | {"sinkhorn_eps": eps, "sinkhorn_repeat": 20}
    oracle.check(op, Case(40, 4, 320, ""), tensors, options)


@OPS
@ONE_OF_EACH
@pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])
def test_same_bits_every_run(op, hidden, norm):
    oracle.check_repeatable(op, whole_pre.inputs(op, hidden, 65, "cuda", norm), OPTIONS)


@OPS
@ONE_OF_EACH
def test_nonfinite_stays_in_its_token(op, hidden):
    oracle.check_isolation(op, whole_pre.inputs(op, hidden, 65, "cuda"), OPTIONS, "residual")


@OPS
@ONE_OF_EACH
def test_tf32(op, hidden):
    whole_pre.check_tf32(op, hidden, 65, "cuda")


@OPS
@ONE_OF_EACH
def test_largest_streams(op, hidden):
    whole_pre.check_largest(op, hidden, "cuda")


@OPS
@ONE_OF_EACH
def test_bfloat16_parameters(op, hidden):
    whole_pre.check_bfloat16(op, hidden, 65, "cuda")


@OPS
@ONE_OF_EACH
def test_replayed_graph(op, hidden):
    tensors = whole_pre.inputs(op, hidden, 65, "cuda")
    norm = torch.rand(hidden, device="cuda")
    expected = op.run(**tensors, **OPTIONS, layer_norm_weight=norm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op.run(**tensors, **OPTIONS, layer_norm_weight=norm)
    for _ in range(20):
        for out in outputs:
            out.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
