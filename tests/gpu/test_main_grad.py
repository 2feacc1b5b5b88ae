"""main_grad on a GPU: the kernels write and add to it; and Megatron-Core's DDP with one rank."""

import importlib.util

import pytest
import torch

import distributed
import oracle
import tolerances
from accumulation import GPU_SIZES, PASSING, WITH_PARAMETERS, Call

EVERY_OP = pytest.mark.parametrize("name", [*WITH_PARAMETERS, PASSING])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def check(call, before, dtype):
    """A product and a sum may be one operation in a kernel: a unit in the last place."""
    unit = 2 * torch.finfo(dtype).eps
    for key, parameter in call.parameters.items():
        expected = (before[key].float() + call.plain[key].float()).to(dtype)
        scale = float(expected.float().abs().max())
        torch.testing.assert_close(parameter.main_grad, expected, rtol=unit, atol=unit * scale)
    inputs = {"input": call.input.grad}, {"input": call.plain["input"]}
    oracle.check_same_bits(*inputs, "with main_grad:")


@DTYPES
@EVERY_OP
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
def test_adds(name, size, dtype):
    call = Call(name, size, "cuda")
    before = call.give(dtype)
    call.backward()
    check(call, before, dtype)


@DTYPES
@EVERY_OP
def test_overwrites(name, dtype):
    call = Call(name, (130, 4, 1280), "cuda")
    before = call.give(dtype, overwrite_main_grad=True, grad_added_to_main_grad=False)
    for key, parameter in call.parameters.items():
        parameter.main_grad.fill_(torch.nan)
        before[key].zero_()
    call.backward()
    check(call, before, dtype)
    assert all(parameter.grad_added_to_main_grad for parameter in call.parameters.values())


@EVERY_OP
@pytest.mark.parametrize("shift", [0, 1, 4], ids=lambda shift: f"shifted by {shift}")
def test_views_of_a_flat_buffer(name, shift):
    """Aligned or not; what lies beside them stays."""
    call = Call(name, (130, 4, 1280), "cuda")
    sizes = [parameter.numel() + 4 for parameter in call.parameters.values()]
    flat = torch.zeros(sum(sizes) + shift, device="cuda")
    before, start = {}, shift
    for key, parameter in call.parameters.items():
        parameter.main_grad = flat[start : start + parameter.numel()].view(parameter.shape)
        before[key] = parameter.main_grad.clone()
        start += parameter.numel() + 4
    call.backward()
    check(call, before, torch.float32)
    for size in sizes:
        shift += size
        assert not flat[shift - 4 : shift].any()


@EVERY_OP
@pytest.mark.parametrize("streams", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_other_streams(name, streams):
    call = Call(name, (130, 2, 33), "cuda", streams)
    before = call.give()
    call.backward()
    check(call, before, torch.float32)


@pytest.mark.parametrize("parameters", [torch.bfloat16], ids=["bf16"])
@DTYPES
@EVERY_OP
def test_bfloat16_parameters(name, parameters, dtype):
    """Into float32 the gradient is not rounded to the dtype of the parameter on its way."""
    call = Call(name, (130, 4, 1280), "cuda", dtype=parameters)
    before = call.give(dtype)
    call.backward()
    wide = Call.__new__(Call)
    wide.__dict__ = {**call.__dict__, "parameters": {}}
    for key, parameter in call.parameters.items():
        wide.parameters[key] = torch.nn.Parameter(parameter.detach().float())
    exact, terms = wide.gradients(), wide.gate_terms()
    for key, parameter in call.parameters.items():
        expected = before[key].double() + exact[key].double()
        error = oracle.relative_error(parameter.main_grad, expected, terms.get(key))
        assert error <= (tolerances.FLOAT32_SUM if dtype == torch.float32 else 2**-8), key


@EVERY_OP
def test_same_bits_every_run(name):
    runs = []
    call = Call(name, (4096, 4, 2560), "cuda")
    for _ in range(2):
        for parameter in call.parameters.values():
            parameter.main_grad = torch.ones_like(parameter)
        call.backward()
        runs.append({key: p.main_grad for key, p in call.parameters.items()})
    oracle.check_same_bits(*runs, "run twice:")


@pytest.mark.parametrize(
    ("parameters", "in_fp32"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16 with fp32 main_grad", "bf16"],
)
def test_megatron_ddp(parameters, in_fp32, ranks, tmp_path):
    """Reductions on NCCL overlapped with the backward."""
    pytest.importorskip("megatron.core.distributed", exc_type=ImportError)
    run(distributed.megatron_ddp, ranks, tmp_path, parameters, in_fp32, "cuda")
    check_saved(tmp_path, ranks, parameters, torch.float32 if in_fp32 else parameters)


def test_torch_fsdp(ranks, tmp_path):
    run(distributed.torch_fsdp, ranks, tmp_path, "cuda")
    check_saved(tmp_path, ranks, torch.float32, torch.float32)


@pytest.fixture(params=[1, distributed.RANKS], ids=lambda ranks: f"ranks={ranks}")
def ranks(request):
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    return request.param


def run(worker, ranks, folder, *args):
    if ranks == 1:
        worker(0, 1, folder, *args)
    else:
        distributed.spawn(worker, folder, *args)


def check_saved(folder, ranks, parameters, main_grads):
    """As plain autograd gives them, added in float64, but for the rounding of the sums."""
    found = torch.load(folder / "gradients.pt")
    plain = distributed.gradients(ranks, parameters, "cuda")
    terms = distributed.gate_terms(ranks)
    unit = tolerances.FLOAT32_SUM
    if torch.bfloat16 in (parameters, main_grads):
        unit = distributed.roundings(ranks) * 2**-9
    assert found.keys() == plain.keys()
    for name, grad in found.items():
        expected = plain[name].cpu()
        error = oracle.relative_error(grad.view(expected.shape), expected, terms.get(name))
        assert error <= unit, name


@pytest.mark.parametrize(
    ("parameters", "main_grads"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16 with fp32 main_grad"],
)
@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
def test_megatron_fsdp(strategy, parameters, main_grads, ranks, tmp_path):
    if importlib.util.find_spec("megatron_fsdp") is None:  # not imported: it asks for megatron-core
        pytest.skip("could not import 'megatron_fsdp'")
    run(distributed.megatron_fsdp, ranks, tmp_path, strategy, parameters, main_grads)
    check_saved(tmp_path, ranks, parameters, main_grads)
