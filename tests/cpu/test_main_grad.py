"""Gradients of parameters that carry `main_grad`: Megatron's protocol, without Megatron."""

import asyncio
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import oracle
import tile_mhc
import tolerances
from accumulation import PASSING, WITH_PARAMETERS, Call
from tile_mhc import GradAccumulator, ShapeError, UnsupportedError, main_grad, without_main_grad
from tile_mhc.compat.tile_kernels.modeling.mhc.ops import mhc_pre_norm_fn

EVERY_OP = pytest.mark.parametrize("name", [*WITH_PARAMETERS, PASSING])
WRITERS = pytest.mark.parametrize("name", ["projection", "fused_pre", PASSING])


@EVERY_OP
def test_adds_to_main_grad(name):
    call = Call(name)
    before = call.give()
    call.backward()
    call.check_added(before)
    assert all(parameter.grad is None for parameter in call.parameters.values())
    assert torch.equal(call.input.grad, call.plain["input"])


@EVERY_OP
def test_adds_to_views_of_one_flat_buffer(name):
    """As Megatron's DDP keeps them: back to back, so that some are misaligned for a kernel."""
    call = Call(name)
    flat = torch.randn(sum(p.numel() for p in call.parameters.values()) + 1)
    before, start = {}, 1
    for key, parameter in call.parameters.items():
        parameter.main_grad = flat[start : start + parameter.numel()].view(parameter.shape)
        before[key] = parameter.main_grad.clone()
        start += parameter.numel()
    first = flat[0].clone()
    call.backward()
    call.check_added(before)
    assert flat[0] == first


@WRITERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_main_grad(name, dtype):
    """The sum is rounded once, to the dtype of main_grad."""
    call = Call(name)
    before = {}
    for key, parameter in call.parameters.items():
        parameter.main_grad = torch.randn(parameter.shape).to(dtype)
        before[key] = parameter.main_grad.clone()
    call.backward()
    for key, parameter in call.parameters.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = (before[key].to(wide) + call.plain[key].to(wide)).to(dtype)
        assert torch.equal(parameter.main_grad, expected), key


@WRITERS
def test_strided_main_grad(name):
    call = Call(name)
    before = {}
    for key, parameter in call.parameters.items():
        parameter.main_grad = torch.randn(*parameter.shape, 2)[..., 0]
        before[key] = parameter.main_grad.clone()
    call.backward()
    call.check_added(before)


@EVERY_OP
def test_the_hooks_of_ddp_fire(name):
    """With the flag: autograd gets a gradient of the right shape and dtype, that means nothing."""
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    seen = {}
    for key, parameter in call.parameters.items():

        def hook(parameter, key=key):
            seen[key] = (parameter.grad, parameter.grad_added_to_main_grad)

        parameter.register_post_accumulate_grad_hook(hook)
    call.backward()
    call.check_added(before)
    for key, parameter in call.parameters.items():
        grad, flag = seen[key]
        assert (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype)
        assert flag is True


def test_the_gradient_that_means_nothing_is_shared():
    calls = [Call("projection"), Call("projection")]
    for call in calls:
        call.give(grad_added_to_main_grad=False)
        call.backward()
    first, second = (call.parameters["weight"].grad for call in calls)
    assert first.data_ptr() == second.data_ptr()
    assert first.data_ptr() != calls[0].parameters["norm_weight"].grad.data_ptr()


def test_zero_out_wgrad():
    """Megatron's hook adds it although the flag is set: zeros, that no other gradient shares."""
    calls = [Call("projection"), Call("projection")]
    for call in calls:
        before = call.give(grad_added_to_main_grad=False, zero_out_wgrad=True)
        call.backward()
        call.check_added(before)
        assert not any(parameter.grad.any() for parameter in call.parameters.values())
    first, second = (call.parameters["weight"].grad for call in calls)
    assert first.data_ptr() != second.data_ptr()


@EVERY_OP
def test_overwrite_main_grad(name):
    """The first of a backward writes, whatever is there; another with the same parameter adds."""
    call = Call(name)
    call.give(grad_added_to_main_grad=False, overwrite_main_grad=True)
    zeros = {key: torch.zeros_like(parameter) for key, parameter in call.parameters.items()}
    for times in (1, 2):
        for parameter in call.parameters.values():
            parameter.grad_added_to_main_grad = False  # as the hook of Megatron-FSDP leaves it
            parameter.main_grad.fill_(torch.nan)
        outputs = [out for _ in range(times) for out in call.outputs()]
        torch.autograd.backward(outputs, call.upstream * times)
        call.check_added(zeros, times)


def test_overwrite_without_the_flag():
    call = Call("projection")
    call.give(overwrite_main_grad=True)
    call.backward()
    call.check_added({key: torch.zeros_like(p) for key, p in call.parameters.items()})


class Lazy(torch.nn.Parameter):
    """As Megatron-FSDP's: memory for the gradient comes when it is asked for."""

    asked = 0

    def get_main_grad(self):
        self.asked += 1
        return torch.full(self.shape, 5.0)


@WRITERS
def test_get_main_grad_is_asked_in_backward_only(name):
    call = Call(name)
    for key, parameter in call.parameters.items():
        call.parameters[key] = Lazy(parameter.detach())
    outputs = call.outputs()
    assert not any(p.asked or hasattr(p, "main_grad") for p in call.parameters.values())
    call.backward(outputs)
    assert all(parameter.asked == 1 for parameter in call.parameters.values())
    call.check_added({key: torch.full(p.shape, 5.0) for key, p in call.parameters.items()})


def test_a_property_that_allocates_is_left_alone_in_forward():
    class Managed(torch.nn.Parameter):
        __fsdp_param__ = True

        @property
        def main_grad(self):
            raise ArithmeticError("allocated")

    call = Call("projection")
    for key, parameter in call.parameters.items():
        call.parameters[key] = Managed(parameter.detach())
    outputs = call.outputs()
    with pytest.raises(ArithmeticError, match="allocated"):
        call.backward(outputs)


@EVERY_OP
def test_frozen_parameters_are_not_touched(name):
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    for parameter in call.parameters.values():
        parameter.requires_grad_(False)
        parameter.get_main_grad = None  # must not be called
    call.backward()
    for key, parameter in call.parameters.items():
        assert torch.equal(parameter.main_grad, before[key])
        assert parameter.grad is None
        assert parameter.grad_added_to_main_grad is False


@EVERY_OP
def test_one_frozen_among_others(name):
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    frozen, *others = call.parameters
    call.parameters[frozen].requires_grad_(False)
    call.backward()
    assert torch.equal(call.parameters[frozen].main_grad, before[frozen])
    for key in others:
        assert torch.equal(call.parameters[key].main_grad, before[key] + call.plain[key])


@WRITERS
def test_some_parameters_with_main_grad(name):
    call = Call(name)
    parameter = call.parameters["norm_weight"]
    parameter.main_grad = torch.zeros_like(parameter)
    call.backward()
    assert torch.equal(parameter.main_grad, call.plain["norm_weight"])
    assert torch.equal(call.parameters["weight"].grad, call.plain["weight"])


@EVERY_OP
def test_opt_out(name):
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    with without_main_grad():
        outputs = call.outputs()
    call.backward(outputs)  # outside: what counts is where the op was called
    for key, parameter in call.parameters.items():
        assert torch.equal(parameter.main_grad, before[key])
        assert torch.equal(parameter.grad, call.plain[key])
        assert parameter.grad_added_to_main_grad is False


def test_opt_out_as_a_decorator_and_after_an_error():
    call = Call("projection")
    call.give()

    @without_main_grad()
    def forward(fails):
        if fails:
            raise ArithmeticError
        return call.outputs()

    with pytest.raises(ArithmeticError):
        forward(True)
    assert main_grad.is_enabled()
    call.backward(forward(False))
    assert call.parameters["weight"].grad is not None


class Overlapping:
    """Blocks that are left in the order in which they were entered, and what was seen within."""

    def __init__(self, call):
        self.call, self.seen, self.order = call, {}, []

    def look(self, when):
        """Whether ops leave main_grad alone, as they are called here."""
        for parameter in self.call.parameters.values():
            parameter.grad = None
        self.call.backward()
        self.seen[when] = self.call.parameters["weight"].grad is not None

    def check(self):
        assert self.order == ["first", "second", "first leaves", "second leaves"]
        assert self.seen == {"second, alone within": True, "second, after": False, "after": False}
        assert main_grad.is_enabled()


def test_opt_out_in_threads_that_overlap():
    blocks = Overlapping(Call("projection"))
    blocks.call.give()
    events = {name: threading.Event() for name in ("first", "second", "first leaves")}

    def happens(name):
        blocks.order.append(name)
        if name in events:
            events[name].set()

    def first():
        with without_main_grad():
            happens("first")
            events["second"].wait()
        happens("first leaves")

    def second():
        events["first"].wait()
        with without_main_grad():
            happens("second")
            events["first leaves"].wait()
            blocks.look("second, alone within")
        happens("second leaves")
        blocks.look("second, after")

    threads = [threading.Thread(target=function) for function in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks.look("after")
    blocks.check()


def test_opt_out_in_tasks_that_overlap():
    blocks = Overlapping(Call("projection"))
    blocks.call.give()

    async def first(entered, leave):
        with without_main_grad():
            blocks.order.append("first")
            entered.set()
            await leave.wait()
        blocks.order.append("first leaves")

    async def second(entered, leave, task):
        await entered.wait()
        with without_main_grad():
            blocks.order.append("second")
            leave.set()
            await task
            blocks.look("second, alone within")
        blocks.order.append("second leaves")
        blocks.look("second, after")

    async def both():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(entered, leave))
        await asyncio.create_task(second(entered, leave, task))

    asyncio.run(both())
    blocks.look("after")
    blocks.check()


def test_opt_out_of_a_thread_alone():
    """Another thread's block says nothing of the ops that are called here."""
    call = Call("projection")
    call.give()
    entered, leave = threading.Event(), threading.Event()

    def elsewhere():
        with without_main_grad():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    entered.wait()
    call.backward()
    leave.set()
    thread.join()
    assert call.parameters["weight"].grad is None


@pytest.mark.parametrize("within", [True, False])
def test_opt_out_of_what_a_backward_computes_in_its_own_threads(within):
    """A reentrant checkpoint calls the op anew; deep within others, in another thread, as on CUDA
    any does."""
    threads = set()

    def nested(depth, residual):
        if depth:
            return checkpoint(nested, depth - 1, residual, use_reentrant=True)
        threads.add(threading.get_ident())
        return call.op.run(residual=residual, **call.parameters, **call.options)

    call = Call("projection")
    before = call.give()
    if within:
        with without_main_grad():
            nested(70, call.input).backward(call.upstream[0])
    else:
        with without_main_grad():
            pass
        nested(70, call.input).backward(call.upstream[0])
    assert len(threads) == 2
    call.check_added(before, 0 if within else 1)
    for key, parameter in call.parameters.items():
        assert (parameter.grad is not None) is within
        assert not within or torch.equal(parameter.grad, call.plain[key])


def test_opt_out_within_a_compiled_function():
    """In one graph where nothing carries main_grad, and honoured where something does."""

    def forward():
        with without_main_grad():
            return call.outputs()

    call = Call("projection")
    call.backward(torch.compile(forward, backend="aot_eager", fullgraph=True)())
    assert torch.equal(call.parameters["weight"].grad, call.plain["weight"])
    before = call.give()
    for parameter in call.parameters.values():
        parameter.grad = None
    call.backward(torch.compile(forward, backend="aot_eager")())
    call.check_added(before, 0)
    assert torch.equal(call.parameters["weight"].grad, call.plain["weight"])


def by_grad(call):
    leaves = list(call.parameters.values())
    return torch.autograd.grad(call.outputs(), leaves, call.upstream)


def by_backward(call):
    call.backward()
    return [parameter.grad for parameter in call.parameters.values()]


def opted_out(call):
    with without_main_grad():
        return by_grad(call)


def opted_out_backward(call):
    with without_main_grad():
        outputs = call.outputs()
    call.backward(outputs)
    return [parameter.grad for parameter in call.parameters.values()]


def without_memory(call):
    for parameter in call.parameters.values():
        parameter.main_grad = None
    return by_backward(call)


@EVERY_OP
@pytest.mark.parametrize(
    "take", [by_grad, opted_out, opted_out_backward, without_memory], ids=lambda f: f.__name__
)
def test_flag_of_an_earlier_backward(name, take):
    """A gradient that is not in main_grad is not said to be: Megatron's CUDA graphs take it by
    torch.autograd.grad after an eager step, and add it where the flag is not set."""
    call = Call(name)
    call.give(grad_added_to_main_grad=False)
    call.backward()
    for parameter in call.parameters.values():
        assert parameter.grad_added_to_main_grad is True
        parameter.main_grad.zero_()
        parameter.grad = None
    found = take(call)
    for (key, parameter), grad in zip(call.parameters.items(), found, strict=True):
        assert torch.equal(grad, call.plain[key]), key
        assert parameter.grad_added_to_main_grad is False
        assert parameter.main_grad is None or not parameter.main_grad.any()


def test_tile_kernels_names_opt_out():
    residual = torch.randn(5, 4, 64).bfloat16()
    fn = torch.nn.Parameter(torch.randn(24, 256))
    (plain,) = torch.autograd.grad(mhc_pre_norm_fn(residual, fn, None, 1e-6).sum(), fn)
    fn.main_grad, fn.grad_added_to_main_grad = torch.zeros(24, 256), True
    with without_main_grad():
        out = mhc_pre_norm_fn(residual, fn, None, 1e-6)
    out.sum().backward()
    assert torch.equal(fn.grad, plain)
    assert not fn.main_grad.any()
    assert fn.grad_added_to_main_grad is False


def test_flag_of_a_parameter_that_a_backward_does_not_reach():
    call = Call("projection")
    call.give(grad_added_to_main_grad=False)
    call.backward()
    torch.autograd.grad(call.outputs(), call.input, call.upstream)
    call.backward(inputs=[call.input])
    assert all(parameter.grad_added_to_main_grad for parameter in call.parameters.values())


def test_no_flag_is_made():
    call = Call("projection")
    call.give()
    by_grad(call)
    opted_out(call)
    assert not any(hasattr(p, "grad_added_to_main_grad") for p in call.parameters.values())


@pytest.mark.parametrize("order", [(False, True, False), (True, False, True)], ids=str)
@pytest.mark.filterwarnings("error")
def test_fake_tensors(order, monkeypatch):
    """Estimating memory and training in one process: each gets gradients of its own kind."""
    monkeypatch.setattr(main_grad, "_dummies", {})

    def step():
        call = Call.__new__(Call)
        call.op, call.options = WITH_PARAMETERS["projection"], {}
        call.parameters = {
            "weight": torch.nn.Parameter(torch.ones(24, 256)),
            "norm_weight": torch.nn.Parameter(torch.ones(256)),
        }
        call.tensors = {"residual": torch.ones(5, 4, 64, dtype=torch.bfloat16)}
        call.give(grad_added_to_main_grad=False)
        call.upstream = [torch.ones(5, 24)]
        call.backward()
        return [parameter.grad for parameter in call.parameters.values()]

    for fake in order:
        if fake:
            with FakeTensorMode():
                grads = step()
        else:
            grads = step()
        assert [isinstance(grad, FakeTensor) for grad in grads] == [fake, fake]
        assert not any(isinstance(kept, FakeTensor) for kept in main_grad._dummies.values())
    assert len(main_grad._dummies) == 2


def test_a_fake_tensor_is_not_kept_for_a_real_parameter(monkeypatch):
    monkeypatch.setattr(main_grad, "_dummies", {})
    parameter = torch.nn.Parameter(torch.ones(3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(main_grad._stand_in(parameter), FakeTensor)
    assert torch.equal(main_grad._stand_in(parameter), torch.zeros(3))


def test_main_grad_that_appears_between_forward_and_backward():
    """Autograd gets the gradient, as Megatron's hooks expect of a flag that is not set."""
    call = Call("projection")
    outputs = call.outputs()
    before = call.give(grad_added_to_main_grad=False)
    call.backward(outputs)
    for key, parameter in call.parameters.items():
        assert torch.equal(parameter.main_grad, before[key])
        assert torch.equal(parameter.grad, call.plain[key])
        assert parameter.grad_added_to_main_grad is False


def test_main_grad_that_appears_where_a_framework_has_said_so():
    call = Call("projection")
    for parameter in call.parameters.values():
        parameter.grad_added_to_main_grad = False
    outputs = call.outputs()
    before = call.give()
    call.backward(outputs)
    call.check_added(before)


def test_main_grad_that_disappears():
    call = Call("projection")
    call.give(grad_added_to_main_grad=False)
    outputs = call.outputs()
    for parameter in call.parameters.values():
        parameter.main_grad = None
    call.backward(outputs)
    for key, parameter in call.parameters.items():
        assert torch.equal(parameter.grad, call.plain[key])
        assert parameter.grad_added_to_main_grad is False


@EVERY_OP
def test_gradients_that_are_asked_for_are_returned(name):
    """torch.autograd.grad gives the gradient; a backward for others leaves main_grad alone."""
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    outputs = call.outputs()
    keys = list(call.parameters)
    found = torch.autograd.grad(
        outputs, [call.parameters[key] for key in keys], call.upstream, retain_graph=True
    )
    assert all(torch.equal(a, call.plain[key]) for a, key in zip(found, keys, strict=True))
    call.backward(outputs, inputs=[call.input], retain_graph=True)
    for key, parameter in call.parameters.items():
        assert torch.equal(parameter.main_grad, before[key])
        assert parameter.grad_added_to_main_grad is False
    only = call.parameters[keys[0]]
    call.backward(outputs, inputs=[only])
    assert torch.equal(only.main_grad, before[keys[0]] + call.plain[keys[0]])


@EVERY_OP
def test_backward_twice(name):
    call = Call(name)
    before = call.give()
    outputs = call.outputs()
    call.backward(outputs, retain_graph=True)
    call.backward(outputs)
    call.check_added(before, 2)


@WRITERS
def test_gradient_of_the_gradient_is_refused(name):
    call = Call(name)
    before = call.give()
    message = "the gradient must be taken once where it goes into a buffer; got create_graph=True"
    with pytest.raises(UnsupportedError, match=f"{call.op.name}: {message}"):
        call.backward(create_graph=True)
    call.check_added(before, 0)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (torch.zeros(255), "(255,) float32 on cpu"),
        (torch.zeros(256, dtype=torch.int32), "(256,) int32 on cpu"),
        (torch.zeros(256, device="meta"), "(256,) float32 on meta"),
        (3, None),
    ],
    ids=["shape", "dtype", "device", "type"],
)
@WRITERS
def test_wrong_main_grad(name, wrong, what):
    """Refused in backward, before anything is written: not even the one that fits."""
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    call.parameters["norm_weight"].main_grad = wrong
    message = (
        f"{call.op.name}: norm_weight.main_grad must be (256,), of a floating dtype, on cpu to "
        f"match norm_weight; got {what}"
    )
    if what is None:
        message = f"{call.op.name}: norm_weight.main_grad must be a torch.Tensor; got int 3"
    outputs = call.outputs()
    with pytest.raises(ShapeError, match="^" + re.escape(message) + "$"):
        call.backward(outputs)
    weight = call.parameters["weight"]
    assert torch.equal(weight.main_grad, before["weight"])
    assert weight.grad_added_to_main_grad is False
    assert call.input.grad is None


@WRITERS
def test_main_grad_without_memory(name):
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    call.parameters["norm_weight"].main_grad.untyped_storage().resize_(0)
    message = (
        f"{call.op.name}: norm_weight.main_grad must be in memory; got (256,) float32 on cpu, "
        "whose storage is freed. "
    )
    outputs = call.outputs()
    with pytest.raises(ShapeError, match="^" + re.escape(message)):
        call.backward(outputs)
    assert torch.equal(call.parameters["weight"].main_grad, before["weight"])


@WRITERS
def test_micro_batches(name):
    """Many backwards into one float32 main_grad: as float64 autograd, within float32."""
    call = Call(name)
    for parameter in call.parameters.values():
        parameter.main_grad = torch.zeros_like(parameter)
    total = {key: torch.zeros(p.shape, dtype=torch.float64) for key, p in call.parameters.items()}
    options = {key: v for key, v in call.options.items() if key != "passes_residual"}
    squares = {key: torch.zeros(p.shape) for key, p in call.parameters.items()}
    for _ in range(8):
        call.input.data.copy_(torch.randn_like(call.input))
        call.backward()
        wide = {"residual": call.input.detach().double()}
        leaves = {key: p.detach().double().requires_grad_() for key, p in call.parameters.items()}
        outputs = oracle.as_tuple(call.op.reference(**wide, **leaves, **options))
        upstream = [grad.double() for grad in call.upstream[: len(outputs)]]
        for key, grad in zip(
            leaves, torch.autograd.grad(outputs, list(leaves.values()), upstream), strict=True
        ):
            total[key] += grad
        terms = call.gate_terms()
        for key, sizes in terms.items():
            squares[key] = squares[key] + sizes.square()
    for key, parameter in call.parameters.items():
        summed = squares[key].sqrt() if key in terms else None
        error = oracle.relative_error(parameter.main_grad, total[key], summed)
        assert error < tolerances.FLOAT32_SUM, key


@WRITERS
@pytest.mark.parametrize("kind", ["saved elsewhere", "checkpointed", "reentrant", "compiled"])
def test_elsewhere(name, kind):
    call = Call(name)
    before = call.give(grad_added_to_main_grad=False)
    if kind == "saved elsewhere":
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            outputs = call.outputs()
    elif kind == "compiled":
        outputs = torch.compile(call.outputs, backend="aot_eager")()
    else:

        def run(residual):
            return oracle.as_tuple(
                call.op.run(residual=residual, **call.parameters, **call.options)
            )

        outputs = checkpoint(run, call.input, use_reentrant=kind == "reentrant")
    call.backward(outputs)
    call.check_added(before)
    assert torch.equal(call.input.grad, call.plain["input"])


@EVERY_OP
def test_compiled_without_main_grad_in_one_graph(name):
    # The limit of recompilations is one for all callers of a function, other tests too.
    torch.compiler.reset()
    call = Call(name)
    outputs = torch.compile(call.outputs, backend="aot_eager", fullgraph=True)()
    call.backward(outputs)
    for key, parameter in call.parameters.items():
        assert torch.equal(parameter.grad, call.plain[key])


def test_beside_an_accumulator():
    call = Call("projection")
    before = call.give()
    accumulator = GradAccumulator(call.input)
    call.options["grad_accumulator"] = accumulator
    call.backward()
    call.check_added(before)
    assert torch.equal(call.input.grad, call.plain["input"])


def test_other_tensors_with_main_grad_are_not_parameters():
    """What a parameter was computed to: its gradient has to flow on."""
    call = Call("projection")
    source = call.parameters["weight"]
    weight = source * 1
    weight.main_grad = torch.zeros_like(weight)
    out = tile_mhc.projection(call.input, weight)
    out.sum().backward()
    assert source.grad.any()
    assert not weight.main_grad.any()


@pytest.mark.parametrize("sharded", [True, False])
def test_megatron_fsdp_buffer(sharded):
    """Unsharded, its buffer keeps the sum over micro-batches, whatever overwrite_main_grad says."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.overwrite_main_grad, parameter.grad_added_to_main_grad = True, False
    parameter._gbuf = SimpleNamespace(is_data_distributed=sharded)
    assert main_grad.adds(parameter, torch.zeros(3)) is not sharded
