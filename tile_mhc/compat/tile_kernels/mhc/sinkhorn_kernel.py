"""n x n logits -> a doubly stochastic matrix, and its gradient."""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.sinkhorn import check_sinkhorn
from tile_mhc.ops.tile_kernels import outputs


def mhc_sinkhorn_fwd(
    comb_res_mix: torch.Tensor, comb_res_mix_out: torch.Tensor, repeat: int, eps: float
) -> None:
    """Write `tile_mhc.sinkhorn` of logits (..., n, n) into comb_res_mix_out, which may be they."""
    op = "mhc_sinkhorn_fwd"
    _check_matrices(op, "comb_res_mix", comb_res_mix)
    check_sinkhorn(op, repeat, eps)
    like, shape = ("comb_res_mix", comb_res_mix), comb_res_mix.shape
    _checks.check_output(op, "comb_res_mix_out", comb_res_mix_out, [shape], torch.float32, like)
    with torch.no_grad():
        outputs.sinkhorn(comb_res_mix, repeat, eps, comb_res_mix_out)


def mhc_sinkhorn_bwd(
    grad_output: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor, repeat: int, eps: float
) -> None:
    """Write the gradient of the logits x into grad_input, all (..., n, n)."""
    op = "mhc_sinkhorn_bwd"
    _check_matrices(op, "x", x)
    check_sinkhorn(op, repeat, eps)
    like = ("x", x)
    errors.check_tensor(op, "grad_output", grad_output, [x.shape], torch.float32, like)
    _checks.check_output(op, "grad_input", grad_input, [x.shape], torch.float32, like)
    with torch.no_grad():
        outputs.sinkhorn_backward(grad_output, x, repeat, eps, grad_input)


def _mhc_sinkhorn_fwd(
    hidden_size: int, token_block_size: int, repeat: int, eps: float
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A callable (comb_res_mix, comb_res_mix_out) of (T, hidden_size, hidden_size).

    Of release 1.0.0, where `hidden_size` is n and `token_block_size` one CTA's tokens, which here
    the kernel chooses.
    """
    _check_builder("_mhc_sinkhorn_fwd", hidden_size, token_block_size, repeat, eps)
    row = (hidden_size, hidden_size)

    def kernel(comb_res_mix: torch.Tensor, comb_res_mix_out: torch.Tensor) -> None:
        _checks.check_rows("_mhc_sinkhorn_fwd", "comb_res_mix", comb_res_mix, row)
        mhc_sinkhorn_fwd(comb_res_mix, comb_res_mix_out, repeat, eps)

    return kernel


def _mhc_sinkhorn_bwd(
    hidden_size: int, token_block_size: int, repeat: int, eps: float
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """A callable (grad_output, x, grad_input); see `_mhc_sinkhorn_fwd`."""
    _check_builder("_mhc_sinkhorn_bwd", hidden_size, token_block_size, repeat, eps)
    row = (hidden_size, hidden_size)

    def kernel(grad_output: torch.Tensor, x: torch.Tensor, grad_input: torch.Tensor) -> None:
        _checks.check_rows("_mhc_sinkhorn_bwd", "x", x, row)
        mhc_sinkhorn_bwd(grad_output, x, grad_input, repeat, eps)

    return kernel


def _check_builder(
    op: str, hidden_size: int, token_block_size: int, repeat: int, eps: float
) -> None:
    _checks.check_sizes(op, hidden_size, token_block_size=token_block_size)
    check_sinkhorn(op, repeat, eps)


def _check_matrices(op: str, name: str, value: object) -> None:
    tensor = _checks.check_numbers(op, name, value, "(..., n, n)", 2)
    errors.check_num_streams(op, tensor.shape[-1])
    shape = (*tensor.shape[:-1], tensor.shape[-1])
    errors.check_tensor(op, name, tensor, [(*shape[:-2], shape[-1], shape[-1])], torch.float32)
