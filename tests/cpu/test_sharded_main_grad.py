"""`main_grad` that is written, not added to: Megatron-FSDP with sharded gradients, by hand.

tests/gpu has the package itself.
"""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import oracle
from accumulation import PASSING, WITH_PARAMETERS, Call
from tile_mhc import main_grad
from tile_mhc.compat.tile_kernels.modeling.mhc.ops import mhc_pre_norm_fn

EVERY_OP = pytest.mark.parametrize("name", [*WITH_PARAMETERS, PASSING])
TOKENS, STREAMS, HIDDEN = 5, 4, 64


class Sharded:
    """What Megatron-FSDP 0.6.1 does to the parameters of a unit, on one rank.

    Memory for a gradient comes from a pool when it is asked for, with whatever is in it, and goes
    back when the gradient has been reduced, which autograd's hook on the parameter starts.
    """

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.reduced = {p: torch.zeros_like(p) for p in self.parameters}
        self.pool = {p: torch.empty_like(p).detach() for p in self.parameters}
        self.buffers = {}
        for parameter in self.parameters:
            parameter.get_main_grad = lambda p=parameter: self.buffer(p)
            parameter.register_post_accumulate_grad_hook(self.reduce)
        self.gather()

    def buffer(self, parameter):
        if parameter not in self.buffers:
            self.buffers[parameter] = self.pool[parameter].fill_(torch.nan)
        return self.buffers[parameter].view(parameter.shape)

    def gather(self, *_):
        """Before each call of the unit, in forward and in backward."""
        for parameter in self.parameters:
            parameter.grad_added_to_main_grad = False
            parameter.overwrite_main_grad = True

    def reduce(self, parameter):
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad = parameter.get_main_grad()
            parameter.main_grad.copy_(parameter.grad)
        parameter.grad = None
        parameter.grad_added_to_main_grad = False
        with torch.no_grad():
            self.reduced[parameter] += self.buffers.pop(parameter)
        parameter.main_grad = None

    def outputs(self, call):
        """Of the unit: its parameters are gathered as a gradient of the output arrives."""
        outputs = call.outputs()
        for output in outputs:
            output.register_hook(self.gather)
        return outputs

    def check(self, call, times):
        assert not self.buffers
        for key, parameter in call.parameters.items():
            expected = torch.zeros_like(parameter)
            for _ in range(times):
                expected = expected + call.plain[key]
            assert torch.equal(self.reduced[parameter], expected), key
        assert not main_grad._pending


@EVERY_OP
def test_unit_called_twice(name):
    """As a looped layer, or a head that reads the streams of two layers."""
    call = Call(name)
    unit = Sharded(call.parameters.values())
    for times in (2, 4):  # two micro-batches
        outputs = [out for _ in range(2) for out in unit.outputs(call)]
        torch.autograd.backward(outputs, call.upstream * 2)
        unit.check(call, times)


@EVERY_OP
def test_unit_called_again_for_nothing(name):
    """The second call of the unit has no gradient for its parameters; that of the first stays."""

    class Unused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, streams, *parameters):
            return streams.view_as(streams)

        @staticmethod
        def backward(ctx, grad):
            unit.gather()
            return grad, *[None] * len(call.parameters)

    call = Call(name)
    unit = Sharded(call.parameters.values())
    call.input.requires_grad_()
    last = Unused.apply(call.input, *call.parameters.values())
    torch.autograd.backward([*unit.outputs(call), last], [*call.upstream, torch.ones_like(last)])
    unit.check(call, 1)


@pytest.mark.parametrize("where", ["each", "first", "middle", "last"])
@pytest.mark.parametrize("name", ["projection", "contract", "fused_pre"])
def test_backward_within_a_backward(name, where):
    """A call in a reentrant checkpoint has a backward of its own, after which autograd hands the
    gradient on: what the backward around it has written before goes along, and what it writes
    after that does not add to memory that was given back."""
    call = Call(name)
    unit = Sharded(call.parameters.values())

    def run(residual):
        unit.gather()
        found = call.op.run(residual=residual, **call.parameters, **call.options)
        return oracle.as_tuple(found)

    outputs = []
    for position in ("last", "middle", "first"):  # in backward the other way round
        if where in (position, "each"):
            found = checkpoint(run, call.input, use_reentrant=True)
        else:
            found = run(call.input)
        for output in found:
            output.register_hook(unit.gather)
        outputs.extend(found)
    torch.autograd.backward(outputs, call.upstream * 3)
    unit.check(call, 3)


def fails(call):
    """A use of the parameters whose backward, after all of what is called later, raises."""

    def fail(grad):
        raise ArithmeticError("out of memory")

    last = torch.stack([p.sum() for p in call.parameters.values()]).sum()
    last.register_hook(fail)
    return last


@EVERY_OP
def test_backward_that_fails(name):
    """What it has written does not count for the next one."""
    call = Call(name)
    unit = Sharded(call.parameters.values())
    last = fails(call)
    outputs = [*unit.outputs(call), *unit.outputs(call)]
    with pytest.raises(ArithmeticError, match="out of memory"):
        torch.autograd.backward([*outputs, last], [*call.upstream * 2, torch.ones_like(last)])
    assert unit.buffers.keys() == set(call.parameters.values())
    for buffer in unit.buffers.values():
        buffer.fill_(torch.nan)
    unit.gather()
    outputs = unit.outputs(call)
    call.backward(outputs)
    unit.check(call, 1)


def test_other_memory_within_a_backward():
    """What is in the first buffer is none of the second's business."""
    call = Call("projection")
    call.give(overwrite_main_grad=True)
    other = {key: torch.full_like(p, torch.nan) for key, p in call.parameters.items()}

    def exchange(_):
        for key, parameter in call.parameters.items():
            parameter.main_grad = other[key]

    first, second = call.outputs(), call.outputs()
    first[0].register_hook(exchange)
    torch.autograd.backward([*second, *first], call.upstream * 2)
    call.check_added({key: torch.zeros_like(p) for key, p in call.parameters.items()})


def test_without_the_flag():
    """Nobody is told: what is written lasts until the end of the backward."""
    call = Call("projection")
    call.give(overwrite_main_grad=True)
    zeros = {key: torch.zeros_like(p) for key, p in call.parameters.items()}
    for times in (2, 1):
        outputs = [out for _ in range(times) for out in call.outputs()]
        torch.autograd.backward(outputs, call.upstream * times)
        call.check_added(zeros, times)


def test_gradient_taken_for_others_within_a_backward():
    """What is in main_grad, and was not handed on, is said to be there when it is."""

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx, streams):
            return streams.view_as(streams)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                outputs = call.outputs()
            found = torch.autograd.grad(outputs, list(call.parameters.values()), call.upstream)
            seen.append(dict(zip(call.parameters, found, strict=True)))
            return grad

    seen = []
    call = Call("projection")
    unit = Sharded(call.parameters.values())
    between = Within.apply(call.input)
    outputs = unit.outputs(call)  # in backward before
    torch.autograd.backward([*outputs, between], [*call.upstream, torch.ones_like(between)])
    unit.check(call, 1)
    assert all(torch.equal(seen[0][key], call.plain[key]) for key in call.parameters)


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "fails"])
def test_nothing_is_kept(ends):
    """Neither a parameter nor its gradient lives on for what was written."""
    call = Call("projection")
    call.give(overwrite_main_grad=True, grad_added_to_main_grad=False)
    last = fails(call)
    outputs = [*call.outputs()]
    if ends:
        call.backward(outputs, retain_graph=True)
    else:
        with pytest.raises(ArithmeticError):
            torch.autograd.backward([*outputs, last], [*call.upstream, torch.ones_like(last)])
    assert call.parameters["weight"].grad_added_to_main_grad
    assert not main_grad._pending
    kept = [*call.parameters.values(), *(p.main_grad for p in call.parameters.values())]
    references = [weakref.ref(tensor) for tensor in kept]
    del kept, outputs, last
    call.parameters.clear()
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_tile_kernels_names():
    weight = torch.randn(24, STREAMS * HIDDEN) * 0.1
    plain, parameter = (torch.nn.Parameter(weight) for _ in range(2))
    residual = torch.randn(TOKENS, STREAMS, HIDDEN).bfloat16()

    def output(fn, square):
        mixes = mhc_pre_norm_fn(residual, fn, None, 1e-6)
        return (mixes * mixes if square else mixes).sum()

    parts = [torch.autograd.grad(output(plain, square), plain)[0] for square in (False, True)]
    unit = Sharded([parameter])
    losses = [output(parameter, square) for square in (True, False)]
    for loss in losses:
        loss.register_hook(unit.gather)
    torch.autograd.backward(losses)
    assert not unit.buffers
    assert torch.equal(unit.reduced[parameter], parts[0] + parts[1])
