"""The modules under torch's fully_shard, on two gloo ranks: float32 mixing in a bfloat16 block."""

import re

import pytest
import torch
import torch.distributed as dist

import distributed
import oracle
import sharding
import tolerances

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


def check(found, calls_methods, unit):
    """The output bit by bit; gradients as the mean over ranks, but for the rounding of sums."""
    model = sharding.make_model(calls_methods)
    assert torch.equal(found.pop("out"), sharding.run(model, 0))
    total = {name: p.grad.double() for name, p in model.named_parameters()}
    for rank in range(1, distributed.RANKS):
        model.zero_grad()
        sharding.run(model, rank)
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.double()
    assert found.keys() == total.keys()
    for name, grad in found.items():
        own = name.split(".")[-2] in ("hc", "head")
        bar = tolerances.FLOAT32_SUM if own else unit
        assert oracle.relative_error(grad, total[name] / distributed.RANKS) <= bar, name


@pytest.mark.parametrize("calls_methods", [False, True], ids=["forward", "pre and post"])
def test_a_bfloat16_block(calls_methods, tmp_path):
    found = distributed.spawn(sharding.of_original_dtypes, tmp_path, calls_methods)
    # bfloat16 gradients, added in it.
    check(found, calls_methods, unit=2 * 2**-9)


@pytest.mark.parametrize("calls_methods", [False, True], ids=["forward", "pre and post"])
def test_mixed_precision(calls_methods, tmp_path):
    """The bfloat16 gradients are those of the block above; added in float32."""
    found = distributed.spawn(sharding.of_mixed_precision, tmp_path, calls_methods)
    check(found, calls_methods, unit=tolerances.FLOAT32_SUM)


def test_pre_without_registration(tmp_path):
    found = distributed.spawn(sharding.refused, tmp_path)
    expected = (
        "ShapeError: fused_pre: weight must be a plain tensor, .*register_fsdp_forward_method"
    )
    assert re.match(expected, found["pre"])
