"""Where a gradient goes: to autograd, or into memory that outlives the op.

A backward's launcher takes `into`, which maps the positions of some of its gradients to an `Into`;
those it leaves there, and the others it returns. An accumulator's buffer and a parameter's
`main_grad` are such places. `call` decides: the plain operator, with the autograd that it was
registered with, or `_Directed` around it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tile_mhc import errors, main_grad
from tile_mhc.accumulator import GradAccumulator, State
from tile_mhc.ops._autograd import refuse_tangents, refuse_transforms, transforms_active
from tile_mhc.ops._library import empty_like, outside_graphs, register


class Into(NamedTuple):
    """A destination: contiguous, of the gradient's shape, float32 or the dtype of the streams."""

    tensor: Tensor
    adds: bool


# Parameters whose gradient a kernel writes number by number.
GATES = ("scale", "bias")

Destinations = Mapping[int, Into]
NOWHERE: Destinations = {}


def room(into: Destinations, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """For the gradient of each input: its destination, or memory like the input; see
    `empty_gradients`."""
    grads: list[Tensor] = []
    for position, value in enumerate(inputs):
        if position in into:
            grads.append(into[position].tensor)
        elif value is None:
            grads.append(grads[-1].new_empty(0))
        else:
            grads.append(empty_like(value))
    return tuple(grads)


def adds(into: Destinations, position: int) -> bool:
    return position in into and into[position].adds


def dtype_into(into: Destinations, position: int) -> torch.dtype | None:
    """The dtype of a destination; None where there is none."""
    return into[position].tensor.dtype if position in into else None


def moved(into: Destinations, positions: Mapping[int, int]) -> Destinations:
    """The destinations of a part of the op, at the positions that they have there."""
    return {positions[p]: target for p, target in into.items() if p in positions}


def clear(into: Destinations, grads: Mapping[int, Tensor]) -> None:
    """Gradients that are sums over no token: zero, or what the destination has."""
    for position, grad in grads.items():
        if not adds(into, position):
            grad.zero_()


def register_into(
    schema: str,
    positions: Sequence[int],
    *,
    cuda: Callable[..., tuple[Tensor, ...]],
    cpu: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    flops: Callable[..., int],
) -> Callable[[Sequence[Any], Destinations], tuple[Tensor, ...]]:
    """Define `<backward>_into`: a backward operator with destinations for some of its gradients.

    Args:
        schema: of the backward operator.
        positions: those of its gradients that may have a destination.
        cuda: its launcher, which takes `into`.
        cpu: the reference, which computes in float32 what it is given in float32.
        fake: the empty results.
        flops: what torch's FlopCounterMode counts of the backward operator.

    Returns:
        A function of the backward's arguments and `into`. A gradient that went into its destination
        is returned without an element.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    targets = (f"Tensor({chr(ord('a') + i)}!)? into_{p}" for i, p in enumerate(positions))
    count = len(positions) + 1

    def directed(
        function: Callable[[Sequence[Any], Destinations], Sequence[Tensor]],
    ) -> Callable[..., tuple[Tensor, ...]]:
        def run(*args: Any) -> tuple[Tensor, ...]:
            *given, flags = args[-count:]
            into = {
                p: Into(tensor, flag)
                for p, tensor, flag in zip(positions, given, flags, strict=True)
                if tensor is not None
            }
            grads = function(args[:-count], into)
            return tuple(
                into[p].tensor.new_empty(0) if p in into else g for p, g in enumerate(grads)
            )

        return run

    def on_cpu(args: Sequence[Any], into: Destinations) -> list[Tensor]:
        wide = [_widened(arg) for arg in args]
        grads = []
        for p, (grad, like) in enumerate(zip(cpu(*wide), fake(*args), strict=True)):
            if p in into:
                target = into[p].tensor
                (target.add_ if into[p].adds else target.copy_)(grad.view(target.shape))
            grads.append(grad.to(like.dtype).contiguous())
        return grads

    operator = register(
        f"{name}_into({arguments}, {', '.join(targets)}, bool[] adds) -> {returns}",
        cuda=directed(lambda args, into: cuda(*args, into=into)),
        cpu=directed(on_cpu),
        fake=directed(lambda args, into: fake(*args)),
        flops=flops,
    )

    def run(args: Sequence[Any], into: Destinations) -> tuple[Tensor, ...]:
        tensors = [into[p].tensor if p in into else None for p in positions]
        return operator(*args, *tensors, [adds(into, p) for p in positions])

    return run


def _widened(value: Any) -> Any:
    """Streams in float32: the reference rounds its gradients to the dtype of the streams."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


@dataclass(frozen=True)
class Route:
    """An op whose gradients may go elsewhere. Its gradients lie as its first inputs do.

    Attributes:
        name: the public op's.
        operator: its operator.
        setup: the operator's `setup_context`.
        arguments: those of the backward operator, from `ctx` and the gradients of the outputs.
        backward: what `register_into` returned.
        residual: the position of the streams among the inputs.
        parameters: the inputs that may carry `main_grad`, by position.
    """

    name: str
    operator: Callable[..., Any]
    setup: Callable[..., None]
    arguments: Callable[..., Sequence[Any]]
    backward: Callable[[Sequence[Any], Destinations], tuple[Tensor, ...]]
    residual: int = 0
    parameters: Mapping[int, str] = field(default_factory=dict)


def call(
    route: Route,
    inputs: Sequence[Any],
    accumulator: GradAccumulator | None = None,
    plain: Callable[..., Any] | None = None,
) -> Any:
    """The op, its gradients directed where the accumulator and the inputs say.

    Without such, `plain` with the inputs: by default the operator, and the autograd that it was
    registered with. So it is inside torch.func, which takes every gradient itself.
    """
    if not torch.compiler.is_compiling():
        refuse_tangents(route.name, inputs)
    state = None
    if accumulator is not None:
        refuse_transforms(route.name, "grad_accumulator")
        inputs, state = _with_source(route, inputs, accumulator)
    if (
        state is None and not any(main_grad.takes_part(inputs[p]) for p in route.parameters)
    ) or transforms_active():
        return (plain or route.operator)(*inputs)
    return _call_directed(route, inputs, state, plain)


def _with_source(
    route: Route, inputs: Sequence[Any], accumulator: object
) -> tuple[Sequence[Any], State | None]:
    if not isinstance(accumulator, GradAccumulator):
        raise errors.ShapeError(
            f"{route.name}: grad_accumulator must be a GradAccumulator or None; "
            f"got {errors.describe(accumulator)}"
        )
    inputs = list(inputs)
    inputs[route.residual], state = accumulator.source(route.name, inputs[route.residual])
    return inputs, state


# Destinations are outside of any graph: torch.compile breaks its own here.
@outside_graphs
def _call_directed(
    route: Route, inputs: Sequence[Any], state: State | None, plain: Callable[..., Any] | None
) -> Any:
    parameters = {}
    if torch.is_grad_enabled():
        parameters = {p: inputs[p] for p in route.parameters if main_grad.takes_part(inputs[p])}
    if parameters and not main_grad.is_enabled():
        inputs = [
            main_grad.by_autograd(value) if p in parameters else value
            for p, value in enumerate(inputs)
        ]
        parameters = {}
    if state is None and not parameters:
        return (plain or route.operator)(*inputs)
    return _Directed.apply(route, state, parameters, *inputs)  # type: ignore[no-untyped-call]


# Arguments of `_Directed` before the op's own.
_OWN = 3


class _Directed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, route: Route, state: State | None, parameters: dict[int, Tensor], *inputs: Any
    ) -> Any:
        ctx.route, ctx.state = route, state
        # The Python objects, beside the saved tensors: main_grad is an attribute of the object.
        ctx.parameters = parameters
        positions = [p for p, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.edges = {p: edge for edge, p in enumerate(positions)}
        ctx.num_inputs = len(inputs)
        outputs = route.operator(*inputs)
        route.setup(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        route = ctx.route
        errors.check_first_gradient(route.name)
        arguments = route.arguments(ctx, *grads)
        into: dict[int, Into] = {}
        later: list[tuple[Into, Tensor]] = []
        done: dict[int, Tensor] = {}
        # All that can be refused is, before anything is written.
        for p, parameter in ctx.parameters.items():
            found = None
            if _runs(ctx, p):
                found = main_grad.find(route.name, route.parameters[p], parameter)
            if found is None:
                continue
            done[p], _ = into[p] = Into(*found)
            alignment = 1 if route.parameters[p] in GATES else errors.STREAM_ALIGNMENT
            if not main_grad.is_target(into[p].tensor, alignment):
                made = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                later.append((into[p], made))
                into[p] = Into(made, False)
        collects = ctx.state is not None and _runs(ctx, route.residual)
        if collects:
            into[route.residual] = Into(*ctx.state.target(route.name))
        results: list[Tensor | None] = list(route.backward(arguments, into))
        if collects:
            ctx.state.written()
            results[route.residual] = None
        for target, made in later:
            (target.tensor.add_ if target.adds else target.tensor.copy_)(made)
        for p, parameter in ctx.parameters.items():
            if p in done:
                node = ctx.next_functions[ctx.edges[p]][0]
                results[p] = main_grad.finish(parameter, done[p], node)
            elif _is_wanted(ctx, p):
                main_grad.left(parameter)
        for p in range(len(results)):
            if not ctx.needs_input_grad[_OWN + p]:
                results[p] = None
        padding = [None] * (ctx.num_inputs - len(results))
        return *[None] * _OWN, *results, *padding


def _runs(ctx: Any, position: int) -> bool:
    """Whether this backward goes on to the node behind an input, and does not return its gradient.

    Where it does not, as in `torch.autograd.grad` for other tensors, nobody would collect what was
    written.
    """
    return _goes_on(ctx, position) is True


def _is_wanted(ctx: Any, position: int) -> bool:
    """Whether this backward goes on to the node behind an input, or returns its gradient."""
    return _goes_on(ctx, position) is not False


def _goes_on(ctx: Any, position: int) -> bool | None:
    """Whether this backward goes on to the node behind an input; None if it ends there."""
    node = ctx.next_functions[ctx.edges[position]][0]
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # A leaf whose gradient torch.autograd.grad returns.
        return None
