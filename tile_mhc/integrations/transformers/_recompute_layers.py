"""Groups of decoder layers for `patch(recompute_layers=...)`: each layer is a part of one.

A model calls its layers one by one, so a group cannot stand around them: it waits in its thread for
the layer that follows. Which layers share a group decides what is made again together, and nothing
else: a layer that is called by itself begins one.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from tile_mhc import _backward
from tile_mhc._recompute_group import RecomputeGroup, has_hooks


class _Waiting(threading.local):
    """The group of the layer before, if it takes another one, and which."""

    group: RecomputeGroup | None = None
    config: Any = None
    index: int = 0


_waiting = _Waiting()


def run(layers: int, index: int, config: Any, forward: Callable[[], Any]) -> Any:
    """The forward of a model's decoder layer, as a part of a group of so many layers."""
    if torch.compiler.is_compiling():
        return forward()
    if not _is_grouped():
        if _backward.task() == _backward.NO_TASK:
            close()
        return forward()
    group = _group_for(index, config)
    with group.part():
        result = forward()
    if (index + 1) % layers == 0 or index + 1 >= getattr(config, "num_hidden_layers", 0):
        group.close()
    else:
        _waiting.group, _waiting.config, _waiting.index = group, config, index + 1
    return result


def close() -> None:
    """No layer follows in this forward: the group that waits for one ends."""
    group, _waiting.group = _waiting.group, None
    if group is not None:
        group.close()


def _is_grouped() -> bool:
    """Not what is checkpointed: neither its forward nor, in a backward, its second one."""
    return torch.is_grad_enabled() and not has_hooks() and _backward.task() == _backward.NO_TASK


def _group_for(index: int, config: Any) -> RecomputeGroup:
    group = _waiting.group
    if group is not None and _waiting.index == index and _waiting.config is config:
        _waiting.group = None
        return group
    close()  # of a forward that has not gone on
    return RecomputeGroup()
