"""scripts/train_text.py: a model trained with the modules and with the reference."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tile_mhc.nn import HyperConnection, connection

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

train_text = importlib.import_module("train_text")
text_batches = importlib.import_module("text_batches")

ARGUMENTS = ["--device", "cpu", "--steps", "4"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(train_text.SIZES, "cpu", (2, 32, 1))


@pytest.mark.parametrize("model", train_text.MODELS)
def test_agreement(capsys, model):
    threads = torch.get_num_threads()
    assert train_text.main([*ARGUMENTS, "--json", "--model", model]) == 0
    assert torch.get_num_threads() == threads
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    assert (report["device"], report["model"]) == ("cpu", model)
    losses = {name: run["losses"] for name, run in report["runs"].items()}
    assert list(losses) == list(train_text.RUNS)
    assert all(len(values) == 4 for values in losses.values())
    # The same weights, the same bytes: on a CPU the first forward is the reference's.
    assert losses["tile_mhc"][0] == losses["reference"][0]
    assert losses["tile_mhc"][0] != losses["float32 streams"][0]
    assert losses["tile_mhc"][1:] != losses["reference"][1:]
    assert report["distances"]["tile_mhc"] <= report["bound"]
    assert report["bound"] == train_text.SLACK * report["distances"]["reference"]
    assert 0 < report["largest_difference"] < 1e-3


def test_table(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Streams are read, written and mixed. ")
    assert train_text.main([*ARGUMENTS, "--text", str(text), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert f"256 bytes of {text}" in out
    assert "v4 on cpu, matmuls in bfloat16" in out
    assert "no GPU: tile_mhc is the reference here" in out
    assert out.endswith("agreement\n")
    rows = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [row for row in rows if row.isdigit()] == ["256", "0", "1", "2", "3"]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_seed():
    batches = text_batches.read_batches(b"seeds ", (2, 2, 32), torch.device("cpu"))
    first, again, other = (
        train_text.train("tile_mhc", batches, torch.float32, seed)["losses"] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("at", ["a boundary", "every post"])
def test_a_wrong_direction_is_found(capsys, monkeypatch, at):
    if at == "a boundary":
        right = connection.post_pre

        def transposed(layer_output, streams, post_mix, comb_mix, *gates, **options):
            comb_mix = comb_mix.mT.contiguous()
            return right(layer_output, streams, post_mix, comb_mix, *gates, **options)

        monkeypatch.setattr(connection, "post_pre", transposed)
    else:
        right = HyperConnection.post

        def transposed(self, layer_output, streams, post_mix, comb_mix):
            return right(self, layer_output, streams, post_mix, comb_mix.mT.contiguous())

        monkeypatch.setattr(HyperConnection, "post", transposed)
    # In a few small steps it does not show for every seed.
    monkeypatch.setitem(train_text.SIZES, "cpu", (4, 64, 12))
    assert train_text.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "NO AGREEMENT" in out
    assert "tile_mhc: the losses must be within" in out


GOOD = {
    "tile_mhc": [5.0, 3.015],
    "reference": [5.0, 3.01],
    "float32 streams": [5.0, 3.0],
    "plain residual": [6.0, 3.5],
}


def test_verdict():
    assert train_text.compare(GOOD)["failures"] == []
    verdict = train_text.compare(GOOD | {"tile_mhc": [5.0, 3.0 + 0.0101 * train_text.SLACK]})
    assert verdict["failures"] == [
        f"tile_mhc: the losses must be within {verdict['bound']:.1e} of those with float32 "
        f"streams; got {verdict['distances']['tile_mhc']:.1e}"
    ]
    verdict = train_text.compare(GOOD | {"tile_mhc": [5.0, float("nan")]})
    assert len(verdict["failures"]) == 2
    verdict = train_text.compare(GOOD | {"plain residual": [3.5, 3.5]})
    assert verdict["failures"] == ["plain residual: the loss must fall; got 3.5000 to 3.5000"]


def test_batches():
    batches = text_batches.read_batches(b"abc", (2, 2, 2), torch.device("cpu"))
    assert bytes(batches.flatten().tolist()) == b"abcabcab"
    assert batches.tolist()[0] == [[97, 98], [99, 97]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--device", "nonsense"], "--device must name a usable device; got nonsense"),
        (["--text", "/nowhere/at/all"], "--text must name a file; got /nowhere/at/all"),
        (["--text", "empty"], "--text must name a text that is not empty; got empty"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    ],
)
def test_bad_usage(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    with pytest.raises(SystemExit) as stop:
        train_text.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
