"""One way to make a torch.library operator: TileLang behind CUDA, the reference behind CPU."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from tile_mhc import errors

Function = TypeVar("Function", bound=Callable[..., Any])


def register(
    schema: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define `tile_mhc::<schema>` with its implementations and return the callable operator.

    Tracing, torch.compile and autograd then need nothing more: the dispatcher picks the backend
    from the device of the tensors, and `fake` gives the shapes.
    """
    name = schema.partition("(")[0]
    qualified = f"tile_mhc::{name}"
    torch.library.define(qualified, schema[len(name) :])
    torch.library.impl(qualified, "CUDA", _prepared(schema, cuda))
    torch.library.impl(qualified, "CPU", _reference(schema, cpu))
    torch.library.register_fake(qualified, fake)
    if backward is None and not _mutated(schema):
        backward = _no_gradient_of(name)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return getattr(torch.ops.tile_mhc, name)


def empty_gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Room for the gradient of each input; of a None no element, in the dtype of the one before."""
    grads: list[Tensor] = []
    for value in inputs:
        grads.append(grads[-1].new_empty(0) if value is None else value.new_empty(value.shape))
    return tuple(grads)


@functools.cache
def absent(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel gets in place of a tensor that it does not read."""
    return torch.empty(1, device=device, dtype=dtype)


def dtype_of(tensor: Tensor | None) -> str:
    """What builders call the dtype of a tensor: empty for one that is not there."""
    return "" if tensor is None else _DTYPES[tensor.dtype]


_DTYPES = {dtype: errors.dtype_name(dtype) for dtype in (*errors.STREAMS, *errors.PARAMETERS)}


def _no_gradient_of(name: str) -> Callable[..., Any]:
    """A backward op's own backward: torch would leave out its terms in silence."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise errors.UnsupportedError(
            f"{name}: the gradient must be taken once; got a gradient of the gradient, "
            "which has no kernel"
        )

    return refuse


def outside_graphs(function: Function) -> Function:
    """torch.compile breaks its graph here, and does not look inside."""

    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        # Not before the first call: it imports torch._dynamo, which takes a second.
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call  # type: ignore[return-value]


def _reference(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference keeps its dtypes and records no gradient, whatever region it is called in.

    It reads contiguous copies, as the kernels do: the same bits for any layout.
    """
    mutated = _mutated(schema)

    def compute(*args: Any) -> Any:
        args = tuple(a if i in mutated else _contiguous(a) for i, a in enumerate(args))
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            return function(*args)

    return compute


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _mutated(schema: str) -> frozenset[int]:
    """The positions of the arguments that the operator writes to."""
    arguments = schema.partition("(")[2].rpartition(" -> ")[0].split(", ")
    return frozenset(i for i, argument in enumerate(arguments) if "!)" in argument)


def _prepared(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """TileLang launches on torch's current device and stream: make them the tensors' own.

    Its kernels trust the alignment of an allocation: an input that starts elsewhere is copied.
    """
    name = schema.partition("(")[0]
    mutated = _mutated(schema)
    has_out = schema.endswith("(a!) out) -> ()")

    def launch(*args: Any) -> Any:
        if has_out:
            errors.check_aligned(name, "out", args[-1])
        args = tuple(a if i in mutated else _aligned(a) for i, a in enumerate(args))
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return launch


def _aligned(value: Any) -> Any:
    if isinstance(value, Tensor) and value.data_ptr() % errors.ALIGNMENT:
        return value.clone(memory_format=torch.contiguous_format)
    return value
