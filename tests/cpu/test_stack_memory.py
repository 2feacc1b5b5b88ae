"""scripts/stack_memory.py without a GPU: that it compares two ways to the same result."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

stack_memory = importlib.import_module("stack_memory")


@pytest.mark.parametrize("model", stack_memory.MODELS)
def test_both_ways_have_the_same_result(model):
    modules = stack_memory.build(model, 2, 64, "cpu")
    assert len(modules["layers"]) == 3
    streams = torch.randn(5, stack_memory.STREAMS, 64).bfloat16()
    found = [stack_memory.run(modules, way, streams) for way in stack_memory.WAYS]
    assert torch.equal(*found)
    assert found[0].shape == (5, 64)


@pytest.mark.parametrize("higher", [False, True])
def test_a_higher_peak_fails(monkeypatch, capsys, higher):
    peaks = {"boundaries": 2 + higher, "separate": 2}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stack_memory, "measure", lambda *_: peaks)
    assert stack_memory.main(["--tokens", "5", "--hidden", "64"]) == higher
    assert "16 boundaries, 5 tokens of width 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--tokens", "0"], "--tokens must be at least 1; got 0"), ([], "a CUDA device is needed")],
)
def test_bad_usage(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        stack_memory.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
