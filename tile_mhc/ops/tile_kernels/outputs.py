"""Ops whose own form returns new tensors, into memory of the caller's."""

from collections.abc import Sequence

from torch import Tensor

from tile_mhc import errors, reference
from tile_mhc.ops import _flops
from tile_mhc.ops import expand as expand_op
from tile_mhc.ops import head_mix as head_mix_op
from tile_mhc.ops import mixes as mixes_op
from tile_mhc.ops import sinkhorn as sinkhorn_op
from tile_mhc.ops._library import register


def copy(outs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """What a reference returns, to where it is wanted."""
    for out, result in zip(outs, results, strict=True):
        out.copy_(result.reshape(out.shape))


def _split_mixes_cuda(
    mixes: Tensor,
    scale: Tensor,
    bias: Tensor,
    post_mult: float,
    pre_eps: float,
    pre_mix: Tensor,
    post_mix: Tensor,
    logits: Tensor,
) -> None:
    if mixes.numel():
        n = pre_mix.shape[-1]
        mixes_op.launch_rows(
            mixes.contiguous().view(-1, n * (n + 2)),
            scale,
            bias,
            pre_mix.view(-1, n),
            post_mix.view(-1, n),
            logits.view(-1, n * n),
            post_mult,
            pre_eps,
        )


def _split_mixes_cpu(
    mixes: Tensor, scale: Tensor, bias: Tensor, post_mult: float, pre_eps: float, *outs: Tensor
) -> None:
    n = outs[0].shape[-1]
    results = reference.split_mixes(
        mixes, scale, bias, num_streams=n, post_mult=post_mult, pre_eps=pre_eps
    )
    copy(outs, results)


expand_backward = register(
    "expand_backward_out(Tensor grad, Tensor(a!) out) -> ()",
    cuda=expand_op.launch_backward,
    cpu=lambda grad, out: copy((out,), (reference.expand_backward(grad),)),
    fake=lambda *_: None,
    flops=_flops.pointwise,
)
sinkhorn = register(
    "sinkhorn_out(Tensor logits, int repeat, float eps, Tensor(a!) out) -> ()",
    cuda=sinkhorn_op.launch,
    cpu=lambda logits, repeat, eps, out: copy(
        (out,), (reference.sinkhorn(logits, repeat=repeat, eps=eps),)
    ),
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
sinkhorn_backward = register(
    "sinkhorn_backward_out(Tensor grad, Tensor logits, int repeat, float eps, Tensor(a!) out) "
    "-> ()",
    cuda=sinkhorn_op.launch_backward,
    cpu=lambda grad, logits, repeat, eps, out: copy(
        (out,), (reference.sinkhorn_backward(grad, logits, repeat=repeat, eps=eps),)
    ),
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
split_mixes = register(
    "split_mixes_out(Tensor mixes, Tensor scale, Tensor bias, float post_mult, float pre_eps, "
    "Tensor(a!) pre_mix, Tensor(b!) post_mix, Tensor(c!) logits) -> ()",
    cuda=_split_mixes_cuda,
    cpu=_split_mixes_cpu,
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
head_mix = register(
    "head_mix_out(Tensor mixes, Tensor scale, Tensor bias, float pre_eps, Tensor(a!) out) -> ()",
    cuda=head_mix_op.launch_into,
    cpu=lambda mixes, scale, bias, pre_eps, out: copy(
        (out,), (reference.head_mix(mixes, scale, bias, pre_eps=pre_eps),)
    ),
    fake=lambda *_: None,
    flops=_flops.pointwise,
    out_alignment=errors.ALIGNMENT,
)
