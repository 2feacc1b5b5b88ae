"""The table of timed ops: the fewest bytes of each, the call, and the reference it must match.

A forward is the public function without gradients, a backward the operator that autograd calls,
on what its forward saved. `sub_layer` goes through autograd, forward and backward in one call.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tile_mhc
from tile_mhc import functional, reference
from tile_mhc.bench import floors, stacks
from tile_mhc.bench.inputs import LAYERS, Inputs
from tile_mhc.ops.tile_kernels import partials
from tile_mhc.ops.tile_kernels import reference as partials_reference

Outputs = Sequence[Tensor]
Call = Callable[[], Outputs]

ROUNDINGS = 3  # to bfloat16, one on top of the other, in any op but the recompute

# As DeepSeek-V4 has them.
EPS = 1e-6
POST_MULT = 2.0
SINKHORN_STEPS = 20

SPLIT: dict[str, Any] = {"post_mult": POST_MULT, "pre_eps": EPS}
SINKHORN: dict[str, Any] = {"repeat": SINKHORN_STEPS, "eps": EPS}
PRE: dict[str, Any] = {"post_mult": POST_MULT, "sinkhorn_repeat": SINKHORN_STEPS}
# The same, in the order in which the operators take them.
PRE_OPTIONS = (EPS, EPS, POST_MULT, SINKHORN_STEPS)


@dataclass(frozen=True)
class Op:
    """One row.

    Attributes:
        name: `<stem>.fwd`, `<stem>.bwd` or of that kind.
        floor: the fewest bytes, of T, H and n.
        ours: prepares the call that is timed.
        truth: what that call returns, by the reference.
        summed: the outputs that are sums over the tokens.
        layers: whether the inputs must be `Inputs.with_layers`.
        roundings: how often an output was rounded to bfloat16, at most.
        directed: whether it writes to a destination, for which there are kernels of their own.
        by_row: whether an error is judged by its own row of H: in a stack one token's streams grow
            to a hundred times another's.
    """

    name: str
    floor: Callable[[int, int, int], int]
    ours: Callable[[Inputs], Call]
    truth: Callable[[Inputs], Outputs]
    summed: tuple[int, ...] = ()
    layers: bool = False
    roundings: int = ROUNDINGS
    directed: bool = False
    by_row: bool = False

    @property
    def stem(self) -> str:
        return self.name.partition(".")[0]


class Adding:
    """A call that adds to a tensor, its first output; `reset` makes that `start` again.

    Args:
        start: what the tensor holds at first.
        add: adds to the tensor it is given, and returns the other outputs.
    """

    def __init__(self, start: Tensor, add: Callable[[Tensor], Outputs]) -> None:
        self.start, self.total, self.add = start, start.clone(), add

    def __call__(self) -> Outputs:
        return [self.total, *self.add(self.total)]

    def reset(self) -> None:
        self.total.copy_(self.start)


def _projection_bwd(x: Inputs) -> Call:
    op = torch.ops.tile_mhc
    saved = op.projection(x.residual, x.weight, None, EPS, None, False)
    arguments = (x.grad_mixes, x.residual, x.weight, None, *saved, False)
    return lambda: op.projection_backward(*arguments)[:2]


def _projection_bwd_truth(x: Inputs) -> Outputs:
    saved = reference.projection_with_rms(x.residual, x.weight, None, EPS)
    grads = reference.projection_backward(x.grad_mixes, x.residual, x.weight, None, *saved)
    return grads[:2]


def _projection_bwd_add(x: Inputs) -> Call:
    op = torch.ops.tile_mhc
    saved = op.projection(x.residual, x.weight, None, EPS, None, False)
    arguments = (x.grad_mixes, x.residual, x.weight, None, *saved, False)
    into = (None, None, [True, False, False])
    return Adding(
        x.grad_residual,
        lambda total: op.projection_backward_into(*arguments, total, *into)[1:2],
    )


def _projection_bwd_add_truth(x: Inputs) -> Outputs:
    grad_residual, grad_weight = _projection_bwd_truth(x)
    return x.grad_residual + grad_residual, grad_weight


def _contract_bwd(x: Inputs) -> Call:
    op = torch.ops.tile_mhc
    saved = op.contract(*x.head, None, EPS, EPS, None, False)[1:]
    arguments = (x.grad_hidden, *x.head, None, *saved, EPS, False)
    return lambda: op.contract_backward(*arguments)[:4]


def _contract_bwd_truth(x: Inputs) -> Outputs:
    saved = reference.contract_with_mixes(*x.head, None, EPS, EPS)[1:]
    return reference.contract_backward(x.grad_hidden, *x.head, None, *saved, EPS)[:4]


def _pre_grads(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x.grad_hidden, x.grad_post.squeeze(-1), x.grad_comb


def _fused_pre_bwd(x: Inputs, accumulated: Tensor | None = None) -> Call:
    op = torch.ops.tile_mhc
    saved = op.fused_pre(*x.gates, None, EPS, *PRE_OPTIONS, None, False)[3:]
    arguments = (*_pre_grads(x), *x.gates, None, *saved, *PRE_OPTIONS, False, accumulated)
    return lambda: op.fused_pre_backward(*arguments)[:4]


def _fused_pre_bwd_truth(x: Inputs, accumulated: Tensor | None = None) -> Outputs:
    saved = reference.fused_pre_with_mixes(*x.gates, None, EPS, *PRE_OPTIONS)[3:]
    arguments = (*_pre_grads(x), *x.gates, None, *saved, *PRE_OPTIONS, False, accumulated)
    return reference.fused_pre_backward(*arguments)[:4]


def _identity_pre_bwd(x: Inputs, accumulated: Tensor | None = None) -> Call:
    op = torch.ops.tile_mhc
    saved = op.identity_pre(*x.identity, None, EPS, EPS, EPS, POST_MULT, None, False)[2:]
    grads = x.grad_hidden, x.grad_post.squeeze(-1)
    options = (EPS, POST_MULT, False, accumulated)
    arguments = (*grads, *x.identity, None, *saved, *options)
    return lambda: op.identity_pre_backward(*arguments)[:4]


def _identity_pre_bwd_truth(x: Inputs, accumulated: Tensor | None = None) -> Outputs:
    saved = reference.identity_pre_with_mixes(*x.identity, None, EPS, EPS, EPS, POST_MULT)[2:]
    grads = x.grad_hidden, x.grad_post.squeeze(-1)
    options = (EPS, POST_MULT, False, accumulated)
    arguments: tuple[Any, ...] = (*grads, *x.identity, None, *saved, *options)
    return reference.identity_pre_backward(*arguments)[:4]


def _delayed_pre(x: Inputs) -> tuple[Any, ...]:
    """The operator's inputs before its options."""
    return *x.gates, x.pre_mix, None


def _delayed_grads(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input, grad_post, grad_comb = _pre_grads(x)
    return grad_input, x.grad_pre.squeeze(-1), grad_post, grad_comb


def _delayed_pre_bwd(x: Inputs, accumulated: Tensor | None = None) -> Call:
    op = torch.ops.tile_mhc
    inputs = _delayed_pre(x)
    saved = op.delayed_pre(*inputs, EPS, *PRE_OPTIONS, None, False)[4:]
    arguments = (*_delayed_grads(x), *inputs, *saved, *PRE_OPTIONS, False, True, accumulated)
    return lambda: op.delayed_pre_backward(*arguments)[:5]


def _delayed_pre_bwd_truth(x: Inputs, accumulated: Tensor | None = None) -> Outputs:
    inputs = _delayed_pre(x)
    given: list[Any] = [*inputs, EPS, *PRE_OPTIONS]
    saved = reference.delayed_pre_with_mixes(*given)[4:]
    arguments: tuple[Any, ...] = (
        *_delayed_grads(x),
        *inputs,
        *saved,
        *PRE_OPTIONS,
        False,
        accumulated,
    )
    return reference.delayed_pre_backward(*arguments)[:5]


def _post_pre(x: Inputs) -> tuple[Any, ...]:
    """What both kinds of boundaries read."""
    return x.hidden, x.residual, x.post_mix, x.comb_mix, *x.gates[1:]


def _post_pre_bwd(x: Inputs, pre_mix: Tensor | None) -> Call:
    op = torch.ops.tile_mhc
    inputs = (*_post_pre(x), pre_mix, None, None)
    outputs = op.post_pre(*inputs, None, EPS, *PRE_OPTIONS, EPS, None, False)
    saved = (outputs[0], *outputs[5:])
    options = (*PRE_OPTIONS, False, pre_mix is not None)
    arguments = (x.grad_residual, *_delayed_grads(x), *inputs, *saved, *options)
    count = 7 if pre_mix is None else 8
    return lambda: op.post_pre_backward(*arguments)[:count]


def _post_pre_bwd_truth(x: Inputs, pre_mix: Tensor | None) -> Outputs:
    inputs: tuple[Any, ...] = (*_post_pre(x), pre_mix, None, None)
    # What is projected was rounded: the gradient of the weight is a product with it.
    streams = reference.post(*inputs[:4]).bfloat16().to(x.residual.dtype)
    mixes, inv_rms = reference.projection_with_rms(streams, x.weight, None, EPS)
    grads_of = (x.grad_residual, *_delayed_grads(x))
    arguments = [*grads_of, *inputs, streams, mixes, inv_rms, *PRE_OPTIONS]
    grads = reference.post_pre_backward(*arguments)
    return [grad for grad in grads if grad is not None]


def _boundary(forward: Callable[..., Outputs], x: Inputs, pre_mix: Tensor | None) -> Call:
    """Forward and backward of a boundary, all of whose outputs are read by others."""
    given = [*_post_pre(x), *([] if pre_mix is None else [pre_mix])]
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    grads = [x.grad_residual, *_delayed_grads(x)]
    if pre_mix is None:
        del grads[2]

    def call() -> Outputs:
        outputs = forward(*leaves)
        found = torch.autograd.grad(outputs, leaves, grads)
        return [*(out.detach() for out in outputs), *found]

    return call


def _boundary_forward(*inputs: Tensor) -> Outputs:
    pre_mix = inputs[7] if len(inputs) == 8 else None
    return tile_mhc.post_pre(*inputs[:7], pre_mix=pre_mix, **PRE)


def _boundary_truth(*inputs: Tensor) -> Outputs:
    """Of streams that go on as they were rounded."""
    streams = reference.post(*inputs[:4])
    rounded = streams + (streams.bfloat16().to(streams.dtype) - streams).detach()
    pre_mix = inputs[7] if len(inputs) == 8 else None
    return streams, *reference.fused_pre(rounded, *inputs[4:7], pre_mix=pre_mix, **PRE)


def recompute_outputs(x: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Layer inputs and residuals to be written."""
    layers = len(x.pre_mixes)
    return (
        [torch.empty_like(x.hidden) for _ in range(layers)],
        [torch.empty_like(x.residual) for _ in range(layers)],
    )


def _partials_pre(x: Inputs) -> Call:
    def call() -> Outputs:
        outs = [torch.empty_like(t) for t in (x.post_mix, x.comb_mix, x.hidden)]
        partials.partials_pre(
            x.split_products,
            x.split_squares,
            x.scale,
            x.bias,
            x.residual[0],
            EPS,
            *PRE_OPTIONS,
            outs[0].view(-1, x.n),
            outs[1].view(-1, x.n * x.n),
            outs[2][0],
        )
        return [outs[2], *outs[:2]]

    return call


def _partials_pre_truth(x: Inputs) -> Outputs:
    sums = (x.split_products, x.split_squares)
    post_mix, comb_mix, layer_input = partials_reference.partials_pre(
        *sums, x.scale, x.bias, x.residual[0], EPS, *PRE_OPTIONS[:3], SINKHORN_STEPS
    )
    return [out.unsqueeze(0) for out in (layer_input, post_mix, comb_mix)]


def _recompute(x: Inputs) -> Call:
    layer_inputs, residuals = recompute_outputs(x)

    def call() -> Outputs:
        tile_mhc.recompute(
            x.residual,
            x.pre_mixes,
            x.layer_outputs,
            x.post_mixes,
            x.comb_mixes,
            layer_inputs=layer_inputs,
            residuals=residuals,
        )
        return [*layer_inputs, *residuals]

    return call


def _recompute_truth(x: Inputs) -> Outputs:
    layers = (x.pre_mixes, x.layer_outputs, x.post_mixes, x.comb_mixes)
    layer_inputs, residuals = reference.recompute(x.residual, *map(list, layers))
    return [*layer_inputs, *residuals]


def sub_layer(forward: Callable[..., tuple[Tensor, Tensor]], x: Inputs) -> Call:
    """Forward and backward of one sub-layer, whose layer itself takes no time.

    `forward` takes residual, weight, scale, bias and the layer's output, and returns the layer's
    input and the streams.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (*x.gates, x.hidden)]

    def call() -> Outputs:
        outputs = forward(*leaves)
        grads = torch.autograd.grad(outputs, leaves, (x.grad_hidden, x.grad_residual))
        return [*(out.detach() for out in outputs), *grads]

    return call


def _sub_layer_forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    *gates, layer_output = inputs
    layer_input, *mixes, residual = functional.mhc_pre(*gates, **PRE, passes_residual=True)
    return layer_input, functional.mhc_post(layer_output, residual, *mixes)


def _sub_layer_truth(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    *gates, layer_output = inputs
    layer_input, *mixes = reference.fused_pre(*gates, **PRE)
    return layer_input, reference.post(layer_output, gates[0], *mixes)


def make_ops() -> list[Op]:
    """Every op, in the order of a sub-layer."""
    op = torch.ops.tile_mhc
    return [
        Op(
            "expand.fwd",
            floors.expand_fwd,
            lambda x: lambda: [tile_mhc.expand(x.hidden, x.n)],
            lambda x: [reference.expand(x.hidden, x.n)],
        ),
        Op(
            "expand.bwd",
            floors.expand_bwd,
            lambda x: lambda: [op.expand_backward(x.grad_residual)],
            lambda x: [reference.expand_backward(x.grad_residual)],
        ),
        Op(
            "projection.fwd",
            floors.projection_fwd,
            lambda x: lambda: [tile_mhc.projection(x.residual, x.weight)],
            lambda x: [reference.projection(x.residual, x.weight)],
        ),
        Op(
            "projection.bwd",
            floors.projection_bwd,
            _projection_bwd,
            _projection_bwd_truth,
            summed=(1,),
        ),
        Op(
            "projection.bwd_add",
            floors.projection_bwd_add,
            _projection_bwd_add,
            _projection_bwd_add_truth,
            summed=(1,),
            directed=True,
        ),
        Op(
            "split_mixes.fwd",
            floors.split_mixes_fwd,
            lambda x: (
                lambda: tile_mhc.split_mixes(x.mixes, x.scale, x.bias, num_streams=x.n, **SPLIT)
            ),
            lambda x: reference.split_mixes(x.mixes, x.scale, x.bias, num_streams=x.n, **SPLIT),
        ),
        Op(
            "split_mixes.bwd",
            floors.split_mixes_bwd,
            lambda x: (
                lambda: op.split_mixes_backward(
                    x.grad_pre, x.grad_post, x.grad_comb, x.mixes, x.scale, x.bias, x.n, POST_MULT
                )
            ),
            lambda x: reference.split_mixes_backward(
                x.grad_pre, x.grad_post, x.grad_comb, x.mixes, x.scale, x.bias, x.n, POST_MULT
            ),
            summed=(1, 2),
        ),
        Op(
            "sinkhorn.fwd",
            floors.sinkhorn_fwd,
            lambda x: lambda: [tile_mhc.sinkhorn(x.logits, **SINKHORN)],
            lambda x: [reference.sinkhorn(x.logits, **SINKHORN)],
        ),
        Op(
            "sinkhorn.bwd",
            floors.sinkhorn_bwd,
            lambda x: lambda: [op.sinkhorn_backward(x.grad_comb, x.logits, **SINKHORN)],
            lambda x: [reference.sinkhorn_backward(x.grad_comb, x.logits, **SINKHORN)],
        ),
        Op(
            "aggregate.fwd",
            floors.aggregate_fwd,
            lambda x: lambda: [tile_mhc.aggregate(x.residual, x.pre_mix)],
            lambda x: [reference.aggregate(x.residual, x.pre_mix)],
        ),
        Op(
            "aggregate.bwd",
            floors.aggregate_bwd,
            lambda x: lambda: op.aggregate_backward(x.grad_hidden, x.residual, x.pre_mix),
            lambda x: reference.aggregate_backward(x.grad_hidden, x.residual, x.pre_mix),
        ),
        Op(
            "post.fwd",
            floors.post_fwd,
            lambda x: lambda: [tile_mhc.post(x.hidden, x.residual, x.post_mix, x.comb_mix)],
            lambda x: [reference.post(x.hidden, x.residual, x.post_mix, x.comb_mix)],
        ),
        Op(
            "post.bwd",
            floors.post_bwd,
            lambda x: (
                lambda: op.post_backward(
                    x.grad_residual, x.hidden, x.residual, x.post_mix, x.comb_mix, None
                )[:4]
            ),
            lambda x: reference.post_backward(
                x.grad_residual, x.hidden, x.residual, x.post_mix, x.comb_mix
            )[:4],
        ),
        Op(
            "head_mix.fwd",
            floors.head_mix_fwd,
            lambda x: lambda: [tile_mhc.head_mix(x.head_mixes, x.head_scale, x.head_bias)],
            lambda x: [reference.head_mix(x.head_mixes, x.head_scale, x.head_bias)],
        ),
        Op(
            "head_mix.bwd",
            floors.head_mix_bwd,
            lambda x: (
                lambda: op.head_mix_backward(
                    x.grad_head_mix, x.head_mixes, x.head_scale, x.head_bias
                )
            ),
            lambda x: reference.head_mix_backward(
                x.grad_head_mix, x.head_mixes, x.head_scale, x.head_bias
            ),
            summed=(1, 2),
        ),
        Op(
            "contract.fwd",
            floors.contract_fwd,
            lambda x: lambda: [tile_mhc.contract(*x.head)],
            lambda x: [reference.contract(*x.head)],
        ),
        Op(
            "contract.bwd",
            floors.contract_bwd,
            _contract_bwd,
            _contract_bwd_truth,
            summed=(1, 2, 3),
        ),
        Op(
            "fused_pre.fwd",
            floors.fused_pre_fwd,
            lambda x: lambda: tile_mhc.fused_pre(*x.gates, **PRE),
            lambda x: reference.fused_pre(*x.gates, **PRE),
        ),
        Op("partials_pre.fwd", floors.partials_pre_fwd, _partials_pre, _partials_pre_truth),
        Op(
            "fused_pre.bwd",
            floors.fused_pre_bwd,
            _fused_pre_bwd,
            _fused_pre_bwd_truth,
            summed=(1, 2, 3),
        ),
        # On top of the gradient that `passes_residual` brings.
        Op(
            "fused_pre.bwd_add",
            floors.fused_pre_bwd_add,
            lambda x: _fused_pre_bwd(x, x.grad_residual),
            lambda x: _fused_pre_bwd_truth(x, x.grad_residual),
            summed=(1, 2, 3),
        ),
        Op(
            "delayed_pre.fwd",
            floors.delayed_pre_fwd,
            lambda x: lambda: tile_mhc.fused_pre(*x.gates, pre_mix=x.pre_mix, **PRE),
            lambda x: reference.fused_pre(*x.gates, pre_mix=x.pre_mix, **PRE),
        ),
        Op(
            "delayed_pre.bwd",
            floors.delayed_pre_bwd,
            _delayed_pre_bwd,
            _delayed_pre_bwd_truth,
            summed=(1, 2, 3),
        ),
        Op(
            "delayed_pre.bwd_add",
            floors.delayed_pre_bwd_add,
            lambda x: _delayed_pre_bwd(x, x.grad_residual),
            lambda x: _delayed_pre_bwd_truth(x, x.grad_residual),
            summed=(1, 2, 3),
        ),
        Op(
            "post_pre.fwd",
            floors.post_pre_fwd,
            lambda x: lambda: tile_mhc.post_pre(*_post_pre(x), **PRE),
            lambda x: reference.post_pre(*_post_pre(x), **PRE),
        ),
        Op(
            "post_pre.bwd",
            floors.post_pre_bwd,
            lambda x: _post_pre_bwd(x, None),
            lambda x: _post_pre_bwd_truth(x, None),
            summed=(4, 5, 6),
        ),
        Op(
            "post_pre_delayed.fwd",
            floors.post_pre_delayed_fwd,
            lambda x: lambda: tile_mhc.post_pre(*_post_pre(x), pre_mix=x.pre_mix, **PRE),
            lambda x: reference.post_pre(*_post_pre(x), pre_mix=x.pre_mix, **PRE),
        ),
        Op(
            "post_pre_delayed.bwd",
            floors.post_pre_delayed_bwd,
            lambda x: _post_pre_bwd(x, x.pre_mix),
            lambda x: _post_pre_bwd_truth(x, x.pre_mix),
            summed=(4, 5, 6),
        ),
        Op(
            "post_pre.fwd+bwd",
            floors.post_pre_both,
            lambda x: _boundary(_boundary_forward, x, None),
            lambda x: _boundary(_boundary_truth, x, None)(),
            summed=(8, 9, 10),
        ),
        Op(
            "post_pre_delayed.fwd+bwd",
            floors.post_pre_delayed_both,
            lambda x: _boundary(_boundary_forward, x, x.pre_mix),
            lambda x: _boundary(_boundary_truth, x, x.pre_mix)(),
            summed=(9, 10, 11),
        ),
        *_identity_rows(),
        Op(
            "recompute.fwd",
            floors.recompute_fwd,
            _recompute,
            _recompute_truth,
            layers=True,
            roundings=LAYERS,  # a layer's streams are rounded, and the next layer reads those
        ),
        Op(
            "sub_layer.fwd+bwd",
            floors.sub_layer,
            lambda x: sub_layer(_sub_layer_forward, x),
            lambda x: sub_layer(_sub_layer_truth, x)(),
            summed=(3, 4, 5),
        ),
        *_stack_rows(),
        *_norm_rows(),
    ]


def _identity_rows() -> list[Op]:
    """Of streams that are not mixed, and of a head that is their mean."""
    op = torch.ops.tile_mhc
    return [
        Op(
            "identity_pre.fwd",
            floors.identity_pre_fwd,
            lambda x: lambda: tile_mhc.identity_pre(*x.identity, post_mult=POST_MULT),
            lambda x: reference.identity_pre(*x.identity, post_mult=POST_MULT),
        ),
        Op(
            "identity_pre.bwd",
            floors.identity_pre_bwd,
            _identity_pre_bwd,
            _identity_pre_bwd_truth,
            summed=(1, 2, 3),
        ),
        Op(
            "identity_pre.bwd_add",
            floors.identity_pre_bwd_add,
            lambda x: _identity_pre_bwd(x, x.grad_residual),
            lambda x: _identity_pre_bwd_truth(x, x.grad_residual),
            summed=(1, 2, 3),
        ),
        Op(
            "identity_post.fwd",
            floors.identity_post_fwd,
            lambda x: lambda: [tile_mhc.identity_post(x.hidden, x.residual, x.post_mix)],
            lambda x: [reference.identity_post(x.hidden, x.residual, x.post_mix)],
        ),
        Op(
            "identity_post.bwd",
            floors.identity_post_bwd,
            lambda x: (
                lambda: op.identity_post_backward(x.grad_residual, x.hidden, x.post_mix, None)[:2]
            ),
            lambda x: reference.identity_post_backward(x.grad_residual, x.hidden, x.post_mix)[:2],
        ),
        Op(
            "stream_mean.fwd",
            floors.stream_mean_fwd,
            lambda x: lambda: [tile_mhc.stream_mean(x.residual)],
            lambda x: [reference.stream_mean(x.residual)],
        ),
        Op(
            "stream_mean.bwd",
            floors.stream_mean_bwd,
            lambda x: lambda: [op.stream_mean_backward(x.grad_hidden, x.n)],
            lambda x: [reference.stream_mean_backward(x.grad_hidden, x.n)],
        ),
    ]


def _stack_rows() -> list[Op]:
    """V4 and V4.1, by boundaries and by separate ops."""
    of_kind = {
        "stack": (floors.stack, stacks.boundary, False),
        "stack_separate": (floors.stack_separate, stacks.separate, False),
        "stack_delayed": (floors.stack_delayed, stacks.boundary, True),
        "stack_delayed_separate": (floors.stack_delayed_separate, stacks.separate, True),
    }
    return [
        Op(
            f"{stem}.fwd+bwd",
            floor,
            functools.partial(stacks.stack, run, delayed=delayed),
            functools.partial(_stack_truth, delayed=delayed),
            roundings=ROUNDINGS * stacks.BOUNDARIES,
            by_row=True,
        )
        for stem, (floor, run, delayed) in of_kind.items()
    ]


def _stack_truth(x: Inputs, delayed: bool) -> Outputs:
    return stacks.stack(stacks.exact, x, delayed)()


def _norm_rows() -> list[Op]:
    """Without gradients: what serves a model."""
    of_kind: dict[str, tuple[Any, Any, bool]] = {
        "post_pre_norm": (floors.post_pre_norm_fwd, stacks.normed, False),
        "post_pre_norm_separate": (
            floors.post_pre_norm_separate_fwd,
            stacks.normed_separate,
            False,
        ),
        "post_pre_norm_delayed": (floors.post_pre_norm_delayed_fwd, stacks.normed, True),
        "post_pre_norm_delayed_separate": (
            floors.post_pre_norm_delayed_separate_fwd,
            stacks.normed_separate,
            True,
        ),
    }
    return [
        Op(
            f"{stem}.fwd",
            floor,
            functools.partial(run, delayed=delayed),
            functools.partial(stacks.normed_truth, delayed=delayed),
        )
        for stem, (floor, run, delayed) in of_kind.items()
    ]
