"""1 -> n: the copy and its sum."""

from collections.abc import Callable

import torch

from tile_mhc import errors
from tile_mhc.compat.tile_kernels.mhc import _checks
from tile_mhc.ops.expand import expand
from tile_mhc.ops.tile_kernels import outputs

Kernel = Callable[[torch.Tensor, torch.Tensor], None]


def expand_to_mhc_fwd(x: torch.Tensor, o: torch.Tensor) -> None:
    """Copy x (..., H) into every stream of o (..., n, H): `tile_mhc.expand`."""
    _fwd("expand_to_mhc_fwd", x, o)


def expand_to_mhc_bwd(o_grad: torch.Tensor, x_grad: torch.Tensor) -> None:
    """Write the sum over the streams of o_grad (..., n, H) into x_grad (..., H)."""
    _bwd("expand_to_mhc_bwd", o_grad, x_grad)


def expand_to_mhc_fwd_tl(hidden: int, mhc_mult: int) -> Kernel:
    """A callable (x, o): copies x (T, hidden) into every stream of o (T, mhc_mult, hidden)."""
    op = "expand_to_mhc_fwd_tl"
    _checks.check_sizes(op, mhc_mult, hidden)

    def kernel(x: torch.Tensor, o: torch.Tensor) -> None:
        _checks.check_rows(op, "x", x, (hidden,), torch.bfloat16)
        tokens = x.shape[0]
        errors.check_tensor(op, "o", o, [(tokens, mhc_mult, hidden)], torch.bfloat16, ("x", x))
        _fwd(op, x, o)

    return kernel


def expand_to_mhc_bwd_tl(hidden: int, mhc_mult: int) -> Kernel:
    """A callable (o_grad, x_grad): writes the sum over the streams of o_grad into x_grad."""
    op = "expand_to_mhc_bwd_tl"
    _checks.check_sizes(op, mhc_mult, hidden)

    def kernel(o_grad: torch.Tensor, x_grad: torch.Tensor) -> None:
        _checks.check_rows(op, "o_grad", o_grad, (mhc_mult, hidden), torch.bfloat16)
        _bwd(op, o_grad, x_grad)

    return kernel


def _fwd(op: str, x: torch.Tensor, o: torch.Tensor) -> None:
    _checks.check_hidden(op, "x", x)
    num_streams = o.shape[-2] if isinstance(o, torch.Tensor) and o.ndim > 1 else 4
    errors.check_num_streams(op, num_streams)
    shape = (*x.shape[:-1], num_streams, x.shape[-1])
    _checks.check_streams_output(op, "o", o, shape, ("x", x), [("x", x)])
    with torch.no_grad():
        expand(x, num_streams, out=o)


def _bwd(op: str, o_grad: torch.Tensor, x_grad: torch.Tensor) -> None:
    _, hidden = errors.check_streams(op, "o_grad", o_grad)
    like = ("o_grad", o_grad)
    shape = (*o_grad.shape[:-2], hidden)
    _checks.check_streams_output(op, "x_grad", x_grad, shape, like, [like])
    with torch.no_grad():
        outputs.expand_backward(o_grad, x_grad)
