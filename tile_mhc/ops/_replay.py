"""A launcher's work, written down once and done again with other addresses.

What a launcher does for given shapes, strides, dtypes, device and options is always the same: it
allocates, takes views, chooses kernels and launches them. All but the addresses can be kept. So
when calls of one kind come again and again, the launcher runs once with nothing launched, while
`_Notes` writes down what it allocates, views and would launch. A `Program` then does that again: it
allocates the outputs and one piece of memory for all temporaries, writes addresses into the
descriptors of the arguments, and launches the kernels.

A call is served so if it is of a kind that was seen (see `_guards`), every tensor starts where a
kernel can read it, and nobody watches the dispatcher. Any other call goes through the dispatcher,
as do the first of each kind. A launcher that does more than the above is never replayed.

Programs belong to a thread, as their descriptors are written before each launch.
"""

import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, is_, itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from tile_mhc import _device, _guards, _memory, config, errors, jit
from tile_mhc._descriptors import CUDA, TYPES, Descriptors, stream_setter
from tile_mhc._memory import is_deterministic

# What a thread keeps of an operator: keys (options, and the shape of the main tensor), and kinds of
# calls of one key. Past the first it forgets all, past the second it learns no more.
MOST_KEYS = 1024
MOST_KINDS = 8
# The call of a key at which its launcher is written down. That costs what some ten known calls
# save, and sequences of ever new lengths should not pay for it.
SIGHTINGS = 5
# Instead of a count of sightings, where a launcher does what cannot be written down.
NEVER = -(1 << 60)
# Bytes: as torch aligns what it allocates.
_ALIGNMENT = 512
# The memory of temporaries is allocated in elements of this dtype.
_ROOM = torch.float32

# What a launcher may do with tensors besides launching.
_ALLOCATIONS = frozenset((Tensor.new_empty, torch.empty_like, torch.empty))
_VIEWS = frozenset((Tensor.view, Tensor.unsqueeze, Tensor.as_strided, Tensor.detach))
_QUESTIONS = frozenset(
    (
        Tensor.data_ptr,
        Tensor.element_size,
        Tensor.is_contiguous,
        Tensor.numel,
        Tensor.size,
        Tensor.stride,
        *(
            getattr(Tensor, name).__get__
            for name in ("device", "dtype", "is_cuda", "layout", "nbytes", "ndim", "shape")
        ),
    )
)


class _Place(NamedTuple):
    """Where a tensor of a launcher begins: in which input or allocation, and how many bytes on."""

    kind: str  # "input" or "allocation"
    number: int
    offset: int


class _Notes(TorchFunctionMode):
    """What a launcher does with its inputs, which must be distinct objects."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        # Whether all that the launcher does is written down.
        self.complete = True
        self.allocated: list[Tensor] = []
        self.launched: list[tuple[jit.Launch, tuple[Any, ...]]] = []
        # By the ids of tensors, which all stay alive as long as this does.
        self.places: dict[int, _Place] = {}
        self._alive: list[Tensor] = []
        self._starts: dict[tuple[str, int], int] = {}
        for index, tensor in enumerate(inputs):
            self._begin("input", index, tensor)

    def _begin(self, kind: str, index: int, tensor: Tensor) -> None:
        self._starts[kind, index] = tensor.data_ptr()
        self._put(tensor, _Place(kind, index, 0))

    def _put(self, tensor: Tensor, place: _Place) -> None:
        self.places[id(tensor)] = place
        self._alive.append(tensor)

    def place(self, tensor: object) -> _Place | None:
        return self.places.get(id(tensor))

    def note(self, launch: jit.Launch) -> jit.Launch:
        """What a launcher gets in place of a kernel."""

        def write_down(*args: Any) -> None:
            self.launched.append((launch, args))

        return write_down

    def tell_all(self, outputs: Iterable[Tensor]) -> bool:
        """Whether these notes are enough to do it all again, with these outputs.

        An output is all of an allocation of its own, or has no element.
        """
        places = [self.place(output) for output in outputs if output.numel()]
        arguments = [value for _, args in self.launched for value in args]
        return (
            self.complete
            and len(set(places)) == len(places)
            and all(self._is_whole(output) for output in outputs if output.numel())
            and all(
                self.place(value) is not None and value.dtype in TYPES
                for value in arguments
                if isinstance(value, Tensor)
            )
        )

    def _is_whole(self, tensor: Tensor) -> bool:
        """Whether it is all of an allocation."""
        place = self.place(tensor)
        if place is None or place.kind != "allocation" or place.offset:
            return False
        allocated = self.allocated[place.number]
        return (allocated.shape, allocated.stride()) == (tensor.shape, tensor.stride())

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            self.allocated.append(result)
            self._begin("allocation", len(self.allocated) - 1, result)
        elif function in _VIEWS and self.place(args[0]) is not None:
            base = self.places[id(args[0])]
            offset = result.data_ptr() - self._starts[base.kind, base.number]
            self._put(result, _Place(base.kind, base.number, offset))
        elif function is Tensor.contiguous and result is args[0]:
            pass
        elif function not in _QUESTIONS:
            self.complete = False
        return result


class _Maker(NamedTuple):
    """How an output is allocated."""

    position: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Program:
    """Kernels to launch, with their memory, for inputs of one kind.

    Args:
        inputs: those that the launcher got.
        outputs: what it returned.
        notes: what it did.
        dropped: positions of outputs that nobody will read.
        device: the index of the CUDA device.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        notes: _Notes,
        dropped: Iterable[int],
        device: int,
    ) -> None:
        self.device = device
        self._set_stream = stream_setter()
        self._num_outputs = len(outputs)
        self._makers: list[_Maker] = []
        # Every address is that of an input, an output or the temporaries, in this order, and more.
        starts = {("input", index): (index, 0) for index in range(len(inputs))}
        for position, output in enumerate(outputs):
            if output.numel() and position not in dropped:
                place = notes.places[id(output)]
                starts[place.kind, place.number] = len(inputs) + len(self._makers), 0
                layout = tuple(output.shape), output.stride(), output.dtype
                self._makers.append(_Maker(position, *layout))
        room, size = len(inputs) + len(self._makers), 0
        for index, tensor in enumerate(notes.allocated):
            if ("allocation", index) not in starts:
                starts["allocation", index] = room, size
                size += (max(1, tensor.nbytes) + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        self._room_size = size // _ROOM.itemsize
        self._describe(notes, starts)

    def _describe(self, notes: _Notes, starts: dict[tuple[str, int], tuple[int, int]]) -> None:
        described: dict[tuple[Any, ...], int] = {}
        launches = []
        for launch, args in notes.launched:
            given = list(args)
            for i, value in enumerate(args):
                place = notes.place(value)
                if place is not None:
                    source, start = starts[place.kind, place.number]
                    layout = value.dtype, tuple(value.shape), value.stride()
                    key = source, start + place.offset, *layout
                    given[i] = described.setdefault(key, len(described))
            launches.append((launch, args, given))
        descriptors = Descriptors([key[2:] for key in described], self.device)
        self._descriptors = descriptors
        self._bases = _getter([key[0] for key in described])
        self._offsets = [key[1] for key in described]
        self._launches = [
            (
                launch,
                tuple(
                    descriptors.arguments[new] if notes.place(old) is not None else old
                    for old, new in zip(args, given, strict=True)
                ),
            )
            for launch, args, given in launches
        ]

    def run(self, inputs: Sequence[Tensor], sources: list[int]) -> list[Any]:
        """The outputs; None for one that is dropped or has no element.

        Args:
            inputs: of the kind that this was made for.
            sources: their addresses; those of the outputs are put behind them.
        """
        outputs: list[Any] = [None] * self._num_outputs
        allocate = empty if not is_deterministic() else _like(inputs[0])
        for position, shape, strides, dtype in self._makers:
            made = outputs[position] = allocate(shape, strides, dtype)
            sources.append(made.data_ptr())
        if self._room_size:
            room = allocate((self._room_size,), (1,), _ROOM)
            sources.append(room.data_ptr())
        # In C: a loop over some thirty addresses is a tenth of the whole.
        self._descriptors.addresses[:] = array("Q", map(add, self._bases(sources), self._offsets))
        device, set_stream = self.device, self._set_stream
        before = set_stream(CUDA, device, current_stream(device))
        try:
            for launch, args in self._launches:
                launch(*args)
        finally:
            set_stream(CUDA, device, before)
        return outputs


def _like(tensor: Tensor) -> Callable[..., Tensor]:
    """What allocates on the device of a tensor, by the dispatcher."""
    return lambda shape, strides, dtype: tensor.new_empty_strided(shape, strides, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Calls that a launcher serves in one way."""

    settings: tuple[Any, ...]
    options: tuple[Any, ...]
    present: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    absent: tuple[int, ...]
    is_same: Callable[..., bool]
    requires_grad: bool
    device: int
    whole: Program
    visible: Program


class Call:
    """A call of a known kind: its arguments need no check, and it runs past the dispatcher, once.

    Attributes:
        requires_grad: whether one of its inputs does.
    """

    __slots__ = ("_addresses", "_inputs", "_kind", "requires_grad")

    def __init__(self, kind: _Kind, inputs: tuple[Tensor, ...], addresses: list[int]) -> None:
        self._kind, self._inputs, self._addresses = kind, inputs, addresses
        self.requires_grad = kind.requires_grad

    def run(self) -> list[Any]:
        """What the launcher returns; None for an output without an element."""
        return self._kind.whole.run(self._inputs, self._addresses)

    def run_visible(self) -> list[Any]:
        """The same, without what only a backward would read."""
        return self._kind.visible.run(self._inputs, self._addresses)


class _Memory(threading.local):
    def __init__(self) -> None:
        self.kinds: dict[Any, list[_Kind]] = {}
        self.sightings: dict[Any, int] = {}
        # The kind of the last known call.
        self.last: _Kind | None = None


class Replay:
    """The calls of one operator.

    Args:
        types: of its arguments, as its schema has them.
        launcher: what runs behind the dispatcher's CUDA key.
        hidden: positions of outputs that are made for the backward alone.
    """

    def __init__(
        self, types: Sequence[str], launcher: Callable[..., Any], hidden: Iterable[int]
    ) -> None:
        self._launcher = launcher
        self._hidden = frozenset(hidden)
        self._tensors = [i for i, kind in enumerate(types) if kind.startswith("Tensor")]
        self._options = _getter([i for i in range(len(types)) if i not in self._tensors])
        self._main = types.index("Tensor")
        self._memory = _Memory()

    def find(self, args: tuple[Any, ...]) -> Call | None:
        """The call with these arguments, whatever they are, if it is of a kind that was learned.

        It neither raises nor launches. Not for what torch.compile traces.
        """
        memory = self._memory
        if not memory.kinds or _guards.is_watched():
            return None
        options = self._options(args)
        last = memory.last
        # Layer by layer the same objects come, and what they are need not be looked at.
        if (
            last is not None
            and last.settings == config.settings
            and all(map(is_, options, last.options))
        ):
            call = _call(last, args)
            if call is not None:
                return call
        try:
            kinds = memory.kinds.get((args[self._main].shape, config.settings, options), ())
        except (AttributeError, TypeError):  # no tensor, or an option without a hash
            return None
        for kind in kinds:
            # A dictionary takes True, 1 and 1.0 for the same.
            if [*map(type, options)] == [*map(type, kind.options)]:
                call = _call(kind, args)
                if call is not None:
                    memory.last = kind
                    return call
        return None

    def learn(self, args: tuple[Any, ...]) -> Call | None:
        """The call with these arguments, which were checked; None if it is to go by the dispatcher.

        The first calls with such options and such a shape do, and all that no program can serve.
        """
        if (
            not is_on_gpu(args[self._main])
            or _guards.is_watched()
            or _guards.transforms_active()
            or _guards.is_traced()
            or _device.limits_of(current_device()) is None
        ):
            return None
        options = self._options(args)
        memory = self._memory
        key = args[self._main].shape, config.settings, options
        sightings = memory.sightings.get(key, 0) + 1
        if sightings == 1 and len(memory.sightings) >= MOST_KEYS:
            self.forget()
        memory.sightings[key] = sightings
        kinds = memory.kinds.setdefault(key, [])
        if sightings < SIGHTINGS or len(kinds) >= MOST_KINDS or not self._can_be_found(args):
            return None
        kind = self._study(args, options)
        if kind is None:
            # Nor will the next launcher's work be all that can be written down.
            memory.sightings[key] = NEVER
            return None
        kinds.append(kind)
        return self.find(args)

    def _can_be_found(self, args: Sequence[Any]) -> bool:
        """Whether `find` could give a call with such tensors."""
        given = [args[i] for i in self._tensors if args[i] is not None]
        return (
            all(map(_is_plain, given))
            and len(set(map(id, given))) == len(given)
            and given[0].get_device() == current_device()
            and all(tensor.data_ptr() >= errors.FREED for tensor in given)
            and not any(tensor.data_ptr() % errors.ALIGNMENT for tensor in given)
        )

    def forget(self) -> None:
        """Drop what this thread has learned."""
        self._memory.sightings.clear()
        self._memory.kinds.clear()
        self._memory.last = None

    def _study(self, args: tuple[Any, ...], options: tuple[Any, ...]) -> _Kind | None:
        positions = [i for i in self._tensors if args[i] is not None]
        given = [args[i] for i in positions]
        device = current_device()
        # Distinct objects, in whose views autograd has no part.
        inputs = [tensor.detach() for tensor in given]
        replaced: list[Any] = list(args)
        for i, tensor in zip(positions, inputs, strict=True):
            replaced[i] = tensor
        with torch.no_grad(), _Notes(inputs) as notes, jit.noted(notes.note):
            result = self._launcher(*replaced)
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        if not notes.tell_all(outputs):
            return None
        whole = Program(inputs, outputs, notes, (), device)
        visible = Program(inputs, outputs, notes, self._hidden, device) if self._hidden else whole
        return _Kind(
            settings=config.settings,
            options=options,
            present=_getter(positions),
            absent=tuple(i for i in self._tensors if args[i] is None),
            is_same=_guards.same_kind(given),
            requires_grad=any(tensor.requires_grad for tensor in given),
            device=device,
            whole=whole,
            visible=visible,
        )


def _getter(positions: Sequence[int]) -> Callable[..., tuple[Any, ...]]:
    """A function that takes these items of a tuple, as a tuple."""
    start = positions[0] if positions else 0
    if positions == [*range(start, start + len(positions))]:
        # Of a list this would be a list.
        return itemgetter(slice(start, start + len(positions)))
    return itemgetter(*positions)


def _call(kind: _Kind, args: tuple[Any, ...]) -> Call | None:
    """The call of a kind with these tensors; None where they, memory or device are not its own."""
    inputs = kind.present(args)
    if not kind.is_same(*inputs):
        return None
    for i in kind.absent:
        if args[i] is not None:
            return None
    addresses = [*map(Tensor.data_ptr, inputs)]
    if (
        reduce(or_, addresses) % errors.ALIGNMENT
        or min(addresses) < errors.FREED
        or current_device() != kind.device
    ):
        return None
    return Call(kind, inputs, addresses)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and is_on_gpu(tensor)
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and not tensor.is_neg()
    )


def is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


# As names of this module, which tests replace. Absent from a torch that was built without CUDA,
# where no tensor is on a GPU.
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
empty = _memory.empty_on_gpu
