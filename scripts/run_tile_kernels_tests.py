"""Run TileKernels' own mHC tests, from a checkout of it, on tile_mhc.

    python scripts/run_tile_kernels_tests.py PATH [pytest arguments]

PATH is a checkout of TileKernels 1.0.0; its tests run as they are, with `tile_kernels` resolving to
tile_mhc.compat.tile_kernels. The exit status is pytest's. Further arguments go to pytest, such as
`--collect-only` or `-k sinkhorn`.
"""

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tile_mhc.compat import tile_kernels


def make_param_key(params: dict[str, object]) -> str:
    """A readable key of a benchmark's parameters: the one thing the tests' plugins import."""
    return ",".join(f"{name}={value}" for name, value in params.items() if value is not None)


class Alias:
    """The import alias, and a check that no real module of mHC got past it."""

    def __init__(self) -> None:
        tile_kernels.install(force=True)
        testing, bench = (
            ModuleType("tile_kernels.testing"),
            ModuleType("tile_kernels.testing.bench"),
        )
        testing.bench = bench  # type: ignore[attr-defined]
        bench.make_param_key = make_param_key  # type: ignore[attr-defined]
        sys.modules |= {testing.__name__: testing, bench.__name__: bench}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"tile_kernels is {tile_kernels.__file__}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        home = tile_kernels.__name__
        foreign = [
            name
            for name, module in sys.modules.items()
            if name.partition(".")[0] == "tile_kernels"
            and "mhc" in name.split(".")
            and module.__name__.removeprefix(home) != name.removeprefix("tile_kernels")
        ]
        if foreign:
            print(f"run_tile_kernels_tests: not ours: {', '.join(foreign)}", file=sys.stderr)
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def main() -> int:
    parser = argparse.ArgumentParser(description="Run TileKernels' own mHC tests on tile_mhc.")
    parser.add_argument("path", type=Path, help="a checkout of TileKernels")
    options, pytest_arguments = parser.parse_known_args()
    root = options.path.resolve()
    tests = root / "tests" / "mhc"
    if not tests.is_dir():
        parser.error(f"path must be a checkout of TileKernels with tests/mhc; got {options.path}")
    # Nothing is written into the checkout, and nothing of ours configures the run.
    sys.dont_write_bytecode = True
    os.chdir(root)
    # pytest-benchmark, where it is installed, has options of the same names as theirs.
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    own = [f"--rootdir={root}", f"--confcutdir={root}", "-c", os.devnull, *plugins]
    return pytest.main([*own, str(tests), *pytest_arguments], plugins=[Alias()])


if __name__ == "__main__":
    sys.exit(main())
