"""Is a result right? Only then is its op timed."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from tile_mhc.bench.inputs import Inputs
from tile_mhc.bench.ops import ROUNDINGS, Op, Outputs

CHUNK = 1024  # tokens that the float64 reference takes at a time
# What a rounding to bfloat16 is off by, at most. An output had up to `Op.roundings`, each on top of
# the one before; one more is allowed for all that float32 adds.
BFLOAT16 = 2.0**-9
FLOAT32 = 2e-3  # TF32 products are off by 2e-4 of the rms


def find_error(
    got: Tensor, want: Tensor, roundings: int = ROUNDINGS, by_row: bool = False
) -> str | None:
    """What is wrong with `got`; a NaN is.

    Right is |got - want| <= tolerance * (|want| + 4 rms(want)), everywhere; the rms is that of all
    elements, or `by_row` that of the last dimension.
    """
    if got.numel() != want.numel():
        return f"{tuple(got.shape)} for {tuple(want.shape)}"
    error = (got.reshape(want.shape).double() - want).abs()
    tolerance = FLOAT32 if got.dtype == torch.float32 else BFLOAT16 * (roundings + 1)
    squares = want.square()
    mean = squares.mean(-1, keepdim=True) if by_row else squares.mean()
    bound = tolerance * (want.abs() + 4 * mean.sqrt())
    wrong = ~(error <= bound)
    if not wrong.any():
        return None
    worst = error.masked_fill(error.isnan(), torch.inf).max()
    return f"{int(wrong.sum())} of {wrong.numel()} elements, by up to {float(worst):.2e}"


def check(op: Op, x: Inputs, outputs: Outputs) -> str | None:
    """What is wrong with `outputs` beside the reference in float64: all elements of all of them."""
    sums: dict[int, Tensor] = {}
    for start in range(0, x.tokens, CHUNK):
        tokens = slice(start, start + CHUNK)
        wants = op.truth(x.double(tokens))
        for index, (got, want) in enumerate(zip(outputs, wants, strict=True)):
            if index in op.summed:
                sums[index] = sums[index] + want if index in sums else want
                continue
            by_token = got if got.shape[0] == 1 else got.unsqueeze(0)
            if error := find_error(by_token[:, tokens], want, op.roundings, op.by_row):
                return f"output {index}, tokens from {start}: {error}"
    for index, want in sums.items():
        if error := find_error(outputs[index], want, op.roundings):
            return f"output {index}: {error}"
    return None


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten cannot look right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
