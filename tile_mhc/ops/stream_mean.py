"""n -> 1: the mean of the streams, the readout of models without a learned one."""

from typing import Any

from torch import Tensor

from tile_mhc import errors, jit, reference
from tile_mhc.ops import _flops
from tile_mhc.ops._library import dtypes, register


def stream_mean(residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Read the mean of the residual streams.

    out[t, h] = (sum_i residual[t, i, h]) / n        (fp32 sum, i ascending, rounded once)

    The gradient of every stream is that of the mean, divided by n.

    Args:
        residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up to
            16384.
        out: optional destination (..., H), of the dtype of the residual; not allowed when a
            gradient is needed.

    Returns:
        (..., H), of the dtype of the residual.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: the head of GLM-5.3, transformers `glm5_next`; Megatron-LM `output_contract`.
    """
    _, hidden_size = errors.check_streams("stream_mean", "residual", residual)
    if out is None:
        return _stream_mean(residual)
    shape = (*residual.shape[:-2], hidden_size)
    errors.check_tensor("stream_mean", "out", out, [shape], residual.dtype, ("residual", residual))
    errors.check_out("stream_mean", out, [("residual", residual)])
    _stream_mean_out(residual, out)
    return out


def _launch(residual: Tensor, out: Tensor) -> None:
    n, hidden_size = residual.shape[-2:]
    if out.numel():
        kernel = jit.kernel("stream_mean_fwd", n, hidden_size, *dtypes(streams=residual.dtype))
        kernel(residual.view(-1, n, hidden_size), out.view(-1, hidden_size))


def _cuda(residual: Tensor) -> Tensor:
    out = _fake(residual)
    _launch(residual, out)
    return out


def _fake(residual: Tensor) -> Tensor:
    return residual.new_empty(*residual.shape[:-2], residual.shape[-1])


def _cpu_out(residual: Tensor, out: Tensor) -> None:
    out.copy_(reference.stream_mean(residual))


def _backward_cuda(grad: Tensor, num_streams: int) -> Tensor:
    hidden_size = grad.shape[-1]
    grad_residual = _backward_fake(grad, num_streams)
    if grad_residual.numel():
        given = dtypes(streams=grad.dtype)
        jit.kernel("stream_mean_bwd", num_streams, hidden_size, *given)(
            grad.contiguous().view(-1, hidden_size),
            grad_residual.view(-1, num_streams, hidden_size),
        )
    return grad_residual


def _backward_fake(grad: Tensor, num_streams: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], num_streams, grad.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_streams = inputs[0].shape[-2]


_stream_mean_backward = register(
    "stream_mean_backward(Tensor grad, int num_streams) -> Tensor",
    cuda=_backward_cuda,
    cpu=reference.stream_mean_backward,
    fake=_backward_fake,
    flops=_flops.pointwise,
)
_stream_mean = register(
    "stream_mean(Tensor residual) -> Tensor",
    cuda=_cuda,
    cpu=reference.stream_mean,
    fake=_fake,
    flops=_flops.pointwise,
    backward=lambda ctx, grad: _stream_mean_backward(grad, ctx.num_streams),
    setup_context=_setup_context,
)
_stream_mean_out = register(
    "stream_mean_out(Tensor residual, Tensor(a!) out) -> ()",
    cuda=_launch,
    cpu=_cpu_out,
    fake=lambda residual, out: None,
    flops=_flops.pointwise,
)
