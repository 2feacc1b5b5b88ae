"""Run TransformerEngine's own mHC tests, from a checkout of it, on tile_mhc.

    python scripts/run_transformer_engine_tests.py PATH [--cpu] [pytest arguments]

PATH is a checkout of TransformerEngine; its tests/pytorch/test_mhc.py runs as it is, with
`transformer_engine.pytorch.triton.mhc` resolving to tile_mhc.compat.transformer_engine. Of the
`utils` beside it, which imports all of TransformerEngine, the test wants one function, which stands
here. The exit status is pytest's. Further arguments go to pytest, such as `-k sinkhorn`.

With --cpu, tensors that the test puts on "cuda" are on the CPU, where the reference answers: it
shows names, signatures, shapes and numbers, not the kernels.
"""

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tile_mhc.compat import transformer_engine

SEED = 1234


def reset_rng_states() -> None:
    """The same numbers in every test: all that the test imports from its `utils`."""
    torch.manual_seed(SEED)


class OnCpu(TorchFunctionMode):
    """The factories' device="cuda" means the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Alias:
    """The import alias, and a check that no module of a real transformer_engine got past it."""

    def __init__(self, on_cpu: bool) -> None:
        transformer_engine.install(force=True)
        utils = ModuleType("utils")
        utils.reset_rng_states = reset_rng_states  # type: ignore[attr-defined]
        sys.modules["utils"] = utils
        self.on_cpu = on_cpu

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Any:
        if not self.on_cpu:
            return (yield)
        with OnCpu():
            return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"transformer_engine is {transformer_engine.__file__}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        home = transformer_engine.__name__
        foreign = [
            name
            for name, module in sys.modules.items()
            if name.partition(".")[0] == "transformer_engine"
            and module.__name__.removeprefix(home) != name.removeprefix("transformer_engine")
        ]
        if foreign:
            print(f"run_transformer_engine_tests: not ours: {', '.join(foreign)}", file=sys.stderr)
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def main() -> int:
    parser = argparse.ArgumentParser(description="Run TransformerEngine's mHC tests on tile_mhc.")
    parser.add_argument("path", type=Path, help="a checkout of TransformerEngine")
    parser.add_argument("--cpu", action="store_true", help='run what is put on "cuda" on the CPU')
    options, pytest_arguments = parser.parse_known_args()
    root = options.path.resolve()
    test = root / "tests" / "pytorch" / "test_mhc.py"
    if not test.is_file():
        parser.error(
            f"path must be a checkout of TransformerEngine with tests/pytorch/test_mhc.py; "
            f"got {options.path}"
        )
    # Nothing is written into the checkout, and nothing of ours configures the run.
    sys.dont_write_bytecode = True
    os.chdir(root)
    own = [f"--rootdir={root}", "--noconftest", "-c", os.devnull, "-p", "no:cacheprovider"]
    return pytest.main([*own, str(test), *pytest_arguments], plugins=[Alias(options.cpu)])


if __name__ == "__main__":
    sys.exit(main())
