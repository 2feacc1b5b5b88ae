"""scripts/releases.py and scripts/distribution.py: the matrix, what they say, what they pack."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
releases = importlib.import_module("releases")
distribution = importlib.import_module("distribution")

PAIR = ("3.12", "2.14")


def written(name, text):
    """The words of a list in a workflow."""
    return tuple(re.findall(r'"([\d.]+)"', re.search(rf"^ *{name}: \[(.*)\]$", text, re.M)[1]))


def test_the_workflow_has_the_matrix():
    text = (ROOT / ".github" / "workflows" / "scheduled.yml").read_text()
    assert written("python", text) == releases.PYTHONS
    assert written("torch", text) == releases.TORCHES
    excluded = re.findall(r'- \{ python: "([\d.]+)", torch: "([\d.]+)" \}', text)
    assert set(excluded) == releases.ABSENT
    assert len(releases.matrix()) == 29


def test_the_oldest_are_those_of_the_project():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={releases.PYTHONS[0]}"' in project
    assert f'"torch>={releases.TORCHES[0]}"' in project
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert set(named) <= set(releases.PYTHONS)


def test_the_tests_exist():
    assert all((ROOT / name).is_file() for name in releases.TESTS)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    monkeypatch.setattr(releases, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    # Which venv makes.
    (tmp_path / "build" / "releases" / "python3.12-torch2.14").mkdir(parents=True)
    return tmp_path


def outcome_of(monkeypatch, commands, statuses, printed=""):
    """Of a pair whose commands end with these statuses; pytest, or pip, prints a text."""
    left = list(statuses)

    def run(command, log, env, cwd=None):
        assert not {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"} & env.keys()
        commands.append(command)
        status = left.pop(0)
        if status or not left:
            log.write_text(log.read_text() + printed)
        return status

    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(releases, "_run", run)
    monkeypatch.setattr(releases, "find_python", lambda _: "/usr/bin/python3.12")
    monkeypatch.setattr(releases, "versions", lambda _: "torch 2.14.1")
    return releases.try_pair(*PAIR, ["tests/cpu/test_nn.py"], discard=False)


def test_a_pair_that_passes(monkeypatch, folders):
    commands = []
    printed = "....\n3 warnings, or 1 failed? no\n1960 passed, 6 skipped in 60.19s (0:01:00)\n"
    outcome = outcome_of(monkeypatch, commands, [0, 0, 0, 0], printed)
    assert outcome == releases.Outcome(*PAIR, "passed", "1960 passed, 6 skipped", "torch 2.14.1")
    _, torch, project, pytest_command = commands
    assert torch[-1] == "torch==2.14.*"
    # The same release again, or pip would take the newest.
    assert project[-3:] == ["torch==2.14.*", "-e", f"{folders}[test]"]
    assert pytest_command[-1] == str(folders / "tests" / "cpu" / "test_nn.py")


def test_an_environment_is_used_again(monkeypatch, folders):
    commands = []
    outcome_of(monkeypatch, commands, [0, 0, 0, 0], "1 passed in 1s\n")
    again = []
    assert outcome_of(monkeypatch, again, [0], "1 passed in 1s\n").status == "passed"
    assert len(again) == 1
    (folders / "pyproject.toml").write_text("other needs")
    outcome_of(monkeypatch, again, [0, 0, 0, 0], "1 passed in 1s\n")
    assert len(again) == 5


def test_a_pair_that_fails(monkeypatch, folders):
    printed = "1 failed, 2 passed, 1 error in 3.00s\n"
    outcome = outcome_of(monkeypatch, [], [0, 0, 0, 1], printed)
    assert (outcome.status, outcome.detail) == ("failed", "1 failed, 2 passed, 1 error")


def test_tests_that_do_not_start(monkeypatch, folders):
    outcome = outcome_of(monkeypatch, [], [0, 0, 0, 4], "no module named pytest\n")
    assert (outcome.status, outcome.detail) == ("failed", "exit status 4")


@pytest.mark.parametrize(
    ("statuses", "printed", "detail"),
    [
        ([0, 1], "ERROR: No matching distribution found for torch==2.14.*\n",
         "No matching distribution found for torch==2.14.*"),
        ([0, 0, 2], "killed\n", "exit status 2"),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_be_installed_has_not_passed(
    monkeypatch, folders, statuses, printed, detail
):
    outcome = outcome_of(monkeypatch, [], statuses, printed)
    assert (outcome.status, outcome.detail) == ("not installed", detail)


def test_a_python_that_is_not_there(monkeypatch, folders, capsys):
    monkeypatch.setattr(releases, "find_python", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["releases.py", "3.14:2.15"])
    assert releases.main() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    expected = ["3.14", "2.15", "not installed", "no Python 3.14 was found"]
    assert re.split(r"  +", last) == expected


def test_status_and_table(monkeypatch, folders, capsys):
    def try_pair(python, torch, tests, discard):
        assert tests == ["tests/cpu"]
        assert discard
        status = "failed" if torch == "2.11" else "passed"
        return releases.Outcome(python, torch, status, "7 passed", "torch x")

    monkeypatch.setattr(releases, "try_pair", try_pair)
    monkeypatch.setattr(sys, "argv", ["releases.py", "--all", "--discard", "3.10:2.10"])
    assert releases.main() == 0
    monkeypatch.setattr(sys, "argv", ["releases.py", "--all", "--discard"])
    assert releases.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-29].split() == ["3.10", "2.10", "passed", "7", "passed", "torch", "x"]


def test_a_pair_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["releases.py", "3.12"])
    with pytest.raises(SystemExit):
        releases.main()
    assert "a pair must be like 3.12:2.14; got 3.12" in capsys.readouterr().err


def test_find_python(monkeypatch, tmp_path):
    """On PATH first, but not a shim that runs nothing; then the newest build of pyenv's."""
    found = {"/path/python3.12": "3 12", str(tmp_path / "versions/3.13.10/bin/python"): "3 13"}
    monkeypatch.setattr(releases, "output", lambda program, *_: found.get(program, ""))
    monkeypatch.setattr(releases.shutil, "which", lambda name: f"/path/{name}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    for build in ("3.13.9", "3.13.10"):
        (tmp_path / "versions" / build).mkdir(parents=True)
    assert releases.find_python("3.12") == "/path/python3.12"
    assert releases.find_python("3.13") == str(tmp_path / "versions/3.13.10/bin/python")
    assert releases.find_python("3.14") is None


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    distribution.copy_tracked(folder / "source")
    archive = distribution.build("sdist", folder / "source", folder / "dist")
    return distribution.unpack(archive, folder / "unpacked")


def test_the_sdist_has_every_file(sdist, tmp_path):
    """But for what is git's own: the tests read nearly all else."""
    distribution.copy_tracked(tmp_path / "source")
    expected = {
        str(path.relative_to(tmp_path / "source"))
        for path in (tmp_path / "source").rglob("*")
        if path.is_file()
    }
    packed = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert expected - packed <= {".gitignore"}
    made = {name for name in packed - expected if ".egg-info/" not in name}
    assert made <= {"PKG-INFO", "setup.cfg"}


def test_a_wheel_of_the_sdist_is_that_of_the_checkout(sdist, tmp_path):
    distribution.copy_tracked(tmp_path / "source")
    listing = [sys.executable, "-m", "zipfile", "-l"]
    names = []
    for folder in (tmp_path / "source", sdist):
        wheel = distribution.build("wheel", folder, tmp_path / folder.name)
        run = subprocess.run([*listing, str(wheel)], capture_output=True, text=True, check=True)
        names.append({line.split()[0] for line in run.stdout.splitlines()})
    assert names[0] == names[1]
    assert "tile_mhc/kernels/post.py" in names[0]


def checked(monkeypatch, tmp_path, problem, where):
    monkeypatch.setattr(releases, "run_all", lambda steps, log: problem)
    monkeypatch.setattr(releases, "output", lambda *_, cwd: where)
    monkeypatch.setattr(releases, "test", lambda folder, root, log, tests: (True, "3 passed"))
    archive = SimpleNamespace(as_uri=lambda: "file:///x.whl")
    return distribution.check(archive, tmp_path, tmp_path / "venv", [])


def test_what_is_tested_is_what_was_installed(monkeypatch, tmp_path):
    inside = f"{tmp_path}/venv/lib/tile_mhc/__init__.py"
    assert checked(monkeypatch, tmp_path, None, f"{inside}\n{inside}") == (True, "3 passed")
    passed, detail = checked(monkeypatch, tmp_path, None, f"{inside}\n/elsewhere/kernels.py")
    assert not passed
    assert detail.startswith("imported from /elsewhere/kernels.py, not from ")
    passed, detail = checked(monkeypatch, tmp_path, None, "")
    assert detail.startswith("imported from nowhere, not from ")
    found = checked(monkeypatch, tmp_path, "no torch", inside)
    assert found == (False, "not installed: no torch")
