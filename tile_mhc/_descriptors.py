"""Arguments of a compiled kernel that are described once and launched many times.

The host function of a TileLang kernel takes, for a tensor, either a tensor object or a pointer to a
DLTensor (address, device, shape, strides, dtype). A view of a torch tensor, made only to be such an
argument, takes the host longer than all that a launch does with it. `Descriptors` holds DLTensors
whose shapes never change; before a launch only their addresses are written.

Relies on: the layout of DLTensor (DLPack 1.x, part of its stable ABI); the host functions taking an
opaque pointer for a DLTensor (their own message: "expected pointer or tensor handle"), tested in
tests/cpu/test_descriptors.py; `tvm_ffi.core._env_set_current_stream`, which the public
`tvm_ffi.use_raw_stream` calls. A launch that is given no tensor object does not learn of torch's
current stream by itself, hence `set_stream`.
"""

import ctypes
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tile_mhc.errors import dtype_name

CUDA = 2  # DLPack's kDLCUDA
_FLOAT, _BFLOAT = 2, 4  # DLPack's type codes

TYPES = {
    torch.float32: (_FLOAT, 32),
    torch.float16: (_FLOAT, 16),
    torch.bfloat16: (_BFLOAT, 16),
}


class DLTensor(ctypes.Structure):
    """DLPack's description of a tensor."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Descriptors:
    """DLTensors of fixed shapes on one CUDA device.

    Attributes:
        arguments: for each a pointer to it, as a kernel takes it.
        addresses: those that they have, to write to: a view of their memory.
    """

    def __init__(
        self, tensors: Sequence[tuple[torch.dtype, Sequence[int], Sequence[int]]], device: int
    ) -> None:
        """Describe tensors of these dtypes, shapes and strides (in elements)."""
        self._memory = (DLTensor * len(tensors))()
        for entry, (dtype, shape, strides) in zip(self._memory, tensors, strict=True):
            if dtype not in TYPES:
                raise TypeError(f"Descriptors: dtype must be a float's; got {dtype_name(dtype)}")
            entry.device_type, entry.device_id, entry.ndim = CUDA, device, len(shape)
            entry.code, entry.bits = TYPES[dtype]
            entry.lanes = 1
            # The structure keeps the two arrays alive.
            entry.shape = (ctypes.c_int64 * len(shape))(*shape)
            entry.strides = (ctypes.c_int64 * len(shape))(*strides)
        start = ctypes.addressof(self._memory)
        size = ctypes.sizeof(DLTensor)
        self.arguments = [ctypes.c_void_p(start + i * size) for i in range(len(tensors))]
        # The address is the first word of each.
        words = memoryview(self._memory).cast("B").cast("Q")
        self.addresses = words[:: size // words.itemsize]


def stream_setter() -> Callable[[int, int, int], Any]:
    """The function that sets the stream of launches: (CUDA, device, stream) -> the one before."""
    core = importlib.import_module("tvm_ffi.core")
    setter: Callable[[int, int, int], Any] = core._env_set_current_stream
    return setter
