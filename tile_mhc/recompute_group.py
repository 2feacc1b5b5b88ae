"""Recompute groups: streams and layer inputs are made again in the backward, by one launch.

Inside a group `torch.autograd.graph.saved_tensors_hooks` decide what autograd keeps. The ops tell
the group what they make (`ops/_group.py`), and of what: a `_Made` is one of those tensors without
its memory. When anything saves that tensor, or a view of it, autograd is given the `_Made` instead.
It knows the tensor by its storage, of which the group has a weak reference, so that no other
storage can be taken for it. Every other tensor is kept as it is, with its version.

    graph node -> _Made -> what it was made of: streams (_Made or _Root), layer output, mixes

Nothing points the other way but weak references, once the group is closed. So what is kept lives as
long as the nodes that need it, and a group of which the graph is gone holds nothing.

On the first need all tensors of the group that are still wanted are made, in the order of the
forward: `_Launches` gives as many of them as it can to one launch of `recompute`. They live until
their nodes are done, or to the end of that backward, where the graph is retained.

Relies on these private names of torch, each tested in tests/cpu/test_recompute_group.py:

- `_C._autograd._top_saved_tensors_default_hooks`, the hooks that are in force in this thread;
- `multiprocessing.reductions.StorageWeakRef`, and `UntypedStorage._cdata`, what it compares.
"""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from tile_mhc import _backward, _guards, errors
from tile_mhc.ops import _replay
from tile_mhc.ops import mixes as mixes_op
from tile_mhc.ops import post as post_op
from tile_mhc.ops import recompute as recompute_op
from tile_mhc.ops._group import active

OP = "recompute_group"
_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks

Allocate = Callable[[torch.Size, torch.dtype, torch.device], Tensor]


def recompute_group() -> "RecomputeGroup":
    """Keep the memory of many sub-layers out of the graph, for one launch in the backward.

        with tile_mhc.recompute_group():
            for connection, layer in zip(connections, layers):
                streams = connection(streams, layer)

    Of what `fused_pre`, `post`, `post_pre` and `aggregate` make inside, by whatever module,
    autograd keeps the first streams, the layers' outputs and the mixes. The streams between, and
    the layers' inputs, are dropped, whoever saves them: the ops, or the norm and the linear map of
    a layer, as they are or as views. The first node of the backward that needs one makes all of
    the group again, by one launch of `recompute`; they are freed as the backward passes them. No
    layer runs again. The gradients have the same bits as without a group.

    What a layer makes of its input is kept as ever, and so is what the layers save inside of
    `torch.utils.checkpoint`. A group around sub-layers may itself be in a checkpoint, in other
    hooks of saved tensors (`save_on_cpu`) or in another group: what it keeps goes to those. A group
    of L sub-layers needs, in its backward, the memory that L sub-layers need without; between
    forward and backward, that of one stream tensor and L layer outputs.

    A backward that retains the graph makes the group again in the next one.

    Returns:
        A group, for use as a context, once.

    Raises:
        UnsupportedError: on entering it inside a transform of torch.func, which takes no hooks.
        RecomputeError: on entering it twice, or leaving it in another order or thread; in backward,
            if what it kept was changed in place since, or if it was left by an exception.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.2.
    """
    return RecomputeGroup()


class RecomputeGroup:
    """What `recompute_group` returns. `with group:` is one `part`, and `close`."""

    def __init__(self) -> None:
        self._hooks: saved_tensors_hooks | None = None
        self._thread = 0
        self._closed = False
        self._failed = False
        # What the hooks around this group do, where there are any.
        self._outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = None
        self._before: RecomputeGroup | None = None
        # While it is open, by the address of the storage, which the weak references hold.
        self._made: dict[int, _Made] = {}
        self._roots: dict[tuple[Any, ...], _Root] = {}
        self._storages: list[StorageWeakRef] = []
        # All of it, in the order of the forward.
        self._all: list[weakref.ref[_Made]] = []
        # The streams of a GPU on which it was made, by device and address.
        self._streams: dict[tuple[int, int], torch.cuda.Stream] = {}
        # Whether there is something that no backward has been asked to drop at its end.
        self._holds = False
        self._lock = threading.RLock()

    def __enter__(self) -> "RecomputeGroup":
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(error)
        if not self._closed:
            self.close()

    @contextlib.contextmanager
    def part(self) -> Iterator["RecomputeGroup"]:
        """A stretch of the forward, for who cannot put a `with` around all: a layer, for instance.

        One part after another belongs to the group, until `close`. An exception that leaves a part
        closes the group, and frees what it holds.
        """
        self._begin()
        try:
            yield self
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def close(self) -> None:
        """The forward of the group has ended: only the graph holds what it keeps.

        Raises:
            RecomputeError: it is closed, or a part of it is open.
        """
        if self._closed or self._hooks is not None:
            what = "closed already" if self._closed else "open"
            raise errors.RecomputeError(
                f"{OP}: close must be called once, outside of its blocks; got a group that is "
                f"{what}. `with group:` closes it, too"
            )
        self._closed = True
        self._made.clear()
        self._roots.clear()
        self._storages.clear()

    def replay(self, allocate: Allocate | None = None) -> None:
        """Make the group again now, before a backward needs it, on the current stream.

        For schedulers: the launch can run beside communication, or into memory of the caller's.
        What is made already, or not wanted any more, is not made again. A backward on another
        stream waits for this one.

        Args:
            allocate: called with the shape, the dtype and the device of each tensor to be made, in
                the order of the forward (of a sub-layer the layer input (..., H), then the streams
                (..., n, H)): returns its destination, contiguous. What the caller writes to it
                before the backward has used it is an error there.

        Raises:
            RecomputeError: the group was left by an exception, or what it kept was changed in
                place.
            ShapeError: a destination is not as asked for, or shares memory with another tensor.
        """
        for device in {made.device for made in self._alive()}:
            self._replay(device, allocate)

    def _begin(self) -> None:
        if self._closed or self._hooks is not None:
            what = "closed" if self._closed else "open"
            raise errors.RecomputeError(
                f"{OP}: a group must be entered once; got one that is {what} already. Make another "
                "for the sub-layers that follow; `part` is for several blocks of one group"
            )
        if _guards.transforms_active():
            raise errors.UnsupportedError(
                f"{OP}: must be entered outside of the transforms of torch.func, which take no "
                "hooks of saved tensors; got one inside. Use torch.autograd.grad, or no group"
            )
        self._outer = _top_hooks(True)
        hooks = saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._hooks, self._thread = hooks, threading.get_ident()
        self._before, active.group = active.group, self

    def _end(self, error: BaseException | None) -> None:
        if self._hooks is None:
            raise errors.RecomputeError(
                f"{OP}: a group must be left once; got one that is not open"
            )
        if self._thread != threading.get_ident() or not self._is_on_top():
            raise errors.RecomputeError(
                f"{OP}: a group must be left in the thread that entered it, and before hooks of "
                "saved tensors, groups too, that were entered before it; got another order"
            )
        hooks, self._hooks = self._hooks, None
        hooks.__exit__(None, None, None)
        self._outer = None
        active.group, self._before = self._before, None
        if error is not None:
            self._failed = True
            for made in self._alive():
                made.forget()
            self.close()

    def _is_on_top(self) -> bool:
        """Whether what is saved now comes to this group, and not to a checkpoint inside of it."""
        top = _top_hooks(True)
        return top is not None and getattr(top[0], "__self__", None) is self

    # What the ops tell it.

    def made_streams(
        self,
        streams: Tensor,
        layer_output: Tensor,
        residual: Tensor,
        post_mix: Tensor,
        comb_mix: Tensor,
        bias: Tensor | None,
    ) -> None:
        """The streams are post(layer_output, residual, post_mix, comb_mix, bias=bias)."""
        if self._takes(streams):
            kept = None if bias is None else self._keep(bias)
            mixes = self._keep(post_mix), self._keep(comb_mix)
            source = self._source(residual)
            self._add(streams, _Streams(self, source, self._keep(layer_output), *mixes, kept))

    def made_input(self, layer_input: Tensor, residual: Tensor, pre_mix: Tensor) -> None:
        """The layer input is aggregate(residual, pre_mix)."""
        if self._takes(layer_input):
            pre = _PreMix(self._keep(pre_mix))
            self._add(layer_input, _Input(self, self._source(residual), pre))

    def made_input_by(
        self,
        layer_input: Tensor,
        residual: Tensor,
        mixes: Tensor,
        scale: Tensor,
        bias: Tensor,
        pre_eps: float,
    ) -> None:
        """As `made_input`, with the pre_mix of split_mixes(mixes, scale, bias, pre_eps=pre_eps)."""
        if self._takes(layer_input):
            gates = self._keep(mixes), self._keep(scale), self._keep(bias)
            pre = _PreMixOf(*gates, residual.shape[-2], pre_eps)
            self._add(layer_input, _Input(self, self._source(residual), pre))

    def _takes(self, made: Tensor) -> bool:
        """Whether the tensor is one that its storage tells from all others."""
        return (
            type(made) is Tensor
            and self._is_on_top()
            and not _guards.transforms_active()
            and not _guards.is_traced()
            and made.is_contiguous()
            and not made.storage_offset()
            and made.untyped_storage().nbytes() == made.nbytes
        )

    def _add(self, tensor: Tensor, made: "_Made") -> None:
        made.shape, made.stride = tensor.shape, tensor.stride()
        made.dtype, made.device, made.version = tensor.dtype, tensor.device, tensor._version
        storage = tensor.untyped_storage()
        self._storages.append(StorageWeakRef(storage))
        self._made[storage._cdata] = made
        self._all.append(weakref.ref(made))
        if tensor.is_cuda:
            index = tensor.get_device()
            key = index, _replay.current_stream(index)
            if key not in self._streams:
                self._streams[key] = torch.cuda.current_stream(index)

    def _source(self, residual: Tensor) -> "_Source":
        """The streams that an op read."""
        storage = residual.untyped_storage()
        made = self._made.get(storage._cdata)
        if made is not None and made.is_all(residual):
            return made
        key = (
            storage._cdata,
            residual.storage_offset(),
            residual._version,
            residual.shape[-2:],
            residual.numel(),
        )
        root = self._roots.get(key)
        if root is None:
            self._storages.append(StorageWeakRef(storage))
            root = self._roots[key] = _Root(self._keep(residual))
        return root

    # The hooks.

    def _pack(self, tensor: Tensor) -> Any:
        """What autograd keeps of a tensor; autograd may hold a lock, and nothing runs here."""
        if type(tensor) is Tensor:
            made = self._made.get(tensor.untyped_storage()._cdata)
            if made is not None and made.version == tensor._version and made.dtype == tensor.dtype:
                layout = tensor.shape, tensor.stride(), tensor.storage_offset()
                if layout == (made.shape, made.stride, 0):
                    return made
                if not tensor.is_neg():
                    return _View(made, *layout)
        if self._outer is not None:
            pack, unpack = self._outer
            return _Outer(unpack, pack(tensor))
        # An output of the node that saves it would hold the node.
        return tensor if tensor.is_leaf else tensor.detach(), tensor._version

    _keep = _pack

    # The replay.

    def _alive(self) -> list["_Made"]:
        return [made for made in (reference() for reference in self._all) if made is not None]

    def _replay(self, device: torch.device, allocate: Allocate | None = None) -> None:
        """Make what is wanted and not there on a device."""
        if self._failed:
            raise errors.RecomputeError(
                f"{OP}: a group must be left without an exception for its backward; got one that "
                "an exception has left, which freed what it kept. Run its forward again"
            )
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with self._lock, torch.no_grad(), on_device:
            launches = _Launches(allocate)
            if device.type == "cuda":
                launches.follow([s for (i, _), s in self._streams.items() if i == device.index])
            self._holds = True
            try:
                for made in self._alive():
                    if made.value is None and made.device == device:
                        launches.make(made)
                launches.run()
            finally:
                launches.forget_roots()

    def use(self, made: "_Made") -> None:
        """A backward, or who looks at the graph, needs the tensor."""
        if made.value is None:
            with self._lock:
                if made.value is None:
                    self._replay(made.device)
        if self._holds and _backward.task() != _backward.NO_TASK:
            self._holds = False
            _backward.at_end(self._drop)

    def _drop(self) -> None:
        """At the end of a backward: who retains the graph does not retain this."""
        with self._lock:
            for made in self._alive():
                made.value = None


class _Made:
    """A tensor that the group makes again.

    Attributes:
        group: the group.
        source: the streams that it was made of.
        shape: its shape.
        stride: its strides; it starts where its storage does.
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
        "stride",
        "value",
        "value_version",
        "version",
    )

    # Of the shape: a layer input has one dimension behind those of the tokens, streams have two.
    dims: ClassVar[int]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    version: int

    def __init__(self, group: RecomputeGroup, source: "_Source") -> None:
        self.group = group
        self.source = source
        self.value: Tensor | None = None
        self.value_version = 0
        self.stream: torch.cuda.Stream | None = None

    def is_all(self, tensor: Tensor) -> bool:
        """Whether a contiguous tensor of the same storage is this, by any leading dimensions."""
        return (
            self.version == tensor._version
            and self.dtype == tensor.dtype
            and self.shape[-2:] == tensor.shape[-2:]
            and self.shape.numel() == tensor.numel()
        )

    def get(self) -> Tensor:
        """The tensor, made again."""
        if self.value is None or self.group._holds:
            self.group.use(self)
        value = self.value
        if value is None:
            raise RuntimeError(f"{OP}: a replay left out {tuple(self.shape)}")
        if value._version != self.value_version:
            raise _changed(value, self.value_version, "what a replay has made")
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


class _Input(_Made):
    """A layer input: aggregate(source, pre_mix)."""

    __slots__ = ("pre_mix",)
    dims = 1

    def __init__(
        self,
        group: RecomputeGroup,
        source: "_Source",
        pre_mix: "_PreMix | _PreMixOf",
    ) -> None:
        super().__init__(group, source)
        self.pre_mix = pre_mix

    def forget(self) -> None:
        super().forget()
        self.pre_mix = _PreMix(None)


class _Streams(_Made):
    """Streams: post(layer_output, source, post_mix, comb_mix, bias), all of them packed."""

    __slots__ = ("packed",)
    dims = 2

    def __init__(self, group: RecomputeGroup, source: "_Source", *packed: Any) -> None:
        super().__init__(group, source)
        self.packed = packed

    def forget(self) -> None:
        super().forget()
        self.packed = ()


class _PreMix:
    """A pre_mix, packed."""

    def __init__(self, pre_mix: Any) -> None:
        self.pre_mix = pre_mix

    def get(self, launches: "_Launches") -> Tensor:
        return launches.resolve(self.pre_mix)


class _PreMixOf:
    """A pre_mix that an op made and did not keep: that of split_mixes, whose inputs are packed."""

    def __init__(self, mixes: Any, scale: Any, bias: Any, num_streams: int, eps: float) -> None:
        self.gates = mixes, scale, bias
        self.num_streams, self.eps = num_streams, eps

    def get(self, launches: "_Launches") -> Tensor:
        gates = [launches.resolve(packed) for packed in self.gates]
        return mixes_op.pre_mix_of(*gates, self.num_streams, self.eps)


class _Root:
    """Streams that something else made, packed."""

    __slots__ = ("packed", "value")

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.value: Tensor | None = None


_Source = _Made | _Root
_NOTHING = _Root(None)


class _View:
    """A view of a tensor that the group makes again."""

    __slots__ = ("layout", "made")

    def __init__(self, made: _Made, *layout: Any) -> None:
        self.made, self.layout = made, layout

    def get(self) -> Tensor:
        return self.made.get().as_strided(*self.layout)


class _Outer:
    """What the hooks around the group have packed."""

    __slots__ = ("packed", "unpack")

    def __init__(self, unpack: Callable[[Any], Tensor], packed: Any) -> None:
        self.unpack, self.packed = unpack, packed

    def get(self) -> Tensor:
        return self.unpack(self.packed)


def _unpack(packed: Any) -> Tensor:
    if type(packed) is tuple:
        tensor, version = packed
        if tensor._version != version:
            raise _changed(tensor, version, "a tensor that the backward needs")
        return tensor  # type: ignore[no-any-return]
    return packed.get()  # type: ignore[no-any-return]


def _changed(tensor: Tensor, version: int, what: str) -> errors.RecomputeError:
    return errors.RecomputeError(
        f"{OP}: {what} must be as it was when it was saved, at version {version}; got "
        f"{errors.describe(tensor)} at version {tensor._version}, which an operation in place has "
        "changed. Give that operation a copy"
    )


class _Launches:
    """Makes tensors again, in the order of the forward, as many as it can by one launch.

    A launch takes streams, and for each layer a pre_mix and what a post takes; the last layer may
    be without a post.
    """

    def __init__(self, allocate: Allocate | None) -> None:
        self._allocate = allocate
        self._others: list[torch.cuda.Stream] = []
        self._stream: torch.cuda.Stream | None = None
        self._roots: list[_Root] = []
        self._scratch: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        # The streams that the last layer so far leaves, or that the first begins with.
        self._tail: _Source | None = None
        self._pre_mixes: list[Tensor] = []
        self._posts: list[Sequence[Tensor]] = []
        self._layer_inputs: list[Tensor] = []
        self._residuals: list[Tensor] = []
        # With their destinations: they have no value before the launch.
        self._pending: list[tuple[_Made, Tensor]] = []

    def follow(self, streams: Sequence["torch.cuda.Stream"]) -> None:
        """Wait for the streams of the forward: this may be a node of only one of them."""
        self._stream = torch.cuda.current_stream()
        self._others = [stream for stream in streams if stream != self._stream]
        for stream in self._others:
            self._stream.wait_stream(stream)

    def make(self, made: _Made) -> None:
        if isinstance(made, _Input):
            self._make_input(made)
        elif isinstance(made, _Streams):
            self._make_streams(made)

    def _make_input(self, made: _Input) -> None:
        pre_mix = made.pre_mix.get(self)
        # One aggregate a layer.
        if made.source is not self._tail or len(self._pre_mixes) > len(self._posts):
            self._begin(made.source)
        self._pre_mixes.append(self._rows(pre_mix, self._num_streams))
        self._layer_inputs.append(self._destination(made))

    def _make_streams(self, made: _Streams) -> None:
        layer_output, post_mix, comb_mix, bias = map(self._resolve_any, made.packed)
        if made.source is not self._tail or bias is not None:
            self._begin(made.source)
        layer_output = self._rows(layer_output, self._hidden_size)
        post_mix = self._rows(post_mix, self._num_streams)
        comb_mix = self._rows(comb_mix, self._num_streams, self._num_streams)
        if bias is not None:
            # The kernel of `recompute` has none.
            out = self._destination(made)
            post_op.post(layer_output, self._initial, post_mix, comb_mix, bias=bias, out=out)
            self._settle()
            return
        if len(self._pre_mixes) == len(self._posts):
            # Nobody wants the layer input: it goes where nobody reads, by whatever weights.
            if self._scratch is None:
                self._scratch = torch.empty_like(layer_output)
            self._pre_mixes.append(post_mix)
            self._layer_inputs.append(self._scratch)
        self._posts.append((layer_output, post_mix, comb_mix))
        self._residuals.append(self._destination(made))
        self._tail = made

    def resolve(self, packed: Any) -> Tensor:
        """A tensor that something is made of; where that waits for the launch, launch."""
        made = packed.made if type(packed) is _View else packed
        if isinstance(made, _Made) and made.value is None and self._is_pending(made):
            self.run()
        tensor = _unpack(packed)
        if self._others and tensor.is_cuda:
            tensor.record_stream(self._stream)
        return tensor

    def _is_pending(self, made: _Made) -> bool:
        return any(other is made for other, _ in self._pending)

    def _resolve_any(self, packed: Any) -> Any:
        return None if packed is None else self.resolve(packed)

    def _begin(self, source: _Source) -> None:
        """Another launch, that begins with these streams."""
        self.run()
        if isinstance(source, _Root):
            if source.value is None:
                source.value = self.resolve(source.packed)
                self._roots.append(source)
            streams = source.value
        else:
            streams = source.get()
        self._tail = source
        self._num_streams, self._hidden_size = streams.shape[-2:]
        self._initial = _aligned(streams.contiguous().view(-1, *streams.shape[-2:]))

    def _rows(self, tensor: Tensor, *shape: int) -> Tensor:
        """One row a token, as `recompute` takes it."""
        shape = (self._initial.shape[0], *shape)
        if tensor.shape != shape or not tensor.is_contiguous():
            tensor = tensor.contiguous().view(shape)
        return _aligned(tensor)

    def _destination(self, made: _Made) -> Tensor:
        if self._allocate is None:
            room = torch.empty(made.shape, dtype=made.dtype, device=made.device)
        else:
            room = _checked(self._allocate(made.shape, made.dtype, made.device), made)
        self._pending.append((made, room))
        return room.view(self._initial.shape[0], *made.shape[-made.dims :])

    def run(self) -> None:
        """Launch what has been gathered."""
        if self._residuals or self._layer_inputs:
            posts = [list(column) for column in zip(*self._posts, strict=True)] or [[], [], []]
            if self._allocate is not None:
                given = [self._initial, *self._pre_mixes, *itertools.chain(*posts)]
                recompute_op.check_destinations([room for _, room in self._pending], given)
            destinations = self._layer_inputs, self._residuals
            recompute_op.launch(self._initial, self._pre_mixes, *posts, *destinations)
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


def _checked(room: object, made: _Made) -> Tensor:
    """A destination of the caller's."""
    name = "what allocate returns"
    like = torch.empty(made.shape, dtype=made.dtype, device=made.device)
    tensor = errors.require_tensor(OP, name, room)
    errors.check_tensor(OP, name, tensor, [made.shape], made.dtype, ("what was asked for", like))
    errors.check_contiguous(OP, name, tensor)
    errors.check_aligned(OP, name, tensor, errors.ALIGNMENT)
    return tensor


def _aligned(tensor: Tensor) -> Tensor:
    """A kernel that knows a tensor by its address trusts it to start as an allocation does."""
    if tensor.is_cuda and tensor.data_ptr() % errors.ALIGNMENT:
        return tensor.clone()
    return tensor
