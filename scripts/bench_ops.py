"""What bench.py times: the ops, their inputs, their fewest bytes, and TileKernels beside them."""

import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tile_mhc
from tile_mhc import functional, reference

STREAMS = 4
LAYERS = 10  # of the recompute
EPS = 1e-6
POST_MULT = 2.0
SINKHORN_STEPS = 20

Inputs = dict[str, Any]
Outputs = tuple[Tensor | None, ...]
Run = Callable[[], Outputs]

BF16, FP32 = 2, 4


# Fewest bytes by tokens T, hidden size H, streams n: every operand read once, every result written
# once; a parameter once in all.


def expand_bytes(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (1 + n)


def projection_fwd_bytes(T: int, H: int, n: int) -> int:
    mixes = n * (n + 2)
    return BF16 * T * n * H + FP32 * T * (mixes + 1) + FP32 * mixes * n * H


def projection_bwd_bytes(T: int, H: int, n: int) -> int:
    mixes = n * (n + 2)
    return BF16 * T * 2 * n * H + FP32 * T * (2 * mixes + 1) + FP32 * 2 * mixes * n * H


def split_mixes_fwd_bytes(T: int, H: int, n: int) -> int:  # noqa: ARG001
    mixes = n * (n + 2)
    return FP32 * (T * 2 * mixes + mixes + 3)


def split_mixes_bwd_bytes(T: int, H: int, n: int) -> int:  # noqa: ARG001
    mixes = n * (n + 2)
    return FP32 * (T * 3 * mixes + 2 * (mixes + 3))


def sinkhorn_fwd_bytes(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * T * 2 * n * n


def sinkhorn_bwd_bytes(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * T * 3 * n * n


def aggregate_fwd_bytes(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (n + 1) + FP32 * T * n


def aggregate_bwd_bytes(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (2 * n + 1) + FP32 * T * 2 * n


def post_fwd_bytes(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (2 * n + 1) + FP32 * T * n * (n + 1)


def post_bwd_bytes(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (3 * n + 2) + FP32 * T * 2 * n * (n + 1)


def head_mix_fwd_bytes(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * (T * 2 * n + n + 1)


def head_mix_bwd_bytes(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * (T * 3 * n + 2 * (n + 1))


def contract_bytes(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (n + 1) + FP32 * (n * n * H + n + 1)


def contract_bwd_bytes(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (2 * n + 1) + FP32 * (T * (n + 1) + 2 * (n * n * H + n + 1))


def fused_pre_bytes(T: int, H: int, n: int) -> int:
    mixes = n * (n + 2)
    return BF16 * T * H * (n + 1) + FP32 * T * n * (n + 1) + FP32 * (mixes * n * H + mixes + 3)


def fused_pre_bwd_bytes(T: int, H: int, n: int) -> int:
    """Reads x, the mixes and three gradients, writes one of x; the parameters in and out."""
    mixes = n * (n + 2)
    by_token = mixes + 1 + n * (n + 1)
    return BF16 * T * H * (2 * n + 1) + FP32 * (T * by_token + 2 * (mixes * n * H + mixes + 3))


def recompute_bytes(T: int, H: int, n: int) -> int:
    """The first residual, then a layer input, a layer output and a residual a layer."""
    return BF16 * T * H * (n + LAYERS * (n + 2)) + FP32 * T * LAYERS * n * (n + 2)


def sub_layer_bytes(T: int, H: int, n: int) -> int:
    """pre reads x and writes the layer input; post reads both and writes the streams; its backward
    reads three and writes two gradients; that of pre reads x, two gradients and writes one.

    The mixes may stay on the chip or be computed again: not counted. The weight is read twice and
    its gradient written.
    """
    streams = (n + 1) + (2 * n + 1) + (3 * n + 2) + (3 * n + 1)
    return BF16 * T * H * streams + FP32 * 3 * n * (n + 2) * n * H


def make_inputs(T: int, H: int, device: torch.device) -> Inputs:
    """What the ops read: tensors by token have the tokens in dimension 1, as TileKernels asks."""
    n, mixes = STREAMS, STREAMS * (STREAMS + 2)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    bf16 = torch.bfloat16
    inputs = {
        "hidden": normal(1, T, H, dtype=bf16),
        "residual": normal(1, T, n, H, dtype=bf16),
        "grad_hidden": normal(1, T, H, dtype=bf16),
        "grad_residual": normal(1, T, n, H, dtype=bf16),
        "weight": normal(mixes, n * H) / (n * H) ** 0.5,
        "scale": 1 + 0.1 * normal(3),
        "bias": normal(mixes),
        "head_weight": normal(n, n * H) / (n * H) ** 0.5,
        "head_scale": 1 + 0.1 * normal(1),
        "head_bias": normal(n),
        "mixes": normal(1, T, mixes),
        "head_mixes": normal(1, T, n),
        "pre_mix": normal(1, T, n, 1).sigmoid(),
        "post_mix": 2 * normal(1, T, n, 1).sigmoid(),
        "logits": normal(1, T, n, n),
        "grad_mixes": normal(1, T, mixes),
        "grad_pre": normal(1, T, n, 1),
        "grad_post": normal(1, T, n, 1),
        "grad_comb": normal(1, T, n, n),
        "grad_head_mix": normal(1, T, n),
    }
    inputs["comb_mix"] = reference.sinkhorn(inputs["logits"])
    return inputs


def add_layers(inputs: Inputs) -> Inputs:
    """LAYERS different layers for the recompute."""

    def shifted(name: str) -> list[Tensor]:
        # A layer's own tensor, so that no two layers share what L2 holds.
        return [inputs[name].roll(layer, 1) for layer in range(LAYERS)]

    names = {
        "pre_mixes": "pre_mix",
        "post_mixes": "post_mix",
        "comb_mixes": "comb_mix",
        "layer_outputs": "hidden",
    }
    return inputs | {many: shifted(one) for many, one in names.items()}


def destinations(x: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    layer_inputs = [torch.empty_like(x["hidden"]) for _ in range(LAYERS)]
    return layer_inputs, [torch.empty_like(x["residual"]) for _ in range(LAYERS)]


class Context:
    """Stands in for the context of an autograd.Function, to call its backward alone."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


class Peer:
    """TileKernels 1.0.0: each method returns what to time, with the outputs in our order."""

    def __init__(self) -> None:
        ops = "tile_kernels.modeling.mhc.ops"
        self.ops = importlib.import_module(ops)
        self.functional = importlib.import_module("tile_kernels.modeling.mhc.functional")
        self.recompute_kernel = importlib.import_module(
            "tile_kernels.mhc.multilayer_recompute_kernel"
        )
        self.functions = {
            name: getattr(importlib.import_module(f"{ops}.{module}"), function)
            for name, module, function in (
                ("expand", "expand", "ExpandToMHCFn"),
                ("projection", "norm_fn", "MHCPreNormFn"),
                ("split_mixes", "pre_split_mixes", "MHCPreSplitMixes"),
                ("sinkhorn", "sinkhorn", "_SinkhornNormalize"),
                ("aggregate", "pre_apply_mix", "MHCPreApplyMix"),
                ("post", "post", "MHCPost"),
                ("head_mix", "head_compute_mix", "MHCHeadComputeMix"),
            )
        }

    def backward(
        self, name: str, arguments: tuple[Any, ...], grads: tuple[Tensor, ...]
    ) -> Callable[[], Any]:
        function, context = self.functions[name], Context()
        function.forward(context, *arguments)
        return lambda: function.backward(context, *grads)

    def accumulating_backward(
        self, name: str, arguments: tuple[Any, ...], grad: Tensor, position: int
    ) -> Run:
        """A backward that adds the gradient of the residual to one hung on its storage."""
        residual = arguments[0]
        backward = self.backward(name, arguments, (grad,))
        accumulated = torch.zeros_like(residual)

        def run() -> Outputs:
            residual.untyped_storage().grad_from_mhc_post = accumulated
            return accumulated, backward()[position]

        run.reset = accumulated.zero_  # type: ignore[attr-defined]
        return run

    def recompute(self, x: Inputs) -> Run:
        """The kernel alone: the public function copies addresses from pinned memory, which a graph
        cannot capture."""
        layer_inputs, residuals = destinations(x)
        groups = [
            x["pre_mixes"],
            layer_inputs,
            residuals,
            x["layer_outputs"],
            x["post_mixes"],
            x["comb_mixes"],
        ]
        module = self.recompute_kernel
        first = x["residual"].flatten(0, 1)
        pre, inputs, outputs, layer, post, comb = module._make_ptr_tables_batched(
            groups, device=first.device
        )
        kernel = module._mhc_multilayer_recompute_kernel(*first.shape[1:], LAYERS, LAYERS)

        def run() -> Outputs:
            kernel(first, pre, layer, post, comb, inputs, outputs)
            return (*layer_inputs, *residuals)

        return run

    def sub_layer(self, x: Inputs) -> Run:
        def forward(
            residual: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, layer_output: Tensor
        ) -> tuple[Tensor, Tensor]:
            layer_input, mixes = self.functional.mhc_pre(
                residual,
                weight,
                scale,
                bias,
                mhc_mult=STREAMS,
                post_mult_value=POST_MULT,
                sinkhorn_repeat=SINKHORN_STEPS,
            )
            return layer_input, self.ops.mhc_post(layer_output, residual, *mixes)

        return sub_layer_step(forward, x)


def find_peer() -> Peer | None:
    """TileKernels' mhc modules, without its packages' __init__: those import the rest of it, which
    tilelang 0.1.15 does not compile."""
    spec = importlib.util.find_spec("tile_kernels")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("tile_kernels", "tile_kernels.modeling"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return Peer()


def sub_layer_step(forward: Callable[..., tuple[Tensor, Tensor]], x: Inputs) -> Run:
    """Forward and backward of one sub-layer; the layer itself takes no time."""
    names = ("residual", "weight", "scale", "bias", "hidden")
    leaves = [x[name].detach().requires_grad_() for name in names]

    def run() -> Outputs:
        outputs = forward(*leaves)
        grads = torch.autograd.grad(outputs, leaves, (x["grad_hidden"], x["grad_residual"]))
        return (*(out.detach() for out in outputs), *grads)

    return run


def ours_sub_layer(
    residual: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, layer_output: Tensor
) -> tuple[Tensor, Tensor]:
    layer_input, post_mix, comb_mix, residual = functional.mhc_pre(
        residual,
        weight,
        scale,
        bias,
        post_mult=POST_MULT,
        sinkhorn_repeat=SINKHORN_STEPS,
        passes_residual=True,
    )
    return layer_input, functional.mhc_post(layer_output, residual, post_mix, comb_mix)


def reference_sub_layer(
    residual: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, layer_output: Tensor
) -> tuple[Tensor, Tensor]:
    layer_input, post_mix, comb_mix = reference.fused_pre(
        residual, weight, scale, bias, post_mult=POST_MULT, sinkhorn_repeat=SINKHORN_STEPS
    )
    return layer_input, reference.post(layer_output, residual, post_mix, comb_mix)


def ours_recompute(x: Inputs) -> Run:
    layer_inputs, residuals = destinations(x)
    arguments = [x[k] for k in ("pre_mixes", "layer_outputs", "post_mixes", "comb_mixes")]

    def run() -> Outputs:
        tile_mhc.recompute(
            x["residual"], *arguments, layer_inputs=layer_inputs, residuals=residuals
        )
        return (*layer_inputs, *residuals)

    return run


def reference_recompute(x: Inputs) -> Outputs:
    names = ("residual", "pre_mixes", "layer_outputs", "post_mixes", "comb_mixes")
    layer_inputs, residuals = reference.recompute(*(x[name] for name in names))
    return (*layer_inputs, *residuals)


def ours_projection_bwd(x: Inputs) -> Run:
    op = torch.ops.tile_mhc
    saved = op.projection(x["residual"], x["weight"], None, EPS, None, False)
    arguments = (x["grad_mixes"], x["residual"], x["weight"], None, *saved, False)
    return lambda: op.projection_backward(*arguments)[:2]


def reference_projection_bwd(x: Inputs) -> Outputs:
    saved = reference.projection_with_rms(x["residual"], x["weight"], None, EPS)
    arguments = (x["grad_mixes"], x["residual"], x["weight"], None, *saved)
    return reference.projection_backward(*arguments)[:2]


def ours_contract_bwd(x: Inputs) -> Run:
    op = torch.ops.tile_mhc
    given = (x["residual"], x["head_weight"], x["head_scale"], x["head_bias"], None)
    saved = op.contract(*given, EPS, EPS, None, False)[1:]
    return lambda: op.contract_backward(x["grad_hidden"], *given, *saved, EPS, False)[:4]


def reference_contract_bwd(x: Inputs) -> Outputs:
    given = (x["residual"], x["head_weight"], x["head_scale"], x["head_bias"], None)
    saved = reference.contract_with_mixes(*given, EPS, EPS)[1:]
    return reference.contract_backward(x["grad_hidden"], *given, *saved, EPS)[:4]


def ours_fused_pre_bwd(x: Inputs) -> Run:
    op = torch.ops.tile_mhc
    gates = (x["residual"], x["weight"], x["scale"], x["bias"], None)
    options = (EPS, EPS, POST_MULT, SINKHORN_STEPS)
    saved = op.fused_pre(*gates, EPS, *options, None, False)[3:]
    grads = (x["grad_hidden"], x["grad_post"].squeeze(-1), x["grad_comb"])
    return lambda: op.fused_pre_backward(*grads, *gates, *saved, *options, False, None)[:4]


def reference_fused_pre_bwd(x: Inputs) -> Outputs:
    gates = (x["residual"], x["weight"], x["scale"], x["bias"], None)
    options = (EPS, EPS, POST_MULT, SINKHORN_STEPS)
    saved = reference.fused_pre_with_mixes(*gates, EPS, *options)[3:]
    grads = (x["grad_hidden"], x["grad_post"].squeeze(-1), x["grad_comb"])
    return reference.fused_pre_backward(*grads, *gates, *saved, *options)[:4]


def peer_fused_pre_bwd(peer: Peer, x: Inputs) -> Run:
    """Its four backwards, through autograd; the gradient of the residual is added to a zero one."""
    names = ("residual", "weight", "scale", "bias")
    leaves = [x[name].detach().requires_grad_() for name in names]
    layer_input, mixes = peer.functional.mhc_pre(
        *leaves, mhc_mult=STREAMS, post_mult_value=POST_MULT, sinkhorn_repeat=SINKHORN_STEPS
    )
    accumulated = torch.zeros_like(x["residual"])
    grads = (x["grad_hidden"], x["grad_post"], x["grad_comb"])

    def run() -> Outputs:
        leaves[0].untyped_storage().grad_from_mhc_post = accumulated
        results = torch.autograd.grad(
            (layer_input, *mixes), leaves, grads, retain_graph=True, allow_unused=True
        )
        return accumulated, *results[1:]

    run.reset = accumulated.zero_  # type: ignore[attr-defined]
    return run


def peer_fused_pre(peer: Peer, x: Inputs) -> Run:
    gates = (x["weight"], x["scale"], x["bias"])

    def run() -> Outputs:
        post_mix, comb_mix, layer_input = peer.ops.mhc_pre_big_fuse(
            x["residual"], *gates, EPS, EPS, EPS, POST_MULT, SINKHORN_STEPS
        )
        return layer_input, post_mix, comb_mix

    return run


def first(run: Callable[[], Any], count: int) -> Run:
    """The first `count` results, always as a tuple."""

    def cut() -> Outputs:
        result = run()
        return (result,)[:count] if isinstance(result, Tensor) else tuple(result)[:count]

    return cut


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    floor: Callable[[int, int, int], int]
    ours: Callable[[Inputs], Run]
    truth: Callable[[Inputs], Outputs]
    peer: Callable[[Peer, Inputs], Run] | None
    summed: tuple[int, ...] = ()  # outputs that are sums over the tokens
    prepare: Callable[[Inputs], Inputs] = lambda x: x


def make_ops() -> list[Op]:
    """Every op with our operator, the reference and TileKernels' function, in one order."""
    op, n = torch.ops.tile_mhc, STREAMS
    split = (n, POST_MULT, EPS)
    steps = (SINKHORN_STEPS, EPS)
    split_options = {"num_streams": n, "post_mult": POST_MULT, "pre_eps": EPS}
    sinkhorn_options = {"repeat": SINKHORN_STEPS, "eps": EPS}
    pre_options = {"post_mult": POST_MULT, "sinkhorn_repeat": SINKHORN_STEPS}

    def pick(x: Inputs, *names: str) -> list[Any]:
        return [x[name] for name in names]

    mix = ("mixes", "scale", "bias")
    head = ("head_mixes", "head_scale", "head_bias")
    parameters = ("weight", "scale", "bias")
    grads = ("grad_pre", "grad_post", "grad_comb")
    post = ("hidden", "residual", "post_mix", "comb_mix")
    read = ("residual", "pre_mix")
    out = ("residual", "head_weight", "head_scale", "head_bias")
    return [
        Op(
            "expand.fwd",
            expand_bytes,
            lambda x: lambda: (op.expand(x["hidden"], n),),
            lambda x: (reference.expand(x["hidden"], n),),
            lambda peer, x: lambda: (peer.ops.expand_to_mhc(x["hidden"], n),),
        ),
        Op(
            "expand.bwd",
            expand_bytes,
            lambda x: lambda: (op.expand_backward(x["grad_residual"]),),
            lambda x: (reference.expand_backward(x["grad_residual"]),),
            lambda peer, x: first(
                peer.backward("expand", (x["hidden"], n, None), (x["grad_residual"],)), 1
            ),
        ),
        Op(
            "projection.fwd",
            projection_fwd_bytes,
            lambda x: lambda: op.projection(x["residual"], x["weight"], None, EPS, None, False),
            lambda x: reference.projection_with_rms(x["residual"], x["weight"], None, EPS),
            lambda peer, x: (
                lambda: (
                    peer.ops.mhc_pre_norm_fn(x["residual"], x["weight"], None, EPS),
                    None,
                )
            ),
        ),
        Op(
            "projection.bwd",
            projection_bwd_bytes,
            ours_projection_bwd,
            reference_projection_bwd,
            lambda peer, x: peer.accumulating_backward(
                "projection", (x["residual"], x["weight"], EPS, True, 1), x["grad_mixes"], 1
            ),
            summed=(1,),
        ),
        Op(
            "split_mixes.fwd",
            split_mixes_fwd_bytes,
            lambda x: lambda: op.split_mixes(*pick(x, *mix), *split),
            lambda x: reference.split_mixes(*pick(x, *mix), **split_options),
            lambda peer, x: lambda: peer.ops.mhc_pre_split_mixes(*pick(x, *mix), *split),
        ),
        Op(
            "split_mixes.bwd",
            split_mixes_bwd_bytes,
            lambda x: lambda: op.split_mixes_backward(*pick(x, *grads, *mix), n, POST_MULT),
            lambda x: reference.split_mixes_backward(*pick(x, *grads, *mix), n, POST_MULT),
            lambda peer, x: first(
                peer.backward("split_mixes", (*pick(x, *mix), *split), tuple(pick(x, *grads))), 3
            ),
            summed=(1, 2),
        ),
        Op(
            "sinkhorn.fwd",
            sinkhorn_fwd_bytes,
            lambda x: lambda: (op.sinkhorn(x["logits"], *steps),),
            lambda x: (reference.sinkhorn(x["logits"], **sinkhorn_options),),
            lambda peer, x: lambda: (peer.ops.sinkhorn_normalize(x["logits"], *steps),),
        ),
        Op(
            "sinkhorn.bwd",
            sinkhorn_bwd_bytes,
            lambda x: lambda: (op.sinkhorn_backward(x["grad_comb"], x["logits"], *steps),),
            lambda x: (
                reference.sinkhorn_backward(x["grad_comb"], x["logits"], **sinkhorn_options),
            ),
            lambda peer, x: first(
                peer.backward("sinkhorn", (x["logits"][0], *steps), (x["grad_comb"][0],)), 1
            ),
        ),
        Op(
            "aggregate.fwd",
            aggregate_fwd_bytes,
            lambda x: lambda: (op.aggregate(*pick(x, *read)),),
            lambda x: (reference.aggregate(*pick(x, *read)),),
            lambda peer, x: lambda: (peer.ops.mhc_pre_apply_mix(*pick(x, *read)),),
        ),
        Op(
            "aggregate.bwd",
            aggregate_bwd_bytes,
            lambda x: lambda: op.aggregate_backward(x["grad_hidden"], *pick(x, *read)),
            lambda x: reference.aggregate_backward(x["grad_hidden"], *pick(x, *read)),
            lambda peer, x: peer.accumulating_backward(
                "aggregate", (*pick(x, *read), None), x["grad_hidden"], 1
            ),
        ),
        Op(
            "post.fwd",
            post_fwd_bytes,
            lambda x: lambda: (op.post(*pick(x, *post), None),),
            lambda x: (reference.post(*pick(x, *post)),),
            lambda peer, x: lambda: (peer.ops.mhc_post_fwd(*pick(x, *post)),),
        ),
        Op(
            "post.bwd",
            post_bwd_bytes,
            lambda x: lambda: op.post_backward(x["grad_residual"], *pick(x, *post), None)[:4],
            lambda x: reference.post_backward(x["grad_residual"], *pick(x, *post))[:4],
            lambda peer, x: lambda: peer.ops.mhc_post_bwd(*pick(x, *post), x["grad_residual"]),
        ),
        Op(
            "head_mix.fwd",
            head_mix_fwd_bytes,
            lambda x: lambda: (op.head_mix(*pick(x, *head), EPS),),
            lambda x: (reference.head_mix(*pick(x, *head), pre_eps=EPS),),
            lambda peer, x: lambda: (peer.ops.mhc_head_compute_mix(*pick(x, *head), EPS),),
        ),
        Op(
            "head_mix.bwd",
            head_mix_bwd_bytes,
            lambda x: lambda: op.head_mix_backward(x["grad_head_mix"], *pick(x, *head)),
            lambda x: reference.head_mix_backward(x["grad_head_mix"], *pick(x, *head)),
            lambda peer, x: first(
                peer.backward("head_mix", (*pick(x, *head), EPS), (x["grad_head_mix"],)), 3
            ),
            summed=(1, 2),
        ),
        # TileKernels' head fails on a strided tensor of its own.
        Op(
            "contract.fwd",
            contract_bytes,
            lambda x: lambda: (tile_mhc.contract(*pick(x, *out)),),
            lambda x: (reference.contract(*pick(x, *out)),),
            None,
        ),
        Op(
            "contract.bwd",
            contract_bwd_bytes,
            ours_contract_bwd,
            reference_contract_bwd,
            None,
            summed=(1, 2, 3),
        ),
        Op(
            "fused_pre.fwd",
            fused_pre_bytes,
            lambda x: lambda: tile_mhc.fused_pre(*pick(x, "residual", *parameters), **pre_options),
            lambda x: reference.fused_pre(*pick(x, "residual", *parameters), **pre_options),
            peer_fused_pre,
        ),
        Op(
            "fused_pre.bwd",
            fused_pre_bwd_bytes,
            ours_fused_pre_bwd,
            reference_fused_pre_bwd,
            peer_fused_pre_bwd,
            summed=(1, 2, 3),
        ),
        Op(
            "recompute.fwd",
            recompute_bytes,
            ours_recompute,
            reference_recompute,
            lambda peer, x: peer.recompute(x),
            prepare=add_layers,
        ),
        Op(
            "sub_layer.fwd+bwd",
            sub_layer_bytes,
            lambda x: sub_layer_step(ours_sub_layer, x),
            lambda x: sub_layer_step(reference_sub_layer, x)(),
            lambda peer, x: peer.sub_layer(x),
            summed=(3, 4, 5),
        ),
    ]
