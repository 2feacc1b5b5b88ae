"""Gates anywhere between shut and open: the gradient through one against its closed form."""

import torch
from torch import Tensor

import tile_mhc
from tile_mhc.compat import transformer_engine as te

N, PADDED = 4, 32
TOKENS = 161
# Of float64, at the float32 argument of the gate.
ERROR = 2e-6
POST_MULT = 2.0
# Powers of two: a product with them is exact, so the argument of a gate is rounded once, in torch
# and by a kernel's multiply-add alike.
SCALE = (0.5, -2.0, 4.0)


def slope(z: Tensor) -> Tensor:
    """The derivative of the sigmoid at z, in float64, by a form that cannot cancel."""
    small = (-z.double().abs()).exp()
    return small / (1 + small) ** 2


def inputs(columns: int, device: str, scale: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mixes, scale and bias whose gates have every argument from -80 to 80 in each column."""
    steps = torch.linspace(-80, 80, TOKENS, device=device)
    z = torch.stack([steps.roll(7 * k) for k in range(columns)], 1)
    bias = torch.randn(columns, device=device)
    scales = torch.tensor(scale, device=device)
    spread = scales.repeat_interleave(N)[:columns]
    spread = torch.cat((spread, scales[-1:].expand(columns - len(spread))))
    return (z - bias) / spread, scales, bias


def check_gradients(
    found: tuple[Tensor, Tensor], mixes: Tensor, scale: Tensor, bias: Tensor, upstream: Tensor
) -> None:
    """Gradients of the mixes and of the bias, by upstream gradients of sigmoids, all positive."""
    mixes, bias = mixes.detach(), bias.detach()
    z = (mixes.double() * scale + bias).float()
    grad = upstream.double() * slope(z)
    for name, ours, truth in zip(
        ("mixes", "bias"), found, (grad * scale, grad.sum(0)), strict=True
    ):
        error = float(((ours.double() - truth) / truth).abs().max())
        assert error <= ERROR, f"grad_{name}: {error:.3e} from float64"


def check_split_mixes(device: str, function=tile_mhc.split_mixes) -> None:
    mixes, scale, bias = inputs(N * (N + 2), device, SCALE)
    mixes.requires_grad_()
    bias.requires_grad_()
    pre, post, _ = function(mixes, scale, bias, num_streams=N, post_mult=POST_MULT)
    upstream = torch.rand(TOKENS, 2 * N, device=device) + 0.5
    grads = torch.autograd.grad((pre, post), (mixes, bias), upstream.split(N, 1))
    used = tuple(grad[..., : 2 * N] for grad in grads)
    upstream[:, N:] *= POST_MULT
    spread = scale.repeat_interleave(N)[: 2 * N]
    check_gradients(used, mixes[:, : 2 * N], spread, bias[: 2 * N], upstream)


def check_head_mix(device: str, function=tile_mhc.head_mix) -> None:
    mixes, scale, bias = inputs(N, device, SCALE[1:2])
    mixes.requires_grad_()
    bias.requires_grad_()
    upstream = torch.rand(TOKENS, N, device=device) + 0.5
    grads = torch.autograd.grad(function(mixes, scale, bias), (mixes, bias), upstream)
    check_gradients(grads, mixes, scale, bias, upstream)


def check_fused_pre(device: str) -> None:
    """A weight of zero leaves the bias: of post, whose gradient needs no sum over H."""
    for z in torch.linspace(-80, 80, 33).tolist():
        residual = torch.randn(5, N, 192, device=device).bfloat16()
        weight = torch.zeros(N * (N + 2), N * 192, device=device)
        bias = torch.full((N * (N + 2),), z, device=device, requires_grad=True)
        scale = torch.ones(3, device=device)
        _, post, _ = tile_mhc.fused_pre(residual, weight, scale, bias, post_mult=POST_MULT)
        upstream = torch.rand(5, N, device=device) + 0.5
        (grad,) = torch.autograd.grad(post, bias, upstream)
        truth = upstream.double().sum(0) * POST_MULT * slope(bias.detach()[N : 2 * N])
        error = float(((grad[N : 2 * N] - truth) / truth).abs().max())
        assert error <= ERROR, f"grad_bias at z = {z}: {error:.3e} from float64"


def check_padded_mixes(device: str) -> None:
    """TransformerEngine's, of an RMS factor of one."""
    mixes, scale, bias = inputs(N * (N + 2), device, SCALE)
    h = torch.nn.functional.pad(mixes, (0, PADDED - N * (N + 2))).requires_grad_()
    bias.requires_grad_()
    ms = torch.full((TOKENS,), 1 - 2.0**-23, device=device)
    pre, post, _ = te.mhc_fused_scale(h, scale, bias.unsqueeze(0), ms, N)
    upstream = torch.rand(TOKENS, 2 * N, device=device) + 0.5
    grads = torch.autograd.grad((pre, post), (h, bias), upstream.split(N, 1))
    used = tuple(grad[..., : 2 * N] for grad in grads)
    upstream[:, N:] *= 2
    spread = scale.repeat_interleave(N)[: 2 * N]
    check_gradients(used, mixes[:, : 2 * N], spread, bias[: 2 * N], upstream)
