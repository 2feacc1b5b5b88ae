"""What torch's FlopCounterMode counts of an operator, from the shapes of its arguments.

As torch counts its own: two per multiply-add of a contraction, and nothing for what is pointwise or
a plain sum (gates, Sinkhorn, norms, copies). T tokens, n streams, H their width, N mixes:

    projection  2 T N n H    aggregate  2 T n H    post  2 T n (n + 1) H
    identity_post  2 T n H

and twice that for a backward. The numbers of a model are then those of the same model written in
torch's matmuls.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Shape = Sequence[int]

# Importing it brings in triton, where that is installed: only who counts FLOPs pays for it.
COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Let FlopCounterMode count `formula` for an operator, now or when its module is imported."""
    counter = sys.modules.get(COUNTER)
    if counter is not None:
        counter.register_flop_formula(operator)(formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _AfterImport())
    _waiting.append((operator, formula))


class _AfterImport(MetaPathFinder):
    """Registers what waits as soon as torch's counter has been imported, by whomever."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            while _waiting:
                operator, formula = _waiting.pop()
                module.register_flop_formula(operator)(formula)

        loader.exec_module = run_and_register
        return spec


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


def identity_post(
    _output: Shape, _mix: Shape, _bias: Any, residual: Shape, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(residual)


def identity_post_backward(grad: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(grad)


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


def identity_pre_backward(
    _grad_input: Shape, _grad_post: Shape, residual: Shape, weight: Shape, *_: Any, **__: Any
) -> int:
    return 2 * projection_and_aggregate(residual, weight)


def delayed_pre_backward(
    _grad_input: Shape,
    _grad_next: Shape,
    _grad_post: Shape,
    _grad_comb: Shape,
    residual: Shape,
    weight: Shape,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * projection_and_aggregate(residual, weight)


def post_pre(
    layer_output: Shape,
    residual: Shape,
    _post_mix: Shape,
    _comb_mix: Shape,
    weight: Shape,
    *_: Any,
    **__: Any,
) -> int:
    return post(layer_output, residual) + projection_and_aggregate(residual, weight)


def post_pre_backward(
    _grad_streams: Shape | None,
    _grad_input: Shape,
    _grad_next: Shape | None,
    _grad_post: Shape,
    _grad_comb: Shape,
    *inputs: Any,
    **__: Any,
) -> int:
    return 2 * post_pre(*inputs)


def recompute(
    residual: Shape, pre_mixes: Sequence[Shape], layer_outputs: Sequence[Shape], *_: Any, **__: Any
) -> int:
    posts = sum(post(layer_output, residual) for layer_output in layer_outputs)
    return len(pre_mixes) * aggregate(residual) + posts
