"""compat.transformer_engine, run by the kernels on the CPU, against float64."""

import pytest
import torch

import far_apart
import oracle
import saturation
import te_cases
from emulator import launch
from emulator.ops import emulated
from emulator.suite import FULL
from te_cases import DTYPES, case, kinds, op_of
from tile_mhc.compat import transformer_engine as te

SEED = 1
FEW = (DTYPES[0], DTYPES[3]) if FULL else DTYPES[:1]
few = pytest.mark.parametrize("dtypes", FEW, ids=str)
CASES = (
    case(0, 192, "no token"),
    case(13, 192, "less than a block"),
    case(130, 192, "a block and a pair"),
    case(65, 33, "an odd C"),
)


@pytest.fixture(autouse=True)
def emulator():
    with emulated(seed=SEED):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
@kinds
@few
def test_function(kind, dtypes, case):
    op = op_of(kind, dtypes)
    oracle.check(op, case, *op.inputs(*case.shape, "cpu"))


@pytest.mark.parametrize("kind", ["aggregate", "post", "post_bias"])
def test_wide_streams(kind):
    """Several tiles of a row, the last ragged, and several tokens of a slice."""
    op = op_of(kind, DTYPES[0])
    wide = case(9, 2600, "several tiles")
    with emulated(seed=SEED, num_sms=1):
        oracle.check(op, wide, *op.inputs(*wide.shape, "cpu"))


@pytest.mark.parametrize("channels", [192, 33])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]][: 2 if FULL else 1], ids=str)
def test_buffer(dtypes, channels):
    """Written, added to and taken; nearer to float64 than the sum of rounded parts."""
    inputs = te_cases.sub_layer_inputs(130, channels, dtypes, "cpu")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = te_cases.sub_layer(**leaves, buffer=torch.full(inputs["x"].shape, float("nan")))
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, list(leaves.values()), upstream)
    plain = torch.autograd.grad(
        te_cases.sub_layer(**leaves, buffer=None), list(leaves.values()), upstream
    )
    (_, *truth), terms = te_cases.sub_layer_truth(inputs, upstream)
    errors = te_cases.sub_layer_errors(ours, truth, terms)
    most = 5e-3 if dtypes is DTYPES[0] else 1e-5
    assert max(errors) < most
    if dtypes is DTYPES[0]:
        assert errors[0] < oracle.relative_error(plain[0], truth[0])


@pytest.mark.parametrize("kind", ["projection_norm", "scale", "sinkhorn", "aggregate", "post_bias"])
def test_same_bits_in_every_order_of_threads(kind):
    op = op_of(kind, DTYPES[0])
    tensors, options = op.inputs((130,), 4, 192, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    runs = []
    for seed in (0, 1, 2):
        with launch.settings(seed=seed):
            runs.append(oracle.evaluate(op.run, tensors, options, upstream, op.outputs))
    for run in runs[1:]:
        oracle.check_same_bits(runs[0], run, f"{op.name}, in another order:")


@pytest.mark.parametrize("iters", [1, 2, 33])
def test_sinkhorn_counts(iters):
    op = op_of("sinkhorn", DTYPES[0])
    tensors, _ = op.inputs((13,), 4, 192, "cpu")
    oracle.check(op, case(13, 192, "few steps"), tensors, {"iters": iters})


def test_sinkhorn_of_logits_far_apart():
    op = op_of("sinkhorn", DTYPES[0])
    tensors = {"logits": te_cases.far_apart("cpu")}
    ours = oracle.check(op, case(4096, 192, "sums of underflow"), tensors, {})
    assert all(tensor.isfinite().all() for tensor in ours.values())


@pytest.mark.parametrize(
    ("kind", "poisoned"), [("aggregate", "x"), ("post", "f"), ("scale", "ms")], ids=str
)
def test_nonfinite_stays_in_its_token(kind, poisoned):
    op = op_of(kind, DTYPES[2])
    oracle.check_isolation(op, *op.inputs((65,), 4, 33, "cpu"), poisoned)


def test_layer_output_of_a_wider_dtype():
    op = op_of("post_bias", DTYPES[0])
    tensors, options = op.inputs((13,), 4, 192, "cpu")
    tensors["f"] = torch.randn(13, 192)
    oracle.check(op, case(13, 192, "f in float32, x in bfloat16"), tensors, options)


def test_gradients_of_saturated_gates():
    saturation.check_padded_mixes("cpu")


@pytest.mark.parametrize("iters", [20, 32])
def test_sinkhorn_is_that_of_the_definition(iters):
    def sinkhorn(logits):
        return te.mhc_fused_sinkhorn(logits, te_cases.N, iters=iters)

    for gap in far_apart.GAPS:
        far_apart.check(te_cases.N, gap, iters, "cpu", sinkhorn)
