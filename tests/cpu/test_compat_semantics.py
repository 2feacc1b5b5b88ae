"""What the TileKernels names compute, and that none of TileKernels' defects B1 to B7 came along.

tests/gpu/test_compat.py runs the same tests on the kernels.
"""

import pytest
import torch
from torch import Tensor

import tile_mhc
from tile_mhc import ShapeError, UnsupportedError, jit, reference
from tile_mhc.compat.tile_kernels.mhc.expand_kernel import (
    expand_to_mhc_bwd_tl,
    expand_to_mhc_fwd_tl,
)
from tile_mhc.compat.tile_kernels.mhc.norm_fn_kernel import round_to_tf32
from tile_mhc.compat.tile_kernels.modeling import mhc
from tile_mhc.compat.tile_kernels.modeling.mhc import functional as functional_module
from tile_mhc.compat.tile_kernels.modeling.mhc import ops
from tile_mhc.compat.tile_kernels.modeling.mhc.ops import norm_fn as norm_fn_module
from tile_mhc.compat.tile_kernels.modeling.mhc.ops import pre_big_fuse as big_fuse_module
from tile_mhc.compat.tile_kernels.torch import mhc as references
from tile_mhc.ops import recompute as recompute_module

HIDDEN = 128
STREAMS = (2, 4, 8)
# Two or three bfloat16 roundings of 1.7e-3 each; a lost or doubled term is off by 30 % or more.
BF16_SUM = 1e-2
# A product whose weight is rounded to TF32; the names of TileKernels compute so.
TF32 = 2.0**-11 / 3**0.5


@pytest.fixture
def device() -> str:
    return "cpu"


Lead = tuple[int, ...]


def streams(device: str, n: int = 4, lead: Lead = (2, 5), hidden: int = HIDDEN) -> Tensor:
    return torch.randn(*lead, n, hidden, device=device, dtype=torch.bfloat16)


def block(device: str, n: int = 4, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    """fn, scale and base of a sub-layer."""
    rows, size = n * (n + 2), n * hidden
    fn = torch.randn(rows, size, device=device) * size**-0.5
    return fn, torch.randn(3, device=device), torch.randn(rows, device=device)


def norm_weights(device: str, n: int = 4, hidden: int = HIDDEN) -> Tensor:
    return torch.rand(n * hidden, device=device) + 0.5


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def relative(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


# Shapes


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0, 4)], ids=str)
def test_pre_takes_any_leading_dimensions(device, n, lead):
    residual, (fn, scale, base) = streams(device, n, lead), block(device, n)
    layer_input, (post_mix, comb_mix) = mhc.mhc_pre(residual, fn, scale, base, mhc_mult=n)
    assert layer_input.shape == (*lead, HIDDEN)
    assert post_mix.shape == (*lead, n, 1)
    assert comb_mix.shape == (*lead, n, n)
    out = ops.mhc_post(layer_input, residual, post_mix, comb_mix)
    assert out.shape == residual.shape
    assert torch.equal(out, tile_mhc.post(layer_input, residual, post_mix, comb_mix))


def test_mixes_have_a_last_axis_of_one(device):
    _, scale, base = block(device)
    mixes = torch.randn(2, 5, 24, device=device)
    pre, post, comb = ops.mhc_pre_split_mixes(mixes, scale, base, 4, 2.0, 1e-2)
    ours = tile_mhc.split_mixes(mixes, scale, base, num_streams=4, post_mult=2.0, pre_eps=1e-2)
    assert pre.shape == post.shape == (2, 5, 4, 1)
    for compat, plain in zip((pre.squeeze(-1), post.squeeze(-1), comb), ours, strict=True):
        assert torch.equal(compat, plain)


def test_strided_inputs_that_tile_kernels_copies(device):
    residual = streams(device).transpose(0, 1)
    x = streams(device, 1, (5, 2)).squeeze(-2)
    post_mix, comb = torch.rand(5, 2, 4, 1, device=device), torch.rand(5, 2, 4, 4, device=device)
    wanted, strided = leaf(residual.contiguous()), leaf(residual)  # clone keeps the strides
    assert not strided.is_contiguous()
    outs = [ops.mhc_post(x, r, post_mix, comb) for r in (wanted, strided)]
    assert torch.equal(*outs)
    grad = torch.randn_like(outs[0])
    torch.autograd.backward(outs, [grad, grad])
    assert torch.equal(wanted.grad, strided.grad)

    logits = torch.randn(2, 5, 4, 4, device=device).mT
    assert torch.equal(ops.sinkhorn_normalize(logits), ops.sinkhorn_normalize(logits.contiguous()))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_fused_pre_equals_the_chain(device, requires_grad, with_weight):
    """Bit for bit, as TileKernels' own test asks; B2 is the case with a norm weight."""
    residual, (fn, scale, base) = streams(device), block(device)
    norm_weight = norm_weights(device) if with_weight else None
    if requires_grad:
        residual, fn, scale, base = map(leaf, (residual, fn, scale, base))
    options = {"norm_weight": norm_weight, "post_mult_value": 2.0, "sinkhorn_repeat": 20}

    def run():
        layer_input, mixes = mhc.mhc_pre(residual, fn, scale, base, **options)
        return layer_input, *mixes

    with torch.no_grad():
        fused = run()
    mixes = ops.mhc_pre_norm_fn(residual, fn, norm_weight, 1e-6, False, 16)
    pre, post, logits = ops.mhc_pre_split_mixes(mixes, scale, base, 4, 2.0, 1e-6)
    chain = ops.mhc_pre_apply_mix(residual, pre), post, ops.sinkhorn_normalize(logits, 20)
    for a, b, c in zip(fused, chain, run(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_big_fuse_builds_no_graph(device):
    residual, (fn, scale, base) = leaf(streams(device)), map(leaf, block(device))
    arguments = residual, fn, scale, base, 1e-6, 1e-6, 1e-6, 2.0, 20
    post_mix, comb_mix, layer_input = ops.mhc_pre_big_fuse(*arguments)
    wanted, (wanted_post, wanted_comb) = mhc.mhc_pre(
        residual, fn, scale, base, post_mult_value=2.0, sinkhorn_repeat=20
    )
    assert not any(t.requires_grad for t in (post_mix, comb_mix, layer_input))
    assert torch.equal(layer_input, wanted)
    assert torch.equal(post_mix, wanted_post)
    assert torch.equal(comb_mix, wanted_comb)


# B1: the head


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("rows", ["n", "n*(n+2)"])
@pytest.mark.parametrize("scalar", [False, True])
def test_head_forward_and_backward(device, n, rows, scalar):
    residual, (fn, _, _) = streams(device, n), block(device, n)
    few = fn[:n].clone()
    fn = few if rows == "n" else fn
    scale = torch.tensor(0.7, device=device) if scalar else torch.tensor([0.7], device=device)
    inputs = [leaf(t) for t in (residual, fn, scale, torch.randn(n, device=device))]
    plain = [leaf(t) for t in (residual, few, scale.reshape(1), inputs[3])]
    out = mhc.mhc_head(*inputs, mhc_mult=n)
    wanted = tile_mhc.contract(*plain, tf32=True)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    if torch.device(device).type == "cpu":
        assert torch.equal(out, wanted)
    else:  # n_splits=16 caps what contract chooses freely: other partial sums, other last bits
        assert relative(out, wanted) < BF16_SUM
    assert relative(inputs[0].grad, plain[0].grad) < BF16_SUM
    assert relative(inputs[1].grad[:n], plain[1].grad) < 1e-3
    assert not inputs[1].grad[n:].any()
    assert inputs[2].grad.shape == scale.shape
    assert relative(inputs[2].grad.reshape(1), plain[2].grad) < 1e-3
    assert relative(inputs[3].grad, plain[3].grad) < 1e-3


def test_head_takes_a_norm_weight(device):
    residual, (fn, _, _) = streams(device), block(device)
    scale, base = torch.ones(1, device=device), torch.zeros(4, device=device)
    weight = norm_weights(device)
    out = mhc.mhc_head(residual, fn[:4].clone(), scale, base, norm_weight=weight)
    folded = mhc.mhc_head(residual, fn[:4] * weight, scale, base)
    without = mhc.mhc_head(residual, fn[:4].clone(), scale, base)
    assert relative(out, folded) < BF16_SUM
    assert relative(out, without) > BF16_SUM


# B2: norm_weight without a gradient


def test_norm_weight_counts_without_a_gradient(device):
    residual, (fn, scale, base) = streams(device), block(device)
    weight = norm_weights(device)
    with torch.no_grad():
        off, _ = mhc.mhc_pre(residual, fn, scale, base, norm_weight=weight)
        without, _ = mhc.mhc_pre(residual, fn, scale, base)
    on, _ = mhc.mhc_pre(residual, leaf(fn), scale, base, norm_weight=weight)
    assert torch.equal(off, on)
    assert relative(off, without) > BF16_SUM


# B3: a second consumer of the residual


def test_gradients_beside_other_consumers(device):
    residual, (fn, scale, base) = streams(device), block(device)
    grad, extra = torch.randn_like(residual), torch.randn_like(residual)

    def sub_layer(x, fn, scale, base, pre, post):
        layer_input, post_mix, comb_mix = pre(x, fn, scale, base)
        out = post(layer_input * 0.5, x, post_mix, comb_mix)
        return (out * grad).sum() + (x * extra).sum() + (x * x).sum()

    def compat_pre(*inputs):
        layer_input, mixes = mhc.mhc_pre(*inputs)
        return layer_input, *mixes

    ours = [leaf(t) for t in (residual, fn, scale, base)]
    sub_layer(*ours, compat_pre, ops.mhc_post).backward()
    truth = [leaf(t.double()) for t in (residual, fn, scale, base)]
    sub_layer(*truth, reference.fused_pre, reference.post).backward()
    for one, exact in zip(ours, truth, strict=True):
        assert relative(one.grad, exact.grad) < BF16_SUM
    assert not hasattr(storage(ours[0]), "grad_from_mhc_post")


# The accumulation protocol, and B4: a posted gradient is never overwritten


def apply_mix(residual):
    mix = torch.linspace(0.1, 1, 4, device=residual.device).expand(*residual.shape[:-1])
    return ops.mhc_pre_apply_mix(residual, mix.unsqueeze(-1))


def pre(residual):
    fn, scale, base = (torch.linspace(-1, 1, n, device=residual.device) for n in (24 * 512, 3, 24))
    return mhc.mhc_pre(residual, fn.view(24, 512), scale, base)[0]


def norm_fn(residual, fuse_grad_acc=True):
    size = residual[0, 0].numel()
    fn = torch.linspace(-1, 1, 24 * size, device=residual.device).view(24, size)
    return ops.mhc_pre_norm_fn(residual, fn, None, 1e-6, fuse_grad_acc)


@pytest.mark.parametrize("function", [apply_mix, norm_fn, pre])
def test_posted_gradient_is_added_to(device, function):
    residual = streams(device)
    plain, fused = leaf(residual), leaf(residual)
    out = function(plain)
    grad = torch.randn_like(out)
    out.backward(grad)

    before = torch.randn_like(residual)
    posted = storage(fused).grad_from_mhc_post = before.clone()
    function(fused).backward(grad)
    assert fused.grad is None
    assert torch.equal(posted, before + plain.grad)
    assert hasattr(storage(fused), "grad_from_mhc_post") is (function is apply_mix)


def test_posted_after_the_forward_and_flat(device):
    """TileKernels looks in the backward, and takes any shape of the right size."""
    residual = leaf(streams(device))
    out = apply_mix(residual)
    posted = storage(residual).grad_from_mhc_post = torch.zeros_like(residual).view(-1, HIDDEN)
    out.sum().backward()
    assert residual.grad is None
    assert posted.any()


def test_norm_fn_can_leave_a_posted_gradient_alone(device):
    residual = leaf(streams(device))
    posted = storage(residual).grad_from_mhc_post = torch.zeros_like(residual)
    norm_fn(residual, fuse_grad_acc=False).sum().backward()
    assert residual.grad.any()
    assert not posted.any()
    assert storage(residual).grad_from_mhc_post is posted


@pytest.mark.parametrize("function", [apply_mix, norm_fn, pre])
def test_posted_gradient_must_fit(device, function):
    residual = leaf(streams(device))
    storage(residual).grad_from_mhc_post = torch.zeros(3, device=device, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"grad_from_mhc_post must hold 5120 elements.*got \(3,\)"):
        function(residual).sum().backward()
    storage(residual).grad_from_mhc_post = torch.zeros(residual.shape, device=device)
    with pytest.raises(ShapeError, match=r"must be contiguous bfloat16; got .* float32"):
        function(residual).sum().backward()
    storage(residual).grad_from_mhc_post = "grad"
    with pytest.raises(ShapeError, match=r"must be a torch\.Tensor; got str"):
        function(residual).sum().backward()


def post_inputs(device, n=4):
    residual = streams(device, n)
    x = torch.randn(2, 5, HIDDEN, device=device, dtype=torch.bfloat16)
    post_mix = torch.rand(2, 5, n, 1, device=device)
    return x, residual, post_mix, torch.rand(2, 5, n, n, device=device)


@pytest.mark.parametrize("n", STREAMS)
def test_post_bwd_is_the_gradient(device, n):
    inputs = post_inputs(device, n)
    leaves = [leaf(t) for t in inputs]
    out = ops.mhc_post(*leaves)
    assert torch.equal(out, ops.mhc_post_fwd(*inputs))
    grad = torch.randn_like(out)
    out.backward(grad)
    assert not hasattr(storage(leaves[1]), "grad_from_mhc_post")
    strided = grad.transpose(0, 1).contiguous().transpose(0, 1)
    grads = ops.mhc_post_bwd(*inputs, strided, fuse_grad_acc=False)
    assert not hasattr(storage(inputs[1]), "grad_from_mhc_post")
    for grad_, leaf_ in zip(grads, leaves, strict=True):
        assert torch.equal(grad_, leaf_.grad)


def test_post_bwd_posts_and_never_overwrites(device):
    """B4, and a whole sub-layer of the hand-written backward that the protocol exists for."""
    x, residual, post_mix, comb_mix = post_inputs(device)
    grad = torch.randn_like(residual)
    fused = leaf(residual)
    layer_input, mixes = apply_mix(fused), norm_fn(fused)
    grad_input, grad_mixes = torch.randn_like(layer_input), torch.randn_like(mixes)

    posted = ops.mhc_post_bwd(x, fused, post_mix, comb_mix, grad)[1]
    assert storage(fused).grad_from_mhc_post is posted
    before = posted.clone()
    with pytest.raises(ValueError, match=r"must hold no pending grad_from_mhc_post; got \(2, 5, 4"):
        ops.mhc_post_bwd(x, fused, post_mix, comb_mix, grad)
    assert torch.equal(posted, before)

    layer_input.backward(grad_input)
    mixes.backward(grad_mixes)
    assert fused.grad is None
    assert not hasattr(storage(fused), "grad_from_mhc_post")

    plain = leaf(residual)
    outputs = ops.mhc_post(x, plain, post_mix, comb_mix), apply_mix(plain), norm_fn(plain)
    torch.autograd.backward(outputs, (grad, grad_input, grad_mixes))
    assert relative(posted, plain.grad) < BF16_SUM


# B5: any n, n_splits and main_grad are honoured


@pytest.mark.parametrize("n", STREAMS)
def test_norm_fn_of_any_number_of_streams(device, n):
    residual, (fn, _, _) = streams(device, n), block(device, n)
    inputs = [leaf(t) for t in (residual, fn, norm_weights(device, n))]
    truth = [t.detach().double() for t in inputs]
    out = ops.mhc_pre_norm_fn(*inputs, 1e-6)
    exact, inv_rms = reference.projection_with_rms(*truth, 1e-6, tf32=True)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted = reference.projection_backward(grad.double(), *truth, exact, inv_rms, tf32=True)
    # Between TF32's own error and that of float32: a rounding of a gradient may go the other way.
    assert relative(out, exact) < TF32 / 10
    for one, exact_grad, bound in zip(inputs, wanted, (BF16_SUM, 1e-4, 1e-4), strict=True):
        assert relative(one.grad, exact_grad) < bound


def test_products_are_those_of_tf32(device):
    """As TileKernels multiplies; without the switch ours are a hundred times closer to exact."""
    residual, (fn, scale, base) = streams(device, lead=(64,)), block(device)
    rounded = round_to_tf32(fn)
    exact = reference.projection(residual.double(), rounded.double())
    out = ops.mhc_pre_norm_fn(residual, fn, None, 1e-6)
    assert relative(out, exact) < 1e-5
    assert relative(tile_mhc.projection(residual, fn), exact) > 1e-4
    # Every name does: the same as with a weight that needs no rounding.
    gates = scale[:1].clone(), base[:4].clone()
    pairs = [
        (mhc.mhc_head(residual, weight[:4].clone(), *gates), mhc.mhc_pre(residual, *parameters))
        for weight in (fn, rounded)
        for parameters in [(weight, scale, base)]
    ]
    (head, (layer_input, mixes)), (other_head, (other_input, other_mixes)) = pairs
    fused = [ops.mhc_pre_big_fuse(residual, w, scale, base, *[1e-6] * 3, 1.0, 10)[1]
             for w in (fn, rounded)]  # fmt: skip
    assert torch.equal(head, other_head)
    assert torch.equal(layer_input, other_input)
    assert torch.equal(mixes[1], other_mixes[1])
    assert torch.equal(*fused)


@pytest.mark.parametrize("n_splits", [1, 3, 16])
def test_n_splits_arrives(device, monkeypatch, n_splits):
    asked = []

    def projection(*args, **options):
        asked.append(options["num_splits"])
        return tile_mhc.projection(*args, **options)

    def fused_pre(*args, **options):
        asked.append(options["num_splits"])
        return tile_mhc.fused_pre(*args, **options)

    monkeypatch.setattr(norm_fn_module, "projection", projection)
    monkeypatch.setattr(functional_module, "fused_pre", fused_pre)
    monkeypatch.setattr(big_fuse_module, "fused_pre", fused_pre)
    residual, (fn, scale, base) = streams(device), block(device)
    mhc.mhc_pre(leaf(residual), fn, scale, base, n_splits=n_splits)
    mhc.mhc_head(residual, fn, scale[:1].clone(), base[:4].clone(), n_splits=n_splits)
    ops.mhc_pre_big_fuse(residual, fn, scale, base, *[1e-6] * 3, 1.0, 10, n_splits)
    assert asked == [n_splits] * 3
    with pytest.raises(ShapeError, match="num_splits must be an integer of at least 1; got 0"):
        mhc.mhc_pre(residual, fn, scale, base, n_splits=0)


@pytest.mark.parametrize("with_weight", [False, True])
def test_main_grad_of_every_parameter(device, with_weight):
    residual, (fn, scale, base) = streams(device), block(device)
    tensors = {"fn": fn, "scale": scale, "base": base}
    if with_weight:
        tensors["norm_weight"] = norm_weights(device)
    plain = {name: leaf(t) for name, t in tensors.items()}
    fused = {name: leaf(t) for name, t in tensors.items()}

    def loss(parameters):
        layer_input, (post_mix, comb_mix) = mhc.mhc_pre(residual, **parameters)
        return ops.mhc_post(layer_input, residual, post_mix, comb_mix).float().square().sum()

    loss(plain).backward()
    value = loss(fused)
    # Attached between forward and backward, as an optimizer that allocates lazily does.
    before = {}
    for name, parameter in fused.items():
        bucket = torch.randn(*parameter.shape, 2, device=device)
        parameter.main_grad = bucket[..., 0]
        before[name] = parameter.main_grad.clone()
    value.backward()
    for name, parameter in fused.items():
        assert parameter.grad is None
        assert plain[name].grad.any()
        assert torch.equal(parameter.main_grad, before[name] + plain[name].grad)


def test_main_grad_of_the_head(device):
    residual, (fn, _, _) = streams(device), block(device)
    tensors = fn, torch.ones(1, device=device), torch.randn(4, device=device)
    parameters, plain = [leaf(t) for t in tensors], [leaf(t) for t in tensors]
    for parameter in parameters:
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float64)
    for inputs in (parameters, plain):
        mhc.mhc_head(residual, *inputs).float().square().sum().backward()
    for parameter, wanted in zip(parameters, plain, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter.main_grad, wanted.grad.double())


def test_main_grad_under_megatron(device):
    """Where its DDP gave a flag, its hooks get a gradient, and know that it means nothing."""
    residual, (fn, _, _) = streams(device), block(device)
    plain, fused = leaf(fn), leaf(fn)
    fused.main_grad = torch.randn_like(fused)
    fused.grad_added_to_main_grad, fused.overwrite_main_grad = False, True
    for parameter in (plain, fused):
        ops.mhc_pre_norm_fn(residual, parameter, None, 1e-6).square().sum().backward()
    assert torch.equal(fused.main_grad, plain.grad)
    assert fused.grad_added_to_main_grad is True
    assert fused.grad.shape == fused.shape


def test_main_grad_must_fit(device):
    fn = leaf(block(device)[0])
    fn.main_grad = torch.zeros(7, device=device)
    out = ops.mhc_pre_norm_fn(streams(device), fn, None, 1e-6)
    with pytest.raises(ShapeError, match=r"mhc_pre_norm_fn: mhc_fn\.main_grad must hold 12288"):
        out.sum().backward()


# B7, and the recompute


def recompute_inputs(device, layers, posts, n=4):
    lead = (2, 5)
    return (
        streams(device, n, lead),
        [torch.rand(*lead, n, 1, device=device) for _ in range(layers)],
        [streams(device, 1, lead).squeeze(-2) for _ in range(posts)],
        [torch.rand(*lead, n, 1, device=device) for _ in range(posts)],
        [torch.randn(*lead, n, n, device=device).softmax(-1) for _ in range(posts)],
    )


@pytest.mark.parametrize(("layers", "posts"), [(1, 0), (1, 1), (3, 2), (3, 3)])
def test_recompute_refills_what_autograd_saved(device, layers, posts):
    residual, pre, outputs, post, comb = recompute_inputs(device, layers, posts)
    inputs, residuals, x = [], [], residual
    for layer, mix in enumerate(pre):
        inputs.append(ops.mhc_pre_apply_mix(x, mix))
        if layer < posts:
            x = ops.mhc_post(outputs[layer], x, post[layer], comb[layer])
            residuals.append(x)
    weight = leaf(torch.ones(HIDDEN, device=device, dtype=torch.bfloat16))
    product = inputs[0] * weight  # saves inputs[0]
    wanted = [t.clone() for t in inputs + residuals]
    for t in inputs + residuals:
        t.data.zero_()
    ops.mhc_multilayer_recompute(residual, pre, outputs, post, comb, inputs, residuals)
    for found, one in zip(inputs + residuals, wanted, strict=True):
        assert torch.equal(found, one)
    product.sum().backward()
    assert torch.equal(weight.grad, wanted[0].sum((0, 1)))


def test_recompute_needs_one_kernel_for_any_depth(monkeypatch):
    """B7: what is compiled is named by these arguments, and none of them is a depth.

    The launch code is plain Python, so it runs here on CPU tensors, with kernels that do nothing.
    """
    used = {}
    for layers, posts in ((1, 0), (3, 2), (10, 10), (40, 39)):
        keys = set()

        def kernel(name, *args, keys=keys):
            keys.add((name, *args))
            return lambda *tensors: None

        monkeypatch.setattr(jit, "kernel", kernel)
        inputs = recompute_inputs("cpu", layers, posts)
        layer_inputs = [torch.empty(2, 5, HIDDEN, dtype=torch.bfloat16) for _ in range(layers)]
        residuals = [torch.empty_like(inputs[0]) for _ in range(posts)]
        recompute_module._cuda(*inputs, layer_inputs, residuals)
        used[layers] = keys
    assert used[1]
    assert len(set(map(frozenset, used.values()))) == 1


# out


def out_calls(device):
    x, residual, post_mix, comb_mix = post_inputs(device)
    return {
        "expand_to_mhc": (lambda x, out=None: ops.expand_to_mhc(x, 4, out), (x,)),
        "mhc_pre_apply_mix": (ops.mhc_pre_apply_mix, (residual, post_mix)),
        "mhc_post": (ops.mhc_post, (x, residual, post_mix, comb_mix)),
    }


OUT_OPS = ("expand_to_mhc", "mhc_pre_apply_mix", "mhc_post")


@pytest.mark.parametrize("name", OUT_OPS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_out(device, name, requires_grad):
    function, tensors = out_calls(device)[name]
    inputs, plain = [leaf(t) for t in tensors], [leaf(t) for t in tensors]
    wanted = function(*plain)
    out = torch.empty_like(wanted).detach()
    if not requires_grad:
        with torch.no_grad():
            assert function(*inputs, out=out) is out
        assert torch.equal(out, wanted)
        return
    pointer = out.data_ptr()
    result = function(*inputs, out=out)
    assert result.data_ptr() == pointer
    assert torch.equal(out, wanted)
    grad = torch.randn_like(wanted)
    result.backward(grad)
    wanted.backward(grad)
    for one, other in zip(inputs, plain, strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", OUT_OPS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_bad_out(device, name, requires_grad):
    function, tensors = out_calls(device)[name]
    with torch.no_grad():
        good = torch.empty_like(function(*tensors))
    inputs = [leaf(t) for t in tensors] if requires_grad else list(tensors)
    strided = torch.cat((good, good), -1)[..., :HIDDEN]
    wide = torch.zeros(4 * good.numel(), device=device, dtype=torch.bfloat16)
    bad = {
        "out must be .*; got .*float32": good.float(),
        "out must be .*; got list": [],
        "out must be contiguous": strided,
    }
    if requires_grad:
        bad["out must not require grad"] = leaf(good)
    for message, out in bad.items():
        with pytest.raises(ShapeError, match=message):
            function(*inputs, out=out)
    stream_index = 1 if name == "mhc_post" else 0
    shared = wide[: inputs[stream_index].numel()].view(inputs[stream_index].shape)
    inputs[stream_index] = shared.requires_grad_() if requires_grad else shared
    overlapping = wide.detach()[8 : 8 + good.numel()].view(good.shape)
    with pytest.raises(ShapeError, match="out must not share memory with an input"):
        function(*inputs, out=overlapping)


# The functions below autograd, and the references


def test_expand_builders(device):
    x = torch.randn(7, HIDDEN, device=device, dtype=torch.bfloat16)
    out = torch.empty(7, 4, HIDDEN, device=device, dtype=torch.bfloat16)
    expand_to_mhc_fwd_tl(HIDDEN, 4)(x, out)
    assert torch.equal(out, x.unsqueeze(1).expand(7, 4, HIDDEN))
    grad, grad_x = torch.randn_like(out), torch.empty_like(x)
    expand_to_mhc_bwd_tl(HIDDEN, 4)(grad, grad_x)
    assert relative(grad_x, grad.double().sum(1)) < 3e-3
    with pytest.raises(ShapeError, match=r"expand_to_mhc_fwd_tl: x must be \(7, 64\) bfloat16"):
        expand_to_mhc_fwd_tl(64, 4)(x, out)
    with pytest.raises(ShapeError, match="expand_to_mhc_bwd_tl: x_grad must be"):
        expand_to_mhc_bwd_tl(HIDDEN, 4)(grad, grad_x[:3])
    with pytest.raises(UnsupportedError, match="expand_to_mhc_fwd_tl: the number of streams"):
        expand_to_mhc_fwd_tl(HIDDEN, 3)


def test_round_to_tf32(device):
    half = 2**-11  # half a unit in the last place of TF32 at 1
    cases = {
        0.0: 0.0,
        1.0: 1.0,
        1 + half / 2: 1.0,
        1 + half: 1 + 2 * half,
        -1 - half: -1 - 2 * half,
        1 + 3 * half: 1 + 4 * half,
        torch.inf: torch.inf,
        -torch.inf: -torch.inf,
    }
    values = torch.tensor(list(cases), device=device)
    assert torch.equal(round_to_tf32(values), torch.tensor(list(cases.values()), device=device))
    assert round_to_tf32(torch.full((2,), torch.nan, device=device)).isnan().all()
    random = torch.randn(1000, device=device)
    rounded = round_to_tf32(random)
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert ((rounded - random).abs() <= random.abs() * 2**-11).all()
    with pytest.raises(ShapeError, match=r"round_to_tf32: x must be \(3,\) float32"):
        round_to_tf32(torch.zeros(3, device=device, dtype=torch.bfloat16))


def test_references_agree_with_the_ops(device):
    x, residual, post_mix, comb_mix = post_inputs(device)
    fn, scale, base = block(device)
    mixes = torch.randn(2, 5, 24, device=device)
    gate = mixes[..., :4].contiguous(), scale[:1].clone(), base[:4].clone(), 1e-2
    split = mixes, scale, base, 4, 2.0, 1e-2
    weight = norm_weights(device)
    pairs = [
        (references.expand_to_mhc_ref(x, 4), ops.expand_to_mhc(x, 4)),
        (references.sinkhorn_normalize_ref(comb_mix), ops.sinkhorn_normalize(comb_mix)),
        (references.mhc_head_compute_mix_ref(*gate), ops.mhc_head_compute_mix(*gate)),
        (
            references.mhc_pre_apply_mix_ref(residual, post_mix),
            ops.mhc_pre_apply_mix(residual, post_mix),
        ),
        (
            references.mhc_post_ref(x, residual, post_mix, comb_mix),
            ops.mhc_post(x, residual, post_mix, comb_mix),
        ),
        (
            references.mhc_pre_norm_fn_ref(residual, fn, weight, 1e-6),
            tile_mhc.projection(residual, fn, norm_weight=weight),
        ),
        *zip(
            references.mhc_pre_split_mixes_ref(*split),
            ops.mhc_pre_split_mixes(*split),
            strict=True,
        ),
    ]
    for wanted, found in pairs:
        assert wanted.dtype == found.dtype
        assert wanted.shape == found.shape
        assert relative(found, wanted) < (3e-3 if wanted.dtype == torch.bfloat16 else 1e-4)
    # The reference multiplies as torch is set to, here in float32; the op always as TF32.
    norm_fn_ref = references.mhc_pre_norm_fn_ref(residual, fn, weight, 1e-6)
    assert relative(ops.mhc_pre_norm_fn(residual, fn, weight, 1e-6), norm_fn_ref) < TF32


# Bad input


def test_bad_input(device):
    residual, (fn, scale, base) = streams(device), block(device)
    with pytest.raises(ShapeError, match=r"mhc_pre: mhc_mult must be 4 to match residual .*got 2"):
        mhc.mhc_pre(residual, fn, scale, base, mhc_mult=2)
    with pytest.raises(ShapeError, match="mhc_head: mhc_mult must be 4"):
        mhc.mhc_head(residual, fn, scale[:1], base[:4], mhc_mult=8)
    with pytest.raises(UnsupportedError, match=r"mhc_pre: residual must be \(\.\.\., n, H\) bfl"):
        mhc.mhc_pre(residual.double(), fn, scale, base)
    with pytest.raises(ShapeError, match="weight must be"):
        mhc.mhc_head(residual, fn[:3], scale[:1], base[:4])
    with pytest.raises(ShapeError, match=r"mhc_head: fn must be a torch\.Tensor; got None"):
        mhc.mhc_head(residual, None, scale[:1], base[:4])
    with pytest.raises(ShapeError, match=r"mhc_head_compute_mix: mhc_scale must be a torch\."):
        ops.mhc_head_compute_mix(base[:4], 1.0, base[:4], 1e-6)
    with pytest.raises(ShapeError, match=r"residual must be a torch\.Tensor; got None"):
        ops.mhc_post(residual[..., 0, :], None, base, base)
    with pytest.raises(UnsupportedError, match="number of streams n must be one of"):
        ops.mhc_pre_apply_mix(streams(device, 3), torch.rand(2, 5, 3, 1, device=device))
    x, residual, post_mix, comb_mix = post_inputs(device)
    with pytest.raises(ShapeError, match="mhc_post_bwd: d_o must be"):
        ops.mhc_post_bwd(x, residual, post_mix, comb_mix, residual.float())
    with pytest.raises(ShapeError, match="mhc_post_bwd: comb_res_mix must be"):
        ops.mhc_post_bwd(x, residual, post_mix, post_mix, residual)
    with pytest.raises(ShapeError, match="mhc_post_bwd: residual must be contiguous"):
        ops.mhc_post_bwd(x, residual.transpose(0, 1), post_mix, comb_mix, residual)
    assert not hasattr(storage(residual), "grad_from_mhc_post")
