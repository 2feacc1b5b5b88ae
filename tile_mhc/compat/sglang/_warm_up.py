"""The kernels of SGLang's functions, before the first request."""

from collections.abc import Iterable
from typing import Any

import torch

from tile_mhc import _warm_up
from tile_mhc.compat import _serving
from tile_mhc.compat.sglang.kernels.ops.layernorm.mhc import (
    mhc_fused_post_pre,
    mhc_post,
    mhc_pre,
)
from tile_mhc.compat.sglang.kernels.ops.layernorm.mhc_head import fused_hc_head


def warm_up(
    hidden_size: int,
    token_counts: Iterable[int],
    *,
    num_streams: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    fn_dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype = torch.bfloat16,
    sinkhorn_eps: float = _serving.EPS,
    device: torch.device | str | int | None = None,
    jobs: int | None = None,
) -> _warm_up.WarmUp:
    """`tile_mhc.warm_up` of `mhc_pre`, `mhc_fused_post_pre`, `mhc_post` and `fused_hc_head`.

    Args:
        hidden_size: H.
        token_counts: the numbers of tokens that will be served. What they launch is covered for
            most others as well: `WarmUp.covers` says of which.
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
        of_pre: list[Any] = [example.residual, *example.gates]
        of_both: list[Any] = [*example.of_post, *example.gates]
        for norm in example.norms:
            mhc_pre(*of_pre, norm_weight=norm, norm_eps=_serving.EPS)
            mhc_fused_post_pre(*of_both, norm_weight=norm, norm_eps=_serving.EPS)
        mhc_post(*example.of_post)
        fused_hc_head(example.residual, *example.head, _serving.EPS, _serving.EPS)

    return _warm_up.warm_up(call, token_counts, device=device, jobs=jobs)
