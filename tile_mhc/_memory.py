"""Memory on the current CUDA device past the dispatcher, which takes the host half of the time.

Relies on `_C._dynamo.guards._empty_strided_cuda`, by which the code allocates that torch.compile
generates; tested in tests/cpu/test_replay.py. It fills nothing: in deterministic mode, where torch
fills what it allocates (`torch.utils.deterministic.fill_uninitialized_memory`), torch is to be
asked.
"""

from typing import Any

import torch

# From shape, strides and dtype. A torch that was built without CUDA has them too, and they raise.
empty_on_gpu: Any = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
empty_on_cpu: Any = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
is_deterministic: Any = torch._C._get_deterministic_algorithms
