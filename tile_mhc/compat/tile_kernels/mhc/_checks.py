"""Checks of what the functions of `mhc` read and write."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tile_mhc import errors

Named = tuple[str, Tensor]


def check_output(
    op: str,
    name: str,
    value: object,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    like: Named,
    alignment: int = errors.ALIGNMENT,
    apart: Sequence[Named] = (),
) -> None:
    """Memory that a kernel writes: contiguous, aligned, and none of the inputs in `apart`."""
    errors.check_tensor(op, name, value, shapes, dtype, like)
    tensor = errors.require_tensor(op, name, value)
    errors.check_contiguous(op, name, tensor)
    errors.check_aligned(op, name, tensor, alignment)
    for other, given in apart:
        if errors.may_overlap(tensor, given):
            raise errors.ShapeError(
                f"{op}: {name} must not share memory with an input; got one that overlaps {other}"
            )


def check_streams_output(
    op: str, name: str, value: object, shape: Sequence[int], like: Named, apart: Sequence[Named]
) -> None:
    """The same for streams, or one of them, of the dtype of `like`."""
    alignment = errors.STREAM_ALIGNMENT
    check_output(op, name, value, [shape], like[1].dtype, like, alignment, apart)


def check_rows(
    op: str,
    name: str,
    value: object,
    row: tuple[int, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
) -> None:
    """(T, *row) of a builder's sizes, for any T."""
    tensor = errors.require_tensor(op, name, value)
    tokens = tensor.shape[0] if tensor.ndim else 0
    errors.check_tensor(op, name, tensor, [(tokens, *row)], dtype)


def check_sizes(op: str, num_streams: int, hidden_size: int | None = None, **counts: int) -> None:
    """What a builder is built for. Threads and blocks are counts, which decide nothing here."""
    errors.check_num_streams(op, num_streams)
    if hidden_size is not None:
        errors.check_hidden_size(op, hidden_size)
    for name, count in counts.items():
        errors.check_positive_int(op, name, count)


def check_hidden(op: str, name: str, value: object) -> Tensor:
    """A stream (..., H), contiguous."""
    tensor = errors.require_tensor(op, name, value)
    errors.check_stream_dtype(op, name, tensor, "(..., H)", 1)
    errors.check_hidden_size(op, tensor.shape[-1])
    errors.check_device(op, name, tensor)
    errors.check_contiguous(op, name, tensor)
    return tensor


def check_numbers(op: str, name: str, value: object, columns: str, dims: int) -> Tensor:
    """Float32 numbers of any leading dimensions, `columns` of a token."""
    tensor = errors.require_tensor(op, name, value)
    if tensor.dtype != torch.float32 or tensor.ndim < dims:
        raise errors.ShapeError(
            f"{op}: {name} must be {columns} float32; got {errors.describe(tensor)}"
        )
    errors.check_device(op, name, tensor)
    return tensor


def check_gates(
    op: str, scale: object, bias: object, scales: Sequence[Sequence[int]], biases: int, like: Named
) -> None:
    """The parameters of gates, as `mhc_scale` and `mhc_base`."""
    errors.check_tensor(op, "mhc_scale", scale, scales, errors.PARAMETERS, like)
    errors.check_tensor(op, "mhc_base", bias, [(biases,)], errors.PARAMETERS, like)


def check_num_mixes(op: str, name: str, tensor: Tensor, num_mixes: int) -> int:
    """The number of streams of which a token has so many mixes."""
    for n in errors.SUPPORTED_STREAMS:
        if num_mixes == n * (n + 2):
            return n
    counts = " or ".join(str(n * (n + 2)) for n in errors.SUPPORTED_STREAMS)
    raise errors.ShapeError(
        f"{op}: {name} must have {counts} numbers in a row, n*(n+2); got {errors.describe(tensor)}"
    )
