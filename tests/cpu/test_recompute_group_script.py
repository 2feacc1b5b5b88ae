"""scripts/recompute_group.py: a tiny run on the CPU, and what it makes of measurements."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
script = importlib.import_module("recompute_group")

TINY = ["--device", "cpu", "--hidden", "32", "--tokens", "3", "--sub-layers", "5", "--group", "2"]
ROWS = {
    "none": {"peak_gb": 8.0, "step_ms": 30.0, "host_us": 500.0},
    "groups": {"peak_gb": 4.2, "step_ms": 32.1, "host_us": 520.0},
    "checkpoint": {"peak_gb": 3.0, "step_ms": 40.0, "host_us": 900.0},
}
REPLAYS = {"8192x7168": {"over_floor": 1.10}, "4096x2560": {"over_floor": 1.11}}


def test_a_tiny_run(capsys):
    assert script.main(TINY) == 0
    assert "5 sub-layers, groups of 2, 3 x 32, on cpu; bits of the gradients: the same" in (
        capsys.readouterr().out
    )


def test_gradients_that_differ_fail(capsys, monkeypatch):
    """As with a layer that a checkpoint would run with other random numbers."""
    run, seen = script.Stack.run, []

    def wrong(stack, streams, first, count):
        seen.append(first)
        return run(stack, streams, first, count) * (1 + len(seen))

    monkeypatch.setattr(script.Stack, "run", wrong)
    assert script.main(TINY) == 1
    assert "error: groups: the gradients must have the bits of none's" in capsys.readouterr().err


def test_bars():
    found = {name: (value, bar) for name, value, bar in script.bars(ROWS, REPLAYS)}
    assert found == {
        "peak memory, of that without": (pytest.approx(0.525), 0.50),
        "step, of that with checkpoints": (pytest.approx(0.8025), 0.85),
        "step, of that without": (pytest.approx(1.07), 1.08),
        "host time added, us a sub-layer": (pytest.approx(20.0), 25.0),
        "replay 8192x7168, of its floor": (1.10, 1.09),
        "replay 4096x2560, of its floor": (1.11, 1.12),
    }


def test_table(capsys):
    script.print_rows(ROWS, script.bars(ROWS, REPLAYS))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["groups", "4.20", "32.10", "520.00"]
    assert [line.split()[-1] for line in lines[4:]] == [
        "MISSED",
        "met",
        "met",
        "met",
        "MISSED",
        "met",
    ]


def test_bad_numbers():
    with pytest.raises(SystemExit):
        script.main(["--group", "0"])


def test_what_is_timed_on_the_host_alone_has_no_other_cells(capsys):
    script.print_rows({script.HOOKS: {"host_us": 540.0}, **ROWS}, [])
    assert capsys.readouterr().out.splitlines()[1].split() == ["hooks", "540.00"]


def test_hooks_that_do_nothing_see_the_layers(monkeypatch):
    seen = []
    monkeypatch.setattr(script, "itself", lambda saved: (seen.append(1), saved)[1])
    arguments = script.parse_arguments(TINY)
    stack = script.Stack(arguments)
    step, streams = script.make_step(stack, 3, arguments)
    found = []
    for variant in ("none", script.HOOKS):
        for grad in stack.gradients(streams):
            grad.zero_()
        step(variant)
        found.append([grad.clone() for grad in stack.gradients(streams)])
    assert all(map(torch.equal, *found))
    # A linear map saves its input and its weight; both are packed and unpacked.
    assert len(seen) == 4 * arguments.sub_layers
