"""The projection without its norm: products and sums of squares of flat streams, and the backward.

Weight and gradient of the product are rounded to TF32, as TileKernels has them.
"""

import torch
from torch import Tensor

from tile_mhc.ops import _flops
from tile_mhc.ops import projection as projection_op
from tile_mhc.ops._destinations import Destination
from tile_mhc.ops._library import absent, register, temporaries
from tile_mhc.ops.tile_kernels import reference
from tile_mhc.ops.tile_kernels.outputs import copy

# The kernels of `projection` take the row as it is: as many streams as its length is divided by.
STREAMS = 4
# Of a token's factors, that of x: see `projection_bwd`.
ALONG = 1


def _cuda(x: Tensor, weight: Tensor, products: Tensor, squares: Tensor) -> None:
    if x.numel():
        residual = x.view(x.shape[0], STREAMS, -1)
        parts = projection_op.split_products(residual, weight, None, None, True)
        for part, out in zip(parts, (products, squares), strict=True):
            torch.sum(part, 0, out=out)


def _cpu(x: Tensor, weight: Tensor, *outs: Tensor) -> None:
    copy(outs, reference.norm_fn_products(x, weight))


def _backward_cuda(
    grad: Tensor,
    grad_squares: Tensor,
    x: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
) -> None:
    if x.numel() == 0:
        grad_weight.zero_()
        return
    (num_tokens, size), num_mixes = x.shape, weight.shape[0]
    weight = weight.contiguous()
    # A norm that divides by 1 and whose statistic has no gradient leaves room for one.
    mixes, inv_rms = torch.zeros_like(grad), x.new_ones(num_tokens, dtype=torch.float32)
    parts, factors = temporaries(
        mixes, *projection_op.factor_shapes(num_tokens, num_mixes, streams=0)
    )
    grad_parts = projection_op.launch_norm(
        size, grad.contiguous(), mixes, inv_rms, absent(mixes), parts, factors, True
    )
    # By torch's kernel, which ends before the next one begins and writes no weight.
    torch.mul(grad_squares, 2, out=factors[:, ALONG])
    residual = x.view(num_tokens, STREAMS, -1)
    projection_op.launch_matmuls(
        grad_parts,
        factors,
        residual,
        weight,
        None,
        True,
        0,
        absent(x, x.dtype),
        grad_x,
        (grad_x, grad_weight, absent(weight)),
        {0: Destination(grad_x, adds=True)},
    )


def _backward_cpu(
    grad: Tensor,
    grad_squares: Tensor,
    x: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
) -> None:
    grads = reference.norm_fn_backward(grad, grad_squares, x, weight, grad_x)
    copy((grad_x, grad_weight), grads)


norm_fn_products = register(
    "norm_fn_products_out(Tensor x, Tensor weight, Tensor(a!) products, Tensor(b!) squares) -> ()",
    cuda=_cuda,
    cpu=_cpu,
    fake=lambda *_: None,
    flops=_flops.projection,
)
norm_fn_backward = register(
    "norm_fn_backward_out(Tensor grad, Tensor grad_squares, Tensor x, Tensor weight, "
    "Tensor(a!) grad_x, Tensor(b!) grad_weight) -> ()",
    cuda=_backward_cuda,
    cpu=_backward_cpu,
    fake=lambda *_: None,
    flops=_flops.padded_projection_backward,
)
