"""Gradients of the readout's gate, those of scale and bias by rows of partial sums."""

from torch import Tensor

from tile_mhc import errors, jit
from tile_mhc.ops import _flops
from tile_mhc.ops._library import register
from tile_mhc.ops.mixes import gate_dtypes
from tile_mhc.ops.tile_kernels import reference
from tile_mhc.ops.tile_kernels.outputs import copy


def _cuda(
    grad: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    block_tokens: int,
    grad_mixes: Tensor,
    scale_rows: Tensor,
    bias_rows: Tensor,
) -> None:
    n = mixes.shape[-1]
    if mixes.numel() == 0:
        scale_rows.zero_()
        bias_rows.zero_()
        return
    jit.kernel("head_mix_rows_bwd", n, *gate_dtypes(scale, bias))(
        grad.contiguous().view(-1, n),
        mixes.contiguous().view(-1, n),
        scale,
        bias.contiguous(),
        grad_mixes.view(-1, n),
        scale_rows.view(-1),
        bias_rows,
        block_tokens,
    )


def _cpu(
    grad: Tensor, mixes: Tensor, scale: Tensor, bias: Tensor, block_tokens: int, *outs: Tensor
) -> None:
    grads = reference.head_mix_rows_backward(
        grad.double(),
        mixes.double(),
        scale.double(),
        bias.double(),
        outs[-1].shape[0],
        block_tokens,
    )
    copy(outs, grads)


head_mix_rows_backward = register(
    "head_mix_rows_backward_out(Tensor grad, Tensor mixes, Tensor scale, Tensor bias, "
    "int block_tokens, Tensor(a!) grad_mixes, Tensor(b!) scale_rows, Tensor(c!) bias_rows) -> ()",
    cuda=_cuda,
    cpu=_cpu,
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
