"""What the tests of compat.transformer_engine run on: its functions beside their specification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from cases import Case, Inputs, Op
from tile_mhc import reference as native
from tile_mhc.compat import transformer_engine as te
from tile_mhc.ops.transformer_engine import reference

N = 4
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Dtypes:
    """Of the streams, and of everything else."""

    streams: torch.dtype
    parameters: torch.dtype

    def __str__(self) -> str:
        return "-".join(str(d).removeprefix("torch.") for d in (self.streams, self.parameters))


# Those TransformerEngine's tests have, and the one they lack.
DTYPES = (Dtypes(BF16, FP32), Dtypes(BF16, BF16), Dtypes(FP32, FP32), Dtypes(FP32, BF16))
dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


def _projection(x: Tensor, weight: Tensor, norm_weight: Tensor | None = None) -> Any:
    return te.mhc_fused_projection(x.flatten(-2), weight, norm_weight=norm_weight)


def _projection_reference(x: Tensor, weight: Tensor, norm_weight: Tensor | None = None) -> Any:
    return reference.projection(x.flatten(-2), weight, norm_weight)


def _scale(h: Tensor, ms: Tensor, scale: Tensor, bias: Tensor) -> Any:
    return te.mhc_fused_scale(h, scale, bias.unsqueeze(0), ms, N)


def _scale_reference(h: Tensor, ms: Tensor, scale: Tensor, bias: Tensor) -> Any:
    outputs = reference.mixes(_wide(h), _wide(ms), scale, bias, N)
    return tuple(out.to(h.dtype) for out in outputs)


def _sinkhorn(logits: Tensor, iters: int = 20) -> Tensor:
    return te.mhc_fused_sinkhorn(logits, N, iters=iters)


def _sinkhorn_reference(logits: Tensor, iters: int = 20) -> Tensor:
    return native.log_sinkhorn(_wide(logits), iters).to(logits.dtype)


def _aggregate(x: Tensor, mix: Tensor) -> Tensor:
    return te.mhc_fused_aggregate(x, mix, N)


def _aggregate_reference(x: Tensor, mix: Tensor) -> Tensor:
    return reference.aggregate(x, _wide(mix))


def _post(
    f: Tensor, x: Tensor, post_mix: Tensor, comb_mix: Tensor, bias: Tensor | None = None
) -> Tensor:
    return te.mhc_fused_expand_combine(f, bias, post_mix, x, comb_mix, N)


def _post_reference(
    f: Tensor, x: Tensor, post_mix: Tensor, comb_mix: Tensor, bias: Tensor | None = None
) -> Tensor:
    return reference.post(f, bias, x, _wide(post_mix), _wide(comb_mix))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, FP32))


def ops(dtypes: Dtypes) -> tuple[Op, ...]:
    """The five functions, on streams (T, C, 4) as the oracle calls them."""

    def x(lead: Sequence[int], channels: int, device: str) -> Tensor:
        return torch.randn(*lead, channels, N, device=device, dtype=dtypes.streams)

    def other(*shape: int, device: str) -> Tensor:
        return torch.randn(*shape, device=device).to(dtypes.parameters)

    def projection(lead: Sequence[int], n: int, channels: int, device: str) -> Inputs:
        weight = other(24, channels * N, device=device) * (channels * N) ** -0.5
        norm = (torch.rand(channels * N, device=device) + 0.5).to(dtypes.parameters)
        return {"x": x(lead, channels, device), "weight": weight, "norm_weight": norm}, {}

    def bare(lead: Sequence[int], n: int, channels: int, device: str) -> Inputs:
        tensors, options = projection(lead, n, channels, device)
        del tensors["norm_weight"]
        return tensors, options

    def scale(lead: Sequence[int], n: int, channels: int, device: str) -> Inputs:
        return {
            "h": torch.randn(*lead, 32, device=device).to(dtypes.streams),
            "ms": (torch.rand(*lead, device=device) + 0.5).to(dtypes.streams),
            "scale": other(3, device=device),
            "bias": other(24, device=device),
        }, {}

    def sinkhorn(lead: Sequence[int], n: int, channels: int, device: str) -> Inputs:
        return {"logits": other(*lead, N, N, device=device)}, {}

    def aggregate(lead: Sequence[int], n: int, channels: int, device: str) -> Inputs:
        return {"x": x(lead, channels, device), "mix": other(*lead, N, device=device)}, {}

    def post(lead: Sequence[int], n: int, channels: int, device: str) -> Inputs:
        return {
            "f": torch.randn(*lead, channels, device=device, dtype=dtypes.streams),
            "x": x(lead, channels, device),
            "post_mix": other(*lead, N, device=device),
            "comb_mix": other(*lead, N, N, device=device),
        }, {}

    def biased(lead: Sequence[int], n: int, channels: int, device: str) -> Inputs:
        tensors, options = post(lead, n, channels, device)
        return tensors | {"bias": other(channels, device=device)}, options

    pair, gates = ("h", "ms"), ("h_pre", "h_post", "h_res")
    return (
        Op("te_projection", _projection, _projection_reference, bare, pair),
        Op("te_projection", _projection, _projection_reference, projection, pair),
        Op("te_scale", _scale, _scale_reference, scale, gates),
        Op("te_sinkhorn", _sinkhorn, _sinkhorn_reference, sinkhorn),
        Op("te_aggregate", _aggregate, _aggregate_reference, aggregate),
        Op("te_post", _post, _post_reference, post),
        Op("te_post", _post, _post_reference, biased),
    )


KINDS = ("projection", "projection_norm", "scale", "sinkhorn", "aggregate", "post", "post_bias")
kinds = pytest.mark.parametrize("kind", KINDS)


def op_of(kind: str, dtypes: Dtypes) -> Op:
    return ops(dtypes)[KINDS.index(kind)]


def case(num_tokens: int, channels: int, why: str) -> Case:
    return Case(num_tokens, N, channels, why)


def sub_layer(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    beta: Tensor,
    buffer: Tensor | None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
) -> Tensor:
    """A sub-layer whose layer is the identity, as in TransformerEngine's test of the buffer."""
    layer_input, H_post, H_res = te.mhc_generate_mix_and_aggregate(
        x, phi, alpha, beta, norm_weight, fused_grad_x_acc_buffer=buffer
    )
    return te.mhc_fused_expand_combine(
        layer_input, bias, H_post, x, H_res, N, fused_grad_x_acc_buffer=buffer
    )


def sub_layer_reference(x: Tensor, phi: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    h, ms = reference.projection(x.flatten(-2), phi, None)
    pre, post, comb = reference.mixes(h, ms, alpha, beta.flatten(), N)
    comb = native.log_sinkhorn(comb.unflatten(-1, (N, N)), 20)
    return reference.post(reference.aggregate(x, pre), None, x, post, comb)


def sub_layer_inputs(
    num_tokens: int, channels: int, dtypes: Dtypes, device: str
) -> dict[str, Tensor]:
    size = channels * N
    return {
        "x": torch.randn(num_tokens, channels, N, device=device, dtype=dtypes.streams),
        "phi": (torch.randn(24, size, device=device) * size**-0.5).to(dtypes.parameters),
        "alpha": torch.randn(3, device=device).to(dtypes.parameters),
        "beta": torch.randn(1, 24, device=device).to(dtypes.parameters),
    }


WIDTHS = (
    case(0, 64, "no token"),
    case(1, 64, "one token"),
    case(13, 32, "the smallest of TransformerEngine's tests"),
    case(130, 192, "one pair over a tile"),
    case(65, 33, "an odd C: accesses of half the width"),
    case(130, 5129, "the odd C of TransformerEngine's tests"),
    case(65, 7168, "DeepSeek-V3's width"),
    case(130, 16384, "the widest of TransformerEngine's tests"),
    case(4096, 2560, "many tokens"),
)
widths = pytest.mark.parametrize("case", WIDTHS, ids=str)


def far_apart(device: str) -> Tensor:
    """Logits of up to 200 either way: exp of most differences underflows."""
    spread = torch.randn(4096, N, N, device=device) * 70
    signs = torch.randint(-1, 2, (4096, N, N), device=device) * 200.0
    return torch.cat((spread[:2048], signs[2048:]))


def sub_layer_truth(
    inputs: dict[str, Tensor], upstream: Tensor
) -> tuple[list[Tensor], list[Tensor | None]]:
    """float64's output, gradients of x, phi, alpha and beta, and what the last two are sums of."""
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    with oracle.gate_terms() as terms:
        out = sub_layer_reference(**wide)
        grads = torch.autograd.grad(out, list(wide.values()), upstream.double())
    named = terms.named()
    return [out.detach(), *grads], [None, None, named["grad_scale"], named["grad_bias"]]


def sub_layer_errors(
    ours: Sequence[Tensor], truth: Sequence[Tensor], terms: Sequence[Tensor | None]
) -> list[float]:
    """Relative errors of the gradients of x, phi, alpha and beta."""
    return [
        oracle.relative_error(o, t, unit) for o, t, unit in zip(ours, truth, terms, strict=True)
    ]
