"""Destinations of gradients: memory that outlives the op, in place of a tensor for autograd.

A backward's launcher takes `into`, which maps the positions of some of its gradients to a
`Destination`; those gradients it leaves there, and the others it returns. An accumulator's buffer
and a parameter's `main_grad` are such destinations; `_op` decides which a backward has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tile_mhc.ops._library import empty_like, register


class Destination(NamedTuple):
    """Contiguous, of the gradient's shape, float32 or the dtype of the streams."""

    tensor: Tensor
    adds: bool


# Parameters whose gradient a kernel writes number by number.
GATES = ("scale", "bias")

Destinations = Mapping[int, Destination]
NO_DESTINATIONS: Destinations = {}


def gradient_buffers(into: Destinations, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """For the gradient of each input its destination, or memory like the input; see
    `empty_gradients`."""
    grads: list[Tensor] = []
    for position, value in enumerate(inputs):
        if position in into:
            grads.append(into[position].tensor)
        elif value is None:
            grads.append(grads[-1].new_empty(0))
        else:
            grads.append(empty_like(value))
    return tuple(grads)


def adds(into: Destinations, position: int) -> bool:
    return position in into and into[position].adds


def destination_dtype(into: Destinations, position: int) -> torch.dtype | None:
    """The dtype of a destination; None where there is none."""
    return into[position].tensor.dtype if position in into else None


def for_part(into: Destinations, positions: Mapping[int, int]) -> Destinations:
    """The destinations of a part of the op, at the positions that they have there."""
    return {positions[p]: target for p, target in into.items() if p in positions}


def clear(into: Destinations, grads: Mapping[int, Tensor]) -> None:
    """Gradients that are sums over no token: zero, or what the destination has."""
    for position, grad in grads.items():
        if not adds(into, position):
            grad.zero_()


def register_into(
    schema: str,
    positions: Sequence[int],
    *,
    cuda: Callable[..., tuple[Tensor, ...]],
    cpu: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    flops: Callable[..., int],
) -> Callable[[Sequence[Any], Destinations], Sequence[Tensor | None]]:
    """Define `<backward>_into`: a backward operator with destinations for some of its gradients.

    Args:
        schema: of the backward operator.
        positions: those of its gradients that may have a destination.
        cuda: its launcher, which takes `into`.
        cpu: the reference, which computes in float32 what it is given in float32.
        fake: the empty results.
        flops: what torch's FlopCounterMode counts of the backward operator.

    Returns:
        A function of the backward's arguments and `into`, for use in a backward. A gradient that
        went into its destination is returned without an element, or as None.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    targets = (f"Tensor({chr(ord('a') + i)}!)? into_{p}" for i, p in enumerate(positions))
    count = len(positions) + 1

    def directed(
        function: Callable[[Sequence[Any], Destinations], Sequence[Tensor]],
    ) -> Callable[..., tuple[Tensor, ...]]:
        def run(*args: Any) -> tuple[Tensor, ...]:
            *given, flags = args[-count:]
            into = {
                p: Destination(tensor, flag)
                for p, tensor, flag in zip(positions, given, flags, strict=True)
                if tensor is not None
            }
            grads = function(args[:-count], into)
            return tuple(
                into[p].tensor.new_empty(0) if p in into else g for p, g in enumerate(grads)
            )

        return run

    def on_cpu(args: Sequence[Any], into: Destinations) -> list[Tensor]:
        wide = [_widened(arg) for arg in args]
        grads = []
        for p, (grad, like) in enumerate(zip(cpu(*wide), fake(*args), strict=True)):
            if p in into:
                target = into[p].tensor
                (target.add_ if into[p].adds else target.copy_)(grad.view(target.shape))
            grads.append(grad.to(like.dtype).contiguous())
        return grads

    operator = register(
        f"{name}_into({arguments}, {', '.join(targets)}, bool[] adds) -> {returns}",
        cuda=directed(lambda args, into: cuda(*args, into=into)),
        cpu=directed(on_cpu),
        fake=directed(lambda args, into: fake(*args)),
        flops=flops,
    )

    def run(args: Sequence[Any], into: Destinations) -> Sequence[Tensor | None]:
        tensors = [into[p].tensor if p in into else None for p in positions]
        # A tuple, as what is looked up must have a hash.
        flags = tuple([p in into and into[p].adds for p in positions])
        given = (*args, *tensors, flags)
        call = operator.find_in_backward(given)
        if call is not None:
            return call.run()
        results: tuple[Tensor, ...] = operator(*given)
        return results

    return run


def _widened(value: Any) -> Any:
    """Streams in float32: the reference rounds its gradients to the dtype of the streams."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value
