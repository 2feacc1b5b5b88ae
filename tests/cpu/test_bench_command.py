"""`tile-mhc bench` without a GPU: usage, exit codes, records, and the verdict on cliffs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("click")

from tile_mhc.bench import cliffs, compiling, measuring, peer, records
from tile_mhc.bench.measuring import Result, Shape, Side
from tile_mhc.bench.timing import Times
from tile_mhc.cli import _bench, main

RECORDS = Path(__file__).resolve().parents[2] / "scripts" / "records" / "bench.jsonl"


def times(us):
    return Times(us, us - 0.1, us + 0.3)


def result(us, shape=(128, 4096, 4), floor=10.0, peer_us=None, op="post.fwd"):
    """At 4000 GB/s, which are 4e6 bytes a microsecond."""
    ours = Side(problem="WrongResultError: output 0") if us is None else Side(times(us), times(30))
    theirs = None if peer_us is None else Side(times(peer_us), times(50))
    return Result(op, Shape(*shape), int(4e6 * floor), floor, ours, theirs)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["bench", *arguments])
        return code, *capsys.readouterr()

    return call


SETTING = records.Setting(
    date="2026-11-24",
    gpu="NVIDIA H200",
    driver="580",
    torch="2.11.0",
    tilelang="0.1.15",
    commit="abc",
    copy_gbs=4000.0,
    empty_us=2.0,
    flush="copy",
    events="inside",
)


@pytest.fixture
def measured(monkeypatch):
    """A GPU that measures what the test says."""
    given = []

    class Clock:
        def __init__(self, device, events, flush_by):
            self.flush_by = flush_by

        def copy_bandwidth(self):
            return 4e6

        def empty_kernel(self):
            return Times(2.0, 1.99, 2.03)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_bench, "Clock", Clock)
    monkeypatch.setattr(compiling, "kernels", lambda *_: [])
    monkeypatch.setattr(compiling, "compile_all", lambda *_: [])
    monkeypatch.setattr(measuring, "measure_all", lambda *_: iter(given))
    monkeypatch.setattr(
        records, "make_setting", lambda clock, *_: replace(SETTING, flush=clock.flush_by)
    )
    fake = object.__new__(peer.TileKernels)
    fake.calls, fake.release = {}, "1.0.0"
    monkeypatch.setattr(peer, "find", lambda: fake)
    return given


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["projection", "nonsense"], r"must be among expand\.fwd, .*got 'nonsense'"),
        (["--shapes", "128"], r"--shapes.*must be TxH,TxH,\.\.\.; got '128'"),
        (["--shapes", "0x64"], r"--shapes.*an integer of at least 1; got '0'"),
        (["--shapes", "8x16385"], r"--shapes.*16384; got '16385'"),
        (["--tokens", "1,-2"], r"--tokens.*an integer of at least 1; got '-2'"),
        (["--hidden", "16385"], r"--hidden.*16384"),
        (["--streams", "3"], r"--streams.*one of 2, 4, 8; got '3'"),
        (["--vs", "triton"], r"--vs.*'triton' is not 'tile_kernels'"),
        (["--events", "between"], r"--events"),
        (["--flush", "overwrite"], r"--flush.*'overwrite' is not one of 'copy', 'read', 'none'"),
        (["--max-ratio", "1.02"], r"--max-ratio needs --vs"),
        (["--max-ratio", "0", "--vs", "tile_kernels"], r"--max-ratio.*x>0"),
        (["--jobs", "0"], r"--jobs.*x>=1"),
        (["--shapes", "8x64", "--cliffs"], "exclude each other"),
        (["--tokens", "8", "--shapes", "8x64"], "exclude each other"),
    ],
)
def test_bad_usage(run, arguments, pattern):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(pattern, err), err


def test_without_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "a CUDA device is needed; torch sees none" in err


@pytest.mark.usefixtures("measured")
def test_a_gpu_without_kernels(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "the GPU must be one of sm_80, " in err
    assert "to have kernels; got sm_75" in err


@pytest.mark.usefixtures("measured")
def test_a_peer_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr(peer, "find", lambda: None)
    code, _, err = run("--vs", "tile_kernels")
    assert code == 2
    assert "--vs tile_kernels needs it installed" in err

    def find():
        raise ImportError("no such kernel")

    monkeypatch.setattr(peer, "find", find)
    code, _, err = run("--vs", "tile_kernels")
    assert code == 2
    assert "does not import: ImportError: no such kernel" in err


@pytest.mark.usefixtures("measured")
def test_a_record_that_cannot_be_written(run, tmp_path):
    code, _, err = run("--record", str(tmp_path / "absent" / "bench.jsonl"))
    assert code == 2
    assert re.search(r"--record must be writable; got .*absent/bench\.jsonl", err)


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ((None, None, None, False), _bench.DEFAULT_SHAPES),
        ((None, None, ((3, 64),), False), [(3, 64)]),
        (((1, 2), (64, 128), None, False), [(1, 64), (2, 64), (1, 128), (2, 128)]),
        (((5,), None, None, False), [(5, 2560), (5, 4096), (5, 7168)]),
        ((None, (64,), None, False), [(8192, 64), (4096, 64), (128, 64), (16, 64)]),
    ],
)
def test_pairs(options, pairs):
    assert list(_bench.choose_pairs(*options)) == list(pairs)


def test_every_shape_of_the_cliffs_has_a_neighbour():
    pairs = _bench.choose_pairs(None, None, None, True)
    shapes = [Shape(t, h, 4) for t, h in pairs]
    assert all(list(cliffs.neighbours(shape, shapes)) for shape in shapes)
    assert len(set(shapes)) == len(cliffs.TOKENS) * len(cliffs.HIDDEN)


def test_table(run, measured):
    measured += [result(12.5, peer_us=25.0), result(None, op="post.bwd")]
    code, out, err = run("post", "--shapes", "128x4096", "--vs", "tile_kernels")
    assert code == 1
    assert "copy bandwidth 4000 GB/s" in out
    assert "empty kernel 2.00 us 1.0%, by the same clock: events inside the graph" in out
    assert out.index("copy bandwidth") < out.index("empty kernel") < out.index("T = 128")
    rows = {line.split()[1]: line for line in out.splitlines() if "post." in line}
    cells = re.findall(r"[\d.]+%?|-", rows["post.fwd"].partition("fwd")[2])
    assert cells == ["12.5", "1.6%", "3200", "1.25", "30.0", "25.0", "0.8%", "0.50", "50.0"]
    assert re.findall(r"[\d.]+|-", rows["post.bwd"].partition("bwd")[2]) == ["-"] * 9
    assert "  ours: WrongResultError: output 0" in err
    assert "error: not timed: post.bwd at 128x4096x4" in err


@pytest.mark.parametrize(
    ("arguments", "flush"),
    [([], "copy"), (["--flush", "read"], "read"), (["--flush", "none"], "none")],
)
def test_what_makes_l2_cold_is_said_and_recorded(arguments, flush, run, measured, tmp_path):
    measured += [result(12.5)]
    file = tmp_path / "bench.jsonl"
    code, out, _ = run("post", "--shapes", "128x4096", "--record", str(file), *arguments)
    assert code == 0
    assert f"L2 {flush} before" in out
    assert [record.flush for record in records.read(file)] == [flush]


def test_json(run, measured):
    measured += [result(12.5, peer_us=25.0)]
    code, out, _ = run("post", "--shapes", "128x4096", "--vs", "tile_kernels", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["copy_gbs"], report["empty_us"], report["events"]) == (4000.0, 2.0, "inside")
    (row,) = report["results"]
    assert (row["op"], row["shape"]) == ("post.fwd", {"T": 128, "H": 4096, "n": 4})
    assert row["ours"]["device"] == {"median": 12.5, "lower": 12.4, "upper": 12.8}
    assert (row["ratio"], row["over_floor"], row["gbs"]) == (0.5, 1.25, 3200.0)
    assert report["cliffs"] == []


@pytest.mark.parametrize(("limit", "code"), [("0.6", 0), ("0.4", 1)])
def test_max_ratio(run, measured, limit, code):
    measured += [result(12.5, peer_us=25.0), result(99.0)]
    got, _, err = run("--vs", "tile_kernels", "--max-ratio", limit)
    assert got == code
    assert ("above --max-ratio 0.4: post.fwd at 128x4096x4" in err) == bool(code)
    assert measured[1].ratio is None


def test_cliffs_decide_only_where_they_are_asked_for(run, measured):
    measured += [result(20.0, (127, 64, 4)), result(40.0, (128, 64, 4))]
    code, out, err = run("--cliffs")
    assert code == 1
    assert "cliffs: 1 in 2 comparisons" in out
    assert "post.fwd at 128x64x4: 2.00 x 127x64x4" in out
    assert "cliffs: 1, the worst: post.fwd at 128x64x4" in err
    assert run("--shapes", "127x64,128x64")[0] == 0
    del measured[1:]
    code, out, _ = run("--cliffs")
    assert code == 0
    assert "cliffs: 0 in 0 comparisons" in out


def test_records_are_appended_and_read_again(run, measured, tmp_path):
    file = tmp_path / "bench.jsonl"
    measured += [result(12.5, peer_us=25.0), result(None), result(7.0, (16, 4096, 2))]
    for _ in range(2):
        run("--vs", "tile_kernels", "--record", str(file))
    first, second, *again = records.read(file)
    assert again == [first, second]
    assert (first.us, first.quartiles, first.peer_us, first.floor_us) == (
        12.5,
        (12.4, 12.8),
        25.0,
        10.0,
    )
    assert (first.host_us, first.peer_host_us, first.commit) == (30.0, 50.0, "abc")
    assert (second.T, second.H, second.n, second.peer_us) == (16, 4096, 2, None)
    assert vars(first).items() >= vars(SETTING).items()


def test_committed_records_are_read():
    """Those of scripts/bench.py have fewer fields, and were taken by another method."""
    lines = RECORDS.read_text().splitlines()
    read = list(records.read(RECORDS))
    assert len(read) == len(lines)
    assert (read[0].op, read[0].us, read[0].flush, read[0].events) == (
        "expand.fwd",
        148.3,
        "overwrite",
        "around",
    )
    for line, record in zip(lines, read, strict=True):
        values = json.loads(line)
        assert values.items() <= json.loads(json.dumps(vars(record))).items()


@pytest.mark.parametrize("line", ["{", "[1]", '{"op": "post.fwd"}', '{"nonsense": 1}'])
def test_a_line_that_is_no_record(line, tmp_path):
    file = tmp_path / "bench.jsonl"
    file.write_text(f"{RECORDS.read_text().splitlines()[0]}\n{line}\n")
    with pytest.raises(ValueError, match=r"bench\.jsonl:2: no record of a benchmark"):
        list(records.read(file))


def test_the_commit_is_of_the_checkout_that_has_this_file(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    assert records.find_commit() == "unknown"


def test_neighbours_are_next_on_one_axis_and_near():
    counts, widths = (1, 2, 16, 31, 32, 33, 65), (1280, 2560, 4096)
    shapes = [Shape(t, h, n) for t in counts for h in widths for n in (2, 4)]
    found = set(cliffs.neighbours(Shape(32, 2560, 4), shapes))
    assert found == {
        Shape(31, 2560, 4),
        Shape(33, 2560, 4),
        Shape(32, 1280, 4),
        Shape(32, 4096, 4),
    }
    # 65 is more than twice 32, and 16 more than twice 2.
    assert set(cliffs.neighbours(Shape(65, 1280, 2), shapes)) == {
        Shape(33, 1280, 2),
        Shape(65, 2560, 2),
    }
    assert list(cliffs.neighbours(Shape(16, 64, 4), [Shape(2, 64, 4), Shape(16, 64, 2)])) == []


def test_a_cliff_is_told_from_the_cost_of_a_launch():
    # Launch-bound: 8 us whatever the tokens. Then a tile more costs twice as much.
    steady = [result(8.0, (t, 64, 4), floor=t * 0.01) for t in (1, 2, 4, 8, 16, 32)]
    compared = cliffs.compare(steady, empty_us=4.0)
    assert len(compared) == 6
    assert cliffs.find_cliffs(compared) == []
    edge = [
        result(50.0, (4096, 64, 4), floor=40.0),
        result(99.0, (4097, 64, 4), floor=40.01),
        result(80.0, (4097, 64, 4), floor=40.01, op="post.bwd"),
        result(None, (4096, 64, 4), op="post.bwd"),
    ]
    (cliff,) = cliffs.find_cliffs(cliffs.compare(edge, empty_us=4.0))
    assert str(cliff) == "post.fwd at 4097x64x4: 1.98 x 4096x64x4"
