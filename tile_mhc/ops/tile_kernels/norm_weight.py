"""Gradients of the product of a weight and a norm weight, added to what is there."""

from torch import Tensor

from tile_mhc import jit
from tile_mhc.ops import _flops
from tile_mhc.ops._library import register


def _cuda(
    weight: Tensor,
    norm_weight: Tensor,
    grad: Tensor,
    grad_weight: Tensor,
    grad_norm_weight: Tensor,
) -> None:
    if weight.numel():
        num_mixes, size = weight.shape
        jit.kernel("norm_weight_bwd", num_mixes, size)(
            grad.contiguous(),
            weight.contiguous(),
            norm_weight.contiguous(),
            grad_weight,
            grad_norm_weight,
        )


def _cpu(
    weight: Tensor,
    norm_weight: Tensor,
    grad: Tensor,
    grad_weight: Tensor,
    grad_norm_weight: Tensor,
) -> None:
    wide = grad.double()
    grad_weight.copy_(grad_weight + wide * norm_weight)
    grad_norm_weight.copy_(grad_norm_weight + (wide * weight).sum(0))


norm_weight_backward = register(
    "norm_weight_backward_add(Tensor weight, Tensor norm_weight, Tensor grad, "
    "Tensor(a!) grad_weight, Tensor(b!) grad_norm_weight) -> ()",
    cuda=_cuda,
    cpu=_cpu,
    fake=lambda *_: None,
    flops=_flops.pointwise,
)
