"""Every op and its gradients, run by the kernels on the CPU, against float64."""

import contextlib
from dataclasses import replace

import pytest
import torch

import far_apart
import oracle
import replaying
import saturation
import unmixed
from cases import (
    AGGREGATE,
    CONTRACT,
    DELAYED_PRE,
    EXPAND,
    FUSED_PRE,
    IDENTITY_POST,
    IDENTITY_PRE,
    OPS,
    POST,
    PROJECTION,
    SINKHORN,
    STREAM_MEAN,
    Case,
    operator_calls,
)
from emulator import launch, suite
from emulator.ops import NUM_SMS, emulated, operators
from emulator.suite import (
    CASES,
    DELAYED_PASSING,
    IDENTITY_TWO_PASSES,
    PASSING,
    VARIED,
    WIDE_CASE,
    run_everything,
    run_group,
    run_recompute,
    with_norm,
)
from tile_mhc import (
    ShapeError,
    aggregate,
    contract,
    fused_pre,
    head_mix,
    projection,
    reference,
    selection,
    sinkhorn,
    specs,
    split_mixes,
)
from tile_mhc.kernels._arch import HOPPER
from tile_mhc.kernels._shapes import SMALLEST_EPS, SUM_LANES

pytestmark = pytest.mark.usefixtures("built_kernels", "emulator")
SEED = 1


@pytest.fixture
def emulator():
    with emulated(seed=SEED):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_op(op, case):
    oracle.check(op, case, *op.inputs(*case.shape, "cpu"))


@pytest.mark.parametrize("op", [EXPAND, AGGREGATE, POST, IDENTITY_POST, STREAM_MEAN], ids=str)
def test_wide_streams(op):
    oracle.check(op, WIDE_CASE, *op.inputs(*WIDE_CASE.shape, "cpu"))


@pytest.mark.parametrize("op", [PROJECTION, CONTRACT, FUSED_PRE, IDENTITY_PRE], ids=str)
def test_other_norm_weight(op):
    case = Case(130, 4, 192, "with a weight of the norm where the inputs have none, and without")
    tensors, options = op.inputs(*case.shape, "cpu")
    oracle.check(op, case, with_norm(op, tensors), options)


@pytest.mark.parametrize("case", [*CASES, WIDE_CASE], ids=str)
def test_recompute(case):
    state = torch.get_rng_state()
    ours = run_recompute(case)
    torch.set_rng_state(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emulator.suite.recompute", reference.recompute)
        expected = run_recompute(case)
    for name, tensor in expected.items():
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=2**-7, atol=2**-7), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recompute_group(case):
    run_group(case)


@pytest.mark.scheduled
@pytest.mark.parametrize("pair", VARIED, ids=str)
def test_every_kernel_runs(pair):
    """What the ops launch is the table, no less and no more: tokens enough for several slices."""
    ran = set()
    with launch.settings(watch=lambda kernel, given: ran.add(kernel.key)):
        run_everything(Case(130, *pair, "several slices"))
    assert ran == set(specs.select([specs.Sizes(*pair)]))


def test_every_operator_is_emulated():
    assert set(operators()) == operator_calls((1,), 4, 64, "cpu").keys()
    assert all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"tile_mhc::{o}", "CUDA")
        for o in operators()
    )


@pytest.mark.parametrize("op", OPS, ids=str)
def test_same_bits_in_every_order_of_threads(op):
    tensors, options = op.inputs((130,), 4, 192, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    runs = []
    for seed in (0, 1, 2):
        with launch.settings(seed=seed):
            runs.append(oracle.evaluate(op.run, tensors, options, upstream, op.outputs))
    for run in runs[1:]:
        oracle.check_same_bits(runs[0], run, f"{op.name}, in another order:")


@pytest.mark.parametrize("op", [AGGREGATE, POST, PROJECTION, FUSED_PRE, IDENTITY_PRE], ids=str)
def test_nonfinite_stays_in_its_token(op):
    oracle.check_isolation(op, *op.inputs((65,), 8, 128, "cpu"), "residual")


@pytest.mark.parametrize("case", [*CASES, Case(300, 4, 192, "several tiles")], ids=str)
def test_residual_passed_through(case):
    for op in (PASSING, DELAYED_PASSING, unmixed.PASSING):
        oracle.check(op, case, *op.inputs(*case.shape, "cpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_identity_pre_in_two_passes(case):
    """As with a given number of splits."""
    op = IDENTITY_TWO_PASSES
    tensors, options = op.inputs(*case.shape, "cpu")
    oracle.check(op, case, tensors, options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_observed_gates_of_unmixed_streams(case):
    """Of both ways to read them: those that the layer input and the post_mix were made by."""
    unmixed.check_observed_gates(*case.shape, "cpu")


@pytest.mark.parametrize("op", [PROJECTION, FUSED_PRE, PASSING], ids=str)
def test_loops_over_several_tiles(op):
    """Where one CTA has all the work, pipelines run full, and sums go on from tile to tile."""
    case = Case(300, 4, 192, "three tiles, the last ragged")
    with emulated(seed=SEED, num_sms=1):
        oracle.check(op, case, *op.inputs(*case.shape, "cpu"))


@pytest.mark.parametrize("op", [FUSED_PRE, DELAYED_PRE], ids=str)
def test_width_of_whole_rows(op):
    """Where H is a multiple of 128, a CTA of fused_pre's backward has two pieces of two streams;
    where it is not, or the pre_mix is given, one piece of all four."""
    case = Case(130, 4, 256, "three tiles, the last ragged")
    with emulated(seed=SEED, num_sms=2):
        oracle.check(op, case, *op.inputs(*case.shape, "cpu"))


@pytest.mark.parametrize("case", [Case(13, 4, 192, ""), Case(3, 4, 2560, "")], ids=str)
def test_post_of_more_tokens_than_sms(case):
    """Whose backward has fewer threads a token."""
    with emulated(seed=SEED, num_sms=2):
        oracle.check(POST, case, *POST.inputs(*case.shape, "cpu"))


def test_several_splits_and_a_ragged_one():
    size = 4 * 192
    assert -(-(size // 128) // selection.blocks_per_split(130, size, None)) == 2, (
        "what test_op relies on"
    )
    assert NUM_SMS > 2


@pytest.mark.scheduled
@pytest.mark.parametrize(
    ("n", "hidden_size"), suite.some({(4, 1280): "", (2, 2560): "", (8, 640): ""})
)
def test_many_splits_are_summed_by_several_threads(n, hidden_size):
    """In the fused kernels as in those of the separate ops: the same bits."""
    num_tokens, size = 5, n * hidden_size
    assert size // 128 // selection.blocks_per_split(num_tokens, size, None) > SUM_LANES
    tensors, _ = FUSED_PRE.inputs((num_tokens,), n, hidden_size, "cpu")
    residual, weight = tensors["residual"], tensors["weight"]
    scale, bias = tensors["scale"], tensors["bias"]
    mixes = projection(residual, weight)
    want = reference.projection(residual.double(), weight.double())
    assert (mixes - want).abs().max() < 1e-4
    pre, post, logits = split_mixes(mixes, scale, bias, num_streams=n)
    # As many splits as there are anyway, which few tokens by themselves do not take.
    layer_input, post_mix, comb_mix = fused_pre(residual, weight, scale, bias, num_splits=size)
    assert torch.equal(layer_input, aggregate(residual, pre))
    assert torch.equal(post_mix, post)
    assert torch.equal(comb_mix, sinkhorn(logits))
    head = (weight[:n].contiguous(), scale[:1].contiguous(), bias[:n].contiguous())
    gate = head_mix(projection(residual, head[0]), *head[1:])
    readout = contract(residual, *head, num_splits=size)
    assert torch.equal(readout, aggregate(residual, gate))


@pytest.mark.parametrize("scale", [1e18, 3e-38], ids=str)
def test_streams_near_the_ends_of_bfloat16(scale):
    """Sums of squares that overflow float32, and tokens whose gradient a tile lifts."""
    tensors, options = PROJECTION.inputs((13,), 4, 192, "cpu")
    tensors["residual"] = (tensors["residual"].float() * scale).bfloat16()
    upstream = oracle.upstream_of(PROJECTION, tensors, options)
    ours = oracle.evaluate(projection, tensors, options, upstream, ["out"])
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = oracle.evaluate(
        reference.projection, wide, options, [g.double() for g in upstream], ["out"]
    )
    for name in ("out", "grad_weight"):
        assert oracle.relative_error(ours[name], truth[name]) < 1e-4, name


@pytest.mark.parametrize("repeat", [1, 2, 33])
def test_sinkhorn_far_from_its_limit(repeat):
    """One step, two, and one more than the history of a kernel holds."""
    case = Case(13, 4, 192, "few steps")
    tensors, options = SINKHORN.inputs(*case.shape, "cpu")
    oracle.check(SINKHORN, case, tensors, options | {"repeat": repeat})


def test_tf32():
    tensors, _ = PROJECTION.inputs((13,), 4, 192, "cpu")
    merged = tensors["weight"] * tensors.pop("norm_weight")
    rounded = tensors | {"weight": reference.round_to_tf32(merged)}
    tensors["weight"] = merged
    assert torch.equal(projection(**tensors, tf32=True), projection(**rounded))
    assert not torch.equal(projection(**tensors, tf32=True), projection(**tensors))


def test_tf32_keeps_nan():
    """The NaN that GPUs produce, all ones: `value == value` is true for TileLang's simplifier."""
    tensors, _ = PROJECTION.inputs((3,), 4, 192, "cpu")
    del tensors["norm_weight"]
    tensors["weight"].view(torch.int32)[2, 5] = 0x7FFFFFFF
    assert projection(**tensors, tf32=True)[:, 2].isnan().all()


def test_out_and_checks_are_the_ops_own():
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cpu")
    out = torch.empty(13, 192, dtype=torch.bfloat16)
    assert aggregate(**tensors, out=out) is out
    assert torch.equal(out, aggregate(**tensors))
    with pytest.raises(ShapeError, match="pre_mix must be"):
        aggregate(tensors["residual"], tensors["pre_mix"][:, :2])


@pytest.mark.parametrize(
    ("kept", "last", "kernel"),
    [
        (0, 0, "aggregate_fwd"),
        (-1, 0, "aggregate_last_fwd"),
        (-1, -1, "aggregate_fwd"),
    ],
)
def test_the_bytes_of_the_streams_decide_how_they_are_read(kept, last, kernel, monkeypatch):
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cpu")
    expected = aggregate(**tensors)
    num_bytes = 13 * 4 * 192 * 2
    limits = replace(HOPPER, kept_bytes=num_bytes + kept, last_read_bytes=num_bytes + last)
    ran = []
    watch = launch.settings(watch=lambda kernel, given: ran.append(kernel.key))
    with watch, replaying.on_architecture(limits):
        assert torch.equal(aggregate(**tensors), expected)
    assert ran == [(kernel, (4, 192))]


def test_outside_it_the_reference_answers():
    tensors, _ = AGGREGATE.inputs((13,), 4, 192, "cpu")
    ran = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(launch.settings(watch=lambda kernel, given: ran.append(kernel.key)))
        aggregate(**tensors)
        with emulated():
            aggregate(**tensors)
    assert ran == [("aggregate_fwd", (4, 192))] * 2


def test_gradients_of_saturated_gates():
    saturation.check_split_mixes("cpu")
    saturation.check_head_mix("cpu")
    saturation.check_fused_pre("cpu")


@pytest.mark.parametrize("gap", far_apart.GAPS)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorn_without_eps(n, gap):
    for repeat in (1, 2, 20, 32):
        far_apart.check(n, gap, repeat, "cpu")


def test_sinkhorn_without_eps_of_many_steps():
    """More groups of steps than one kernel's history is usually for, and growth all the way."""
    far_apart.check(4, 690.0, 100, "cpu")


@pytest.mark.parametrize("n", [2, 4, 8])
def test_smallest_eps(n):
    """What does not count as none is one whose reciprocal, and its growth, float32 holds."""
    tensors = {"logits": far_apart.logits(n, 104.0, "cpu")}
    case = Case(4096, n, 64, "a softmax that is less than its eps")
    ours = oracle.check(SINKHORN, case, tensors, {"repeat": 20, "eps": SMALLEST_EPS})
    assert all(tensor.isfinite().all() for tensor in ours.values())
    none = sinkhorn(tensors["logits"], repeat=20, eps=SMALLEST_EPS / 2)
    assert torch.equal(none, sinkhorn(tensors["logits"], repeat=20, eps=0.0))


@pytest.mark.parametrize("shape", [(13, 4, 192), (65, 8, 128)], ids=str)
def test_fused_pre_without_eps(shape):
    far_apart.check_fused_pre(shape, "cpu")
    tensors, options = FUSED_PRE.inputs(shape[:1], *shape[1:], "cpu")
    comb_mix = fused_pre(**tensors, **options, sinkhorn_eps=0.0, num_splits=4)[2]
    norm = tensors.pop("norm_weight")
    mixes = projection(tensors["residual"], tensors["weight"], norm_weight=norm, num_splits=4)
    gates = tensors["scale"], tensors["bias"]
    logits = split_mixes(mixes, *gates, num_streams=shape[1])[2]
    assert torch.equal(comb_mix, sinkhorn(logits, repeat=20, eps=0.0))
