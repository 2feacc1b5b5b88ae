"""What torch's names for a running backward do, as `tile_mhc._backward` relies on it."""

import pytest
import torch

from tile_mhc import _backward


class Watched(torch.autograd.Function):
    """The identity; `seen` is called in its backward."""

    @staticmethod
    def forward(ctx, value, seen):
        ctx.seen = seen
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen(ctx)
        return grad, None


def test_task_is_the_backwards_own():
    tasks = []
    value = torch.ones(3, requires_grad=True)
    assert _backward.task() == _backward.NO_TASK
    for _ in range(2):
        out = Watched.apply(value, lambda ctx: tasks.append(_backward.task()))
        Watched.apply(out, lambda ctx: tasks.append(_backward.task())).sum().backward()
    assert _backward.task() == _backward.NO_TASK
    first, again, second, once_more = tasks
    assert (first, second) == (again, once_more)
    assert len({first, second, _backward.NO_TASK}) == 3


def test_goes_on():
    seen = []

    def look(ctx):
        seen.append([_backward.goes_on(node) for node, _ in ctx.next_functions])

    leaf, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    between = leaf * 2
    Watched.apply(between, look).sum().backward()
    torch.autograd.grad((Watched.apply(between.detach() * other, look)).sum(), other)
    torch.autograd.grad(Watched.apply(leaf, look).sum(), leaf)
    torch.autograd.grad((Watched.apply(leaf, look) + other).sum(), other)
    # The last does not come by.
    assert seen == [[True], [True], [None]]
    assert _backward.goes_on(None) is False


def test_does_not_go_on_to_what_is_not_asked_for():
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, grad):
            seen.append([_backward.goes_on(node) for node, _ in ctx.next_functions])
            return grad, grad

    seen = []
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    torch.autograd.grad(Two.apply(a * 1, b * 1).sum(), b)
    assert seen == [[False, True]]


def test_at_end():
    order = []
    value = torch.ones(3, requires_grad=True)
    out = Watched.apply(value, lambda ctx: order.append("first node"))
    out = Watched.apply(out, lambda ctx: _backward.at_end(lambda: order.append("end")))
    out.sum().backward()
    assert order == ["first node", "end"]


def test_no_end_of_a_backward_that_fails():
    def fail(ctx):
        _backward.at_end(lambda: order.append("end"))
        raise ArithmeticError

    order = []
    value = torch.ones(3, requires_grad=True)
    with pytest.raises(ArithmeticError):
        Watched.apply(value, fail).sum().backward()
    (value * 2).sum().backward()
    assert not order
