"""What is served of one model of transformers, and how its forwards are found and replaced.

A function stays the object that it was, and gets other code. So whoever holds one is served, and
given the original back, whenever it was taken.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from tile_mhc import errors
from tile_mhc.integrations.transformers import _state
from tile_mhc.integrations.transformers._stand_ins import code_for

BUILT = "built_by_tile_mhc"  # an attribute of the classes for `register_patch_mapping`


class Forward:
    """A forward of transformers', and what runs instead: `run(family, self, ...)`.

    Without one that is `optional` all else works; it is left alone where it is another's, or takes
    other arguments.
    """

    def __init__(
        self,
        name: str,
        class_name: str,
        run: Callable[..., Any],
        stand_ins: Sequence[FunctionType],
        *,
        optional: bool = False,
    ) -> None:
        self.name, self.class_name, self.run = name, class_name, run
        self.stand_ins, self.optional = stand_ins, optional
        self.function: FunctionType | None = None  # transformers', which may have our code
        self.stand_in: FunctionType | None = None  # the one with its signature
        self.code: CodeType | None = None  # transformers'
        self.original: Any = None  # a function that keeps this code
        self.is_replaced = False
        self.built: Any = None  # the forward of the class for `register_patch_mapping`

    def owns(self, forward: object) -> bool:
        """Whether a class's forward is this one, transformers' or the one built for it."""
        return forward is not None and (forward is self.function or forward is self.built)


class Family:
    """The forwards of one model of transformers, by name: "connection", "layer", "head", "model".

    Args:
        model_type: as of transformers' config.
        since: the first release of transformers that is supported and has it.
        norm: the class of the `input_norm` of a connection and of a head.
        place: the index of a layer in its model, and the config that it has from it.
        forwards: what is served.
    """

    def __init__(
        self,
        model_type: str,
        since: str,
        norm: str,
        place: Callable[[Any], tuple[int, Any]],
        forwards: Sequence[Forward],
    ) -> None:
        self.model_type, self.since, self.norm, self.place = model_type, since, norm, place
        self.modeling_name = f"transformers.models.{model_type}.modeling_{model_type}"
        self.forwards = {forward.name: forward for forward in forwards}
        self.in_force = False  # read by what torch.compile traces: it starts over when this changes
        self.running = 0  # models whose layers hand on: they keep our code until they have ended
        self.norm_class: Any = None
        self.norm_forward: Any = None  # the class's own; None where the class was given another
        self.left: dict[str, str] = {}  # what is not served, by the name of the class, and why

    def serves(self, module: Any) -> bool:
        """Whether a call of this module is ours now."""
        return self.in_force or getattr(type(module), BUILT, False)

    def original(self, name: str) -> Any:
        return self.forwards[name].original

    def modeling(self) -> ModuleType:
        return importlib.import_module(self.modeling_name)

    def class_of(self, name: str) -> Any:
        """transformers' own, or None; while it builds a model, one of ours may stand there."""
        cls: Any = getattr(self.modeling(), name, None)
        return cls.__bases__[0] if BUILT in getattr(cls, "__dict__", ()) else cls

    def find(self, op: str) -> None:
        """Look at what is there, and change nothing of it.

        Raises:
            ImportError: this transformers lacks the model, or cannot import it.
            UnsupportedError: it is not the one that this was written for.
        """
        modeling = self.modeling()
        found = {}
        self.left = {}
        for forward in self.forwards.values():
            try:
                found[forward] = self._find(op, modeling, forward)
            except errors.UnsupportedError as error:
                if not forward.optional:
                    raise
                self.left[forward.class_name] = str(error)
        self.norm_class = self._class(op, self.norm)
        norm_forward = self.norm_class.forward
        is_own = norm_forward.__module__ == self.modeling_name
        self.norm_forward = norm_forward if is_own else None
        for forward in self.forwards.values():
            function, forward.stand_in = found.get(forward, (None, None))
            if function is None or forward.function is not function:
                self._take(forward, function)

    def _take(self, forward: Forward, function: FunctionType | None) -> None:
        _give_back(forward)
        forward.function = function
        if function is not None:
            forward.code = function.__code__
            forward.original = FunctionType(
                function.__code__, function.__globals__, function.__name__, function.__defaults__
            )

    def _class(self, op: str, name: str) -> Any:
        cls = self.class_of(name)
        if cls is None:
            raise errors.UnsupportedError(
                f"{op}: {self.modeling_name} must have the class {name} ({self.since} to 5.24 have)"
                f"; got {installed()} without it. models=[...] leaves a model out"
            )
        return cls

    def _find(
        self, op: str, modeling: ModuleType, forward: Forward
    ) -> tuple[FunctionType, FunctionType]:
        """The function that a class was defined with, below transformers' own wrappers around it.

        And the stand-in that takes what it takes.
        """
        name = forward.class_name
        function: Any = inspect.unwrap(self._class(op, name).forward)
        actual = _parameters(function)
        expected = {each: _parameters(each) for each in forward.stand_ins}
        fitting = [each for each, parameters in expected.items() if parameters == actual]
        if not fitting:
            wanted = " or ".join(f"({', '.join(each)})" for each in expected.values())
            raise errors.UnsupportedError(
                f"{op}: {name}.forward must take {wanted}, as in transformers {self.since} to "
                f"5.24; got ({', '.join(actual)}) in {installed()}. models=[...] leaves a model out"
            )
        if not self._is_own(modeling, forward, function):
            raise errors.UnsupportedError(
                f"{op}: {name}.forward must be the one of {self.modeling_name}; got {function!r} "
                f"of {function.__module__}. Undo the other patch first, or apply it after this one"
            )
        return function, fitting[0]

    def _is_own(self, modeling: ModuleType, forward: Forward, function: object) -> bool:
        """The code of a function that others share, or have patched already, is not ours to change.

        But for ours, that a patch in force or a model which still runs keeps in place.
        """
        if not isinstance(function, FunctionType) or function.__globals__ is not vars(modeling):
            return False
        kept = forward.is_replaced and forward.function is function
        return not function.__closure__ and (kept or function.__code__.co_name == "forward")

    def replace(self) -> None:
        self.in_force = True
        for forward in self.forwards.values():
            if forward.function is not None and forward.stand_in is not None:
                forward.is_replaced = True
                forward.function.__code__ = self.code_of(forward)

    def code_of(self, forward: Forward) -> CodeType:
        stand_in: Any = forward.stand_in
        return code_for(stand_in, self.model_type, forward.name)

    def restore(self) -> None:
        for forward in self.forwards.values():
            _give_back(forward)

    def stands(self) -> bool:
        """Whether no class has been given another forward since."""
        return all(
            inspect.unwrap(self.class_of(forward.class_name).forward) is forward.function
            for forward in self.forwards.values()
            if forward.function is not None
        )

    def served(self) -> list[str]:
        return [each.class_name for each in self.forwards.values() if each.function is not None]

    def count(self, call: str, backend: str) -> None:
        _state.count(self.model_type, call, backend)


def _give_back(forward: Forward) -> None:
    if forward.is_replaced and forward.function is not None and forward.code is not None:
        forward.function.__code__ = forward.code
    forward.is_replaced = False


def _parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    # str(p) puts the stars first, then annotation and default.
    return [re.split("[:=]", str(p))[0].strip() for p in parameters]


def installed() -> str:
    import transformers

    return f"transformers {transformers.__version__}"
