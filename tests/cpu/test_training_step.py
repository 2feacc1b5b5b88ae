"""scripts/training_step.py: a tiny model on the CPU, and the sums it makes of a GPU's profile."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tile_mhc.integrations import transformers as integration

modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
training_step = importlib.import_module("training_step")

TINY = {
    "--device": "cpu",
    "--hidden": "32",
    "--layers": "2",
    "--heads": "2",
    "--head-dim": "32",
    "--experts": "4",
    "--vocabulary": "32",
    "--batch": "1",
    "--length": "12",
    "--rounds": "2",
    "--steps": "1",
    "--backend": "eager",
}
ARGUMENTS = [part for pair in TINY.items() for part in pair]
CPU = torch.device("cpu")
ROWS = {
    "original": {"loss": 4.0, "gpu_ms": 30.0, "wall_ms": 40.0, "backends": ["transformers"]},
    "compiled": {"loss": 4.01, "gpu_ms": 20.0, "wall_ms": 24.0, "backends": ["transformers"]},
    "patched": {"loss": 3.99, "gpu_ms": 10.0, "wall_ms": 20.0, "backends": ["reference (on cpu)"]},
}


def test_a_tiny_run(capsys):
    classes = ("DeepseekV4Attention", "DeepseekV4SparseMoeBlock", "DeepseekV4DecoderLayer")
    before = [getattr(modeling, name).forward for name in classes]
    assert training_step.main(ARGUMENTS) == 0
    assert [getattr(modeling, name).forward for name in classes] == before
    assert not integration.is_patched()
    table, report = capsys.readouterr().out.rsplit("\n", 2)[:2]
    report = json.loads(report)
    assert report["failures"] == []
    assert (report["device"], report["settings"]["hidden"]) == ("cpu", 32)
    rows = report["variants"]
    assert list(rows) == list(training_step.VARIANTS)
    assert rows["patched"]["backends"] == ["reference (on cpu)"]
    # The same weights and tokens: the compiled graph does the original's arithmetic, ours its own.
    assert rows["compiled"]["loss"] == rows["original"]["loss"]
    assert rows["patched"]["loss"] == pytest.approx(rows["original"]["loss"], rel=1e-2)
    for row in rows.values():
        low, high = row["wall_ms_range"]
        assert 0 < low <= row["wall_ms"] <= high
    wall = {name: row["wall_ms"] for name, row in rows.items()}
    assert report["ratios"]["original"] == {"wall_ms": wall["original"] / wall["patched"]}
    assert "original / patched" in table


def test_the_compiled_variant_compiles_the_layers_but_not_what_is_in_them():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    arguments = training_step.parse_arguments(ARGUMENTS)
    step = training_step.make_step(training_step.build_model(arguments), torch.randint(32, (1, 12)))
    with training_step.make_compiled(backend)():
        step()
        first = len(graphs)
        step()
    assert len(graphs) == first  # a second step compiles nothing
    code = "\n".join(graph.code for graph in graphs)
    assert "softmax" in code  # Sinkhorn's start
    assert "matmul" in code  # the streams mixed
    assert "embedding" not in code
    assert "silu" not in code  # an expert's


def test_a_step_leaves_the_weights_as_they_are():
    arguments = training_step.parse_arguments(ARGUMENTS)
    model = training_step.build_model(arguments)
    before = copy.deepcopy(model.state_dict())
    step = training_step.make_step(model, torch.randint(32, (1, 12)))
    assert step() == step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def event(start, length, category="kernel"):
    return {"cat": category, "ts": start, "dur": length}


@pytest.mark.parametrize(
    ("events", "busy"),
    [
        ([], 0.0),
        ([event(0, 1000), event(5000, 500)], 1.5),
        ([event(5000, 500), event(0, 1000)], 1.5),
        # The second starts early and waits for the first: counted once.
        ([event(0, 1000), event(800, 700)], 1.5),
        ([event(0, 1000), event(100, 200), event(900, 600, "gpu_memcpy")], 1.5),
        ([event(0, 1500, "gpu_memset"), event(0, 9000, "gpu_user_annotation")], 1.5),
        ([{"ph": "M", "name": "a process"}, event(0, 1500)], 1.5),
    ],
)
def test_busy_time_is_the_union(events, busy):
    assert training_step.busy_ms(events) == busy


def test_ratios_are_of_the_others_to_the_patched():
    assert training_step.ratios(ROWS) == {
        "original": {"gpu_ms": 3.0, "wall_ms": 2.0},
        "compiled": {"gpu_ms": 2.0, "wall_ms": 1.2},
    }


def test_what_is_checked():
    assert training_step.check(ROWS, CPU) == []
    (failure,) = training_step.check(ROWS, torch.device("cuda"))
    assert failure.startswith("patched: the backend must be TileLang; got ['reference")
    for name in ("compiled", "patched"):
        for loss in (4.1, float("nan")):
            rows = {**ROWS, name: {**ROWS[name], "loss": loss}}
            (failure,) = training_step.check(rows, CPU)
            assert failure.startswith(f"{name}: the loss must be near 4.00000; got")


def test_bad_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        training_step.main([*ARGUMENTS, "--rounds", "0"])
    assert stop.value.code == 2
    assert "--rounds must be at least 1; got 0" in capsys.readouterr().err
