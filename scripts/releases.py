"""Run CPU tests with releases of Python and torch, each pair in a virtual environment of its own.

    python scripts/releases.py                       the whole matrix
    python scripts/releases.py 3.10:2.10 3.13:2.15   these pairs
    python scripts/releases.py --all 3.12:2.14       all of tests/cpu, not only TESTS

A pair is a Python, found on PATH or among pyenv's, and a release of torch, of which pip takes the
newest patch it can find. PyPI's builds for Linux on x86-64 are CUDA's, some 5 GB each once
installed; without a GPU point pip's own settings at another index. The environments stay in
build/releases for the next run, unless --discard removes each after its tests. It ends with a
table, and with status 0 only if every pair was installed and passed. PYTEST_ARGS as in check.sh.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
# torch has no wheels of them.
ABSENT = {("3.10", "2.15")}
# What uses the most of torch, its private parts too. Kernels are TileLang's, which is one release.
TESTS = tuple(
    f"tests/cpu/test_{name}.py"
    for name in (
        "accumulator",
        "backward",
        "compat_interface",
        "compat_semantics",
        "compat_serving",
        "descriptors",
        "errors",
        "main_grad",
        "nn",
        "ops",
        "packaging",
        "recompute_group",
        "reference",
        "replay",
        "transforms",
        "warm_up",
    )
)
SHOWN = ("torch", "tilelang", "apache-tvm-ffi", "numpy")
# pytest's last line.
COUNTS = re.compile(r"\d+ (?:passed|failed|skipped|error|deselected|xfailed|xpassed)s?\b")


@dataclass(frozen=True)
class Outcome:
    """What came of one pair.

    Attributes:
        python: its release of Python.
        torch: its release of torch.
        status: "passed", "failed" or "not installed".
        detail: what pytest counted, or what went wrong.
        versions: what was installed.
    """

    python: str
    torch: str
    status: str
    detail: str
    versions: str = ""


def matrix() -> list[tuple[str, str]]:
    return [(p, t) for p in PYTHONS for t in TORCHES if (p, t) not in ABSENT]


def find_python(release: str) -> str | None:
    """An interpreter of this release: on PATH, or the newest of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    builds = sorted(pyenv.glob(f"{release}.*"), key=lambda path: [*map(int, _numbers(path.name))])
    candidates = [shutil.which(f"python{release}"), *(str(b / "bin/python") for b in builds[::-1])]
    for candidate in candidates:
        # A shim of pyenv's is there for releases that it does not run.
        if candidate and output(candidate, "-c", "import sys; print(*sys.version_info[:2])") == (
            release.replace(".", " ")
        ):
            return candidate
    return None


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; nothing where it fails."""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env=_environment()
        )
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def install(folder: Path, base: str, torch: str, log: Path) -> str | None:
    """Make the environment, or use it as it is; the reason if it cannot be made."""
    python, stamp = folder / "bin" / "python", folder / "tile_mhc.stamp"
    wanted = f"{base} {torch} {ROOT} {(ROOT / 'pyproject.toml').read_text()}"
    if stamp.exists() and stamp.read_text() == wanted:
        return None
    # Two calls, as pip looks for torch last, and for others' sake would take another release.
    pip = [str(python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    steps = [
        [base, "-m", "venv", "--clear", str(folder)],
        [*pip, f"torch=={torch}.*"],
        [*pip, f"torch=={torch}.*", "-e", f"{ROOT}[test]"],
    ]
    problem = run_all(steps, log)
    if problem is None:
        stamp.write_text(wanted)
    return problem


def run_all(steps: list[list[str]], log: Path) -> str | None:
    """Run commands of pip one after another; what was wrong with the first that fails."""
    for step in steps:
        if status := _run(step, log, _environment()):
            errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR")]
            return errors[0].removeprefix("ERROR: ") if errors else f"exit status {status}"
    return None


def _environment() -> dict[str, str]:
    # As in env.sh: where it is set, every process compiles all of torch that it imports.
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def _run(command: list[str], log: Path, env: Mapping[str, str], cwd: Path | None = None) -> int:
    with log.open("a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        run = subprocess.run(
            command, env=env, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    return run.returncode


def test(folder: Path, root: Path, log: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether pytest passes, from a neutral folder, and what it counts.

    Args:
        folder: the environment.
        root: where the project's files lie.
        log: takes what pytest prints.
        tests: names of files below `root`.
    """
    cwd = root / "build" / "cwd"
    cwd.mkdir(parents=True, exist_ok=True)
    workers = min(8, len(os.sched_getaffinity(0)))
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-c"]
    command += [str(root / "pyproject.toml"), "--rootdir", str(root), "-p", "no:cacheprovider"]
    command += [f"-n{workers}", *shlex.split(os.environ.get("PYTEST_ARGS", ""))]
    command += [str(root / name) for name in tests]
    status = _run(command, log, {"OMP_NUM_THREADS": "1", **_environment()}, cwd)
    counted = [line for line in log.read_text().splitlines() if COUNTS.search(line)]
    detail = ", ".join(COUNTS.findall(counted[-1])) if counted else f"exit status {status}"
    return status == 0, detail


def versions(folder: Path) -> str:
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    found = output(str(folder / "bin" / "python"), "-c", code, *SHOWN)
    pairs = zip(SHOWN, found.split(), strict=False)
    return ", ".join(f"{name} {version}" for name, version in pairs)


def try_pair(python: str, torch: str, tests: list[str], discard: bool) -> Outcome:
    folder = ROOT / "build" / "releases" / f"python{python}-torch{torch}"
    log = folder.with_suffix(folder.suffix + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    base = find_python(python)
    if base is None:
        return Outcome(python, torch, "not installed", f"no Python {python} was found")
    try:
        problem = install(folder, base, torch, log)
        if problem is not None:
            return Outcome(python, torch, "not installed", problem)
        passed, detail = test(folder, ROOT, log, tests)
        status = "passed" if passed else "failed"
        return Outcome(python, torch, status, detail, versions(folder))
    finally:
        if discard:
            shutil.rmtree(folder, ignore_errors=True)


def show(outcomes: list[Outcome]) -> None:
    rows = [("Python", "torch", "", "", "")]
    rows += [(o.python, o.torch, o.status, o.detail, o.versions) for o in outcomes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pairs", nargs="*", metavar="PYTHON:TORCH", help="by default all")
    parser.add_argument("--all", action="store_true", help="all of tests/cpu")
    parser.add_argument("--discard", action="store_true", help="keep no environment")
    arguments = parser.parse_args()
    pairs = []
    for pair in arguments.pairs:
        if not re.fullmatch(r"3\.\d+:\d+\.\d+", pair):
            parser.error(f"a pair must be like 3.12:2.14; got {pair}")
        python, torch = pair.split(":")
        pairs.append((python, torch))
    tests = ["tests/cpu"] if arguments.all else [*TESTS]
    outcomes = []
    for python, torch in pairs or matrix():
        outcomes.append(try_pair(python, torch, tests, arguments.discard))
        last = outcomes[-1]
        print(f"Python {python}, torch {torch}: {last.status}, {last.detail}", flush=True)
    show(outcomes)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
