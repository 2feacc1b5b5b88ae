"""The operators' CUDA launchers on CPU tensors, replayed as on a GPU, with a test's kernels."""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tile_mhc import _device, _memory, config, errors, jit, selection
from tile_mhc._descriptors import TYPES, DLTensor
from tile_mhc.kernels._arch import HOPPER, Architecture
from tile_mhc.ops import _replay

NUM_SMS = 132
# As `errors.FREED`, for addresses on a CPU: where the interpreter is not position-independent, such
# as Debian's, its heap begins at a few MB.
FREED = 1 << 20
# What a CPU tensor's get_device() returns.
DEVICE = -1
_DTYPES = {code: dtype for dtype, code in TYPES.items()}
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def read(argument: Any) -> Any:
    """The tensor behind a pointer to its descriptor; anything else as it is."""
    if not isinstance(argument, ctypes.c_void_p):
        return argument
    described = DLTensor.from_address(argument.value)
    shape, strides = (values[: described.ndim] for values in (described.shape, described.strides))
    dtype = _DTYPES[described.code, described.bits]
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(described.data)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def _set_no_stream(*_: int) -> int:
    return 0


@contextlib.contextmanager
def replaying(kernel: Callable[[str, tuple[Any, ...]], jit.Launch]) -> Iterator[None]:
    """Within, CPU tensors count as the GPU's for `_replay`, and launchers get `kernel`.

    It takes a kernel's name and arguments; what it returns is launched with tensors.
    """

    def resident(name: str, args: tuple[Any, ...]) -> jit.Launch:
        launch = kernel(name, args)
        return lambda *given: launch(*map(read, given))

    with (
        mock.patch.object(_replay, "current_device", return_value=DEVICE),
        mock.patch.object(_replay, "current_stream", return_value=0),
        mock.patch.object(_replay, "stream_setter", return_value=_set_no_stream),
        mock.patch.object(_replay, "is_on_gpu", lambda tensor: tensor.device.type == "cpu"),
        mock.patch.object(_replay, "empty", _memory.empty_on_cpu),
        mock.patch.object(jit, "resident", resident),
        mock.patch.object(errors, "FREED", FREED),
        mock.patch.object(config, "get_num_sms", return_value=NUM_SMS),
        on_architecture(HOPPER),
    ):
        yield


@contextlib.contextmanager
def on_architecture(limits: Architecture) -> Iterator[None]:
    """Within, the current device is of this architecture, and has the index of a CPU tensor's."""
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=None),
        mock.patch.object(_device, "limits_of", return_value=limits),
        mock.patch.object(config, "_device_num_sms", return_value=NUM_SMS),
        mock.patch.object(selection, "_clusters_at_once", return_value=None),
    ):
        yield


@contextlib.contextmanager
def launchers_on_cpu(
    *names: str, around: Callable[..., AbstractContextManager[None]] = contextlib.nullcontext
) -> Iterator[None]:
    """Within, these operators run their CUDA launchers for CPU tensors; see `on_architecture`.

    Each run is in a context that `around` makes of all arguments.
    """
    library = torch.library.Library("tile_mhc", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*other operators may also be overridden")
        for name in names:
            library.impl(name, _redispatch(name, around), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _redispatch(name: str, around: Callable[..., AbstractContextManager[None]]) -> Any:
    operator = getattr(torch.ops.tile_mhc, name).default

    def run(*args: Any) -> Any:
        with around(args):
            return operator.redispatch(_CUDA, *args)

    return run


def forget() -> None:
    """Drop what this thread has learned of every operator."""
    from tile_mhc.ops._autograd import OPERATORS

    for operator in OPERATORS.values():
        if operator.replay is not None:
            operator.replay.forget()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def fresh(args: Sequence[Any]) -> tuple[Any, ...]:
    """Copies of an operator's arguments: tensors as they are allocated, options with a hash."""
    copies: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            copies.append(value.detach().clone(memory_format=torch.contiguous_format))
        else:
            copies.append(tuple(value) if isinstance(value, list) else value)
    return tuple(copies)
