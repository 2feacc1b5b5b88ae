"""Tensors that a recompute group keeps without their memory; see `_recompute_group`.

What autograd, or a node of ours, keeps of a tensor is called packed here. It is one of

- a tuple of the tensor and its version, where it is kept as it is;
- a `Made` or a `View` of one, where the group makes it again;
- an `Outer`, what the hooks around the group have made of it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tile_mhc import errors
from tile_mhc.ops import _replay

OP = "recompute_group"
_keeps_graph: Any = torch._C._autograd._get_current_graph_task_keep_graph


class Group(Protocol):
    """What a tensor needs of its group.

    Attributes:
        holds: whether there is something made that no backward has been asked to drop at its end.
    """

    holds: bool

    def use(self, made: "Made") -> Tensor: ...


class Made:
    """A tensor that the group makes again.

    Attributes:
        group: the group.
        source: the streams that it was made of.
        shape: its shape; it is contiguous, and all of its storage.
        dtype: its dtype.
        device: its device.
        version: of the tensor, when it had just been made.
        value: what a replay has made, or None.
        value_version: of the value, when it had just been made.
        stream: that of the replay, on a GPU.
    """

    __slots__ = (
        "__weakref__",
        "device",
        "dtype",
        "group",
        "shape",
        "source",
        "stream",
        "value",
        "value_version",
        "version",
    )

    shape: torch.Size
    version: int

    def __init__(self, group: Group, source: "Source") -> None:
        self.group = group
        self.source = source
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self.value: Tensor | None = None
        self.value_version = 0
        self.stream: torch.cuda.Stream | None = None

    def is_seen_by(self, tensor: Tensor) -> bool:
        """Whether a tensor of the same storage is a view of this, as it was made."""
        return (
            self.version == tensor._version and self.dtype == tensor.dtype and not tensor.is_neg()
        )

    def is_all(self, tensor: Tensor) -> bool:
        """Whether a contiguous view is all of this, by any leading dimensions."""
        return self.shape[-2:] == tensor.shape[-2:] and self.shape.numel() == tensor.numel()

    def get(self) -> Tensor:
        """The tensor, made again."""
        value = self.value
        if value is None or self.group.holds:
            value = self.group.use(self)
        if value._version != self.value_version:
            raise changed(value, self.value_version, "what a replay has made")
        if self.stream is not None:
            raw = _replay.current_stream(value.get_device())
            if raw != self.stream.cuda_stream:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_stream(self.stream)
                value.record_stream(stream)
        return value

    def forget(self) -> None:
        """Nothing will ask for it."""
        self.source = _NOTHING
        self.value = None


class Input(Made):
    """A layer input: aggregate(source, pre_mix).

    Attributes:
        gates: what the pre_mix is of, packed: itself, or the mixes, scale and bias that
            `split_mixes` takes.
        pre_eps: what that adds to it.
    """

    __slots__ = ("gates", "pre_eps")

    def __init__(
        self, group: Group, source: "Source", gates: Sequence[Any], pre_eps: float = 0.0
    ) -> None:
        super().__init__(group, source)
        self.gates, self.pre_eps = gates, pre_eps

    def forget(self) -> None:
        super().forget()
        self.gates = ()


class Streams(Made):
    """Streams: post(layer_output, source, post_mix, comb_mix, bias), all of them packed."""

    __slots__ = ("packed",)

    def __init__(self, group: Group, source: "Source", *packed: Any) -> None:
        super().__init__(group, source)
        self.packed = packed

    def forget(self) -> None:
        super().forget()
        self.packed = ()


class Root:
    """Streams that something else made, packed."""

    __slots__ = ("device", "dtype", "packed", "value")

    def __init__(self, packed: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.packed, self.dtype, self.device = packed, dtype, device
        self.value: Tensor | None = None


Source = Made | Root
_NOTHING = Root(None, torch.float32, torch.device("meta"))


class View:
    """A view of a tensor that the group makes again."""

    __slots__ = ("layout", "made")

    def __init__(self, made: Made, *layout: Any) -> None:
        self.made, self.layout = made, layout

    def get(self) -> Tensor:
        return self.made.get().as_strided(*self.layout)


class Kept:
    """What a node of ours has saved, packed."""

    __slots__ = ("packed",)

    def __init__(self, packed: list[Any]) -> None:
        self.packed = packed

    def take(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the node's backward; as autograd would, it frees them if it may."""
        if not self.packed:
            raise errors.RecomputeError(
                f"{OP}: a node must be run once where its graph is not retained; got a second "
                "backward. Give the first one retain_graph=True"
            )
        tensors: list[Tensor | None] = []
        for packed in self.packed:
            # As `unpack`, whose call would take as long as all of it.
            if type(packed) is tuple:
                tensor, version = packed
                if tensor._version != version:
                    raise changed(tensor, version, "a tensor that the backward needs")
                tensors.append(tensor)
            elif packed is None:
                tensors.append(None)
            elif torch.is_grad_enabled():
                # For a gradient of the gradient, which is refused, there must be a graph.
                tensors.append(packed.get().detach().requires_grad_())
            else:
                tensors.append(packed.get())
        if not _keeps_graph():
            self.packed = []
        return tuple(tensors)


class Outer:
    """What the hooks around the group have packed."""

    __slots__ = ("packed", "unpack")

    def __init__(self, unpack: Callable[[Any], Tensor], packed: Any) -> None:
        self.unpack, self.packed = unpack, packed

    def get(self) -> Tensor:
        return self.unpack(self.packed)


def unpack(packed: Any) -> Tensor:
    if type(packed) is tuple:
        tensor, version = packed
        if tensor._version != version:
            raise changed(tensor, version, "a tensor that the backward needs")
        return tensor  # type: ignore[no-any-return]
    return packed.get()  # type: ignore[no-any-return]


def changed(tensor: Tensor, version: int, what: str) -> errors.RecomputeError:
    return errors.RecomputeError(
        f"{OP}: {what} must be as it was when it was saved, at version {version}; got "
        f"{errors.describe(tensor)} at version {tensor._version}, which an operation in place has "
        "changed. Give that operation a copy"
    )
