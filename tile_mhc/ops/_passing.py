"""An operator that has its first input, the residual, as one more output.

Its gradient then comes to the operator's own backward, whose kernels add to it. Not an operator by
itself: those may not return what they were given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tile_mhc._guards import transforms_active
from tile_mhc.ops._autograd import records


def passing(
    operator: Callable[..., Any],
    visible: int,
    save: Callable[..., None],
    arguments: Callable[..., tuple[Any, ...]],
    gradients: Callable[[Sequence[Any]], tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of the operator's inputs that returns its outputs, then the residual.

    Args:
        operator: what is called.
        visible: how many of its outputs, the first ones, have gradients.
        save: what a context keeps of inputs and outputs.
        arguments: of the backward, from a context and the gradients of the visible outputs and the
            residual, each None where it was not used.
        gradients: of all inputs, from those arguments.
    """

    def with_residual(*inputs: Any) -> tuple[Tensor, ...]:
        return *operator(*inputs), inputs[0].view_as(inputs[0])

    class Passing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = with_residual(*inputs)
            save(ctx, inputs, output)
            ctx.set_materialize_grads(False)
            ctx.num_inputs = len(inputs)
            return *output[:visible], output[-1]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if all(grad is None for grad in grads[:visible]):
                return grads[-1], *[None] * (ctx.num_inputs - 1)
            return gradients(arguments(ctx, *grads))

    def passed(*inputs: Any) -> tuple[Tensor, ...]:
        # Transforms of torch.func take only what they know: the operator, and a view.
        if transforms_active() or not records(inputs):
            return with_residual(*inputs)
        outputs: tuple[Tensor, ...] = Passing.apply(*inputs)  # type: ignore[no-untyped-call]
        return outputs

    return passed
