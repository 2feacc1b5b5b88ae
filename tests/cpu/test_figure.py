"""The figure's points: of one run, one width, each token count once, in order."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

click = pytest.importorskip("click")

from tile_mhc.bench.records import Record, read

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
figure = importlib.import_module("figure")

LINE = Record(
    date="2026-11-24",
    gpu="NVIDIA H200",
    driver="580",
    torch="2.11.0",
    tilelang="0.1.15",
    commit="new",
    empty_us=2.0,
    op="post.fwd",
    T=128,
    H=7168,
    n=4,
    us=9.0,
    floor_us=4.0,
    peer_us=10.0,
)


def line(**changes):
    return dataclasses.replace(LINE, **changes)


LINES = [
    line(commit="old", T=16, us=99.0),
    line(commit="old", T=64, us=99.0),
    line(gpu="NVIDIA H100 80GB HBM3", T=32, us=99.0),
    line(T=32, flush="read", us=99.0),
    line(T=4096, us=80.0, floor_us=70.0, peer_us=None),
    line(us=99.0),
    line(),
    line(T=16, us=6.0, floor_us=0.5, peer_us=8.0),
    line(T=256, H=4096, us=99.0),
    line(T=256, n=2, us=99.0),
    line(T=256, op="post.bwd", us=99.0),
    line(T=512, op="post.bwd", us=99.0),
]


def test_the_last_run_is_drawn():
    run, series = figure.select(LINES, ["post.fwd"], 7168, 4, None)
    assert (run.commit, run.gpu) == ("new", "NVIDIA H200")
    assert series == {
        "post.fwd": figure.Series(
            [16, 128, 4096], [0.5, 4.0, 70.0], [6.0, 9.0, 80.0], [8.0, 10.0, None]
        )
    }


def test_an_older_run_by_its_commit():
    run, series = figure.select(LINES, ["post.fwd"], 7168, 4, "old")
    assert run.commit == "old"
    assert series["post.fwd"].tokens == [16, 64]


@pytest.mark.parametrize(
    ("ops", "hidden", "commit", "pattern"),
    [
        (["post.fwd", "expand.fwd"], 7168, None, r"expand\.fwd needs two token counts .* \[\]"),
        (["post.fwd"], 4096, None, r"H = 4096, n = 4 in the run of commit new .* \[256\]"),
        (["post.fwd"], 7168, "other", "no record of commit other"),
    ],
)
def test_too_few_points(ops, hidden, commit, pattern):
    with pytest.raises(click.ClickException, match=pattern):
        figure.select(LINES, ops, hidden, 4, commit)


def test_the_committed_records_can_be_drawn(tmp_path):
    lines = list(read(SCRIPTS / "records" / "bench.jsonl"))
    run, series = figure.select(lines, figure.OPS, 7168, 4, "a340cd2")
    assert list(series) == list(figure.OPS)
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        figure.draw(run, series, 7168, tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert all(op in svg for op in figure.OPS)
    assert "TileKernels" in svg
    assert svg == (tmp_path / "b.svg").read_text()
