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
- `_C._autograd._get_current_graph_task_keep_graph`, whether the backward that runs in this thread
  retains its graph;
- `UntypedStorage._weak_ref` and `_free_weak_ref`, as multiprocessing.reductions.StorageWeakRef has
  them, and `_cdata`, the address that no other storage has as long as there is a weak reference.
"""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tile_mhc import _backward, _guards, errors
from tile_mhc.ops import _replay
from tile_mhc.ops import post as post_op
from tile_mhc.ops import recompute as recompute_op
from tile_mhc.ops._group import active

OP = "recompute_group"
_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
_free_weak_ref: Any = torch.UntypedStorage._free_weak_ref
_is_transforming: Any = torch._C._are_functorch_transforms_active
_tracing_state: Any = torch._C._get_tracing_state
_keeps_graph: Any = torch._C._autograd._get_current_graph_task_keep_graph

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


def has_hooks() -> bool:
    """Whether what is saved now goes through hooks, of a group or of something else."""
    return _top_hooks(True) is not None


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
        self._storages: list[int] = []
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
        self._free()

    def _free(self) -> None:
        self._made.clear()
        self._roots.clear()
        while self._storages:
            _free_weak_ref(self._storages.pop())

    def __del__(self) -> None:
        self._free()

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

    # What ops say where they save for their backward: what is to be saved, and what they make.

    def after_post(self, ctx: Any, inputs: Sequence[Tensor | None], streams: Tensor) -> None:
        """Save the inputs of `post`, which makes the streams."""
        kept = self._save(ctx, inputs, (0, 1), (0, 2, 3, 4))
        if kept is not None:
            source = self._source(inputs[1], kept[1])
            self._add(streams, _Streams(self, source, kept[0], *kept[2:]))

    def after_aggregate(self, ctx: Any, inputs: Sequence[Tensor], layer_input: Tensor) -> None:
        """Save the inputs of `aggregate`, which makes the layer input."""
        kept = self._save(ctx, inputs, (0,), (1,))
        if kept is not None:
            self._add(layer_input, _Input(self, self._source(inputs[0], kept[0]), kept[1:2]))

    def after_fused_pre(
        self, ctx: Any, saved: Sequence[Tensor | None], layer_input: Tensor, pre_eps: float
    ) -> None:
        """Save residual, weight, scale, bias, norm_weight, mixes and inv_rms of `fused_pre`.

        The layer input is by the pre_mix of split_mixes(mixes, scale, bias, pre_eps=pre_eps).
        """
        kept = self._save(ctx, saved, (0,), (2, 3, 5))
        if kept is not None:
            gates = kept[5], kept[2], kept[3]
            made = _Input(self, self._source(saved[0], kept[0]), gates, pre_eps)
            self._add(layer_input, made)

    def after_delayed_pre(
        self, ctx: Any, saved: Sequence[Tensor | None], layer_input: Tensor
    ) -> None:
        """Save what `fused_pre` with a pre_mix does: as the fourth its pre_mix."""
        kept = self._save(ctx, saved, (0,), (4,))
        if kept is not None:
            self._add(layer_input, _Input(self, self._source(saved[0], kept[0]), kept[4:5]))

    def after_post_pre(
        self, ctx: Any, saved: Sequence[Tensor | None], layer_input: Tensor, pre_eps: float
    ) -> None:
        """Save the ten inputs with a gradient of `post_pre`, its streams, mixes and inv_rms."""
        streams, pre_mix = saved[10], saved[7]
        kept = self._save(ctx, saved, (0, 1), (0, 2, 3, 5, 6, 7, 8, 11), output=10)
        if kept is None:
            return
        source = self._source(saved[1], kept[1])
        made = _Streams(self, source, kept[0], kept[2], kept[3], kept[8])
        if not self._add(streams, made):
            return
        if ctx.kept is not None:
            ctx.kept.packed[10] = made
        if pre_mix is None:
            self._add(layer_input, _Input(self, made, (kept[11], kept[5], kept[6]), pre_eps))
        else:
            self._add(layer_input, _Input(self, made, kept[7:8]))

    def _save(
        self,
        ctx: Any,
        tensors: Sequence[Tensor | None],
        streams: Sequence[int],
        used: Sequence[int],
        output: int | None = None,
    ) -> list[Any] | None:
        """Save for a node of ours, past the hooks, which take the host ten times as long.

        Args:
            ctx: the node's.
            tensors: what its backward reads.
            streams: the positions of those that may be the group's.
            used: the positions of those of which something is made.
            output: the position of one that the node has made.

        Returns:
            What is kept of each tensor; None where the group has no part in the call.
        """
        if (
            not self._is_on_top()
            or type(tensors[streams[-1]]) is not Tensor
            or _is_transforming()
            or _tracing_state() is not None
        ):
            ctx.save_for_backward(*tensors)
            return None
        if self._outer is not None:
            ctx.save_for_backward(*tensors)
            ctx.kept = None
            kept: list[Any] = [None] * len(tensors)
            for i in (*streams, *used):
                kept[i] = None if tensors[i] is None else self._pack(tensors[i])
            return kept
        kept = [None if t is None else (t, t._version) for t in tensors]
        for i in streams:
            kept[i] = self._pack(tensors[i])
        if output is not None:
            # It would hold the node.
            made = tensors[output].detach()
            kept[output] = made, made._version
        ctx.kept = _Kept(kept)
        return kept

    def _source(self, residual: Tensor, packed: Any) -> "_Source":
        """The streams that an op read."""
        made = packed.made if type(packed) is _View else packed
        if made is packed and type(made) is _Streams:
            return made
        if type(made) is _Streams and made.is_all(residual):
            return made
        storage = residual.untyped_storage()
        key = (
            storage._cdata,
            residual.storage_offset(),
            residual._version,
            residual.shape[-2:],
            residual.numel(),
        )
        root = self._roots.get(key)
        if root is None:
            self._storages.append(storage._weak_ref())
            root = self._roots[key] = _Root(packed, residual.dtype, residual.device)
        return root

    def _add(self, tensor: Tensor, made: "_Made") -> bool:
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes:
            return False  # it may not be alone there
        made.shape, made.version = tensor.shape, tensor._version
        self._storages.append(storage._weak_ref())
        self._made[storage._cdata] = made
        self._all.append(weakref.ref(made))
        if tensor.is_cuda:
            index = tensor.get_device()
            key = index, _replay.current_stream(index)
            if key not in self._streams:
                self._streams[key] = torch.cuda.current_stream(index)
        return True

    # The hooks.

    def _pack(self, tensor: Tensor) -> Any:
        """What autograd keeps of a tensor; autograd may hold a lock, and nothing runs here."""
        if type(tensor) is Tensor:
            made = self._made.get(tensor.untyped_storage()._cdata)
            if made is not None and made.version == tensor._version and made.dtype == tensor.dtype:
                if made.shape == tensor.shape and tensor.is_contiguous():
                    return made
                return _View(made, tensor.shape, tensor.stride(), tensor.storage_offset())
        if self._outer is not None:
            pack, unpack = self._outer
            return _Outer(unpack, pack(tensor))
        # An output of the node that saves it would hold the node.
        return tensor if tensor.is_leaf else tensor.detach(), tensor._version

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

    def __init__(self, group: RecomputeGroup, source: "_Source") -> None:
        self.group = group
        self.source = source
        self.dtype, self.device = source.dtype, source.device
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
    """A layer input: aggregate(source, pre_mix).

    Attributes:
        gates: what the pre_mix is of, packed: itself, or the mixes, scale and bias that
            `split_mixes` takes.
        pre_eps: what that adds to it.
    """

    __slots__ = ("gates", "pre_eps")

    def __init__(
        self, group: RecomputeGroup, source: "_Source", gates: Sequence[Any], pre_eps: float = 0.0
    ) -> None:
        super().__init__(group, source)
        self.gates, self.pre_eps = gates, pre_eps

    def forget(self) -> None:
        super().forget()
        self.gates = ()


class _Streams(_Made):
    """Streams: post(layer_output, source, post_mix, comb_mix, bias), all of them packed."""

    __slots__ = ("packed",)

    def __init__(self, group: RecomputeGroup, source: "_Source", *packed: Any) -> None:
        super().__init__(group, source)
        self.packed = packed

    def forget(self) -> None:
        super().forget()
        self.packed = ()


class _Root:
    """Streams that something else made, packed."""

    __slots__ = ("device", "dtype", "packed", "value")

    def __init__(self, packed: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.packed, self.dtype, self.device = packed, dtype, device
        self.value: Tensor | None = None


_Source = _Made | _Root
_NOTHING = _Root(None, torch.float32, torch.device("meta"))


class _View:
    """A view of a tensor that the group makes again."""

    __slots__ = ("layout", "made")

    def __init__(self, made: _Made, *layout: Any) -> None:
        self.made, self.layout = made, layout

    def get(self) -> Tensor:
        return self.made.get().as_strided(*self.layout)


class _Kept:
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
            # As `_unpack`, whose call would take as long as all of it.
            if type(packed) is tuple:
                tensor, version = packed
                if tensor._version != version:
                    raise _changed(tensor, version, "a tensor that the backward needs")
                tensors.append(tensor)
            else:
                tensors.append(None if packed is None else packed.get())
        if not _keeps_graph():
            self.packed = []
        if torch.is_grad_enabled():
            # For a gradient of the gradient, which is refused, there must be a graph.
            return tuple(map(_with_gradient, tensors))
        return tuple(tensors)


def _with_gradient(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.requires_grad:
        return tensor
    return tensor.detach().requires_grad_()


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
        # Of each launch, by their shape: tensors of the dtype and device of the streams.
        self._likes: dict[torch.Size, Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        # The streams that the last layer so far leaves, or that the first begins with.
        self._tail: _Source | None = None
        self._likes.clear()
        self._unread: Tensor | None = None
        self._pre_mixes: list[Tensor] = []
        # What pre_mixes are to be made of, with their positions.
        self._gates: dict[Any, list[tuple[int, tuple[Tensor, ...]]]] = {}
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
        (self._make_input if type(made) is _Input else self._make_streams)(made)

    def _make_input(self, made: _Input) -> None:
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

    def _make_streams(self, made: _Streams) -> None:
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

    def _destination(self, made: _Made, shape: torch.Size) -> Tensor:
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
                columns = [list(column) for column in zip(*gates, strict=True)]
                pre_mixes = recompute_op.pre_mixes(self._initial, *columns, pre_eps)
                for position, pre_mix in zip(positions, pre_mixes.unbind(), strict=True):
                    self._pre_mixes[position] = pre_mix
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
