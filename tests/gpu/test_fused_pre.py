import pytest
import torch

import far_apart
import oracle
import saturation
from cases import FUSED_PRE, PRE_OUTPUTS, Case, streams
from tile_mhc import aggregate, fused_pre, projection, reference, selection, sinkhorn, split_mixes


def unfused(residual, weight, scale, bias, num_splits, options, norm_weight=None, tf32=False):
    mixes = projection(residual, weight, norm_weight=norm_weight, num_splits=num_splits, tf32=tf32)
    pre_mix, post_mix, logits = split_mixes(
        mixes, scale, bias, num_streams=residual.shape[-2], post_mult=options["post_mult"]
    )
    eps = options.get("sinkhorn_eps", 1e-6)
    comb_mix = sinkhorn(logits, repeat=options["sinkhorn_repeat"], eps=eps)
    return aggregate(residual, pre_mix), post_mix, comb_mix


def named(outputs):
    return dict(zip(PRE_OUTPUTS, outputs, strict=True))


def check_bits(tensors, options, num_splits, tf32=False):
    """Of few tokens with a given number of splits: else their sums have another order."""
    fused = fused_pre(**tensors, **options, num_splits=num_splits, tf32=tf32)
    separate = unfused(**tensors, num_splits=num_splits, options=options, tf32=tf32)
    oracle.check_same_bits(named(fused), named(separate), "fused_pre and the four ops:")


@streams
def test_against_float64(case):
    """Outputs and gradients; a comb_mix, too, has the 1e-6 of its logits."""
    oracle.check(FUSED_PRE, case, *FUSED_PRE.inputs(*case.shape, "cuda"))


# The gradient of the aggregate joins that of the projection by pieces of 64 columns, in blocks of
# 128 (of 64 with eight streams): an H of 64 or 192 puts two streams into one block.
EDGES = pytest.mark.parametrize(
    ("num_streams", "hidden_size"), [(2, 64), (4, 64), (4, 192), (8, 128)]
)


@EDGES
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm_weight"])
@pytest.mark.parametrize("num_tokens", [1, 13, 130, 700])
def test_gradients_where_blocks_straddle_streams(num_tokens, num_streams, hidden_size, norm):
    tensors, options = FUSED_PRE.inputs((num_tokens,), num_streams, hidden_size, "cuda")
    if not norm:
        del tensors["norm_weight"]
    case = Case(num_tokens, num_streams, hidden_size, "blocks straddle streams")
    oracle.check(FUSED_PRE, case, tensors, options)


@EDGES
def test_gradient_of_the_aggregate_alone(num_streams, hidden_size):
    """With a weight of zero the residual's gradient is pre_mix * grad: the bits of aggregate's."""
    tensors, options = FUSED_PRE.inputs((130,), num_streams, hidden_size, "cuda")
    tensors["weight"].zero_()
    grad = torch.randn(130, hidden_size, device="cuda").bfloat16()
    residual = tensors["residual"].requires_grad_()
    (ours,) = torch.autograd.grad(fused_pre(**tensors, **options)[0], residual, grad)
    pre_mix = (tensors["bias"][:num_streams].sigmoid() + 1e-6).expand(130, -1).contiguous()
    (other,) = torch.autograd.grad(aggregate(residual, pre_mix), residual, grad)
    differ = (ours != other).float().mean()
    assert differ < 1e-3, "torch's sigmoid may differ in its last bit, and rarely turn a rounding"


def parameter_gradients(function, tensors, upstream):
    names = [name for name in tensors if name != "residual"]
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves)
    grads = torch.autograd.grad(outputs, [leaves[name] for name in names], upstream)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("shape", [(1000, 4, 192), (130, 4, 1280), (1000, 8, 128)], ids=str)
def test_gradients_are_those_of_the_four_ops(shape, tf32):
    """Of the parameters: nothing is rounded on the way, and all but the order of sums is shared."""
    num_tokens, num_streams, hidden_size = shape
    tensors, options = FUSED_PRE.inputs((num_tokens,), num_streams, hidden_size, "cuda")
    upstream = oracle.upstream_of(FUSED_PRE, tensors, options)

    def fused(**leaves):
        return fused_pre(**leaves, **options, tf32=tf32)

    def separate(**leaves):
        return unfused(**leaves, num_splits=None, options=options, tf32=tf32)

    ours = parameter_gradients(fused, tensors, upstream)
    others = parameter_gradients(separate, tensors, upstream)
    _, terms = oracle.terms_of(FUSED_PRE, tensors, options, upstream)
    for name, value in ours.items():
        error = oracle.relative_error(value, others[name].double(), terms.get(f"grad_{name}"))
        assert error < (2e-5 if tf32 else 2e-6), f"{name}: {error:.3e}"


@pytest.mark.parametrize("num_tokens", [13, 1000])
def test_tf32(num_tokens):
    """The outputs are those of a weight that has been rounded before, bit for bit."""
    tensors, options = FUSED_PRE.inputs((num_tokens,), 4, 1280, "cuda")
    check_bits(tensors, options, 4, tf32=True)
    del tensors["norm_weight"]
    rounded = tensors | {"weight": reference.round_to_tf32(tensors["weight"])}
    ours = named(fused_pre(**tensors, **options, tf32=True))
    oracle.check_same_bits(ours, named(fused_pre(**rounded, **options)), "tf32 and rounded:")
    native = fused_pre(**tensors, **options)[2]
    assert 1e-6 < oracle.relative_error(ours["comb_mix"], native.double()) < 1e-3


@pytest.mark.parametrize("value", [0.0, 1e35, 1e25, 1e19, 1e-19, 1e-38], ids=str)
def test_gradients_of_an_extreme_residual(value):
    """The gradient of pre_mix grows with the residual, and so does that of the bare product."""
    tensors, options = FUSED_PRE.inputs((13,), 4, 1280, "cuda")
    tensors["residual"] = (tensors["residual"].sign() * value).bfloat16()
    case = Case(13, 4, 1280, "values of any size")
    oracle.check(FUSED_PRE, case, tensors, options)


@pytest.mark.parametrize("wanted", ["residual", "weight", "norm_weight", "scale", "bias"])
def test_one_gradient_alone(wanted):
    tensors, options = FUSED_PRE.inputs((65,), 4, 192, "cuda")
    upstream = oracle.upstream_of(FUSED_PRE, tensors, options)
    every = oracle.evaluate(fused_pre, tensors, options, upstream, PRE_OUTPUTS)
    tensors[wanted].requires_grad_()
    outputs = fused_pre(**tensors, **options)
    pairs = [p for p in zip(outputs, upstream, strict=True) if p[0].requires_grad]
    torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])
    assert torch.equal(tensors[wanted].grad, every[f"grad_{wanted}"])
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


def test_strided_gradients():
    tensors, options = FUSED_PRE.inputs((65,), 4, 192, "cuda")
    upstream = oracle.upstream_of(FUSED_PRE, tensors, options)
    expected = oracle.evaluate(fused_pre, tensors, options, upstream, PRE_OUTPUTS)
    spread = [torch.stack((grad, grad), -1)[..., 0] for grad in upstream]
    ours = oracle.evaluate(fused_pre, tensors, options, spread, PRE_OUTPUTS)
    oracle.check_same_bits(ours, expected, "fused_pre, strided gradients:")


@streams
def test_same_bits_as_the_ops(case):
    """By themselves where both split the projection alike; in one pass, and of few tokens, the sums
    have another order."""
    tensors, options = FUSED_PRE.inputs(*case.shape, "cuda")
    dtype, (num_tokens, n, hidden_size) = tensors["residual"].dtype, tensors["residual"].shape
    of_pass = (dtype, num_tokens, n, hidden_size, None)
    once = selection.pre_reads_once(*of_pass, has_post=False, delayed=False)
    few = selection.is_one_pass(dtype, n, hidden_size, None) and selection.is_few(num_tokens)
    check_bits(tensors, options, 4 if once or few else None)


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 130, 1000])
@pytest.mark.parametrize("num_splits", [1, 2, 7, 1000])
def test_same_bits_for_any_split(num_tokens, num_splits):
    tensors, options = FUSED_PRE.inputs((num_tokens,), 4, 1280, "cuda")
    check_bits(tensors, options, num_splits)


@pytest.mark.parametrize("repeat", [1, 2, 10])
def test_same_bits_without_norm_weight(repeat):
    tensors, options = FUSED_PRE.inputs((130,), 4, 1280, "cuda")
    tensors["norm_weight"] = None
    check_bits(tensors, options | {"sinkhorn_repeat": repeat}, None)


def test_gradients_on_or_off():
    """The same bits, whether a gradient is wanted or not."""
    tensors, options = FUSED_PRE.inputs((130,), 4, 1280, "cuda")
    off = fused_pre(**tensors, **options)
    on = fused_pre(**{name: t.requires_grad_() for name, t in tensors.items()}, **options)
    assert all(out.requires_grad for out in on)
    on = [out.detach() for out in on]
    oracle.check_same_bits(named(on), named(off), "fused_pre with and without gradients:")


@pytest.mark.parametrize("num_tokens", [130, 4096])
def test_same_bits_every_run(num_tokens):
    oracle.check_repeatable(FUSED_PRE, *FUSED_PRE.inputs((num_tokens,), 4, 1280, "cuda"))


def test_nonfinite_stays_in_its_token():
    oracle.check_isolation(FUSED_PRE, *FUSED_PRE.inputs((130,), 4, 1280, "cuda"), "residual")


@pytest.mark.parametrize("value", [0.0, 1e38, 1e19, 1e-38], ids=str)
def test_extreme_residual(value):
    tensors, options = FUSED_PRE.inputs((13,), 4, 1280, "cuda")
    tensors["residual"] = (tensors["residual"].sign() * value).bfloat16()
    tensors["bias"][:4] = -3.0  # pre_mix below 1/4 or so: the sum stays within bfloat16
    tensors["scale"] *= 0.01
    check_bits(tensors, options, 4)
    assert all(out.isfinite().all() for out in fused_pre(**tensors, **options))


@pytest.mark.parametrize("lead", [(), (1,), (3, 5), (1, 2, 3, 5)], ids=str)
def test_leading_dimensions(lead):
    tensors, options = FUSED_PRE.inputs(lead, 4, 192, "cuda")
    check_bits(tensors, options, 4)
    assert fused_pre(**tensors, **options)[2].shape == (*lead, 4, 4)
    oracle.check(FUSED_PRE, Case(0, 4, 192, "any leading dimensions"), tensors, options)


def test_against_float64_with_other_options():
    tensors, _ = FUSED_PRE.inputs((65,), 4, 192, "cuda")
    options = {
        "norm_eps": 0.5,
        "pre_eps": 0.25,
        "sinkhorn_eps": 0.125,
        "post_mult": 3.0,
        "sinkhorn_repeat": 3,
    }
    case = Case(65, 4, 192, "every option away from its default")
    oracle.check(FUSED_PRE, case, tensors, options)


def test_gradients_of_saturated_gates():
    saturation.check_fused_pre("cuda")


@pytest.mark.parametrize("shape", [(13, 4, 192), (1000, 4, 1280), (130, 2, 192), (65, 8, 128)])
def test_without_eps_of_sinkhorn(shape):
    far_apart.check_fused_pre(shape, "cuda")
    tensors, options = FUSED_PRE.inputs(shape[:1], *shape[1:], "cuda")
    check_bits(tensors, options | {"sinkhorn_eps": 0.0}, 4)
