import oracle
import saturation
from cases import mixes
from te_cases import DTYPES, dtypes, op_of


@mixes
@dtypes
def test_scale(case, dtypes):
    op = op_of("scale", dtypes)
    oracle.check(op, case, *op.inputs(*case.shape, "cuda"))


def test_same_bits_every_run():
    op = op_of("scale", DTYPES[2])
    oracle.check_repeatable(op, *op.inputs((4097,), 4, 64, "cuda"))


def test_nonfinite_stays_in_its_token():
    op = op_of("scale", DTYPES[2])
    oracle.check_isolation(op, *op.inputs((65,), 4, 64, "cuda"), "ms")


def test_gradients_of_saturated_gates():
    saturation.check_padded_mixes("cuda")
