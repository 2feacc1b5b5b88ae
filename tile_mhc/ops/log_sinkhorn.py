"""Logits, however far apart, to a doubly stochastic matrix: `sinkhorn` without eps, and what is
behind compat.transformer_engine."""

from typing import Any

from torch import Tensor

from tile_mhc import jit, reference, selection
from tile_mhc.ops import _flops
from tile_mhc.ops import mixes as mixes_op
from tile_mhc.ops._library import register, temporaries


def _cuda(logits: Tensor, repeat: int) -> Tensor:
    out = _fake(logits, repeat)
    n = logits.shape[-1]
    if out.numel():
        launch_rows(n, logits.contiguous().view(-1, n * n), out.view(-1, n * n), repeat)
    return out


def launch_rows(num_streams: int, logits: Tensor, out: Tensor, repeat: int) -> None:
    """Of contiguous (tokens, n*n)."""
    jit.kernel("log_sinkhorn_fwd", num_streams)(logits, out, repeat)


def launch_comb(mixes: Tensor, scale: Tensor, bias: Tensor, comb_mix: Tensor, repeat: int) -> None:
    """Write comb_mix, which a kernel for all mixes has left undefined: it divides by eps."""
    n = comb_mix.shape[-1]
    rows = mixes.view(-1, n * (n + 2))
    sizes = ((rows.shape[0], columns) for columns in (n, n, n * n))
    pre_mix, post_mix, logits = temporaries(rows, *sizes)
    mixes_op.launch_rows(rows, scale, bias, pre_mix, post_mix, logits, 1.0, 0.0)
    launch_rows(n, logits, comb_mix.view(-1, n * n), repeat)


def _fake(logits: Tensor, repeat: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_cuda(grad: Tensor, logits: Tensor, repeat: int) -> Tensor:
    grad_logits = logits.new_empty(logits.shape)
    n = logits.shape[-1]
    if grad_logits.numel():
        launch_backward_rows(
            n,
            grad.contiguous().view(-1, n * n),
            logits.contiguous().view(-1, n * n),
            grad_logits.view(-1, n * n),
            repeat,
        )
    return grad_logits


def launch_backward_rows(
    num_streams: int, grad: Tensor, logits: Tensor, grad_logits: Tensor, repeat: int
) -> None:
    """Of contiguous (tokens, n*n)."""
    capacity = selection.history_capacity(repeat)
    jit.kernel("log_sinkhorn_bwd", num_streams, capacity)(grad, logits, grad_logits, repeat)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.repeat = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _log_sinkhorn_backward(grad, *ctx.saved_tensors, ctx.repeat), None


_log_sinkhorn_backward = register(
    "log_sinkhorn_backward(Tensor grad, Tensor logits, int repeat) -> Tensor",
    cuda=_backward_cuda,
    cpu=reference.log_sinkhorn_backward,
    fake=lambda grad, logits, repeat: logits.new_empty(logits.shape),
    flops=_flops.pointwise,
)
log_sinkhorn = register(
    "log_sinkhorn(Tensor logits, int repeat) -> Tensor",
    cuda=_cuda,
    cpu=reference.log_sinkhorn,
    fake=_fake,
    flops=_flops.pointwise,
    backward=_backward,
    setup_context=_setup_context,
)
