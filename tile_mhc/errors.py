"""The exceptions of tile_mhc and the checks that every op runs before it launches anything.

A check reads Python metadata only: no synchronisation, no copy. Every message has one form:
``<op>: <argument> must be <expected>; got <actual>``.
"""

import itertools
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from tile_mhc import _guards

SUPPORTED_STREAMS = (2, 4, 8)
MAX_HIDDEN = 16384
# The dtypes that streams, and parameters, may have.
STREAMS = (torch.bfloat16, torch.float16, torch.float32)
PARAMETERS = (torch.float32, torch.bfloat16)
# Bytes: a load of stream values, and the widest load of all.
STREAM_ALIGNMENT = 16
ALIGNMENT = 32
# What a freed tensor has for an address is its offset into the storage: less than this. So may be
# an address, if rarely.
FREED = 1 << 40


class ShapeError(ValueError):
    """An argument is wrong for the op: a tensor's shape, dtype, device or layout, or a number."""


class UnsupportedError(NotImplementedError):
    """The configuration is valid mathematics, but no kernel is built for it."""


class AccumulatorError(RuntimeError):
    """A gradient accumulator holds something that the op would overwrite or mix up."""


class RecomputeError(RuntimeError):
    """A recompute group is used wrongly, or cannot make again what a backward needs."""


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor in one phrase, or the type of anything else.

    Never the values of tensors, on their own or in what holds them: that would synchronise.
    """
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, _CONTAINERS):
        return _describe_container(value)
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{name} {shown(value)}" if isinstance(value, _PLAIN) else name


def shown(value: object) -> str:
    """A number or a word as it is written, shortened; anything else as `describe` has it."""
    if value is not None and not isinstance(value, _PLAIN):
        return describe(value)
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


# What `repr` shows without a look at a tensor, and the most that a message has of it.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.SymInt)
_CONTAINERS = (tuple, list, set, frozenset, dict)
_MOST_CHARACTERS = 60
_MOST_ITEMS = 3


def _describe_tensor(value: Tensor) -> str:
    text = f"{_sizes(value.shape)} {dtype_name(value.dtype)} on {value.device}"
    if value.layout != torch.strided:
        return f"{text} with layout {dtype_name(value.layout)}"
    return text if value.is_contiguous() else f"{text} with strides {_sizes(value.stride())}"


def _describe_container(value: Collection[Any]) -> str:
    """Its first items, as in its `repr`; of a container inside, the length alone."""
    items = []
    for item in itertools.islice(value, _MOST_ITEMS):
        text = _describe_item(item)
        if isinstance(value, dict):
            text += f": {_describe_item(value[item])}"
        items.append(text)
    if len(value) > _MOST_ITEMS:
        items.append(f"... {len(value)} in all")
    left, right = "()" if isinstance(value, tuple) else "[]" if isinstance(value, list) else "{}"
    return f"{type(value).__name__} {left}{', '.join(items)}{right}"


def _describe_item(item: object) -> str:
    if isinstance(item, _CONTAINERS):
        return f"{type(item).__name__} of {len(item)}"
    return shown(item)


def _sizes(shape: Iterable[Any]) -> tuple[Any, ...]:
    """A shape to print."""
    return tuple(map(_untraced, shape))


def require_tensor(op: str, name: str, value: object) -> Tensor:
    if type(value) is not Tensor and type(value) is not Parameter:
        _check_class(op, name, value)
    tensor: Tensor = value  # type: ignore[assignment]
    if tensor.layout != torch.strided:
        raise ShapeError(f"{op}: {name} must be a dense tensor; got {describe(value)}")
    return tensor


def _check_class(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ShapeError(f"{op}: {name} must be a torch.Tensor; got {describe(value)}")
    # Where the module is not imported, no DTensor has been made.
    distributed = sys.modules.get("torch.distributed.tensor")
    if isinstance(value, getattr(distributed, "DTensor", ())):
        raise ShapeError(
            f"{op}: {name} must be a plain tensor, such as to_local() gives, or a parameter of a "
            "module that is gathered (an FSDP unit of its own; register_fsdp_forward_method for "
            f"methods other than forward); got a DTensor {describe(value)}"
        )


def check_tensor(
    op: str,
    name: str,
    value: object,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    like: tuple[str, Tensor] | None = None,
) -> None:
    """Raise ShapeError unless `value` has one of `shapes`, of `dtype`, and the device of `like`."""
    tensor = require_tensor(op, name, value)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype in dtypes and any(tensor.shape == torch.Size(s) for s in shapes):
        if like is None or tensor.device == like[1].device:
            return
        raise ShapeError(
            f"{op}: {name} must be on {like[1].device}, where {like[0]} is; got {describe(tensor)}"
        )
    expected = " or ".join(str(_sizes(s)) for s in shapes)
    match = f" to match {like[0]} {describe(like[1])}" if like else ""
    names = " or ".join(map(dtype_name, dtypes))
    raise ShapeError(f"{op}: {name} must be {expected} {names}{match}; got {describe(tensor)}")


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Stream tensors are never copied silently: a copy would cost as much as the op."""
    if not tensor.is_contiguous():
        raise ShapeError(
            f"{op}: {name} must be contiguous (call .contiguous() first); got {describe(tensor)}"
        )


def check_streams(op: str, name: str, value: object) -> tuple[int, int]:
    """Check a residual (..., n, H), contiguous and of a stream dtype; return (n, H)."""
    tensor = require_tensor(op, name, value)
    check_stream_dtype(op, name, tensor, "(..., n, H)", 2)
    num_streams, hidden_size = tensor.shape[-2:]
    check_num_streams(op, num_streams)
    check_hidden_size(op, hidden_size)
    check_device(op, name, tensor)
    check_contiguous(op, name, tensor)
    return num_streams, hidden_size


def check_stream_dtype(op: str, name: str, tensor: Tensor, shape: str, dims: int) -> None:
    """A float64 stream is sound, and has no kernel; one of integers is a mistake."""
    if tensor.dtype in STREAMS and tensor.ndim >= dims:
        return
    message = f"{op}: {name} must be {shape} bfloat16, float16 or float32; got {describe(tensor)}"
    if tensor.is_floating_point() and tensor.ndim >= dims:
        raise UnsupportedError(message)
    raise ShapeError(message)


def check_num_streams(op: str, num_streams: int) -> None:
    size = num_streams if type(num_streams) is int else _untraced(num_streams)
    if not isinstance(size, int | torch.SymInt) or size not in SUPPORTED_STREAMS:
        raise UnsupportedError(
            f"{op}: the number of streams n must be one of {SUPPORTED_STREAMS}; got {shown(size)}"
        )


def check_hidden_size(op: str, hidden_size: int) -> None:
    size = hidden_size if type(hidden_size) is int else _untraced(hidden_size)
    if not 0 < size <= MAX_HIDDEN:
        raise UnsupportedError(
            f"{op}: the hidden size H must be from 1 to {MAX_HIDDEN}; got {shown(size)}"
        )


def _untraced(size: Any) -> Any:
    """A size out of a shape: under torch.jit.trace it is a tensor, on the CPU."""
    is_traced = isinstance(size, Tensor) and _guards.is_traced()
    return int(size) if is_traced else size


def check_device(op: str, name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cuda", "cpu", "meta"):
        raise UnsupportedError(
            f"{op}: {name} must be on a CUDA device or the CPU; got {describe(tensor)}"
        )


def check_out(op: str, out: Tensor, inputs: Sequence[tuple[str, Tensor]]) -> None:
    """A caller's `out` must not need a gradient, nor share memory with an input."""
    check_contiguous(op, "out", out)
    if torch.is_grad_enabled():
        for name, tensor in (("out", out), *inputs):
            if tensor.requires_grad:
                raise ShapeError(
                    f"{op}: out must be None when a gradient is needed; got an out, "
                    f"and {name} requires grad"
                )
    for name, tensor in inputs:
        if may_overlap(out, tensor):
            raise ShapeError(
                f"{op}: out must not share memory with an input; got an out that overlaps {name}"
            )


def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor has an address: not while traced or transformed, nor without elements."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    if _guards.transforms_active():  # wrappers of torch.func
        return False
    return not tensor.is_meta and tensor.numel() > 0


def check_storage(op: str, name: str, tensor: Tensor) -> None:
    """For what a framework may have freed: one that shards parameters leaves their shape."""
    # Asking the storage takes the host longer than asking for the address.
    if has_memory(tensor) and tensor.data_ptr() < FREED and not tensor.untyped_storage().nbytes():
        raise ShapeError(
            f"{op}: {name} must be in memory; got {describe(tensor)}, whose storage is freed. "
            "Where a framework gathers parameters for a module's forward, call the op within that"
        )


def check_aligned(op: str, name: str, tensor: Tensor, alignment: int = STREAM_ALIGNMENT) -> None:
    """For a tensor that a kernel writes or knows by its address: it cannot be copied first."""
    if has_memory(tensor) and tensor.data_ptr() % alignment:
        raise ShapeError(
            f"{op}: {name} must start at a multiple of {alignment} bytes; got "
            f"{describe(tensor)}, {tensor.data_ptr() % alignment} bytes off"
        )


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes spanned by two tensors intersect (False where one has no memory)."""
    if not has_memory(a) or not has_memory(b) or a.device != b.device:
        return False
    spans = []
    for t in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def check_positive_int(op: str, name: str, value: object, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ShapeError(
            f"{op}: {name} must be an integer of at least {minimum}; got {shown(value)}"
        )


def check_bool(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ShapeError(f"{op}: {name} must be True or False; got {describe(value)}")


def check_number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ShapeError(f"{op}: {name} must be a number; got {describe(value)}")


def check_first_gradient(op: str) -> None:
    """In a backward that writes to memory of its own: what it writes has no graph."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            f"{op}: the gradient must be taken once where it goes into a buffer; got "
            "create_graph=True, for a gradient of the gradient"
        )
