"""How many SMs the kernels plan for."""

import functools

import torch

_num_sms = 0


@functools.cache
def _device_num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def get_num_sms() -> int:
    """The number of SMs that launches are sized for: `set_num_sms`, else all of the device's."""
    return _num_sms or _device_num_sms(torch.cuda.current_device())


def set_num_sms(num_sms: int) -> None:
    """Size launches for fewer SMs (0: for all), to leave room for communication kernels.

    It decides how sums are split, so it decides their last bits too.
    """
    limit = _device_num_sms(torch.cuda.current_device())
    if isinstance(num_sms, bool) or not isinstance(num_sms, int) or not 0 <= num_sms <= limit:
        raise ValueError(f"set_num_sms: num_sms must be from 0 to {limit}; got {num_sms!r}")
    global _num_sms
    _num_sms = num_sms
