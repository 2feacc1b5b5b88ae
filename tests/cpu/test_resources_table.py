"""The committed table of registers, shared memory and spills: what passes it and what does not."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest

from tile_mhc import specs
from tile_mhc.kernels._arch import ARCHITECTURES
from tile_mhc.kernels._shapes import pre_cluster

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
resources = importlib.import_module("resources")

ROW = {"registers": 100, "shared_memory": 1000, "spill_stores": 0, "spill_loads": 0}
TITLE = "expand_fwd(4, 64) sm_90a"


def problems(row, table=None, same_nvcc=True):
    return resources.problems(
        {TITLE: ROW | row}, {TITLE: ROW} if table is None else table, same_nvcc
    )


def test_what_fails():
    assert problems({}) == []
    assert problems({"registers": 110, "shared_memory": 900}) == []
    assert problems({"registers": 111}) == [f"{TITLE}: registers from 100 to 111"]
    assert problems({"shared_memory": 1101}) == [f"{TITLE}: shared memory from 1000 to 1101"]
    assert problems({"spill_loads": 4}) == [f"{TITLE}: spills, 0 + 4 bytes"]
    assert problems({"spill_loads": None}) == [f"{TITLE}: spills, 0 + None bytes"]
    assert problems({}, table={}) == [f"{TITLE}: is not in the table"]
    gone = {TITLE: ROW, "gone(4) sm_90a": ROW}
    assert problems({}, table=gone) == ["gone(4) sm_90a: is in the table, and not compiled"]
    assert problems({}, table={TITLE: ROW, "gone(4) sm_100a": ROW}) == []  # nobody compiled those


def test_only_hopper_may_not_spill_what_the_table_has():
    spilling = ROW | {"spill_stores": 24, "spill_loads": 16}
    for arch, fails in (("sm_90a", True), ("sm_100a", False)):
        title = f"contract_cluster_fwd(4, 4096) {arch}"
        found = resources.problems({title: spilling}, {title: spilling}, True)
        assert found == ([f"{title}: spills, 24 + 16 bytes"] if fails else [])
    more = spilling | {"spill_loads": 20}
    assert resources.problems({title: more}, {title: spilling}, True) == [
        f"{title}: spills, 24 + 20 bytes"
    ]


def test_no_more_shared_memory_than_a_cta_has():
    for arch, most in (("sm_80", 163), ("sm_89", 99), ("sm_90a", 227)):
        title = f"expand_fwd(4, 64) {arch}"
        for size, fails in ((most << 10, False), ((most << 10) + 1, True)):
            row = ROW | {"shared_memory": size}
            found = resources.problems({title: row}, {title: row}, True)
            text = f"{title}: {size} bytes of shared memory, of {most << 10}"
            assert found == ([text] if fails else [])


def test_an_architecture_is_compared_with_its_own_rows():
    others = {"expand_fwd(4, 64) sm_80": ROW, "post_fwd(4, 64) sm_120a": ROW}
    assert problems({}, table={TITLE: ROW} | others) == []


def test_an_architecture_without_rows_is_only_compiled():
    title = "expand_fwd(4, 64) sm_103a"
    spilling = {title: ROW | {"spill_stores": 8}}
    assert resources.problems(spilling, {TITLE: ROW}, True) == []
    assert len(resources.problems(spilling, {TITLE: ROW, title: ROW}, True)) == 1
    large = {title: ROW | {"shared_memory": 1 << 20}}
    assert len(resources.problems(large, {TITLE: ROW}, True)) == 1


def test_with_another_nvcc_only_spills_fail(capsys):
    assert problems({"registers": 200}, same_nvcc=False) == []
    assert f"with another nvcc: {TITLE}: registers from 100 to 200" in capsys.readouterr().out
    assert problems({"spill_stores": 8}, same_nvcc=False) == [f"{TITLE}: spills, 8 + 0 bytes"]


def test_a_table_with_spills_on_hopper_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resources, "TABLE", tmp_path / "resources.json")
    monkeypatch.setattr(resources, "nvcc_version", lambda: "13.0")
    compiled = tmp_path / "compiled.json"
    monkeypatch.setattr(sys, "argv", ["resources.py", str(compiled), "--renew"])
    for arch, status in (("sm_90a", 1), ("sm_100a", 0), ("sm_80", 0)):
        kernel = {"name": "expand_fwd", "args": [4, 64], "arch": arch, "error": None}
        kernel |= ROW | {"spill_stores": 8}
        compiled.write_text(json.dumps({"kernels": [kernel]}))
        assert resources.main() == status
        assert resources.TABLE.exists() is not bool(status)
    written = json.loads(resources.TABLE.read_text())["kernels"]
    assert {title.rpartition(" ")[2] for title in written} == {"sm_100a", "sm_80"}
    assert capsys.readouterr().err == f"{TITLE}: spills, 8 + 0 bytes\n"


def test_a_failed_kernel_is_named():
    kernel = {"name": "expand_fwd", "args": [4, 64], "arch": "sm_90a", "error": "no nvcc"}
    with pytest.raises(SystemExit, match="expand_fwd: no nvcc"):
        resources.rows_of({"kernels": [kernel]})


def test_the_table_has_every_kernel():
    table = json.loads(resources.TABLE.read_text())["kernels"]
    # Of sm_103a are sm_100a's.
    archs = [arch for arch in specs.ARCHS if arch != "sm_103a"]
    assert set(table) == set().union(*map(resources.titles, archs))


def test_shares_of_registers_are_those_of_the_launch():
    """A warp that asked for more than there are would wait for ever; see PreCluster.registers."""
    table = json.loads(resources.TABLE.read_text())["kernels"]
    shared_out = 0
    for arch in ("sm_90a", "sm_100a"):
        for of in itertools.product((False, True), repeat=2):
            hidden_size = resources.SIZES.hidden
            cut = pre_cluster(4, hidden_size, *of, ARCHITECTURES[arch])
            name = f"pre_cluster_fwd({hidden_size}, {of[0]}, {of[1]}"
            rows = [row for title, row in table.items() if title.startswith(name) and arch in title]
            assert rows
            wanted = sum(cut.registers) + cut.registers[0] * (cut.groups - 2)
            for row in rows:
                assert wanted <= row["registers"] * cut.groups
            shared_out += cut.registers[0] != cut.registers[1]
    assert shared_out


def test_of_a_part_of_the_kernels(tmp_path, monkeypatch, capsys):
    """Other rows stay, of kernels that there still are; nothing is missed."""
    monkeypatch.setattr(resources, "TABLE", tmp_path / "resources.json")
    monkeypatch.setattr(resources, "nvcc_version", lambda: "13.0")
    other = "post_fwd(4, 4096) sm_90a"
    assert other in resources.titles("sm_90a")
    gone, of_another = "gone(4) sm_90a", "gone(4) sm_80"
    resources.write_table({other: ROW, gone: ROW, of_another: ROW, TITLE: ROW}, "13.0")
    kernel = {"name": "expand_fwd", "args": [4, 4096], "arch": "sm_90a", "error": None} | ROW
    compiled = tmp_path / "compiled.json"
    compiled.write_text(json.dumps({"kernels": [kernel | {"registers": 50}]}))
    monkeypatch.setattr(sys, "argv", ["resources.py", str(compiled), "--renew", "--some"])
    assert resources.main() == 0
    written = json.loads(resources.TABLE.read_text())["kernels"]
    assert written == {
        "expand_fwd(4, 4096) sm_90a": ROW | {"registers": 50},
        of_another: ROW,
        other: ROW,
    }
    monkeypatch.setattr(sys, "argv", ["resources.py", str(compiled), "--some"])
    assert resources.main() == 0
    monkeypatch.setattr(sys, "argv", ["resources.py", str(compiled)])
    assert resources.main() == 1
    assert f"{other}: is in the table, and not compiled" in capsys.readouterr().err
