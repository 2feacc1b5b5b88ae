"""Classes for transformers' `register_patch_mapping`: a model that is built with them is served.

They are subclasses with the names of the originals, which transformers looks for: in
`_no_split_modules`, in the mapping itself, and in what a saved model's config says.
"""

import copyreg
import functools
from types import FunctionType
from typing import Any

from tile_mhc.integrations.transformers import _decoder_stack
from tile_mhc.integrations.transformers._family import BUILT, Family, Forward


class _Kind(type):
    """A class that takes the original's modules for its own.

    transformers puts it into the class's list of what may be recorded, for good
    (`patch_output_recorders`): also for models that are built without the mapping later.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        if cls not in _named:  # derived of one, as FSDP2 does: as any class
            return type.__instancecheck__(cls, instance)
        return isinstance(instance, cls.__bases__)

    def __subclasscheck__(cls, subclass: type) -> bool:
        if cls not in _named:
            return type.__subclasscheck__(cls, subclass)
        return issubclass(subclass, cls.__bases__)


# What is built: its model type, and its name.
_named: dict[type, tuple[str, str]] = {}


def classes(family: Family) -> dict[str, type]:
    """By the name of the class that each takes the place of; always the same objects."""
    return {
        forward.class_name: _class(family, forward, family.class_of(forward.class_name))
        for forward in family.forwards.values()
        if forward.function is not None
    }


@functools.cache
def _class(family: Family, forward: Forward, original: type) -> type:
    if forward.name == "model":
        run: Any = _of_model(family, original)
    else:
        function: Any = forward.function
        run = FunctionType(family.code_of(forward), globals(), "forward", function.__defaults__)
        forward.built = run
    members = {
        "forward": run,
        BUILT: True,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    kind = _Kind(original.__name__, (original,), members)
    _named[kind] = family.model_type, original.__name__
    return kind


def _of_model(family: Family, original: Any) -> Any:
    """Around the original with all its decorators, which record outputs and merge defaults."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs | _decoder_stack.for_layers(family, self, kwargs)
        return original.forward(self, *args, **given)

    return forward


def _load(model_type: str, name: str) -> type:
    """What a pickled class becomes."""
    from tile_mhc.integrations import transformers as integration

    return integration.patch_mapping(models=[model_type])[name]


def _reduce(kind: type) -> str | tuple[Any, ...]:
    return (_load, _named[kind]) if kind in _named else kind.__qualname__


copyreg.pickle(_Kind, _reduce)
