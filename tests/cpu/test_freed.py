"""Tensors of the right shape whose memory a framework has freed: an error, before they are read.

Megatron-FSDP and FSDP free the parameters of a module between its calls. An op outside its
`forward`, as `hc.pre(...)` is, meets them so. On a GPU tests/gpu/test_freed.py.
"""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
from cases import CONTRACT, FUSED_PRE, OPS, PROJECTION
from tile_mhc import ShapeError
from tile_mhc.nn import HyperConnection, HyperHead

SHAPE = ((5,), 4, 64, "cpu")
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def in_a_bucket(tensor):
    """The same numbers, somewhere in memory that others share."""
    bucket = torch.zeros(tensor.numel() + 16, dtype=tensor.dtype)
    bucket[16:] = tensor.detach().flatten()
    return bucket[16:].view(tensor.shape)


def freed(op, name, tensor):
    what = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on cpu"
    return f"^{op}: {name} must be in memory; got {re.escape(what)}, whose storage is freed. Where"


@EVERY_OP
@pytest.mark.parametrize("place", [torch.clone, in_a_bucket], ids=["alone", "in a bucket"])
def test_every_input_of_every_op(op, place):
    tensors, options = op.inputs(*SHAPE)
    public = op.run.__name__
    for name in tensors:
        given = tensors | {name: place(tensors[name])}
        given[name].untyped_storage().resize_(0)
        with pytest.raises(ShapeError, match=freed(public, name, given[name])):
            op.run(**given, **options)


@pytest.mark.parametrize("op", [PROJECTION, CONTRACT, FUSED_PRE], ids=lambda op: op.name)
def test_freed_between_forward_and_backward(op):
    tensors, options = op.inputs(*SHAPE)
    for tensor in tensors.values():
        tensor.requires_grad_()
    loss = sum(out.float().sum() for out in oracle.as_tuple(op.run(**tensors, **options)))
    tensors["weight"].untyped_storage().resize_(0)
    with pytest.raises(ShapeError, match=freed(f"{op.name}_backward", "weight", tensors["weight"])):
        loss.backward()
    assert all(tensor.grad is None for tensor in tensors.values())


@pytest.mark.parametrize("name", ["weight", "scale", "bias", "norm_weight"])
def test_modules(name):
    streams = torch.randn(5, 4, 64).bfloat16()
    module, head = HyperConnection(64, norm_weight=True), HyperHead(64, norm_weight=True)
    for hc, op, run in (
        (module, "fused_pre", lambda: module.pre(streams)),
        (module, "fused_pre", lambda: module(streams, torch.tanh)),
        (head, "contract", lambda: head(streams)),
    ):
        parameter = getattr(hc, name)
        size = parameter.untyped_storage().nbytes()
        parameter.untyped_storage().resize_(0)
        with pytest.raises(ShapeError, match=freed(op, name, parameter)):
            run()
        parameter.untyped_storage().resize_(size)
        torch.nn.init.zeros_(parameter)
        assert all(out.isfinite().all() for out in oracle.as_tuple(run()))


@EVERY_OP
def test_what_has_no_memory_by_its_nature(op):
    """No token, the meta device, fake tensors."""
    tensors, options = op.inputs((0,), *SHAPE[1:])
    shapes = [out.shape for out in oracle.as_tuple(op.run(**tensors, **options))]
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert [out.shape for out in oracle.as_tuple(op.run(**meta, **options))] == shapes
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        assert [out.shape for out in oracle.as_tuple(op.run(**fake, **options))] == shapes
