"""main_grad on a GPU: the kernels write and add to it; and Megatron-Core's DDP with one rank."""

import importlib.util
from unittest import mock

import pytest
import torch

import distributed
import oracle
import tolerances
from accumulation import GPU_SIZES, PASSING, WITH_PARAMETERS, Call
from tile_mhc import main_grad

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
    units = distributed.Layer, distributed.Head
    run(distributed.megatron_fsdp, ranks, tmp_path, strategy, parameters, main_grads, units, "cuda")
    check_saved(tmp_path, ranks, parameters, main_grads)


class Captured:
    """An op of which an eager step has been made, as Megatron does before it captures."""

    def __init__(self, name):
        self.call = Call(name, (130, 4, 1280), "cuda")
        self.graph = torch.cuda.CUDAGraph()
        self.step()

    def step(self):
        self.call.give(grad_added_to_main_grad=False)
        self.call.backward()
        for parameter in self.call.parameters.values():
            assert parameter.grad_added_to_main_grad is True
            assert not parameter.grad.any()
            parameter.grad = None
        self.call.input.grad = None

    def check(self, replays):
        """Each replay adds, as an eager backward would."""
        for parameter in self.call.parameters.values():
            parameter.main_grad.zero_()
        for _ in range(replays):
            self.graph.replay()
        for key, parameter in self.call.parameters.items():
            expected = torch.zeros_like(parameter.main_grad)
            for _ in range(replays):
                expected += self.call.plain[key]
            unit = 2 * replays * torch.finfo(torch.float32).eps
            scale = float(expected.abs().max())
            assert scale > 0
            torch.testing.assert_close(
                parameter.main_grad, expected, rtol=unit, atol=unit * scale, msg=key
            )


@EVERY_OP
@pytest.mark.parametrize("adds", ["in the graph", "by its hooks"])
def test_megatron_cuda_graph(name, adds):
    """Captured after an eager step, by torch.autograd.grad with the parameters among its inputs.

    Megatron-Core 0.19 adds what that returns inside the graph, 0.16 hands it to autograd behind a
    replay: both where the flag is not set.
    """
    captured = Captured(name)
    call = captured.call
    parameters = list(call.parameters.values())
    with torch.cuda.graph(captured.graph):
        found = torch.autograd.grad(call.outputs(), [call.input, *parameters], call.upstream)[1:]
        if adds == "in the graph":
            for parameter, grad in zip(parameters, found, strict=True):
                if not parameter.grad_added_to_main_grad:
                    parameter.main_grad.add_(grad)
    assert not any(parameter.grad_added_to_main_grad for parameter in parameters)
    if adds == "in the graph":
        captured.check(3)
        return
    captured.graph.replay()
    for (key, parameter), grad in zip(call.parameters.items(), found, strict=True):
        oracle.check_same_bits({key: grad}, {key: call.plain[key]}, "in a graph:")
        assert parameter.grad_added_to_main_grad is False


@EVERY_OP
def test_whole_backward_in_a_cuda_graph(name):
    """The kernels add inside the graph; what autograd gets is not kept from its memory."""
    captured = Captured(name)
    with mock.patch.object(main_grad, "_dummies", {}) as kept:
        with torch.cuda.graph(captured.graph):
            captured.call.backward()
        assert not kept
        captured.check(3)
        captured.step()
        assert len(kept) == len({p.shape for p in captured.call.parameters.values()})
