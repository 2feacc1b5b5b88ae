import pytest
import torch

import far_apart
import oracle
import tolerances
from cases import SINKHORN, Case, mixes
from tile_mhc import sinkhorn
from tile_mhc.kernels._shapes import SMALLEST_EPS


@mixes
def test_sinkhorn(case):
    oracle.check(SINKHORN, case, *SINKHORN.inputs(*case.shape, "cuda"))


def test_error_of_ten_steps():
    tensors, _ = SINKHORN.inputs((4096,), 4, 64, "cuda")
    options = {"repeat": 10}
    upstream = oracle.upstream_of(SINKHORN, tensors, options)
    ours = oracle.evaluate(sinkhorn, tensors, options, upstream, ["out"])
    plain = oracle.evaluate(SINKHORN.reference, tensors, options, upstream, ["out"])
    wide = {"logits": tensors["logits"].double()}
    truth = oracle.evaluate(SINKHORN.reference, wide, options, [upstream[0].double()], ["out"])
    for name in ours:
        arguments = ours[name], plain[name], truth[name], tolerances.MEASURED_SINKHORN
        oracle.check_tensor("sinkhorn", name, *arguments)


@pytest.mark.parametrize("repeat", [1, 2, 10, 20, 32, 33, 100])
def test_repeat(repeat):
    """The backward keeps every step: capacities of 32, 64 and more."""
    tensors, _ = SINKHORN.inputs((130,), 4, 64, "cuda")
    oracle.check(SINKHORN, Case(130, 4, 64, "number of steps"), tensors, {"repeat": repeat})


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_eps(eps):
    tensors, _ = SINKHORN.inputs((130,), 4, 64, "cuda")
    oracle.check(SINKHORN, Case(130, 4, 64, "eps"), tensors, {"repeat": 10, "eps": eps})


def test_same_bits_every_run():
    oracle.check_repeatable(SINKHORN, *SINKHORN.inputs((4096,), 4, 64, "cuda"))


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(SINKHORN, *SINKHORN.inputs((130,), 8, 64, "cuda"), "logits")


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 64, "any leading dimensions")
    oracle.check(SINKHORN, case, *SINKHORN.inputs(lead, 4, 64, "cuda"))


def test_strided():
    logits = torch.randn(260, 4, 4, device="cuda").mT[::2]
    oracle.check(SINKHORN, Case(130, 4, 64, "any layout"), {"logits": logits}, {"repeat": 20})


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_doubly_stochastic(num_streams):
    comb = sinkhorn(torch.randn(130, num_streams, num_streams, device="cuda"), repeat=50)
    ones = torch.ones(130, num_streams, device="cuda")
    torch.testing.assert_close(comb.sum(-2), ones, rtol=0, atol=1e-5)
    torch.testing.assert_close(comb.sum(-1), ones, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e4, 1e38], ids=str)
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_extreme_logits(num_streams, size):
    """Each row has one winner, a column of its own: the result is near a permutation."""
    rows = [torch.randperm(num_streams) for _ in range(130)]
    logits = torch.eye(num_streams)[torch.stack(rows)].cuda() * 2 * size - size
    tensors = {"logits": logits}
    case = Case(130, num_streams, 64, "values of any size")
    oracle.check(SINKHORN, case, tensors, {"repeat": 20})


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_all_logits_equal_columns(num_streams):
    """Rows that fight for one column, at 1e4: far from any doubly stochastic matrix, yet finite."""
    logits = torch.full((13, num_streams, num_streams), -1e4, device="cuda")
    logits[..., 0] = 1e4
    tensors = {"logits": logits}
    case = Case(13, num_streams, 64, "rows in conflict")
    oracle.check(SINKHORN, case, tensors, {"repeat": 20})


@pytest.mark.parametrize("gap", far_apart.GAPS)
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_without_eps(num_streams, gap):
    for repeat in far_apart.REPEATS:
        far_apart.check(num_streams, gap, repeat, "cuda")


def test_most_steps_without_eps():
    """So many groups of steps that shared memory holds few tokens of a CTA."""
    for num_streams in (2, 4, 8):
        far_apart.check(num_streams, 690.0, 1024, "cuda")


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_smallest_eps(num_streams):
    tensors = {"logits": far_apart.logits(num_streams, 104.0, "cuda")}
    case = Case(4096, num_streams, 64, "a softmax that is less than its eps")
    ours = oracle.check(SINKHORN, case, tensors, {"repeat": 20, "eps": SMALLEST_EPS})
    assert all(tensor.isfinite().all() for tensor in ours.values())


def test_same_bits_every_run_without_eps():
    tensors, options = SINKHORN.inputs((4096,), 4, 64, "cuda")
    oracle.check_repeatable(SINKHORN, tensors, options | {"eps": 0.0})
