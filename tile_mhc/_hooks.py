"""Whether a call of a module runs more than its `forward`: hooks, also those of all modules.

Relies on these private names of torch, each tested in tests/cpu/test_sublayers.py: the four
dictionaries of hooks that a module has, and `nn.modules.module._has_any_global_hook`.
"""

import torch

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_own_hooks(module: torch.nn.Module) -> bool:
    return any(len(getattr(module, hooks)) for hooks in HOOKS)


def has_hooks(module: torch.nn.Module) -> bool:
    return has_own_hooks(module) or torch.nn.modules.module._has_any_global_hook()
