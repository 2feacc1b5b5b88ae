"""Replayed launches give the bits of the launchers, kernel by kernel."""

import pytest
import torch
from torch import Tensor

import replaying
from cases import operator_calls
from emulator import launch
from tile_mhc.ops import _replay
from tile_mhc.ops._autograd import OPERATORS

LEAD, N, HIDDEN = (3,), 4, 192
REPLAYED = sorted(name for name, op in OPERATORS.items() if op.replay is not None)


@pytest.mark.parametrize("name", REPLAYED)
def test_same_bits(name):
    operator = OPERATORS[name]
    with torch.no_grad():
        first, second = (
            replaying.fresh(operator_calls(LEAD, N, HIDDEN, "cpu")[name]) for _ in range(2)
        )
    # Other values and other addresses, where the program was made.
    for value in first:
        if isinstance(value, Tensor):
            value.mul_(0.5)
    with replaying.replaying(lambda kernel, args: launch.kernel(kernel, *args)):
        replaying.forget()
        assert operator.replay.find(first) is None
        calls = [operator.replay.learn(first) for _ in range(_replay.SIGHTINGS)]
        assert [call is None for call in calls] == [True] * (_replay.SIGHTINGS - 1) + [False]
        copies = replaying.fresh(second)
        expected = operator.replay._launcher(*copies)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        for run in ("run", "run_visible"):
            given = replaying.fresh(second)
            call = operator.replay.find(given)
            assert call is not None
            results = getattr(call, run)()
            hidden = operator.replay._hidden if run == "run_visible" else ()
            for position, (result, value) in enumerate(zip(results, expected, strict=True)):
                if value.numel() == 0 or position in hidden:
                    assert result is None
                    continue
                assert (result.dtype, result.shape) == (value.dtype, value.shape)
                assert result.stride() == value.stride()
                assert torch.equal(replaying.bits(result), replaying.bits(value)), position
            # What it wrote to, it wrote the same.
            for value, copy in zip(given, copies, strict=True):
                if isinstance(value, Tensor):
                    assert torch.equal(replaying.bits(value), replaying.bits(copy))
