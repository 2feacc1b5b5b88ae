import pytest

import gates
import oracle
import saturation
from cases import HEAD_MIX, mixes


@mixes
def test_mixes(case):
    oracle.check(HEAD_MIX, case, *HEAD_MIX.inputs(*case.shape, "cuda"))


def test_same_bits_every_run():
    gates.check_repeatable(HEAD_MIX)


def test_nonfinite_stays_in_its_token():
    gates.check_isolation(HEAD_MIX)


@pytest.mark.parametrize("lead", gates.LEADS, ids=str)
def test_leading_dimensions(lead):
    gates.check_lead(HEAD_MIX, lead)


def test_strided():
    gates.check_strided(HEAD_MIX)


@pytest.mark.parametrize("size", gates.SIZES, ids=str)
def test_extreme_mixes(size):
    gates.check_extreme(HEAD_MIX, size)


def test_gradients_of_saturated_gates():
    saturation.check_head_mix("cuda")
