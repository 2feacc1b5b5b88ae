"""Checks on a GPU: no message waits for the device, and what torch.jit.trace records runs there."""

import warnings

import pytest
import torch

import tile_mhc
from tile_mhc import ShapeError, UnsupportedError
from tile_mhc.nn import HyperConnection


@pytest.fixture
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_message_looks_at_values(no_synchronisation):
    streams = torch.ones(3, 4, 64, device="cuda", dtype=torch.bfloat16)
    hc = HyperConnection(64, device="cuda")
    for output in (lambda x: (x, x), lambda x: [x], lambda x: {"last": x}):
        with pytest.raises(ShapeError, match=r"post: layer_output must be a torch\.Tensor; got "):
            hc(streams, output)
    number = torch.empty(1, device="cuda")
    with pytest.raises(
        ShapeError, match=r"repeat must be an integer .*; got \(1,\) float32 on cuda"
    ):
        tile_mhc.sinkhorn(torch.empty(3, 4, 4, device="cuda"), repeat=number)
    with pytest.raises(UnsupportedError, match=r"n must be one of .*; got \(1,\) float32 on cuda"):
        tile_mhc.expand(streams[:, 0].contiguous(), number)


def test_jit_trace():
    mix = torch.rand(5, 4, device="cuda")
    streams = torch.randn(5, 4, 64, device="cuda").bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        traced = torch.jit.trace(tile_mhc.aggregate, (streams[:3], mix[:3]))
    assert torch.equal(traced(streams, mix), tile_mhc.aggregate(streams, mix))
