"""Under Megatron-Core's DDP and Megatron-FSDP, which give main_grad, and under torch's FSDP2, which
does not: layers and a readout that run twice in a forward."""

import importlib.util

import pytest
import torch
import torch.distributed as dist

import distributed
import oracle
import tolerances

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)

UNITS = distributed.Layer, distributed.Head


def check(found, parameters, main_grad):
    """As plain autograd of the ops gives them, added in float64, but for the rounding of the sums;
    and as near float64 all the way as plain autograd is."""
    plain = distributed.gradients(distributed.RANKS, parameters)
    truth = distributed.gradients(distributed.RANKS, torch.float64)
    terms = distributed.gate_terms(distributed.RANKS)
    assert found.keys() == plain.keys()
    unit = tolerances.FLOAT32_SUM
    if torch.bfloat16 in (parameters, main_grad):
        unit = distributed.roundings(distributed.RANKS) * 2**-9
    for name, flat in found.items():
        grad = flat.view(plain[name].shape)
        assert grad.dtype == main_grad
        summed = terms.get(name)
        assert oracle.relative_error(grad, plain[name], summed) <= unit, name
        bar = 1.01 * oracle.relative_error(plain[name], truth[name], summed) + unit
        assert oracle.relative_error(grad, truth[name], summed) <= bar, name


@pytest.mark.parametrize(
    ("parameters", "in_fp32"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16 with fp32 main_grad", "bf16"],
)
def test_megatron_ddp(parameters, in_fp32, tmp_path):
    """Two ranks, reductions overlapped with the backward, several micro-batches, a frozen
    parameter, and one that two readouts share."""
    pytest.importorskip("megatron.core", exc_type=ImportError)
    found = distributed.spawn(distributed.megatron_ddp, tmp_path, parameters, in_fp32)
    check(found, parameters, torch.float32 if in_fp32 else parameters)


@pytest.mark.parametrize(
    ("strategy", "units"),
    [
        ("no_shard", UNITS),
        ("optim", UNITS),
        ("optim_grads", UNITS),
        ("optim_grads_params", UNITS),
        ("optim_grads_params", UNITS[:1]),
    ],
    ids=["no_shard", "optim", "optim_grads", "optim_grads_params", "readout in no unit"],
)
def test_megatron_fsdp(strategy, units, tmp_path):
    """Units that are called twice: it gathers their parameters before each call's backward."""
    if importlib.util.find_spec("megatron_fsdp") is None:  # not imported: it asks for megatron-core
        pytest.skip("could not import 'megatron_fsdp'")
    dtypes = torch.float32, torch.float32
    worker = distributed.megatron_fsdp
    check(distributed.spawn(worker, tmp_path, strategy, *dtypes, units, "cpu"), *dtypes)


def test_torch_fsdp(tmp_path):
    check(distributed.spawn(distributed.torch_fsdp, tmp_path), torch.float32, torch.float32)
