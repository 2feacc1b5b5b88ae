"""What torch's FlopCounterMode counts of an operator, from the shapes of its arguments.

As torch counts its own: two a multiply-add of a contraction, and nothing for what is pointwise or a
plain sum (gates, Sinkhorn, norms, copies). T tokens, n streams, H their width, N mixes:

    projection  2 T N n H    aggregate  2 T n H    post  2 T n (n + 1) H

and twice that for a backward. The numbers of a model are then those of the same model written in
torch's matmuls.
"""

import math
from collections.abc import Sequence
from typing import Any

Shape = Sequence[int]


def pointwise(*_: Any, **__: Any) -> int:
    return 0


def projection(residual: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(residual) * weight[0]


def projection_backward(_grad: Shape, residual: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * projection(residual, weight)


def padded_projection_backward(
    _grad_h: Shape, _grad_ms: Shape, x: Shape, weight: Shape, *_: Any, **__: Any
) -> int:
    return 2 * projection(x, weight)


def aggregate(residual: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(residual)


def aggregate_backward(_grad: Shape, residual: Shape, *_: Any, **__: Any) -> int:
    return 2 * aggregate(residual)


def post(_layer_output: Shape, residual: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(residual) * (residual[-2] + 1)


def post_backward(_grad: Shape, layer_output: Shape, residual: Shape, *_: Any, **__: Any) -> int:
    return 2 * post(layer_output, residual)


def interleaved_post(_f: Shape, _bias: Any, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * (x[-1] + 1)


def interleaved_post_backward(
    _grad: Shape, f: Shape, bias: Any, x: Shape, *_: Any, **__: Any
) -> int:
    return 2 * interleaved_post(f, bias, x)


def projection_and_aggregate(residual: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return projection(residual, weight) + aggregate(residual)


def contract_backward(_grad: Shape, residual: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * projection_and_aggregate(residual, weight)


def fused_pre_backward(
    _grad_input: Shape,
    _grad_post: Shape,
    _grad_comb: Shape,
    residual: Shape,
    weight: Shape,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * projection_and_aggregate(residual, weight)


def recompute(
    residual: Shape, pre_mixes: Sequence[Shape], layer_outputs: Sequence[Shape], *_: Any, **__: Any
) -> int:
    posts = sum(post(layer_output, residual) for layer_output in layer_outputs)
    return len(pre_mixes) * aggregate(residual) + posts
