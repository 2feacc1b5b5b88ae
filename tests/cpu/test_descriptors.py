"""Arguments by pointer: their layout, and that compiled host functions read them.

A host function checks its arguments before it calls CUDA, so what it says of a wrong one shows on a
machine without a GPU that it has read the descriptor.
"""

import ctypes

import pytest
import torch

from tile_mhc import jit
from tile_mhc._descriptors import CUDA, Descriptors, DLTensor, stream_setter

N, HIDDEN = 4, 192
SHAPES = ((3, HIDDEN), (3, N, HIDDEN))
# What the kernel takes: the hidden state, and the streams that it writes.
RIGHT = [(torch.bfloat16, shape) for shape in SHAPES]


def strides(shape):
    return [int(torch.tensor(shape[i + 1 :]).prod()) for i in range(len(shape))]


def described(tensors):
    return Descriptors([(dtype, shape, strides(shape)) for dtype, shape in tensors], 0)


def test_layout():
    assert ctypes.sizeof(DLTensor) == 48
    offsets = {name: getattr(DLTensor, name).offset for name, _ in DLTensor._fields_}
    assert offsets == {
        "data": 0,
        "device_type": 8,
        "device_id": 12,
        "ndim": 16,
        "code": 20,
        "bits": 21,
        "lanes": 22,
        "shape": 24,
        "strides": 32,
        "byte_offset": 40,
    }


def test_holds_what_it_is_given():
    descriptors = described(RIGHT)
    descriptors.addresses[0], descriptors.addresses[1] = 512, 1024
    for argument, (_, shape), address in zip(
        descriptors.arguments, RIGHT, (512, 1024), strict=True
    ):
        entry = DLTensor.from_address(argument.value)
        assert (entry.data, entry.device_type, entry.device_id) == (address, CUDA, 0)
        assert (entry.code, entry.bits, entry.lanes, entry.byte_offset) == (4, 16, 1, 0)
        assert entry.shape[: entry.ndim] == list(shape)
        assert entry.strides[: entry.ndim] == strides(shape)


def test_addresses_are_written_at_once():
    descriptors = described(RIGHT)
    descriptors.addresses[:] = memoryview(bytearray(b"\1" + bytes(7) + b"\2" + bytes(7))).cast("Q")
    assert list(descriptors.addresses) == [1, 2]
    assert [DLTensor.from_address(a.value).data for a in descriptors.arguments] == [1, 2]


def test_only_the_dtypes_of_kernels():
    with pytest.raises(TypeError, match="dtype must be a float's; got int64"):
        described([(torch.int64, (3,))])


WRONG = {
    "dtype": ((torch.float16, SHAPES[0]), "dtype mismatch, expected bfloat16"),
    "dimensions": ((torch.bfloat16, (1, 3, HIDDEN)), "ndim mismatch, expected 2"),
    # TileLang names the two the wrong way round: see findings/.
    "width": ((torch.bfloat16, (3, HIDDEN + 64)), rf"expected: {HIDDEN + 64}, got: {HIDDEN}"),
}


@pytest.mark.parametrize("what", WRONG)
def test_host_functions_read_them(what):
    jit.import_tilelang()
    if jit.find_nvcc() is None:
        pytest.skip("needs nvcc")
    launch = jit.compile_kernel("expand_fwd", (N, HIDDEN), "sm_90a").launch
    wrong, message = WRONG[what]
    descriptors = described([wrong, RIGHT[1]])
    descriptors.addresses[0] = descriptors.addresses[1] = 1 << 41
    with pytest.raises(RuntimeError, match=message):
        launch(*descriptors.arguments)


def test_the_stream_of_launches():
    set_stream = stream_setter()
    before = set_stream(CUDA, 0, 4096)
    try:
        assert set_stream(CUDA, 0, 8192) == 4096
    finally:
        assert set_stream(CUDA, 0, before) == 8192
