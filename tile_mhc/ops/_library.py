"""One way to make a torch.library operator: TileLang behind CUDA, the reference behind CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    torch.library.impl(qualified, "CUDA", _on_device_of_arguments(cuda))
    torch.library.impl(qualified, "CPU", _without_autocast(cpu))
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return getattr(torch.ops.tile_mhc, name)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference's own matmuls keep their dtype, whatever region the op is called in."""

    def compute(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return compute


def _on_device_of_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """TileLang launches on torch's current device and stream: make them the tensors' own."""

    def launch(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.index == torch.cuda.current_device():
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return launch
