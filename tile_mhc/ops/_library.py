"""One way to make a torch.library operator: TileLang behind CUDA, the reference behind CPU."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tile_mhc import _device, errors
from tile_mhc.kernels._dtypes import Dtypes
from tile_mhc.ops import _flops
from tile_mhc.ops._autograd import Operator, attach
from tile_mhc.ops._replay import Replay

Function = TypeVar("Function", bound=Callable[..., Any])


def register(
    schema: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    hidden: Sequence[int] = (),
    out_alignment: int = errors.STREAM_ALIGNMENT,
) -> Operator:
    """Define `tile_mhc::<schema>` with its implementations and return the callable operator.

    On a CUDA device that there are no kernels for `cpu` answers, too.

    Tracing, torch.compile and autograd then need nothing more: the dispatcher picks the backend
    from the device of the tensors, `fake` gives the shapes, and `flops`, of the shapes, what
    torch's FlopCounterMode counts. `hidden` are the positions of outputs for the backward alone.
    `out_alignment` is where a kernel trusts memory of the caller's that it writes to start.
    """
    name = schema.partition("(")[0]
    qualified = f"tile_mhc::{name}"
    torch.library.define(qualified, schema[len(name) :], tags=torch.Tag.pt2_compliant_tag)
    by_reference = _reference(schema, cpu)
    torch.library.impl(qualified, "CUDA", _prepared(schema, cuda, by_reference, out_alignment))
    torch.library.impl(qualified, "CPU", by_reference)
    torch.library.register_fake(qualified, fake)
    operator = getattr(torch.ops.tile_mhc, name)
    _flops.register(operator, flops)
    if backward is None and not _mutated(schema):
        backward = _no_gradient_of(name)
    types = [argument.partition(" ")[0] for argument in _arguments(schema)]
    replay = None
    # Not where a version has to be counted, nor for tensors in lists.
    if not _outs(types) and "Tensor[]" not in types:
        replay = Replay(types, cuda, hidden)
    return attach(operator.default, backward, setup_context, replay, cuda)


def temporaries(like: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
    """Float32 tensors for a launcher's own use, out of one allocation, each aligned as one.

    An allocation takes the host three times as long as a view. Not for what an op returns: a view
    keeps all of the memory.
    """
    starts, size = [], 0
    for height, width in shapes:
        starts.append(size)
        size += (height * width + 63) & -64  # 256 bytes
    memory = like.new_empty(size, dtype=torch.float32)
    return [
        memory.as_strided(shape, (shape[1], 1), start)
        for shape, start in zip(shapes, starts, strict=True)
    ]


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous; `new_empty` with the tensor's shape takes the host twice as long."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def empty_gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Room for the gradient of each input; of a None no element, in the dtype of the one before."""
    grads: list[Tensor] = []
    for value in inputs:
        grads.append(grads[-1].new_empty(0) if value is None else empty_like(value))
    return tuple(grads)


def filled(
    grads: Sequence[Tensor | None], empty: Callable[[Tensor], Sequence[Tensor]], residual: Tensor
) -> Sequence[Tensor | None]:
    """Gradients of an operator's first outputs, and zeros where autograd has left one out.

    `empty` makes the outputs from the residual.
    """
    if any(grad is None for grad in grads):
        pairs = zip(grads, empty(residual)[: len(grads)], strict=True)
        return [out.zero_() if grad is None else grad for grad, out in pairs]
    return grads


def absent(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel gets in place of a tensor that it does not read.

    Made anew in each call: one that is kept could come out of the memory pool of a CUDA graph,
    which the graph takes back.
    """
    return like.new_empty(1, dtype=dtype)


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def own_dtype(tensor: Tensor, like: Tensor) -> torch.dtype | None:
    """The dtype of a tensor where it is not that of another: None stands for the other's."""
    return None if tensor.dtype == like.dtype else tensor.dtype


@functools.cache
def dtypes(**of: torch.dtype | None) -> tuple[str, ...]:
    """What `jit.kernel` takes after a kernel's numbers: the dtypes of its tensors, by the names of
    `Dtypes`; None for a tensor that is not there."""
    return Dtypes(**{name: _NAMES[dtype] for name, dtype in of.items()}).words


_NAMES: dict[torch.dtype | None, str] = {
    None: "",
    **{dtype: errors.dtype_name(dtype) for dtype in (*errors.STREAMS, *errors.PARAMETERS)},
}


def _no_gradient_of(name: str) -> Callable[..., Any]:
    """A backward op's own backward: torch would leave out its terms."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise errors.UnsupportedError(
            f"{name}: the gradient must be taken once; got a gradient of the gradient, "
            "which has no kernel"
        )

    return refuse


def outside_graphs(function: Function) -> Function:
    """torch.compile breaks its graph here, and does not look inside."""

    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        # Not before the first call: it imports torch._dynamo, which takes a second.
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call  # type: ignore[return-value]


def _reference(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference keeps its dtypes and records no gradient, whatever region it is called in.

    It reads contiguous copies, as the kernels do: the same bits for any layout.
    """
    mutated = _mutated(schema)
    op, names = _shown(schema), _names(schema)
    device_of = _device_of(schema)

    def compute(*args: Any) -> Any:
        for name, value in zip(names, args, strict=True):
            if isinstance(value, Tensor):
                errors.check_storage(op, name, value)
        args = tuple(a if i in mutated else _contiguous(a) for i, a in enumerate(args))
        kind = args[device_of].device.type
        with torch.autocast(kind, enabled=False), torch.no_grad():
            return function(*args)

    return compute


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _mutated(schema: str) -> frozenset[int]:
    """The positions of the arguments that the operator writes to."""
    return frozenset(i for i, argument in enumerate(_arguments(schema)) if "!)" in argument)


def _arguments(schema: str) -> list[str]:
    return schema.partition("(")[2].rpartition(") -> ")[0].split(", ")


def _device_of(schema: str) -> int:
    """The position of the tensor whose device is the operator's."""
    return [argument.partition(" ")[0] for argument in _arguments(schema)].index("Tensor")


def _names(schema: str) -> list[str]:
    return [argument.rpartition(" ")[2] for argument in _arguments(schema)]


def _shown(schema: str) -> str:
    """What messages call an operator: as the public function of which it is one form."""
    return schema.partition("(")[0].replace("delayed_pre", "fused_pre")


def aligned(op: str, name: str, tensor: Tensor) -> Tensor:
    """For a kernel that knows a tensor by its address: it trusts it to start as an allocation does.

    For an operator's own inputs `_prepared` sees to this.
    """
    if tensor.data_ptr() < errors.FREED:
        errors.check_storage(op, name, tensor)
    return tensor.clone() if tensor.data_ptr() % errors.ALIGNMENT else tensor


def _outs(types: Sequence[str]) -> list[int]:
    """The positions of the tensors of the caller's that the operator writes to, in any case."""
    return [i for i, kind in enumerate(types) if re.fullmatch(r"Tensor\(\w!\)", kind)]


def _prepared(
    schema: str,
    function: Callable[..., Any],
    by_reference: Callable[..., Any],
    out_alignment: int,
) -> Callable[..., Any]:
    """TileLang launches on torch's current device and stream: make them the tensors' own.

    Its kernels trust the alignment of an allocation: an input that starts elsewhere is copied. And
    autograd does not see what they write to an `out`: its version says that it changed.
    """
    name = _shown(schema)
    types = [argument.partition(" ")[0] for argument in _arguments(schema)]
    device_of, outs = _device_of(schema), _outs(types)
    inputs = [i for i, kind in enumerate(types) if kind in ("Tensor", "Tensor?")]
    names = _names(schema)

    def launch(*args: Any) -> Any:
        device = args[device_of].device
        if _device.limits_of(device.index) is None:
            _device.refer(name, device.index)
            return by_reference(*args)
        for i in outs:
            errors.check_aligned(name, names[i], args[i], out_alignment)
        for i in inputs:
            value = args[i]
            if value is None:
                continue
            address = value.data_ptr()
            if address < errors.FREED:
                errors.check_storage(name, names[i], value)
            if address % errors.ALIGNMENT:
                copy = value.clone(memory_format=torch.contiguous_format)
                args = (*args[:i], copy, *args[i + 1 :])
        if device.index == torch.cuda.current_device():
            result = function(*args)
        else:
            with torch.cuda.device(device):
                result = function(*args)
        for i in outs:
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return result

    return launch
