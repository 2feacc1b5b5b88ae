"""What a GPU ran for a call."""

import torch
from torch.profiler import ProfilerActivity, profile


def launched(function):
    """The names of the device functions."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return " ".join(event.key for event in recorded.key_averages())
