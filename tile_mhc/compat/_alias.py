"""Make the imports of another library's mHC modules resolve to a package of ours."""

import importlib
import importlib.util
import pkgutil
import sys
import threading
from types import ModuleType

_ABSENT = object()


class Alias:
    """`name`, the other library, and `package`, ours. The modules keep their own names: `name.x` is
    `package.x`, the same object.

    Args:
        name: what the other library is imported as.
        package: ours, laid out as the other.
        parts: the mHC modules of both, each with all below it. Only these are ours beside a real
            `name`, and, where it has no such package, the one that a part lies in.
        whole: whether all of `package` stands for `name` where no real one can be imported. If
            not, `name` itself stays absent there: `from name.part import x` needs no more than
            the part, as Python looks for the parents of what is not yet imported only.
    """

    def __init__(self, name: str, package: str, parts: tuple[str, ...], whole: bool) -> None:
        self.name = name
        self.package = package
        self.parts = parts
        self.whole = whole
        self._lock = threading.RLock()
        # What `install` changed: names that are ours, what they were, and attributes of parents.
        self._roots: list[str] = []
        self._hidden: dict[str, ModuleType] = {}
        self._attributes: list[tuple[ModuleType, str, object]] = []

    def install(self, force: bool) -> None:
        with self._lock:
            if self._roots:
                return
            location = self._real_location()
            if location is not None and not force:
                raise RuntimeError(
                    f"install: no other {self.name} may be importable, unless force=True replaces "
                    f"its mHC modules; got the one at {location}"
                )
            for root in self._choose_roots(real=location is not None):
                self._place(root)

    def uninstall(self) -> None:
        with self._lock:
            while self._attributes:
                parent, child, before = self._attributes.pop()
                if before is _ABSENT:
                    delattr(parent, child)
                else:
                    setattr(parent, child, before)
            for name in _loaded(*self._roots):
                del sys.modules[name]
            sys.modules.update(self._hidden)
            self._hidden.clear()
            self._roots.clear()

    def _choose_roots(self, real: bool) -> list[str]:
        """The names that become ours, each with all below it.

        A real package is imported first, with mHC modules of its own: they may hold names, which
        the rest of it takes at import, that ours do not have.
        """
        if self.whole and not (real and _imports(self.name)):
            return [self.name]
        roots = []
        for part in self.parts:
            root = f"{self.name}.{part}"
            parent = root.rpartition(".")[0]
            roots.append(root if _imports(parent) else parent)
        return roots

    def _place(self, root: str) -> None:
        """Put ours where `root` is, in `sys.modules` and on the package it lies in."""
        module = importlib.import_module(self.package + root.removeprefix(self.name))
        modules = {root: module}
        for info in pkgutil.walk_packages(
            getattr(module, "__path__", []), prefix=f"{module.__name__}."
        ):
            alias = self.name + info.name.removeprefix(self.package)
            modules[alias] = importlib.import_module(info.name)
        self._roots.append(root)
        self._hidden.update((name, sys.modules.pop(name)) for name in _loaded(root))
        sys.modules.update(modules)
        parent, _, child = root.rpartition(".")
        above = sys.modules.get(parent)
        if above is not None:
            self._attributes.append((above, child, vars(above).get(child, _ABSENT)))
            setattr(above, child, module)

    def _real_location(self) -> str | None:
        # None stands there for a module that must not be imported.
        module = sys.modules.get(self.name)
        if module is not None:
            return str(getattr(module, "__file__", None) or "an unknown place")
        spec = importlib.util.find_spec(self.name)
        # A folder without __init__.py is found too, with no origin: that is no package to hide.
        return None if spec is None else spec.origin


def _imports(name: str) -> bool:
    """Whether a module can be imported; what it may raise while it is, is anything."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _loaded(*roots: str) -> list[str]:
    """The imported modules of these names, and below them."""
    return [n for n in list(sys.modules) if any(n == r or n.startswith(f"{r}.") for r in roots)]
