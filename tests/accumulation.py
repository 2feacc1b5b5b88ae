"""Ops that read one residual, with and without an accumulator, and the float64 truth of both."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import oracle
from cases import AGGREGATE, CONTRACT, POST, PROJECTION, Op
from tile_mhc import GradAccumulator

# Two of each kind where it matters: two heads may read one residual.
READERS: dict[str, Op] = {
    "projection": PROJECTION,
    "aggregate": AGGREGATE,
    "post": POST,
    "contract": CONTRACT,
    "second contract": CONTRACT,
}
SUB_LAYER = ("projection", "aggregate", "post")
ORDERS: tuple[tuple[str, ...], ...] = (
    ("projection",),
    ("aggregate",),
    ("post",),
    ("contract",),
    ("projection", "aggregate"),
    SUB_LAYER,
    SUB_LAYER[::-1],
    ("aggregate", "post", "projection"),
    ("contract", "second contract"),
    ("contract", *SUB_LAYER, "second contract"),
)
# How far the float32 sum of bfloat16 roundings may be from the rounded float64 sum, in norm.
ROUNDED_ONCE = 1.03


class Readers:
    """One residual, what its readers take besides, and a gradient for each of their outputs."""

    def __init__(
        self, names: Sequence[str], num_tokens: int, n: int, hidden_size: int, device: str
    ) -> None:
        self.names = names
        shape = ((num_tokens,), n, hidden_size, device)
        self.inputs = {name: READERS[name].inputs(*shape)[0] for name in names}
        self.residual = self.inputs[names[0]]["residual"].requires_grad_()
        for tensors in self.inputs.values():
            del tensors["residual"]
            for tensor in tensors.values():
                tensor.requires_grad_()
        with torch.no_grad():
            outputs = self.outputs(self.residual)
        self.upstream = [torch.randn_like(out) for out in outputs]

    def outputs(self, residual: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return tuple(
            READERS[name].run(residual=residual, **self.inputs[name], **options)
            for name in self.names
        )

    def gradients(self, **options: Any) -> oracle.Named:
        """Of the residual and of everything else, by one backward."""
        return self.gradients_of(self.outputs(self.residual, **options))

    def gradients_of(self, outputs: Sequence[Tensor], **options: Any) -> oracle.Named:
        leaves = {"residual": self.residual}
        for name, tensors in self.inputs.items():
            leaves |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        grads = torch.autograd.grad(outputs, list(leaves.values()), self.upstream, **options)
        return dict(zip(leaves, grads, strict=True))

    def truth(self, others: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The residual's gradient in float64; `others` is a loss that also reads the residual."""
        residual = self.residual.detach().double().requires_grad_()
        outputs = [
            READERS[name].reference(
                residual=residual, **{k: t.double() for k, t in self.inputs[name].items()}
            )
            for name in self.names
        ]
        upstream = [grad.double() for grad in self.upstream]
        if others is not None:
            outputs.append(others(residual))
            upstream.append(torch.ones_like(outputs[-1]))
        (grad,) = torch.autograd.grad(outputs, residual, upstream)
        return grad


def accumulator(readers: Readers, dtype: torch.dtype) -> GradAccumulator:
    return GradAccumulator(readers.residual, dtype)


def rounding_of(truth: Tensor) -> float:
    return oracle.relative_error(truth.bfloat16(), truth)
