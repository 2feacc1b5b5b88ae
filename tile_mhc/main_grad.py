"""Megatron's protocol for weight gradients: the backward adds to `parameter.main_grad` itself.

A parameter takes part if, when an op reads it, it is a leaf that requires grad and has one of the
attributes that `takes_part` looks for. In backward, and only there, `get_main_grad()` is called
where there is one (Megatron-FSDP allocates lazily) and its result becomes `main_grad`; where
`main_grad` is then None or absent, the gradient goes to autograd as ever. A parameter that gets its
first mark between forward and backward does not take part: autograd gets its gradient, which the
hooks of Megatron's DDP and FSDP then add to `main_grad` themselves.

The gradient is added to `main_grad`, or written with `overwrite_main_grad` (not where Megatron-FSDP
keeps a sum there, as it does not shard gradients), by the kernel that finishes it; where
`main_grad` cannot be a kernel's target (not contiguous, misaligned, neither float32 nor bfloat16),
it is made in float32 and torch adds it. Where it is written, the first op of a backward writes and
another that reads the same parameter adds, until autograd has handed the gradient on to the
framework's hooks. `grad_added_to_main_grad` alone does not tell them apart: Megatron-FSDP clears it
whenever it gathers a unit, so also between the two calls of a unit that is called twice. Where the
flag is set, by whomever, the gradient is added.

Then, if the parameter has `grad_added_to_main_grad`, it is set, and autograd gets a gradient that
only keeps hooks firing: one shared tensor of zeros per shape and dtype, or zeros of its own with
`zero_out_wgrad`. Without that attribute autograd gets None.

That gradient, and so any other that the same parameter gets from elsewhere in the graph, is what
Megatron's hooks throw away when the flag is set; with `zero_out_wgrad` they keep it.

`torch.autograd.grad` with respect to such a parameter returns its gradient and leaves `main_grad`
alone, as does a backward that does not reach the parameter. A gradient that is returned, or goes to
autograd, clears a flag that an earlier backward left set: Megatron's CUDA graphs, which take
gradients so, and its hooks would drop it. Gradients of gradients are refused.

Two things about parameters are decided elsewhere. An optimizer of matrices, as Muon is, takes
`weight` for one, by its two dimensions: where that is not meant, give it to another. And with
sequence parallelism each rank sees a part of the tokens: Megatron-LM sums the gradients of
parameters marked `sequence_parallel` over the ranks (an argument of the modules in `tile_mhc.nn`
marks them), and that of one without the mark is silently a part: with two ranks, about half.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from tile_mhc import _backward, _inherited, errors

_dummies: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}


_inside: ContextVar[bool] = ContextVar("tile_mhc_without_main_grad", default=False)
# Of torch's thread locals, which autograd's threads take over from the caller of a backward: the
# thread that entered a block.
_KEY = "tile_mhc_without_main_grad"
# How many blocks each thread is in.
_open: dict[int, int] = {}


@contextlib.contextmanager
def without_main_grad() -> Iterator[None]:
    """Within, ops leave `main_grad` alone and every gradient goes to autograd.

    For frameworks that must see the gradients themselves. What counts is where the op is called;
    it may be used as a decorator of a forward. It holds for the context (thread or task) that
    enters it, and for what a backward that is called within computes anew, in whatever thread.
    """
    if torch.compiler.is_compiling():
        # What is traced has no parameter that takes part: with one, torch.compile leaves this to
        # eager mode.
        yield
        return
    ident = threading.get_ident()
    inherited, token = _inherited.get(_KEY), _inside.set(True)
    _open[ident] = _open.get(ident, 0) + 1
    _inherited.keep(_KEY, ident)
    try:
        yield
    finally:
        _open[ident] -= 1
        _inside.reset(token)
        _inherited.keep(_KEY, inherited)


def is_enabled() -> bool:
    if _inside.get():
        return False
    # In the thread that entered a block, the context says all.
    ident = _inherited.get(_KEY)
    return not isinstance(ident, int) or ident == threading.get_ident() or not _open.get(ident)


def takes_part(parameter: object) -> bool:
    """Whether an op that reads `parameter` now will look for its `main_grad` in backward."""
    if not isinstance(parameter, Tensor) or not parameter.requires_grad or not parameter.is_leaf:
        return False
    # Spelled out, as a loop in a generator takes twice as long. `main_grad` comes last: it may be a
    # property that allocates, which only backward may touch.
    return (
        hasattr(parameter, "get_main_grad")
        or hasattr(parameter, "__fsdp_param__")
        or hasattr(parameter, "grad_added_to_main_grad")
        or hasattr(parameter, "main_grad")
    )


def locate(parameter: Tensor) -> object:
    """In backward: what the parameter has as `main_grad`, None if nothing."""
    get = getattr(parameter, "get_main_grad", None)
    if get is not None:
        parameter.main_grad = get()  # type: ignore[attr-defined]
    return getattr(parameter, "main_grad", None)


def adds(parameter: Tensor, main_grad: Tensor) -> bool:
    """Whether a gradient is added to `main_grad`, or takes its place."""
    return (
        not _is_overwritten(parameter)
        or getattr(parameter, "grad_added_to_main_grad", False)
        or _holds_gradient(parameter, main_grad)
    )


def _is_overwritten(parameter: Tensor) -> bool:
    # Megatron-FSDP sets overwrite_main_grad on every parameter. Where it does not shard gradients,
    # as with one rank, its buffer keeps the sum over micro-batches, to which its own hook adds.
    sharded = getattr(getattr(parameter, "_gbuf", None), "is_data_distributed", True)
    return getattr(parameter, "overwrite_main_grad", False) and sharded


class _Pending:
    """A gradient in `main_grad` that the framework has not been told of.

    It ends when autograd accumulates what stands for it (the hooks then run, and Megatron-FSDP
    reduces what is in `main_grad`), or with the backward that wrote it: only that keeps this object
    alive, as a callback, so that a backward which fails leaves nothing behind. A backward within
    this one, as of a checkpoint, may add to the gradient, and may hand it on.
    """

    def __init__(self, parameter: Tensor, main_grad: Tensor, node: Any) -> None:
        # Both stay as they are as long as this does: no other can have their id, or memory.
        self.parameter = parameter
        self.main_grad: Tensor | None = main_grad
        reference = weakref.ref(self)

        def before(grads: tuple[Tensor | None, ...]) -> None:
            pending = reference()
            if pending is not None and grads[0] is not None:
                pending.hand_on()

        self.handle = node.register_prehook(before)
        _pending[id(parameter)] = self
        _backward.at_end(self)

    def hand_on(self) -> None:
        """Autograd is about to run the hooks: what they read must be true."""
        if _pending.get(id(self.parameter)) is self:
            if hasattr(self.parameter, "grad_added_to_main_grad"):
                # Megatron-FSDP may have gathered the parameter again, and cleared it.
                self.parameter.grad_added_to_main_grad = True
            self()

    def __call__(self) -> None:
        """At the end of the backward, and before."""
        if _pending.get(id(self.parameter)) is self:
            del _pending[id(self.parameter)]
        self.main_grad = None

    def __del__(self) -> None:
        self.handle.remove()


# By the id of the parameter.
_pending: weakref.WeakValueDictionary[int, _Pending] = weakref.WeakValueDictionary()


def _holds_gradient(parameter: Tensor, main_grad: Tensor) -> bool:
    pending = _pending.get(id(parameter))
    return (
        pending is not None
        and pending.main_grad is not None
        and pending.main_grad.is_set_to(main_grad)
    )


def find(op: str, name: str, parameter: Tensor) -> tuple[Tensor, bool] | None:
    """In backward: `main_grad`, and whether to add to it; None where there is none."""
    found = locate(parameter)
    if found is None:
        return None
    main_grad = errors.require_tensor(op, f"{name}.main_grad", found)
    if (
        main_grad.shape != parameter.shape
        or main_grad.device != parameter.device
        or not main_grad.is_floating_point()
    ):
        raise errors.ShapeError(
            f"{op}: {name}.main_grad must be {tuple(parameter.shape)}, of a floating dtype, on "
            f"{parameter.device} to match {name}; got {errors.describe(main_grad)}"
        )
    errors.check_storage(op, f"{name}.main_grad", main_grad)
    return main_grad.detach(), adds(parameter, main_grad)


def is_target(main_grad: Tensor, alignment: int) -> bool:
    """Whether a kernel that makes accesses of so many bytes can write to it."""
    return (
        main_grad.dtype in (torch.float32, torch.bfloat16)
        and main_grad.is_contiguous()
        and not (errors.has_memory(main_grad) and main_grad.data_ptr() % alignment)
    )


def finish(parameter: Tensor, main_grad: Tensor, node: Any) -> Tensor | None:
    """What autograd gets for a parameter whose gradient is in its `main_grad`.

    `node` is the one that autograd gives it to.
    """
    if _is_overwritten(parameter) and not _holds_gradient(parameter, main_grad):
        _Pending(parameter, main_grad, node)
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    return _stand_in(parameter)


def _stand_in(parameter: Tensor) -> Tensor:
    # With zero_out_wgrad a hook adds it to main_grad: nothing else may have been added to it.
    if getattr(parameter, "zero_out_wgrad", False) or not errors.has_memory(parameter):
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    key = (parameter.shape, parameter.dtype, parameter.device)
    if key not in _dummies:
        made = torch.zeros(key[0], dtype=key[1], device=key[2])
        if not _may_be_kept(made):
            return made
        _dummies[key] = made
    # Not the cached tensor itself: autograd may keep what it is given as `parameter.grad`.
    return _dummies[key].detach()


def _may_be_kept(made: Tensor) -> bool:
    """Whether the tensor may outlive the call: a fake one, or memory of a CUDA graph's, may not."""
    if type(made) is not Tensor:
        return False
    return not (made.is_cuda and torch.cuda.is_current_stream_capturing())


def left(parameter: Tensor) -> None:
    """In backward: the gradient of the parameter goes to autograd, not into its `main_grad`.

    A flag that an earlier backward left set would have the framework drop it. One that this
    backward has set comes back where it matters, see `_Pending`; where gradients are added, what
    stands for one is zero.
    """
    if getattr(parameter, "grad_added_to_main_grad", False):
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]


def by_autograd(parameter: Tensor) -> Tensor:
    """The parameter, for an op that leaves its `main_grad` alone; see `left`."""
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return parameter
    return _ByAutograd.apply(parameter)  # type: ignore[no-any-return, no-untyped-call]


class _ByAutograd(torch.autograd.Function):
    @staticmethod
    def forward(parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        (ctx.parameter,) = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        left(ctx.parameter)
        return grad
