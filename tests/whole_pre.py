"""What tests/gpu and tests/emulator hold a pre in one pass, or of few tokens, with its post and
without, against float64 on.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

import oracle
from cases import (
    DELAYED_PRE,
    FUSED_PRE,
    PARAMETERS,
    POST_PRE,
    POST_PRE_DELAYED,
    Case,
    Dtypes,
    Op,
)
from readout import check_rounded
from tile_mhc import fused_pre, post, reference, selection

OPS = (FUSED_PRE, POST_PRE, DELAYED_PRE, POST_PRE_DELAYED)
KERNEL = "pre_cluster_fwd"
OPTIONS = {"sinkhorn_repeat": 5, "post_mult": 2.0}
OF_POST = ("layer_output", "residual", "post_mix", "comb_mix")
# CTAs a token by width.
SIZES = {256: 4, 1024: 4, 1280: 4, 2560: 8, 4096: 16, 5120: 16, 7168: 16}
# Where there is no such kernel: streams, width, and why.
NONE = {
    (2, 1024): "fewest streams",
    (8, 1024): "most streams",
    (4, 1600): "no whole warps",
    (4, 100): "no whole piece",
    (4, 8192): "a width that does not fit the registers of as many CTAs",
}


def of_op(op: Op) -> tuple[bool, bool]:
    """Whether there is a post before it, and a pre_mix given: as `pre_cluster` takes them."""
    return "streams" in op.outputs, "next_pre" in op.outputs


@contextlib.contextmanager
def always() -> Iterator[None]:
    """Within: also of few tokens, and of any width that has the kernel."""
    with (
        mock.patch.object(selection, "FEW_TOKENS", 0),
        mock.patch.object(selection, "ONCE_ELEMENTS", 0),
        mock.patch.object(selection, "POST_ONCE_HIDDEN", 0),
        mock.patch.object(selection, "DELAYED_ONCE_HIDDEN", 0),
        mock.patch.object(selection, "DELAYED_ONCE_ELEMENTS", 0),
    ):
        yield


def inputs(
    op: Op, hidden_size: int, num_tokens: int, device: str, norm: bool = True, n: int = 4
) -> dict[str, Tensor]:
    tensors, _ = op.inputs((num_tokens,), n, hidden_size, device)
    if not norm:
        del tensors["norm_weight"]
    return tensors


def check(
    op: Op, hidden_size: int, num_tokens: int, device: str, norm: bool = True, **options: object
) -> None:
    """Against float64, outputs and gradients."""
    tensors = inputs(op, hidden_size, num_tokens, device, norm)
    oracle.check(op, Case(num_tokens, 4, hidden_size, ""), tensors, {**OPTIONS, **options})


def check_bfloat16(op: Op, hidden_size: int, num_tokens: int, device: str) -> None:
    """With all parameters in bfloat16."""
    tensors = inputs(op, hidden_size, num_tokens, device)
    tensors = Dtypes(torch.bfloat16, PARAMETERS, "all of them").of(tensors)
    oracle.check(op, Case(num_tokens, 4, hidden_size, ""), tensors, OPTIONS)


def check_two_ops(hidden_size: int, num_tokens: int, device: str) -> None:
    """With its post in the same pass or in another: the same bits."""
    tensors = inputs(POST_PRE, hidden_size, num_tokens, device)
    ours = POST_PRE.run(**tensors, **OPTIONS)
    streams = post(*(tensors.pop(name) for name in OF_POST))
    others = (streams, *fused_pre(streams, **tensors, **OPTIONS))
    for name, a, b in zip(POST_PRE.outputs, ours, others, strict=True):
        assert torch.equal(a, b), name


def check_tf32(op: Op, hidden_size: int, num_tokens: int, device: str) -> None:
    """The same bits as with a weight that has been rounded before; other bits without."""
    tensors = inputs(op, hidden_size, num_tokens, device)
    tensors["weight"] *= tensors.pop("norm_weight")
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    found = op.run(**tensors, **OPTIONS, tf32=True)
    expected = op.run(**rounded, **OPTIONS)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found[-1], op.run(**tensors, **OPTIONS)[-1])


def check_largest(op: Op, hidden_size: int, device: str) -> None:
    """Streams up to the largest of bfloat16, whose squares float32 does not hold, beside others."""
    tensors = inputs(op, hidden_size, 21, device)
    huge = [0, 3, 8, 20]
    alone = tensors["residual"][huge, 0].sign() * 1e38
    # The others are zero: a sum of several would overflow.
    tensors["residual"][huge] = 0
    tensors["residual"][huge, 0] = alone
    outputs = op.run(**tensors, **OPTIONS)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    if "streams" in op.outputs:
        wide["streams"] = outputs[0].double()
    truth = op.reference(**wide, **OPTIONS)
    for name, found, expected in zip(op.outputs, outputs, truth, strict=True):
        if name in ("streams", "layer_input"):
            for t in range(21):
                check_rounded(name, t, found[t], expected[t])
        else:
            assert oracle.relative_error(found, expected) < 1e-5, name


def check_alone(op: Op, hidden_size: int, num_tokens: int, device: str) -> None:
    """What is computed of a token does not depend on the others, nor on how many there are."""
    tensors = inputs(op, hidden_size, num_tokens, device)
    by_token = [name for name, tensor in tensors.items() if tensor.shape[0] == num_tokens]
    every = op.run(**tensors, **OPTIONS)
    for rows in (slice(0, 1), slice(5, 30), slice(num_tokens - 9, num_tokens)):
        few = tensors | {name: tensors[name][rows] for name in by_token}
        for name, a, b in zip(op.outputs, op.run(**few, **OPTIONS), every, strict=True):
            assert torch.equal(a, b[rows]), name
