"""TileKernels 2.1.0's plain functions, and 1.0.0's builders that other projects import.

tests/gpu/test_compat_plain.py runs the same tests on the kernels.
"""

import pytest
import torch

import own_norm
from parity import calls, plain
from tile_mhc import ShapeError, UnsupportedError, reference
from tile_mhc.compat import tile_kernels
from tile_mhc.compat.tile_kernels import config, mhc
from tile_mhc.compat.tile_kernels.mhc.head_compute_mix_kernel import (
    _mhc_head_compute_mix_bwd,
    _mhc_head_compute_mix_fwd,
)
from tile_mhc.compat.tile_kernels.mhc.norm_fn_kernel import (
    _mhc_pre_norm_fn_bwd_mul,
    _mhc_pre_norm_fn_bwd_norm,
    _mhc_pre_norm_fn_fwd_mul,
    _mhc_pre_norm_fn_fwd_norm,
)
from tile_mhc.compat.tile_kernels.mhc.post_kernel import _mhc_post_bwd, _mhc_post_fwd
from tile_mhc.compat.tile_kernels.mhc.pre_apply_mix_kernel import (
    _mhc_pre_apply_mix_bwd,
    _mhc_pre_apply_mix_fwd,
)
from tile_mhc.compat.tile_kernels.mhc.pre_big_fuse_kernel import _mhc_pre_big_fuse
from tile_mhc.compat.tile_kernels.mhc.pre_split_mixes_kernel import (
    _mhc_pre_split_mixes_bwd,
    _mhc_pre_split_mixes_fwd,
)
from tile_mhc.compat.tile_kernels.mhc.sinkhorn_kernel import _mhc_sinkhorn_bwd, _mhc_sinkhorn_fwd
from tile_mhc.compat.tile_kernels.modeling.mhc import ops
from tile_mhc.compat.tile_kernels.torch.mhc import mhc_pre_norm_fn_partials_ref

TOKENS, HIDDEN = 7 * 32 + 13, 128
# Calls with parameters of gates, and calls with streams.
GATED = ("head_compute_mix_bwd", "pre_big_fuse_fwd", "pre_split_mixes_bwd")
OF_STREAMS = ("expand_fwd", "expand_bwd", "pre_apply_mix_bwd", "pre_big_fuse_fwd")
EVERY_CALL = pytest.mark.parametrize("name", plain.PLAIN)


@pytest.fixture
def device() -> str:
    return "cpu"


def inputs_of(name, device, num_tokens=TOKENS, n=4, hidden=HIDDEN):
    return plain.PLAIN[name].inputs(plain.Maker(name, num_tokens, hidden, device, n))


def check(name, inputs, found=None):
    """Against float64, within the roundings of the call."""
    call = plain.PLAIN[name]
    found = plain.evaluate(mhc, call, inputs) if found is None else found
    truth = plain.evaluate_exactly(call, inputs)
    assert found.keys() == truth.keys()
    for key, exact in truth.items():
        error = calls.relative_error(found[key].view(exact.shape), exact)
        assert error <= call.bound(key), f"{key}: {error:.3e}"
    return found


# What the functions compute


@EVERY_CALL
@pytest.mark.parametrize("n", [2, 4, 8])
def test_against_float64(device, name, n):
    check(name, inputs_of(name, device, n=n))


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("name", plain.ROUNDED_ONCE)
def test_gradients_are_rounded_once(device, name, n):
    plain.check_rounded_once(mhc, plain.PLAIN[name], inputs_of(name, device, n=n))


@pytest.mark.parametrize("bias", [-80.0, -30.0, 30.0, 80.0])
def test_a_gate_at_its_ends(device, bias):
    """Where 1 - sigmoid(z) keeps no bit; the logits of comb would hide it."""
    inputs = inputs_of("pre_split_mixes_bwd", device)
    inputs["base"] += bias
    inputs["grad_2"].zero_()
    plain.check_rounded_once(mhc, plain.PLAIN["pre_split_mixes_bwd"], inputs)


@EVERY_CALL
def test_no_token(device, name):
    """Sums over no token are zero; what is added to stays."""
    found = plain.evaluate(mhc, plain.PLAIN[name], inputs_of(name, device, num_tokens=0))
    for key, tensor in found.items():
        assert not tensor.isnan().any(), key


@pytest.mark.parametrize("name", GATED)
def test_parameters_of_bfloat16(device, name):
    inputs = inputs_of(name, device)
    for key in ("scale", "base"):
        inputs[key] = inputs[key].bfloat16()
    call = plain.PLAIN[name]
    found, truth = plain.evaluate(mhc, call, inputs), plain.evaluate_exactly(call, inputs)
    for key, exact in truth.items():
        bound = calls.BF16 if found[key].dtype == torch.bfloat16 else call.bound(key)
        assert calls.relative_error(found[key].view(exact.shape), exact) <= bound, key


@pytest.mark.parametrize("name", OF_STREAMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_streams_of_other_dtypes(device, name, dtype):
    given = inputs_of(name, device)
    inputs = {k: t.to(dtype) if t.dtype == torch.bfloat16 else t for k, t in given.items()}
    call = plain.PLAIN[name]
    found, truth = plain.evaluate(mhc, call, inputs), plain.evaluate_exactly(call, inputs)
    for key, exact in truth.items():
        rounding = {torch.float16: calls.BF16 / 8, torch.float32: calls.FLOAT32}[found[key].dtype]
        assert calls.relative_error(found[key].view(exact.shape), exact) <= rounding, key


def test_any_leading_dimensions(device):
    make = plain.Maker("lead", 30, HIDDEN, device)
    streams, mix = make.streams("x", 4), make.weights("mix", 4)
    flat, out = torch.empty(30, HIDDEN, device=device, dtype=torch.bfloat16), None
    out = flat.new_empty(2, 3, 5, HIDDEN)
    mhc.mhc_pre_apply_mix_fwd(streams, mix, flat)
    mhc.mhc_pre_apply_mix_fwd(streams.view(2, 3, 5, 4, -1), mix.view(2, 3, 5, 4, 1), out)
    assert torch.equal(out.view(30, -1), flat)
    logits = make.by_token("logits", 4, 4)
    one, other = torch.empty_like(logits), torch.empty_like(logits)
    mhc.mhc_sinkhorn_fwd(logits, one, 5, 1e-6)
    mhc.mhc_sinkhorn_fwd(logits.view(5, 6, 4, 4), other.view(5, 6, 4, 4), 5, 1e-6)
    assert torch.equal(one, other)


def test_in_place(device):
    """Sinkhorn, the gate and the weights' product may write to what they read."""
    logits = inputs_of("sinkhorn_fwd", device)["logits"]
    out = torch.empty_like(logits)
    mhc.mhc_sinkhorn_fwd(logits, out, 5, 1e-6)
    mhc.mhc_sinkhorn_fwd(logits, logits, 5, 1e-6)
    assert torch.equal(logits, out)
    fn, normw = inputs_of("fn_normw_merge_fwd", device).values()
    merged = fn * normw
    mhc.mhc_fn_normw_merge_fwd(fn, normw, fn)
    assert torch.equal(fn, merged)


def test_the_fused_pre_has_the_bits_of_its_parts(device):
    inputs = inputs_of("pre_big_fuse_fwd", device)
    fused = plain.PLAIN["pre_big_fuse_fwd"].run(mhc, inputs)
    parts = plain.big_fuse_by_parts(mhc, inputs)
    for name, tensor in fused.items():
        if device == "cuda":
            assert torch.equal(tensor, parts[name]), name
        else:
            assert calls.relative_error(tensor, parts[name].double()) < calls.BF16, name


def test_partial_products_make_the_projection(device):
    """What a matmul that splits K leaves, through the norm: TileKernels' own way to the mixes."""
    make = plain.Maker("partials", 33, HIDDEN, device)
    residual = make.streams("residual", 4)
    fn = make.float32("fn", 24, 4 * HIDDEN) * (4 * HIDDEN) ** -0.5
    split_products, split_squares = mhc_pre_norm_fn_partials_ref(residual, fn, 8)
    assert split_products.shape == (8, 33, 1, 24)
    assert split_squares.shape == (8, 33, 1)
    out_mul, sqrsum = plain.unwritten(fn, 33, 1, 24), plain.unwritten(fn, 33, 1)
    mixes = plain.unwritten(fn, 33, 24)
    mhc.mhc_reduce_partials_and_rmsnorm_fwd(
        split_products, split_squares, out_mul, sqrsum, mixes, 4 * HIDDEN, 1e-6, 8
    )
    truth = reference.projection(residual.double(), fn.double(), norm_eps=1e-6)
    # The reference multiplies as torch is set to.
    assert calls.relative_error(mixes, truth) < 1e-3


@pytest.mark.parametrize("block", [0, 1, 5, 32, 200])
@pytest.mark.parametrize("rows", [1, 3, 132])
def test_rows_of_partial_sums(device, rows, block):
    """Block b counts in row b % rows; rows without a block are zero."""
    mix, scale, base, grad = inputs_of("head_compute_mix_bwd", device).values()
    out, scales, bases = (
        plain.unwritten(mix, *shape) for shape in (mix.shape, (rows, 1), (rows, 4))
    )
    mhc.mhc_head_compute_mix_bwd(grad, mix, scale, base, out, scales, bases, rows, block)
    of = torch.arange(len(mix), device=device) // (block or 32) % rows
    double = [tensor.double() for tensor in (grad, mix, scale, base)]
    for row in range(rows):
        own = of == row
        truth = reference.head_mix_backward(double[0][own], double[1][own], *double[2:])
        assert torch.allclose(scales[row].double(), truth[1], rtol=1e-5, atol=1e-5)
        assert torch.allclose(bases[row].double(), truth[2], rtol=1e-5, atol=1e-5)


def test_versions_of_what_was_written(device):
    """Autograd must notice that what it saved was written to."""
    logits = inputs_of("sinkhorn_fwd", device)["logits"]
    weight = torch.ones_like(logits, requires_grad=True)
    out = torch.empty_like(logits)
    product = weight * out
    mhc.mhc_sinkhorn_fwd(logits, out, 5, 1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_no_graph(device):
    logits = inputs_of("sinkhorn_fwd", device)["logits"].requires_grad_()
    out = torch.empty_like(logits).detach()
    mhc.mhc_sinkhorn_fwd(logits, out, 5, 1e-6)
    assert not out.requires_grad
    streams = torch.randn(3, 4, HIDDEN, device=device).bfloat16().requires_grad_()
    result = torch.zeros(3, HIDDEN, device=device).bfloat16()
    mhc.mhc_pre_apply_mix_fwd(streams, torch.rand(3, 4, device=device), result)
    assert not result.requires_grad


@EVERY_CALL
def test_one_graph_under_compile(device, name):
    call, inputs = plain.PLAIN[name], inputs_of(name, device)
    want = call.run(mhc, inputs)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: call.run(mhc, x), fullgraph=True, backend="aot_eager")
    for key, tensor in compiled(inputs).items():
        assert torch.equal(tensor, want[key]), key


def test_post_bwd_leaves_nothing_behind(device):
    """2.1.0's does not post the gradient on the storage; 1.0.0's name in `modeling` does."""
    inputs = inputs_of("post_bwd", device, num_tokens=5)
    storage = inputs["residual"].untyped_storage()
    for _ in range(2):
        first = mhc.mhc_post_bwd(*inputs.values())
        assert not hasattr(storage, "grad_from_mhc_post")
    posted = ops.mhc_post_bwd(*inputs.values())
    assert storage.grad_from_mhc_post is posted[1]
    for one, other in zip(first, posted, strict=True):
        assert torch.equal(one, other)


# The builders of release 1.0.0, called as others call them


class AutomodelSinkhorn(torch.autograd.Function):
    """As NeMo Automodel runs the two builders: flat, contiguous, and a gradient given."""

    @staticmethod
    def forward(ctx, x, repeat, eps):
        flat = x.contiguous().view(-1, *x.shape[-2:])
        out = torch.empty_like(flat)
        n = flat.shape[1]
        ctx.backward_kernel = _mhc_sinkhorn_bwd(n, 32, repeat, eps)
        _mhc_sinkhorn_fwd(n, 1, repeat, eps)(flat, out)
        ctx.save_for_backward(flat)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (flat,) = ctx.saved_tensors
        grad_input = torch.empty_like(flat)
        ctx.backward_kernel(grad.contiguous().view_as(flat), flat, grad_input)
        return grad_input.view_as(grad), None, None


def test_sinkhorn_as_automodel_calls_it(device):
    logits = torch.randn(2, 9, 4, 4, device=device)
    grad = torch.randn(2, 9, 4, 4, device=device).mT
    results = []
    theirs = (lambda x: AutomodelSinkhorn.apply(x, 20, 1e-6), torch.float32)
    for function, dtype in (theirs, (reference_sinkhorn, torch.float64)):
        leaf = logits.to(dtype).clone().requires_grad_()
        out = function(leaf)
        (of_leaf,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
        results.append((out.detach(), of_leaf))
    for found, truth in zip(*results, strict=True):
        assert calls.relative_error(found, truth) < calls.FLOAT32


def reference_sinkhorn(x):
    return reference.sinkhorn(x, repeat=20, eps=1e-6)


def test_norm_as_deepgemm_calls_it(device):
    inputs = inputs_of("reduce_partials_fwd", device)
    products, squares, size = inputs.values()
    summed, summed_squares = torch.empty_like(products[0]), torch.empty_like(squares[0])
    mixes = torch.empty(TOKENS, 24, device=device)
    build = _mhc_pre_norm_fn_fwd_norm(24, 1, size.numel(), plain.EPS, plain.SPLITS)
    build(products, squares, summed, summed_squares, mixes)
    check(
        "reduce_partials_fwd", inputs, {"out_mul": summed, "sqrsum": summed_squares, "out": mixes}
    )


def test_norm_of_the_backward_by_its_builder(device):
    inputs = inputs_of("reduce_partials_of_groups_bwd", device)
    out_mul, sqrsum, grad, size = inputs.values()
    groups, num_mixes = out_mul.shape[1:]
    grads = torch.empty_like(out_mul), torch.empty_like(sqrsum)
    build = _mhc_pre_norm_fn_bwd_norm(num_mixes, groups, size.numel(), plain.EPS)
    build(grad, out_mul, sqrsum, *grads)
    expected = [torch.empty_like(each) for each in grads]
    mhc.mhc_reduce_partials_and_rmsnorm_bwd(
        grad, out_mul, sqrsum, *expected, size.numel(), plain.EPS
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@own_norm.CASES
def test_matmuls_as_a_norm_of_ones_own_calls_them(device, sizes):
    own_norm.check(*sizes, device)


def test_the_matmul_adds_to_the_gradient_of_x(device):
    own_norm.check_added(device)


def test_big_fuse_as_deepgemm_calls_it(device):
    inputs = inputs_of("pre_big_fuse_fwd", device)
    residual = inputs["residual"]
    post_mix = torch.empty(TOKENS, 4, device=device)
    comb_mix = torch.empty(TOKENS, 16, device=device)
    layer_input = torch.empty(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)
    eps, sizes = [plain.EPS] * 3, {"n_splits": plain.SPLITS, "mhc_mult": 4}
    build = _mhc_pre_big_fuse(HIDDEN, *eps, plain.POST_MULT, plain.STEPS, **sizes)
    # The residual as it lies in its batch: split sums squeezed out of four dimensions.
    given = [inputs[name] for name in ("products", "squares", "scale", "base")]
    given[0] = given[0].unsqueeze(2).squeeze(2)
    build(*given, residual, post_mix, comb_mix, layer_input)
    found = {"post_mix": post_mix, "comb_mix": comb_mix, "layer_input": layer_input}
    check("pre_big_fuse_fwd", inputs, found)


class Builders:
    """The plain functions by 1.0.0's builders, called as XTuner calls them: flat, by keywords."""

    def mhc_head_compute_mix_fwd(self, mix, scale, base, out, eps):
        sizes = {"mhc_mult": mix.shape[1], "mhc_pre_eps": eps, "token_block_size": 64}
        _mhc_head_compute_mix_fwd(**sizes)(mix, scale, base, out)

    def mhc_head_compute_mix_bwd(self, grad, mix, scale, base, out, scales, bases, rows):
        sizes = {"mhc_mult": mix.shape[1], "token_block_size": plain.BLOCK, "num_sms": rows}
        _mhc_head_compute_mix_bwd(**sizes)(grad, mix, scale, base, out, scales, bases)

    def mhc_post_fwd(self, x, residual, post_mix, comb_mix, out):
        build = _mhc_post_fwd(mhc=residual.shape[2], hidden=residual.shape[3])
        build(comb_mix[0], residual[0], post_mix[0, ..., 0], x[0], out[0])
        return out

    def mhc_post_bwd(self, x, residual, post_mix, comb_mix, grad):
        build = _mhc_post_bwd(mhc=residual.shape[2], hidden=residual.shape[3])
        grads = build(grad[0], comb_mix[0], residual[0], post_mix[0, ..., 0], x[0])
        return grads[3], grads[1], grads[2], grads[0]

    def mhc_pre_apply_mix_fwd(self, x, mix, o):
        _mhc_pre_apply_mix_fwd(mhc_mult=x.shape[1], hidden=x.shape[2])(x, mix, o)

    def mhc_pre_apply_mix_bwd(self, o_grad, x, mix, x_grad):
        return _mhc_pre_apply_mix_bwd(mhc_mult=x.shape[1], hidden=x.shape[2])(
            o_grad, x, mix, x_grad
        )

    def mhc_pre_split_mixes_fwd(self, mixes, scale, base, pre, post, comb, mult, eps):
        sizes = {"mhc_post_mult_value": mult, "mhc_pre_eps": eps, "token_block_size": 64}
        build = _mhc_pre_split_mixes_fwd(mhc_mult=pre.shape[1], **sizes)
        build(mixes, scale, base, pre, post, comb)

    def mhc_pre_split_mixes_bwd(self, *arguments):
        *given, scale_grad, base_grad, mult = arguments
        sizes = {"mhc_post_mult_value": mult, "token_block_size": 64, "num_sms": 5}
        build = _mhc_pre_split_mixes_bwd(mhc_mult=given[0].shape[1], **sizes)
        scales, bases = (plain.unwritten(g, 5, *g.shape) for g in (scale_grad, base_grad))
        build(*given, scales, bases)
        scale_grad.copy_(scales.sum(0))
        base_grad.copy_(bases.sum(0))


OF_XTUNER = [name for name in plain.PLAIN if hasattr(Builders, f"mhc_{name}")]


@pytest.mark.parametrize("name", OF_XTUNER)
def test_builders_as_xtuner_calls_them(device, name):
    """The bits of the plain functions."""
    call, inputs = plain.PLAIN[name], inputs_of(name, device)
    want = call.run(mhc, inputs)
    found = call.run(Builders(), inputs)
    for key, tensor in want.items():
        assert torch.equal(found[key].view(tensor.shape), tensor), key


# Switches


def test_switches_are_kept():
    assert config.get_pdl() is False
    assert config.get_deterministic_algorithms() is False
    config.set_pdl(True)
    config.use_deterministic_algorithms(1)
    try:
        assert tile_kernels.get_pdl() is True
        assert tile_kernels.get_deterministic_algorithms() is True
    finally:
        config.reset_runtime_config()
    assert config.get_pdl() is False
    assert config.get_deterministic_algorithms() is False
    assert (config.get_device(), config.is_ascend()) == ("cuda", False)


@EVERY_CALL
def test_the_switches_decide_nothing(device, name):
    inputs = inputs_of(name, device)
    before = plain.PLAIN[name].run(mhc, inputs)
    config.set_pdl(True)
    config.use_deterministic_algorithms(True)
    try:
        after = plain.PLAIN[name].run(mhc, inputs)
    finally:
        config.reset_runtime_config()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


# Bad input


def arguments_of(name, device):
    """The arguments that a call is made with, by recording them."""
    recorded = {}

    class Recorder:
        def __getattr__(self, function):
            def record(*args, **options):
                recorded[function] = [*args, *options.values()]
                raise StopIteration

            return record

    with pytest.raises(StopIteration):
        plain.PLAIN[name].run(Recorder(), inputs_of(name, device, num_tokens=6))
    ((function, args),) = recorded.items()
    return function, args


def changed(tensor, change):
    return {
        "rows": lambda: tensor[:-1].contiguous(),
        "dtype": lambda: tensor.double(),
        "strided": lambda: torch.stack((tensor, tensor), -1)[..., 0],
        "list": list,
        "misaligned": lambda: misaligned(tensor),
        "meta": lambda: tensor.to("meta"),
    }[change]()


def misaligned(tensor):
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape)


def positions_of(name):
    """The tensors among the arguments, and which of them are written to."""
    function, args = arguments_of(name, "cpu")
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    added = {"fn_normw_merge_bwd": [3, 4], "pre_apply_mix_bwd": [3]}
    written = added.get(name) or [i for i in tensors if args[i].isnan().any()]
    return function, tensors, written


POSITIONS = {name: positions_of(name) for name in plain.PLAIN}


def every_mistake():
    for name, (_, tensors, written) in POSITIONS.items():
        for position in tensors:
            for change in ("rows", "dtype", "list", "meta"):
                yield name, position, change
        for position in written:
            for change in ("strided", "misaligned"):
                yield name, position, change


@pytest.mark.parametrize(("name", "position", "change"), list(every_mistake()))
def test_bad_tensors(device, name, position, change):
    """One form of error, of the function and an argument's name, before anything is written."""
    function, args = arguments_of(name, device)
    args[position] = changed(args[position], change)
    written = [args[i] for i in POSITIONS[name][2] if i != position]
    before = [tensor.clone() for tensor in written]
    with pytest.raises((ShapeError, UnsupportedError)) as caught:
        getattr(mhc, function)(*args)
    assert str(caught.value).startswith(f"{function}: ")
    assert " must " in str(caught.value)
    assert "; got " in str(caught.value)
    for tensor, was in zip(written, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7), was.nan_to_num(7))


# A call, what becomes of one of its arguments, and the message.
NUMBERS = (
    ("expand_fwd", 1, lambda o: o[:, :3].contiguous(), r"n must be one of \(2, 4, 8\); got 3"),
    ("expand_fwd", 1, lambda o: o.flatten(), r"o must be \(6, 4, 128\) bfloat16 to match x"),
    ("sinkhorn_fwd", 0, lambda x: x[..., 0], r"comb_res_mix must be .*; got"),
    ("sinkhorn_fwd", 0, lambda x: x.flatten(), r"must be \(\.\.\., n, n\) float32; got \(96,\)"),
    ("sinkhorn_fwd", 2, lambda _: 0, "repeat must be an integer of at least 1; got 0"),
    ("sinkhorn_bwd", 3, lambda _: 2000, "repeat must be at most 1024; got 2000"),
    ("sinkhorn_bwd", 4, lambda _: None, "eps must be a number; got None"),
    ("head_compute_mix_fwd", 4, lambda _: True, "mhc_pre_eps must be a number; got bool True"),
    ("head_compute_mix_fwd", 1, lambda _: 1.0, r"mhc_scale must be a torch\.Tensor; got float"),
    ("head_compute_mix_bwd", 7, lambda _: 8, r"grad_partial must be \(8, 1\) or \(8,\) float32"),
    ("head_compute_mix_bwd", 7, lambda _: 0, "num_sms must be an integer of at least 1; got 0"),
    ("fn_normw_merge_fwd", 0, lambda fn: fn[None], "fn must have 2 dimensions; got"),
    ("reduce_partials_fwd", 0, lambda x: x[0], r"must be \(n_splits, T, G, N\) float32; got"),
    ("reduce_partials_fwd", 0, lambda x: x[None], "out_mul_splitted must have 4 dimensions"),
    ("reduce_partials_fwd", 7, lambda _: 8, r"out_mul_splitted must be \(8, 6, 1, 24\) float32"),
    ("reduce_partials_fwd", 5, lambda _: 0, "rms_group_size must be an integer of at least 1"),
    ("reduce_partials_bwd", 6, lambda _: "", "rms_eps must be a number; got str ''"),
    ("pre_split_mixes_fwd", 0, lambda x: x[:, :23], "must have 8 or 24 or 80 numbers in a row"),
    ("pre_split_mixes_bwd", 4, lambda x: x[:, :3], r"post_layer_mix must be \(6, 4\) or"),
    ("pre_big_fuse_fwd", 13, lambda _: 15, r"gemm_out_mul must be \(15, 6, 24\) float32"),
    ("pre_big_fuse_fwd", 10, lambda _: [], r"mhc_sinkhorn_eps must be a number; got list"),
    ("pre_big_fuse_fwd", 12, lambda _: 1.0, "sinkhorn_repeat must be an integer"),
    ("pre_big_fuse_fwd", 4, lambda x: x[None], r"residual must be \(1, 4, 128\) bfloat16"),
    ("pre_apply_mix_fwd", 0, lambda x: x.mT, "number of streams|x must be contiguous"),
    ("pre_apply_mix_bwd", 0, lambda x: torch.cat((x, x), -1)[:, ::2], "o_grad must be contiguous"),
)


@pytest.mark.parametrize(("name", "position", "change", "message"), NUMBERS)
def test_bad_arguments(device, name, position, change, message):
    function, args = arguments_of(name, device)
    args[position] = change(args[position])
    with pytest.raises((ShapeError, UnsupportedError), match=f"^{function}: .*{message}"):
        getattr(mhc, function)(*args)


def test_a_block_of_too_many_tokens(device):
    _, args = arguments_of("head_compute_mix_bwd", device)
    message = "mhc_head_compute_mix_bwd: token_block_size must be at most 1024; got 1025"
    with pytest.raises(UnsupportedError, match=message):
        mhc.mhc_head_compute_mix_bwd(*args, token_block_size=1025)
    with pytest.raises(ShapeError, match="token_block_size must be an integer of at least 0"):
        mhc.mhc_head_compute_mix_bwd(*args, token_block_size=-1)


def test_outputs_that_overlap_inputs(device):
    wide = torch.randn(6 * 4 * HIDDEN + 6 * HIDDEN, device=device).bfloat16()
    streams = wide[: 6 * 4 * HIDDEN].view(6, 4, HIDDEN)
    behind = wide[6 * 4 * HIDDEN - HIDDEN :][: 6 * HIDDEN].view(6, HIDDEN)
    mix = torch.rand(6, 4, device=device)
    message = "o must not share memory with an input; got one that overlaps x"
    with pytest.raises(ShapeError, match=f"mhc_pre_apply_mix_fwd: {message}"):
        mhc.mhc_pre_apply_mix_fwd(streams, mix, behind)
    with pytest.raises(ShapeError, match="expand_to_mhc_bwd: x_grad must not share memory"):
        mhc.expand_to_mhc_bwd(streams, behind)
    numbers = torch.rand(6 * 24 + 8, device=device)
    mixes, pre = numbers[: 6 * 24].view(6, 24), numbers[6 * 24 - 16 : 6 * 24 + 8].view(6, 4)
    outs = (torch.empty(6, 4, device=device), torch.empty(6, 16, device=device))
    gates = torch.rand(3, device=device), torch.rand(24, device=device)
    with pytest.raises(ShapeError, match="pre_layer_mix must not share memory with an input"):
        mhc.mhc_pre_split_mixes_fwd(mixes, *gates, pre, *outs, 2.0, 1e-6)


def test_builders_check_what_they_are_built_with(device):
    with pytest.raises(UnsupportedError, match="_mhc_sinkhorn_fwd: the number of streams n"):
        _mhc_sinkhorn_fwd(3, 1, 20, 1e-6)
    with pytest.raises(ShapeError, match="_mhc_sinkhorn_bwd: token_block_size must be"):
        _mhc_sinkhorn_bwd(4, 0, 20, 1e-6)
    with pytest.raises(ShapeError, match="_mhc_pre_norm_fn_fwd_norm: n_splits must be"):
        _mhc_pre_norm_fn_fwd_norm(24, 1, 512, 1e-6, 0)
    with pytest.raises(UnsupportedError, match="_mhc_pre_big_fuse: the hidden size H must be"):
        _mhc_pre_big_fuse(0, 1e-6, 1e-6, 1e-6, 2.0, 20)
    other = torch.randn(5, 8, 8, device=device)
    with pytest.raises(ShapeError, match=r"_mhc_sinkhorn_fwd: comb_res_mix must be \(5, 4, 4\)"):
        _mhc_sinkhorn_fwd(4, 1, 20, 1e-6)(other, other)
    with pytest.raises(ShapeError, match=r"_mhc_sinkhorn_bwd: x must be \(5, 4, 4\) float32"):
        _mhc_sinkhorn_bwd(4, 32, 20, 1e-6)(other, other, other)
    sums = torch.randn(2, 5, 1, 24, device=device)
    with pytest.raises(ShapeError, match=r"out_mul_splitted must be \(3, 5, 1, 24\) float32"):
        _mhc_pre_norm_fn_fwd_norm(24, 1, 512, 1e-6, 3)(sums, sums, sums, sums, sums)
    with pytest.raises(ShapeError, match=r"_mhc_pre_norm_fn_bwd_norm: out_mul must be \(2, 1, 24"):
        _mhc_pre_norm_fn_bwd_norm(24, 1, 512, 1e-6)(sums, sums, sums, sums, sums)
    with pytest.raises(ShapeError, match="_mhc_pre_norm_fn_bwd_norm: n_rms_group must be"):
        _mhc_pre_norm_fn_bwd_norm(24, 0, 512, 1e-6)
    flat, weight = torch.randn(5, 512, device=device), torch.randn(24, 512, device=device)
    for build, op in (
        (_mhc_pre_norm_fn_fwd_mul, "_mhc_pre_norm_fn_fwd_mul"),
        (_mhc_pre_norm_fn_bwd_mul, "_mhc_pre_norm_fn_bwd_mul"),
    ):
        for sizes, message in (
            ((5, 1, 512), "mhc_mult3 must be one of"),
            ((24, 2, 512), "n_rms_group must be 1; got 2"),
            ((24, 1, 510), "rms_group_size must be a multiple of 4, up to 65536; got 510"),
        ):
            with pytest.raises(UnsupportedError, match=f"^{op}: {message}"):
                build(*sizes)
        with pytest.raises(ShapeError, match=f"^{op}: token_block must be an integer"):
            build(24, 1, 512, token_block=0)
    forward, backward = (
        build(24, 1, 512) for build in (_mhc_pre_norm_fn_fwd_mul, _mhc_pre_norm_fn_bwd_mul)
    )
    out, column = torch.empty(5, 1, 24, device=device), torch.empty(5, 1, device=device)
    for call, message in (
        (lambda: forward(flat[:, :256], weight, out, column), r"fwd_mul: x must be \(5, 512\)"),
        (lambda: forward(flat.mT.contiguous().mT, weight, out, column), "fwd_mul: x must be conti"),
        (lambda: forward(flat, weight[:8], out, column), r"fwd_mul: fn must be \(24, 512\)"),
        (lambda: forward(flat, weight, out[:, 0], column), r"fwd_mul: out must be \(5, 1, 24\)"),
        (lambda: backward(out, column, flat, weight, flat, weight), "bwd_mul: x_grad must not sh"),
        (lambda: backward(out, column, flat, weight, flat.clone(), weight),
         "bwd_mul: fn_grad must not share"),
        (lambda: backward(out[:, 0], column, flat, weight, flat, weight),
         r"bwd_mul: out_mul_grad must be \(5, 1, 24\)"),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=f"^_mhc_pre_norm_fn_{message}"):
            call()
    streams = torch.randn(5, 4, HIDDEN, device=device).bfloat16()
    for build, name, count in (
        (_mhc_head_compute_mix_fwd(4, 1e-6, 32), "head_compute_mix_fwd: input_mix", 4),
        (_mhc_head_compute_mix_bwd(4, 32, 132), "head_compute_mix_bwd: input_mix", 7),
        (_mhc_pre_apply_mix_fwd(4, 64), "pre_apply_mix_fwd: x", 3),
        (_mhc_pre_apply_mix_bwd(4, 64), "pre_apply_mix_bwd: x", 4),
        (_mhc_pre_split_mixes_fwd(4, 2.0, 1e-6, 32), "pre_split_mixes_fwd: input_mixes", 6),
        (_mhc_pre_split_mixes_bwd(4, 2.0, 32), "pre_split_mixes_bwd: input_mixes", 10),
        (_mhc_post_fwd(4, 64), "post_fwd: b", 5),
        (_mhc_post_bwd(4, 64), "post_bwd: b", 5),
    ):
        with pytest.raises(ShapeError, match=f"^_mhc_{name} must be"):
            build(*[other] * count)
    with pytest.raises(ShapeError, match="_mhc_post_fwd: n_thr must be an integer"):
        _mhc_post_fwd(4, 64, n_thr=0)
    with pytest.raises(UnsupportedError, match="_mhc_pre_split_mixes_fwd: dtype must be float32"):
        _mhc_pre_split_mixes_fwd(4, 2.0, 1e-6, 32, dtype="bfloat16")
    build = _mhc_pre_big_fuse(64, 1e-6, 1e-6, 1e-6, 2.0, 20)
    with pytest.raises(ShapeError, match=r"_mhc_pre_big_fuse: residual must be \(5, 4, 64\)"):
        build(sums, sums, sums, sums, streams, sums, sums, sums)
