"""Make `import tile_kernels` resolve to this package."""

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType

ALIAS = "tile_kernels"
PACKAGE = __name__.rpartition(".")[0]

# Modules of a real tile_kernels that install(force=True) took out of sys.modules.
_hidden: dict[str, ModuleType] = {}


def install(*, force: bool = False) -> None:
    """Let every `import tile_kernels...` of this process find the modules of this package.

    The modules keep their own names: `tile_kernels.modeling.mhc` is
    `tile_mhc.compat.tile_kernels.modeling.mhc`, the same object. Installing twice is one install.

    Args:
        force: also when a real tile_kernels is there; it is hidden until `uninstall()`. What was
            imported from it before keeps working on it.

    Raises:
        RuntimeError: a real tile_kernels is installed or imported, and `force` is not set.
    """
    package = importlib.import_module(PACKAGE)
    if sys.modules.get(ALIAS) is package:
        return
    location = _real_location()
    if location is not None and not force:
        raise RuntimeError(
            f"install: no other tile_kernels may be importable, unless force=True hides it; "
            f"got the one at {location}"
        )
    modules = {ALIAS: package}
    for info in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        modules[ALIAS + info.name.removeprefix(PACKAGE)] = importlib.import_module(info.name)
    _hidden.update((name, sys.modules.pop(name)) for name in _aliases(sys.modules))
    sys.modules.update(modules)


def uninstall() -> None:
    """Undo `install()`: a real tile_kernels, if there is one, is what imports find again."""
    if sys.modules.get(ALIAS) is not importlib.import_module(PACKAGE):
        return
    for name in _aliases(sys.modules):
        del sys.modules[name]
    sys.modules.update(_hidden)
    _hidden.clear()


def _aliases(modules: dict[str, ModuleType]) -> list[str]:
    return [name for name in modules if name == ALIAS or name.startswith(f"{ALIAS}.")]


def _real_location() -> str | None:
    if ALIAS in sys.modules:
        return str(getattr(sys.modules[ALIAS], "__file__", None) or "an unknown place")
    spec = importlib.util.find_spec(ALIAS)
    # A folder without __init__.py is found too, with no origin: that is no package to hide.
    return None if spec is None else spec.origin
