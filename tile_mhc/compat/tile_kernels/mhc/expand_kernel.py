"""1 -> n: the copy and its sum, on flat tokens of bfloat16."""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.ops.expand import expand

Kernel = Callable[[torch.Tensor, torch.Tensor], None]


def expand_to_mhc_fwd_tl(hidden: int, mhc_mult: int) -> Kernel:
    """A callable (x, o): copies x (T, hidden) into every stream of o (T, mhc_mult, hidden)."""
    op = "expand_to_mhc_fwd_tl"
    _check_sizes(op, hidden, mhc_mult)

    def kernel(x: torch.Tensor, o: torch.Tensor) -> None:
        tokens = _check_rows(op, "x", x, (hidden,))
        errors.check_tensor(op, "o", o, [(tokens, mhc_mult, hidden)], torch.bfloat16, ("x", x))
        with torch.no_grad():
            expand(x, mhc_mult, out=o)

    return kernel


def expand_to_mhc_bwd_tl(hidden: int, mhc_mult: int) -> Kernel:
    """A callable (o_grad, x_grad): writes the sum over the streams of o_grad into x_grad."""
    op = "expand_to_mhc_bwd_tl"
    _check_sizes(op, hidden, mhc_mult)

    def kernel(o_grad: torch.Tensor, x_grad: torch.Tensor) -> None:
        tokens = _check_rows(op, "o_grad", o_grad, (mhc_mult, hidden))
        like = ("o_grad", o_grad)
        errors.check_tensor(op, "x_grad", x_grad, [(tokens, hidden)], torch.bfloat16, like)
        with torch.no_grad():
            x_grad.copy_(torch.ops.tile_mhc.expand_backward(o_grad))

    return kernel


def _check_sizes(op: str, hidden: int, mhc_mult: int) -> None:
    errors.check_num_streams(op, mhc_mult)
    errors.check_hidden_size(op, hidden)


def _check_rows(op: str, name: str, value: object, row: tuple[int, ...]) -> int:
    tensor = errors.require_tensor(op, name, value)
    tokens = tensor.shape[0] if tensor.ndim else 0
    errors.check_tensor(op, name, tensor, [(tokens, *row)], torch.bfloat16)
    errors.check_device(op, name, tensor)
    errors.check_contiguous(op, name, tensor)
    return tokens
