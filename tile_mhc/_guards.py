"""Whether a call may go past torch's dispatcher, because nothing would see it there.

Relies on these private names of torch, each tested in tests/cpu/test_replay.py:

- `_C._dynamo.guards.TensorGuards`, the check that torch.compile makes of its inputs: exact type,
  dispatch keys (with those that a mode or a transform adds or takes away in this thread), dtype,
  device, requires_grad, sizes and strides of several tensors in half a microsecond, and that no
  tensor is given twice. It knows nothing of address and storage.
- `_C._are_functorch_transforms_active` and `_C._get_tracing_state`.
- `_C._len_torch_dispatch_stack`, `_C._len_torch_function_stack`, `forward_ad._current_level` and
  `_C._autograd._profiler_enabled`, for what leaves no trace in the dispatch keys.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_profiles = torch._C._autograd._profiler_enabled


def is_watched() -> bool:
    """Whether a mode, forward-mode AD or a profiler would see an operator that is called now."""
    return bool(
        _dispatch_modes() or _function_modes() or forward_ad._current_level >= 0 or _profiles()
    )


# Whether a transform of torch.func (grad, vmap, jvp, ...) runs: its tensors are wrappers.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_traced() -> bool:
    """Whether torch.jit.trace runs."""
    return torch._C._get_tracing_state() is not None


def same_kind(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A check of as many tensors: whether torch would treat them as it does these, here and now."""
    guards: Any = torch._C._dynamo.guards.TensorGuards
    made = guards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )
    check: Callable[..., bool] = made.check
    return check
