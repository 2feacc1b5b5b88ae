import pytest
import torch

import gates
from tile_mhc import selection


@pytest.fixture(autouse=True)
def room():
    if not selection.has_gates_at_once(4, 20, 1.0):
        pytest.skip("of 4 streams the steps do not fit this GPU's shared memory")


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("num_tokens", [1, 13, 128, 200, 20000])
def test_same_bits_as_the_separate_kernels(num_tokens, n):
    gates.check_at_once(num_tokens, n, "cuda")


@pytest.mark.parametrize(
    "options",
    [
        {"tf32": True},
        {"sinkhorn_repeat": 1},
        {"sinkhorn_repeat": 32},
        {"sinkhorn_repeat": 2, "pre_eps": 0.25, "post_mult": 2.0, "sinkhorn_eps": 1e-2},
    ],
    ids=str,
)
def test_same_bits_with_options(options):
    gates.check_at_once(300, 4, "cuda", **options)


def test_same_bits_with_bfloat16_parameters():
    gates.check_at_once(300, 4, "cuda", torch.bfloat16)
