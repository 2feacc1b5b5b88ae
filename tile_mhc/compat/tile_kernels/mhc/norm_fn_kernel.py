"""The parts of the projection: the weights' product, the norm, TF32; of 1.0.0 the matmuls, too.

Partial sums are those of `n_splits` slices of K, as DeepGEMM's `tf32_hc_prenorm_gemm` leaves them:
out_mul_splitted (n_splits, T, G, N) products and sqrsum_splitted (n_splits, T, G) sums of squares,
for G groups of K, each with an RMS of its own; DeepSeek's models have one. All float32.
"""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.tile_kernels import norm_fn, partials
from tile_mhc.ops.tile_kernels.norm_weight import norm_weight_backward

# TF32 keeps 10 of float32's 23 mantissa bits.
DROPPED_BITS = 23 - 10
# Rows of a weight: of a block, of a block whose streams are not mixed, of a head.
NUM_MIXES = (2, 4, 8, 16, 24, 80)


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


def _mhc_pre_norm_fn_fwd_mul(
    mhc_mult3: int,
    n_rms_group: int,
    rms_group_size: int,
    token_block: int = 32,
    hidden_block: int = 256,
) -> Callable[..., None]:
    """A callable (x, fn, out, sqrsum): the matmul of release 1.0.0, and the sums of squares.

    out[t, 0] = x[t] @ fn.T;  sqrsum[t, 0] = sum_k x[t, k]**2

    x (T, K) bfloat16, float16 or float32, K = rms_group_size; fn (N, K) float32 or bfloat16,
    rounded to TF32; out (T, 1, N) and sqrsum (T, 1) float32, written. N is `mhc_mult3`; of groups
    there is one. Few tokens are worked on in parallel by slices of K. The blocks decide nothing.
    """
    op = "_mhc_pre_norm_fn_fwd_mul"
    _check_matmul(op, mhc_mult3, n_rms_group, rms_group_size, token_block, hidden_block)

    def kernel(x: torch.Tensor, fn: torch.Tensor, out: torch.Tensor, sqrsum: torch.Tensor) -> None:
        like = _check_flat(op, x, rms_group_size)
        shape = (mhc_mult3, rms_group_size)
        errors.check_tensor(op, "fn", fn, [shape], errors.PARAMETERS, like)
        tokens, apart = x.shape[0], [like, ("fn", fn)]
        for name, value, row in (("out", out, (1, mhc_mult3)), ("sqrsum", sqrsum, (1,))):
            shape = (tokens, *row)
            _checks.check_output(op, name, value, [shape], torch.float32, like, apart=apart)
        with torch.no_grad():
            products = out.view(tokens, mhc_mult3)
            norm_fn.norm_fn_products(x, fn, products, sqrsum.view(tokens))

    return kernel


def _mhc_pre_norm_fn_bwd_mul(
    mhc_mult3: int,
    n_rms_group: int,
    rms_group_size: int,
    token_block: int = 128,
    hidden_block: int = 128,
) -> Callable[..., None]:
    """A callable (out_mul_grad, sqrsum_grad, x, fn, x_grad, fn_grad); see the forward's.

    x_grad[t] += out_mul_grad[t, 0] @ fn + 2 * sqrsum_grad[t, 0] * x[t], rounded once
    fn_grad = out_mul_grad[:, 0].T @ x

    out_mul_grad (T, 1, N), rounded to TF32, and sqrsum_grad (T, 1) float32; x_grad as x, added to;
    fn and fn_grad (N, K) float32, the latter written.
    """
    op = "_mhc_pre_norm_fn_bwd_mul"
    _check_matmul(op, mhc_mult3, n_rms_group, rms_group_size, token_block, hidden_block)

    def kernel(
        out_mul_grad: torch.Tensor,
        sqrsum_grad: torch.Tensor,
        x: torch.Tensor,
        fn: torch.Tensor,
        x_grad: torch.Tensor,
        fn_grad: torch.Tensor,
    ) -> None:
        like = _check_flat(op, x, rms_group_size)
        tokens, weights = x.shape[0], (mhc_mult3, rms_group_size)
        grads = [("out_mul_grad", out_mul_grad), ("sqrsum_grad", sqrsum_grad)]
        for (name, value), row in zip(grads, ((1, mhc_mult3), (1,)), strict=True):
            errors.check_tensor(op, name, value, [(tokens, *row)], torch.float32, like)
        errors.check_tensor(op, "fn", fn, [weights], torch.float32, like)
        apart = [*grads, like, ("fn", fn)]
        _checks.check_streams_output(op, "x_grad", x_grad, x.shape, like, apart)
        apart.append(("x_grad", x_grad))
        _checks.check_output(op, "fn_grad", fn_grad, [weights], torch.float32, like, apart=apart)
        with torch.no_grad():
            grad = out_mul_grad.reshape(tokens, mhc_mult3)
            norm_fn.norm_fn_backward(grad, sqrsum_grad.reshape(tokens), x, fn, x_grad, fn_grad)

    return kernel


def _mhc_pre_norm_fn_bwd_norm(
    mhc_mult3: int, n_rms_group: int, rms_group_size: int, rms_eps: float
) -> Callable[..., None]:
    """A callable with the first five arguments of `mhc_reduce_partials_and_rmsnorm_bwd`.

    Of release 1.0.0; see `_mhc_pre_norm_fn_fwd_norm`.
    """
    op = "_mhc_pre_norm_fn_bwd_norm"
    for name, value in (("mhc_mult3", mhc_mult3), ("n_rms_group", n_rms_group)):
        errors.check_positive_int(op, name, value)
    _check_norm(op, rms_group_size, rms_eps)

    def kernel(
        out_grad: torch.Tensor,
        out_mul: torch.Tensor,
        sqrsum: torch.Tensor,
        out_mul_grad: torch.Tensor,
        sqrsum_grad: torch.Tensor,
    ) -> None:
        _checks.check_rows(op, "out_mul", out_mul, (n_rms_group, mhc_mult3))
        mhc_reduce_partials_and_rmsnorm_bwd(
            out_grad, out_mul, sqrsum, out_mul_grad, sqrsum_grad, rms_group_size, rms_eps
        )

    return kernel


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


def _check_matmul(
    op: str, num_mixes: int, groups: int, size: int, token_block: int, hidden_block: int
) -> None:
    for name, value in (
        ("mhc_mult3", num_mixes),
        ("n_rms_group", groups),
        ("rms_group_size", size),
        ("token_block", token_block),
        ("hidden_block", hidden_block),
    ):
        errors.check_positive_int(op, name, value)
    if num_mixes not in NUM_MIXES:
        raise errors.UnsupportedError(
            f"{op}: mhc_mult3 must be one of {NUM_MIXES}; got {num_mixes}"
        )
    if groups != 1:
        raise errors.UnsupportedError(f"{op}: n_rms_group must be 1; got {groups}")
    if size % norm_fn.STREAMS or size > norm_fn.STREAMS * errors.MAX_HIDDEN:
        raise errors.UnsupportedError(
            f"{op}: rms_group_size must be a multiple of {norm_fn.STREAMS}, up to "
            f"{norm_fn.STREAMS * errors.MAX_HIDDEN}; got {size}"
        )


def _check_flat(op: str, x: object, size: int) -> tuple[str, torch.Tensor]:
    """Flat streams (T, K), contiguous."""
    _checks.check_rows(op, "x", x, (size,), errors.STREAMS)
    tensor = errors.require_tensor(op, "x", x)
    errors.check_device(op, "x", tensor)
    errors.check_contiguous(op, "x", tensor)
    return "x", tensor


def _check_weights(op: str, fn: object, normw: object) -> tuple[str, torch.Tensor]:
    weight = _checks.check_numbers(op, "fn", fn, "(N, K)", 2)
    _sizes(op, "fn", weight, 2)
    like = ("fn", weight)
    errors.check_tensor(op, "normw", normw, [weight.shape[1:]], torch.float32, like)
    return like
