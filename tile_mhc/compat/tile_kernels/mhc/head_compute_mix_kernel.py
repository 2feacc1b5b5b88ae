"""The head's mixes -> its gate, and its gradients."""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.tile_kernels import outputs
from tile_mhc.ops.tile_kernels.head_mix_rows import head_mix_rows_backward

# What TileKernels takes for a token_block_size of 0, and the most of one that is taken here.
TOKEN_BLOCK_SIZE = 32
MAX_TOKEN_BLOCK_SIZE = 1024


def mhc_head_compute_mix_fwd(
    input_mix: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    output_mix: torch.Tensor,
    mhc_pre_eps: float,
    token_block_size: int = 0,
) -> None:
    """Write `tile_mhc.head_mix` of input_mix (..., n) into output_mix, which may be it.

    `token_block_size`, one CTA's tokens in TileKernels, decides nothing: the kernel chooses.
    """
    op = "mhc_head_compute_mix_fwd"
    like = _check_inputs(op, input_mix, mhc_scale, mhc_base, token_block_size)
    errors.check_number(op, "mhc_pre_eps", mhc_pre_eps)
    _checks.check_output(op, "output_mix", output_mix, [input_mix.shape], torch.float32, like)
    with torch.no_grad():
        outputs.head_mix(input_mix, mhc_scale.reshape(1), mhc_base, mhc_pre_eps, output_mix)


def mhc_head_compute_mix_bwd(
    output_mix_grad: torch.Tensor,
    input_mix: torch.Tensor,
    mhc_scale: torch.Tensor,
    mhc_base: torch.Tensor,
    input_mix_grad: torch.Tensor,
    mhc_scale_grad_partial: torch.Tensor,
    mhc_base_grad_partial: torch.Tensor,
    num_sms: int,
    token_block_size: int = 0,
) -> None:
    """Write the gradient of input_mix (..., n), and those of scale and base in `num_sms` rows.

    Block b of `token_block_size` tokens (0: 32) counts in row b % num_sms. The sums over the rows
    of mhc_scale_grad_partial (num_sms, 1) and mhc_base_grad_partial (num_sms, n), float32, are the
    gradients.
    """
    op = "mhc_head_compute_mix_bwd"
    like = _check_inputs(op, input_mix, mhc_scale, mhc_base, token_block_size)
    errors.check_positive_int(op, "num_sms", num_sms)
    shape, n = input_mix.shape, input_mix.shape[-1]
    errors.check_tensor(op, "output_mix_grad", output_mix_grad, [shape], torch.float32, like)
    rows = [("output_mix_grad", output_mix_grad), like]
    for name, value, shapes in (
        ("input_mix_grad", input_mix_grad, [shape]),
        ("mhc_scale_grad_partial", mhc_scale_grad_partial, [(num_sms, 1), (num_sms,)]),
        ("mhc_base_grad_partial", mhc_base_grad_partial, [(num_sms, n)]),
    ):
        apart = [] if value is input_mix_grad else rows
        _checks.check_output(op, name, value, shapes, torch.float32, like, apart=apart)
    with torch.no_grad():
        head_mix_rows_backward(
            output_mix_grad,
            input_mix,
            mhc_scale.reshape(1),
            mhc_base,
            token_block_size or TOKEN_BLOCK_SIZE,
            input_mix_grad,
            mhc_scale_grad_partial,
            mhc_base_grad_partial,
        )


def _mhc_head_compute_mix_fwd(
    mhc_mult: int, mhc_pre_eps: float, token_block_size: int
) -> Callable[..., None]:
    """A callable with the first four arguments of `mhc_head_compute_mix_fwd`. Of release 1.0.0."""
    op = "_mhc_head_compute_mix_fwd"
    _checks.check_sizes(op, mhc_mult, token_block_size=token_block_size)
    errors.check_number(op, "mhc_pre_eps", mhc_pre_eps)

    def kernel(
        input_mix: torch.Tensor,
        mhc_scale: torch.Tensor,
        mhc_base: torch.Tensor,
        output_mix: torch.Tensor,
    ) -> None:
        _checks.check_rows(op, "input_mix", input_mix, (mhc_mult,))
        mhc_head_compute_mix_fwd(input_mix, mhc_scale, mhc_base, output_mix, mhc_pre_eps)

    return kernel


def _mhc_head_compute_mix_bwd(
    mhc_mult: int, token_block_size: int, num_sms: int
) -> Callable[..., None]:
    """A callable with the first seven arguments of `mhc_head_compute_mix_bwd`. Of 1.0.0."""
    op = "_mhc_head_compute_mix_bwd"
    _checks.check_sizes(op, mhc_mult, token_block_size=token_block_size, num_sms=num_sms)

    def kernel(
        output_mix_grad: torch.Tensor,
        input_mix: torch.Tensor,
        mhc_scale: torch.Tensor,
        mhc_base: torch.Tensor,
        input_mix_grad: torch.Tensor,
        mhc_scale_grad_partial: torch.Tensor,
        mhc_base_grad_partial: torch.Tensor,
    ) -> None:
        _checks.check_rows(op, "input_mix", input_mix, (mhc_mult,))
        mhc_head_compute_mix_bwd(
            output_mix_grad,
            input_mix,
            mhc_scale,
            mhc_base,
            input_mix_grad,
            mhc_scale_grad_partial,
            mhc_base_grad_partial,
            num_sms,
            token_block_size,
        )

    return kernel


def _check_inputs(
    op: str, input_mix: object, mhc_scale: object, mhc_base: object, token_block_size: object
) -> tuple[str, torch.Tensor]:
    mix = _checks.check_numbers(op, "input_mix", input_mix, "(..., n)", 1)
    errors.check_num_streams(op, mix.shape[-1])
    like = ("input_mix", mix)
    _checks.check_gates(op, mhc_scale, mhc_base, [(1,), ()], mix.shape[-1], like)
    errors.check_positive_int(op, "token_block_size", token_block_size, minimum=0)
    if token_block_size > MAX_TOKEN_BLOCK_SIZE:  # type: ignore[operator]
        raise errors.UnsupportedError(
            f"{op}: token_block_size must be at most {MAX_TOKEN_BLOCK_SIZE}; got {token_block_size}"
        )
    return like
