"""What tests/gpu and tests/emulator hold the readout in one pass against float64 on."""

import torch
from torch import Tensor

import oracle
import tolerances
from cases import CONTRACT, norm_weight
from tile_mhc import contract, reference

Pair = tuple[int, int]
NAMES = ("residual", "weight", "scale", "bias", "norm_weight")
# CTAs a token on a GPU, forward and backward; and where there is no such kernel.
SIZES = {
    (4, 256): (1, 1),
    (4, 960): (1, 0),
    (4, 1024): (1, 2),
    (2, 256): (1, 1),
    (4, 1280): (2, 2),
    (4, 2560): (4, 4),
    (2, 2560): (4, 4),
    (4, 4096): (4, 8),
    (4, 7168): (8, 8),
    (2, 7168): (8, 8),
}
NONE = {(8, 256): "most streams", (4, 4160): "a width in 65 pieces", (4, 100): "no whole piece"}


def inputs(pair: Pair, num_tokens: int, device: str, norm: bool = True) -> dict[str, Tensor]:
    n, hidden_size = pair
    tensors, _ = CONTRACT.inputs((num_tokens,), n, hidden_size, device)
    if norm:
        tensors["norm_weight"] = norm_weight(n * hidden_size, device)
    return tensors


def check_tf32(pair: Pair, num_tokens: int, device: str) -> None:
    """Forward and backward, by the closed form: autograd would not round the gradient."""
    tensors = inputs(pair, num_tokens, device)
    grad = torch.randn_like(tensors["residual"][:, 0])
    ours = oracle.evaluate(contract, tensors, {"tf32": True}, [grad], ["out"])
    _, terms = oracle.terms_of(CONTRACT, tensors, {}, [grad])
    wide = [tensors[name].double() for name in NAMES]
    out, *saved = reference.contract_with_mixes(*wide, 1e-6, 1e-6, True)
    grads = reference.contract_backward(grad.double(), *wide, *saved, 1e-6, True)
    truth = {"out": out} | {f"grad_{name}": g for name, g in zip(NAMES, grads, strict=True)}
    for name, expected in truth.items():
        rounding = oracle.relative_error(expected.to(ours[name].dtype), expected)
        # Both sides round to TF32: a factor near a midpoint may go the other way, by 2**-10.
        bar = max(tolerances.ROUNDING * rounding, 1e-4)
        assert oracle.relative_error(ours[name], expected, terms.get(name)) <= bar, name
    exact = oracle.evaluate(contract, tensors, {}, [grad], ["out"])
    for name in ("grad_weight", "grad_norm_weight"):
        assert not torch.equal(exact[name], ours[name]), f"it rounds nothing of {name}"


def check_largest(pair: Pair, device: str, tf32: bool) -> None:
    """Streams up to the largest of bfloat16, beside tokens near 1, in the forward."""
    tensors = inputs(pair, 21, device)
    huge = [0, 3, 8, 20]
    alone = tensors["residual"][huge, 0].sign() * 3e38
    # The others are zero: a sum of several would overflow.
    tensors["residual"][huge] = 0
    tensors["residual"][huge, 0] = alone
    out = contract(**tensors, tf32=tf32)
    truth = reference.contract(**{name: t.double() for name, t in tensors.items()}, tf32=tf32)
    for t in range(21):
        check_rounded("out", t, out[t], truth[t])


def check_sizes(pair: Pair, device: str) -> None:
    """Tokens of any size side by side: each as near float64 as if it were alone, both ways."""
    tensors = inputs(pair, 25, device)
    sizes = torch.tensor([1.0, 1e30, 1e-20, 0.0, 1e15], device=device).repeat(5)
    tensors["residual"] = (tensors["residual"].double() * sizes[:, None, None]).bfloat16()
    grad = torch.randn_like(tensors["residual"][:, 0])
    ours = oracle.evaluate(contract, tensors, {}, [grad], ["out"])
    truth, terms = oracle.terms_of(CONTRACT, tensors, {}, [grad])
    for t in range(25):
        for name in ("out", "grad_residual"):
            check_rounded(name, t, ours[name][t], truth[name][t])
    for name in ("grad_weight", "grad_norm_weight", "grad_bias", "grad_scale"):
        assert oracle.relative_error(ours[name], truth[name], terms.get(name)) < 1e-4, name


def check_rounded(name: str, token: int, found: Tensor, truth: Tensor) -> None:
    error = float((found.double() - truth).norm())
    rounding = float((truth.to(found.dtype).double() - truth).norm())
    bar = max(tolerances.ROUNDING * rounding, 2e-5 * float(truth.norm()))
    assert error <= bar, f"{name} of token {token}: {error:.3e} from float64, the bar is {bar:.3e}"
