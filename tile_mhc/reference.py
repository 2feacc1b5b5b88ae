"""The specification of every op in plain torch: any device, fp32 or fp64, differentiable.

Each function takes the arguments of its public namesake. It computes in float32, or in float64
when an input is float64, and rounds a stream tensor once, to the dtype of the streams it came from.
On a CPU these functions are the ops. The `*_backward` functions are the gradients in closed form:
they serve the CPU, and the tests hold them against autograd of the forward ones.

Letters: n streams, H hidden size, K = n*H, N = n*(n+2) mixes; index i is the source stream,
j the destination, t the token, h the hidden position.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tile_mhc.kernels._shapes import is_no_eps


def _accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def expand(hidden: Tensor, num_streams: int) -> Tensor:
    """out[t, i, h] = hidden[t, h]"""
    shape = (*hidden.shape[:-1], num_streams, hidden.shape[-1])
    return hidden.unsqueeze(-2).expand(shape).clone(memory_format=torch.contiguous_format)


def expand_backward(grad: Tensor) -> Tensor:
    return grad.to(_accumulate_dtype(grad)).sum(-2).to(grad.dtype)


def stream_mean(residual: Tensor) -> Tensor:
    """out[t, h] = sum_i residual[t, i, h] / n"""
    return residual.to(_accumulate_dtype(residual)).mean(-2).to(residual.dtype)


def stream_mean_backward(grad: Tensor, num_streams: int) -> Tensor:
    return expand(grad / num_streams, num_streams)


def merge_norm_weight(weight: Tensor, norm_weight: Tensor | None) -> Tensor:
    """Fold a weight of the RMS norm, (K,), into the projection weight (N, K)."""
    return weight if norm_weight is None else weight * norm_weight.to(weight.dtype)


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the 11 bits of TF32, halves away from zero; the gradient is untouched."""
    bits = (x.detach().to(torch.float32).view(torch.int32) + 0x1000) & ~0x1FFF
    change = bits.view(torch.float32).to(x.dtype) - x.detach()
    return x + torch.where(x.detach().isfinite(), change, 0.0)


def token_scale(x: Tensor) -> Tensor:
    """A power of two s <= 1 a token, so that s*x is small enough to be squared and summed.

    It is 1 unless |x| exceeds 2**40: there float32 would overflow where float64 gives a number.
    """
    largest = x.detach().abs().amax(-1, keepdim=True).to(torch.float32)
    exponent = torch.frexp(largest).exponent
    exponent = torch.where(largest.isfinite() & (exponent > 40), exponent, 0)
    return torch.ldexp(torch.ones_like(largest), -exponent).to(x.dtype)


def projection_with_rms(
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mixes (..., N), and the factor inv_rms (...) = rsqrt(mean(x**2) + norm_eps)."""
    dtype = _accumulate_dtype(residual, weight, norm_weight)
    merged = merge_norm_weight(weight.to(dtype), norm_weight)
    if tf32:
        merged = round_to_tf32(merged)
    x = residual.flatten(-2).to(dtype)
    scale = token_scale(x) if x.shape[-1] else torch.ones_like(x[..., :1])
    x = x * scale
    inv_rms = (x.square().mean(-1, keepdim=True) + norm_eps * scale * scale).rsqrt()
    return (x @ merged.mT) * inv_rms, (inv_rms * scale).squeeze(-1)


def projection(
    residual: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    tf32: bool = False,
) -> Tensor:
    """mixes = (x @ (weight * norm_weight).T) * rsqrt(mean(x**2) + norm_eps), x the flat streams"""
    return projection_with_rms(residual, weight, norm_weight, norm_eps, tf32)[0]


def projection_backward(
    grad: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    tf32: bool = False,
    added: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of residual, weight and norm_weight from the gradient of the mixes.

    `added` joins the gradient of the residual before that is rounded. With `tf32` the gradient of
    the bare product is rounded too, as TileKernels does.
    """
    dtype = mixes.dtype
    wide_weight = weight.to(dtype)
    merged = merge_norm_weight(wide_weight, norm_weight)
    x = residual.flatten(-2).to(dtype)
    rms = inv_rms.unsqueeze(-1)
    grad_product = grad * rms
    if tf32:
        merged, grad_product = round_to_tf32(merged), round_to_tf32(grad_product)
    # d inv_rms/dx = -x * inv_rms**3 / K; the product of x and inv_rms first: it cannot overflow.
    along = (grad * mixes).sum(-1, keepdim=True) * rms / x.shape[-1]
    grad_x = (grad_product @ merged - (x * rms) * along).view_as(residual) + added
    grad_merged = grad_product.reshape(-1, merged.shape[0]).mT @ x.reshape(-1, x.shape[-1])
    grad_norm_weight = None
    if norm_weight is not None:
        grad_norm_weight = (grad_merged * wide_weight).sum(0).to(norm_weight.dtype)
    grad_weight = merge_norm_weight(grad_merged, norm_weight).to(weight.dtype)
    return grad_x.to(residual.dtype), grad_weight, grad_norm_weight


def split_mixes(
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_streams: int,
    post_mult: float = 1.0,
    pre_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """pre = sigmoid(z_pre) + pre_eps, post = post_mult * sigmoid(z_post), comb = z_comb"""
    n = num_streams
    pre, post, comb = _gate_logits(mixes, scale, bias).split((n, n, n * n), dim=-1)
    return _sigmoid(pre) + pre_eps, _sigmoid(post) * post_mult, comb.unflatten(-1, (n, n))


def _sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + exp(-z)), whose gradient keeps its bits where it is near 1.

    Autograd takes y * (1 - y) of y = sigmoid(z), a difference that cancels if y is not the smaller
    part.
    """
    smaller = torch.where(z > 0, -z, z).sigmoid()
    return torch.where(z > 0, 1 - smaller, smaller)


def _sigmoid_slope(z: Tensor) -> Tensor:
    """The derivative of the sigmoid. Not y * (1 - y), as in `_sigmoid`."""
    return z.sigmoid() * (-z).sigmoid()


def _gate_logits(mixes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """mixes * scale + bias: of all mixes and three scales, of those without comb and two, or of
    those of a head and its one."""
    return mixes * _spread(scale, mixes.shape[-1]).to(mixes.dtype) + bias.to(mixes.dtype)


def _spread(scale: Tensor, num_mixes: int) -> Tensor:
    """One scale for the n pre, the n post and the n*n comb mixes, (3,) to (N,); or for the first
    two, (2,) to (2*n,); (1,) as it is."""
    if scale.shape[0] == 1:
        return scale
    if scale.shape[0] == 2:
        return scale.repeat_interleave(num_mixes // 2)
    n = math.isqrt(num_mixes + 1) - 1
    repeats = torch.tensor((n, n, n * n), device=scale.device)
    return scale.repeat_interleave(repeats, output_size=num_mixes)


def split_mixes_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_streams: int,
    post_mult: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mixes, scale and bias."""
    n = num_streams
    slope = _sigmoid_slope(_gate_logits(mixes, scale, bias)[..., : 2 * n])
    pre, post = slope.split((n, n), dim=-1)
    shape = mixes.shape[:-1]
    grad_logits = torch.cat(
        (
            grad_pre.reshape(*shape, n) * pre,
            grad_post.reshape(*shape, n) * post_mult * post,
            grad_comb.reshape(*shape, n * n),
        ),
        dim=-1,
    )
    by_mix = (grad_logits * mixes).reshape(-1, n * (n + 2)).sum(0)
    grad_scale = torch.stack([part.sum() for part in by_mix.split((n, n, n * n))])
    grad_bias = grad_logits.reshape(-1, n * (n + 2)).sum(0)
    wide = _spread(scale, n * (n + 2)).to(mixes.dtype)
    return grad_logits * wide, grad_scale.to(scale.dtype), grad_bias.to(bias.dtype)


def sinkhorn(logits: Tensor, *, repeat: int = 10, eps: float = 1e-6) -> Tensor:
    """softmax over the last axis + eps, divided by column sums + eps; then repeat - 1 times
    divided by row sums + eps and by column sums + eps.

    An eps that `is_no_eps` is 0.
    """
    if is_no_eps(eps):
        return log_sinkhorn(logits, repeat)
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def sinkhorn_backward(grad: Tensor, logits: Tensor, *, repeat: int, eps: float) -> Tensor:
    """The gradient of the `repeat`-step map itself (not of its fixed point)."""
    if is_no_eps(eps):
        return log_sinkhorn_backward(grad, logits, repeat)
    softmax = logits.softmax(-1)
    step = softmax + eps
    trace = []  # (axis, divisor, quotient) of every normalisation
    for axis in (-2, *((-1, -2) * (repeat - 1))):
        divisor = step.sum(axis, keepdim=True) + eps
        step = step / divisor
        trace.append((axis, divisor, step))
    for axis, divisor, quotient in reversed(trace):
        grad = (grad - (grad * quotient).sum(axis, keepdim=True)) / divisor
    return softmax * (grad - (grad * softmax).sum(-1, keepdim=True))


def log_sinkhorn(logits: Tensor, repeat: int) -> Tensor:
    """`sinkhorn` without eps, for logits however far apart: repeat times
    f = -logsumexp_j(logits + g), g = -logsumexp_i(logits + f), from g = 0; exp(f + logits + g).

    In float64, as the difference of two logits 300 apart is off by 1e-5 in float32.
    """
    shifted, first = _shifted(logits)
    f, _, g = _log_scalings(shifted, first, repeat)[-1]
    return (f + shifted + g).exp().to(logits.dtype)


def log_sinkhorn_backward(grad: Tensor, logits: Tensor, repeat: int) -> Tensor:
    """The gradient of the `repeat`-step map itself (not of its fixed point)."""
    shifted, first = _shifted(logits)
    scalings = _log_scalings(shifted, first, repeat)
    f, _, g = scalings[-1]
    grad = grad * (f + shifted + g).exp()
    for f, before, g in reversed(scalings):
        grad = grad - (f + shifted + g).exp() * grad.sum(-2, keepdim=True)
        grad = grad - (f + shifted + before).exp() * grad.sum(-1, keepdim=True)
    return grad.to(logits.dtype)


def _shifted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits with a largest one of 0 in every row and column, and the g that stands for 0.

    A shift of a row changes nothing, nor does one of a column that g takes up.
    """
    wide = logits.double()
    wide = wide - wide.detach().amax(-1, keepdim=True)
    columns = wide.detach().amax(-2, keepdim=True)
    return wide - columns, columns


def _log_scalings(
    logits: Tensor, first: Tensor, repeat: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """f, the g that it was made with, and the g made with it, of every step."""
    after = first
    scalings = []
    for _ in range(repeat):
        before = after
        f = -(logits + before).logsumexp(-1, keepdim=True)
        after = -(logits + f).logsumexp(-2, keepdim=True)
        scalings.append((f, before, after))
    return scalings


def aggregate(residual: Tensor, pre_mix: Tensor) -> Tensor:
    """layer_input[t, h] = sum_i pre_mix[t, i] * residual[t, i, h]"""
    dtype = _accumulate_dtype(residual, pre_mix)
    mix = pre_mix.to(dtype).reshape(*residual.shape[:-1], 1)
    return (mix * residual.to(dtype)).sum(-2).to(residual.dtype)


def aggregate_backward(grad: Tensor, residual: Tensor, pre_mix: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of residual and pre_mix."""
    dtype = _accumulate_dtype(residual, pre_mix)
    mix = pre_mix.to(dtype).reshape(*residual.shape[:-1], 1)
    wide = grad.to(dtype).unsqueeze(-2)
    grad_mix = (wide * residual.to(dtype)).sum(-1)
    return (mix * wide).to(residual.dtype), grad_mix.view_as(pre_mix)


def post(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """out[t, j] = post_mix[t, j] * (layer_output[t] + bias)
    + sum_i comb_mix[t, i, j] * residual[t, i]"""
    dtype = _accumulate_dtype(residual, comb_mix)
    mix = post_mix.to(dtype).reshape(*residual.shape[:-1], 1)
    added = mix * _biased(layer_output, bias, dtype).unsqueeze(-2)
    return (added + comb_mix.to(dtype).mT @ residual.to(dtype)).to(residual.dtype)


def _biased(layer_output: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = layer_output.to(dtype)
    return wide if bias is None else wide + bias.to(dtype)


def post_backward(
    grad: Tensor,
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of layer_output, residual, post_mix, comb_mix and bias.

    That of the bias is summed from what is not rounded yet.
    """
    dtype = _accumulate_dtype(residual, comb_mix)
    mix = post_mix.to(dtype).reshape(*residual.shape[:-1], 1)
    wide = grad.to(dtype)
    grad_output = (mix * wide).sum(-2)
    grad_residual = (comb_mix.to(dtype) @ wide).to(residual.dtype)
    output = _biased(layer_output, bias, dtype).unsqueeze(-2)
    grad_post = (wide * output).sum(-1).view_as(post_mix)
    grad_comb = residual.to(dtype) @ wide.mT
    grad_bias = None
    if bias is not None:
        grad_bias = grad_output.reshape(-1, bias.shape[0]).sum(0).to(bias.dtype)
    return grad_output.to(layer_output.dtype), grad_residual, grad_post, grad_comb, grad_bias


def head_mix(mixes: Tensor, scale: Tensor, bias: Tensor, *, pre_eps: float = 1e-6) -> Tensor:
    """sigmoid(mixes * scale + bias) + pre_eps"""
    return _sigmoid(_gate_logits(mixes, scale, bias)) + pre_eps


def head_mix_backward(
    grad: Tensor, mixes: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mixes, scale and bias."""
    grad_logits = grad * _sigmoid_slope(_gate_logits(mixes, scale, bias))
    grad_scale = (grad_logits * mixes).sum().reshape(scale.shape).to(scale.dtype)
    grad_bias = grad_logits.reshape(-1, mixes.shape[-1]).sum(0).to(bias.dtype)
    return grad_logits * scale.to(mixes.dtype), grad_scale, grad_bias


def contract(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    tf32: bool = False,
) -> Tensor:
    """aggregate(residual, head_mix(projection(residual, weight), scale, bias))"""
    mixes = projection(residual, weight, norm_weight=norm_weight, norm_eps=norm_eps, tf32=tf32)
    return aggregate(residual, head_mix(mixes, scale, bias, pre_eps=pre_eps))


def contract_with_mixes(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mixes, inv_rms)"""
    mixes, inv_rms = projection_with_rms(residual, weight, norm_weight, norm_eps, tf32)
    gate = head_mix(mixes, scale, bias, pre_eps=pre_eps)
    return aggregate(residual, gate), mixes, inv_rms


def contract_backward(
    grad: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of residual (both its uses, rounded once), weight, scale, bias and norm_weight."""
    gate = head_mix(mixes, scale, bias, pre_eps=pre_eps)
    wide = grad.to(mixes.dtype).unsqueeze(-2)
    grad_gate = (wide * residual.to(mixes.dtype)).sum(-1)
    grad_mixes, grad_scale, grad_bias = head_mix_backward(grad_gate, mixes, scale, bias)
    grad_residual, grad_weight, grad_norm_weight = projection_backward(
        grad_mixes,
        residual,
        weight,
        norm_weight,
        mixes,
        inv_rms,
        tf32,
        added=gate.unsqueeze(-1) * wide,
    )
    return grad_residual, grad_weight, grad_scale, grad_bias, grad_norm_weight


def fused_pre_with_mixes(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(layer_input, post_mix, comb_mix, mixes, inv_rms)"""
    mixes, inv_rms = projection_with_rms(residual, weight, norm_weight, norm_eps, tf32)
    n = residual.shape[-2]
    pre_mix, post_mix, comb = split_mixes(
        mixes, scale, bias, num_streams=n, post_mult=post_mult, pre_eps=pre_eps
    )
    comb_mix = sinkhorn(comb, repeat=sinkhorn_repeat, eps=sinkhorn_eps)
    return aggregate(residual, pre_mix), post_mix, comb_mix, mixes, inv_rms


def delayed_pre_with_mixes(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(layer_input, next pre_mix, post_mix, comb_mix, mixes, inv_rms)

    DeepSeek-V4.1: the collapse takes the `pre_mix` it is given, which the sub-layer before made;
    what is made here is for the sub-layer after.
    """
    mixes, inv_rms = projection_with_rms(residual, weight, norm_weight, norm_eps, tf32)
    n = residual.shape[-2]
    next_pre, post_mix, comb = split_mixes(
        mixes, scale, bias, num_streams=n, post_mult=post_mult, pre_eps=pre_eps
    )
    comb_mix = sinkhorn(comb, repeat=sinkhorn_repeat, eps=sinkhorn_eps)
    return aggregate(residual, pre_mix), next_pre, post_mix, comb_mix, mixes, inv_rms


def fused_pre(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    pre_mix: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 1.0,
    sinkhorn_repeat: int = 10,
    layer_norm_weight: Tensor | None = None,
    layer_norm_eps: float = 1e-6,
    tf32: bool = False,
) -> tuple[Tensor, ...]:
    """(layer_input, post_mix, comb_mix): projection, split_mixes, sinkhorn and aggregate.

    With a `pre_mix` (layer_input, next pre_mix, post_mix, comb_mix), the layer input by that; with
    a `layer_norm_weight` it is normed, by `input_norm`.
    """
    options = (norm_weight, norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat, tf32)
    if pre_mix is None:
        layer_input, *mixes = fused_pre_with_mixes(residual, weight, scale, bias, *options)[:3]
    else:
        given: list[Any] = [residual, weight, scale, bias, pre_mix, *options]
        layer_input, *mixes = delayed_pre_with_mixes(*given)[:4]
    if layer_norm_weight is not None:
        layer_input = input_norm(layer_input, layer_norm_weight, eps=layer_norm_eps)
    return layer_input, *mixes


def fused_pre_backward(
    grad_input: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool = False,
    accumulated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of residual, weight, scale, bias and norm_weight.

    That of the residual is for both its uses, on top of `accumulated`, and rounded once.
    """
    n = residual.shape[-2]
    pre_mix, _, logits = split_mixes(
        mixes, scale, bias, num_streams=n, post_mult=post_mult, pre_eps=pre_eps
    )
    wide = grad_input.to(mixes.dtype).unsqueeze(-2)
    grad_pre = (wide * residual.to(mixes.dtype)).sum(-1)
    grad_logits = sinkhorn_backward(grad_comb, logits, repeat=sinkhorn_repeat, eps=sinkhorn_eps)
    grad_mixes, grad_scale, grad_bias = split_mixes_backward(
        grad_pre, grad_post, grad_logits, mixes, scale, bias, n, post_mult
    )
    added = pre_mix.unsqueeze(-1) * wide
    if accumulated is not None:
        added = added + accumulated.to(added.dtype)
    grad_residual, grad_weight, grad_norm_weight = projection_backward(
        grad_mixes, residual, weight, norm_weight, mixes, inv_rms, tf32, added=added
    )
    return grad_residual, grad_weight, grad_scale, grad_bias, grad_norm_weight


def delayed_pre_backward(
    grad_input: Tensor,
    grad_next: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool = False,
    accumulated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of residual, weight, scale, bias, pre_mix and norm_weight.

    That of the residual is for both its uses, on top of `accumulated`, and rounded once.
    """
    n = residual.shape[-2]
    _, _, logits = split_mixes(
        mixes, scale, bias, num_streams=n, post_mult=post_mult, pre_eps=pre_eps
    )
    wide = grad_input.to(mixes.dtype).unsqueeze(-2)
    grad_pre_mix = (wide * residual.to(mixes.dtype)).sum(-1).view_as(pre_mix)
    grad_logits = sinkhorn_backward(grad_comb, logits, repeat=sinkhorn_repeat, eps=sinkhorn_eps)
    grad_mixes, grad_scale, grad_bias = split_mixes_backward(
        grad_next, grad_post, grad_logits, mixes, scale, bias, n, post_mult
    )
    added = pre_mix.to(mixes.dtype).reshape(*residual.shape[:-1], 1) * wide
    if accumulated is not None:
        added = added + accumulated.to(added.dtype)
    grad_residual, grad_weight, grad_norm_weight = projection_backward(
        grad_mixes, residual, weight, norm_weight, mixes, inv_rms, tf32, added=added
    )
    return grad_residual, grad_weight, grad_scale, grad_bias, grad_pre_mix, grad_norm_weight


def identity_mixes(
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    post_mult: float = 1.0,
    pre_eps: float = 1e-6,
    post_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """pre = sigmoid(z_pre) + pre_eps, post = post_mult * sigmoid(z_post) + post_eps"""
    pre, post = _gate_logits(mixes, scale, bias).chunk(2, dim=-1)
    return _sigmoid(pre) + pre_eps, _sigmoid(post) * post_mult + post_eps


def identity_mixes_backward(
    grad_pre: Tensor,
    grad_post: Tensor,
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    post_mult: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mixes, scale and bias."""
    num_mixes = mixes.shape[-1]
    grad_gates = torch.cat((grad_pre, grad_post.reshape(grad_pre.shape) * post_mult), dim=-1)
    grad_logits = grad_gates * _sigmoid_slope(_gate_logits(mixes, scale, bias))
    by_mix = (grad_logits * mixes).reshape(-1, num_mixes).sum(0)
    grad_scale = torch.stack([part.sum() for part in by_mix.chunk(2)])
    grad_bias = grad_logits.reshape(-1, num_mixes).sum(0)
    wide = _spread(scale, num_mixes).to(mixes.dtype)
    return grad_logits * wide, grad_scale.to(scale.dtype), grad_bias.to(bias.dtype)


def identity_pre_with_mixes(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    post_eps: float,
    post_mult: float,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(layer_input, post_mix, mixes, inv_rms)"""
    mixes, inv_rms = projection_with_rms(residual, weight, norm_weight, norm_eps, tf32)
    pre_mix, post_mix = identity_mixes(
        mixes, scale, bias, post_mult=post_mult, pre_eps=pre_eps, post_eps=post_eps
    )
    return aggregate(residual, pre_mix), post_mix, mixes, inv_rms


def identity_pre(
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    post_eps: float = 1e-6,
    post_mult: float = 1.0,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """(layer_input, post_mix): projection, identity_mixes and aggregate"""
    options = (norm_weight, norm_eps, pre_eps, post_eps, post_mult, tf32)
    return identity_pre_with_mixes(residual, weight, scale, bias, *options)[:2]


def identity_pre_backward(
    grad_input: Tensor,
    grad_post: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    post_mult: float,
    tf32: bool = False,
    accumulated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of residual, weight, scale, bias and norm_weight.

    That of the residual is for both its uses, on top of `accumulated`, and rounded once.
    """
    pre_mix, _ = identity_mixes(mixes, scale, bias, post_mult=post_mult, pre_eps=pre_eps)
    wide = grad_input.to(mixes.dtype).unsqueeze(-2)
    grad_pre = (wide * residual.to(mixes.dtype)).sum(-1)
    grad_mixes, grad_scale, grad_bias = identity_mixes_backward(
        grad_pre, grad_post, mixes, scale, bias, post_mult
    )
    added = pre_mix.unsqueeze(-1) * wide
    if accumulated is not None:
        added = added + accumulated.to(added.dtype)
    grad_residual, grad_weight, grad_norm_weight = projection_backward(
        grad_mixes, residual, weight, norm_weight, mixes, inv_rms, tf32, added=added
    )
    return grad_residual, grad_weight, grad_scale, grad_bias, grad_norm_weight


def identity_post(
    layer_output: Tensor, residual: Tensor, post_mix: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """out[t, j] = post_mix[t, j] * (layer_output[t] + bias) + residual[t, j]"""
    dtype = _accumulate_dtype(residual, post_mix)
    mix = post_mix.to(dtype).reshape(*residual.shape[:-1], 1)
    added = mix * _biased(layer_output, bias, dtype).unsqueeze(-2)
    return (added + residual.to(dtype)).to(residual.dtype)


def identity_post_backward(
    grad: Tensor, layer_output: Tensor, post_mix: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of layer_output, post_mix and bias; that of the residual is `grad`.

    That of the bias is summed from what is not rounded yet.
    """
    dtype = _accumulate_dtype(grad, post_mix)
    mix = post_mix.to(dtype).reshape(*grad.shape[:-1], 1)
    wide = grad.to(dtype)
    grad_output = (mix * wide).sum(-2)
    output = _biased(layer_output, bias, dtype).unsqueeze(-2)
    grad_post = (wide * output).sum(-1).view_as(post_mix)
    grad_bias = None
    if bias is not None:
        grad_bias = grad_output.reshape(-1, bias.shape[0]).sum(0).to(bias.dtype)
    return grad_output.to(layer_output.dtype), grad_post, grad_bias


def input_norm(layer_input: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """layer_input * rsqrt(mean(layer_input**2) + eps) * weight, of what was rounded already"""
    dtype = _accumulate_dtype(layer_input, weight)
    wide = layer_input.to(dtype)
    factor = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * factor * weight.to(dtype)).to(layer_input.dtype)


def post_pre_with_mixes(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    layer_bias: Tensor | None,
    norm_weight: Tensor | None,
    layer_norm_weight: Tensor | None,
    norm_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    layer_norm_eps: float,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """(streams, layer_input, next pre_mix, post_mix, comb_mix, mixes, inv_rms)

    The next pre_mix is None without a `pre_mix`. The streams are rounded, and read as rounded.
    """
    streams = post(layer_output, residual, post_mix, comb_mix, bias=layer_bias)
    gates: list[Any] = [streams, weight, scale, bias]
    options = [norm_weight, norm_eps, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat, tf32]
    next_pre = None
    if pre_mix is None:
        given = [*gates, *options]
        layer_input, *mixed = fused_pre_with_mixes(*given)
    else:
        given = [*gates, pre_mix, *options]
        layer_input, next_pre, *mixed = delayed_pre_with_mixes(*given)
    if layer_norm_weight is not None:
        layer_input = input_norm(layer_input, layer_norm_weight, eps=layer_norm_eps)
    next_post, next_comb, mixes, inv_rms = mixed
    return streams, layer_input, next_pre, next_post, next_comb, mixes, inv_rms


def post_pre(
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    pre_mix: Tensor | None = None,
    layer_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 1.0,
    sinkhorn_repeat: int = 10,
    layer_norm_weight: Tensor | None = None,
    layer_norm_eps: float = 1e-6,
    tf32: bool = False,
) -> tuple[Tensor, ...]:
    """post, then fused_pre of the streams that it wrote.

    (streams, layer_input, post_mix, comb_mix), and with a `pre_mix`
    (streams, layer_input, next pre_mix, post_mix, comb_mix).
    """
    streams, layer_input, next_pre, *mixed = post_pre_with_mixes(
        layer_output,
        residual,
        post_mix,
        comb_mix,
        weight,
        scale,
        bias,
        pre_mix,
        layer_bias,
        norm_weight,
        layer_norm_weight,
        norm_eps,
        pre_eps,
        sinkhorn_eps,
        post_mult,
        sinkhorn_repeat,
        layer_norm_eps,
        tf32,
    )
    given = () if next_pre is None else (next_pre,)
    return streams, layer_input, *given, *mixed[:2]


def post_pre_backward(
    grad_streams: Tensor | None,
    grad_input: Tensor,
    grad_next: Tensor,
    grad_post: Tensor,
    grad_comb: Tensor,
    layer_output: Tensor,
    residual: Tensor,
    post_mix: Tensor,
    comb_mix: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    pre_mix: Tensor | None,
    layer_bias: Tensor | None,
    norm_weight: Tensor | None,
    streams: Tensor,
    mixes: Tensor,
    inv_rms: Tensor,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    sinkhorn_repeat: int,
    tf32: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of layer_output, residual, post_mix, comb_mix, weight, scale, bias, pre_mix,
    layer_bias and norm_weight.

    `grad_streams` is what the streams' other readers give; `grad_next`, of the next pre_mix, is
    read with a `pre_mix` alone. The gradient of the streams is not rounded between the two halves.
    """
    given: list[Any] = [grad_post, grad_comb, streams.to(mixes.dtype), weight, scale, bias]
    saved = [norm_weight, mixes, inv_rms, pre_eps, sinkhorn_eps, post_mult, sinkhorn_repeat]
    saved += [tf32, grad_streams]
    grad_pre_mix = None
    if pre_mix is None:
        given = [grad_input, *given, *saved]
        grad, *parameters, grad_norm_weight = fused_pre_backward(*given)
    else:
        given = [grad_input, grad_next, *given, pre_mix, *saved]
        grad, *parameters, grad_pre_mix, grad_norm_weight = delayed_pre_backward(*given)
    *grads, grad_layer_bias = post_backward(
        grad, layer_output, residual, post_mix, comb_mix, layer_bias
    )
    return *grads, *parameters, grad_pre_mix, grad_layer_bias, grad_norm_weight


def recompute(
    initial_residual: Tensor,
    pre_mixes: list[Tensor],
    layer_outputs: list[Tensor],
    post_mixes: list[Tensor],
    comb_mixes: list[Tensor],
    *,
    layer_norm_weights: list[Tensor] | None = None,
    layer_norm_eps: float = 1e-6,
) -> tuple[list[Tensor], list[Tensor]]:
    """Replay of aggregate and post, layer by layer; one aggregate may follow the last post.

    With weights of their norms, the layer inputs are normed.
    """
    residual = initial_residual
    layer_inputs, residuals = [], []
    for layer, pre_mix in enumerate(pre_mixes):
        layer_input = aggregate(residual, pre_mix)
        if layer_norm_weights is not None:
            layer_input = input_norm(layer_input, layer_norm_weights[layer], eps=layer_norm_eps)
        layer_inputs.append(layer_input)
        if layer < len(layer_outputs):
            residual = post(layer_outputs[layer], residual, post_mixes[layer], comb_mixes[layer])
            residuals.append(residual)
    return layer_inputs, residuals
