"""Whether a call of a module runs more than its `forward`: hooks, also those of all modules.

Relies on these private names of torch, each tested in tests/cpu/test_sublayers.py: the four
dictionaries of hooks that a module has, and `nn.modules.module._has_any_global_hook`.
"""

from collections.abc import Callable
from typing import Any

import torch

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def own_hooks(module: torch.nn.Module) -> list[Callable[..., Any]]:
    return [hook for hooks in HOOKS for hook in getattr(module, hooks).values()]


def has_hooks(module: torch.nn.Module) -> bool:
    """Of its own, or for all modules."""
    return bool(own_hooks(module)) or torch.nn.modules.module._has_any_global_hook()
