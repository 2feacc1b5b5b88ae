import dataclasses

import pytest
import torch

import oracle
import tolerances
from cases import CONTRACT, FUSED_PRE, PROJECTION, Case, few_streams, streams
from tile_mhc import config, projection, reference


def check(case, tensors, **options):
    """`num_splits` is not an argument of the reference: bind it to our side alone."""

    def run(**arguments):
        return projection(**arguments, **options)

    oracle.check(dataclasses.replace(PROJECTION, run=run), case, tensors, {})


@streams
def test_projection(case):
    oracle.check(PROJECTION, case, *PROJECTION.inputs(*case.shape, "cuda"))


@few_streams
def test_without_norm_weight(case):
    tensors, options = PROJECTION.inputs(*case.shape, "cuda")
    del tensors["norm_weight"]
    oracle.check(PROJECTION, case, tensors, options)


@pytest.mark.parametrize(("num_streams", "hidden_size"), [(2, 64), (4, 1280), (8, 128)])
def test_head_weight(num_streams, hidden_size):
    """n rows in place of n * (n + 2): padded to a tile of 8."""
    tensors, options = PROJECTION.inputs((65,), num_streams, hidden_size, "cuda")
    tensors["weight"] = tensors["weight"][:num_streams].contiguous()
    case = Case(65, num_streams, hidden_size, "the weight of the head")
    oracle.check(PROJECTION, case, tensors, options)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 128, 257, 1000, 2112, 8448, 17000])
def test_every_number_of_splits(num_tokens):
    """From as many slices of K as there are, at one token, down to a single one."""
    tensors, options = PROJECTION.inputs((num_tokens,), 4, 1280, "cuda")
    case = Case(num_tokens, 4, 1280, "splits follow from T")
    oracle.check(PROJECTION, case, tensors, options)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 1000])
def test_capped_splits(num_splits):
    tensors, _ = PROJECTION.inputs((130,), 4, 1280, "cuda")
    check(Case(130, 4, 1280, "a cap on the splits"), tensors, num_splits=num_splits)


@pytest.mark.parametrize("norm_eps", [0.0, 1e-6, 1.0])
def test_norm_eps(norm_eps):
    tensors, _ = PROJECTION.inputs((65,), 4, 192, "cuda")
    case = Case(65, 4, 192, "eps of the norm")
    oracle.check(PROJECTION, case, tensors, {"norm_eps": norm_eps})


def test_fewer_sms():
    tensors, _ = PROJECTION.inputs((130,), 4, 1280, "cuda")
    try:
        config.set_num_sms(7)
        check(Case(130, 4, 1280, "SMs left to others"), tensors)
    finally:
        config.set_num_sms(0)


@pytest.mark.parametrize("bad", [-1, 10**6, 1.0, True], ids=repr)
def test_bad_num_sms(bad):
    with pytest.raises(ValueError, match=r"set_num_sms: num_sms must be from 0 to \d+; got"):
        config.set_num_sms(bad)


@pytest.fixture
def batch_invariant():
    config.set_batch_invariant(True)
    yield
    config.set_batch_invariant(False)


def token_alone(op, inputs, by_token):
    """The first results of a batch, and of its first token as a batch of one."""
    tensors, options = inputs
    alone = {k: v[:1].contiguous() if k in by_token else v for k, v in tensors.items()}
    batch, single = op(**tensors, **options), op(**alone, **options)
    as_tuple = [out if isinstance(out, tuple) else (out,) for out in (batch, single)]
    return [(many[:1], one) for many, one in zip(*as_tuple, strict=True)]


@pytest.mark.parametrize("num_sms", [0, 7])
@pytest.mark.parametrize("num_tokens", [65, 4096])
def test_batch_invariant(batch_invariant, num_tokens, num_sms):
    try:
        for op in (PROJECTION, FUSED_PRE, CONTRACT):
            inputs = op.inputs((num_tokens,), 4, 2560, "cuda")
            for many, one in token_alone(op.run, inputs, {"residual"}):
                assert torch.equal(many, one), op.name
            config.set_num_sms(num_sms)
    finally:
        config.set_num_sms(0)


def test_only_that_mode_is_batch_invariant():
    inputs = PROJECTION.inputs((4096,), 4, 2560, "cuda")
    tensors, _ = inputs
    alone = [PROJECTION.run(tensors["residual"][t : t + 1], tensors["weight"]) for t in range(64)]
    together = PROJECTION.run(tensors["residual"], tensors["weight"])
    assert not torch.equal(together[:64], torch.cat(alone)), "else the test above shows nothing"


def test_batch_invariant_results_are_right(batch_invariant):
    tensors, _ = PROJECTION.inputs((130,), 4, 1280, "cuda")
    check(Case(130, 4, 1280, "the split of the batch-invariant mode"), tensors)
    check(Case(130, 4, 1280, "and a cap on it"), tensors, num_splits=2)


@pytest.mark.parametrize("num_splits", [None, 1])
def test_same_bits_every_run(num_splits):
    def run(**arguments):
        return projection(**arguments, num_splits=num_splits)

    op = dataclasses.replace(PROJECTION, run=run)
    oracle.check_repeatable(op, *PROJECTION.inputs((130,), 4, 1280, "cuda"))


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(PROJECTION, *PROJECTION.inputs((130,), 4, 1280, "cuda"), "residual")


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (2, 3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    case = Case(0, 4, 192, "any leading dimensions")
    oracle.check(PROJECTION, case, *PROJECTION.inputs(lead, 4, 192, "cuda"))


def test_strided_parameters():
    tensors, options = PROJECTION.inputs((65,), 4, 192, "cuda")
    tensors["weight"] = tensors["weight"].mT.contiguous().mT
    tensors["norm_weight"] = torch.rand(2 * 4 * 192, device="cuda")[::2]
    oracle.check(PROJECTION, Case(65, 4, 192, "parameters in any layout"), tensors, options)


@pytest.mark.parametrize("value", [0.0, 3e38, 1e30, 1e19, 1e-30, 1e-38], ids=str)
def test_one_size_of_residual(value):
    """Sums of squares that float32 cannot hold, and those it rounds to zero."""
    tensors, options = PROJECTION.inputs((13,), 4, 1280, "cuda")
    tensors["residual"] = (tensors["residual"].sign() * value).bfloat16()
    case = Case(13, 4, 1280, "values of any size")
    oracle.check(PROJECTION, case, tensors, options)


def test_sizes_of_residual_side_by_side():
    """A token near the bfloat16 maximum does not change its neighbours' results."""
    tensors, options = PROJECTION.inputs((65,), 4, 1280, "cuda")
    sizes = torch.tensor([1.0, 3e37, 1e-20, 0.0, 1e15], device="cuda").repeat(13)
    tensors["residual"] *= sizes[:, None, None]
    with torch.no_grad():
        ours = projection(**tensors, **options)
        plain = reference.projection(**tensors)
        truth = reference.projection(**{name: t.double() for name, t in tensors.items()})
    for token in range(5):
        rows = slice(token, None, 5)
        oracle.check_tensor("projection", "out", ours[rows], plain[rows], truth[rows], {})


def tf32_reference(residual, weight, grad, norm_weight=None):
    """Outputs and gradients in TF32: the closed form, as autograd would not round the gradient."""
    mixes, inv_rms = reference.projection_with_rms(residual, weight, norm_weight, 1e-6, True)
    grads = reference.projection_backward(
        grad, residual, weight, norm_weight, mixes, inv_rms, tf32=True
    )
    names = ("residual", "weight", "norm_weight")[: 2 if norm_weight is None else 3]
    return {"out": mixes} | {f"grad_{name}": g for name, g in zip(names, grads, strict=False)}


def check_tf32(case, tensors):
    grad = torch.randn(*tensors["residual"].shape[:-2], tensors["weight"].shape[0], device="cuda")
    ours = oracle.evaluate(projection, tensors, {"tf32": True}, [grad], ["out"])
    plain = tf32_reference(**tensors, grad=grad)
    truth = tf32_reference(**{n: t.double() for n, t in tensors.items()}, grad=grad.double())
    # The norm of a few flipped roundings is chance: the bars need many.
    bars = tolerances.PROMISED if case.num_tokens >= 1000 else {}
    for name, value in ours.items():
        oracle.check_tensor("projection_tf32", name, value, plain[name], truth[name], bars)
    return ours, grad


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm_weight"])
@pytest.mark.parametrize(
    "case",
    [
        Case(13, 4, 192, "a ragged tile"),
        Case(64, 2, 64, "fewest streams"),
        Case(1000, 8, 128, "most streams"),
        Case(4096, 4, 1280, "many tokens"),
        Case(4096, 4, 2560, "where TileKernels' error was measured"),
    ],
    ids=str,
)
def test_tf32(case, norm):
    tensors, _ = PROJECTION.inputs(*case.shape, "cuda")
    if not norm:
        del tensors["norm_weight"]
    ours, grad = check_tf32(case, tensors)
    native = oracle.evaluate(projection, tensors, {}, [grad], ["out"])
    for name in ("out", "grad_weight"):
        assert oracle.relative_error(ours[name], native[name].double()) > 5e-5, "it rounds nothing"


def test_tf32_of_the_head_weight():
    tensors, _ = PROJECTION.inputs((130,), 4, 1280, "cuda")
    tensors["weight"] = tensors["weight"][:4].contiguous()
    check_tf32(Case(130, 4, 1280, "n rows"), tensors)


def test_tf32_of_extreme_weights():
    """Infinity stays one, NaN too, and the largest finite weights round to infinity or not at all:
    the same as the reference, in their own column of the mixes alone."""
    tensors, _ = PROJECTION.inputs((13,), 4, 192, "cuda")
    del tensors["norm_weight"]
    tensors["residual"] = tensors["residual"].abs() + 1
    clean = projection(**tensors, tf32=True)
    tensors["weight"][3, 5] = torch.inf
    tensors["weight"][4, 5] = torch.nan
    dirty = projection(**tensors, tf32=True)
    others = [m for m in range(24) if m not in (3, 4)]
    assert torch.equal(dirty[:, others], clean[:, others])
    assert not dirty[:, 3:5].isfinite().any()


@pytest.mark.parametrize("wanted", ["residual", "weight", "norm_weight"])
def test_one_gradient_alone(wanted):
    tensors, _ = PROJECTION.inputs((65,), 4, 192, "cuda")
    grad = torch.randn(65, 24, device="cuda")
    every = oracle.evaluate(projection, tensors, {}, [grad], ["out"])
    tensors[wanted].requires_grad_()
    projection(**tensors).backward(grad)
    assert torch.equal(tensors[wanted].grad, every[f"grad_{wanted}"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)
