"""Hold an op and its gradients against float64, with torch in the op's own dtypes beside it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tolerances
from cases import PARAMETERS, Case, Op
from tile_mhc import reference

Named = dict[str, Tensor]


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def evaluate(
    function: Callable[..., Any],
    tensors: Named,
    options: Mapping[str, Any],
    upstream: Sequence[Tensor],
    names: Sequence[str],
) -> Named:
    """The outputs of `function`, and the gradient of each of `tensors`, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = as_tuple(function(**leaves, **options))
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    result = {name: out.detach() for name, out in zip(names, outputs, strict=True)}
    return result | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def upstream_of(
    op: Op, tensors: Named, options: Mapping[str, Any], size: float = 1.0
) -> list[Tensor]:
    """A random gradient, near `size`, for each output of an op."""
    with torch.no_grad():
        outputs = as_tuple(op.reference(**tensors, **options))
    return [torch.randn_like(out) * size for out in outputs]


class GateTerms:
    """What the gradients of scales and biases are sums of: a product for each token and mix.

    Such a sum may cancel, and then its error has nothing to do with its size. What it goes by is
    the root of the sum of the squares of its terms: the size of such a sum that does not cancel,
    and at most the sum of their absolute values.
    """

    def __init__(self) -> None:
        self._squares: list[tuple[str, Tensor, Tensor]] = []

    def add(self, mixes: Tensor, scale: Tensor, bias: Tensor, grad: Tensor) -> None:
        n = bias.shape[0]
        of_bias, of_scale = (
            terms.double().reshape(-1, n).square().sum(0) for terms in (grad, grad * mixes)
        )
        groups = torch.eye(len(scale), dtype=torch.float64, device=scale.device)
        groups = torch.stack([reference._spread(group, n).expand(n) for group in groups])
        self._squares.append(("bias", bias, of_bias))
        self._squares.append(("scale", scale, groups @ of_scale))

    def named(self) -> Named:
        """By "grad_scale" and "grad_bias", where only one gate has been differentiated."""
        return {
            f"grad_{kind}": sum(squares for k, _, squares in self._squares if k == kind).sqrt()
            for kind in {kind for kind, *_ in self._squares}
        }

    def of(self, parameter: Tensor) -> Tensor | None:
        """Of one that is a scale or a bias."""
        found = [squares for _, known, squares in self._squares if known is parameter]
        return sum(found).sqrt() if found else None


class WeightTerms:
    """What the gradients of a projection's weights are sums of, by the root of the sum of squares.

    A product for each token, and of a norm weight for each mix too, of which each is off by up to
    2**-17 of its own size. Where few large ones cancel, the error has nothing to do with the size
    of the sum, nor with that of the others.
    """

    def __init__(self) -> None:
        self.of_weight: Tensor | None = None
        self.of_norm_weight: Tensor | None = None

    def add(
        self, x: Tensor, weight: Tensor, norm_weight: Tensor | None, inv_rms: Tensor, grad: Tensor
    ) -> None:
        of_product = (grad * inv_rms.unsqueeze(-1)).double().reshape(-1, grad.shape[-1])
        streams = x.double().reshape(-1, weight.shape[-1])
        squares = of_product.square().mT @ streams.square()
        if norm_weight is not None:
            self.of_norm_weight = (squares * weight.double().square()).sum(0).sqrt()
            squares = squares * norm_weight.double().square()
        self.of_weight = squares.sqrt()

    def named(self, has_gates: bool) -> Named:
        """By name, in units of which the tolerance leaves room for eight.

        Of a norm weight's with gates between, twice that: the products of the mixes are off as the
        gradient's are, and the gates hand that on, as in the bars of the whole tensors.
        """
        found = {"grad_weight": self.of_weight, "grad_norm_weight": self.of_norm_weight}
        units = {name: terms / 8 for name, terms in found.items() if terms is not None}
        if has_gates and "grad_norm_weight" in units:
            units["grad_norm_weight"] *= 2
        return units


@contextlib.contextmanager
def weight_terms() -> Iterator[WeightTerms]:
    """Collects the terms of the one projection that is differentiated of the reference within."""
    terms = WeightTerms()
    project = reference.projection_with_rms

    def watched(
        residual: Tensor, weight: Tensor, norm_weight: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        mixes, inv_rms = project(residual, weight, norm_weight, *options)
        if mixes.requires_grad:
            known = residual.detach(), weight.detach(), norm_weight, inv_rms.detach()
            mixes.register_hook(functools.partial(terms.add, *known))
        return mixes, inv_rms

    with mock.patch.object(reference, "projection_with_rms", watched):
        yield terms


@contextlib.contextmanager
def gate_terms() -> Iterator[GateTerms]:
    """Collects the terms of what is differentiated of the reference within."""
    terms = GateTerms()
    logits_of = reference._gate_logits

    def watched(mixes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = logits_of(mixes, scale, bias)
        if logits.requires_grad:
            logits.register_hook(functools.partial(terms.add, mixes.detach(), scale, bias))
        return logits

    with mock.patch.object(reference, "_gate_logits", watched):
        yield terms


def terms_of(
    op: Op,
    tensors: Named,
    options: Mapping[str, Any],
    upstream: Sequence[Tensor],
    streams: Tensor | None = None,
) -> tuple[Named, Named]:
    """float64's outputs and gradients of an op, and the terms of its parameters' gradients.

    Of one that goes on with rounded streams, from those that it had.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    function = op.given(streams)
    with gate_terms() as terms, weight_terms() as products:
        truth = evaluate(function, wide, options, [g.double() for g in upstream], op.outputs)
    named = terms.named()
    # The tolerance leaves room for one product of 8 rms, of which these hold the largest.
    of_weights = products.named(has_gates=bool(named))
    named |= {name: terms for name, terms in of_weights.items() if name in truth}
    return truth, named


def check(
    op: Op, case: Case, tensors: Named, options: Mapping[str, Any], upstream_size: float = 1.0
) -> Named:
    """Check every output and gradient of `op`; return ours."""
    upstream = upstream_of(op, tensors, options, upstream_size)
    ours = evaluate(op.run, tensors, options, upstream, op.outputs)
    streams = ours.get("streams")
    torch_result = evaluate(op.given(streams), tensors, options, upstream, op.outputs)
    truth, terms = terms_of(op, tensors, options, upstream, streams)
    bars = tolerances.norm_bars(case.num_tokens, case.num_streams, case.hidden_size)
    for name in ours:
        arguments = ours[name], torch_result[name], truth[name], bars, terms.get(name)
        check_tensor(op.name, name, *arguments)
    return ours


def check_tensor(
    op: str,
    name: str,
    ours: Tensor,
    torch_result: Tensor,
    truth: Tensor,
    bars: Mapping[tuple[str, str], float],
    terms: Tensor | None = None,
) -> None:
    """Check shape, dtype, every element and the norm; `terms` as in GateTerms, where it is one."""
    if ours.shape != truth.shape or ours.dtype != torch_result.dtype:
        raise AssertionError(
            f"{op} {name}: {tuple(ours.shape)} {ours.dtype}, "
            f"not {tuple(truth.shape)} {torch_result.dtype}"
        )
    if ours.numel() == 0:
        return
    check_elements(op, name, ours, torch_result, truth, terms)
    check_norm(op, name, ours, torch_result, truth, bars.get((op, name)))


def rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def check_elements(
    op: str,
    name: str,
    ours: Tensor,
    torch_result: Tensor,
    truth: Tensor,
    terms: Tensor | None = None,
) -> None:
    """The budget of every element; a NaN on our side alone exceeds it."""
    error = (ours.double() - truth).abs()
    unit = rms(truth) if terms is None else terms.maximum(rms(truth))
    # Below the smallest normal number, a GPU may flush to zero.
    floor = tolerances.atol(op, name) * truth.abs().maximum(unit) + torch.finfo(ours.dtype).tiny
    # Where torch itself overflows, it excuses nothing.
    torch_error = (torch_result.double() - truth).abs().nan_to_num(0.0, posinf=0.0)
    budget = tolerances.FACTOR * torch_error + floor
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    excess = torch.where(same, -1.0, (error - budget).nan_to_num(torch.inf))
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
        raise AssertionError(
            f"{op} {name}{list(index)}: {int((excess > 0).sum())} of {ours.numel()} elements out "
            f"of budget, the worst: ours {ours[index].item()!r}, "
            f"torch {torch_result[index].item()!r}, float64 {truth[index].item()!r}, "
            f"error {error[index].item():.3e}, budget {budget[index].item():.3e}"
        )


def relative_error(value: Tensor, truth: Tensor, terms: Tensor | None = None) -> float:
    """||value - truth|| / ||truth||, or by `terms` where a sum of those cancels: see GateTerms.

    Of what is exact it is 0, also where all is zero.
    """
    unit = truth.norm() if terms is None else terms.norm().maximum(truth.norm())
    error = (value.double() - truth).norm()
    return 0.0 if error == 0 else float(error / unit)


def check_norm(
    op: str,
    name: str,
    ours: Tensor,
    torch_result: Tensor,
    truth: Tensor,
    bar: float | None,
) -> None:
    if not truth.isfinite().all() or not truth.any():
        return
    if bar is not None and ours.numel() < tolerances.NORM_MIN_ELEMENTS:
        return
    if ours.dtype != torch.float32:
        rounding = tolerances.ROUNDING * relative_error(truth.to(ours.dtype), truth)
        if bar is None and tolerances.atol(op, name) == tolerances.BF16_SUM:
            bar = tolerances.BF16_SUM_ROUNDING * relative_error(torch_result, truth)
        else:
            # What is promised of float32 results, and then a rounding.
            bar = rounding if bar is None else max(bar, rounding)
    if bar is not None and relative_error(ours, truth) > bar:
        raise AssertionError(
            f"{op} {name}: ||ours - fp64|| / ||fp64|| is {relative_error(ours, truth):.3e}, "
            f"the bar is {bar:.3e}; torch has {relative_error(torch_result, truth):.3e}"
        )


def check_same_bits(first: Named, second: Named, what: str) -> None:
    """Equal bits, NaN included."""
    for name, a in first.items():
        b = second[name]
        bits = torch.int16 if a.dtype.itemsize == 2 else torch.int32
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"{what} {name}: {a.shape} {a.dtype}, then {b.shape} {b.dtype}")
        differ = a.contiguous().view(bits) != b.contiguous().view(bits)
        if differ.any():
            index = tuple(int(i) for i in differ.nonzero()[0])
            raise AssertionError(
                f"{what} {name}{list(index)}: {int(differ.sum())} of {a.numel()} elements differ, "
                f"the first: {a[index].item()!r} and {b[index].item()!r}"
            )


def check_repeatable(op: Op, tensors: Named, options: Mapping[str, Any]) -> None:
    """Two runs, one set of bits: outputs and gradients."""
    upstream = upstream_of(op, tensors, options)
    first = evaluate(op.run, tensors, options, upstream, op.outputs)
    second = evaluate(op.run, tensors, options, upstream, op.outputs)
    check_same_bits(first, second, f"{op.name}, run twice:")


def check_isolation(op: Op, tensors: Named, options: Mapping[str, Any], poisoned: str) -> None:
    """NaN and Inf in two tokens of one input leave the bits of the other tokens as they were."""
    upstream = upstream_of(op, tensors, options)
    clean = evaluate(op.run, tensors, options, upstream, op.outputs)
    dirty_input = tensors[poisoned].clone()
    num_tokens = dirty_input.shape[0]
    bad = {num_tokens // 3: float("nan"), num_tokens - 2: float("inf")}
    for token, value in bad.items():
        dirty_input[token].view(-1)[-1] = value
    dirty = evaluate(op.run, {**tensors, poisoned: dirty_input}, options, upstream, op.outputs)
    good = [token for token in range(num_tokens) if token not in bad]
    by_token = [name for name in clean if name.removeprefix("grad_") not in PARAMETERS]
    check_same_bits(
        {name: clean[name][good] for name in by_token},
        {name: dirty[name][good] for name in by_token},
        f"{op.name}, NaN in another token's {poisoned}:",
    )
    if not any(dirty[name][num_tokens // 3].isnan().any() for name in op.outputs):
        raise AssertionError(f"{op.name}: a NaN in {poisoned} reaches no output")
