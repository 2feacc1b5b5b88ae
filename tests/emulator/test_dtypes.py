"""Every dtype and width on the emulator: what no default kernel covers.

A build costs seconds, so a pair (n, H) has a dtype of the streams of its own; tests/gpu changes one
factor at a time.
"""

import pytest
import torch

import oracle
from cases import DTYPES, FUSED_PRE, OPS, PARAMETERS, POST_BIAS, PROJECTION, Case, Dtypes
from emulator import launch
from emulator.ops import emulated
from emulator.suite import FULL, PASSING, run_everything, run_recompute, some
from tile_mhc import projection, reference, specs

SEED = 1
FLOAT32, FLOAT16, BFLOAT16 = (
    Dtypes(torch.float32, (), "two parts of a stream, 33 columns: one element an access"),
    Dtypes(torch.float16, (), "two exact parts, accesses of four"),
    Dtypes(torch.bfloat16, PARAMETERS, "one part, an odd width, and all parameters bfloat16"),
)
SIZES = {(2, 33): FLOAT32, (4, 100): FLOAT16, (8, 65): BFLOAT16}
PAIRS = pytest.mark.parametrize("pair", some(SIZES), ids=str)
SOME_OPS = (PROJECTION, POST_BIAS, FUSED_PRE)
ONE_BFLOAT16 = [d for d in DTYPES if len(d.bfloat16_parameters) == 1]


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED):
        yield


def sizes(n, hidden_size, dtypes):
    streams = str(dtypes.streams).removeprefix("torch.")
    parameters = ("bfloat16",) if dtypes.bfloat16_parameters else ("float32",)
    return specs.Sizes(n, hidden_size, dtype=streams, parameters=parameters)


@pytest.mark.skipif(not FULL, reason="TILE_MHC_EMULATOR=full builds every kernel of other dtypes")
@PAIRS
def test_every_kernel_runs(pair):
    """Several tiles and slices, the last of each ragged; the launches are the table's."""
    ran = set()
    with launch.settings(watch=lambda kernel, given: ran.add(kernel.key)):
        run_everything(Case(130, *pair, "several slices"), SIZES[pair])
    assert ran == set(specs.select([sizes(*pair, SIZES[pair])]))


@pytest.mark.parametrize("op", [*OPS, PASSING] if FULL else SOME_OPS, ids=str)
@PAIRS
def test_op(pair, op):
    case = Case(130, *pair, "a block and a pair")
    tensors, options = op.inputs(*case.shape, "cpu")
    tensors = SIZES[pair].of(tensors)
    ours = oracle.check(op, case, tensors, options)
    for name, tensor in tensors.items():
        assert ours[f"grad_{name}"].dtype == tensor.dtype


@PAIRS
def test_loops_over_several_tiles(pair):
    """Where one CTA has all the work: what it keeps from tile to tile, and its last block of K."""
    case = Case(300, *pair, "five tiles, the last ragged")
    for op in (PROJECTION, POST_BIAS):
        tensors, options = op.inputs(*case.shape, "cpu")
        with emulated(seed=SEED, num_sms=1):
            oracle.check(op, case, SIZES[pair].of(tensors), options)


@PAIRS
def test_recompute(pair):
    case = Case(13, *pair, "less than a block")
    state = torch.get_rng_state()
    ours = run_recompute(case, dtype=SIZES[pair].streams)
    torch.set_rng_state(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emulator.suite.recompute", reference.recompute)
        expected = run_recompute(case, dtype=SIZES[pair].streams)
    unit = 2 * torch.finfo(SIZES[pair].streams).eps
    for name, tensor in expected.items():
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=unit, atol=unit), name


@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        (op, dtypes)
        for op in (OPS if FULL else (PROJECTION, FUSED_PRE))
        for dtypes in ONE_BFLOAT16
        if dtypes.bfloat16_parameters[0] in op.inputs((1,), 4, 192, "cpu")[0]
    ],
    ids=str,
)
@pytest.mark.scheduled
def test_one_bfloat16_parameter(op, dtypes):
    case = Case(130, 4, 192, dtypes.why)
    tensors, options = op.inputs(*case.shape, "cpu")
    oracle.check(op, case, dtypes.of(tensors), options)


@pytest.mark.parametrize("size", [1e34, 1e30, 1e19, 1e-30], ids=str)
def test_size_of_float32_streams(size):
    """Sums of squares that float32 cannot hold, beside tokens that it can.

    Not 3.4e38, where only a tile of such tokens is exact: a tile has one power of two, and beside
    gradients near 1 those below 2**-117 have no low part. See test_projection_any.py for that.
    """
    tensors, options = PROJECTION.inputs((13,), 2, 33, "cpu")
    tensors["residual"] = tensors["residual"].float()
    tensors["residual"][::2] = tensors["residual"][::2].sign() * size
    upstream = oracle.upstream_of(PROJECTION, tensors, options)
    ours = oracle.evaluate(projection, tensors, options, upstream, ["out"])
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    truth = oracle.evaluate(
        reference.projection, wide, options, [g.double() for g in upstream], ["out"]
    )
    assert oracle.relative_error(ours["out"], truth["out"]) < 1e-5
    for token in range(13):
        grads = ours["grad_residual"][token], truth["grad_residual"][token]
        assert oracle.relative_error(*grads) < 3e-5, token
    for name in ("grad_weight", "grad_norm_weight"):
        assert oracle.relative_error(ours[name], truth[name]) < 1e-5, name


@PAIRS
def test_nonfinite_stays_in_its_token(pair):
    tensors, options = PROJECTION.inputs((65,), *pair, "cpu")
    oracle.check_isolation(PROJECTION, SIZES[pair].of(tensors), options, "residual")


@pytest.mark.scheduled
def test_same_bits_in_every_order_of_threads():
    for op in (PROJECTION, POST_BIAS):
        tensors, options = op.inputs((130,), 4, 100, "cpu")
        tensors = FLOAT16.of(tensors)
        upstream = oracle.upstream_of(op, tensors, options)
        runs = []
        for seed in (0, 1, 2):
            with launch.settings(seed=seed):
                runs.append(oracle.evaluate(op.run, tensors, options, upstream, op.outputs))
        for run in runs[1:]:
            oracle.check_same_bits(runs[0], run, f"{op.name}, in another order:")
