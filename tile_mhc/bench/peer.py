"""TileKernels beside our ops: the call of each, with the outputs in our order.

`find` tells the releases apart by what they have. This is 1.0.0; `plain_peer` is 2.1.0.
Its backwards add to a gradient of the residual that exists, where ours write one, `bwd_add` apart:
that costs it a read of the streams, and is the only way it has. It has no working `contract`, and
kernels for four streams alone.
"""

import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tile_mhc.bench.inputs import LAYERS, Inputs
from tile_mhc.bench.ops import (
    EPS,
    POST_MULT,
    SINKHORN_STEPS,
    Adding,
    Call,
    Outputs,
    recompute_outputs,
    sub_layer,
)
from tile_mhc.bench.plain_peer import PlainTileKernels

NAME = "tile_kernels"
STREAMS = 4
# What `TileKernels.backward` calls: its autograd.Functions, by our stems.
FUNCTIONS = {
    "expand": ("expand", "ExpandToMHCFn"),
    "projection": ("norm_fn", "MHCPreNormFn"),
    "split_mixes": ("pre_split_mixes", "MHCPreSplitMixes"),
    "sinkhorn": ("sinkhorn", "_SinkhornNormalize"),
    "aggregate": ("pre_apply_mix", "MHCPreApplyMix"),
    "post": ("post", "MHCPost"),
    "head_mix": ("head_compute_mix", "MHCHeadComputeMix"),
}


class Peer(Protocol):
    """A release: how to prepare each op's call, by the op's name, and which it is."""

    calls: dict[str, Callable[[Inputs], Call]]
    release: str


def find() -> Peer | None:
    """TileKernels' mHC modules, of the release that is installed.

    Without the __init__ of its packages: they import the rest of it, of which 1.0.0's does not
    compile with tilelang 0.1.15.
    """
    spec = importlib.util.find_spec(NAME)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    release = _release(root)
    # Later ones have no autograd for mHC.
    if not (root / "modeling" / "mhc").is_dir():
        _stand_in(root, [NAME])
        return PlainTileKernels(release)
    _stand_in(root, [NAME, f"{NAME}.modeling"])
    return TileKernels(release)


def _release(root: Path) -> str:
    """Of a package, read without importing it."""
    file = root / "_version.py"
    text = file.read_text() if file.exists() else ""
    found = re.search(r"__version__ = [^\n]*'([\d.]+)'", text)
    return found[1] if found else "of unknown version"


def _stand_in(root: Path, names: Sequence[str]) -> None:
    """Packages by these names whose modules are found, and whose __init__ does not run."""
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package


def accumulating(
    residual: Tensor, backward: Callable[[], Outputs], start: Tensor | None = None
) -> Adding:
    """A backward that adds the gradient of the residual to one hung on the residual's storage.

    `backward` returns what follows that gradient, which is `start` or zero at first.
    """
    storage = residual.untyped_storage()

    def add(total: Tensor) -> Outputs:
        storage.grad_from_mhc_post = total  # type: ignore[attr-defined]
        return backward()

    return Adding(torch.zeros_like(residual) if start is None else start, add)


class _Context:
    """In place of an autograd.Function's context, to call its backward alone."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


class TileKernels:
    """Its functions, and `calls`: how to prepare each op's call, by the op's name."""

    def __init__(self, release: str) -> None:
        self.release = release
        ops = f"{NAME}.modeling.mhc.ops"
        self.ops = importlib.import_module(ops)
        self.functional = importlib.import_module(f"{NAME}.modeling.mhc.functional")
        self.recompute_module = importlib.import_module(f"{NAME}.mhc.multilayer_recompute_kernel")
        self.functions = {
            stem: getattr(importlib.import_module(f"{ops}.{module}"), function)
            for stem, (module, function) in FUNCTIONS.items()
        }
        self.calls: dict[str, Callable[[Inputs], Call]] = {
            "expand.fwd": lambda x: lambda: [self.ops.expand_to_mhc(x.hidden, x.n)],
            "expand.bwd": lambda x: self.backward(
                "expand", (x.hidden, x.n, None), (x.grad_residual,), slice(1)
            ),
            "projection.fwd": lambda x: (
                lambda: [self.ops.mhc_pre_norm_fn(x.residual, x.weight, None, EPS)]
            ),
            "projection.bwd": lambda x: accumulating(x.residual, self.projection_backward(x)),
            "projection.bwd_add": lambda x: accumulating(
                x.residual, self.projection_backward(x), x.grad_residual
            ),
            "split_mixes.fwd": lambda x: (
                lambda: self.ops.mhc_pre_split_mixes(x.mixes, x.scale, x.bias, x.n, POST_MULT, EPS)
            ),
            "split_mixes.bwd": lambda x: self.backward(
                "split_mixes",
                (x.mixes, x.scale, x.bias, x.n, POST_MULT, EPS),
                (x.grad_pre, x.grad_post, x.grad_comb),
                slice(3),
            ),
            "sinkhorn.fwd": lambda x: (
                lambda: [self.ops.sinkhorn_normalize(x.logits, SINKHORN_STEPS, EPS)]
            ),
            "sinkhorn.bwd": lambda x: self.backward(
                "sinkhorn", (x.logits[0], SINKHORN_STEPS, EPS), (x.grad_comb[0],), slice(1)
            ),
            "aggregate.fwd": lambda x: lambda: [self.ops.mhc_pre_apply_mix(x.residual, x.pre_mix)],
            "aggregate.bwd": lambda x: accumulating(
                x.residual,
                self.backward(
                    "aggregate", (x.residual, x.pre_mix, None), (x.grad_hidden,), slice(1, 2)
                ),
            ),
            "post.fwd": lambda x: (
                lambda: [self.ops.mhc_post(x.hidden, x.residual, x.post_mix, x.comb_mix)]
            ),
            "post.bwd": lambda x: (
                lambda: self.ops.mhc_post_bwd(
                    x.hidden, x.residual, x.post_mix, x.comb_mix, x.grad_residual
                )
            ),
            "head_mix.fwd": lambda x: (
                lambda: [
                    self.ops.mhc_head_compute_mix(x.head_mixes, x.head_scale, x.head_bias, EPS)
                ]
            ),
            "head_mix.bwd": lambda x: self.backward(
                "head_mix",
                (x.head_mixes, x.head_scale, x.head_bias, EPS),
                (x.grad_head_mix,),
                slice(3),
            ),
            "fused_pre.fwd": self.fused_pre,
            "fused_pre.bwd": self.fused_pre_backward,
            "fused_pre.bwd_add": lambda x: self.fused_pre_backward(x, x.grad_residual),
            "recompute.fwd": self.recompute,
            "sub_layer.fwd+bwd": lambda x: sub_layer(self.sub_layer_forward, x),
        }

    def backward(
        self, stem: str, arguments: tuple[Any, ...], grads: tuple[Tensor, ...], kept: slice
    ) -> Call:
        """The backward of an autograd.Function alone, and of its results those `kept`."""
        function, context = self.functions[stem], _Context()
        function.forward(context, *arguments)

        def call() -> Outputs:
            results = function.backward(context, *grads)
            outputs: tuple[Tensor, ...] = (results,) if isinstance(results, Tensor) else results
            return outputs[kept]

        return call

    def fused_pre(self, x: Inputs) -> Call:
        def call() -> Outputs:
            post_mix, comb_mix, layer_input = self.ops.mhc_pre_big_fuse(
                *x.gates, EPS, EPS, EPS, POST_MULT, SINKHORN_STEPS
            )
            return [layer_input, post_mix, comb_mix]

        return call

    def projection_backward(self, x: Inputs) -> Call:
        arguments = (x.residual, x.weight, EPS, True, 1)
        return self.backward("projection", arguments, (x.grad_mixes,), slice(1, 2))

    def fused_pre_backward(self, x: Inputs, start: Tensor | None = None) -> Call:
        """Its four backwards, through autograd, as nothing fuses them."""
        leaves = [tensor.detach().requires_grad_() for tensor in x.gates]
        layer_input, mixes = self.pre(*leaves)
        outputs = (layer_input, *mixes)
        grads = (x.grad_hidden, x.grad_post, x.grad_comb)

        def backward() -> Outputs:
            return torch.autograd.grad(
                outputs, leaves, grads, retain_graph=True, allow_unused=True
            )[1:]

        return accumulating(leaves[0], backward, start)

    def recompute(self, x: Inputs) -> Call:
        """The kernel alone: the public function copies addresses from pinned memory, which a graph
        cannot capture. So the time of its host is not that of the public function either."""
        layer_inputs, residuals = recompute_outputs(x)
        groups = [
            list(group)
            for group in (
                x.pre_mixes,
                layer_inputs,
                residuals,
                x.layer_outputs,
                x.post_mixes,
                x.comb_mixes,
            )
        ]
        module = self.recompute_module
        first = x.residual.flatten(0, 1)
        pre, inputs, outputs, layer, post, comb = module._make_ptr_tables_batched(
            groups, device=first.device
        )
        kernel = module._mhc_multilayer_recompute_kernel(*first.shape[1:], LAYERS, LAYERS)

        def call() -> Outputs:
            kernel(first, pre, layer, post, comb, inputs, outputs)
            return [*layer_inputs, *residuals]

        return call

    def pre(self, *gates: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        result: tuple[Tensor, tuple[Tensor, Tensor]] = self.functional.mhc_pre(
            *gates, mhc_mult=STREAMS, post_mult_value=POST_MULT, sinkhorn_repeat=SINKHORN_STEPS
        )
        return result

    def sub_layer_forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *gates, layer_output = inputs
        layer_input, mixes = self.pre(*gates)
        return layer_input, self.ops.mhc_post(layer_output, gates[0], *mixes)
