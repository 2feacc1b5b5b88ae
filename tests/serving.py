"""The serving stacks' functions as loops over tokens, streams and columns, in Python's floats."""

import math
from typing import Any

import torch
from torch import Tensor

from cases import normal
from tile_mhc.compat import sglang, vllm

# As DeepSeek-V4 has them, but for epsilons that are seen in a result.
STEPS = (1e-3, 2e-3, 3e-3, 2.0, 20)
N = 4
# What tests/gpu run: few splits of K and many, a weight that is split before, and no token.
HIDDEN = 1280
COUNTS = (0, 1, 17, 1024, 2500)


def inputs(
    num_tokens: int, hidden_size: int, device: Any, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """What a boundary takes, by SGLang's and vLLM's names, and a weight of the norm."""
    mixes = N * (N + 2)

    def stream(*shape: int) -> Tensor:
        return normal(*shape, device=device).to(dtype)

    return {
        "x": stream(num_tokens, hidden_size),
        "residual": stream(num_tokens, N, hidden_size),
        "post_layer_mix": torch.rand(num_tokens, N, 1, device=device) * 2,
        "comb_res_mix": torch.rand(num_tokens, N, N, device=device).softmax(-1),
        "fn": normal(mixes, N * hidden_size, device=device) / hidden_size**0.5,
        "hc_scale": normal(3, device=device),
        "hc_base": normal(mixes, device=device),
        "norm_weight": (torch.rand(hidden_size, device=device) + 0.5).bfloat16(),
    }


def pre_arguments(tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    return (*(tensors[name] for name in ("residual", "fn", "hc_scale", "hc_base")), *STEPS)


def boundary_arguments(tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    names = ("x", "residual", "post_layer_mix", "comb_res_mix", "fn", "hc_scale", "hc_base")
    return (*(tensors[name] for name in names), *STEPS)


def head_arguments(tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    fn, scale, base = (tensors[name] for name in ("fn", "hc_scale", "hc_base"))
    return tensors["residual"], fn[:N], scale[:1], base[:N], 1e-3, 2e-3


def norm_options(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"norm_weight": tensors["norm_weight"], "norm_eps": 1e-6}


def run_all(tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, tuple[Tensor, ...]]:
    """Every function, by name; without or with the options of a norm."""
    of_pre, of_boundary = pre_arguments(tensors), boundary_arguments(tensors)
    delayed = options | {"pre_mix": tensors["post_layer_mix"].squeeze(-1)}
    first = list(of_pre)
    first[1] = tensors["fn"].view(N * (N + 2), N, -1).sum(1)
    return {
        "pre": sglang.mhc_pre(*of_pre, **options),
        "boundary": sglang.mhc_fused_post_pre(*of_boundary, **options),
        "vllm pre": vllm.mhc_pre_tilelang(*of_pre, **options),
        "vllm boundary": vllm.mhc_fused_post_pre_tilelang(*of_boundary, **options),
        "delayed pre": vllm.mhc_pre_delayed_tilelang(*of_pre, **delayed),
        "first pre": vllm.mhc_pre_delayed_tilelang(*first, x=tensors["x"], **options),
        "delayed boundary": vllm.mhc_fused_post_pre_delayed_tilelang(
            *of_boundary, **delayed, capture_aux=True
        ),
        "post": (vllm.mhc_post_tilelang(*of_boundary[:4]),),
        "head": (sglang.fused_hc_head(*head_arguments(tensors)),),
    }


def loop_mixes(
    row: list[float], fn: Any, scale: Any, base: Any, steps: tuple[Any, ...] = STEPS
) -> tuple[list[float], list[float], list[list[float]]]:
    """pre, post and comb of one token, whose input of the projection is `row`."""
    rms_eps, pre_eps, sinkhorn_eps, post_mult, repeat = steps
    inverse = 1 / math.sqrt(sum(v * v for v in row) / len(row) + rms_eps)
    logits = []
    for m, weights in enumerate(fn):
        group = min(m // N, 2)
        mix = inverse * sum(v * w for v, w in zip(row, weights, strict=True))
        logits.append(mix * scale[group] + base[m])
    sigmoid = [1 / (1 + math.exp(-z)) for z in logits[: 2 * N]]
    pre = [s + pre_eps for s in sigmoid[:N]]
    post = [s * post_mult for s in sigmoid[N:]]
    comb = [logits[2 * N + N * i :][:N] for i in range(N)]
    for i in range(N):
        exps = [math.exp(z) for z in comb[i]]
        comb[i] = [e / sum(exps) + sinkhorn_eps for e in exps]
    for step in range(repeat):
        if step:
            for i in range(N):
                total = sum(comb[i]) + sinkhorn_eps
                comb[i] = [c / total for c in comb[i]]
        for j in range(N):
            total = sum(comb[i][j] for i in range(N)) + sinkhorn_eps
            for i in range(N):
                comb[i][j] /= total
    return pre, post, comb


def loop_collapse(streams: list[list[float]], mix: list[float]) -> list[float]:
    columns = zip(*streams, strict=True)
    return [sum(m * s for m, s in zip(mix, column, strict=True)) for column in columns]


def loop_norm(values: list[float], weight: list[float] | None, eps: float) -> list[float]:
    if weight is None:
        return values
    inverse = 1 / math.sqrt(sum(v * v for v in values) / len(values) + eps)
    return [v * inverse * w for v, w in zip(values, weight, strict=True)]


def loop_post(
    x: list[float], streams: list[list[float]], post: list[float], comb: list[list[float]]
) -> list[list[float]]:
    return [
        [post[j] * x[h] + sum(comb[i][j] * streams[i][h] for i in range(N)) for h in range(len(x))]
        for j in range(N)
    ]


def loop_head(streams: list[list[float]], fn: Any, scale: Any, base: Any) -> list[float]:
    row = [v for stream in streams for v in stream]
    inverse = 1 / math.sqrt(sum(v * v for v in row) / len(row) + 1e-3)
    gates = []
    for m in range(N):
        z = inverse * sum(v * w for v, w in zip(row, fn[m], strict=True)) * scale[0] + base[m]
        gates.append(1 / (1 + math.exp(-z)) + 2e-3)
    return loop_collapse(streams, gates)
