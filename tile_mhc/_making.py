"""The replay of a recompute group: as few launches as its tensors take; see `_recompute_group`."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors
from tile_mhc._made import OP, Input, Made, Root, Source, Streams, View, unpack
from tile_mhc.ops import post as post_op
from tile_mhc.ops import recompute as recompute_op
from tile_mhc.ops._library import aligned

Allocate = Callable[[torch.Size, torch.dtype, torch.device], Tensor]


class Launches:
    """Makes tensors again, in the order of the forward, as many as it can by one launch.

    A launch takes streams, and for each layer a pre_mix and what a post takes; the last layer may
    be without a post.
    """

    def __init__(self, allocate: Allocate | None) -> None:
        self._allocate = allocate
        self._others: list[torch.cuda.Stream] = []
        self._stream: torch.cuda.Stream | None = None
        self._roots: list[Root] = []
        # Of each launch, by their shape: tensors of the dtype and device of the streams.
        self._likes: dict[torch.Size, Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        # The streams that the last layer so far leaves, or that the first begins with.
        self._tail: Source | None = None
        self._likes.clear()
        self._unread: Tensor | None = None
        self._pre_mixes: list[Tensor] = []
        # What pre_mixes are to be made of, with their positions.
        self._gates: dict[Any, list[tuple[int, tuple[Tensor, ...]]]] = {}
        self._posts: list[Sequence[Tensor]] = []
        self._layer_inputs: list[Tensor] = []
        self._residuals: list[Tensor] = []
        # With their destinations: they have no value before the launch.
        self._pending: list[tuple[Made, Tensor]] = []

    def follow(self, streams: Sequence[torch.cuda.Stream]) -> None:
        """Wait for the streams of the forward: this may be a node of only one of them."""
        self._stream = torch.cuda.current_stream()
        self._others = [stream for stream in streams if stream != self._stream]
        for stream in self._others:
            self._stream.wait_stream(stream)

    def make(self, made: Made) -> None:
        if isinstance(made, Input):
            self._make_input(made)
        elif isinstance(made, Streams):
            self._make_streams(made)

    def _make_input(self, made: Input) -> None:
        gates = list(map(self.resolve, made.gates))
        # One aggregate a layer.
        if made.source is not self._tail or len(self._pre_mixes) > len(self._posts):
            self._begin(made.source)
        if len(gates) == 1:
            self._pre_mixes.append(self._shaped(gates[0], self._of_mix))
        else:
            mixes, scale, bias = gates
            given = self._shaped(mixes, self._of_mixes), _aligned(scale), _aligned(bias)
            key = scale.dtype, bias.dtype, made.pre_eps
            self._gates.setdefault(key, []).append((len(self._pre_mixes), given))
            self._pre_mixes.append(mixes)  # until the launch
        self._layer_inputs.append(self._destination(made, self._of_output))

    def _make_streams(self, made: Streams) -> None:
        layer_output, post_mix, comb_mix, bias = map(self._resolve_any, made.packed)
        if made.source is not self._tail or bias is not None:
            self._begin(made.source)
        layer_output = self._shaped(layer_output, self._of_output)
        post_mix = self._shaped(post_mix, self._of_mix)
        comb_mix = self._shaped(comb_mix, self._of_comb)
        of_streams = self._initial.shape
        if bias is not None:
            # The kernel of `recompute` has none.
            out = self._destination(made, of_streams)
            post_op.post(layer_output, self._initial, post_mix, comb_mix, bias=bias, out=out)
            self._settle()
            return
        if len(self._pre_mixes) == len(self._posts):
            # Nobody wants the layer input: it goes where nobody reads, by whatever weights.
            if self._unread is None:
                self._unread = torch.empty_like(layer_output)
            self._pre_mixes.append(post_mix)
            self._layer_inputs.append(self._unread)
        self._posts.append((layer_output, post_mix, comb_mix))
        self._residuals.append(self._destination(made, of_streams))
        self._tail = made

    def resolve(self, packed: Any) -> Tensor:
        """A tensor that something is made of; where that waits for the launch, launch."""
        made = packed.made if type(packed) is View else packed
        if isinstance(made, Made) and made.value is None and self._is_pending(made):
            self.run()
        tensor = unpack(packed)
        if self._others and self._stream is not None and tensor.is_cuda:
            tensor.record_stream(self._stream)
        return tensor

    def _is_pending(self, made: Made) -> bool:
        return any(other is made for other, _ in self._pending)

    def _resolve_any(self, packed: Any) -> Any:
        return None if packed is None else self.resolve(packed)

    def _begin(self, source: Source) -> None:
        """Another launch, that begins with these streams."""
        self.run()
        if isinstance(source, Root):
            if source.value is None:
                source.value = self.resolve(source.packed)
                self._roots.append(source)
            streams = source.value
        else:
            streams = source.get()
        self._tail = source
        self._initial = _aligned(streams.contiguous())
        *lead, n, hidden_size = streams.shape
        # Of what belongs to these streams, by what it is.
        self._of_output = torch.Size((*lead, hidden_size))
        self._of_mix, self._of_comb = torch.Size((*lead, n)), torch.Size((*lead, n, n))
        self._of_mixes = torch.Size((*lead, n * (n + 2)))

    def _shaped(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """As the launch takes it: of the streams' leading dimensions, contiguous, aligned."""
        if tensor.shape != shape or not tensor.is_contiguous():
            tensor = tensor.contiguous().view(shape)
        return _aligned(tensor)

    def _destination(self, made: Made, shape: torch.Size) -> Tensor:
        if self._allocate is not None:
            room = _checked(self._allocate(made.shape, made.dtype, made.device), made)
        elif made.shape in self._likes:
            # A third of the host's time of an allocation by its shape.
            room = torch.empty_like(self._likes[made.shape])
        else:
            room = torch.empty(made.shape, dtype=made.dtype, device=made.device)
            self._likes[made.shape] = room
        self._pending.append((made, room))
        return room if made.shape == shape else room.view(shape)

    def run(self) -> None:
        """Launch what has been gathered."""
        if self._residuals or self._layer_inputs:
            for (*_, pre_eps), found in self._gates.items():
                positions, gates = zip(*found, strict=True)
                mixes, scales, biases = (list(column) for column in zip(*gates, strict=True))
                pre_mixes = recompute_op.pre_mixes(self._initial, mixes, scales, biases, pre_eps)
                for position, pre_mix in zip(positions, pre_mixes.unbind(), strict=True):
                    self._pre_mixes[position] = pre_mix
            columns = [list(column) for column in zip(*self._posts, strict=True)]
            posts = (columns[0], columns[1], columns[2]) if columns else ([], [], [])
            if self._allocate is not None:
                given = [self._initial, *self._pre_mixes, *itertools.chain(*posts)]
                recompute_op.check_destinations([room for _, room in self._pending], given)
            recompute_op.launch(
                self._initial,
                self._pre_mixes,
                *posts,
                layer_inputs=self._layer_inputs,
                residuals=self._residuals,
            )
        self._settle()

    def _settle(self) -> None:
        """What was pending is made: the destinations are the values."""
        for made, room in self._pending:
            made.value, made.value_version, made.stream = room, room._version, self._stream
        self._clear()

    def forget_roots(self) -> None:
        """They stay as they are packed."""
        for root in self._roots:
            root.value = None


def _checked(room: object, made: Made) -> Tensor:
    """A destination of the caller's."""
    name = "what allocate returns"
    like = torch.empty(made.shape, dtype=made.dtype, device=made.device)
    tensor = errors.require_tensor(OP, name, room)
    errors.check_tensor(OP, name, tensor, [made.shape], made.dtype, ("what was asked for", like))
    errors.check_contiguous(OP, name, tensor)
    errors.check_aligned(OP, name, tensor, errors.ALIGNMENT)
    return tensor


def _aligned(tensor: Tensor) -> Tensor:
    return aligned(OP, "a tensor that the group keeps", tensor) if tensor.is_cuda else tensor
