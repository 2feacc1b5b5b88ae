"""How a public op is called in eager mode, and where its gradients go.

An op returns what its operator does. It has a backward of its own in two cases: its call is of a
known kind (`_replay`), so that nothing of it needs the dispatcher; or a gradient is directed into
memory that outlives the op, an accumulator's buffer or a parameter's `main_grad`. In all others the
operator brings its own (`_autograd`). docs/internals.md draws the ways that gradients take.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tile_mhc import _backward, errors, main_grad
from tile_mhc._guards import transforms_active
from tile_mhc.accumulator import GradAccumulator, State
from tile_mhc.ops._autograd import (
    Operator,
    refuse_tangents,
    refuse_transforms,
)
from tile_mhc.ops._destinations import GATES, Destination, Destinations
from tile_mhc.ops._library import outside_graphs
from tile_mhc.ops._replay import Call

NO_PARAMETERS: Mapping[int, Tensor] = {}


@dataclass(frozen=True)
class Op:
    """A public op. The gradients of its operator are those of its first inputs, in their order.

    Attributes:
        name: the public op's.
        operator: its operator.
        save: keeps in `ctx` what the backward needs of the inputs and all outputs.
        arguments: those of the backward operator, from `ctx` and the gradients of the outputs.
        gradients: the backward operator. It returns the gradients of the first inputs, without an
            element where one is not wanted.
        tensors: how many of its inputs are tensors, or None: the first ones.
        backward: what `register_into` returned; None where all gradients go to autograd.
        visible: how many of the operator's outputs the op returns; the others are for the backward.
        passes: whether the op returns the streams, too, behind the others. The gradients of its
            outputs may then be None.
        residual: the position of the streams among the inputs.
        untouched: whether the gradient of the streams is that of the output, which no backward
            operator returns: they are the last of the inputs that are tensors.
        parameters: the inputs that may carry `main_grad`, by position.
    """

    name: str
    operator: Operator
    save: Callable[..., None]
    arguments: Callable[..., tuple[Any, ...]]
    gradients: Operator
    tensors: int
    backward: Callable[[Sequence[Any], Destinations], Sequence[Tensor | None]] | None = None
    visible: int = 1
    passes: bool = False
    residual: int = 0
    untouched: bool = False
    parameters: Mapping[int, str] = field(default_factory=dict)

    def find(self, inputs: tuple[Any, ...]) -> Call | None:
        """The call with these inputs, if it is of a kind whose arguments were checked before."""
        if torch.compiler.is_compiling() or self.operator.replay is None:
            return None
        return self.operator.replay.find(inputs)

    def call(
        self,
        inputs: Sequence[Any],
        known: Call | None = None,
        accumulator: GradAccumulator | None = None,
        plain: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """The op, its gradients directed where the accumulator and the inputs say.

        Args:
            inputs: its inputs, which were checked, now or in another call of the kind.
            known: what `find` said of them.
            accumulator: gathers the gradient of the streams.
            plain: what to call where the operator's own autograd serves, as inside of torch.func,
                which takes every gradient itself: by default the operator.

        Returns:
            What the op returns, and possibly more behind it.
        """
        if known is None and not torch.compiler.is_compiling():
            refuse_tangents(self.name, inputs)
        state = None
        if accumulator is not None:
            if known is None:
                refuse_transforms(self.name, "grad_accumulator")
            inputs, state = self._collected(inputs, accumulator)
        if known is not None and not (known.requires_grad and torch.is_grad_enabled()):
            return self._without_gradient(inputs, known)
        # Spelled out, as most have none.
        directs: tuple[int, ...] = ()
        for position in self.parameters:
            if main_grad.takes_part(inputs[position]):
                directs += (position,)
        if known is not None:
            # Nothing is traced: torch.compile's leave, which takes time to ask for, is not needed.
            if directs:
                return _call_directed(self, known, inputs, state, directs, plain)
            return _apply(self, known, inputs, state)
        if (state is None and not directs) or transforms_active():
            return _as_tuple((plain or self.operator)(*inputs))
        return _call_outside_graphs(self, None, inputs, state, directs, plain)

    def _collected(
        self, inputs: Sequence[Any], accumulator: object
    ) -> tuple[Sequence[Any], State | None]:
        """The inputs with the streams as the accumulator has them, and its state."""
        if not isinstance(accumulator, GradAccumulator):
            raise errors.ShapeError(
                f"{self.name}: grad_accumulator must be a GradAccumulator or None; "
                f"got {errors.describe(accumulator)}"
            )
        inputs = list(inputs)
        streams, state = accumulator.source(self.name, inputs[self.residual])
        inputs[self.residual] = streams
        return inputs, state

    def _without_gradient(self, inputs: Sequence[Any], known: Call) -> tuple[Tensor, ...]:
        outputs = known.run_visible()[: self.visible]
        if self.passes:
            residual = inputs[self.residual]
            outputs.append(residual.view_as(residual))
        return tuple(outputs)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _call_directed(
    op: Op,
    known: Call | None,
    inputs: Sequence[Any],
    state: State | None,
    directs: tuple[int, ...],
    plain: Callable[..., Any] | None,
) -> tuple[Tensor, ...]:
    """With an accumulator's state, or parameters, at `directs`, that have a `main_grad`."""
    parameters = {p: inputs[p] for p in directs} if torch.is_grad_enabled() else {}
    if parameters and not main_grad.is_enabled():
        inputs = [
            main_grad.by_autograd(value) if p in parameters else value
            for p, value in enumerate(inputs)
        ]
        parameters, known = {}, None
    if state is None and not parameters:
        return _as_tuple((plain or op.operator)(*inputs))
    return _apply(op, known, inputs, state, parameters)


# Memory that outlives the op is outside of any graph: torch.compile breaks its own here.
_call_outside_graphs = outside_graphs(_call_directed)


def _apply(
    op: Op,
    known: Call | None,
    inputs: Sequence[Any],
    state: State | None,
    parameters: Mapping[int, Tensor] = NO_PARAMETERS,
) -> tuple[Tensor, ...]:
    tensors, options = inputs[: op.tensors], inputs[op.tensors :]
    apply = _Eager.apply if known is None else _apply_plain
    # torch looks at each argument: fewer are faster.
    return apply((op, known, state, parameters, options), *tensors)  # type: ignore[no-untyped-call]


class _Eager(torch.autograd.Function):
    """An op whose call is known, or whose gradients are directed, or both."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        op, known, state, parameters, options = how
        inputs = (*tensors, *options)
        ctx.op, ctx.state = op, state
        # The Python objects, beside the saved tensors: main_grad is an attribute of the object.
        ctx.parameters = parameters
        outputs = _as_tuple(op.operator.launch(inputs)) if known is None else known.run()
        op.save(ctx, inputs, outputs)
        if state is not None or parameters:
            positions = [p for p, value in enumerate(tensors) if value is not None]
            ctx.edges = {p: edge for edge, p in enumerate(positions)}
        if op.passes:
            ctx.set_materialize_grads(False)
            # Autograd makes a view of an input that is an output.
            return (*outputs[: op.visible], inputs[op.residual])
        return tuple(outputs[: op.visible])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        op = ctx.op
        if ctx.state is None and not ctx.parameters:
            return _by_autograd(ctx, op, grads)
        errors.check_first_gradient(op.name)
        arguments = op.arguments(ctx, *grads)
        into: dict[int, Destination] = {}
        later: list[tuple[Destination, Tensor]] = []
        done: dict[int, Tensor] = {}
        # Once: autograd makes it anew each time.
        following = ctx.next_functions
        nodes = {p: following[edge][0] for p, edge in ctx.edges.items()}
        # Where it is True this backward goes on to the node behind the input, and does not return
        # its gradient, as in `torch.autograd.grad` for other tensors: nobody would collect what
        # was written.
        goes_on = {p: _backward.goes_on(nodes[p]) for p in ctx.parameters}
        # All that can be refused is, before anything is written.
        for p, parameter in ctx.parameters.items():
            if goes_on[p] is not True:
                continue
            found = main_grad.find(op.name, op.parameters[p], parameter)
            if found is None:
                continue
            done[p], _ = into[p] = Destination(*found)
            alignment = 1 if op.parameters[p] in GATES else errors.STREAM_ALIGNMENT
            if not main_grad.is_target(into[p].tensor, alignment):
                made = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                later.append((into[p], made))
                into[p] = Destination(made, False)
        collects = ctx.state is not None and _backward.goes_on(nodes[op.residual]) is True
        if collects:
            into[op.residual] = Destination(*ctx.state.target(op.name))
        results: list[Tensor | None] = list(op.backward(arguments, into))
        if op.untouched:
            results[op.residual :] = [grads[0]]
        if collects:
            ctx.state.written()
            results[op.residual] = None
        for target, made in later:
            (target.tensor.add_ if target.adds else target.tensor.copy_)(made)
        for p, parameter in ctx.parameters.items():
            if p in done:
                results[p] = main_grad.finish(parameter, done[p], nodes[p])
            elif goes_on[p] is not False:
                main_grad.left(parameter)
        # The first of all arguments is `how`.
        wanted = ctx.needs_input_grad
        for p in range(len(results)):
            if not wanted[1 + p]:
                results[p] = None
        return None, *results, *[None] * (op.tensors - len(results))


def _by_autograd(ctx: Any, op: Op, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What the backward of a known call returns, none of whose gradients is directed."""
    if op.passes and grads[0] is None and all(grad is None for grad in grads[:-1]):
        # Of all outputs only the passed residual was used.
        results: list[Tensor | None] = [None] * op.tensors
        results[op.residual] = grads[-1]
        return None, *results
    arguments = op.arguments(ctx, *grads)
    call = op.gradients.find_in_backward(arguments)
    if call is not None:
        results = call.run()
    else:
        results = [
            grad if wanted else None
            for grad, wanted in zip(
                _as_tuple(op.gradients(*arguments)), ctx.needs_input_grad[1:], strict=False
            )
        ]
    if op.untouched:
        results = [*results, grads[0]]
    return None, *results, *[None] * (op.tensors - len(results))


# What Function.apply calls once it has looked for tensors left over from a transform of torch.func,
# which a known call cannot have.
_apply_plain = super(torch.autograd.Function, _Eager).apply
