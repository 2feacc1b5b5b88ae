"""The dtypes of a kernel's tensors: one object, by the names of the tensors.

A kernel is known by its name, the numbers that its builder takes, and those dtypes that are not the
default, as words such as "weight=bfloat16". `Dtypes.words` alone leaves defaults out, and
`Dtypes.parse` alone puts them back in. Imports no other module of ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of what a kernel reads and writes; empty for a tensor that is not there.

    A builder takes those that its kernel has, as keywords such as `weight_dtype`.

    Attributes:
        streams: of the residual, and of what has its dtype.
        weight: of the projection's weight.
        norm_weight: of the learnable weight of the RMS norm.
        scale: of the gates' scale, or of its gradient.
        bias: of the gates' bias, or of its gradient.
        layer_output: of the output of a layer, where that may have a dtype of its own.
        layer_bias: of the bias of a layer's last linear map.
        layer_norm: of the weight of an RMS norm of a layer's input.
        held: of a gradient of the streams that the new one is added to.
        into: of a destination for the gradient of the streams; without one it is as the streams.
        into_weight: of a destination for the gradient of the weight.
        into_norm_weight: of a destination for the gradient of the norm weight.
    """

    streams: str = "bfloat16"
    weight: str = "float32"
    norm_weight: str = ""
    scale: str = "float32"
    bias: str = "float32"
    layer_output: str = "bfloat16"
    layer_bias: str = ""
    layer_norm: str = ""
    held: str = ""
    into: str = ""
    into_weight: str = ""
    into_norm_weight: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """Those that are not the default, in the order of the attributes: a kernel has one key."""
        return tuple(
            f"{field.name}={value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        )

    @classmethod
    def parse(cls, words: Iterable[str]) -> "Dtypes":
        """The inverse of `words`."""
        return cls(**dict(word.split("=") for word in words))

    @property
    def given(self) -> dict[str, str]:
        """Those that are not the default, by name."""
        return dict(word.split("=") for word in self.words)


def split_arguments(args: Iterable[int | str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The numbers and the words of a kernel's arguments, in which the numbers come first."""
    args = tuple(args)
    numbers = tuple(arg for arg in args if not isinstance(arg, str))
    return numbers, tuple(arg for arg in args if isinstance(arg, str))
