"""Gradients that go into an accumulator or into main_grad, by the kernels, on the emulator."""

import pytest
import torch

import oracle
import tolerances
from accumulation import (
    PASSING,
    ROUNDED_ONCE,
    SUB_LAYER,
    WITH_PARAMETERS,
    Call,
    Readers,
    check_parameters,
    rounding_of,
)
from emulator import launch
from emulator.ops import emulated
from emulator.suite import some
from tile_mhc import GradAccumulator, specs
from tile_mhc.kernels._dtypes import Dtypes

SEED = 1
# A dtype of destinations for each: a build costs seconds.
SIZES = {
    (4, 192): (torch.bfloat16, torch.float32),
    (2, 64): (torch.bfloat16, torch.bfloat16),
    (2, 33): (torch.float16, torch.float32),
}
PAIRS = pytest.mark.parametrize("pair", some(SIZES), ids=str)
# The first of them writes.
READERS = ("contract", *SUB_LAYER, "second contract")
# Of streams that are not mixed.
UNMIXED = ("identity_pre", "identity_post")


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED):
        yield


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def directed_kernels(pair):
    """What the table has with destinations, and not without; a bias of post is not among these."""
    streams, grads = map(name_of, SIZES[pair])
    plain = specs.Sizes(*pair, dtype=streams)
    with_grads = set(specs.select([plain._replace(grads=(grads,))]))
    dtypes = Dtypes(streams=streams, layer_bias="float32", into=grads)
    biased = {(name, (*pair, *dtypes.words)) for name in ("post_bwd", "identity_post_bwd")}
    return with_grads - set(specs.select([plain])) - biased


def gradients(pair, num_tokens, names=READERS):
    """Those of all readers of a residual: by autograd, and by an accumulator."""
    streams, dtype = SIZES[pair]
    case = Readers(names, num_tokens, *pair, "cpu", streams)
    plain = case.gradients()
    accumulator = GradAccumulator(case.residual, dtype)
    return case, plain, case.gradients(grad_accumulator=accumulator)


@PAIRS
@pytest.mark.scheduled
def test_every_kernel_runs(pair):
    """The table, no less and no more: in either order, with a norm weight and without."""
    ran = set()
    with launch.settings(watch=lambda kernel, given: ran.add(kernel.key)):
        orders = (READERS, READERS[::-1], ("projection", "aggregate", "projection"))
        for names in (*orders, UNMIXED, UNMIXED[::-1]):
            streams, dtype = SIZES[pair]
            for has_norm in (True, False):
                case = Readers(names, 130, *pair, "cpu", streams, has_norm)
                case.gradients(grad_accumulator=GradAccumulator(case.residual, dtype))
        for name in (*WITH_PARAMETERS, PASSING):
            for has_norm in (True, False):
                call = Call(name, (130, *pair), "cpu", streams, has_norm=has_norm)
                call.give(dtype)
                call.backward()
    directed = {key for key in ran if key in directed_kernels(pair)}
    assert directed == directed_kernels(pair)
    plain = set(specs.select([specs.Sizes(*pair, dtype=name_of(streams))]))
    assert ran <= plain | directed


@PAIRS
@pytest.mark.parametrize(
    "names", [READERS, pytest.param(UNMIXED, marks=pytest.mark.scheduled)], ids="-".join
)
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 130])
def test_accumulator(pair, num_tokens, names):
    """Rounded once; of other gradients see `check_parameters`."""
    case, plain, found = gradients(pair, num_tokens, names)
    residual, autograds = found["residual"], plain["residual"]
    check_parameters(case, plain, found)
    if num_tokens == 0:
        return
    truth = case.truth()
    streams, dtype = SIZES[pair]
    bar = ROUNDED_ONCE * rounding_of(truth, streams)
    if dtype == streams:
        bar = max(bar, ROUNDED_ONCE * oracle.relative_error(autograds, truth))
    if dtype == torch.float32 and streams == torch.float16:
        # Products of two parts are near float32, not in it.
        bar += tolerances.PROMISED["projection", "out"]
    assert oracle.relative_error(residual, truth) <= bar


@pytest.mark.parametrize("pair", some({(4, 192): "", (2, 64): ""}), ids=str)
def test_accumulator_over_several_tiles(pair):
    """One CTA with all the work: what it loads ahead of what it stores, in the same memory."""
    with emulated(seed=SEED, num_sms=1):
        case, plain, found = gradients(pair, 300)
    truth = case.truth()
    bar = rounding_of(truth)
    if SIZES[pair][1] == torch.bfloat16:
        bar = max(bar, oracle.relative_error(plain["residual"], truth))
    assert oracle.relative_error(found["residual"], truth) <= ROUNDED_ONCE * bar


@PAIRS
def test_any_order_of_threads(pair):
    runs = []
    for seed in (0, 1, 2):
        torch.manual_seed(0)
        with launch.settings(seed=seed):
            runs.append(gradients(pair, 65)[2])
    for run in runs[1:]:
        oracle.check_same_bits(runs[0], run, "in another order:")


@PAIRS
@pytest.mark.parametrize("adds", [True, False], ids=["adds", "writes"])
@pytest.mark.parametrize("name", [*WITH_PARAMETERS, PASSING])
def test_main_grad(pair, name, adds):
    """What was there and the gradient by autograd, in float32 and rounded once."""
    streams, dtype = SIZES[pair]
    for num_tokens in (0, 13, 130):
        call = Call(name, (num_tokens, *pair), "cpu", streams)
        before = call.give(dtype, overwrite_main_grad=not adds)
        call.backward()
        for key, parameter in call.parameters.items():
            start = before[key].float() if adds else 0.0
            expected = (start + call.plain[key].float()).to(dtype)
            # A product and a sum may be one operation there.
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(parameter.main_grad, expected, rtol=unit, atol=unit)
        oracle.check_same_bits(
            {"input": call.input.grad}, {"input": call.plain["input"]}, "with main_grad:"
        )


@PAIRS
def test_views_of_a_flat_buffer(pair):
    """Misaligned for accesses of 16 bytes: then torch adds. Nothing beside them is touched."""
    streams, dtype = SIZES[pair]
    call = Call("fused_pre", (13, *pair), "cpu", streams)
    sizes = [parameter.numel() + 1 for parameter in call.parameters.values()]
    flat = torch.zeros(sum(sizes) + 1, dtype=dtype)
    start = 1
    for parameter in call.parameters.values():
        parameter.main_grad = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel() + 1
    call.backward()
    for key, parameter in call.parameters.items():
        unit = torch.finfo(dtype).eps
        expected = call.plain[key].to(dtype)
        torch.testing.assert_close(parameter.main_grad, expected, rtol=unit, atol=unit)
    gaps = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    assert not flat[gaps].any()
