"""Build the sdist and the wheel, install each, and run the sdist's tests against it.

    python scripts/distribution.py [--all] [--keep FOLDER]

The sdist is built from the files that git knows, and the wheel from the sdist. Each is installed
into a virtual environment of its own, with what pip finds for the rest, and the tests that lie in
the sdist run from a folder with nothing else of this checkout: those that releases.py runs, or with
--all all of tests. Needs setuptools 77 or later. TILE_MHC_TORCH is the torch to install, as in
env.sh.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import releases

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
# As in env.sh: one version, as a range takes the newest, with gigabytes of CUDA.
TORCH = "torch==2.13.0"
WHERE = "import tile_mhc, tile_mhc.kernels as k; print(tile_mhc.__file__); print(k.__file__)"


def copy_tracked(folder: Path) -> None:
    """What git knows, as it is in the work tree; outside of a checkout, as in an sdist, all."""
    if not (ROOT / ".git").exists():
        ignore = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", ".venv")
        shutil.copytree(ROOT, folder, ignore=ignore)
        return
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    command.append("--exclude-standard")
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


def build(kind: str, folder: Path, into: Path) -> Path:
    """An sdist or a wheel of what lies in `folder`."""
    into.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(into)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"distribution: build_{kind} failed:\n{run.stdout}{run.stderr}")
    return into / run.stdout.split()[-1]


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def check(archive: Path, root: Path, folder: Path, tests: list[str]) -> tuple[bool, str]:
    """Install the archive into a new environment, and run the tests below `root`."""
    log = folder.with_suffix(".log")
    log.write_text("")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-compile"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, os.environ.get("TILE_MHC_TORCH") or TORCH],
        [*pip, f"tile_mhc[test] @ {archive.as_uri()}"],
    ]
    problem = releases.run_all(steps, log)
    if problem is not None:
        return False, f"not installed: {problem}"
    for path in releases.output(str(folder / "bin" / "python"), "-c", WHERE, cwd=folder).split(
        "\n"
    ):
        if folder not in Path(path).parents:
            return False, f"imported from {path or 'nowhere'}, not from {folder}"
    return releases.test(folder, root, log, tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all of tests")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy both archives there")
    arguments = parser.parse_args()
    tests = ["tests"] if arguments.all else [*releases.TESTS]
    failed = False
    with tempfile.TemporaryDirectory(prefix="tile_mhc-") as name:
        scratch = Path(name).resolve()
        copy_tracked(scratch / "source")
        sdist = build("sdist", scratch / "source", scratch / "dist")
        root = unpack(sdist, scratch / "sdist")
        wheel = build("wheel", root, scratch / "dist")
        # What the tests see is what was packed.
        shutil.rmtree(root)
        root = unpack(sdist, scratch / "sdist")
        for archive in (sdist, wheel):
            print(f"{archive.name}: {archive.stat().st_size / 1e6:.2f} MB", flush=True)
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy2(archive, arguments.keep)
        for archive in (wheel, sdist):
            folder = scratch / f"from-{archive.suffix.lstrip('.')}"
            passed, detail = check(archive, root, folder, tests)
            print(f"{archive.name}: {'passed' if passed else 'failed'}, {detail}", flush=True)
            if not passed:
                failed = True
                print("".join(folder.with_suffix(".log").read_text()[-6000:]), file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
