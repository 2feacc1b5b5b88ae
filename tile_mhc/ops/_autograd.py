"""What torch's transforms do to an operator: reverse mode, forward mode, vmap.

`torch.library.register_autograd` serves backward() and torch.compile. But it drops the tangents of
forward mode without a word, it raises under torch.func, and it reads the schema anew in every call
that records: 10 us for five arguments and 45 for twelve. So an operator gets a kernel of its own
behind the dispatcher's Autograd key, and in eager calls one function around it.

Relies on these private names of torch, each tested in tests/cpu/test_transforms.py:
`_C._AutoDispatchBelowAutograd` and `_C._after_autograd_keyset` (register_autograd uses the same),
`_SingleLevelFunction` and `enable_single_level_autograd_function` (an autograd.Function inside one
level of torch.func), `forward_ad._current_level` and
`forward_ad._set_fwd_grad_enabled`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree

from tile_mhc import errors, jit
from tile_mhc._guards import transforms_active
from tile_mhc.ops._replay import Call, Replay

_LIBRARY = torch.library.Library("tile_mhc", "FRAGMENT")


def refuse_tangents(op: str, inputs: Iterable[Any]) -> None:
    """No operator has a forward-mode formula; without this, torch would drop the tangents.

    Not for Python that dynamo traces: there the kernel behind the Autograd key refuses.
    """
    if forward_ad._current_level < 0:
        return
    for tensor in _tensors(inputs):
        if tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise errors.UnsupportedError(
                f"{op}: every input must be without a tangent, as no kernel has a forward mode; "
                f"got a dual tensor {errors.describe(tensor)} (torch.func.jvp, jacfwd, forward_ad)."
                " Use reverse mode (grad, vjp, jacrev), or the function of tile_mhc.reference"
            )


def refuse_transforms(op: str, argument: str) -> None:
    """For what a transform of torch.func cannot see: memory that an op writes to."""
    if transforms_active():
        raise errors.UnsupportedError(
            f"{op}: {argument} must be None inside a transform of torch.func; got one"
        )


def attach(
    operator: Any,
    backward: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None,
    replay: Replay | None,
    launcher: Callable[..., Any],
) -> "Operator":
    """Give an operator its autograd and return the function that eager calls go through.

    Args:
        operator: `torch.ops.tile_mhc.<name>.default`.
        backward: its backward, from `ctx` and the gradients; None for an operator that writes to an
            argument.
        setup_context: saves what the backward needs.
        replay: serves calls past the dispatcher.
        launcher: what runs behind the dispatcher's CUDA key.
    """
    name = operator._schema.name.partition("::")[2]
    ours = OPERATORS[name] = Operator(name, operator, replay, launcher)
    inside = None
    if backward is not None:
        ours.function, inside = _functions(name, operator, ours.launch, backward, setup_context)
    _LIBRARY.impl(name, _dispatched(name, operator, inside), "Autograd", with_keyset=True)
    torch.library.register_vmap(operator._schema.name, _sample_by_sample(name, operator))
    return ours


class Operator:
    """An operator as our own code calls it.

    Attributes:
        function: the operator as a function of autograd; None where it has no backward.
        replay: serves calls past the dispatcher; None where none may go past it.
    """

    def __init__(
        self, name: str, operator: Any, replay: Replay | None, launcher: Callable[..., Any]
    ) -> None:
        self._name, self._operator, self._launcher = name, operator, launcher
        self.function: Any = None
        self.replay = replay

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or transforms_active():
            return self._operator(*inputs)
        refuse_tangents(self._name, inputs)
        if self.function is not None and records(inputs):
            return self.function.apply(*inputs)
        return self.launch(inputs)

    def find_in_backward(self, arguments: tuple[Any, ...]) -> Call | None:
        """The call with these arguments if it is of a known kind, and nothing of it is recorded.

        What else `__call__` looks for, no call of a known kind has.
        """
        if self.replay is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self.replay.find(arguments)

    def launch(self, inputs: tuple[Any, ...]) -> Any:
        """Eager, without autograd."""
        if jit.is_asking():
            return self._launcher(*inputs)
        if self.replay is not None:
            call = self.replay.find(inputs) or self.replay.learn(inputs)
            if call is not None:
                outputs = call.run()
                return outputs[0] if len(outputs) == 1 else tuple(outputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self._operator(*inputs)


# All of them, by name.
OPERATORS: dict[str, Operator] = {}


def _functions(
    name: str,
    operator: Any,
    launch: Callable[[tuple[Any, ...]], Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> tuple[Any, Any]:
    """The operator as a function of autograd: for eager calls, and behind the Autograd key.

    The second takes the dispatcher's key set before the operator's arguments.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = launch(inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def forward_inside(ctx: Any, keys: Any, *inputs: Any) -> Any:
        # A function's forward switches gradients off, which the levels below would not record then.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            output = _below(operator, keys, inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def backward_inside(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        result = backward(ctx, *grads)
        return None, *(result if isinstance(result, tuple) else (result,))

    def function(base: type, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"tile_mhc_{name}", (base,), members)

    return (
        function(torch.autograd.Function, forward, backward),
        function(_SingleLevelFunction, forward_inside, backward_inside),
    )


def _dispatched(name: str, operator: Any, function: Any) -> Callable[..., Any]:
    """The kernel behind the Autograd key.

    torch.func runs it once for each of its levels, on that level's tensors. An autograd.Function
    would refuse that; one of a single level is made for it.
    """

    def dispatched(keys: Any, *inputs: Any) -> Any:
        refuse_tangents(name, inputs)
        if function is None or not records(inputs):
            return _below(operator, keys, inputs)
        from torch._functorch.utils import enable_single_level_autograd_function

        with enable_single_level_autograd_function():
            return function.apply(keys, *inputs)

    return dispatched


def _below(operator: Any, keys: Any, inputs: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


def records(inputs: Iterable[Any]) -> bool:
    """Whether autograd would record an operator with these inputs."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    )


def _tensors(inputs: Iterable[Any]) -> Iterator[Tensor]:
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _sample_by_sample(name: str, operator: Any) -> Callable[..., Any]:
    """The batching rule: one call a sample, as torch's own fallback does, without its warning."""
    mutates = operator._schema.is_mutable

    def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if mutates:
            raise errors.UnsupportedError(
                f"{name}: must not write to a tensor that it is given under torch.vmap; "
                "call the op without out, grad_accumulator and main_grad"
            )
        if info.batch_size == 0:
            raise errors.UnsupportedError(
                f"{name}: torch.vmap must map over at least one sample; got a dimension of size 0"
            )
        flat, spec = pytree.tree_flatten(args)
        dims, _ = pytree.tree_flatten(in_dims, is_leaf=lambda value: value is None)
        samples = []
        for index in range(info.batch_size):
            leaves = [
                value if dim is None else value.select(dim, index).contiguous()
                for value, dim in zip(flat, dims, strict=True)
            ]
            samples.append(operator(*pytree.tree_unflatten(leaves, spec)))
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])

    return batched
