"""Sinkhorn without eps on logits hundreds apart, against its definition in float64."""

import torch
from torch import Tensor

import oracle
import tile_mhc
from cases import FUSED_PRE, Case

TOKENS = 8
# From where float32 has no reciprocal of a softmax, and no softmax, to where float64 has none.
GAPS = (80.0, 89.0, 104.0, 300.0, 690.0)
REPEATS = (1, 2, 20, 33, 100)
ERROR = 1e-5


def logits(n: int, gap: float, device: str) -> Tensor:
    """A column, a row, single elements far below the others, or all of any size; and rows that want
    one column, so that the scalings grow until every element counts."""
    x = torch.randn(8, TOKENS, n, n, device=device)
    x[0, :, :, 0] -= gap
    x[1, :, n - 1] -= gap
    x[2] -= gap * (torch.rand(x[2].shape, device=device) < 0.3)
    x[3] -= gap * (torch.rand(x[3].shape, device=device) < 0.7)
    x[4] -= gap * torch.rand(x[4].shape, device=device)
    x[5, :, :-1, 1:] -= gap
    x[6, :, :, : n // 2] -= gap
    x[6, :, 0] += gap / 2
    x[7] *= gap / 10
    return x.flatten(0, 1)


def definition(logits: Tensor, repeat: int) -> Tensor:
    comb = logits.softmax(-1)
    comb = comb / comb.sum(-2, keepdim=True)
    for _ in range(repeat - 1):
        comb = comb / comb.sum(-1, keepdim=True)
        comb = comb / comb.sum(-2, keepdim=True)
    return comb


def check(n: int, gap: float, repeat: int, device: str, function=None) -> None:
    """Output and gradient of `sinkhorn`, or of a function of logits and repeat."""
    x = logits(n, gap, device)
    grad = torch.randn_like(x)
    wide = x.double().requires_grad_()
    truth = definition(wide, repeat)
    (true_grad,) = torch.autograd.grad(truth, wide, grad.double())
    assert truth.isfinite().all()
    assert true_grad.isfinite().all(), "or there is no truth"
    leaf = x.requires_grad_()
    out = tile_mhc.sinkhorn(leaf, repeat=repeat, eps=0.0) if function is None else function(leaf)
    (grad_logits,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
    for name, ours, exact in (("out", out, truth), ("grad_logits", grad_logits, true_grad)):
        error = float((ours.double() - exact).detach().abs().max())
        assert error <= ERROR, f"{name}: {error:.3e} from float64, n={n}, {gap} apart, {repeat}"


def check_fused_pre(shape: tuple[int, int, int], device: str) -> None:
    """With biases that put a column of the logits 150 below the others."""
    n = shape[1]
    tensors, options = FUSED_PRE.inputs(shape[:1], *shape[1:], device)
    tensors["bias"][2 * n :: n] -= 150
    case = Case(*shape, "no softmax of a column in float32")
    ours = oracle.check(FUSED_PRE, case, tensors, options | {"sinkhorn_eps": 0.0})
    ones = torch.ones(shape[0], n, device=device)
    torch.testing.assert_close(ours["comb_mix"].sum(-2), ones, rtol=0, atol=ERROR)
