"""n x n logits -> a doubly stochastic matrix."""

from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, jit, reference, selection
from tile_mhc.kernels._shapes import is_no_eps
from tile_mhc.ops import _flops, log_sinkhorn
from tile_mhc.ops._library import register
from tile_mhc.ops._op import Op

# The backward keeps two scalings per stream and step in shared memory: for eight streams 64 KiB per
# token, so that a CTA still takes two tokens.
MAX_REPEAT = 1024


def sinkhorn(logits: Tensor, *, repeat: int = 10, eps: float = 1e-6) -> Tensor:
    """Turn logits into a doubly stochastic matrix by Sinkhorn's alternating normalisation.

    p = softmax(logits, -1) + eps;  p = p / (sum_in p + eps);  then repeat - 1 times
    p = p / (sum_out p + eps);  p = p / (sum_in p + eps)

    The last step normalises columns: sum over `in` is 1 up to eps for every `out`. The gradient
    is that of these `repeat` steps, not of the limit.

    Args:
        logits: (..., n, n) float32, index [in, out]; n in 2, 4, 8.
        repeat: how many times columns are normalised, from 1 to 1024 (DeepSeek-V4 uses 20).
        eps: added to the softmax and to every divisor. With 0, which a smaller one than 2**-100
            counts as, logits may be as far apart as float32 can have them.

    Returns:
        (..., n, n) float32.

    Raises:
        ShapeError: a shape or dtype does not match, or repeat is not a positive integer.
        UnsupportedError: n or repeat has no kernel.

    Source: mHC paper (arXiv 2512.24880), eq. 9; TileKernels `mhc/sinkhorn_kernel.py`.
    """
    inputs = (logits, repeat, eps)
    known = _OP.find(inputs)
    if known is not None:
        return _OP.call(inputs, known)[0]
    errors.require_tensor("sinkhorn", "logits", logits)
    if logits.dtype != torch.float32 or logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise errors.ShapeError(
            f"sinkhorn: logits must be (..., n, n) float32; got {errors.describe(logits)}"
        )
    errors.check_num_streams("sinkhorn", logits.shape[-1])
    errors.check_device("sinkhorn", "logits", logits)
    check_sinkhorn("sinkhorn", repeat, eps)
    return _OP.call(inputs)[0]


def check_sinkhorn(op: str, repeat: int, eps: float, prefix: str = "") -> None:
    errors.check_positive_int(op, f"{prefix}repeat", repeat)
    if repeat > MAX_REPEAT:
        raise errors.UnsupportedError(
            f"{op}: {prefix}repeat must be at most {MAX_REPEAT}; got {repeat}"
        )
    errors.check_number(op, f"{prefix}eps", eps)


def _cuda(logits: Tensor, repeat: int, eps: float) -> Tensor:
    out = _fake(logits, repeat, eps)
    launch(logits, repeat, eps, out)
    return out


def launch(logits: Tensor, repeat: int, eps: float, out: Tensor) -> None:
    n = logits.shape[-1]
    if out.numel():
        rows = logits.contiguous().view(-1, n * n), out.view(-1, n * n)
        if is_no_eps(eps):
            log_sinkhorn.launch_rows(n, *rows, repeat)
        else:
            jit.kernel("sinkhorn_fwd", n)(*rows, repeat, eps)


def _fake(logits: Tensor, repeat: int, eps: float) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_cuda(grad: Tensor, logits: Tensor, repeat: int, eps: float) -> Tensor:
    grad_logits = logits.new_empty(logits.shape)
    launch_backward(grad, logits, repeat, eps, grad_logits)
    return grad_logits


def launch_backward(
    grad: Tensor, logits: Tensor, repeat: int, eps: float, grad_logits: Tensor
) -> None:
    n = logits.shape[-1]
    if grad_logits.numel():
        launch_backward_rows(
            n,
            grad.contiguous().view(-1, n * n),
            logits.contiguous().view(-1, n * n),
            grad_logits.view(-1, n * n),
            repeat,
            eps,
        )


def launch_backward_rows(
    num_streams: int, grad: Tensor, logits: Tensor, grad_logits: Tensor, repeat: int, eps: float
) -> None:
    """Of contiguous (tokens, n*n)."""
    if is_no_eps(eps):
        log_sinkhorn.launch_backward_rows(num_streams, grad, logits, grad_logits, repeat)
        return
    capacity = selection.history_capacity(repeat)
    jit.kernel("sinkhorn_bwd", num_streams, capacity)(grad, logits, grad_logits, repeat, eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.repeat, ctx.eps = inputs
    ctx.save_for_backward(logits)


def _backward_arguments(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, *ctx.saved_tensors, ctx.repeat, ctx.eps


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _sinkhorn_backward(*_backward_arguments(ctx, grad)), None, None


_sinkhorn_backward = register(
    "sinkhorn_backward(Tensor grad, Tensor logits, int repeat, float eps) -> Tensor",
    cuda=_backward_cuda,
    cpu=lambda grad, logits, repeat, eps: reference.sinkhorn_backward(
        grad, logits, repeat=repeat, eps=eps
    ),
    fake=lambda grad, logits, repeat, eps: logits.new_empty(logits.shape),
    flops=_flops.pointwise,
)
_sinkhorn = register(
    "sinkhorn(Tensor logits, int repeat, float eps) -> Tensor",
    cuda=_cuda,
    cpu=lambda logits, repeat, eps: reference.sinkhorn(logits, repeat=repeat, eps=eps),
    fake=_fake,
    flops=_flops.pointwise,
    backward=_backward,
    setup_context=_setup_context,
)
_OP = Op(
    name="sinkhorn",
    operator=_sinkhorn,
    save=_setup_context,
    arguments=_backward_arguments,
    gradients=_sinkhorn_backward,
    tensors=1,
)
