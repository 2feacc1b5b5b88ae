"""How many SMs the kernels plan for, what one SM has, and switches that decide nothing here."""

import functools

import torch

from tile_mhc.config import get_num_sms, set_num_sms

__all__ = [
    "get_deterministic_algorithms",
    "get_device",
    "get_device_num_sms",
    "get_max_smem_per_sm",
    "get_num_sms",
    "get_pdl",
    "is_ascend",
    "reset_runtime_config",
    "set_num_sms",
    "set_pdl",
    "use_deterministic_algorithms",
]

_DEFAULTS = {"pdl": False, "deterministic_algorithms": False}
_chosen = dict(_DEFAULTS)


def get_device_num_sms() -> int:
    """The number of SMs of the current device."""
    return _properties(torch.cuda.current_device())[0]


def get_max_smem_per_sm() -> int:
    """The bytes of shared memory of one SM of the current device."""
    return _properties(torch.cuda.current_device())[1]


def get_device() -> str:
    """The type of device that the kernels run on."""
    return "cuda"


def is_ascend() -> bool:
    """Whether they run on a Huawei NPU: never."""
    return False


def set_pdl(use_pdl: bool) -> None:
    """Kept for `get_pdl`. Every kernel here is launched by programmatic dependent launch."""
    _chosen["pdl"] = bool(use_pdl)


def get_pdl() -> bool:
    """What `set_pdl` was last told, at first False."""
    return _chosen["pdl"]


def use_deterministic_algorithms(enabled: bool) -> None:
    """Kept for `get_deterministic_algorithms`. Every kernel here gives the same bits each time."""
    _chosen["deterministic_algorithms"] = bool(enabled)


def get_deterministic_algorithms() -> bool:
    """What `use_deterministic_algorithms` was last told, at first False."""
    return _chosen["deterministic_algorithms"]


def reset_runtime_config() -> None:
    """Everything that may be set here as it is at first: all SMs, and False."""
    set_num_sms(0)
    _chosen.update(_DEFAULTS)


@functools.cache
def _properties(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor
