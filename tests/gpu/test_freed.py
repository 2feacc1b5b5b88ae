"""Inputs whose memory is freed, as tests/cpu/test_freed.py: no kernel gets them."""

import pytest
import torch

import oracle
from cases import CONTRACT, FUSED_PRE, OPS, PROJECTION
from tile_mhc import ShapeError

SHAPE = ((5,), 4, 64, "cuda")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_input_of_every_op(op):
    tensors, options = op.inputs(*SHAPE)
    for name in tensors:
        given = tensors | {name: tensors[name].clone()}
        given[name].untyped_storage().resize_(0)
        message = f"^{op.run.__name__}: {name} must be in memory; got .* whose storage is freed"
        with pytest.raises(ShapeError, match=message):
            op.run(**given, **options)
    torch.cuda.synchronize()  # nothing has read them
    outputs = oracle.as_tuple(op.run(**tensors, **options))
    assert all(out.isfinite().all() for out in outputs)


@pytest.mark.parametrize("op", [PROJECTION, CONTRACT, FUSED_PRE], ids=lambda op: op.name)
def test_freed_between_forward_and_backward(op):
    tensors, options = op.inputs(*SHAPE)
    for tensor in tensors.values():
        tensor.requires_grad_()
    loss = sum(out.float().sum() for out in oracle.as_tuple(op.run(**tensors, **options)))
    tensors["weight"].untyped_storage().resize_(0)
    message = f"^{op.name}_backward: weight must be in memory; got .* whose storage is freed"
    with pytest.raises(ShapeError, match=message):
        loss.backward()
    torch.cuda.synchronize()
