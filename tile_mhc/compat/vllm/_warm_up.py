"""The kernels of vLLM's functions, before the first request."""

from collections.abc import Iterable
from typing import Any

import torch

from tile_mhc import _warm_up
from tile_mhc.compat import _serving
from tile_mhc.compat.vllm.model_executor.kernels.mhc.tilelang import (
    hc_head_fused_kernel_tilelang,
    mhc_fused_post_pre_delayed_tilelang,
    mhc_fused_post_pre_tilelang,
    mhc_post_tilelang,
    mhc_pre_delayed_tilelang,
    mhc_pre_tilelang,
)


def warm_up(
    hidden_size: int,
    token_counts: Iterable[int],
    *,
    delayed: bool = False,
    num_streams: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    fn_dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype = torch.bfloat16,
    sinkhorn_eps: float = _serving.EPS,
    device: torch.device | str | int | None = None,
    jobs: int | None = None,
) -> _warm_up.WarmUp:
    """`tile_mhc.warm_up` of the functions that a model calls.

    Args:
        hidden_size: H.
        token_counts: the numbers of tokens that will be served. What they launch is covered for
            most others as well: `WarmUp.covers` says of which.
        delayed: the functions of DeepSeek-V4.1: the delayed ones, with and without a `pre_mix`, and
            `mhc_pre_delayed_tilelang` also with an `x` of width H. By default those of V4:
            `mhc_pre_tilelang`, `mhc_fused_post_pre_tilelang` and `hc_head_fused_kernel_tilelang`.
            Either way `mhc_post_tilelang`.
        num_streams: n.
        dtype: of the streams.
        fn_dtype: of `fn`; scales and bases are float32.
        norm_dtype: of `norm_weight`; the calls without one are warmed up, too.
        sinkhorn_eps: where it is 0 other kernels run.
        device: as in `tile_mhc.warm_up`, as all below.
        jobs: how many kernels are compiled at a time.

    Returns:
        What was done.

    Raises:
        ShapeError: as in `tile_mhc.warm_up`, as all below.
        CompileError: compiling a kernel failed, or is forbidden.
        UnsupportedError: n, H, a dtype or the GPU has no kernel.
    """
    make = _serving.example_maker(
        hidden_size, num_streams, dtype, fn_dtype, norm_dtype, sinkhorn_eps
    )

    def call(num_tokens: int, on: torch.device) -> None:
        example = make(num_tokens, on)
        mhc_post_tilelang(*example.of_post)
        (_call_delayed if delayed else _call_plain)(example)

    return _warm_up.warm_up(call, token_counts, device=device, jobs=jobs)


def _call_plain(example: _serving.Example) -> None:
    of_pre: list[Any] = [example.residual, *example.gates]
    of_both: list[Any] = [*example.of_post, *example.gates]
    for norm in example.norms:
        options: dict[str, Any] = {"norm_weight": norm}
        mhc_pre_tilelang(*of_pre, **options)
        mhc_fused_post_pre_tilelang(*of_both, **options)
    hc_head_fused_kernel_tilelang(example.residual, *example.head, _serving.EPS, _serving.EPS)


def _call_delayed(example: _serving.Example) -> None:
    n, hidden_size = example.residual.shape[-2:]
    of_pre: list[Any] = [example.residual, *example.gates]
    of_both: list[Any] = [*example.of_post, *example.gates]
    first = example.gates._replace(fn=example.gates.fn[:, :hidden_size].contiguous())
    of_first: list[Any] = [example.residual, *first]
    for norm in example.norms:
        for pre_mix in (None, example.post_mix):
            options: dict[str, Any] = {"pre_mix": pre_mix, "norm_weight": norm}
            mhc_pre_delayed_tilelang(*of_pre, **options)
            mhc_fused_post_pre_delayed_tilelang(*of_both, **options | {"capture_aux": True})
            if hidden_size % n == 0:
                mhc_pre_delayed_tilelang(*of_first, **options | {"x": example.x})
