"""1 -> n: copy an embedding into every stream."""

from torch import Tensor

from tile_mhc import errors, jit, reference
from tile_mhc.ops import _flops
from tile_mhc.ops._library import dtypes, register


def expand(hidden: Tensor, num_streams: int = 4, *, out: Tensor | None = None) -> Tensor:
    """Copy a hidden state into every residual stream.

    out[t, i, h] = hidden[t, h]; the gradient is the fp32 sum over i, ascending, rounded once.

    Args:
        hidden: (..., H) bfloat16, float16 or float32, contiguous; H up to 16384.
        num_streams: n, one of 2, 4, 8.
        out: optional destination (..., n, H), of the dtype of hidden; not allowed when a gradient
            is needed.

    Returns:
        (..., n, H), of the dtype of hidden.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n or H has no kernel.

    Source: mHC paper (arXiv 2512.24880), sec. 3; DeepSeek TileKernels `mhc/expand_kernel.py`.
    """
    errors.require_tensor("expand", "hidden", hidden)
    errors.check_num_streams("expand", num_streams)
    errors.check_stream_dtype("expand", "hidden", hidden, "(..., H)", 1)
    errors.check_hidden_size("expand", hidden.shape[-1])
    errors.check_device("expand", "hidden", hidden)
    errors.check_contiguous("expand", "hidden", hidden)
    if out is None:
        return _expand(hidden, num_streams)
    shape = (*hidden.shape[:-1], num_streams, hidden.shape[-1])
    errors.check_tensor("expand", "out", out, [shape], hidden.dtype, ("hidden", hidden))
    errors.check_out("expand", out, [("hidden", hidden)])
    _expand_out(hidden, out)
    return out


def _launch(hidden: Tensor, out: Tensor) -> None:
    num_streams, hidden_size = out.shape[-2:]
    if out.numel():
        given = dtypes(streams=hidden.dtype)
        kernel = jit.kernel("expand_fwd", num_streams, hidden_size, *given)
        kernel(hidden.view(-1, hidden_size), out.view(-1, num_streams, hidden_size))


def _cuda(hidden: Tensor, num_streams: int) -> Tensor:
    out = _fake(hidden, num_streams)
    _launch(hidden, out)
    return out


def _fake(hidden: Tensor, num_streams: int) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], num_streams, hidden.shape[-1])


def _cpu_out(hidden: Tensor, out: Tensor) -> None:
    out.copy_(reference.expand(hidden, out.shape[-2]))


def _backward_cuda(grad: Tensor) -> Tensor:
    grad_hidden = _backward_fake(grad)
    launch_backward(grad, grad_hidden)
    return grad_hidden


def launch_backward(grad: Tensor, grad_hidden: Tensor) -> None:
    num_streams, hidden_size = grad.shape[-2:]
    if grad_hidden.numel():
        given = dtypes(streams=grad.dtype)
        kernel = jit.kernel("expand_bwd", num_streams, hidden_size, *given)
        kernel(
            grad.contiguous().view(-1, num_streams, hidden_size), grad_hidden.view(-1, hidden_size)
        )


def _backward_fake(grad: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-2], grad.shape[-1])


_expand_backward = register(
    "expand_backward(Tensor grad) -> Tensor",
    cuda=_backward_cuda,
    cpu=reference.expand_backward,
    fake=_backward_fake,
    flops=_flops.pointwise,
)
_expand = register(
    "expand(Tensor hidden, int num_streams) -> Tensor",
    cuda=_cuda,
    cpu=reference.expand,
    fake=_fake,
    flops=_flops.pointwise,
    backward=lambda ctx, grad: (_expand_backward(grad), None),
    setup_context=lambda ctx, inputs, output: None,
)
_expand_out = register(
    "expand_out(Tensor hidden, Tensor(a!) out) -> ()",
    cuda=_launch,
    cpu=_cpu_out,
    fake=lambda hidden, out: None,
    flops=_flops.pointwise,
)
