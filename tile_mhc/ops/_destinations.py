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
from tile_mhc.ops._autograd import (
    Operator,
    refuse_tangents,
    refuse_transforms,
    transforms_active,
)
from tile_mhc.ops._library import empty_like, outside_graphs, register
from tile_mhc.ops._replay import Call


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
        # A tuple, as what is looked up must have a hash.
        return operator(*args, *tensors, tuple([adds(into, p) for p in positions]))

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
        save: keeps in `ctx` what the backward needs of the inputs and all outputs.
        gradients: those of the inputs, from `ctx` and the gradients of the outputs, where all of
            them go to autograd.
        tensors: how many of its inputs are tensors, or None: the first ones.
        arguments: those of the backward operator, from the same as `gradients`.
        backward: what `register_into` returned; None where all gradients go to autograd.
        visible: how many of the operator's outputs the op returns; the others are for the backward.
        passes: whether the op returns the streams, too, behind the others. The gradients of its
            outputs may then be None.
        residual: the position of the streams among the inputs.
        parameters: the inputs that may carry `main_grad`, by position.
    """

    name: str
    operator: Operator
    save: Callable[..., None]
    gradients: Callable[..., Sequence[Tensor | None]]
    tensors: int
    arguments: Callable[..., Sequence[Any]] | None = None
    backward: Callable[[Sequence[Any], Destinations], tuple[Tensor, ...]] | None = None
    visible: int = 1
    passes: bool = False
    residual: int = 0
    parameters: Mapping[int, str] = field(default_factory=dict)

    def find(self, inputs: Sequence[Any]) -> Call | None:
        """The call with these inputs, if it is of a kind whose arguments were checked before."""
        if torch.compiler.is_compiling() or self.operator.replay is None:
            return None
        return self.operator.replay.find(inputs)


def call(
    route: Route,
    inputs: Sequence[Any],
    known: Call | None = None,
    accumulator: GradAccumulator | None = None,
    plain: Callable[..., Any] | None = None,
) -> tuple[Tensor, ...]:
    """The op, its gradients directed where the accumulator and the inputs say.

    Args:
        route: the op.
        inputs: its inputs.
        known: what `Route.find` said of them.
        accumulator: gathers the gradient of the streams.
        plain: what to call where nothing is directed elsewhere, as inside of torch.func, which
            takes every gradient itself: by default the operator.

    Returns:
        What the op returns, and possibly more behind it.
    """
    if known is None and not torch.compiler.is_compiling():
        refuse_tangents(route.name, inputs)
    state = None
    if accumulator is not None:
        if known is None:
            refuse_transforms(route.name, "grad_accumulator")
        inputs, state = _with_source(route, inputs, accumulator)
    if known is not None and not (known.requires_grad and torch.is_grad_enabled()):
        outputs = known.run_visible()[: route.visible]
        if route.passes:
            residual = inputs[route.residual]
            outputs.append(residual.view_as(residual))
        return tuple(outputs)
    directs = False
    for position in route.parameters:
        directs = directs or main_grad.takes_part(inputs[position])
    if known is not None:
        # No transform of torch.func, nothing traced: torch.compile's leave, which takes time to
        # ask for, is not needed.
        run = _call_directed if directs else _apply
        return run(route, known, inputs, state, plain)
    if (state is None and not directs) or transforms_active():
        return _as_tuple((plain or route.operator)(*inputs))
    return _outside_graphs(route, None, inputs, state, plain)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


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


def _call_directed(
    route: Route,
    known: Call | None,
    inputs: Sequence[Any],
    state: State | None,
    plain: Callable[..., Any] | None,
) -> tuple[Tensor, ...]:
    parameters = {}
    if torch.is_grad_enabled():
        parameters = {p: inputs[p] for p in route.parameters if main_grad.takes_part(inputs[p])}
    if parameters and not main_grad.is_enabled():
        inputs = [
            main_grad.by_autograd(value) if p in parameters else value
            for p, value in enumerate(inputs)
        ]
        parameters, known = {}, None
    if state is None and not parameters:
        return _as_tuple((plain or route.operator)(*inputs))
    return _apply(route, known, inputs, state, plain, parameters)


# Destinations are outside of any graph: torch.compile breaks its own here.
_outside_graphs = outside_graphs(_call_directed)


_NONE: Mapping[int, Tensor] = {}


def _apply(
    route: Route,
    known: Call | None,
    inputs: Sequence[Any],
    state: State | None,
    _plain: object,
    parameters: Mapping[int, Tensor] = _NONE,
) -> tuple[Tensor, ...]:
    tensors, options = inputs[: route.tensors], inputs[route.tensors :]
    apply = _Directed.apply if known is None else _apply_plain
    return apply((route, known, state, parameters, options), *tensors)  # type: ignore[no-untyped-call]


# Arguments of `_Directed` before the op's own.
_OWN = 1


class _Directed(torch.autograd.Function):
    """An op in eager mode: its gradients directed, or its call known, or both."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        # torch looks at each argument: fewer are faster.
        route, known, state, parameters, options = how
        inputs = (*tensors, *options)
        ctx.route, ctx.state = route, state
        # The Python objects, beside the saved tensors: main_grad is an attribute of the object.
        ctx.parameters = parameters
        outputs = _as_tuple(route.operator.launch(inputs)) if known is None else known.run()
        route.save(ctx, inputs, outputs)
        if state is not None or parameters:
            positions = [p for p, value in enumerate(tensors) if value is not None]
            ctx.edges = {p: edge for edge, p in enumerate(positions)}
        if route.passes:
            ctx.set_materialize_grads(False)
            return (*outputs[: route.visible], inputs[route.residual])
        return tuple(outputs[: route.visible])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        route = ctx.route
        if ctx.state is None and not ctx.parameters:
            return (None, *route.gradients(ctx, *grads)[: route.tensors])
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
        return None, *results, *[None] * (route.tensors - len(results))


# What Function.apply calls when it has looked for tensors left over from a transform of torch.func,
# which a known call cannot have.
_apply_plain = super(torch.autograd.Function, _Directed).apply


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
