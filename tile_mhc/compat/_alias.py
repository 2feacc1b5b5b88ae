"""Make the imports of another library resolve to a package of ours."""

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType


class Alias:
    """`name`, the other library, and `package`, ours.

    The modules keep their own names: `name.x` is `package.x`, the same object.
    """

    def __init__(self, name: str, package: str) -> None:
        self.name = name
        self.package = package
        # Modules of a real `name` that install(force=True) took out of sys.modules.
        self._hidden: dict[str, ModuleType] = {}

    def install(self, force: bool) -> None:
        package = importlib.import_module(self.package)
        if sys.modules.get(self.name) is package:
            return
        location = self._real_location()
        if location is not None and not force:
            raise RuntimeError(
                f"install: no other {self.name} may be importable, unless force=True hides it; "
                f"got the one at {location}"
            )
        modules = {self.name: package}
        for info in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            alias = self.name + info.name.removeprefix(self.package)
            modules[alias] = importlib.import_module(info.name)
        self._hidden.update((name, sys.modules.pop(name)) for name in self._aliases())
        sys.modules.update(modules)

    def uninstall(self) -> None:
        if sys.modules.get(self.name) is not importlib.import_module(self.package):
            return
        for name in self._aliases():
            del sys.modules[name]
        sys.modules.update(self._hidden)
        self._hidden.clear()

    def _aliases(self) -> list[str]:
        return [n for n in sys.modules if n == self.name or n.startswith(f"{self.name}.")]

    def _real_location(self) -> str | None:
        if self.name in sys.modules:
            return str(getattr(sys.modules[self.name], "__file__", None) or "an unknown place")
        spec = importlib.util.find_spec(self.name)
        # A folder without __init__.py is found too, with no origin: that is no package to hide.
        return None if spec is None else spec.origin
