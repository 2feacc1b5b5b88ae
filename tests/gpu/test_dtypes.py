"""Every op with streams and parameters of every dtype, and of widths that nothing divides."""

import dataclasses

import pytest
import torch

import oracle
from cases import (
    DTYPES,
    FUSED_PRE,
    OPS,
    PARAMETERS,
    PROJECTION,
    Case,
    Dtypes,
    dtypes,
    recompute_inputs,
    widths,
)
from tile_mhc import (
    aggregate,
    fused_pre,
    post,
    projection,
    recompute,
    reference,
    sinkhorn,
    split_mixes,
)

EVERY_OP = pytest.mark.parametrize("op", OPS, ids=str)
STREAMS = (torch.bfloat16, torch.float16, torch.float32)


def passing(residual, **arguments):
    return fused_pre(residual, **arguments, passes_residual=True)


def passing_reference(residual, **arguments):
    return (*reference.fused_pre(residual, **arguments), residual.view_as(residual))


PASSING = dataclasses.replace(
    FUSED_PRE,
    run=passing,
    reference=passing_reference,
    outputs=(*FUSED_PRE.outputs, "residual"),
)


def check(op, case, chosen):
    tensors, options = op.inputs(*case.shape, "cuda")
    tensors = chosen.of(tensors)
    ours = oracle.check(op, case, tensors, options)
    for name, tensor in tensors.items():
        assert ours[f"grad_{name}"].dtype == tensor.dtype, name


@pytest.mark.parametrize("op", [*OPS, PASSING], ids=str)
@dtypes
def test_op(op, dtypes):
    check(op, Case(130, 4, 1280, dtypes.why), dtypes)


@EVERY_OP
@widths
def test_width(op, case):
    check(op, case, Dtypes(torch.bfloat16, (), case.why))


@pytest.mark.parametrize("streams", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", [*OPS, PASSING], ids=str)
def test_odd_width(op, streams):
    check(op, Case(65, 4, 5129, "TransformerEngine's"), Dtypes(streams, PARAMETERS, ""))


@pytest.mark.parametrize("num_streams", [2, 4, 8])
@EVERY_OP
def test_float32_of_every_number_of_streams(op, num_streams):
    case = Case(65, num_streams, 128, "a register tile of its own")
    check(op, case, Dtypes(torch.float32, (), case.why))


@EVERY_OP
def test_many_tokens(op):
    case = Case(4096, 4, 2560, "every slice and split, and the bars of a norm")
    check(op, case, Dtypes(torch.float32, (), case.why))


@pytest.mark.parametrize("dtype", STREAMS, ids=str)
@widths
def test_recompute(case, dtype):
    """The bits of the ops one after another."""
    initial, pre, outputs, posts, combs = recompute_inputs(3, 2, *case.shape, "cuda", dtype)
    layer_inputs, residuals = recompute(initial, pre, outputs, posts, combs)
    streams = initial
    for layer, mix in enumerate(pre):
        assert torch.equal(layer_inputs[layer], aggregate(streams, mix))
        if layer < len(outputs):
            streams = post(outputs[layer], streams, posts[layer], combs[layer])
            assert torch.equal(residuals[layer], streams)


@EVERY_OP
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_same_bits_every_run(op, dtypes):
    tensors, options = op.inputs((130,), 4, 100, "cuda")
    oracle.check_repeatable(op, dtypes.of(tensors), options)


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_fused_is_the_ops_one_after_another(dtypes):
    tensors, options = FUSED_PRE.inputs((65,), 4, 100, "cuda")
    tensors = dtypes.of(tensors)
    layer_input, post_mix, comb_mix = fused_pre(**tensors, **options)
    names = ("residual", "weight", "norm_weight")
    mixes = projection(**{name: tensors[name] for name in names})
    parts = split_mixes(mixes, tensors["scale"], tensors["bias"], num_streams=4, post_mult=2.0)
    assert torch.equal(layer_input, aggregate(tensors["residual"], parts[0]))
    assert torch.equal(post_mix, parts[1])
    assert torch.equal(comb_mix, sinkhorn(parts[2], repeat=options["sinkhorn_repeat"]))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_norm_weight_counts_with_and_without_grad(dtypes):
    """TileKernels forgets it where no gradient is wanted."""
    tensors, options = FUSED_PRE.inputs((65,), 4, 128, "cuda")
    tensors = dtypes.of(tensors)
    with torch.no_grad():
        without = fused_pre(**tensors, **options)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = fused_pre(**leaves, **options)
    for a, b in zip(outputs, without, strict=True):
        assert torch.equal(a, b)
    outputs[0].float().square().sum().backward()
    assert leaves["norm_weight"].grad.dtype == leaves["norm_weight"].dtype
    assert leaves["norm_weight"].grad.any()
    del tensors["norm_weight"]
    assert not torch.equal(fused_pre(**tensors, **options)[0], outputs[0])


def test_nothing_is_done_in_another_dtype_unasked():
    tensors, _ = PROJECTION.inputs((65,), 4, 100, "cuda")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    # The same values in another dtype: other kernels, and mixes within float32's error.
    assert (projection(**tensors) - projection(**wide)).abs().max() < 1e-4
