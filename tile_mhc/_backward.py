"""The backward that runs in this thread: which it is, where it goes, and what to do at its end.

Relies on these names of torch, which are not documented for use in Python; what each does stands in
tests/cpu/test_backward.py:

- `_C._current_graph_task_id()`: a number for each backward, -1 outside of one;
- `_C._will_engine_execute_node(node)`: whether this backward runs a node; it raises for a leaf
  whose gradient `torch.autograd.grad` returns;
- `Variable._execution_engine.queue_callback(function)`: called when this backward has ended.
"""

from collections.abc import Callable
from typing import Any

import torch

# In place of the number of a backward, where none runs.
NO_TASK = -1


def task() -> int:
    """The number of the backward that runs in this thread; `NO_TASK` outside of one."""
    return torch._C._current_graph_task_id()


def goes_on(node: Any) -> bool | None:
    """Whether the backward goes on to a node; None if it returns that node's gradient instead."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return None


def at_end(function: Callable[[], None]) -> None:
    """Call a function when the backward has ended; one that fails drops it."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
