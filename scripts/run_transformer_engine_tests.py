"""Run TransformerEngine's own mHC tests, from a checkout of it, on tile_mhc.

    python scripts/run_transformer_engine_tests.py PATH [--cpu | --compile ARCH] [pytest arguments]

PATH is a checkout of TransformerEngine; its tests/pytorch/test_mhc.py runs as it is, with
`transformer_engine.pytorch.triton.mhc` resolving to tile_mhc.compat.transformer_engine. Of the
`utils` beside it, which imports all of TransformerEngine, the test wants one function, which stands
here. The exit status is pytest's. Further arguments go to pytest, such as `-k sinkhorn`.

The kernels that the collected tests run are compiled on all cores before the first of them; with
--compile sm_90a that is all, and needs no GPU.

With --cpu, tensors that the test puts on "cuda" are on the CPU, where the reference answers: it
shows names, signatures, shapes and numbers, not the kernels.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tile_mhc import jit, specs
from tile_mhc.compat import transformer_engine

SEED = 1234
# The dtypes of streams in the tests, and those of parameters beside each.
DTYPES = {"float32": ("float32",), "bfloat16": ("float32", "bfloat16")}


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


def kernels_of(widths: Iterable[int], arch: str) -> list[tuple[str, specs.Arguments]]:
    """What tests of these C run: of the projections, those of 24 mixes without an aggregate."""
    sizes = [
        specs.Sizes(4, width, dtype=dtype, parameters=parameters)
        for width in sorted(widths)
        for dtype, parameters in DTYPES.items()
    ]
    return [
        (name, args)
        for name, args in specs.select(sizes, ["transformer_engine"], arch)
        if not name.startswith("projection")
        or (args[0] == 24 and not (name in ("projection_bwd", "projection_any_bwd") and args[2]))
    ]


def compile_ahead(widths: Iterable[int], arch: str) -> int:
    """How many failed."""
    # The tests that need one that fails will fail, and only they.
    problems = jit.fill_cache(kernels_of(widths, arch), arch, os.cpu_count() or 1)
    for problem in problems:
        print(f"run_transformer_engine_tests: {problem}", file=sys.stderr)
    return len(problems)


class Alias:
    """The import alias, and a check that no real module of mHC got past it."""

    def __init__(self, on_cpu: bool, compiles_for: str | None) -> None:
        transformer_engine.install(force=True)
        utils = ModuleType("utils")
        utils.reset_rng_states = reset_rng_states  # type: ignore[attr-defined]
        sys.modules["utils"] = utils
        self.on_cpu = on_cpu
        self.compiles_for = compiles_for
        self.failed = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Any:
        if not self.on_cpu:
            return (yield)
        with OnCpu():
            return (yield)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        arch = self.compiles_for
        if not arch:
            only_collects = self.on_cpu or session.config.option.collectonly
            if only_collects or not torch.cuda.is_available():
                return
            arch = jit.device_arch(torch.cuda.current_device())
        parameters = [getattr(item, "callspec").params for item in session.items]  # noqa: B009
        self.failed = compile_ahead({g["cfg"].C for g in parameters if "cfg" in g}, arch)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"transformer_engine is {transformer_engine.__file__}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        home = transformer_engine.__name__
        foreign = [
            name
            for name, module in sys.modules.items()
            if name.startswith("transformer_engine.pytorch.triton.mhc")
            and module.__name__.removeprefix(home) != name.removeprefix("transformer_engine")
        ]
        if foreign:
            print(f"run_transformer_engine_tests: not ours: {', '.join(foreign)}", file=sys.stderr)
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def main() -> int:
    parser = argparse.ArgumentParser(description="Run TransformerEngine's mHC tests on tile_mhc.")
    parser.add_argument("path", type=Path, help="a checkout of TransformerEngine")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cpu", action="store_true", help='run what is put on "cuda" on the CPU')
    where.add_argument("--compile", choices=specs.ARCHS, help="compile what they need, run none")
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
    if options.compile:
        own += ["--collect-only", "-q", "-q"]
    plugin = Alias(options.cpu, options.compile)
    status = pytest.main([*own, str(test), *pytest_arguments], plugins=[plugin])
    return status or int(options.compile is not None and plugin.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
