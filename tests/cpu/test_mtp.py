"""One residual that two heads and the next block read: every gradient counts, in every way."""

import contextlib

import pytest
import torch

import mtp
from mtp import distance, grads_of, ways, wide
from tile_mhc import recompute_group

H, LEAD = 32, (2, 5)
WAYS = pytest.mark.parametrize("way", mtp.WAYS)
BF16 = torch.bfloat16


def make(dtype=torch.float32):
    chain = mtp.make_chain(H)
    for part in chain:
        part.layers.to(dtype)
    return chain, torch.randn(*LEAD, mtp.N, H).to(dtype)


def upstreams(count=2 * mtp.PARTS):
    return [torch.randn(*LEAD, H) for _ in range(count)]


@WAYS
@pytest.mark.parametrize("around", [contextlib.nullcontext, recompute_group])
def test_every_gradient_counts(way, around):
    chain, streams = make()
    upstream = upstreams()
    truth = grads_of(mtp.specified, wide(chain), streams.double(), upstream)
    names = ["streams", *(name for name, _ in chain.named_parameters())]
    found = grads_of(ways(way, around), chain, streams, upstream)
    for name, grad, exact in zip(names, found, truth, strict=True):
        # The sums of a scale's gradient may cancel.
        assert distance(grad, exact) <= (1e-3 if name.endswith("scale") else 1e-5), name


@pytest.mark.parametrize("unused", range(2 * mtp.PARTS))
def test_each_head_has_a_share(unused):
    """That the test above would miss none: what it compares changes with every head."""
    chain, streams = make()
    upstream = upstreams()
    truth = grads_of(mtp.specified, wide(chain), streams.double(), upstream)
    upstream[unused] = None
    without = grads_of(mtp.specified, wide(chain), streams.double(), upstream)
    assert distance(without[0], truth[0]) > 1e-2


@WAYS
@pytest.mark.parametrize("unused", [(0, 1), (1,), (4, 5), (0, 1, 2, 3)])
def test_heads_that_are_not_used(way, unused):
    chain, streams = make()
    upstream = [None if at in unused else g for at, g in enumerate(upstreams())]
    truth = grads_of(mtp.specified, wide(chain), streams.double(), upstream)
    found = grads_of(ways(way, recompute_group), chain, streams, upstream)
    names = ["streams", *(name for name, _ in chain.named_parameters())]
    for name, grad, exact in zip(names, found, truth, strict=True):
        if exact is None:  # zeros of a boundary, of whose outputs the streams alone are used
            assert grad is None or not grad.any(), name
        else:
            assert distance(grad, exact) <= (1e-3 if name.endswith("scale") else 1e-5), name


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_group_has_the_same_bits(way, dtype):
    chain, streams = make(dtype)
    upstream = upstreams()
    expected = grads_of(ways(way), chain, streams, upstream)
    found = grads_of(ways(way, recompute_group), chain, streams, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@WAYS
def test_streams_of_bfloat16(way):
    """No further from float64 than the specification in the same dtypes."""
    chain, streams = make(BF16)
    upstream = upstreams()
    truth = grads_of(mtp.specified, wide(chain), streams.double(), upstream)
    theirs = grads_of(mtp.specified, chain, streams, upstream)
    ours = grads_of(ways(way), chain, streams, upstream)
    assert distance(ours[0], truth[0]) <= 1.1 * distance(theirs[0], truth[0])
    ours, theirs, truth = (
        torch.cat([g.double().flatten() for g in of[1:]]) for of in (ours, theirs, truth)
    )
    assert distance(ours, truth) <= 1.1 * distance(theirs, truth)


@WAYS
@pytest.mark.parametrize("around", [contextlib.nullcontext, recompute_group])
def test_a_backward_of_each_head(way, around):
    """One loss after another, as trainers of several predictions do."""
    chain, streams = make()
    upstream = upstreams()
    expected = grads_of(ways(way), chain, streams, upstream)
    leaf = streams.detach().requires_grad_()
    outs = ways(way, around)(chain, leaf)
    for at in torch.randperm(len(outs)).tolist():
        outs[at].backward(upstream[at], retain_graph=True)
    found = [leaf.grad, *(p.grad for p in chain.parameters())]
    names = ["streams", *(name for name, _ in chain.named_parameters())]
    for name, grad, want in zip(names, found, expected, strict=True):
        want = want.double()
        assert distance(grad, want) <= (1e-3 if name.endswith("scale") else 1e-5), name
