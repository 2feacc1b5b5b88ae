"""Import the mHC part of a real tile_kernels, whatever of its other parts does not import."""

import contextlib
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

from parity import calls

# The packages whose __init__ imports quantisation and the like, which fail on tilelang 0.1.15.
STUBBED = ("tile_kernels", "tile_kernels.modeling", "tile_kernels.torch")


def location() -> Path | None:
    """The folder of a tile_kernels on sys.path; never the import alias of ours."""
    spec = importlib.machinery.PathFinder.find_spec("tile_kernels")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@contextlib.contextmanager
def tile_kernels() -> Iterator[SimpleNamespace]:
    """Its functions and its version, while its modules stand in sys.modules.

    Raises ImportError where it is not there or does not import.
    """
    root = location()
    if root is None:
        raise ImportError("no tile_kernels package is on sys.path")
    before = _take_out()
    try:
        for name in STUBBED:
            module = ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = module
        namespace = calls.functions("tile_kernels")
        if not Path(sys.modules["tile_kernels.modeling.mhc.ops"].__file__).is_relative_to(root):
            raise ImportError(f"tile_kernels.modeling.mhc.ops did not come from {root}")
        namespace.version = importlib.import_module("tile_kernels._version").__version__
        yield namespace
    finally:
        _take_out()
        sys.modules.update(before)


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "tile_kernels"]
    return {name: sys.modules.pop(name) for name in names}
