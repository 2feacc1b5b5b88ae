"""`transformer_engine.pytorch.triton.mhc`: see the package for what differs."""

import os

import torch
from torch import Tensor

from tile_mhc import errors
from tile_mhc.compat.transformer_engine import _accumulation
from tile_mhc.kernels._shapes import PADDED
from tile_mhc.ops import log_sinkhorn
from tile_mhc.ops.sinkhorn import MAX_REPEAT
from tile_mhc.ops.transformer_engine import (
    interleaved_aggregate,
    interleaved_post,
    padded_mixes,
    padded_projection,
)

# Whether determinism is asked for. It changes nothing here: everything is deterministic.
ENFORCE_DETERMINISTIC = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"

DTYPES = (torch.float32, torch.bfloat16)
STREAMS = 4
MIXES = STREAMS * (STREAMS + 2)
# The sums for a bias lie in shared memory, four bytes per channel.
MAX_CHANNELS = 49152


def mhc_fused_projection(
    x: Tensor,
    phi: Tensor,
    use_tf32: bool = True,
    norm_weight: Tensor | None = None,
    fused_grad_x_acc_buffer: Tensor | None = None,
    use_split_k: bool = False,
) -> tuple[Tensor, Tensor]:
    """Bare products of the flattened streams, and their mean squares.

    H[t, m] = sum_k x[t, k] * phi[m, k] * norm_weight[k],  ms[t] = mean_k x[t, k]**2

    Args:
        x: (T, K) bfloat16 or float32, contiguous; K = C*n, any C.
        phi: (24, K) bfloat16 or float32.
        use_tf32: has no effect; products are near float32.
        norm_weight: optional (K,) bfloat16 or float32.
        fused_grad_x_acc_buffer: optional float32 buffer of T*K elements; the gradient of x is
            returned with what the other ops of the chain left there.
        use_split_k: has no effect; K is split, deterministically.

    Returns:
        H (T, 32) float32, zeros in columns 24 to 31, and ms (T,) float32.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.

    Source: mHC paper (arXiv 2512.24880), eq. 14 and 15; TransformerEngine `pytorch/triton/mhc.py`.
    """
    op = "mhc_fused_projection"
    _check_streams(op, x, "(T, K)", 2, x.ndim == 2 if isinstance(x, Tensor) else True)
    size = x.shape[1]
    if size % STREAMS or not 0 < size <= STREAMS * MAX_CHANNELS:
        raise errors.UnsupportedError(
            f"{op}: K must be {STREAMS}*C with C from 1 to {MAX_CHANNELS}; got {size}"
        )
    errors.check_tensor(op, "phi", phi, [(MIXES, size)], DTYPES, ("x", x))
    if norm_weight is not None:
        errors.check_tensor(op, "norm_weight", norm_weight, [(size,)], DTYPES, ("x", x))
    errors.check_bool(op, "use_tf32", use_tf32)
    errors.check_bool(op, "use_split_k", use_split_k)
    outputs: tuple[Tensor, Tensor]
    if fused_grad_x_acc_buffer is None:
        outputs = padded_projection.projection(x, phi, norm_weight)
    else:
        _accumulation.check_buffer(op, fused_grad_x_acc_buffer, x)
        outputs = _accumulation.projection(op, x, phi, norm_weight, fused_grad_x_acc_buffer)
    return outputs


def mhc_fused_scale(
    H: Tensor, alpha: Tensor, beta: Tensor, ms: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, bias, RMS factor and sigmoids of the bare products.

    z = H / sqrt(ms + 2**-23) * alpha[group] + beta
    h_pre = sigmoid(z[:, :4]);  h_post = 2 * sigmoid(z[:, 4:8]);  h_res = z[:, 8:24]

    Args:
        H: (T, 32) bfloat16 or float32; columns 24 to 31 are not read.
        alpha: (3,) bfloat16 or float32: of h_pre, h_post and h_res.
        beta: (1, 24) or (24,) bfloat16 or float32.
        ms: (T,) bfloat16 or float32.
        n: 4.

    Returns:
        h_pre (T, 4), h_post (T, 4) and h_res (T, 16), of the dtype of H.

    Raises:
        ShapeError: a shape, dtype or device does not match.
        UnsupportedError: n is not 4.

    Source: mHC paper (arXiv 2512.24880), eq. 16 to 18; TransformerEngine `pytorch/triton/mhc.py`.
    """
    op = "mhc_fused_scale"
    _check_n(op, n)
    tokens = errors.require_tensor(op, "H", H).shape[0] if H.ndim else 0
    errors.check_tensor(op, "H", H, [(tokens, PADDED)], DTYPES)
    errors.check_device(op, "H", H)
    errors.check_tensor(op, "alpha", alpha, [(3,)], DTYPES, ("H", H))
    errors.check_tensor(op, "beta", beta, [(1, MIXES), (MIXES,)], DTYPES, ("H", H))
    errors.check_tensor(op, "ms", ms, [(tokens,)], DTYPES, ("H", H))
    wide = (H.to(torch.float32), ms.to(torch.float32))
    outputs = padded_mixes.mixes(*wide, alpha, beta.reshape(MIXES), n)
    h_pre, h_post, h_res = (out.to(H.dtype) for out in outputs)
    return h_pre, h_post, h_res


def mhc_fused_sinkhorn(
    H_res: Tensor, n: int = 4, recompute_hist: bool = True, iters: int = 20
) -> Tensor:
    """Logits to a doubly stochastic matrix, without an epsilon, however far apart they are.

    iters times f = -logsumexp_out(H_res + g), g = -logsumexp_in(H_res + f), from g = 0;
    exp(f + H_res + g)

    Args:
        H_res: (..., 4, 4) bfloat16 or float32, index [in, out].
        n: 4.
        recompute_hist: has no effect; the backward keeps its steps in shared memory.
        iters: from 1 to 1024.

    Returns:
        (..., 4, 4), of the dtype of H_res. The gradient is that of the `iters` steps.

    Raises:
        ShapeError: a shape or dtype does not match, or iters is no positive integer.
        UnsupportedError: n is not 4, or iters is above 1024.

    Source: mHC paper (arXiv 2512.24880), eq. 19; TransformerEngine `pytorch/triton/mhc.py`.
    """
    op = "mhc_fused_sinkhorn"
    _check_n(op, n)
    lead = errors.require_tensor(op, "H_res", H_res).shape[:-2]
    errors.check_tensor(op, "H_res", H_res, [(*lead, n, n)], DTYPES)
    errors.check_device(op, "H_res", H_res)
    errors.check_bool(op, "recompute_hist", recompute_hist)
    errors.check_positive_int(op, "iters", iters)
    if iters > MAX_REPEAT:
        raise errors.UnsupportedError(f"{op}: iters must be at most {MAX_REPEAT}; got {iters}")
    out: Tensor = log_sinkhorn.log_sinkhorn(H_res.to(torch.float32), iters)
    return out.to(H_res.dtype)


def mhc_fused_aggregate(
    x: Tensor,
    H_pre: Tensor,
    n: int,
    use_tf32: bool = True,
    fused_grad_x_acc_buffer: Tensor | None = None,
) -> Tensor:
    """Read the layer input from the streams.

    out[t, c] = sum_i H_pre[t, i] * x[t, c, i]        (fp32 sum, i ascending)

    Args:
        x: (..., C, 4) bfloat16 or float32, contiguous.
        H_pre: (..., 4) bfloat16 or float32.
        n: 4.
        use_tf32: has no effect; products are float32.
        fused_grad_x_acc_buffer: optional float32 buffer of as many elements as x, for the gradient
            of x; the backward of `mhc_fused_projection` with the same buffer returns it.

    Returns:
        (..., C), of the dtype of x.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n is not 4, or C is above 49152.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.1; TransformerEngine `pytorch/triton/mhc.py`.
    """
    op = "mhc_fused_aggregate"
    lead = _check_interleaved(op, x, n)
    errors.check_tensor(op, "H_pre", H_pre, [(*lead, n)], DTYPES, ("x", x))
    errors.check_bool(op, "use_tf32", use_tf32)
    mix = H_pre.to(torch.float32)
    out: Tensor
    if fused_grad_x_acc_buffer is None:
        out = interleaved_aggregate.aggregate(x, mix)
    else:
        _accumulation.check_buffer(op, fused_grad_x_acc_buffer, x)
        out = _accumulation.aggregate(op, x, mix, fused_grad_x_acc_buffer)
    return out


def mhc_fused_expand_combine(
    f: Tensor,
    bias: Tensor | None,
    H_post: Tensor,
    x: Tensor,
    H_res: Tensor,
    n: int,
    use_tf32: bool = True,
    fused_grad_x_acc_buffer: Tensor | None = None,
) -> Tensor:
    """Write the layer output back into the streams, mixing them on the way.

    out[t, c, j] = H_post[t, j] * (f[t, c] + bias[c]) + sum_i H_res[t, i, j] * x[t, c, i]
    (fp32, the layer output first, then i ascending)

    Args:
        f: (..., C) bfloat16 or float32, the output of the layer.
        bias: optional (C,) bfloat16 or float32, of the layer's last linear map.
        H_post: (..., 4) bfloat16 or float32.
        x: (..., C, 4) bfloat16 or float32, contiguous.
        H_res: (..., 4, 4) bfloat16 or float32, index [in, out].
        n: 4.
        use_tf32: has no effect; products are float32.
        fused_grad_x_acc_buffer: as in `mhc_fused_aggregate`.

    Returns:
        (..., C, 4), of the dtype of x.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n is not 4, or C is above 49152.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.1; TransformerEngine `pytorch/triton/mhc.py`.
    """
    op = "mhc_fused_expand_combine"
    lead = _check_interleaved(op, x, n)
    like = ("x", x)
    errors.check_tensor(op, "f", f, [x.shape[:-1]], DTYPES, like)
    if bias is not None:
        errors.check_tensor(op, "bias", bias, [(x.shape[-2],)], DTYPES, like)
    errors.check_tensor(op, "H_post", H_post, [(*lead, n)], DTYPES, like)
    errors.check_tensor(op, "H_res", H_res, [(*lead, n, n)], DTYPES, like)
    errors.check_bool(op, "use_tf32", use_tf32)
    inputs = (f, bias, x, H_post.to(torch.float32), H_res.to(torch.float32))
    out: Tensor
    if fused_grad_x_acc_buffer is None:
        out = interleaved_post.post(*inputs)
    else:
        _accumulation.check_buffer(op, fused_grad_x_acc_buffer, x)
        out = _accumulation.post(op, *inputs, fused_grad_x_acc_buffer)
    return out


def mhc_generate_mix_and_aggregate(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    beta: Tensor,
    norm_weight: Tensor | None = None,
    use_tf32: bool = True,
    fused_grad_x_acc_buffer: Tensor | None = None,
    use_split_k: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projection, scale, Sinkhorn of 20 steps and aggregate: all that comes before a sub-layer.

    Args:
        x: (..., C, 4) bfloat16 or float32, contiguous.
        phi: (24, C*4) bfloat16 or float32.
        alpha: (3,) bfloat16 or float32.
        beta: (1, 24) or (24,) bfloat16 or float32.
        norm_weight: optional (C*4,) bfloat16 or float32.
        use_tf32: has no effect; products are near float32.
        fused_grad_x_acc_buffer: as in `mhc_fused_projection` and `mhc_fused_aggregate`.
        use_split_k: has no effect; K is split, deterministically.

    Returns:
        The layer input (..., C), of the dtype of x, H_post (..., 4) and H_res (..., 4, 4), float32.

    Raises:
        ShapeError: a shape, dtype, device or layout does not match.
        UnsupportedError: n is not 4, or C is above 49152.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.1; TransformerEngine `pytorch/triton/mhc.py`.
    """
    n = STREAMS
    lead = _check_interleaved("mhc_generate_mix_and_aggregate", x, n)
    H, ms = mhc_fused_projection(
        x.view(-1, x.shape[-2] * n),
        phi,
        use_tf32,
        norm_weight,
        fused_grad_x_acc_buffer,
        use_split_k,
    )
    H_pre, H_post, H_res = mhc_fused_scale(H, alpha, beta, ms, n)
    H_res = mhc_fused_sinkhorn(H_res.view(*lead, n, n), n)
    out = mhc_fused_aggregate(x, H_pre.view(*lead, n), n, use_tf32, fused_grad_x_acc_buffer)
    return out, H_post.view(*lead, n), H_res


def _check_n(op: str, n: object) -> None:
    if isinstance(n, bool) or n != STREAMS:
        raise errors.UnsupportedError(f"{op}: n must be {STREAMS}; got {errors.shown(n)}")


def _check_streams(op: str, x: Tensor, shape: str, dims: int, has_shape: bool = True) -> None:
    errors.require_tensor(op, "x", x)
    if x.dtype not in DTYPES or x.ndim < dims or not has_shape:
        raise errors.ShapeError(
            f"{op}: x must be {shape} bfloat16 or float32; got {errors.describe(x)}"
        )
    errors.check_device(op, "x", x)
    errors.check_contiguous(op, "x", x)


def _check_interleaved(op: str, x: Tensor, n: int) -> torch.Size:
    """Check streams (..., C, n); return the leading dimensions."""
    _check_n(op, n)
    _check_streams(op, x, f"(..., C, {n})", 2)
    channels = x.shape[-2]
    if x.shape[-1] != n:
        raise errors.ShapeError(f"{op}: x must be (..., C, {n}); got {errors.describe(x)}")
    if not 0 < channels <= MAX_CHANNELS:
        raise errors.UnsupportedError(f"{op}: C must be from 1 to {MAX_CHANNELS}; got {channels}")
    return x.shape[:-2]
