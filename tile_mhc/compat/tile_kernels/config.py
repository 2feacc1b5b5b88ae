"""How many SMs the kernels plan for, and what one SM has."""

import functools

import torch

from tile_mhc.config import get_num_sms, set_num_sms

__all__ = ["get_device_num_sms", "get_max_smem_per_sm", "get_num_sms", "set_num_sms"]


def get_device_num_sms() -> int:
    """The number of SMs of the current device."""
    return _properties(torch.cuda.current_device())[0]


def get_max_smem_per_sm() -> int:
    """The bytes of shared memory of one SM of the current device."""
    return _properties(torch.cuda.current_device())[1]


@functools.cache
def _properties(device: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor
