"""What torch's transforms see of an op: forward mode, torch.func, FLOPs, tags."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

import oracle
import tile_mhc
from cases import (
    AGGREGATE,
    CONTRACT,
    EXPAND,
    FUSED_PRE,
    HEAD_MIX,
    IDENTITY_POST,
    IDENTITY_PRE,
    OPS,
    POST,
    PROJECTION,
    SINKHORN,
    SPLIT_MIXES,
    STREAM_MEAN,
    operator_calls,
    recompute_inputs,
)
from tile_mhc import GradAccumulator, UnsupportedError, functional, nn
from tile_mhc.compat import transformer_engine
from tile_mhc.compat.tile_kernels.modeling.mhc import functional as tile_kernels
from tile_mhc.compat.tile_kernels.modeling.mhc import ops as tile_kernels_ops

CALLS = sorted(operator_calls((2,), 2, 64, "meta"))
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=str)
N, H = 4, 64
NO_TANGENT = "every input must be without a tangent"


def _operator(name):
    return getattr(torch.ops.tile_mhc, name)


# Forward mode.


def _jvp(function, args, position):
    primal, rest = args[position], (args[:position], args[position + 1 :])
    return jvp(lambda x: function(*rest[0], x, *rest[1]), (primal,), (torch.ones_like(primal),))


def _dual(function, args, position):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[position], torch.ones_like(args[position]))
        function(*args[:position], dual, *args[position + 1 :])


def _dual_without_grad(function, args, position):
    with torch.no_grad():
        _dual(function, args, position)


def _jvp_compiled(function, args, position):
    torch.compile(
        lambda *values: _jvp(function, values, position), fullgraph=True, backend="aot_eager"
    )(*args)


EAGER_WAYS = (_jvp, _dual, _dual_without_grad)
ways = pytest.mark.parametrize("way", EAGER_WAYS, ids=lambda way: way.__name__)


@pytest.mark.parametrize("name", CALLS)
def test_every_operator_refuses_a_tangent_of_every_tensor(name):
    """Called as the dispatcher calls it: those of backward, `into` and `out` too."""
    flat, spec = tree_flatten(operator_calls((3,), 2, 64, "cpu")[name])
    detached = [v.detach() if isinstance(v, torch.Tensor) else v for v in flat]
    positions = [i for i, v in enumerate(detached) if isinstance(v, torch.Tensor)]
    assert positions

    def call(*values):
        return _operator(name)(*tree_unflatten(list(values), spec))

    for position in positions:
        for way in EAGER_WAYS:
            with pytest.raises(UnsupportedError, match=f"^{name}: {NO_TANGENT}.*reverse mode"):
                way(call, detached, position)


@EVERY_OP
@ways
def test_every_op_refuses_a_tangent(op, way):
    tensors, options = op.inputs((3,), N, H, "cpu")
    for position in range(len(tensors)):

        def run(*values, names=tuple(tensors)):
            return op.run(**dict(zip(names, values, strict=True)), **options)

        with pytest.raises(UnsupportedError, match=f"^{op.run.__name__}: {NO_TANGENT}"):
            way(run, list(tensors.values()), position)


def _pre_arguments(rows=N * (N + 2), gates=3):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, N * H, generator=generator) * (N * H) ** -0.5
    return weight, torch.ones(gates), torch.zeros(rows)


def _other_names():
    """By name: a function of the streams alone, which calls an op in some other way."""
    streams = torch.randn(3, N, H).bfloat16()
    mix, comb, output = torch.rand(3, N), torch.rand(3, N, N), torch.randn(3, H).bfloat16()
    pre, head = _pre_arguments(), _pre_arguments(N, 1)
    marked = pre[0].clone().requires_grad_()
    marked.main_grad = torch.zeros_like(marked)
    accumulator = GradAccumulator(streams)
    connection, readout = nn.HyperConnection(H), nn.HyperHead(H)
    interleaved = streams.mT.contiguous()
    destinations = {"out": torch.empty_like(output)}
    ops = tile_kernels_ops
    return streams, {
        "aggregate_out": lambda x: tile_mhc.aggregate(x, mix, **destinations),
        "post_out": lambda x: tile_mhc.post(output, x, mix, comb, out=torch.empty_like(streams)),
        "recompute": lambda x: tile_mhc.recompute(x, [mix], [], [], []),
        "main_grad": lambda x: functional.mhc_pre(x, marked, *pre[1:]),
        "passes_residual": lambda x: functional.mhc_pre(x, *pre, passes_residual=True),
        "HyperConnection": lambda x: connection(x, torch.tanh),
        "HyperHead": readout,
        "mhc_pre": lambda x: tile_kernels.mhc_pre(x, *pre),
        "mhc_head": lambda x: tile_kernels.mhc_head(x, *head),
        "mhc_post": lambda x: tile_kernels.mhc_post(output, x, mix.unsqueeze(-1), comb),
        "mhc_pre_big_fuse": lambda x: ops.mhc_pre_big_fuse(x, *pre, 1e-6, 1e-6, 1e-6, 1.0, 5),
        "mhc_pre_apply_mix": lambda x: ops.mhc_pre_apply_mix(x, mix, **destinations),
        "mhc_fused_aggregate": lambda x: transformer_engine.mhc_fused_aggregate(
            x.mT.contiguous(), mix, N
        ),
        "fused_grad_x_acc_buffer": lambda x: transformer_engine.mhc_fused_aggregate(
            x.mT.contiguous(),
            mix,
            N,
            fused_grad_x_acc_buffer=torch.zeros(interleaved.numel()),
        ),
        "accumulator": lambda x: tile_mhc.aggregate(
            streams, mix * x.float().mean(-1), grad_accumulator=accumulator
        ),
    }


@ways
@pytest.mark.parametrize("name", sorted(_other_names()[1]))
def test_other_names_refuse_a_tangent(name, way):
    streams, functions = _other_names()
    with pytest.raises(UnsupportedError, match=f"{NO_TANGENT}|inside a transform of torch.func"):
        way(functions[name], [streams], 0)


def test_a_tangent_is_refused_under_compile():
    tensors, _ = AGGREGATE.inputs((3,), N, H, "cpu")
    with pytest.raises(Exception, match=f"aggregate: {NO_TANGENT}"):
        _jvp_compiled(tile_mhc.aggregate, list(tensors.values()), 0)


def test_forward_over_reverse_is_refused():
    tensors, _ = AGGREGATE.inputs((3,), N, H, "cpu")

    def loss(residual):
        return tile_mhc.aggregate(residual, tensors["pre_mix"]).float().square().sum()

    with pytest.raises(UnsupportedError, match=f"^aggregate: {NO_TANGENT}"):
        hessian(loss)(tensors["residual"])


def test_a_dual_level_alone_changes_nothing():
    tensors, _ = AGGREGATE.inputs((3,), N, H, "cpu")
    with forward_ad.dual_level():
        inside = tile_mhc.aggregate(**tensors)
    assert torch.equal(inside, tile_mhc.aggregate(**tensors))


# Reverse mode.


@EVERY_OP
def test_vjp_has_the_bits_of_autograd(op):
    tensors, options = op.inputs((3,), N, H, "cpu")
    upstream = oracle.upstream_of(op, tensors, options)
    expected = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
    names = tuple(tensors)

    def run(*values):
        return oracle.as_tuple(op.run(**dict(zip(names, values, strict=True)), **options))

    outputs, pull = vjp(run, *tensors.values())
    found = dict(zip(op.outputs, outputs, strict=True))
    found |= {f"grad_{n}": g for n, g in zip(names, pull(tuple(upstream)), strict=True)}
    oracle.check_same_bits(found, expected, "torch.func.vjp and autograd:")


def test_vjp_of_a_passed_residual():
    """Its gradient is then a sum that torch takes: no more than its roundings away."""
    tensors, options = FUSED_PRE.inputs((3,), N, H, "cpu")
    tensors["residual"] = tensors["residual"].float()
    grads = [torch.randn(3, H), torch.randn(3, N), torch.randn(3, N, N), torch.randn(3, N, H)]
    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    names = tuple(tensors)

    def run(*values):
        return functional.mhc_pre(
            **dict(zip(names, values, strict=True)), **options, passes_residual=True
        )

    expected = torch.autograd.grad(run(*leaves), leaves, grads)
    _, pull = vjp(run, *tensors.values())
    for name, ours, other in zip(names, pull(tuple(grads)), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6, msg=name)


def test_jacrev():
    tensors, _ = AGGREGATE.inputs((2,), 2, 8, "cpu")
    residual = tensors["residual"].float()
    jacobian = jacrev(lambda x: tile_mhc.aggregate(x, tensors["pre_mix"]))(residual)
    expected = torch.zeros(2, 8, 2, 2, 8)
    for t in range(2):
        for h in range(8):
            expected[t, h, t, :, h] = tensors["pre_mix"][t]
    assert torch.equal(jacobian, expected)


def test_a_second_gradient_is_refused():
    tensors, _ = AGGREGATE.inputs((3,), N, H, "cpu")

    def loss(residual):
        return tile_mhc.aggregate(residual, tensors["pre_mix"]).float().square().sum()

    with pytest.raises(UnsupportedError, match="aggregate_backward: the gradient must be taken"):
        grad(lambda x: grad(loss)(x).float().square().sum())(tensors["residual"])


def test_the_gradient_of_an_operator_of_backward_is_refused_wherever_it_is_called():
    grads = [torch.randn(3, H, requires_grad=True), torch.randn(3, N, H), torch.rand(3, N)]
    with pytest.raises(UnsupportedError, match="aggregate_backward: the gradient must be taken"):
        _operator("aggregate_backward")(*grads)[0].sum().backward()


def test_vmap_runs_sample_by_sample():
    module = nn.HyperConnection(H)
    streams = torch.randn(3, 2, N, H)
    with torch.no_grad():
        found = vmap(lambda x: module(x, torch.tanh))(streams)
        expected = torch.stack([module(x, torch.tanh) for x in streams])
    assert torch.equal(found, expected)


def test_vmap_over_parameters():
    weight, scale, bias = _pre_arguments()
    weights = torch.stack([weight, -weight, 2 * weight], dim=1)
    streams = torch.randn(2, N, H)
    found = vmap(lambda w: functional.mhc_pre(streams, w, scale, bias)[0], in_dims=1)(weights)
    for index in range(3):
        expected = functional.mhc_pre(streams, weights[:, index].contiguous(), scale, bias)[0]
        assert torch.equal(found[index], expected)


def test_vmap_writes_to_nothing_it_is_given():
    tensors, _ = AGGREGATE.inputs((3,), N, H, "cpu")
    out = torch.zeros(3, H, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="aggregate_out: must not write to a tensor"):
        vmap(lambda x, m, o: tile_mhc.aggregate(x, m, out=o))(*tensors.values(), out)
    assert not out.any()


def test_vmap_over_no_sample():
    tensors, _ = AGGREGATE.inputs((0,), N, H, "cpu")
    with pytest.raises(UnsupportedError, match=r"aggregate: torch\.vmap must map over"):
        vmap(tile_mhc.aggregate)(*tensors.values())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_by_functional_call(compiled):
    """Gradients of a module's parameters, of the batch and of each sample."""
    module = nn.HyperConnection(H, init="deepseek_v4")
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    streams = torch.randn(3, 2, N, H)

    def loss(values, x):
        return functional_call(module, values, (x, torch.tanh)).square().sum()

    def of(x):
        found = torch.autograd.grad(module(x, torch.tanh).square().sum(), list(module.parameters()))
        return dict(zip(parameters, found, strict=True))

    take, per_sample = grad(loss), vmap(grad(loss), (None, 0))
    if compiled:
        take = torch.compile(take, fullgraph=True, backend="aot_eager")
    for name, found in take(parameters, streams).items():
        torch.testing.assert_close(found, of(streams)[name], rtol=1e-4, atol=1e-5, msg=name)
    if compiled:
        return
    separate = [of(x) for x in streams]
    for name, found in per_sample(parameters, streams).items():
        expected = torch.stack([grads[name] for grads in separate])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_main_grad_is_left_alone_inside_a_transform():
    weight, scale, bias = _pre_arguments()
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    streams = torch.randn(3, N, H)

    def loss(x):
        return functional.mhc_pre(x, weight, scale, bias)[0].square().sum()

    found = grad(loss)(streams)
    assert not weight.main_grad.any()
    leaf = streams.clone().requires_grad_()
    with tile_mhc.without_main_grad():
        loss(leaf).backward()
    assert torch.equal(found, leaf.grad)


def test_what_writes_to_memory_is_refused_inside_a_transform():
    streams, mix = torch.randn(3, N, H, requires_grad=True), torch.rand(3, N)
    accumulator = GradAccumulator(streams)
    with pytest.raises(UnsupportedError, match="aggregate: grad_accumulator must be None inside"):
        grad(
            lambda m: tile_mhc.aggregate(
                accumulator.residual, m, grad_accumulator=accumulator
            ).sum()
        )(mix)
    with pytest.raises(UnsupportedError, match="GradAccumulator: must be made outside"):
        grad(lambda x: GradAccumulator(x).residual.sum())(streams.detach())
    out = torch.empty(3, H)
    with pytest.raises(UnsupportedError, match="mhc_pre_apply_mix: out must be None inside"):
        grad(lambda x: tile_kernels_ops.mhc_pre_apply_mix(x, mix, out=out).sum())(streams.detach())
    x, buffer = torch.randn(3, H, N), torch.zeros(3 * H * N)
    message = "mhc_fused_aggregate: fused_grad_x_acc_buffer must be None inside"
    with pytest.raises(UnsupportedError, match=message):
        grad(
            lambda x: transformer_engine.mhc_fused_aggregate(
                x, mix, N, fused_grad_x_acc_buffer=buffer
            ).sum()
        )(x)


# TileKernels' names in one graph.


def _tile_kernels_sub_layer(streams, weight, scale, bias):
    layer_input, mixes = tile_kernels.mhc_pre(streams, weight, scale, bias)
    return tile_kernels.mhc_post(torch.tanh(layer_input), streams, *mixes)


def _tile_kernels_head(streams, weight, scale, bias):
    return tile_kernels.mhc_head(streams, weight[:N].contiguous(), scale[:1], bias[:N])


@pytest.mark.parametrize("function", [_tile_kernels_sub_layer, _tile_kernels_head])
def test_tile_kernels_names_compile_in_one_graph(function):
    arguments = [torch.randn(2, N, H), *_pre_arguments()]
    leaves = [t.clone().requires_grad_() for t in arguments]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    eager = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    for found, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tile_kernels_names_break_the_graph_for_main_grad():
    """As the own names do: a compiled call adds to `main_grad` too."""
    weight, scale, bias = _pre_arguments()
    streams = torch.randn(2, N, H)

    def added(compile_it):
        leaf = weight.clone().requires_grad_()
        leaf.main_grad = torch.zeros_like(leaf)
        run = _tile_kernels_sub_layer
        run = torch.compile(run, backend="aot_eager") if compile_it else run
        run(streams, leaf, scale, bias).square().sum().backward()
        assert leaf.grad is None
        return leaf.main_grad

    expected = added(False)
    assert expected.any()
    torch.testing.assert_close(added(True), expected, rtol=1e-5, atol=1e-6)


# What FlopCounterMode counts: as of the same op written in torch's matmuls.


def _matmul_projection(residual, weight, norm_weight):
    return residual.flatten(-2) @ (weight * norm_weight).mT


def _matmul_aggregate(residual, pre_mix):
    return pre_mix.unsqueeze(-2) @ residual


def _matmul_post(layer_output, residual, post_mix, comb_mix):
    return post_mix.unsqueeze(-1) @ layer_output.unsqueeze(-2) + comb_mix.mT @ residual


def _matmul_identity_post(layer_output, residual, post_mix):
    return post_mix.unsqueeze(-1) @ layer_output.unsqueeze(-2) + residual


def _matmul_contract(residual, weight, scale, bias):
    mix = torch.sigmoid(residual.flatten(-2) @ weight.mT * scale + bias)
    return _matmul_aggregate(residual, mix)


def _matmul_pre(residual, weight, norm_weight, scale, bias, **_):
    mixes = _matmul_projection(residual, weight, norm_weight) * scale.sum() + bias
    return _matmul_aggregate(residual, mixes[..., :N]), mixes[..., N:]


SAME_IN_MATMULS = {
    EXPAND: lambda hidden, num_streams: hidden.unsqueeze(-2).expand(-1, num_streams, -1) * 1,
    PROJECTION: _matmul_projection,
    SPLIT_MIXES: lambda mixes, scale, bias, **_: mixes * scale.sum() + bias,
    SINKHORN: lambda logits, **_: logits.softmax(-1),
    AGGREGATE: _matmul_aggregate,
    POST: _matmul_post,
    HEAD_MIX: lambda mixes, scale, bias: mixes * scale + bias,
    CONTRACT: _matmul_contract,
    FUSED_PRE: _matmul_pre,
    IDENTITY_PRE: _matmul_pre,
    IDENTITY_POST: _matmul_identity_post,
    STREAM_MEAN: lambda residual: residual.mean(-2),
}


def _counted(function, tensors, options):
    """FLOPs of the forward, and of it with its backward."""
    leaves = {name: t.float().requires_grad_() for name, t in tensors.items()}
    with FlopCounterMode(display=False) as forward:
        outputs = oracle.as_tuple(function(**leaves, **options))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("op", SAME_IN_MATMULS, ids=str)
def test_flops_are_those_of_matmuls(op):
    tensors, options = op.inputs((5,), N, H, "cpu")
    expected = _counted(SAME_IN_MATMULS[op], tensors, options)
    assert _counted(op.run, tensors, options) == expected


def test_flops_of_gradients_that_go_elsewhere():
    """Into `main_grad` and an accumulator: as many as through autograd."""
    tensors, options = PROJECTION.inputs((5,), N, H, "cpu")
    _, expected = _counted(PROJECTION.run, tensors, options)
    streams = tensors["residual"].requires_grad_()
    weight = tensors["weight"].requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    accumulator = GradAccumulator(streams)
    out = tile_mhc.projection(streams, weight, grad_accumulator=accumulator)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == expected > 0


def test_flops_of_recompute_and_destinations():
    initial, *groups = recompute_inputs(3, 2, (5,), N, H, "cpu")
    aggregates, posts = 3 * 2 * 5 * N * H, 2 * 2 * 5 * N * (N + 1) * H
    with FlopCounterMode(display=False) as counter:
        tile_mhc.recompute(initial, *groups)
    assert counter.get_total_flops() == aggregates + posts
    tensors, _ = POST.inputs((5,), N, H, "cpu")
    with FlopCounterMode(display=False) as counter:
        tile_mhc.post(**tensors, out=torch.empty_like(tensors["residual"]))
    assert counter.get_total_flops() == posts // 2


INTERLEAVED = {
    "interleaved_aggregate": "aggregate",
    "interleaved_post": "post_bias",
    "padded_projection": "projection",
    "padded_mixes": "split_mixes",
    "log_sinkhorn": "sinkhorn",
}


@pytest.mark.parametrize("name", INTERLEAVED)
def test_flops_of_transformer_engines_layout(name):
    """As many as of the same streams in the other order, which the operators' calls have too."""
    calls = operator_calls((3,), 4, 33, "cpu")
    for suffix in ("", "_backward", "_accumulate"):
        theirs = name + suffix
        if theirs not in calls:
            continue
        with FlopCounterMode(display=False) as counter:
            _operator(theirs)(*calls[theirs])
        own = INTERLEAVED[name].removesuffix("_bias") + suffix.replace("accumulate", "backward")
        with FlopCounterMode(display=False) as other:
            _operator(own)(*calls[own])
        assert counter.get_total_flops() == other.get_total_flops()


def test_every_operator_has_a_flop_formula_and_torchs_tag():
    registry = torch.utils.flop_counter.flop_registry
    assert [name for name in CALLS if _operator(name) not in registry] == []
    tag = torch.Tag.pt2_compliant_tag
    assert [name for name in CALLS if tag not in _operator(name).default.tags] == []


@pytest.mark.parametrize("first", ["tile_mhc", "torch.utils.flop_counter"])
def test_flops_are_counted_whatever_is_imported_first(first):
    """torch's counter is imported late, as it brings in triton."""
    code = (
        f"import sys, {first}, tile_mhc\n"
        f"assert ('torch.utils.flop_counter' in sys.modules) == {first != 'tile_mhc'}\n"
        "import torch\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    tile_mhc.aggregate(torch.ones(3, 4, 8), torch.ones(3, 4))\n"
        "assert counter.get_total_flops() == 2 * 3 * 4 * 8\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('tile_mhc')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiles_where_torch_takes_compliant_operators_only():
    hidden = torch.randn(2, 8)
    compiled = torch.compile(lambda x: tile_mhc.expand(x, 4), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True):
        assert torch.equal(compiled(hidden), tile_mhc.expand(hidden, 4))


# What _autograd.py relies on.


def test_the_private_names_of_torch():
    """Tried with torch 2.10, 2.13 and 2.14: if one fails, `tile_mhc.ops._autograd` needs a look."""
    assert torch._C._are_functorch_transforms_active() is False
    seen = []
    grad(lambda x: (seen.append(torch._C._are_functorch_transforms_active()), x.sum())[1])(
        torch.ones(2)
    )
    assert seen == [True]
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    after = torch._C._after_autograd_keyset
    assert after.has(torch._C.DispatchKey.CPU)
    assert not after.has(torch._C.DispatchKey.AutogradCPU)
    with torch._C._AutoDispatchBelowAutograd():
        leaf = torch.ones(2, requires_grad=True) * 1
    assert leaf.grad_fn is None
    source = inspect.getsource(torch._library.autograd)
    assert "_AutoDispatchBelowAutograd" in source
    assert "_after_autograd_keyset" in source
