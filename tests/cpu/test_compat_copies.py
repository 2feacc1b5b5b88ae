"""Streams that are rearranged and gradients that come strided, through TileKernels' names.

tests/gpu/test_compat_copies.py runs the same tests on the kernels.
"""

import copy
import pickle
from collections import Counter

import pytest
import torch

from tile_mhc.compat.tile_kernels import copy_report
from tile_mhc.compat.tile_kernels._copies import _Gradient
from tile_mhc.compat.tile_kernels.mhc import mhc_post_bwd, mhc_post_fwd
from tile_mhc.compat.tile_kernels.modeling import mhc
from tile_mhc.compat.tile_kernels.modeling.mhc import ops

S, B, N, H = 5, 3, 4, 128
POSTED = "grad_from_mhc_post"


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture
def copies():
    """What has been copied in the test so far, by function and argument."""

    def flat():
        report = copy_report()
        return Counter({(op, name): n for op, of in report.items() for name, n in of.items()})

    before = flat()
    return lambda: dict(flat() - before)


def seeded(device, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def inputs(device):
    """By name, laid out (s, b, ...) where the function is called with (b, s, ...)."""
    size = N * H
    return {
        "residual": seeded(device, S, B, N, H, dtype=torch.bfloat16),
        "x": seeded(device, S, B, H, dtype=torch.bfloat16, seed=1),
        "mix": seeded(device, S, B, N, 1, seed=2).sigmoid(),
        "comb": seeded(device, S, B, N, N, seed=3).softmax(-1),
        "mixes": seeded(device, S, B, 24, seed=4),
        "head_mixes": seeded(device, S, B, N, seed=5),
        "fn": seeded(device, 24, size, seed=6) * size**-0.5,
        "scale": seeded(device, 3, seed=7),
        "base": seeded(device, 24, seed=8),
    }


# By name: which inputs are by token, the call, and what it copies of them.
CALLS = {
    "expand_to_mhc": (("x",), lambda x: ops.expand_to_mhc(x["x"], N), ("hidden",)),
    "mhc_pre_norm_fn": (
        ("residual",),
        lambda x: ops.mhc_pre_norm_fn(x["residual"], x["fn"], None, 1e-6),
        ("residual",),
    ),
    "mhc_pre_split_mixes": (
        ("mixes",),
        lambda x: ops.mhc_pre_split_mixes(x["mixes"], x["scale"], x["base"], N, 2.0, 1e-6),
        ("input_mixes",),
    ),
    "sinkhorn_normalize": (("comb",), lambda x: ops.sinkhorn_normalize(x["comb"]), ("x",)),
    "mhc_pre_apply_mix": (
        ("residual", "mix"),
        lambda x: ops.mhc_pre_apply_mix(x["residual"], x["mix"]),
        ("x", "mix"),
    ),
    "mhc_post": (
        ("x", "residual", "mix", "comb"),
        lambda x: ops.mhc_post(x["x"], x["residual"], x["mix"], x["comb"]),
        ("x", "residual", "post_layer_mix", "comb_res_mix"),
    ),
    "mhc_head_compute_mix": (
        ("head_mixes",),
        lambda x: ops.mhc_head_compute_mix(
            x["head_mixes"], x["scale"][:1], x["base"][:N].clone(), 1e-6
        ),
        ("input_mix",),
    ),
    "mhc_pre": (
        ("residual",),
        lambda x: _flat(mhc.mhc_pre(x["residual"], x["fn"], x["scale"], x["base"])),
        ("residual",),
    ),
    "mhc_head": (
        ("residual",),
        lambda x: mhc.mhc_head(x["residual"], x["fn"], x["scale"][:1], x["base"][:N].clone()),
        ("residual",),
    ),
}
EVERY_CALL = pytest.mark.parametrize("name", CALLS)
OUTPUTS = {
    "mhc_pre_split_mixes": ("pre_mix", "post_mix", "comb_mix"),
    "mhc_pre": ("layer_input", "post_mix", "comb_mix"),
}


def _flat(outputs):
    layer_input, mixes = outputs
    return layer_input, *mixes


def run(name, given, by_token, grads):
    """Outputs and gradients of all inputs, those by token in the order that they were given."""
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in given.items()}
    # The leaf lies as it is given, and the call sees what `by_token` makes of it.
    seen = {key: by_token(leaf) if key in CALLS[name][0] else leaf for key, leaf in leaves.items()}
    outputs = CALLS[name][1](seen)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [leaf for leaf in leaves.values()]
    found = torch.autograd.grad(outputs, wanted, grads(outputs), allow_unused=True)
    return outputs, dict(zip(leaves, found, strict=True))


def rows(outputs, seed=9):
    return [
        seeded(out.device, *out.shape, dtype=out.dtype, seed=seed + i)
        for i, out in enumerate(outputs)
    ]


@EVERY_CALL
def test_rearranged_streams(device, copies, name):
    """(s, b, n, d) -> (b, s, n, d): values and gradients to the bit, and every copy counted."""
    given = inputs(device)
    swapped = {
        key: tensor.transpose(0, 1).contiguous() if key in CALLS[name][0] else tensor
        for key, tensor in given.items()
    }
    want, want_grads = run(name, swapped, lambda tensor: tensor, rows)
    assert copies() == {}
    found, grads = run(name, given, lambda tensor: tensor.transpose(0, 1), rows)
    assert copies() == {(name, argument): 1 for argument in CALLS[name][2]}
    for one, other in zip(found, want, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, other)
    for key, grad in grads.items():
        if grad is not None and key in CALLS[name][0]:
            grad = grad.transpose(0, 1)
        assert (grad is None) == (want_grads[key] is None)
        assert grad is None or torch.equal(grad, want_grads[key]), key


def strided(outputs):
    """The same numbers, each gradient a view with its first two dimensions the other way round."""
    return [grad.transpose(0, 1).contiguous().transpose(0, 1) for grad in rows(outputs)]


def expanded(outputs):
    """What a sum sends back."""
    return [torch.ones((), device=out.device, dtype=out.dtype).expand_as(out) for out in outputs]


def ones(outputs):
    return [torch.ones_like(out) for out in outputs]


@EVERY_CALL
@pytest.mark.parametrize(("grads", "plain"), [(strided, rows), (expanded, ones)])
def test_strided_gradients(device, copies, name, grads, plain):
    """One copy each, whoever reads it; the gradients to the bit."""
    given = {
        key: t.transpose(0, 1).contiguous() if t.ndim > 2 else t
        for key, t in inputs(device).items()
    }
    _, want = run(name, given, lambda tensor: tensor, plain)
    assert copies() == {}
    _, found = run(name, given, lambda tensor: tensor, grads)
    # The head is composed of others, and its output is that of the last.
    op = "mhc_pre_apply_mix" if name == "mhc_head" else name
    assert copies() == {(op, f"gradient of {out}"): 1 for out in OUTPUTS.get(name, ("out",))}
    for key, grad in found.items():
        assert grad is None or torch.equal(grad, want[key]), key


def test_a_sub_layer_of_rearranged_streams(device, copies):
    """As miles and VeOmni hold them: (s, b, n, d) outside, (b, s, n, d) inside."""
    given = inputs(device)

    def loss(residual, *gates):
        layer_input, mixes = mhc.mhc_pre(residual, *gates)
        return ops.mhc_post(layer_input.tanh(), residual, *mixes)

    results = []
    for rearrange in (lambda t: t.transpose(0, 1).contiguous(), lambda t: t.transpose(0, 1)):
        leaves = [
            given[key].clone().requires_grad_() for key in ("residual", "fn", "scale", "base")
        ]
        out = loss(rearrange(leaves[0]), *leaves[1:])
        # Back to (s, b, n, d), whose gradient comes strided.
        out = out.transpose(0, 1)
        results.append((out, *torch.autograd.grad(out, leaves, rows([out])[0])))
    one = {("mhc_pre", "residual"): 1, ("mhc_post", "residual"): 1}
    assert copies() == {**one, ("mhc_post", "gradient of out"): 2}
    for plain, rearranged in zip(*results, strict=True):
        if plain.ndim == 4 and plain.dtype == torch.bfloat16 and plain is not results[0][0]:
            # Autograd adds the two parts of it in one order or the other.
            assert torch.allclose(plain.float(), rearranged.float(), rtol=2**-6, atol=2**-6)
        else:
            assert torch.equal(plain, rearranged)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("name", ["mhc_pre_apply_mix", "mhc_pre_norm_fn", "mhc_pre"])
def test_a_gradient_on_the_storage_of_rearranged_streams(device, name, square):
    """One that is posted on memory of (s, b, n, d) has another order of tokens than a call with
    (b, s, n, d), also where both have one shape: it is left alone, and autograd's is right."""
    given = inputs(device)
    if square:
        given = {key: t[:B] if t.ndim > 2 else t for key, t in given.items()}
    leaf = given["residual"].clone().requires_grad_()
    posted = torch.randn_like(leaf)
    before = posted.clone()
    setattr(leaf.untyped_storage(), POSTED, posted)
    seen = {
        key: tensor.transpose(0, 1) if key in CALLS[name][0] else tensor
        for key, tensor in {**given, "residual": leaf}.items()
    }
    outputs = CALLS[name][1](seen)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (grad,) = torch.autograd.grad(outputs, leaf, rows(outputs))
    assert torch.equal(posted, before)
    assert getattr(leaf.untyped_storage(), POSTED) is posted
    plain = {**given, "residual": given["residual"]}
    _, want = run(name, plain, lambda tensor: tensor.transpose(0, 1), rows)
    assert torch.equal(grad, want["residual"])


def test_post_without_a_graph(device, copies):
    given = inputs(device)
    keys = ("x", "residual", "mix", "comb")
    plain = [given[key].transpose(0, 1).contiguous() for key in keys]
    views = [given[key].transpose(0, 1) for key in keys]
    grad = rows([plain[1]])[0]
    want = (mhc_post_fwd(*plain), *mhc_post_bwd(*plain, grad))
    assert copies() == {}
    strided_grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    found = (mhc_post_fwd(*views), *mhc_post_bwd(*views, strided_grad))
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)
    assert copies() == {
        ("mhc_post_fwd", "x"): 1,
        ("mhc_post_fwd", "residual"): 1,
        ("mhc_post_bwd", "x"): 1,
        ("mhc_post_bwd", "residual"): 1,
        ("mhc_post_bwd", "d_o"): 1,
    }
    assert not hasattr(views[1].untyped_storage(), POSTED)


def test_big_fuse(device, copies):
    given = inputs(device)
    gates = [given[key] for key in ("fn", "scale", "base")]
    view = given["residual"].transpose(0, 1)
    found = ops.mhc_pre_big_fuse(view, *gates, *[1e-6] * 3, 1.0, 10)
    want = ops.mhc_pre_big_fuse(view.contiguous(), *gates, *[1e-6] * 3, 1.0, 10)
    assert copies() == {("mhc_pre_big_fuse", "residual"): 1}
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_out_and_a_strided_gradient(device, copies):
    given = {key: inputs(device)[key].transpose(0, 1) for key in ("residual", "mix")}
    leaf = given["residual"].detach().requires_grad_()
    out = torch.empty(B, S, H, device=device, dtype=torch.bfloat16)
    result = ops.mhc_pre_apply_mix(leaf, given["mix"], out)
    result.backward(strided([out])[0])
    assert copies() == {
        ("mhc_pre_apply_mix", "x"): 1,
        ("mhc_pre_apply_mix", "mix"): 1,
        ("mhc_pre_apply_mix", "gradient of out"): 1,
    }
    other = given["residual"].detach().contiguous().requires_grad_()
    ops.mhc_pre_apply_mix(other, given["mix"]).backward(rows([out])[0])
    assert torch.equal(leaf.grad, other.grad)


def test_an_output_that_nothing_uses(device, copies):
    given = inputs(device)
    leaf = given["mixes"].transpose(0, 1).contiguous().requires_grad_()
    pre_mix, *_ = ops.mhc_pre_split_mixes(leaf, given["scale"], given["base"], N, 2.0, 1e-6)
    (grad,) = torch.autograd.grad(pre_mix, leaf, rows([pre_mix])[0])
    assert grad[..., :N].any()
    assert not grad[..., N:].any()
    assert copies() == {}


def test_inside_of_a_compiled_graph(device, copies):
    """Not counted there, and still one graph and the same numbers."""
    given = inputs(device)
    gates = [given[key] for key in ("fn", "scale", "base")]

    def forward(streams):
        return mhc.mhc_pre(streams.transpose(0, 1), *gates)[0]

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["residual"]), forward(given["residual"]))
    assert copies() == {("mhc_pre", "residual"): 1}


def test_hooks_can_be_copied():
    """A model's outputs may be: checkpointing and offloading pickle what is beside them."""
    hook = _Gradient("mhc_post", "gradient of out")
    for other in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert (other.op, other.name) == (hook.op, hook.name)
