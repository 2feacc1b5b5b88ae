"""What the tests of accumulators and of main_grad run: ops, with and without them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import oracle
from cases import (
    AGGREGATE,
    CONTRACT,
    FUSED_PRE,
    HEAD_MIX,
    IDENTITY_POST,
    IDENTITY_PRE,
    PARAMETERS,
    POST,
    PROJECTION,
    SPLIT_MIXES,
    Op,
    norm_weight,
)
from tile_mhc import (
    GradAccumulator,
    aggregate,
    identity_pre,
    post,
    reference,
    selection,
    without_main_grad,
)

# Two of each kind where it matters: two heads may read one residual.
READERS: dict[str, Op] = {
    "projection": PROJECTION,
    "aggregate": AGGREGATE,
    "post": POST,
    "contract": CONTRACT,
    "second contract": CONTRACT,
    "identity_post": IDENTITY_POST,
    "identity_pre": dataclasses.replace(
        IDENTITY_PRE,
        run=lambda **given: identity_pre(**given)[0],
        reference=lambda **given: reference.identity_pre(**given)[0],
        outputs=("layer_input",),
    ),
}
WITH_NORM = (PROJECTION, CONTRACT, READERS["identity_pre"])
SUB_LAYER = ("projection", "aggregate", "post")
ORDERS: tuple[tuple[str, ...], ...] = (
    ("projection",),
    ("aggregate",),
    ("post",),
    ("contract",),
    ("projection", "aggregate"),
    SUB_LAYER,
    SUB_LAYER[::-1],
    ("aggregate", "post", "projection"),
    ("contract", "second contract"),
    ("contract", *SUB_LAYER, "second contract"),
    ("identity_post",),
    ("identity_post", "aggregate"),
    ("aggregate", "identity_post"),
    ("identity_pre",),
    ("identity_pre", "identity_post"),
    ("identity_post", "identity_pre", "aggregate"),
)
# Tokens, streams, width, on a GPU: a real shape, ragged tiles, most streams, fewest.
GPU_SIZES = ((4096, 4, 2560), (130, 4, 1280), (65, 8, 128), (64, 2, 64))
# How far the float32 sum of bfloat16 roundings may be from the rounded float64 sum, in norm.
ROUNDED_ONCE = 1.03
# How far the gradients of parameters by one pass of the readout may be from those by two, in norm.
TWO_PASSES = 1e-5


class Readers:
    """One residual, what its readers take besides, and a gradient for each of their outputs."""

    def __init__(
        self,
        names: Sequence[str],
        num_tokens: int,
        n: int,
        hidden_size: int,
        device: str,
        streams: torch.dtype = torch.bfloat16,
        has_norm: bool | None = None,
    ) -> None:
        self.names = names
        shape = ((num_tokens,), n, hidden_size, device)
        self.inputs = {name: READERS[name].inputs(*shape)[0] for name in names}
        for name, tensors in self.inputs.items():
            if has_norm is not None and READERS[name] in WITH_NORM:
                tensors.pop("norm_weight", None)
                if has_norm:
                    tensors["norm_weight"] = norm_weight(n * hidden_size, device)
            for key in tensors.keys() & {"residual", "layer_output"}:
                tensors[key] = tensors[key].to(streams)
        self.residual = self.inputs[names[0]]["residual"].requires_grad_()
        for tensors in self.inputs.values():
            del tensors["residual"]
            for tensor in tensors.values():
                tensor.requires_grad_()
        with torch.no_grad():
            outputs = self.outputs(self.residual)
        self.upstream = [torch.randn_like(out) for out in outputs]

    def outputs(self, residual: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return tuple(self.output(name, residual, **options) for name in self.names)

    def output(self, name: str, residual: Tensor, **options: Any) -> Tensor:
        out: Tensor = READERS[name].run(residual=residual, **self.inputs[name], **options)
        return out

    def gradients(self, **options: Any) -> oracle.Named:
        """Of the residual and of everything else, by one backward."""
        return self.gradients_of(self.outputs(self.residual, **options))

    def gradients_of(self, outputs: Sequence[Tensor], **options: Any) -> oracle.Named:
        leaves = {"residual": self.residual}
        for name, tensors in self.inputs.items():
            leaves |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        grads = torch.autograd.grad(outputs, list(leaves.values()), self.upstream, **options)
        return dict(zip(leaves, grads, strict=True))

    def truth(self, others: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The residual's gradient in float64; `others` is a loss that also reads the residual."""
        residual = self.residual.detach().double().requires_grad_()
        outputs = [
            READERS[name].reference(
                residual=residual, **{k: t.double() for k, t in self.inputs[name].items()}
            )
            for name in self.names
        ]
        upstream = [grad.double() for grad in self.upstream]
        if others is not None:
            outputs.append(others(residual))
            upstream.append(torch.ones_like(outputs[-1]))
        (grad,) = torch.autograd.grad(outputs, residual, upstream)
        return grad

    def gate_terms(self, name: str) -> oracle.Named:
        """What the gradients of a reader's scale and bias are sums of."""
        tensors = {"residual": self.residual, **self.inputs[name]}
        upstream = [self.upstream[self.names.index(name)]]
        return oracle.terms_of(READERS[name], tensors, {}, upstream)[1]


def chain(
    stack: Sequence[Readers], residual: Tensor, make: Callable[[Tensor], GradAccumulator]
) -> Tensor:
    """Sub-layers, each of which reads its residual three times and writes the next."""
    for layer in stack:
        n = residual.shape[-2]
        accumulator = make(residual)
        mixes = layer.output("projection", residual, grad_accumulator=accumulator)
        pre_mix = mixes[..., :n].sigmoid()
        layer_input = aggregate(residual, pre_mix, grad_accumulator=accumulator)
        tensors = layer.inputs["post"] | {"layer_output": torch.tanh(layer_input)}
        residual = post(residual=residual, **tensors, grad_accumulator=accumulator)
    return residual


def rounding_of(truth: Tensor, dtype: torch.dtype = torch.bfloat16) -> float:
    return oracle.relative_error(truth.to(dtype), truth)


def check_parameters(case: Readers, plain: oracle.Named, found: oracle.Named) -> None:
    """All gradients but the residual's: the same bits with an accumulator and without.

    But the kernels of the readout and of identity_pre make two passes into an accumulator where
    otherwise they make one, and sum in another order.
    """
    others = [name for name in plain if name != "residual"]
    of = case.residual.dtype, *case.residual.shape[-2:]
    for op, once in (
        ("contract", selection.reads_once(*of, backward=True)),
        ("identity_pre", selection.identity_reads_once(*of, backward=True)),
    ):
        for name in [name for name in others if once and f"{op}." in name]:
            others.remove(name)
            reader, key = name.split(".")
            terms = case.gate_terms(reader).get(f"grad_{key}")
            error = oracle.relative_error(found[name], plain[name].double(), terms)
            assert error <= TWO_PASSES, name
    same = ({name: grads[name] for name in others} for grads in (plain, found))
    oracle.check_same_bits(*same, "with an accumulator:")


WITH_PARAMETERS = {
    op.name: op for op in (PROJECTION, SPLIT_MIXES, HEAD_MIX, CONTRACT, FUSED_PRE, IDENTITY_PRE)
}
PASSING = "fused_pre, passing the residual"


class Call:
    """An op with its inputs, the parameters apart, and gradients of its outputs."""

    def __init__(
        self,
        name: str,
        case: tuple[int, int, int] = (5, 4, 64),
        device: str = "cpu",
        streams: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.float32,
        has_norm: bool = True,
    ) -> None:
        self.op = WITH_PARAMETERS[name.partition(",")[0]]
        num_tokens, n, hidden_size = case
        self.tensors, self.options = self.op.inputs((num_tokens,), n, hidden_size, device)
        if self.op is CONTRACT:
            self.tensors["norm_weight"] = norm_weight(n * hidden_size, device)
        if not has_norm:
            self.tensors.pop("norm_weight", None)
        if "residual" in self.tensors:
            self.tensors["residual"] = self.tensors["residual"].to(streams)
        if name == PASSING:
            self.options["passes_residual"] = True
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for key in PARAMETERS:
            if key in self.tensors:
                self.parameters[key] = torch.nn.Parameter(self.tensors.pop(key).to(dtype))
        (self.input,) = self.tensors.values()
        self.input.requires_grad_()
        with torch.no_grad():
            self.upstream = [torch.randn_like(out) for out in self.outputs()]
        self.plain = self.gradients()

    def outputs(self) -> tuple[Tensor, ...]:
        return oracle.as_tuple(self.op.run(**self.tensors, **self.parameters, **self.options))

    def gradients(self) -> oracle.Named:
        """By autograd: as if no parameter had a main_grad."""
        leaves = {"input": self.input, **self.parameters}
        with without_main_grad():
            outputs = self.outputs()
        grads = torch.autograd.grad(outputs, list(leaves.values()), self.upstream)
        return dict(zip(leaves, grads, strict=True))

    def gate_terms(self) -> oracle.Named:
        """What the gradients of scale and bias are sums of, by the names of the parameters."""
        tensors = self.tensors | dict(self.parameters)
        options = {key: v for key, v in self.options.items() if key != "passes_residual"}
        upstream = self.upstream[: len(self.op.outputs)]
        terms = oracle.terms_of(self.op, tensors, options, upstream)[1]
        return {name.removeprefix("grad_"): tensor for name, tensor in terms.items()}

    def give(self, dtype: torch.dtype = torch.float32, **attributes: Any) -> oracle.Named:
        """A main_grad of random numbers for each parameter, and attributes."""
        for parameter in self.parameters.values():
            parameter.main_grad = torch.randn_like(parameter, dtype=dtype)
            for key, value in attributes.items():
                setattr(parameter, key, value)
        return {name: p.main_grad.clone() for name, p in self.parameters.items()}

    def backward(self, outputs: Sequence[Tensor] | None = None, **options: Any) -> None:
        torch.autograd.backward(outputs or self.outputs(), self.upstream, **options)

    def check_added(self, before: oracle.Named, times: int = 1) -> None:
        for name, parameter in self.parameters.items():
            expected = before[name]
            for _ in range(times):
                expected = expected + self.plain[name]
            assert torch.equal(parameter.main_grad, expected), name
