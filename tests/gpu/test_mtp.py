"""One residual that two heads and the next block read, as in tests/cpu/test_mtp.py, by kernels."""

import pytest
import torch

import mtp
from mtp import distance, grads_of, ways, wide
from tile_mhc import recompute_group

H, LEAD = 64, (2, 65)


@pytest.mark.parametrize("way", mtp.WAYS)
def test_every_gradient_counts(way):
    """No further from float64 than the specification in the same dtypes; in a group the bits."""
    chain = mtp.make_chain(H).cuda()
    for part in chain:
        part.layers.bfloat16()
    streams = torch.randn(*LEAD, mtp.N, H, device="cuda").bfloat16()
    upstream = [torch.randn(*LEAD, H, device="cuda") for _ in range(2 * mtp.PARTS)]
    truth = grads_of(mtp.specified, wide(chain), streams.double(), upstream)
    theirs = grads_of(mtp.specified, chain, streams, upstream)
    ours = grads_of(ways(way), chain, streams, upstream)
    again = grads_of(ways(way, recompute_group), chain, streams, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    # Two equally exact runs differ by chance; here by some percent.
    assert distance(ours[0], truth[0]) <= 1.1 * distance(theirs[0], truth[0])
    ours, theirs, truth = (
        torch.cat([g.double().flatten() for g in of[1:]]) for of in (ours, theirs, truth)
    )
    assert distance(ours, truth) <= 1.1 * distance(theirs, truth)
