"""Mixes -> pre, post and comb weights, and their gradients."""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.tile_kernels import outputs
from tile_mhc.ops.tile_kernels.exact_mixes import split_mixes_backward


def mhc_pre_split_mixes_fwd(
    input_mixes: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    pre_layer_mix: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    mhc_post_mult_value: float,
    mhc_pre_eps: float,
) -> None:
    """Write `tile_mhc.split_mixes` of input_mixes (..., n*(n+2)) into the three behind it.

    pre_layer_mix and post_layer_mix are (..., n) or (..., n, 1), comb_res_mix, the logits of the
    matrix, (..., n*n) or (..., n, n).
    """
    op = "mhc_pre_split_mixes_fwd"
    like, n = _check_inputs(op, input_mixes, mhc_scale, mhc_base)
    errors.check_number(op, "mhc_post_mult_value", mhc_post_mult_value)
    errors.check_number(op, "mhc_pre_eps", mhc_pre_eps)
    given = (pre_layer_mix, post_layer_mix, comb_res_mix)
    for name, value, shapes in _groups(input_mixes, n, given, ""):
        _checks.check_output(op, name, value, shapes, torch.float32, like, apart=[like])
    pre, post = (mix.view(*input_mixes.shape[:-1], n) for mix in given[:2])
    with torch.no_grad():
        outputs.split_mixes(
            input_mixes,
            mhc_scale,
            mhc_base,
            mhc_post_mult_value,
            mhc_pre_eps,
            pre,
            post,
            comb_res_mix,
        )


def mhc_pre_split_mixes_bwd(
    pre_layer_mix_grad: torch.Tensor,
    post_layer_mix_grad: torch.Tensor,
    comb_res_mix_grad: torch.Tensor,
    input_mixes: torch.Tensor,
    post_layer_mix: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    input_mixes_grad: torch.Tensor,
    mhc_scale_grad: torch.Tensor,
    mhc_base_grad: torch.Tensor,
    mhc_post_mult_value: float,
) -> None:
    """Write the gradients of input_mixes, scale (3,) and base (n*(n+2),) from those of the three.

    post_layer_mix, what the forward has written, is checked and not read: the kernel makes it again
    of input_mixes, with more digits where it is near its ends.
    """
    op = "mhc_pre_split_mixes_bwd"
    like, n = _check_inputs(op, input_mixes, mhc_scale, mhc_base)
    errors.check_number(op, "mhc_post_mult_value", mhc_post_mult_value)
    grads = (pre_layer_mix_grad, post_layer_mix_grad, comb_res_mix_grad)
    for name, value, shapes in _groups(input_mixes, n, grads, "_grad"):
        errors.check_tensor(op, name, value, shapes, torch.float32, like)
    row = (*input_mixes.shape[:-1], n)
    errors.check_tensor(op, "post_layer_mix", post_layer_mix, [row, (*row, 1)], torch.float32, like)
    for name, value, of in (
        ("input_mixes_grad", input_mixes_grad, input_mixes),
        ("mhc_scale_grad", mhc_scale_grad, mhc_scale),
        ("mhc_base_grad", mhc_base_grad, mhc_base),
    ):
        _checks.check_output(op, name, value, [of.shape], of.dtype, like)
    pre, post = (grad.reshape(row) for grad in grads[:2])
    with torch.no_grad():
        split_mixes_backward(
            pre,
            post,
            comb_res_mix_grad,
            input_mixes,
            mhc_scale,
            mhc_base,
            mhc_post_mult_value,
            input_mixes_grad,
            mhc_scale_grad,
            mhc_base_grad,
        )


def _mhc_pre_split_mixes_fwd(
    mhc_mult: int,
    mhc_post_mult_value: float,
    mhc_pre_eps: float,
    token_block_size: int,
    dtype: object = "float32",
) -> Callable[..., None]:
    """A callable with the first six arguments of `mhc_pre_split_mixes_fwd`. Of release 1.0.0."""
    op = "_mhc_pre_split_mixes_fwd"
    _check_builder(op, mhc_mult, dtype, token_block_size=token_block_size)
    errors.check_number(op, "mhc_post_mult_value", mhc_post_mult_value)
    errors.check_number(op, "mhc_pre_eps", mhc_pre_eps)

    def kernel(
        input_mixes: torch.Tensor,
        mhc_scale: torch.Tensor,
        mhc_base: torch.Tensor,
        pre_layer_mix: torch.Tensor,
        post_layer_mix: torch.Tensor,
        comb_res_mix: torch.Tensor,
    ) -> None:
        _checks.check_rows(op, "input_mixes", input_mixes, (mhc_mult * (mhc_mult + 2),))
        mhc_pre_split_mixes_fwd(
            input_mixes,
            mhc_scale,
            mhc_base,
            pre_layer_mix,
            post_layer_mix,
            comb_res_mix,
            mhc_post_mult_value,
            mhc_pre_eps,
        )

    return kernel


def _mhc_pre_split_mixes_bwd(
    mhc_mult: int,
    mhc_post_mult_value: float,
    token_block_size: int,
    num_sms: int = 148,
    dtype: object = "float32",
) -> Callable[..., None]:
    """A callable like `mhc_pre_split_mixes_bwd`, with rows of partial sums in place of sums.

    Its last two arguments are mhc_scale_grad_partial (num_sms, 3) and mhc_base_grad_partial
    (num_sms, n*(n+2)), whose sums over the rows are the gradients: all in row 0, here. Of 1.0.0.
    """
    op = "_mhc_pre_split_mixes_bwd"
    _check_builder(op, mhc_mult, dtype, token_block_size=token_block_size, num_sms=num_sms)
    errors.check_number(op, "mhc_post_mult_value", mhc_post_mult_value)
    num_mixes = mhc_mult * (mhc_mult + 2)

    def kernel(
        pre_layer_mix_grad: torch.Tensor,
        post_layer_mix_grad: torch.Tensor,
        comb_res_mix_grad: torch.Tensor,
        input_mixes: torch.Tensor,
        post_layer_mix: torch.Tensor,
        mhc_scale: torch.Tensor,
        mhc_base: torch.Tensor,
        input_mixes_grad: torch.Tensor,
        mhc_scale_grad_partial: torch.Tensor,
        mhc_base_grad_partial: torch.Tensor,
    ) -> None:
        _checks.check_rows(op, "input_mixes", input_mixes, (num_mixes,))
        like = ("input_mixes", input_mixes)
        errors.check_tensor(op, "mhc_scale", mhc_scale, [(3,)], torch.float32, like)
        errors.check_tensor(op, "mhc_base", mhc_base, [(num_mixes,)], torch.float32, like)
        for name, rows, columns in (
            ("mhc_scale_grad_partial", mhc_scale_grad_partial, 3),
            ("mhc_base_grad_partial", mhc_base_grad_partial, num_mixes),
        ):
            shape = (num_sms, columns)
            _checks.check_output(op, name, rows, [shape], torch.float32, like, apart=[like])
        mhc_pre_split_mixes_bwd(
            pre_layer_mix_grad,
            post_layer_mix_grad,
            comb_res_mix_grad,
            input_mixes,
            post_layer_mix,
            mhc_scale,
            mhc_base,
            input_mixes_grad,
            mhc_scale_grad_partial[0],
            mhc_base_grad_partial[0],
            mhc_post_mult_value,
        )
        with torch.no_grad():
            mhc_scale_grad_partial[1:].zero_()
            mhc_base_grad_partial[1:].zero_()

    return kernel


def _check_builder(op: str, mhc_mult: int, dtype: object, **counts: int) -> None:
    _checks.check_sizes(op, mhc_mult, **counts)
    if not str(dtype).endswith("float32"):
        raise errors.UnsupportedError(f"{op}: dtype must be float32; got {errors.shown(dtype)}")


def _check_inputs(
    op: str, input_mixes: object, mhc_scale: object, mhc_base: object
) -> tuple[tuple[str, torch.Tensor], int]:
    mixes = _checks.check_numbers(op, "input_mixes", input_mixes, "(..., n*(n+2))", 1)
    n = _checks.check_num_mixes(op, "input_mixes", mixes, mixes.shape[-1])
    like = ("input_mixes", mixes)
    _checks.check_gates(op, mhc_scale, mhc_base, [(3,)], mixes.shape[-1], like)
    return like, n


def _groups(
    input_mixes: torch.Tensor, n: int, given: tuple[torch.Tensor, ...], suffix: str
) -> list[tuple[str, torch.Tensor, list[tuple[int, ...]]]]:
    """The three groups by name, with the shapes that each may have."""
    lead = input_mixes.shape[:-1]
    row, matrix = [(*lead, n), (*lead, n, 1)], [(*lead, n * n), (*lead, n, n)]
    names = (f"pre_layer_mix{suffix}", f"post_layer_mix{suffix}", f"comb_res_mix{suffix}")
    return list(zip(names, given, (row, row, matrix), strict=True))
