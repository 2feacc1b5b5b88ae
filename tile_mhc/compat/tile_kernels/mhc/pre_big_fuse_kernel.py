"""Everything before a sub-layer behind the matmul: norm, gates, Sinkhorn and the layer input."""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.sinkhorn import check_sinkhorn
from tile_mhc.ops.tile_kernels import partials


def mhc_pre_big_fuse_fwd(
    gemm_out_mul: torch.Tensor,
    gemm_out_sqrsum: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    residual: torch.Tensor,
    post_mix: torch.Tensor,
    comb_mix: torch.Tensor,
    layer_input: torch.Tensor,
    rms_eps: float,
    mhc_pre_eps: float,
    mhc_sinkhorn_eps: float,
    mhc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 16,
) -> None:
    """Write what `tile_mhc.fused_pre` returns, from partial sums of its projection.

    The bits of `mhc_reduce_partials_and_rmsnorm_fwd`, `mhc_pre_split_mixes_fwd`, `mhc_sinkhorn_fwd`
    and `mhc_pre_apply_mix_fwd` one after another.

    Args:
        gemm_out_mul: (n_splits, T, n*(n+2)) float32, the products over slices of K.
        gemm_out_sqrsum: (n_splits, T) float32, the sums of squares over them.
        mhc_scale: (3,) float32 or bfloat16.
        mhc_base: (n*(n+2),) float32 or bfloat16.
        residual: (T, n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to 16384.
        post_mix: (T, n) float32, written.
        comb_mix: (T, n*n) float32, written.
        layer_input: (T, H), of the dtype of the residual, written.
        rms_eps: added to the mean square of the RMS norm.
        mhc_pre_eps: added to the weights of the layer input.
        mhc_sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        mhc_post_mult_value: factor of post_mix.
        sinkhorn_repeat: Sinkhorn steps, from 1 to 1024.
        n_splits: the slices of K.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.
    """
    op = "mhc_pre_big_fuse_fwd"
    options = (rms_eps, mhc_pre_eps, mhc_sinkhorn_eps, mhc_post_mult_value, sinkhorn_repeat)
    written = (post_mix, comb_mix, layer_input)
    _run(
        op, gemm_out_mul, gemm_out_sqrsum, mhc_scale, mhc_base, residual, written, options, n_splits
    )


def _mhc_pre_big_fuse(
    hidden_size: int,
    rms_eps: float,
    mhc_pre_eps: float,
    mhc_sinkhorn_eps: float,
    mhc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 16,
    mhc_mult: int = 4,
) -> Callable[..., None]:
    """A callable with the first eight arguments of `mhc_pre_big_fuse_fwd`. Of release 1.0.0."""
    op = "_mhc_pre_big_fuse"
    options = (rms_eps, mhc_pre_eps, mhc_sinkhorn_eps, mhc_post_mult_value, sinkhorn_repeat)
    errors.check_num_streams(op, mhc_mult)
    errors.check_hidden_size(op, hidden_size)
    _check_options(op, options, n_splits)

    def kernel(
        gemm_out_mul: torch.Tensor,
        gemm_out_sqrsum: torch.Tensor,
        mhc_scale: torch.Tensor,
        mhc_base: torch.Tensor,
        residual: torch.Tensor,
        post_mix: torch.Tensor,
        comb_mix: torch.Tensor,
        layer_input: torch.Tensor,
    ) -> None:
        streams = errors.require_tensor(op, "residual", residual)
        tokens = streams.shape[0] if streams.ndim else 0
        shape = (tokens, mhc_mult, hidden_size)
        errors.check_tensor(op, "residual", streams, [shape], errors.STREAMS)
        written = (post_mix, comb_mix, layer_input)
        _run(
            op,
            gemm_out_mul,
            gemm_out_sqrsum,
            mhc_scale,
            mhc_base,
            residual,
            written,
            options,
            n_splits,
        )

    return kernel


def _run(
    op: str,
    gemm_out_mul: torch.Tensor,
    gemm_out_sqrsum: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    residual: torch.Tensor,
    written: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: tuple[float, float, float, float, int],
    n_splits: int,
) -> None:
    n, hidden_size = errors.check_streams(op, "residual", residual)
    _check_options(op, options, n_splits)
    like = ("residual", residual)
    tokens, num_mixes = residual.shape[0], n * (n + 2)
    errors.check_tensor(op, "residual", residual, [(tokens, n, hidden_size)], residual.dtype)
    for name, value, shape in (
        ("gemm_out_mul", gemm_out_mul, (n_splits, tokens, num_mixes)),
        ("gemm_out_sqrsum", gemm_out_sqrsum, (n_splits, tokens)),
    ):
        errors.check_tensor(op, name, value, [shape], torch.float32, like)
    _checks.check_gates(op, mhc_scale, mhc_base, [(3,)], num_mixes, like)
    post_mix, comb_mix, layer_input = written
    apart = [like, ("gemm_out_mul", gemm_out_mul), ("gemm_out_sqrsum", gemm_out_sqrsum)]
    for name, value, shapes, dtype in (
        ("post_mix", post_mix, [(tokens, n), (tokens, n, 1)], torch.float32),
        ("comb_mix", comb_mix, [(tokens, n * n), (tokens, n, n)], torch.float32),
        ("layer_input", layer_input, [(tokens, hidden_size)], residual.dtype),
    ):
        _checks.check_output(op, name, value, shapes, dtype, like, apart=apart)
    *numbers, sinkhorn_repeat = options
    with torch.no_grad():
        partials.partials_pre(
            gemm_out_mul,
            gemm_out_sqrsum,
            mhc_scale,
            mhc_base,
            residual,
            *map(float, numbers),
            sinkhorn_repeat,
            post_mix.view(tokens, n),
            comb_mix,
            layer_input,
        )


def _check_options(op: str, options: tuple[float, float, float, float, int], n_splits: int) -> None:
    rms_eps, mhc_pre_eps, mhc_sinkhorn_eps, mhc_post_mult_value, sinkhorn_repeat = options
    for name, value in (
        ("rms_eps", rms_eps),
        ("mhc_pre_eps", mhc_pre_eps),
        ("mhc_sinkhorn_eps", mhc_sinkhorn_eps),
        ("mhc_post_mult_value", mhc_post_mult_value),
    ):
        errors.check_number(op, name, value)
    check_sinkhorn(op, sinkhorn_repeat, mhc_sinkhorn_eps, prefix="sinkhorn_")
    errors.check_positive_int(op, "n_splits", n_splits)
