"""TransformerEngine's `fused_grad_x_acc_buffer`: one float32 buffer for the gradient of x.

The ops of one forward, projection first, are a chain. In the backward, each op that has a gradient
of x for the buffer contributes: the first overwrites what is there, the others add. The projection,
last in the backward, takes the sum and returns it with its own share, rounded once.

Nothing hangs on the buffer or its storage. The state of a buffer is found by its address, and lives
as long as a graph that may still contribute: those graphs hold the buffer, too, so that no other
can get its address.

- A layer's forward begins a chain, so that layers may share a buffer: their backwards follow one
  another. A gradient that one chain left, while its graph lives, raises when another comes.
- An op that contributes again before the projection has taken its gradient starts anew: the
  backward before was abandoned, as by `torch.autograd.grad` for other inputs, or failed.
- A forward that is repeated inside a backward, as by a reentrant checkpoint, continues the chain
  whose gradient is in the buffer.
- What is in the buffer reaches x through the projection's backward: that must be in the same graph.
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tile_mhc import _backward, errors
from tile_mhc.ops._autograd import refuse_tangents, refuse_transforms
from tile_mhc.ops.transformer_engine import (
    interleaved_aggregate,
    interleaved_post,
    padded_projection,
)

BUFFER = "fused_grad_x_acc_buffer"


class _State:
    """Of one buffer: the chain that ops join, and the one whose gradient it holds."""

    def __init__(self) -> None:
        self.current: weakref.ref[_Chain] | None = None
        self.holds: weakref.ref[_Chain] | None = None


class _Chain:
    """The ops of one forward, held by their graph."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.contributors: set[int] = set()
        state.current = weakref.ref(self)

    def contribute(self, op: str, contributor: int) -> bool:
        """Whether to add to the buffer; otherwise it is to be overwritten."""
        adds = self._holds(op) and contributor not in self.contributors
        if not adds:
            self.contributors.clear()
        self.contributors.add(contributor)
        self.state.holds = weakref.ref(self)
        return adds

    def take(self, op: str) -> bool:
        """Whether the buffer has a gradient to be taken."""
        holds = self._holds(op)
        self.state.holds = None
        self.contributors.clear()
        return holds

    def _holds(self, op: str) -> bool:
        owner = _alive(self.state.holds)
        if owner is not None and owner is not self:
            raise errors.ShapeError(
                f"{op}: {BUFFER} must hold no gradient of another forward; got one that the "
                "backward of that forward's mhc_fused_projection has not taken"
            )
        return owner is self


_states: weakref.WeakValueDictionary[tuple[torch.device, int], _State] = (
    weakref.WeakValueDictionary()
)


def _alive(chain: "weakref.ref[_Chain] | None") -> _Chain | None:
    return None if chain is None else chain()


def _state_of(buffer: Tensor) -> _State:
    if not errors.has_memory(buffer):
        return _State()
    return _states.setdefault((buffer.device, buffer.data_ptr()), _State())


def _begin(buffer: Tensor) -> _Chain:
    """The chain of a projection: a new one, or inside a backward the one it continues."""
    state = _state_of(buffer)
    pending = _alive(state.holds)
    if pending is None or _backward.task() == _backward.NO_TASK:
        return _Chain(state)
    state.current = weakref.ref(pending)
    return pending


def _join(buffer: Tensor) -> _Chain:
    state = _state_of(buffer)
    return _alive(state.current) or _Chain(state)


def check_buffer(op: str, buffer: Tensor, x: Tensor) -> None:
    """Before a launch: what the backward writes to or reads from."""
    value = errors.require_tensor(op, BUFFER, buffer)
    if (
        value.dtype != torch.float32
        or value.numel() != x.numel()
        or value.device != x.device
        or value.requires_grad
    ):
        grad = " that requires grad" if value.requires_grad else ""
        raise errors.ShapeError(
            f"{op}: {BUFFER} must be {x.numel()} elements of float32 on {x.device}, without a "
            f"gradient, to match x {errors.describe(x)}; got {errors.describe(value)}{grad}"
        )
    errors.check_contiguous(op, BUFFER, value)
    refuse_transforms(op, BUFFER)
    errors.check_aligned(op, BUFFER, value, errors.ALIGNMENT)
    if errors.may_overlap(value, x):
        raise errors.ShapeError(f"{op}: {BUFFER} must not share memory with x; got one that does")


def projection(
    op: str, x: Tensor, phi: Tensor, norm_weight: Tensor | None, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    return _untraced(_projection)(op, x, phi, norm_weight, buffer)  # type: ignore[no-any-return]


def aggregate(op: str, x: Tensor, mix: Tensor, buffer: Tensor) -> Tensor:
    return _untraced(_aggregate)(op, x, mix, buffer)  # type: ignore[no-any-return]


def post(
    op: str,
    f: Tensor,
    bias: Tensor | None,
    x: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    buffer: Tensor,
) -> Tensor:
    return _untraced(_post)(op, f, bias, x, post_mix, comb_mix, buffer)  # type: ignore[no-any-return]


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile breaks its graph here: what is found by an address cannot be traced.

    A decorator would import all of dynamo beside tile_mhc, which takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    return torch.compiler.disable(function)  # type: ignore[no-any-return, unused-ignore]


def _projection(*args: Any) -> Any:
    op, x, phi, norm_weight, buffer = args
    refuse_tangents(op, args)
    return _Projection.apply(x, phi, norm_weight, op, buffer, _begin(buffer))  # type: ignore[no-untyped-call]


def _aggregate(*args: Any) -> Any:
    op, x, mix, buffer = args
    refuse_tangents(op, args)
    return _Aggregate.apply(x, mix, op, buffer, _join(buffer))  # type: ignore[no-untyped-call]


def _post(*args: Any) -> Any:
    op, *tensors, buffer = args
    refuse_tangents(op, args)
    return _Post.apply(*tensors, op, buffer, _join(buffer))  # type: ignore[no-untyped-call]


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        phi: Tensor,
        norm_weight: Tensor | None,
        op: str,
        buffer: Tensor,
        chain: _Chain,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, phi, norm_weight)
        # Not a saved tensor: it is written to between the forward and the backward.
        ctx.op, ctx.buffer, ctx.chain = op, buffer, chain
        return padded_projection.projection(x, phi, norm_weight)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad_h: Tensor, grad_ms: Tensor) -> tuple[Tensor | None, ...]:
        x, phi, norm_weight = ctx.saved_tensors
        held = ctx.buffer.detach() if ctx.chain.take(ctx.op) else None
        grad_x, grad_phi, grad_norm_weight = padded_projection.projection_backward(
            grad_h, grad_ms, x, phi, norm_weight, held
        )
        if norm_weight is None:
            grad_norm_weight = None
        return grad_x, grad_phi, grad_norm_weight, None, None, None


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Tensor, op: str, buffer: Tensor, chain: _Chain) -> Tensor:
        ctx.save_for_backward(x, mix)
        ctx.op, ctx.buffer, ctx.chain = op, buffer, chain
        return interleaved_aggregate.aggregate(x, mix)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mix = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            _, grad_mix = interleaved_aggregate.aggregate_backward(grad, x, mix)
        else:
            adds = ctx.chain.contribute(ctx.op, id(ctx))
            out = ctx.buffer.detach()
            grad_mix = interleaved_aggregate.aggregate_accumulate(grad, x, mix, adds, out)
        return None, grad_mix, None, None, None


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        f: Tensor,
        bias: Tensor | None,
        x: Tensor,
        post_mix: Tensor,
        comb_mix: Tensor,
        op: str,
        buffer: Tensor,
        chain: _Chain,
    ) -> Tensor:
        ctx.save_for_backward(f, bias, x, post_mix, comb_mix)
        ctx.op, ctx.buffer, ctx.chain = op, buffer, chain
        return interleaved_post.post(f, bias, x, post_mix, comb_mix)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            grad_f, grad_bias, _, *grad_mixes = interleaved_post.post_backward(grad, *saved)
        else:
            adds = ctx.chain.contribute(ctx.op, id(ctx))
            out = ctx.buffer.detach()
            grads = interleaved_post.post_accumulate(grad, *saved, adds, out)
            grad_f, grad_bias, *grad_mixes = grads
        if saved[1] is None:
            grad_bias = None
        return grad_f, grad_bias, None, *grad_mixes, None, None, None
