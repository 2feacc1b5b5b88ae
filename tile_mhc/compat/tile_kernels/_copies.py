"""Tensors that are not contiguous: read by way of one copy, which is counted."""

import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tile_mhc._guards import transforms_active

_copies: Counter[tuple[str, str]] = Counter()
_lock = threading.Lock()


def copy_report() -> dict[str, dict[str, int]]:
    """Count the tensors that were copied since the process began, as they were not contiguous.

    By function, and by argument; "gradient of" an output is what came back for it. A copy of
    streams takes as long as an aggregate of them: `.contiguous()` where they are rearranged makes
    one copy for all that reads them. Calls inside of torch.compile and torch.func are not counted.

    Returns:
        Such as ``{"mhc_post": {"gradient of out": 2, "residual": 2}}``; empty where all was as the
        kernels read it.
    """
    report: dict[str, dict[str, int]] = {}
    with _lock:
        for (op, name), count in sorted(_copies.items()):
            report.setdefault(op, {})[name] = count
    return report


def contiguous(op: str, name: str, value: Any) -> Any:
    """The tensor, or its contiguous copy; what is no dense tensor is left to the checks.

    The copy has a storage of its own, on which nobody has posted a gradient: see `_gradients`.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_contiguous():
        return value
    if not _unseen():
        _count(op, name)
    return value.contiguous()


def count_gradients(op: str, **outputs: Tensor) -> None:
    """Copy what comes back for an output where it is not contiguous, once for all that reads it."""
    if _unseen():
        return
    for name, output in outputs.items():
        if output.requires_grad:
            output.register_hook(_Gradient(op, f"gradient of {name}"))


class _Gradient:
    """A hook of an output. No closure: it has what `copy.deepcopy` and pickle need."""

    def __init__(self, op: str, name: str) -> None:
        self.op, self.name = op, name

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        # None for an output that nothing used.
        if grad is None or grad.layout != torch.strided or grad.is_contiguous():
            return None
        _count(self.op, self.name)
        return grad.contiguous()


def _count(op: str, name: str) -> None:
    with _lock:
        _copies[op, name] += 1


def _unseen() -> bool:
    return torch.compiler.is_compiling() or transforms_active()
