"""What the emulated tests run on: few pairs (n, H), as each is a build, and many token counts."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import oracle
import te_cases
import unmixed
from cases import (
    CONTRACT,
    DEFAULT_DTYPES,
    DELAYED_PRE,
    FUSED_PRE,
    IDENTITY_PRE,
    OPS,
    POST,
    POST_PRE,
    POST_PRE_DELAYED,
    PROJECTION,
    SINKHORN,
    Case,
    Dtypes,
    Inputs,
    Op,
    norm_weight,
    recompute_inputs,
)
from parity import plain
from tile_mhc import (
    contract,
    fused_pre,
    identity_pre,
    post,
    post_pre,
    recompute,
    recompute_group,
    reference,
    selection,
    sinkhorn,
)
from tile_mhc.compat.tile_kernels import mhc as tile_kernels_mhc

TE_DTYPES = te_cases.DTYPES[0]
PAIRS = ((2, 64), (4, 192), (8, 128))
# A build costs seconds, and there are hundreds. By default the tests of ops run at one pair, with
# `check.sh --all` every kernel there, and at the others what tests of ops run;
# TILE_MHC_EMULATOR=full builds all of them.
FULL = os.environ.get("TILE_MHC_EMULATOR", "") == "full"
VARIED = PAIRS if FULL else PAIRS[1:2]


def some(sizes: Mapping[Any, Any], count: int = 1) -> dict[Any, Any]:
    """The first `count` of them, unless all are wanted."""
    return dict(list(sizes.items())[: None if FULL else count])


# Without a weight of the norm: kernels of their own, whose builds take five to ten seconds.
PLAIN = pytest.param(False, marks=pytest.mark.scheduled)
# A row of more than one access a thread, for the ops without a matmul.
WIDE = (4, 2560)
WIDE_OPS = ("expand", "aggregate", "post", "recompute", "identity_post", "stream_mean")
CASES = (
    *(Case(0, n, hidden, "no token") for n, hidden in PAIRS),
    *(Case(1, n, hidden, "one token") for n, hidden in PAIRS),
    *(Case(13, n, hidden, "less than a block") for n, hidden in PAIRS),
    Case(128, 2, 64, "exactly one block"),
    Case(130, 4, 192, "a block and a pair"),
    Case(65, 8, 128, "more than half a block, the tile of most streams"),
)
WIDE_CASE = Case(3, *WIDE, "several accesses a thread")


def _passing(residual: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    return fused_pre(residual, **arguments, passes_residual=True)


def _passing_reference(residual: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    return (*reference.fused_pre(residual, **arguments), residual.view_as(residual))


# The residual passed through, whose gradient has a kernel of its own.
PASSING = dataclasses.replace(
    FUSED_PRE,
    run=_passing,
    reference=_passing_reference,
    outputs=(*FUSED_PRE.outputs, "residual"),
)


DELAYED_PASSING = dataclasses.replace(
    DELAYED_PRE,
    run=_passing,
    reference=_passing_reference,
    outputs=(*DELAYED_PRE.outputs, "residual"),
)


def _head_inputs(*shape: Any) -> Inputs:
    tensors, _ = CONTRACT.inputs(*shape)
    return {name: tensors[name] for name in ("residual", "weight")}, {}


# The projection of n rows, as TileKernels' readout calls it by itself.
HEAD_PROJECTION = dataclasses.replace(PROJECTION, inputs=_head_inputs)
# The readout in two passes where by default it makes one.
TWO_PASSES = dataclasses.replace(CONTRACT, run=functools.partial(contract, num_splits=1000))
# What has kernels of its own for Sinkhorn.
WITHOUT_EPS = dataclasses.replace(SINKHORN, run=functools.partial(sinkhorn, eps=0.0))
# What takes the gradients of its gates in steps.
IN_STEPS = dataclasses.replace(
    FUSED_PRE,
    run=functools.partial(fused_pre, sinkhorn_eps=0.0),
    reference=functools.partial(reference.fused_pre, sinkhorn_eps=0.0),
)
IDENTITY_TWO_PASSES = dataclasses.replace(
    IDENTITY_PRE, run=functools.partial(identity_pre, num_splits=1000)
)
EVERY_OP = (
    *OPS,
    PASSING,
    DELAYED_PASSING,
    HEAD_PROJECTION,
    TWO_PASSES,
    WITHOUT_EPS,
    IN_STEPS,
    unmixed.PASSING,
    IDENTITY_TWO_PASSES,
)


def run_recompute(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """A replay of three layers and two posts."""
    inputs = recompute_inputs(3, 2, *case.shape, device, dtype)
    norms = [norm_weight(case.hidden_size, device) for _ in range(3)]
    outputs = (*recompute(*inputs), *recompute(*inputs, layer_norm_weights=norms))
    names = ("layer_inputs", "residuals", "normed layer_inputs", "residuals of the normed")
    return {
        f"{name}[{i}]": tensor
        for name, tensors in zip(names, outputs, strict=True)
        for i, tensor in enumerate(tensors)
    }


def with_norm(op: Op, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with a weight of the norm, where the op takes one, or without, where they have."""
    if op in (CONTRACT, HEAD_PROJECTION, TWO_PASSES):
        size = tensors["residual"].shape[-2:].numel()
        return tensors | {"norm_weight": norm_weight(size, "cpu")}
    return {name: tensor for name, tensor in tensors.items() if name != "norm_weight"}


def run_transformer_engine(case: Case) -> None:
    """The functions of compat.transformer_engine, and its buffer of gradients."""
    for op in te_cases.ops(TE_DTYPES):
        tensors, options = op.inputs(*case.shape, "cpu")
        upstream = oracle.upstream_of(op, tensors, options)
        oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    inputs = te_cases.sub_layer_inputs(case.num_tokens, case.hidden_size, TE_DTYPES, "cpu")
    norm = norm_weight(case.hidden_size * te_cases.N, "cpu")
    for more in ({}, {"bias": torch.randn(case.hidden_size), "norm_weight": norm}):
        leaves = {name: tensor.requires_grad_() for name, tensor in (inputs | more).items()}
        out = te_cases.sub_layer(**leaves, buffer=torch.empty(inputs["x"].shape))
        out.backward(torch.randn_like(out))


def run_input_norm(case: Case, dtypes: Dtypes = DEFAULT_DTYPES) -> None:
    """A norm of the layer input, which has no gradient."""
    for op, layer_input in ((FUSED_PRE, 0), (DELAYED_PRE, 0), (POST_PRE, 1), (POST_PRE_DELAYED, 1)):
        tensors, options = op.inputs(*case.shape, "cpu")
        for chosen in (tensors, with_norm(op, tensors)):
            given = dtypes.of(chosen)
            layer_norm = dtypes.of({"norm_weight": norm_weight(case.hidden_size, "cpu")})
            weight = layer_norm["norm_weight"]
            for many_splits, few_tokens in ((False, 0), (True, 0), (False, case.num_tokens)):
                with (
                    mock.patch.object(selection, "has_many_splits", return_value=many_splits),
                    mock.patch.object(selection, "FEW_TOKENS", few_tokens),
                ):
                    plain = op.run(**given, **options)
                    normed = op.run(**given, **options, layer_norm_weight=weight)
                want = reference.input_norm(plain[layer_input], weight)
                torch.testing.assert_close(normed[layer_input], want, rtol=2**-7, atol=1e-5)
                for i, (a, b) in enumerate(zip(normed, plain, strict=True)):
                    assert i == layer_input or torch.equal(a, b)


def run_group(case: Case, dtypes: Dtypes = DEFAULT_DTYPES) -> None:
    """Sub-layers in a recompute group have the bits that they have without."""
    tensors, options = FUSED_PRE.inputs(*case.shape, "cpu")
    given = dtypes.of(with_norm(FUSED_PRE, tensors))
    found = []
    for around in (contextlib.nullcontext(), recompute_group()):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
        streams = leaves.pop("residual")
        values = [streams, *leaves.values()]
        with around:
            for _ in range(3):
                layer_input, post_mix, comb_mix = fused_pre(streams, **leaves, **options)
                # A layer that saves its input: tanh would save what it makes of it.
                streams = post(layer_input.sin(), streams, post_mix, comb_mix)
        found.append(torch.autograd.grad(streams.float().square().mean(), values))
    for name, a, b in zip(given, *found, strict=True):
        assert torch.equal(a, b), f"{name}, in a group"


def run_last_boundary(case: Case, dtypes: Dtypes = DEFAULT_DTYPES) -> None:
    """A boundary whose streams nobody reads: there is no gradient of theirs to add to."""
    tensors, options = POST_PRE_DELAYED.inputs(*case.shape, "cpu")
    for chosen in (tensors, with_norm(POST_PRE_DELAYED, tensors)):
        given = dtypes.of(chosen)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
        _, *outputs = post_pre(**leaves, **options)
        torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])


def run_tile_kernels(case: Case, dtypes: Dtypes = DEFAULT_DTYPES) -> None:
    """What the plain functions of compat.tile_kernels launch and no other op does."""
    for name in (
        "head_compute_mix_bwd",
        "fn_normw_merge_bwd",
        "pre_split_mixes_bwd",
        "reduce_partials_fwd",
        "reduce_partials_bwd",
        "pre_big_fuse_fwd",
    ):
        call = plain.PLAIN[name]
        make = plain.Maker(name, case.num_tokens, case.hidden_size, "cpu", case.num_streams)
        # The mixes of a pre, and of the readout.
        both = name.startswith(("fn_normw", "reduce"))
        for num_mixes in (make.num_mixes, case.num_streams)[: 1 + both]:
            make.num_mixes = num_mixes
            inputs = call.inputs(make)
            as_of_ops = {"base": "bias"}
            named = {as_of_ops.get(key, key): tensor for key, tensor in inputs.items()}
            given = dict(zip(inputs, dtypes.of(named).values(), strict=True))
            for reads_last in (False, True):
                with mock.patch.object(selection, "reads_last", return_value=reads_last):
                    call.run(tile_kernels_mhc, given)


def run_everything(case: Case, dtypes: Dtypes = DEFAULT_DTYPES) -> None:
    """Every op forward and backward, in every form that has kernels of its own."""
    run_tile_kernels(case, dtypes)
    if case.num_streams == te_cases.N and dtypes is DEFAULT_DTYPES:
        run_transformer_engine(case)
    for op in EVERY_OP:
        tensors, options = op.inputs(*case.shape, "cpu")
        for chosen in (tensors, with_norm(op, tensors)):
            given = dtypes.of(chosen)
            upstream: list[Any] = oracle.upstream_of(op, given, options)
            oracle.evaluate(op.run, given, options, upstream, op.outputs)
            if op is POST:
                # None of these cases has more tokens than the GPU has SMs.
                with mock.patch.object(selection, "is_one_token_per_sm", return_value=False):
                    oracle.evaluate(op.run, given, options, upstream, op.outputs)
            for count in selection.FEW_STREAMS:
                with (
                    mock.patch.object(selection, "FEW_TOKENS", case.num_tokens),
                    mock.patch.object(selection, "few_streams", return_value=count),
                ):
                    op.run(**given, **options)
            # Widths as small as these never have as many splits as share a sum, nor fill L2; and
            # most of these cases have few tokens.
            with mock.patch.object(selection, "FEW_TOKENS", 0):
                op.run(**given, **options)
                with (
                    mock.patch.object(selection, "has_many_splits", return_value=True),
                    mock.patch.object(selection, "reads_last", return_value=True),
                    mock.patch.object(selection, "SPLIT_WEIGHT_TOKENS", 0),
                ):
                    op.run(**given, **options)
    run_recompute(case, dtype=dtypes.streams)
    run_group(case, dtypes)
    run_input_norm(case, dtypes)
    run_last_boundary(case, dtypes)
