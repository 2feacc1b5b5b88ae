"""Is a result right? Only then is its op timed."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from tile_mhc.bench.inputs import Inputs
from tile_mhc.bench.ops import Op, Outputs

CHUNK = 1024  # tokens that the float64 reference takes at a time
# bfloat16 rounds by at most 2**-9, three times at most; TF32 products are off by 2e-4 of the rms.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float32: 2e-3}


def find_error(got: Tensor, want: Tensor) -> str | None:
    """What is wrong with `got`; a NaN is.

    Right is |got - want| <= TOLERANCE * (|want| + 4 rms(want)), everywhere.
    """
    if got.numel() != want.numel():
        return f"{tuple(got.shape)} for {tuple(want.shape)}"
    error = (got.reshape(want.shape).double() - want).abs()
    bound = TOLERANCE[got.dtype] * (want.abs() + 4 * want.square().mean().sqrt())
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
            if error := find_error(by_token[:, tokens], want):
                return f"output {index}, tokens from {start}: {error}"
    for index, want in sums.items():
        if error := find_error(outputs[index], want):
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
