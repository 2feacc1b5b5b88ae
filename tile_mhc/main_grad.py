"""Megatron's protocol for weight gradients: the backward adds to `parameter.main_grad` itself.

A parameter takes part if, when an op reads it, it is a leaf that requires grad and has one of the
attributes of `MARKS`. In backward, and only there, `get_main_grad()` is called where there is one
(Megatron-FSDP allocates lazily) and its result becomes `main_grad`; where `main_grad` is then None
or absent, the gradient goes to autograd as ever. A parameter that gets its first mark between
forward and backward does not take part: autograd gets its gradient, which the hooks of Megatron's
DDP and FSDP then add to `main_grad` themselves.

The gradient is added to `main_grad`, or written with `overwrite_main_grad` (not where Megatron-FSDP
keeps a sum there, as it does not shard gradients), by the kernel that finishes it; where
`main_grad` cannot be a kernel's target (not contiguous, misaligned, neither float32 nor bfloat16),
it is made in float32 and torch adds it. The first op of a backward writes, and another that reads
the same parameter adds: `grad_added_to_main_grad`, which Megatron-FSDP clears when it has reduced a
gradient, tells them apart.

Then, if the parameter has `grad_added_to_main_grad`, it is set, and autograd gets a gradient that
only keeps hooks firing: one shared tensor a shape and dtype, or zeros of its own with
`zero_out_wgrad`. Without that attribute autograd gets None.

That gradient, and so any other that the same parameter gets from elsewhere in the graph, is what
Megatron's hooks throw away when the flag is set; with `zero_out_wgrad` they keep it.

`torch.autograd.grad` with respect to such a parameter returns its gradient and leaves `main_grad`
alone, as does a backward that does not reach the parameter. Gradients of gradients are refused.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tile_mhc import errors

# The attributes that make a parameter take part. `main_grad` comes last: it may be a property that
# allocates, which only backward may touch.
MARKS = ("get_main_grad", "__fsdp_param__", "grad_added_to_main_grad", "main_grad")

_enabled = True
_dummies: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}


@contextlib.contextmanager
def without_main_grad() -> Iterator[None]:
    """Within, ops leave `main_grad` alone and every gradient goes to autograd.

    For frameworks that must see the gradients themselves. What counts is where the op is called;
    it may be used as a decorator of a forward.
    """
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def is_enabled() -> bool:
    return _enabled


def takes_part(parameter: object) -> bool:
    """Whether an op that reads `parameter` now will look for its `main_grad` in backward."""
    return (
        isinstance(parameter, Tensor)
        and parameter.requires_grad
        and parameter.is_leaf
        and any(hasattr(parameter, mark) for mark in MARKS)
    )


def locate(parameter: Tensor) -> object:
    """In backward: what the parameter has as `main_grad`, None if nothing."""
    get = getattr(parameter, "get_main_grad", None)
    if get is not None:
        parameter.main_grad = get()  # type: ignore[attr-defined]
    return getattr(parameter, "main_grad", None)


def adds(parameter: Tensor) -> bool:
    """Whether a gradient is added to `main_grad`, or takes its place."""
    # Megatron-FSDP sets overwrite_main_grad on every parameter. Where it does not shard gradients,
    # as with one rank, its buffer keeps the sum over micro-batches, to which its own hook adds.
    sharded = getattr(getattr(parameter, "_gbuf", None), "is_data_distributed", True)
    writes = getattr(parameter, "overwrite_main_grad", False) and sharded
    return not writes or getattr(parameter, "grad_added_to_main_grad", False)


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
    return main_grad.detach(), adds(parameter)


def is_target(main_grad: Tensor, alignment: int) -> bool:
    """Whether a kernel that makes accesses of so many bytes can write to it."""
    return (
        main_grad.dtype in (torch.float32, torch.bfloat16)
        and main_grad.is_contiguous()
        and main_grad.data_ptr() % alignment == 0
    )


def finish(parameter: Tensor) -> Tensor | None:
    """What autograd gets for a parameter whose gradient is in its `main_grad`."""
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    if getattr(parameter, "zero_out_wgrad", False):
        # A hook adds it to main_grad: nothing else may have been added to it in place.
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    key = (parameter.shape, parameter.dtype, parameter.device)
    if key not in _dummies:
        _dummies[key] = torch.zeros(key[0], dtype=key[1], device=key[2])
    # Not the cached tensor itself: autograd may keep what it is given as `parameter.grad`.
    return _dummies[key].detach()
