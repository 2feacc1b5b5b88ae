"""What tests/gpu and tests/emulator hold identity_pre in one pass against float64 on."""

import dataclasses

import torch
from torch import Tensor

import oracle
import tolerances
from cases import IDENTITY_OUTPUTS, IDENTITY_PRE, Case
from readout import check_rounded
from tile_mhc import identity_pre, reference
from tile_mhc.nn import IdentityHyperConnection, observe_mixes

NAMES = ("residual", "weight", "scale", "bias", "norm_weight")
# CTAs a token by width: forward, backward, and backward with a gradient that the streams have.
SIZES = {
    192: (1, 1, 1),
    1024: (2, 4, 4),
    1280: (2, 4, 4),
    2560: (4, 8, 8),
    4096: (8, 16, 16),
    5120: (8, 16, 16),
    7168: (8, 16, 16),
}
# Where there is no such kernel, or only one of them: streams, width, and why.
NONE = {
    (2, 256): "fewest streams",
    (8, 256): "most streams",
    (4, 4160): "a width in 65 pieces",
    (4, 100): "no whole piece",
    (4, 8192): "a width that does not fit the registers of as many CTAs",
}


def _passing(residual: Tensor, **arguments: object) -> tuple[Tensor, ...]:
    return identity_pre(residual, **arguments, passes_residual=True)  # type: ignore[arg-type]


def _passing_reference(residual: Tensor, **arguments: object) -> tuple[Tensor, ...]:
    outputs = reference.identity_pre(residual, **arguments)  # type: ignore[arg-type]
    return *outputs, residual.view_as(residual)


# The residual passed through, whose gradient has a kernel of its own.
PASSING = dataclasses.replace(
    IDENTITY_PRE,
    run=_passing,
    reference=_passing_reference,
    outputs=(*IDENTITY_OUTPUTS, "passed"),
)


def inputs(
    hidden_size: int, num_tokens: int, device: str, norm: bool = True, n: int = 4
) -> dict[str, Tensor]:
    tensors, _ = IDENTITY_PRE.inputs((num_tokens,), n, hidden_size, device)
    if not norm:
        del tensors["norm_weight"]
    return tensors


def check(hidden_size: int, num_tokens: int, device: str, norm: bool = True) -> None:
    """Against float64, alone and with the residual passed through."""
    case = Case(num_tokens, 4, hidden_size, "")
    tensors = inputs(hidden_size, num_tokens, device, norm)
    for op in (IDENTITY_PRE, PASSING):
        oracle.check(op, case, tensors, {"post_mult": 2.0, "post_eps": 1e-3})


def check_observed_gates(
    lead: tuple[int, ...], num_streams: int, hidden_size: int, device: str
) -> None:
    """Those that an observer of the module is shown, beside float64 and what the layer is given."""
    tensors, _ = IDENTITY_PRE.inputs(lead, num_streams, hidden_size, device)
    residual = tensors.pop("residual")
    connection = IdentityHyperConnection(hidden_size, num_streams, norm_weight=True, device=device)
    connection.load_state_dict(tensors)
    shown = []
    with observe_mixes(connection, lambda _, mixes: shown.append((mixes.logits(), mixes.gates()))):
        layer_input, post_mix, _ = connection.pre(residual)
    wide = {name: tensor.double() for name, tensor in tensors.items() if name != "scale"}
    mixes = reference.projection(
        residual.double(), wide["weight"], norm_weight=wide["norm_weight"], norm_eps=1e-5
    )
    scale = tensors["scale"].double().repeat_interleave(num_streams)
    truth = (mixes * scale + wide["bias"]).split(num_streams, -1)
    ((logits, (pre_mix, post_gate)),) = shown
    for found, expected in zip(logits, truth, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(post_gate, post_mix)
    torch.testing.assert_close(
        2 * logits[1].sigmoid() + 1e-6, post_mix.detach(), rtol=1e-6, atol=1e-6
    )
    expected = reference.aggregate(residual.double(), pre_mix.double())
    for t in range(lead[0]):
        check_rounded("layer_input", t, layer_input[t].detach(), expected[t])


def check_tf32(hidden_size: int, num_tokens: int, device: str) -> None:
    """Forward and backward, by the closed form: autograd would not round the gradient."""
    tensors = inputs(hidden_size, num_tokens, device)
    upstream = oracle.upstream_of(IDENTITY_PRE, tensors, {})
    ours = oracle.evaluate(identity_pre, tensors, {"tf32": True}, upstream, IDENTITY_OUTPUTS)
    _, terms = oracle.terms_of(IDENTITY_PRE, tensors, {}, upstream)
    wide = [tensors[name].double() for name in NAMES]
    layer_input, post_mix, *saved = reference.identity_pre_with_mixes(
        *wide, 1e-6, 1e-6, 1e-6, 1.0, True
    )
    grads = reference.identity_pre_backward(
        *(grad.double() for grad in upstream), *wide, *saved, 1e-6, 1.0, True
    )
    truth = {"layer_input": layer_input, "post_mix": post_mix}
    truth |= {f"grad_{name}": g for name, g in zip(NAMES, grads, strict=True)}
    for name, expected in truth.items():
        rounding = oracle.relative_error(expected.to(ours[name].dtype), expected)
        # Both sides round to TF32: a factor near a midpoint may go the other way, by 2**-10.
        bar = max(tolerances.ROUNDING * rounding, 1e-4)
        assert oracle.relative_error(ours[name], expected, terms.get(name)) <= bar, name
    exact = oracle.evaluate(identity_pre, tensors, {}, upstream, IDENTITY_OUTPUTS)
    for name in ("post_mix", "grad_weight", "grad_norm_weight"):
        assert not torch.equal(exact[name], ours[name]), f"it rounds nothing of {name}"


def check_largest(hidden_size: int, device: str, tf32: bool) -> None:
    """Streams up to the largest of bfloat16, beside tokens near 1, in the forward."""
    tensors = inputs(hidden_size, 21, device)
    huge = [0, 3, 8, 20]
    alone = tensors["residual"][huge, 0].sign() * 3e38
    # The others are zero: a sum of several would overflow.
    tensors["residual"][huge] = 0
    tensors["residual"][huge, 0] = alone
    layer_input, post_mix = identity_pre(**tensors, tf32=tf32)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = reference.identity_pre(**wide, tf32=tf32)
    for t in range(21):
        check_rounded("layer_input", t, layer_input[t], truth[0][t])
    assert oracle.relative_error(post_mix, truth[1]) < 1e-5


def check_sizes(hidden_size: int, device: str) -> None:
    """Tokens of any size side by side: each as near float64 as if it were alone, both ways."""
    tensors = inputs(hidden_size, 25, device)
    sizes = torch.tensor([1.0, 1e30, 1e-20, 0.0, 1e15], device=device).repeat(5)
    tensors["residual"] = (tensors["residual"].double() * sizes[:, None, None]).bfloat16()
    upstream = oracle.upstream_of(IDENTITY_PRE, tensors, {})
    ours = oracle.evaluate(identity_pre, tensors, {}, upstream, IDENTITY_OUTPUTS)
    truth, terms = oracle.terms_of(IDENTITY_PRE, tensors, {}, upstream)
    for t in range(25):
        for name in ("layer_input", "grad_residual"):
            check_rounded(name, t, ours[name][t], truth[name][t])
    for name in ("post_mix", "grad_weight", "grad_norm_weight", "grad_bias", "grad_scale"):
        assert oracle.relative_error(ours[name], truth[name], terms.get(name)) < 1e-4, name


def check_small_gradients(hidden_size: int, device: str) -> None:
    """Gradients so small that a group's are lifted before they are split in two parts."""
    tensors = inputs(hidden_size, 24, device)
    upstream = oracle.upstream_of(IDENTITY_PRE, tensors, {})
    tiny = torch.arange(24, device=device) < 16
    factor = torch.where(tiny, 2.0**-90, 1.0)[:, None]
    upstream = [(grad.float() * factor).to(grad.dtype) for grad in upstream]
    for rows in (slice(None), slice(0, 16)):
        given = tensors | {"residual": tensors["residual"][rows]}
        grads = [grad[rows] for grad in upstream]
        ours = oracle.evaluate(identity_pre, given, {}, grads, IDENTITY_OUTPUTS)
        truth, _ = oracle.terms_of(IDENTITY_PRE, given, {}, grads)
        assert oracle.relative_error(ours["grad_weight"], truth["grad_weight"]) < 2e-5
        for t in range(given["residual"].shape[0]):
            check_rounded("grad_residual", t, ours["grad_residual"][t], truth["grad_residual"][t])
