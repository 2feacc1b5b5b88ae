"""One gradient of the streams, gathered from several ops in one buffer and rounded once."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from tile_mhc import _backward, errors
from tile_mhc._guards import transforms_active
from tile_mhc.ops._autograd import refuse_tangents
from tile_mhc.ops._library import outside_graphs

OP = "GradAccumulator"
# The address of a device's current stream. Absent from a torch that was built without CUDA.
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class GradAccumulator:
    """Gathers the gradients that several ops have for one residual.

    Give it as `grad_accumulator` to any of `projection`, `aggregate`, `post`, `post_pre` and
    `contract` that read the residual. In backward, whichever of them comes first writes its
    gradient to the buffer and the later ones add theirs, inside their kernels; when the last
    consumer has run, the sum is rounded once to the residual's dtype and goes on to whoever made
    the residual. Without it, autograd adds one tensor per op, each rounded.

        accumulator = GradAccumulator(residual)
        mixes = projection(residual, weight, grad_accumulator=accumulator)
        ...
        layer_input = aggregate(residual, pre_mix, grad_accumulator=accumulator)
        residual = post(layer_output, residual, post_mix, comb_mix, grad_accumulator=accumulator)

    Any subset of the ops may use it, in any order and any number, and any of their outputs may stay
    unused. Other consumers of the residual are added by autograd, as ever; those that read
    `accumulator.residual`, a view, join before the one rounding.

    The order comes from autograd: an op with an accumulator becomes a consumer of the node that
    collects the sum, and that runs after all of them. A hook on the residual sees all of its
    gradient.

    Args:
        residual: (..., n, H), the streams that the ops will be given.
        dtype: of the sum: float32, or the residual's, which moves fewer bytes.
        buffer: memory for the sum, as many elements as the residual, contiguous; by default it is
            allocated in backward. It may serve one layer after another; the gradient returned is
            never the buffer itself. Two accumulators may not hold a sum in it at the same time.

    Raises:
        ShapeError: the residual or the buffer does not fit.
        AccumulatorError: in backward, the buffer still holds what another backward, or another
            accumulator, left there. `reset` drops it.
        UnsupportedError: in backward, a gradient of the gradient is asked for.
    """

    def __init__(
        self, residual: Tensor, dtype: torch.dtype = torch.float32, buffer: Tensor | None = None
    ) -> None:
        errors.check_streams(OP, "residual", residual)
        if dtype not in (torch.float32, residual.dtype):
            own = errors.dtype_name(residual.dtype)
            raise errors.ShapeError(
                f"{OP}: dtype must be float32 or {own}, the residual's; got {dtype}"
            )
        if buffer is not None:
            _check_buffer(buffer, residual, dtype)
        self._state = State(residual, dtype, buffer)
        self._given = self._read = self._view = residual
        if torch.is_grad_enabled() and residual.requires_grad:
            _check_plain(residual)
            # Leave of torch.compile takes time to ask for, and is needed only where it traces.
            collected = _collected if torch.compiler.is_compiling() else _collect
            self._read = collected(residual, self._state)
            # Not what the ops read: torch.autograd.grad for that would keep it from its node.
            self._view = self._read.view_as(self._read)

    @property
    def residual(self) -> Tensor:
        """A view of the residual, for other consumers whose gradient is to join the sum."""
        return self._view

    @property
    def holds(self) -> bool:
        """Whether the buffer holds a part of a gradient, as in a backward, or after one failed."""
        return self._state.task is not None

    def reset(self) -> None:
        """Drop what a backward that did not finish has left in the buffer."""
        self._state.release()

    def source(self, op: str, residual: Tensor) -> tuple[Tensor, "State | None"]:
        """What `op`, given `residual`, reads, and the state that its backward writes to, if any."""
        if residual is not self._given and residual is not self._view:
            raise errors.ShapeError(
                f"{op}: residual must be the tensor that grad_accumulator was made for, "
                f"{errors.describe(self._given)}; got another, {errors.describe(residual)}"
            )
        if not (torch.is_grad_enabled() and residual.requires_grad):
            return residual, None
        if self._read is self._given:
            raise errors.ShapeError(
                f"{op}: grad_accumulator must be made where gradients are recorded, as the op is "
                "called; got one made under no_grad, or before the residual required grad"
            )
        return self._read, self._state


def _check_plain(residual: Tensor) -> None:
    """The buffer is written to behind the back of torch.func and of forward mode."""
    if transforms_active():
        raise errors.UnsupportedError(
            f"{OP}: must be made outside of the transforms of torch.func, which take every "
            f"gradient themselves; got residual {errors.describe(residual)} inside of one"
        )
    refuse_tangents(OP, (residual,))


def _check_buffer(buffer: Tensor, residual: Tensor, dtype: torch.dtype) -> None:
    errors.require_tensor(OP, "buffer", buffer)
    if (buffer.numel(), buffer.dtype, buffer.device) != (residual.numel(), dtype, residual.device):
        raise errors.ShapeError(
            f"{OP}: buffer must hold {residual.numel()} elements {errors.dtype_name(dtype)} on "
            f"{residual.device}, for residual {errors.describe(residual)}; "
            f"got {errors.describe(buffer)}"
        )
    if not buffer.is_contiguous() or buffer.requires_grad:
        raise errors.ShapeError(
            f"{OP}: buffer must be contiguous, and not require grad; got {errors.describe(buffer)}"
            f"{' with requires_grad=True' if buffer.requires_grad else ''}"
        )
    errors.check_aligned(OP, "buffer", buffer, errors.ALIGNMENT)
    if errors.may_overlap(buffer, residual):
        raise errors.ShapeError(
            f"{OP}: buffer must not share memory with the residual; got one that does"
        )


class State:
    """The buffer, and what is in it. Graph nodes hold this, not the accumulator with its view."""

    def __init__(self, residual: Tensor, dtype: torch.dtype, buffer: Tensor | None) -> None:
        self.shape = residual.shape
        self.residual_dtype = residual.dtype
        self.device = residual.device
        self.dtype = dtype
        self.given = buffer is not None
        # In the shape of the residual.
        self.buffer = None if buffer is None else buffer.view(residual.shape)
        # The backward, as autograd numbers them, whose sum the buffer holds.
        self.task: int | None = None
        # By its address: an object takes time to make, and is needed only where streams differ.
        self.stream: int | None = None

    def target(self, op: str) -> tuple[Tensor, bool]:
        """The buffer for `op` to write to, and whether it must add to what is there."""
        self._check_task(op)
        if self.task is None:
            self._check_others(op)
        if self.buffer is None:
            self.buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self._follow_writers()
        return self.buffer, self.task is not None

    def written(self) -> None:
        with _lock:
            _holding.add(self)
            self.task = _backward.task()

    def collect(self, grad: Tensor | None) -> Tensor | None:
        """The sum with `grad`, rounded once; the buffer is empty again."""
        self._check_task(OP)
        if self.task is None or self.buffer is None:
            return grad
        self._follow_writers()
        total = self.buffer
        if self.dtype == self.residual_dtype and not self.given:
            result = total if grad is None else total.add_(grad)
        else:
            result = torch.empty(self.shape, dtype=self.residual_dtype, device=self.device)
            if grad is None:
                result.copy_(total)
            else:
                torch.add(total, grad, out=result)
        self.release()
        return result

    def release(self) -> None:
        with _lock:
            _holding.discard(self)
            self.task = None
        if not self.given:
            self.buffer = None
        self.stream = None

    def _check_task(self, op: str) -> None:
        if self.task not in (None, _backward.task()):
            raise errors.AccumulatorError(
                f"{op}: grad_accumulator must be empty at the start of a backward; got one that "
                "holds the sum of another backward, which did not finish or runs around this one. "
                "Call its reset() to drop that sum"
            )

    def _check_others(self, op: str) -> None:
        if self.buffer is None:
            return
        with _lock:
            others = [state for state in _holding if state is not self]
        for other in others:
            if other.buffer is not None and errors.may_overlap(self.buffer, other.buffer):
                raise errors.AccumulatorError(
                    f"{op}: grad_accumulator must have its buffer to itself until its sum is "
                    "collected; got a buffer in which another accumulator holds a sum. Give them "
                    "buffers of their own, or call reset() of that one if its backward failed"
                )

    def _follow_writers(self) -> None:
        """No tensor passes between the writers: autograd orders them, but not their streams."""
        if self.device.type != "cuda" or self.buffer is None or not errors.has_memory(self.buffer):
            return
        stream: int = _current_stream(self.device.index)
        if self.stream is not None and self.stream != stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(torch.cuda.ExternalStream(self.stream, self.device))
            self.buffer.record_stream(current)
        self.stream = stream


# The states whose buffer holds something.
_holding: "weakref.WeakSet[State]" = weakref.WeakSet()
_lock = threading.Lock()


def _collect(residual: Tensor, state: State) -> Tensor:
    return _Collect.apply(residual, state)  # type: ignore[no-any-return, no-untyped-call]


_collected = outside_graphs(_collect)


class _Collect(torch.autograd.Function):
    """The residual, read through a node that runs after all who read it."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, state: State) -> Tensor:
        ctx.state = state
        ctx.set_materialize_grads(False)
        return residual.view_as(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if ctx.state.task is not None:
            errors.check_first_gradient(OP)
        return ctx.state.collect(grad), None
