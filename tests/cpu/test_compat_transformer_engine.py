"""compat.transformer_engine on CPU: interface, numbers, the gradient buffer, errors, the alias."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import far_apart
import fresh
import oracle
import saturation
import te_cases
from te_cases import DTYPES, KINDS, N, case, dtypes, kinds, op_of, sub_layer, sub_layer_inputs
from tile_mhc import ShapeError, UnsupportedError
from tile_mhc.compat import transformer_engine as te
from tile_mhc.compat.transformer_engine import _accumulation
from tile_mhc.ops.transformer_engine import reference

MODULE = "transformer_engine.pytorch.triton.mhc"
BUFFER = "fused_grad_x_acc_buffer"

# TransformerEngine main, d0067d0.
SIGNATURES = {
    "mhc_generate_mix_and_aggregate": "x, phi, alpha, beta, norm_weight=None, use_tf32=True, "
    "fused_grad_x_acc_buffer=None, use_split_k=False",
    "mhc_fused_sinkhorn": "H_res, n=4, recompute_hist=True, iters=20",
    "mhc_fused_scale": "H, alpha, beta, ms, n",
    "mhc_fused_aggregate": "x, H_pre, n, use_tf32=True, fused_grad_x_acc_buffer=None",
    "mhc_fused_expand_combine": "f, bias, H_post, x, H_res, n, use_tf32=True, "
    "fused_grad_x_acc_buffer=None",
    "mhc_fused_projection": "x, phi, use_tf32=True, norm_weight=None, "
    "fused_grad_x_acc_buffer=None, use_split_k=False",
}


def plain_signature(function: object) -> str:
    """The parameters without their annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert plain_signature(getattr(te, name)) == SIGNATURES[name]
    assert getattr(te.pytorch.triton.mhc, name) is getattr(te, name)


# The formulas of TransformerEngine's documentation, written out once more, in float64.


def exact_projection(x, weight, norm_weight=None):
    x = x.flatten(-2)
    merged = weight if norm_weight is None else weight * norm_weight
    h = torch.einsum("tk,mk->tm", x, merged)
    return torch.cat((h, h.new_zeros(len(h), 8)), -1), (x * x).mean(-1)


def exact_scale(h, ms, scale, bias):
    z = h[:, :24] / torch.sqrt(ms + 1.1920928955078125e-07)[:, None]
    z = torch.cat([z[:, :4] * scale[0], z[:, 4:8] * scale[1], z[:, 8:] * scale[2]], -1) + bias
    return 1 / (1 + torch.exp(-z[:, :4])), 2 / (1 + torch.exp(-z[:, 4:8])), z[:, 8:]


def exact_sinkhorn(logits, iters=20):
    f = g = torch.zeros_like(logits[..., 0])
    for _ in range(iters):
        f = -torch.logsumexp(logits + g[..., None, :], -1)
        g = -torch.logsumexp(logits + f[..., :, None], -2)
    return torch.exp(logits + f[..., :, None] + g[..., None, :])


def exact_aggregate(x, mix):
    return torch.einsum("tci,ti->tc", x, mix)


def exact_post(f, x, post_mix, comb_mix, bias=None):
    f = f if bias is None else f + bias
    return torch.einsum("tc,tj->tcj", f, post_mix) + torch.einsum("tci,tij->tcj", x, comb_mix)


EXACT = dict(
    zip(
        KINDS,
        (
            exact_projection,
            exact_projection,
            exact_scale,
            exact_sinkhorn,
            exact_aggregate,
            exact_post,
            exact_post,
        ),
        strict=True,
    )
)


@kinds
def test_specification_is_the_formula(kind):
    """In float64, outputs and gradients, to its last digits."""
    op = op_of(kind, DTYPES[2])
    tensors, options = op.inputs((7,), N, 33, "cpu")
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    upstream = [grad.double() for grad in oracle.upstream_of(op, tensors, options)]
    ours = oracle.evaluate(op.reference, tensors, options, upstream, op.outputs)
    exact = oracle.evaluate(EXACT[kind], tensors, options, upstream, op.outputs)
    for name in ours:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-12, atol=1e-12)


@kinds
@dtypes
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_functions(kind, dtypes, num_tokens):
    op = op_of(kind, dtypes)
    shape = case(num_tokens, 33, "any C")
    oracle.check(op, shape, *op.inputs((num_tokens,), N, 33, "cpu"))


@pytest.mark.parametrize("kind", ["scale", "sinkhorn", "aggregate", "post", "post_bias"])
def test_gradients_in_closed_form(kind):
    """The operators take float64, where numerical differences tell."""
    op = op_of(kind, DTYPES[2])
    tensors, _ = op.inputs((2,), N, 3, "cpu")
    double = {name: t.double().requires_grad_() for name, t in tensors.items()}
    function = {
        "scale": lambda h, ms, scale, bias: torch.ops.tile_mhc.padded_mixes(h, ms, scale, bias, N),
        "sinkhorn": lambda logits: torch.ops.tile_mhc.log_sinkhorn(logits, 3),
        "aggregate": torch.ops.tile_mhc.interleaved_aggregate,
        "post": lambda f, x, p, c: torch.ops.tile_mhc.interleaved_post(f, None, x, p, c),
        "post_bias": lambda f, x, p, c, b: torch.ops.tile_mhc.interleaved_post(f, b, x, p, c),
    }[kind]
    assert torch.autograd.gradcheck(function, list(double.values()))


def test_gradients_of_the_projection_in_closed_form():
    x, weight, norm = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 12), (24, 12), (12,))
    )
    assert torch.autograd.gradcheck(torch.ops.tile_mhc.padded_projection, (x, weight, norm))
    assert torch.autograd.gradcheck(torch.ops.tile_mhc.padded_projection, (x, weight, None))


def test_logits_far_apart():
    """Log space has no epsilon and no underflow: where a softmax would give 0 / 0."""
    logits = te_cases.far_apart("cpu")
    out = te.mhc_fused_sinkhorn(logits)
    assert torch.allclose(out.sum(-2), torch.ones(()), atol=1e-4)
    assert torch.allclose(out.double(), exact_sinkhorn(logits.double()), rtol=0, atol=1e-6)


def test_wrapper_is_the_four_functions():
    inputs = sub_layer_inputs(6, 33, DTYPES[2], "cpu")
    x, phi, alpha, beta = inputs.values()
    x = x.view(3, 2, 33, N)
    norm = torch.rand(33 * N) + 0.5
    out, H_post, H_res = te.mhc_generate_mix_and_aggregate(x, phi, alpha, beta, norm)
    H, ms = te.mhc_fused_projection(x.view(6, -1), phi, norm_weight=norm)
    assert H.shape == (6, 32)
    assert not H[:, 24:].any()
    pre, post, res = te.mhc_fused_scale(H, alpha, beta, ms, N)
    assert torch.equal(H_post, post.view(3, 2, N))
    assert torch.equal(H_res, te.mhc_fused_sinkhorn(res.view(3, 2, N, N)))
    assert torch.equal(out, te.mhc_fused_aggregate(x, pre.view(3, 2, N), N))


# The gradient buffer.


def leaves_of(num_tokens: int = 6, which=DTYPES[2]) -> dict[str, Tensor]:
    inputs = sub_layer_inputs(num_tokens, 33, which, "cpu")
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def new_buffer(leaves: dict[str, Tensor]) -> Tensor:
    """Full of NaN: what is read before it was written shows."""
    return torch.full(leaves["x"].shape, float("nan"))


def gradients(function, leaves, buffer, inputs=None, **options) -> list[Tensor]:
    out = function(**leaves, buffer=buffer)
    inputs = list(leaves.values()) if inputs is None else inputs
    return list(torch.autograd.grad(out.sin().sum(), inputs, **options))


def pre_only(x, phi, alpha, beta, buffer):
    """A chain without an expand_combine, such as the last: TransformerEngine reads garbage here."""
    out, H_post, H_res = te.mhc_generate_mix_and_aggregate(
        x, phi, alpha, beta, fused_grad_x_acc_buffer=buffer
    )
    return out.sum(-1) + H_post.sum(-1) + H_res[..., 0].sum(-1)


def projection_only(x, phi, alpha, beta, buffer):
    H, ms = te.mhc_fused_projection(x.flatten(-2), phi, fused_grad_x_acc_buffer=buffer)
    return torch.cat([t.flatten() for t in te.mhc_fused_scale(H, alpha, beta, ms, N)])


def written_twice(x, phi, alpha, beta, buffer):
    """Two consumers of one x: TransformerEngine's second overwrites the first."""
    out, H_post, H_res = te.mhc_generate_mix_and_aggregate(
        x, phi, alpha, beta, fused_grad_x_acc_buffer=buffer
    )
    args = (H_post, x, H_res, N)
    one = te.mhc_fused_expand_combine(out, None, *args, fused_grad_x_acc_buffer=buffer)
    two = te.mhc_fused_expand_combine(out.cos(), None, *args, fused_grad_x_acc_buffer=buffer)
    return one * two


def checkpointed(use_reentrant):
    def function(x, phi, alpha, beta, buffer):
        def pre(x, phi, alpha, beta):
            return te.mhc_generate_mix_and_aggregate(
                x, phi, alpha, beta, fused_grad_x_acc_buffer=buffer
            )

        out, H_post, H_res = checkpoint(pre, x, phi, alpha, beta, use_reentrant=use_reentrant)
        return te.mhc_fused_expand_combine(
            out, None, H_post, x, H_res, N, fused_grad_x_acc_buffer=buffer
        )

    return function


CHAINS = {
    "whole": sub_layer,
    "pre_only": pre_only,
    "projection_only": projection_only,
    "written_twice": written_twice,
    "checkpoint": checkpointed(False),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


@chains
def test_buffer_gives_the_gradient_of_autograd(chain):
    leaves = leaves_of()
    plain = gradients(chain, leaves, None)
    for ours, expected in zip(gradients(chain, leaves, new_buffer(leaves)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_buffer_under_a_reentrant_checkpoint():
    leaves = leaves_of()
    plain = gradients(sub_layer, leaves, None)
    out = checkpointed(True)(**leaves, buffer=new_buffer(leaves))
    out.sin().sum().backward()
    for leaf, expected in zip(leaves.values(), plain, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-5)


def test_buffer_rounds_once():
    """bfloat16 streams: nearer to float64 than three rounded parts."""
    leaves = leaves_of(64, DTYPES[0])
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    out = sub_layer(**leaves, buffer=None)
    grad = torch.randn_like(out)
    truth = torch.autograd.grad(te_cases.sub_layer_reference(**wide), wide["x"], grad.double())[0]
    plain = torch.autograd.grad(out, leaves["x"], grad)[0]
    fused = torch.autograd.grad(sub_layer(**leaves, buffer=new_buffer(leaves)), leaves["x"], grad)
    assert fused[0].dtype == torch.bfloat16
    assert oracle.relative_error(fused[0], truth) < oracle.relative_error(plain, truth)


@pytest.mark.parametrize("which", [DTYPES[0], DTYPES[2]], ids=str)
def test_layers_share_a_buffer(which):
    """In float32 too, where TransformerEngine returns the buffer itself."""
    leaves = leaves_of(6, which)
    others = leaves_of(6, which)

    def run(buffer):
        x = leaves["x"]
        for layer in (leaves, others):
            x = sub_layer(x, layer["phi"], layer["alpha"], layer["beta"], buffer)
        inputs = [leaves["x"], leaves["phi"], others["phi"]]
        return torch.autograd.grad(x.float().sin().sum(), inputs)

    buffer = new_buffer(leaves)
    # With bfloat16 streams, the plain gradients are rounded three times.
    most = 1e-6 if which is DTYPES[2] else 5e-3
    for ours, expected in zip(run(buffer), run(None), strict=True):
        assert oracle.relative_error(ours, expected.double()) < most
    first, second = run(buffer)[0], run(buffer)[0]
    assert torch.equal(first, second)
    assert first.data_ptr() != buffer.data_ptr()


def test_backward_twice_and_in_parts():
    leaves = leaves_of()
    plain = gradients(sub_layer, leaves, None)
    out = sub_layer(**leaves, buffer=new_buffer(leaves)).sin().sum()
    inputs = list(leaves.values())
    for _ in range(2):
        # Of phi alone: the gradient of x in the buffer is not asked for, and overwritten later.
        torch.autograd.grad(out, [leaves["alpha"]], retain_graph=True)
        for ours, expected in zip(
            torch.autograd.grad(out, inputs, retain_graph=True), plain, strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_an_abandoned_backward_leaves_nothing_behind():
    """The projection never ran: what is in the buffer must not reach the next forward."""
    leaves = leaves_of()
    buffer = new_buffer(leaves)
    f = torch.randn(6, 33, requires_grad=True)
    mixes = (torch.rand(6, N), leaves["x"], torch.rand(6, N, N))
    out = te.mhc_fused_expand_combine(f, None, *mixes, N, fused_grad_x_acc_buffer=buffer)
    torch.autograd.grad(out.sum(), f)
    del out
    plain = gradients(pre_only, leaves, None)
    torch.testing.assert_close(gradients(pre_only, leaves, buffer)[0], plain[0])


def test_a_gradient_of_another_forward_raises():
    leaves = leaves_of()
    buffer = new_buffer(leaves)
    f = torch.randn(6, 33, requires_grad=True)
    mixes = (torch.rand(6, N), leaves["x"], torch.rand(6, N, N))
    kept = te.mhc_fused_expand_combine(f, None, *mixes, N, fused_grad_x_acc_buffer=buffer)
    torch.autograd.grad(kept.sum(), f, retain_graph=True)
    with pytest.raises(ShapeError, match=f"{BUFFER} must hold no gradient of another forward"):
        gradients(pre_only, leaves, buffer)
    assert kept.grad_fn is not None


def test_streams_without_a_gradient_leave_the_buffer_alone():
    leaves = leaves_of()
    leaves["x"] = leaves["x"].detach()
    buffer = new_buffer(leaves)
    plain = gradients(sub_layer, leaves, None, [leaves["phi"]])
    assert torch.equal(gradients(sub_layer, leaves, buffer, [leaves["phi"]])[0], plain[0])
    assert buffer.isnan().all()


def test_buffer_breaks_the_graph_of_torch_compile():
    leaves = leaves_of()
    plain = gradients(sub_layer, leaves, None)
    compiled = torch.compile(sub_layer, backend="eager")
    for ours, expected in zip(gradients(compiled, leaves, new_buffer(leaves)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_state_goes_with_its_graphs():
    leaves = leaves_of()
    before = len(_accumulation._states)
    out = sub_layer(**leaves, buffer=new_buffer(leaves))
    assert len(_accumulation._states) == before + 1
    del out
    assert len(_accumulation._states) == before


# Errors.

X = torch.zeros(2, 3, 8, N)
PHI, ALPHA, BETA = torch.zeros(24, 32), torch.zeros(3), torch.zeros(1, 24)
PRE, COMB, F = torch.zeros(2, 3, N), torch.zeros(2, 3, N, N), torch.zeros(2, 3, 8)
FLAT = X.view(6, 32)
H, MS = torch.zeros(6, 32), torch.ones(6)
HALF = torch.float16


def aggregate_with(buffer):
    return lambda: te.mhc_fused_aggregate(X, PRE, N, fused_grad_x_acc_buffer=buffer)


SHAPE_ERRORS = {
    r"mhc_fused_projection: x must be \(T, K\) bfloat16 or float32; got \(2, 3, 8, 4\)": lambda: (
        te.mhc_fused_projection(X, PHI)
    ),
    r"projection: x must be \(T, K\) bfloat16 or float32; got .* float16": lambda: (
        te.mhc_fused_projection(FLAT.to(HALF), PHI)
    ),
    r"projection: x must be a torch\.Tensor": lambda: te.mhc_fused_projection(None, PHI),
    r"projection: x must be contiguous": lambda: te.mhc_fused_projection(FLAT.mT, PHI),
    r"projection: phi must be \(24, 32\) float32 or bfloat16": lambda: te.mhc_fused_projection(
        FLAT, PHI[:4]
    ),
    r"projection: norm_weight must be \(32,\)": lambda: te.mhc_fused_projection(
        FLAT, PHI, norm_weight=torch.zeros(31)
    ),
    r"projection: use_tf32 must be True or False": lambda: te.mhc_fused_projection(FLAT, PHI, 1),
    r"projection: use_split_k must be True or False": lambda: te.mhc_fused_projection(
        FLAT, PHI, use_split_k=None
    ),
    r"mhc_fused_scale: H must be \(6, 32\)": lambda: te.mhc_fused_scale(
        H[:, :24], ALPHA, BETA, MS, N
    ),
    r"scale: alpha must be \(3,\)": lambda: te.mhc_fused_scale(H, BETA, BETA, MS, N),
    r"scale: beta must be \(1, 24\) or \(24,\)": lambda: te.mhc_fused_scale(H, ALPHA, MS, MS, N),
    r"scale: ms must be \(6,\)": lambda: te.mhc_fused_scale(H, ALPHA, BETA, MS[1:], N),
    r"mhc_fused_sinkhorn: H_res must be \(2, 3, 4, 4\)": lambda: te.mhc_fused_sinkhorn(X),
    r"sinkhorn: recompute_hist must be": lambda: te.mhc_fused_sinkhorn(COMB, N, 2),
    r"sinkhorn: iters must be an integer of at least 1; got 0": lambda: te.mhc_fused_sinkhorn(
        COMB, iters=0
    ),
    r"mhc_fused_aggregate: x must be \(\.\.\., C, 4\); got \(2, 3, 8\)": lambda: (
        te.mhc_fused_aggregate(F, PRE, N)
    ),
    r"aggregate: x must be contiguous": lambda: te.mhc_fused_aggregate(X.mT, PRE, N),
    r"aggregate: H_pre must be \(2, 3, 4\)": lambda: te.mhc_fused_aggregate(X, COMB, N),
    r"mhc_fused_expand_combine: f must be \(2, 3, 8\)": lambda: te.mhc_fused_expand_combine(
        X, None, PRE, X, COMB, N
    ),
    r"expand_combine: bias must be \(8,\)": lambda: te.mhc_fused_expand_combine(
        F, MS, PRE, X, COMB, N
    ),
    r"expand_combine: H_post must be \(2, 3, 4\)": lambda: te.mhc_fused_expand_combine(
        F, None, COMB, X, COMB, N
    ),
    r"expand_combine: H_res must be \(2, 3, 4, 4\)": lambda: te.mhc_fused_expand_combine(
        F, None, PRE, X, PRE, N
    ),
    rf"aggregate: {BUFFER} must be 192 elements of float32 .*got .* bfloat16": aggregate_with(
        torch.zeros_like(X, dtype=torch.bfloat16)
    ),
    rf"aggregate: {BUFFER} must be 192 elements of float32 .*got \(2, 3, 8\)": aggregate_with(F),
    rf"aggregate: {BUFFER} must be 192 elements .*that requires grad": aggregate_with(
        torch.zeros_like(X).requires_grad_()
    ),
    rf"aggregate: {BUFFER} must be 192 elements .* on cpu": aggregate_with(
        torch.zeros_like(X, device="meta")
    ),
    rf"aggregate: {BUFFER} must be contiguous": aggregate_with(torch.zeros_like(X).mT),
    rf"aggregate: {BUFFER} must not share memory with x": aggregate_with(X),
    rf"aggregate: {BUFFER} must start at a multiple of 32 bytes": aggregate_with(
        torch.zeros(193)[1:]
    ),
    rf"aggregate: {BUFFER} must be a torch\.Tensor": aggregate_with(3),
    rf"projection: {BUFFER} must be 192 elements": lambda: te.mhc_fused_projection(
        FLAT, PHI, fused_grad_x_acc_buffer=F
    ),
    rf"expand_combine: {BUFFER} must be 192 elements": lambda: te.mhc_fused_expand_combine(
        F, None, PRE, X, COMB, N, fused_grad_x_acc_buffer=F
    ),
}
UNSUPPORTED = {
    r"mhc_fused_aggregate: n must be 4; got 2": lambda: te.mhc_fused_aggregate(X, PRE, 2),
    r"mhc_fused_expand_combine: n must be 4; got 8": lambda: te.mhc_fused_expand_combine(
        F, None, PRE, X, COMB, 8
    ),
    r"mhc_fused_scale: n must be 4; got 2": lambda: te.mhc_fused_scale(H, ALPHA, BETA, MS, 2),
    r"mhc_fused_sinkhorn: n must be 4; got True": lambda: te.mhc_fused_sinkhorn(COMB, True),
    r"mhc_fused_sinkhorn: iters must be at most 1024; got 1025": lambda: te.mhc_fused_sinkhorn(
        COMB, iters=1025
    ),
    r"mhc_fused_projection: K must be 4\*C .*got 30": lambda: te.mhc_fused_projection(
        torch.zeros(6, 30), PHI
    ),
    r"mhc_fused_aggregate: C must be from 1 to 49152; got 49153": lambda: te.mhc_fused_aggregate(
        torch.zeros(1, 49153, N), torch.zeros(1, N), N
    ),
}


@pytest.mark.parametrize("message", SHAPE_ERRORS)
def test_wrong_arguments(message):
    with pytest.raises(ShapeError, match=message):
        SHAPE_ERRORS[message]()


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_no_kernel(message):
    with pytest.raises(UnsupportedError, match=message):
        UNSUPPORTED[message]()


def test_the_gradient_can_be_taken_once():
    x = X.clone().requires_grad_()
    mix = PRE.clone().requires_grad_()
    out = te.mhc_fused_aggregate(x, mix, N, fused_grad_x_acc_buffer=torch.zeros_like(X))
    (grad,) = torch.autograd.grad(out.square().sum(), mix, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# The alias: what it shares with that of TileKernels, test_compat_interface has.


def forget():
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]


@pytest.fixture
def real(monkeypatch, tmp_path):
    """Write the files of a real TransformerEngine, and make it importable."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "transformer_engine" / name.replace("__", "/") / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    forget()
    yield write
    te.uninstall()
    forget()


@pytest.fixture
def alias():
    """Where there is no real one."""
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("a real TransformerEngine is installed")
    te.install()
    yield
    te.uninstall()


def test_import_statements(alias):
    from transformer_engine.pytorch.triton import mhc
    from transformer_engine.pytorch.triton.mhc import (
        ENFORCE_DETERMINISTIC,
        mhc_fused_sinkhorn,
    )

    assert ENFORCE_DETERMINISTIC is False
    assert mhc_fused_sinkhorn is te.mhc_fused_sinkhorn
    assert importlib.import_module(MODULE) is te.pytorch.triton.mhc is mhc


ABSENT = [
    "import transformer_engine",
    "import transformer_engine as te",
    "import transformer_engine.pytorch as te",
    "from transformer_engine import pytorch",
    "from transformer_engine.pytorch import Linear",
    "from transformer_engine.pytorch.triton import permutation",
    "import transformer_engine.pytorch.triton.permutation",
    "import transformer_engine.common.recipe",
]


@pytest.mark.parametrize("statement", ABSENT)
def test_nothing_else_is_pretended(alias, statement):
    """What Megatron-Core, PEFT, accelerate and their like ask, in a try of ImportError."""
    with pytest.raises(ImportError):
        exec(statement, {})


def test_nobody_finds_a_package(alias):
    """importlib.util.find_spec is PEFT's and accelerate's question, metadata Megatron-Core's."""
    assert importlib.util.find_spec("transformer_engine") is None
    with pytest.raises(ModuleNotFoundError, match="transformer_engine"):
        importlib.util.find_spec("transformer_engine.pytorch")
    for name in ("transformer_engine", "transformer-engine"):
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)


@pytest.mark.parametrize(
    ("library", "code"),
    [
        ("megatron.core", "import megatron.core.distributed\n"
         "import megatron.core.models.gpt.gpt_layer_specs as specs, megatron.core.utils as utils\n"
         "print(specs.HAVE_TE or utils.get_te_version() is not None)"),
        ("peft", "from peft.import_utils import is_te_available, is_te_pytorch_available\n"
         "print(is_te_available() or is_te_pytorch_available())"),
        ("accelerate", "from accelerate.utils import is_transformer_engine_available\n"
         "print(bool(is_transformer_engine_available()))"),
    ],
)  # fmt: skip
def test_libraries_see_none(library, code):
    """Where they look for TransformerEngine, in a process that has the alias before them."""
    if not importlib.util.find_spec(library.partition(".")[0]):
        pytest.skip(f"needs {library}")
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("a real TransformerEngine is installed")
    head = "from tile_mhc.compat import transformer_engine as te; te.install()\n"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


def test_uninstall_leaves_nothing(alias):
    te.uninstall()
    assert not [n for n in sys.modules if n.partition(".")[0] == "transformer_engine"]
    with pytest.raises(ModuleNotFoundError, match="transformer_engine"):
        importlib.import_module(MODULE)


def test_install_refuses_to_hide_a_package(real):
    real(**{"": "MARK = 1"})
    with pytest.raises(RuntimeError, match=r"install: no other transformer_engine .*force=True"):
        te.install()
    assert "transformer_engine" not in sys.modules
    te.install(force=True)
    assert importlib.import_module("transformer_engine").MARK == 1
    assert importlib.import_module(MODULE) is te.pytorch.triton.mhc
    te.uninstall()
    with pytest.raises(ModuleNotFoundError, match=r"transformer_engine\.pytorch"):
        importlib.import_module(MODULE)
    assert importlib.import_module("transformer_engine").MARK == 1


def test_force_keeps_the_rest_of_a_real_one(real):
    real(
        **{"": "from . import pytorch", "pytorch": "class Linear: pass"},
        pytorch__triton="",
        pytorch__triton__mhc="MARK = 'real'",
        pytorch__triton__permutation="MARK = 'real'",
    )
    te.install(force=True)
    from transformer_engine.pytorch import Linear
    from transformer_engine.pytorch.triton import mhc, permutation
    from transformer_engine.pytorch.triton.mhc import mhc_fused_scale

    assert Linear.__module__ == "transformer_engine.pytorch"
    assert permutation.MARK == "real"
    assert mhc is te.pytorch.triton.mhc
    assert mhc_fused_scale is te.mhc_fused_scale
    code = "import transformer_engine.pytorch.triton.mhc\nfound = transformer_engine.pytorch.triton"
    exec(code, names := {})
    assert names["found"].mhc is mhc
    te.uninstall()
    assert importlib.import_module(MODULE).MARK == "real"
    assert importlib.import_module("transformer_engine").pytorch.triton is names["found"]


def test_force_where_the_real_one_has_no_such_package(real):
    """Releases before mHC, and before Triton."""
    real(**{"": "from . import pytorch", "pytorch": "class Linear: pass"})
    first = importlib.import_module("transformer_engine.pytorch")
    te.install(force=True)
    assert importlib.import_module("transformer_engine.pytorch") is first
    assert first.triton.mhc is te.pytorch.triton.mhc
    assert importlib.import_module(MODULE) is te.pytorch.triton.mhc
    te.uninstall()
    assert not hasattr(first, "triton")


def test_force_where_the_real_one_does_not_import(real):
    real(**{"": "raise OSError('no library')"})
    te.install(force=True)
    assert importlib.import_module(MODULE) is te.pytorch.triton.mhc
    with pytest.raises(OSError, match="no library"):
        importlib.import_module("transformer_engine")


def test_a_blocked_package_is_none(real, monkeypatch):
    """What `sys.modules[name] = None` says: no import."""
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    te.install()
    assert importlib.import_module(MODULE) is te.pytorch.triton.mhc
    te.uninstall()
    assert sys.modules["transformer_engine"] is None


@pytest.mark.parametrize(("value", "enforced"), [("0", True), ("1", False)])
def test_determinism_is_read_from_the_environment(value, enforced):
    code = (
        "import sys; sys.modules['tilelang'] = None\n"
        "from tile_mhc.compat import transformer_engine as te; te.install()\n"
        "from transformer_engine.pytorch.triton import mhc\n"
        "print(mhc.ENFORCE_DETERMINISTIC)"
    )
    status, out, err = fresh.run(code, NVTE_ALLOW_NONDETERMINISTIC_ALGO=value)
    assert (status, out.strip()) == (0, str(enforced)), err


def test_split_k_is_deterministic_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(te.pytorch.triton.mhc, "ENFORCE_DETERMINISTIC", True)
    inputs = sub_layer_inputs(6, 33, DTYPES[2], "cpu")
    flat = inputs["x"].flatten(-2)
    split = te.mhc_fused_projection(flat, inputs["phi"], use_split_k=True)
    assert torch.equal(split[0], te.mhc_fused_projection(flat, inputs["phi"])[0])


def test_specification_uses_transformer_engines_epsilon():
    assert reference.RMS_EPS == 2.0**-23


def test_gradients_of_saturated_gates():
    saturation.check_padded_mixes("cpu")


@pytest.mark.parametrize("iters", [20, 100])
def test_sinkhorn_is_that_of_the_definition(iters):
    def sinkhorn(logits):
        return te.mhc_fused_sinkhorn(logits, te_cases.N, iters=iters)

    for gap in far_apart.GAPS:
        far_apart.check(te_cases.N, gap, iters, "cpu", sinkhorn)
