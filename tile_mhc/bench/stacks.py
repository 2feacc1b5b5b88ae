"""Boundaries in a row, as a model trains them, and with a norm behind, as one is served.

Each with `post_pre` and, for comparison in the same run, with a post and a `fused_pre`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import tile_mhc
from tile_mhc import reference
from tile_mhc.bench.inputs import Inputs

Outputs = Sequence[Tensor]
Call = Callable[[], Outputs]
# Of (layer_output, residual, mixes of the sub-layer that ends, gates of the one that begins): the
# streams, the layer input, and the mixes of the one that begins.
Boundary = Callable[..., tuple[Tensor, ...]]

BOUNDARIES = 8
NORM_EPS = 1e-6
# As DeepSeek-V4 has them.
PRE: dict[str, Any] = {"post_mult": 2.0, "sinkhorn_repeat": 20}


# How many tensors these return hangs on the pre_mix that they are given or not.
post_pre: Callable[..., Any] = tile_mhc.post_pre
fused_pre: Callable[..., Any] = tile_mhc.fused_pre
exact_post_pre: Callable[..., Any] = reference.post_pre


def boundary(
    layer_output: Tensor, residual: Tensor, mixes: Sequence[Tensor], gates: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    of_post, options = split(mixes)
    outputs: tuple[Tensor, ...] = post_pre(layer_output, residual, *of_post, *gates, **options)
    return outputs


def separate(
    layer_output: Tensor, residual: Tensor, mixes: Sequence[Tensor], gates: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    of_post, options = split(mixes)
    streams = tile_mhc.post(layer_output, residual, *of_post)
    *outputs, streams = fused_pre(streams, *gates, **options, passes_residual=True)
    return streams, *outputs


def exact(
    layer_output: Tensor, residual: Tensor, mixes: Sequence[Tensor], gates: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    of_post, options = split(mixes)
    outputs = exact_post_pre(layer_output, residual, *of_post, *gates, **options)
    return tuple(outputs)


def split(mixes: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """post_mix and comb_mix; and the options of a pre, with the pre_mix of V4.1 if there is one."""
    *pre_mix, post_mix, comb_mix = mixes
    return (post_mix, comb_mix), PRE | ({"pre_mix": pre_mix[0]} if pre_mix else {})


def mixes_of(x: Inputs, delayed: bool) -> list[Tensor]:
    return [*([x.pre_mix] if delayed else []), x.post_mix, x.comb_mix]


def stack(run: Boundary, x: Inputs, delayed: bool) -> Call:
    """Forward and backward of BOUNDARIES boundaries, behind each a linear layer.

    Parameters are each boundary's and each layer's own. The outputs are those of the last one, and
    the gradients of what the first one reads; all others are computed, too.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (x.hidden, x.residual)]
    parameters = [
        tuple(tensor.clone().requires_grad_() for tensor in (*x.gates[1:], x.linear))
        for _ in range(BOUNDARIES)
    ]
    wanted = [*leaves, *(tensor for tensors in parameters for tensor in tensors)]

    def call() -> Outputs:
        (layer_output, streams), mixes = leaves, mixes_of(x, delayed)
        for *gates, linear in parameters:
            streams, layer_input, *mixes = run(layer_output, streams, mixes, gates)
            layer_output = torch.nn.functional.linear(layer_input, linear)
        outputs = (streams, layer_output)
        # The reference sees that nothing reads the last mixes of V4.1.
        upstream = (x.grad_residual, x.grad_hidden)
        grads = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)
        return [*(out.detach() for out in outputs), *grads[:2]]

    return call


def normed(x: Inputs, delayed: bool) -> Call:
    """A boundary without gradients, with the norm of the layer input: one op."""
    of_post, options = split(mixes_of(x, delayed))
    inputs = (x.hidden, x.residual, *of_post, *x.gates[1:])
    options |= {"layer_norm_weight": x.layer_norm, "layer_norm_eps": NORM_EPS}
    return lambda: post_pre(*inputs, **options)


def normed_separate(x: Inputs, delayed: bool) -> Call:
    """The same as two ops and torch's norm: one kernel, for a weight of its input's dtype."""
    mixes = mixes_of(x, delayed)
    weight = x.layer_norm.to(x.hidden.dtype)
    shape = list(weight.shape)

    def call() -> Outputs:
        streams, layer_input, *others = separate(x.hidden, x.residual, mixes, x.gates[1:])
        layer_input = torch.nn.functional.rms_norm(layer_input, shape, weight, NORM_EPS)
        return [streams, layer_input, *others]

    return call


def normed_truth(x: Inputs, delayed: bool) -> Outputs:
    streams, layer_input, *others = exact(x.hidden, x.residual, mixes_of(x, delayed), x.gates[1:])
    return [streams, reference.input_norm(layer_input, x.layer_norm, eps=NORM_EPS), *others]
