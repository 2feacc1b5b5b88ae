"""What of the projection is without its matmul: the weights' product, the norm, TF32.

Partial sums are those of `n_splits` slices of K, as DeepGEMM's `tf32_hc_prenorm_gemm` leaves them:
out_mul_splitted (n_splits, T, G, N) products and sqrsum_splitted (n_splits, T, G) sums of squares,
for G groups of K, each with an RMS of its own; DeepSeek's models have one. All float32.
"""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.tile_kernels import partials
from tile_mhc.ops.tile_kernels.norm_weight import norm_weight_backward

# TF32 keeps 10 of float32's 23 mantissa bits.
DROPPED_BITS = 23 - 10


def mhc_fn_normw_merge_fwd(fn: torch.Tensor, normw: torch.Tensor, out_fn: torch.Tensor) -> None:
    """Write fn (N, K) times normw (K,) into out_fn, which may be fn: torch's multiplication."""
    op = "mhc_fn_normw_merge_fwd"
    like = _check_weights(op, fn, normw)
    normed = [("normw", normw)]
    _checks.check_output(op, "out_fn", out_fn, [fn.shape], torch.float32, like, apart=normed)
    with torch.no_grad():
        torch.mul(fn, normw, out=out_fn)


def mhc_fn_normw_merge_bwd(
    fn: torch.Tensor,
    normw: torch.Tensor,
    out_fn_grad: torch.Tensor,
    fn_grad: torch.Tensor,
    normw_grad: torch.Tensor,
) -> None:
    """Add the gradients of fn (N, K) and normw (K,) to fn_grad and normw_grad."""
    op = "mhc_fn_normw_merge_bwd"
    like = _check_weights(op, fn, normw)
    errors.check_tensor(op, "out_fn_grad", out_fn_grad, [fn.shape], torch.float32, like)
    apart = [like, ("normw", normw), ("out_fn_grad", out_fn_grad)]
    for name, value, of in (("fn_grad", fn_grad, fn), ("normw_grad", normw_grad, normw)):
        _checks.check_output(op, name, value, [of.shape], torch.float32, like, apart=apart)
    with torch.no_grad():
        norm_weight_backward(fn, normw, out_fn_grad, fn_grad, normw_grad)


def mhc_reduce_partials_and_rmsnorm_fwd(
    out_mul_splitted: torch.Tensor,
    sqrsum_splitted: torch.Tensor,
    out_mul: torch.Tensor,
    sqrsum: torch.Tensor,
    out: torch.Tensor,
    rms_group_size: int,
    rms_eps: float,
    n_splits: int,
) -> None:
    """Write the sums over the splits, and the mixes that they make.

    out_mul[t, g] = sum_s out_mul_splitted[s, t, g];  sqrsum likewise
    out[t] = sum_g out_mul[t, g] * rsqrt(sqrsum[t, g] / rms_group_size + rms_eps)

    Args:
        out_mul_splitted: (n_splits, T, G, N).
        sqrsum_splitted: (n_splits, T, G).
        out_mul: (T, G, N), written.
        sqrsum: (T, G), written.
        out: (T, N), written.
        rms_group_size: the columns of K in a group.
        rms_eps: added to the mean square.
        n_splits: the slices of K.
    """
    op = "mhc_reduce_partials_and_rmsnorm_fwd"
    _reduce(
        op,
        out_mul_splitted,
        sqrsum_splitted,
        out_mul,
        sqrsum,
        out,
        rms_group_size,
        rms_eps,
        n_splits,
    )


def mhc_reduce_partials_and_rmsnorm_bwd(
    out_grad: torch.Tensor,
    out_mul: torch.Tensor,
    sqrsum: torch.Tensor,
    out_mul_grad: torch.Tensor,
    sqrsum_grad: torch.Tensor,
    rms_group_size: int,
    rms_eps: float,
) -> None:
    """Write the gradients of out_mul (T, G, N) and sqrsum (T, G), of each of their partial sums.

    out_grad is (T, N).
    """
    op = "mhc_reduce_partials_and_rmsnorm_bwd"
    products = _checks.check_numbers(op, "out_mul", out_mul, "(T, G, N)", 3)
    tokens, groups, num_mixes = _sizes(op, "out_mul", products, 3)
    like = ("out_mul", products)
    errors.check_tensor(op, "sqrsum", sqrsum, [(tokens, groups)], torch.float32, like)
    errors.check_tensor(op, "out_grad", out_grad, [(tokens, num_mixes)], torch.float32, like)
    _check_norm(op, rms_group_size, rms_eps)
    apart = [("out_grad", out_grad), ("sqrsum", sqrsum)]
    for name, value, of in (
        ("out_mul_grad", out_mul_grad, products),
        ("sqrsum_grad", sqrsum_grad, sqrsum),
    ):
        _checks.check_output(op, name, value, [of.shape], torch.float32, like, apart=apart)
    with torch.no_grad():
        partials.partials_norm_backward(
            out_grad, out_mul, sqrsum, rms_group_size, float(rms_eps), out_mul_grad, sqrsum_grad
        )


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest TF32 value, ties away from zero, still stored as float32."""
    shape = errors.require_tensor("round_to_tf32", "x", x).shape
    errors.check_tensor("round_to_tf32", "x", x, [shape], torch.float32)
    half = 1 << (DROPPED_BITS - 1)
    mask = -1 << DROPPED_BITS
    rounded = ((x.view(torch.int32) + half) & mask).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def _mhc_pre_norm_fn_fwd_norm(
    mhc_mult3: int, n_rms_group: int, rms_group_size: int, rms_eps: float, n_splits: int
) -> Callable[..., None]:
    """A callable with the first five arguments of `mhc_reduce_partials_and_rmsnorm_fwd`.

    Of release 1.0.0; `mhc_mult3` is N and `n_rms_group` G.
    """
    op = "_mhc_pre_norm_fn_fwd_norm"
    for name, value in (
        ("mhc_mult3", mhc_mult3),
        ("n_rms_group", n_rms_group),
        ("n_splits", n_splits),
    ):
        errors.check_positive_int(op, name, value)
    _check_norm(op, rms_group_size, rms_eps)

    def kernel(
        out_mul_splitted: torch.Tensor,
        sqrsum_splitted: torch.Tensor,
        out_mul: torch.Tensor,
        sqrsum: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        given = errors.require_tensor(op, "out_mul_splitted", out_mul_splitted)
        tokens = given.shape[1] if given.ndim > 1 else 0
        shape = (n_splits, tokens, n_rms_group, mhc_mult3)
        errors.check_tensor(op, "out_mul_splitted", given, [shape], torch.float32)
        _reduce(
            op,
            out_mul_splitted,
            sqrsum_splitted,
            out_mul,
            sqrsum,
            out,
            rms_group_size,
            rms_eps,
            n_splits,
        )

    return kernel


def _reduce(
    op: str,
    out_mul_splitted: torch.Tensor,
    sqrsum_splitted: torch.Tensor,
    out_mul: torch.Tensor,
    sqrsum: torch.Tensor,
    out: torch.Tensor,
    rms_group_size: int,
    rms_eps: float,
    n_splits: int,
) -> None:
    products = _checks.check_numbers(
        op, "out_mul_splitted", out_mul_splitted, "(n_splits, T, G, N)", 4
    )
    splits, tokens, groups, num_mixes = _sizes(op, "out_mul_splitted", products, 4)
    errors.check_positive_int(op, "n_splits", n_splits)
    _check_norm(op, rms_group_size, rms_eps)
    like = ("out_mul_splitted", products)
    wanted = (n_splits, tokens, groups, num_mixes)
    errors.check_tensor(op, "out_mul_splitted", products, [wanted], torch.float32)
    shape = (splits, tokens, groups)
    errors.check_tensor(op, "sqrsum_splitted", sqrsum_splitted, [shape], torch.float32, like)
    apart = [like, ("sqrsum_splitted", sqrsum_splitted)]
    for name, value, of in (
        ("out_mul", out_mul, (tokens, groups, num_mixes)),
        ("sqrsum", sqrsum, (tokens, groups)),
        ("out", out, (tokens, num_mixes)),
    ):
        _checks.check_output(op, name, value, [of], torch.float32, like, apart=apart)
    with torch.no_grad():
        partials.partials_norm(
            products, sqrsum_splitted, rms_group_size, float(rms_eps), out_mul, sqrsum, out
        )


def _sizes(op: str, name: str, tensor: torch.Tensor, dims: int) -> torch.Size:
    if tensor.ndim != dims:
        raise errors.ShapeError(
            f"{op}: {name} must have {dims} dimensions; got {errors.describe(tensor)}"
        )
    return tensor.shape


def _check_norm(op: str, rms_group_size: int, rms_eps: float) -> None:
    errors.check_positive_int(op, "rms_group_size", rms_group_size)
    errors.check_number(op, "rms_eps", rms_eps)


def _check_weights(op: str, fn: object, normw: object) -> tuple[str, torch.Tensor]:
    weight = _checks.check_numbers(op, "fn", fn, "(N, K)", 2)
    _sizes(op, "fn", weight, 2)
    like = ("fn", weight)
    errors.check_tensor(op, "normw", normw, [weight.shape[1:]], torch.float32, like)
    return like
