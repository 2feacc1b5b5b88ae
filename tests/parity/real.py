"""Import the mHC part of a real tile_kernels, whatever of its other parts does not import.

Releases 1.0.0 and 2.1.0 have one import name: each stands in sys.modules for as long as it is used.
"""

import contextlib
import importlib
import importlib.machinery
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

from parity import calls

# The packages whose __init__ imports quantisation and the like, which fail on tilelang 0.1.15.
STUBBED = ("tile_kernels", "tile_kernels.modeling", "tile_kernels.torch")
# The folder that release 2.1.0 is unpacked in, where another is installed.
RELEASE_2 = "TILE_KERNELS_2"


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
    with _stubbed(root, STUBBED):
        namespace = calls.functions("tile_kernels")
        if not Path(sys.modules["tile_kernels.modeling.mhc.ops"].__file__).is_relative_to(root):
            raise ImportError(f"tile_kernels.modeling.mhc.ops did not come from {root}")
        namespace.version = importlib.import_module("tile_kernels._version").__version__
        yield namespace


def release_2() -> Path:
    """The folder of a tile_kernels 2: $TILE_KERNELS_2's, or the one on sys.path.

    Raises ImportError where neither is one.
    """
    folder = os.environ.get(RELEASE_2)
    root = Path(folder) / "tile_kernels" if folder else location()
    if root is None or version_of(root) < (2,):
        found = "none is there" if root is None else f"got {root}"
        raise ImportError(
            f"tile_kernels 2 must be on sys.path or unpacked in ${RELEASE_2}; {found}"
        )
    return root


def version_of(root: Path) -> tuple[int, ...]:
    """The release of a tile_kernels package, read without importing it."""
    file = root / "_version.py"
    match = re.search(r"__version__ = [^\n]*'([\d.]+)", file.read_text() if file.exists() else "")
    return tuple(int(part) for part in match[1].strip(".").split(".")) if match else ()


@contextlib.contextmanager
def plain_functions() -> Iterator[SimpleNamespace]:
    """The functions of `tile_kernels.mhc` of release 2, and its version, as `tile_kernels()`."""
    root = release_2()
    with _stubbed(root, STUBBED[:1]):
        module = importlib.import_module("tile_kernels.mhc")
        public = {name: value for name, value in vars(module).items() if callable(value)}
        version = importlib.import_module("tile_kernels._version").__version__
        yield SimpleNamespace(**public, version=version)


@contextlib.contextmanager
def _stubbed(root: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Within, `import tile_kernels...` finds the modules below `root`, without these __init__."""
    before = _take_out()
    try:
        for name in names:
            module = ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = module
        yield
    finally:
        _take_out()
        sys.modules.update(before)


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "tile_kernels"]
    return {name: sys.modules.pop(name) for name in names}
