"""Mixes -> pre, post and comb weights, and their gradients."""

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.tile_kernels import outputs


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
        outputs.split_mixes_backward(
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
