"""Recompute groups: streams and layer inputs are made again in the backward, by one launch.

Inside a group `torch.autograd.graph.saved_tensors_hooks` decide what autograd keeps. The ops tell
the group what they make (`ops/_group.py`), and of what: a `Made` (`_made.py`) is one of those
tensors without its memory. When anything saves that tensor, or a view of it, autograd is given the
`Made` instead. It knows the tensor by its storage, of which the group has a weak reference, so that
no other storage can be taken for it. Every other tensor is kept as it is, with its version.

    graph node -> Made -> what it was made of: streams (Made or Root), layer output, mixes

Nothing points the other way but weak references, once the group is closed. So what is kept lives as
long as the nodes that need it, and a group of which the graph is gone holds nothing.

On the first need all tensors of the group that are still wanted are made, in the order of the
forward: `Launches` (`_making.py`) gives as many of them as it can to one launch of `recompute`.
They live until their nodes are done, or to the end of that backward, where the graph is retained.

Relies on these private names of torch, each tested in tests/cpu/test_recompute_group.py:

- `_C._autograd._top_saved_tensors_default_hooks`, the hooks that are in force in this thread;
- `_C._autograd._get_current_graph_task_keep_graph` (in `_made.py`), whether the backward that runs
  in this thread retains its graph;
- `UntypedStorage._weak_ref` and `_free_weak_ref`, as multiprocessing.reductions.StorageWeakRef has
  them, and `_cdata`, the address that no other storage has as long as there is a weak reference.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from tile_mhc import _backward, _guards, errors
from tile_mhc._made import OP, Input, Kept, Made, Outer, Root, Source, Streams, View, unpack
from tile_mhc._making import Allocate, Launches
from tile_mhc.ops import _replay
from tile_mhc.ops._group import active

_top_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
_free_weak_ref: Any = torch.UntypedStorage._free_weak_ref
_is_transforming: Any = torch._C._are_functorch_transforms_active
_tracing_state: Any = torch._C._get_tracing_state


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

    The group knows a tensor by its memory and its version. Who writes into a layer's input or the
    streams without raising the version, as through `.data`, by torch.distributed's collectives or
    by a kernel of his own, must write into a copy: what is made again is what the ops had made.

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
        self._made: dict[int, Made] = {}
        self._roots: dict[tuple[Any, ...], Root] = {}
        self._storages = _WeakReferences()
        # All of it, in the order of the forward.
        self._all: list[weakref.ref[Made]] = []
        # The streams of a GPU on which it was made, by device and address.
        self._streams: dict[tuple[int, int], torch.cuda.Stream] = {}
        # Whether there is something that no backward has been asked to drop at its end.
        self.holds = False
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
        hooks = saved_tensors_hooks(self._pack, unpack)
        hooks.__enter__()
        self._hooks, self._thread = hooks, threading.get_ident()
        self._before, active.group = active.group, self

    def _end(self, error: BaseException | None) -> None:
        if self._hooks is None:
            raise errors.RecomputeError(
                f"{OP}: a group must be left once; got one that is not open"
            )
        own_thread = self._thread == threading.get_ident()
        if not own_thread or not self._is_on_top():
            if own_thread:
                # Its block is over. The hooks, which lie under others, only pass on from now on.
                self._fail()
            raise errors.RecomputeError(
                f"{OP}: a group must be left in the thread that entered it, and before hooks of "
                "saved tensors, groups too, that were entered before it; got another order"
            )
        hooks, self._hooks = self._hooks, None
        hooks.__exit__(None, None, None)
        self._outer = None
        active.group, self._before = self._before, None
        if error is not None:
            self._fail()

    def _fail(self) -> None:
        """Nothing will be made again: free what is there."""
        self._failed = self._closed = True
        for made in self._alive():
            made.forget()
        self._free()
        if active.group is self:
            active.group = self._before

    def _free(self) -> None:
        self._made.clear()
        self._roots.clear()
        self._storages.free()

    def _is_on_top(self) -> bool:
        """Whether what is saved now comes to this group, and not to a checkpoint inside of it."""
        top = _top_hooks(True)
        return top is not None and getattr(top[0], "__self__", None) is self

    # What ops say where they save for their backward: what is to be saved, and what they make.

    def after_post(self, ctx: Any, inputs: Sequence[Any], streams: Tensor) -> None:
        """Save the inputs of `post`, which makes the streams."""
        kept = self._save(ctx, inputs, (0, 1), (0, 2, 3, 4))
        if kept is not None:
            source = self._source(inputs[1], kept[1])
            self._add(streams, Streams(self, source, kept[0], *kept[2:]))

    def after_aggregate(self, ctx: Any, inputs: Sequence[Tensor], layer_input: Tensor) -> None:
        """Save the inputs of `aggregate`, which makes the layer input."""
        kept = self._save(ctx, inputs, (0,), (1,))
        if kept is not None:
            self._add(layer_input, Input(self, self._source(inputs[0], kept[0]), kept[1:2]))

    def after_fused_pre(
        self, ctx: Any, saved: Sequence[Any], layer_input: Tensor, pre_eps: float
    ) -> None:
        """Save residual, weight, scale, bias, norm_weight, mixes and inv_rms of `fused_pre`.

        The layer input is by the pre_mix of split_mixes(mixes, scale, bias, pre_eps=pre_eps).
        """
        kept = self._save(ctx, saved, (0,), (2, 3, 5))
        if kept is not None:
            gates = kept[5], _own(saved[2], kept[2]), _own(saved[3], kept[3])
            made = Input(self, self._source(saved[0], kept[0]), gates, pre_eps)
            self._add(layer_input, made)

    def after_delayed_pre(self, ctx: Any, saved: Sequence[Any], layer_input: Tensor) -> None:
        """Save what `fused_pre` with a pre_mix does: as the fourth its pre_mix."""
        kept = self._save(ctx, saved, (0,), (4,))
        if kept is not None:
            self._add(layer_input, Input(self, self._source(saved[0], kept[0]), kept[4:5]))

    def after_post_pre(
        self, ctx: Any, saved: Sequence[Any], layer_input: Tensor, pre_eps: float
    ) -> None:
        """Save the ten inputs with a gradient of `post_pre`, its streams, mixes and inv_rms."""
        streams, pre_mix = saved[10], saved[7]
        kept = self._save(ctx, saved, (0, 1), (0, 2, 3, 5, 6, 7, 8, 11), output=10)
        if kept is None:
            return
        source = self._source(saved[1], kept[1])
        made = Streams(self, source, kept[0], kept[2], kept[3], kept[8])
        if not self._add(streams, made):
            return
        if ctx.kept is not None:
            ctx.kept.packed[10] = made
        if pre_mix is None:
            gates = kept[11], _own(saved[5], kept[5]), _own(saved[6], kept[6])
            self._add(layer_input, Input(self, made, gates, pre_eps))
        else:
            self._add(layer_input, Input(self, made, kept[7:8]))

    def _save(
        self,
        ctx: Any,
        tensors: Sequence[Any],
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
            self._failed
            or not self._is_on_top()
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
        for i in used:
            # What is made of it must not hold the graph, of which the node is a part.
            if kept[i] is not None and not tensors[i].is_leaf:
                kept[i] = tensors[i].detach(), kept[i][1]
        for i in streams:
            kept[i] = self._pack(tensors[i])
        if output is not None:
            # It would hold the node.
            made = tensors[output].detach()
            kept[output] = made, made._version
        ctx.kept = Kept(kept)
        return kept

    def _source(self, residual: Tensor, packed: Any) -> Source:
        """The streams that an op read."""
        made = packed.made if type(packed) is View else packed
        if made is packed and type(made) is Streams:
            return made
        if type(made) is Streams and made.is_all(residual):
            return made
        storage = residual.untyped_storage()
        key = (
            storage._cdata,
            residual.storage_offset(),
            residual._version,
            residual.shape[-2:],
            residual.numel(),
            residual.dtype,
        )
        root = self._roots.get(key)
        if root is None:
            self._storages.append(storage._weak_ref())
            root = self._roots[key] = Root(packed, residual.dtype, residual.device)
        return root

    def _add(self, tensor: Tensor, made: Made) -> bool:
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
        if type(tensor) is Tensor and tensor.layout is torch.strided:  # others have no storage
            made = self._made.get(tensor.untyped_storage()._cdata)
            if made is not None and made.is_seen_by(tensor):
                if made.shape == tensor.shape and tensor.is_contiguous():
                    return made
                return View(made, tensor.shape, tensor.stride(), tensor.storage_offset())
        if self._outer is not None:
            pack, unpack = self._outer
            return Outer(unpack, pack(tensor))
        # An output of the node that saves it would hold the node.
        return tensor if tensor.is_leaf else tensor.detach(), tensor._version

    # The replay.

    def _alive(self) -> list[Made]:
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
            launches = Launches(allocate)
            if device.type == "cuda":
                launches.follow([s for (i, _), s in self._streams.items() if i == device.index])
            self.holds = True
            try:
                for made in self._alive():
                    if made.value is None and made.device == device:
                        launches.make(made)
                launches.run()
            finally:
                launches.forget_roots()

    def use(self, made: Made) -> Tensor:
        """The tensor, for a backward, or for who looks at the graph."""
        with self._lock:
            if made.value is None:
                self._replay(made.device)
            value: Tensor = made.value  # type: ignore[assignment]  # all that is alive is made
        if self.holds and _backward.task() != _backward.NO_TASK:
            self.holds = False
            _backward.at_end(self._drop)
        return value

    def _drop(self) -> None:
        """At the end of a backward: who retains the graph does not retain this."""
        with self._lock:
            for made in self._alive():
                made.value = None


def _own(parameter: Tensor, packed: Any) -> Any:
    """What is kept of a scale or bias: where a framework may gather it for its own module's forward
    and backward alone, as FSDP does, a copy, as a group is made again in the backward of another.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return packed
    copy = parameter.detach().clone()
    return copy, copy._version


class _WeakReferences(list[Any]):
    """Those of storages, which torch wants to be freed by hand."""

    def free(self) -> None:
        while self:
            _free_weak_ref(self.pop())

    def __del__(self) -> None:
        self.free()
