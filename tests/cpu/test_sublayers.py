"""Stacks of sub-layers: one op a boundary, with the numbers and the manners of the modules."""

import copy
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tile_mhc import GradAccumulator, _hooks, aggregate, contract, expand, nn
from tile_mhc.nn import (
    DelayedHyperConnection,
    HyperConnection,
    HyperHead,
    SubLayer,
    connection,
    run_delayed_sublayers,
    run_sublayers,
)

N, H, LAYERS = 4, 64, 4
RUN = {HyperConnection: run_sublayers, DelayedHyperConnection: run_delayed_sublayers}
KINDS = pytest.mark.parametrize("kind", RUN, ids=["V4", "V4.1"])


def trained(module):
    """Every stream read, written and mixed differently, as none is at first."""
    with torch.no_grad():
        module.weight.normal_(std=0.3)
        module.scale.uniform_(0.5, 1.5)
        module.bias.normal_()
    return module


class Stack(torch.nn.Module):
    """A model that owns its modules as models do, and knows two ways to run them."""

    def __init__(self, kind, num_streams=N, hidden_size=H, dtype=torch.bfloat16, norms=True):
        super().__init__()
        connections = (trained(kind(hidden_size, num_streams)) for _ in range(LAYERS))
        self.connections = torch.nn.ModuleList(connections)
        linears = (torch.nn.Linear(hidden_size, hidden_size, dtype=dtype) for _ in range(LAYERS))
        self.layers = torch.nn.ModuleList(linears)
        self.norms = torch.nn.ModuleList()
        for _ in range(LAYERS if norms else 0):
            self.norms.append(torch.nn.RMSNorm(hidden_size, dtype=dtype))
            torch.nn.init.uniform_(self.norms[-1].weight, 0.5, 1.5)
        self.head = trained(HyperHead(hidden_size, num_streams))
        self.kind = kind
        self.wrap = lambda layer: layer

    def sublayers(self):
        norms = self.norms if len(self.norms) else [None] * LAYERS
        return map(SubLayer, self.connections, map(self.wrap, self.layers), norms)

    def finish(self, streams, pre_mix=None):
        return self.head(streams) if self.kind is HyperConnection else aggregate(streams, pre_mix)

    def forward(self, streams):
        results = RUN[self.kind](streams, self.sublayers())
        return self.finish(*results) if isinstance(results, tuple) else self.finish(results)

    def one_by_one(self, streams):
        pre_mix = ()
        for each, layer, norm in self.sublayers():
            call = layer if norm is None else functools.partial(in_turn, norm, layer)
            if self.kind is HyperConnection:
                streams = each(streams, call)
            else:
                streams, pre_mix = each(streams, *(pre_mix or (None,)), call)
                pre_mix = (pre_mix,)
        return self.finish(streams, *pre_mix)


def in_turn(norm, layer, x):
    return layer(norm(x))


def make_streams(num_streams=N, hidden_size=H, dtype=torch.bfloat16):
    return torch.randn(2, 5, num_streams, hidden_size).to(dtype).requires_grad_()


def evaluate(run, streams, parameters, upstream=None):
    """The output, and the gradients of streams and parameters under one upstream gradient."""
    streams = streams.detach().requires_grad_()
    out = run(streams)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
    leaves = [streams, *(p for p in parameters if p.requires_grad)]
    return out, torch.autograd.grad(out, leaves, upstream, allow_unused=True)


def distance(value, truth):
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def check(model, run, streams):
    """The bits of the modules' outputs, and gradients that are apart by a rounding at most."""
    upstream = torch.randn(2, 5, streams.shape[-1])
    parameters = list(model.parameters())
    found, grads = evaluate(run, streams, parameters, upstream)
    expected, wanted = evaluate(model.one_by_one, streams, parameters, upstream)
    assert torch.equal(found, expected)
    assert [grad is None for grad in grads] == [grad is None for grad in wanted]
    pairs = [pair for pair in zip(grads, wanted, strict=True) if pair[0] is not None]
    if streams.dtype.itemsize == 2:
        # Of few tokens one parameter's gradient may cancel: all of them, beside all of them.
        together = zip(*pairs[1:], strict=True)
        pairs = [pairs[0], [torch.cat([g.double().flatten() for g in of]) for of in together]]
    for grad, want in pairs:
        assert distance(grad, want) <= (2e-2 if streams.dtype.itemsize == 2 else 2e-5)


@pytest.fixture
def boundaries(monkeypatch):
    """The options of every call of `post_pre`."""
    calls = []

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    original = connection.post_pre
    monkeypatch.setattr(connection, "post_pre", watched)
    return calls


@KINDS
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("num_streams", "hidden_size", "dtype"),
    [
        (4, 64, torch.bfloat16),
        (2, 65, torch.bfloat16),
        (8, 64, torch.float16),
        (4, 65, torch.float32),
    ],
)
def test_the_modules_numbers(kind, norms, num_streams, hidden_size, dtype, boundaries):
    model = Stack(kind, num_streams, hidden_size, dtype, norms)
    check(model, model, make_streams(num_streams, hidden_size, dtype))
    assert len(boundaries) == LAYERS - 1


@KINDS
def test_gradients_are_no_further_from_float32_than_the_modules(kind):
    model = Stack(kind, norms=False)
    exact = Stack(kind, dtype=torch.float32, norms=False)
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    streams, upstream = make_streams(), torch.randn(2, 5, H)
    _, truth = evaluate(exact.one_by_one, streams.float(), exact.parameters(), upstream)
    _, ours = evaluate(model, streams, model.parameters(), upstream)
    _, theirs = evaluate(model.one_by_one, streams, model.parameters(), upstream)
    assert distance(ours[0], truth[0]) <= 1.02 * distance(theirs[0], truth[0])


@KINDS
def test_a_stack_in_two_parts(kind):
    model, streams = Stack(kind), make_streams()
    first, second = (list(model.sublayers())[part] for part in (slice(1), slice(1, None)))
    if kind is HyperConnection:
        found = run_sublayers(run_sublayers(streams, first), second)
        assert torch.equal(found, run_sublayers(streams, model.sublayers()))
        assert run_sublayers(streams, []) is streams
    else:
        found = run_delayed_sublayers(*run_first(streams, first, second))
        expected = run_delayed_sublayers(streams, model.sublayers())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def run_first(streams, first, second):
    streams, pre_mix = run_delayed_sublayers(streams, first)
    return streams, second, pre_mix


def test_the_first_pre_mix_reads_stream_0():
    hc, streams = trained(DelayedHyperConnection(H)), make_streams()
    layer_input, *_ = hc.pre(streams)
    assert torch.equal(layer_input, streams[..., 0, :])
    mix = torch.tensor([1.0, 0, 0, 0]).expand(2, 5, N)
    assert torch.equal(hc.pre(streams, mix)[1], hc.pre(streams)[1])


@KINDS
def test_state_dicts_are_the_models(kind):
    """The stack owns nothing: a model keeps its names."""
    model = Stack(kind)
    before = list(model.state_dict())
    model(make_streams())
    assert list(model.state_dict()) == before
    other = HyperConnection(H)
    other.load_state_dict(model.connections[0].state_dict())
    assert torch.equal(other.weight, model.connections[0].weight)


def test_a_delayed_connection_has_its_own_norm_eps():
    assert "norm_eps=1e-20" in repr(DelayedHyperConnection(H))
    hc = DelayedHyperConnection(H, norm_eps=0.5, sinkhorn_repeat=2)
    assert (hc.norm_eps, hc.sinkhorn_repeat) == (0.5, 2)


# What a call of a module would run besides.


def hook(module, seen):
    module.register_forward_hook(lambda *call: seen.append("after"))


def hook_before(module, seen):
    module.register_forward_pre_hook(lambda *call: seen.append("before"))


def hook_gradient(module, seen):
    module.register_full_backward_hook(lambda *call: seen.append("gradient"))


def replace_forward(module, seen):
    original = module.forward

    def forward(*args, **kwargs):
        seen.append("forward")
        return original(*args, **kwargs)

    module.forward = forward


def replace_pre_of_the_class(module, seen):
    class Watched(type(module)):
        def pre(self, *args):
            seen.append("pre")
            return super().pre(*args)

    module.__class__ = Watched


@KINDS
@pytest.mark.parametrize(
    "change", [hook, hook_before, hook_gradient, replace_forward, replace_pre_of_the_class]
)
@pytest.mark.parametrize("at", [0, 1, LAYERS - 1])
def test_a_connection_with_more_to_run_is_called(kind, change, at, boundaries):
    model, seen = Stack(kind), []
    change(model.connections[at], seen)
    evaluate(model, make_streams(), model.parameters())
    assert len(seen) == 1
    assert len(boundaries) == LAYERS - (2 if at in (0, LAYERS - 1) else 3)
    check(model, model, make_streams())


@KINDS
def test_hooks_of_layers_and_norms_run(kind, boundaries):
    model, seen = Stack(kind), []
    for module in (*model.layers, *model.norms):
        hook(module, seen)
    model(make_streams())
    with torch.no_grad():
        model(make_streams())
    assert len(seen) == 4 * LAYERS
    assert len(boundaries) == 2 * (LAYERS - 1)
    assert not any(call["layer_norm_weight"] is not None for call in boundaries)


@KINDS
def test_hooks_for_all_modules_run(kind, boundaries):
    model, seen = Stack(kind), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module)
    )
    try:
        model(make_streams())
    finally:
        handle.remove()
    assert {id(each) for each in model.connections} <= {id(module) for module in seen}
    assert boundaries == []


def test_private_names_of_torch():
    module = torch.nn.Linear(1, 1)
    registering = (
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
        module.register_forward_pre_hook,
        module.register_forward_hook,
        module.register_full_backward_pre_hook,
        module.register_full_backward_hook,
    )
    for register in registering:
        assert not _hooks.has_hooks(module)
        handle = register(lambda *call: None)
        assert _hooks.has_hooks(module)
        assert bool(_hooks.own_hooks(module)) == (register in registering[4:])
        handle.remove()


# Around it.


@KINDS
def test_main_grad(kind):
    model, streams = Stack(kind), make_streams()
    _, expected = evaluate(model, streams, model.connections.parameters())
    for parameter in model.connections.parameters():
        parameter.main_grad = torch.ones_like(parameter)
        parameter.grad_added_to_main_grad = False
    model(streams).sum().backward()
    for parameter, grad in zip(model.connections.parameters(), expected[1:], strict=True):
        if grad is None:  # V4.1: what makes the last pre_mix alone
            grad = torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.main_grad, grad + 1)


@KINDS
@pytest.mark.parametrize("frozen", ["connections", "layers", "everything but one"])
def test_frozen_parameters(kind, frozen):
    model, streams = Stack(kind), make_streams()
    every = list(model.parameters())
    _, expected = evaluate(model, streams, every)
    model.requires_grad_(frozen != "everything but one")
    if frozen == "everything but one":
        model.connections[1].scale.requires_grad_()
        streams = streams.detach()
    else:
        getattr(model, frozen).requires_grad_(False)
    model(streams).sum().backward()
    for parameter, grad in zip(every, expected[1:], strict=True):
        wanted = grad if parameter.requires_grad else None
        assert (parameter.grad is None) == (wanted is None)
        assert wanted is None or torch.equal(parameter.grad, wanted)


@KINDS
def test_an_accumulator_of_the_streams(kind):
    """Another reader of the streams joins the sum before the one rounding."""
    model, streams = Stack(kind), make_streams(dtype=torch.float32).detach()
    model.layers.float()
    model.norms.float()
    gates = (model.head.weight, model.head.scale, model.head.bias)
    leaf = streams.clone().requires_grad_()
    (model(leaf).sum() + contract(leaf, *gates).sum()).backward()
    other = streams.clone().requires_grad_()
    accumulator = GradAccumulator(other)
    beside = contract(other, *gates, grad_accumulator=accumulator)
    (model(accumulator.residual).sum() + beside.sum()).backward()
    torch.testing.assert_close(other.grad, leaf.grad)
    assert not accumulator.holds


@KINDS
def test_compiled(kind):
    model, streams = Stack(kind, norms=False), make_streams()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, grads = evaluate(compiled, streams, model.parameters())
    expected, wanted = evaluate(model, streams, model.parameters())
    assert torch.equal(found, expected)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@KINDS
@pytest.mark.parametrize("what", ["layers", "the stack"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(kind, what, reentrant):
    model, streams = Stack(kind), make_streams()
    checkpointed = functools.partial(checkpoint, use_reentrant=reentrant)
    again = copy.deepcopy(model)
    if what == "layers":
        again.wrap = lambda layer: functools.partial(checkpointed, layer)
    results = []
    for each in (model, again):
        leaf = streams.detach().requires_grad_()
        whole = each is again and what == "the stack"
        out = checkpointed(each, leaf) if whole else each(leaf)
        out.float().sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in each.parameters())])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


def held(run, streams, parameters):
    """The bytes that a forward keeps for its backward, a storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(streams)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@KINDS
def test_a_stack_keeps_no_more_than_the_modules(kind):
    model, streams = Stack(kind, norms=False), make_streams()
    parameters = list(model.parameters())
    assert 0 < held(model, streams, parameters) <= held(model.one_by_one, streams, parameters)


@KINDS
def test_autocast_reaches_the_layers_alone(kind, boundaries):
    model = Stack(kind, dtype=torch.float32, norms=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, model, make_streams())
    assert len(boundaries) == LAYERS - 1


# The norm of the layer input.


@KINDS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_norms_without_gradients_are_the_boundaries(kind, mode, boundaries):
    model, streams = Stack(kind), make_streams()
    model.norms[2].eps = 0.25
    recorded = model(streams)
    assert [call["layer_norm_weight"] for call in boundaries] == [None] * (LAYERS - 1)
    del boundaries[:]
    with mode():
        assert torch.equal(model(streams), recorded)
    weights = [call["layer_norm_weight"] for call in boundaries]
    assert all(a is b.weight for a, b in zip(weights, model.norms[1:], strict=True))
    eps = torch.finfo(torch.float32).eps
    assert [call["layer_norm_eps"] for call in boundaries] == [eps, 0.25, eps]


class Doubled(torch.nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_forward_of_the_norm(norm):
    original = norm.forward
    norm.forward = lambda x: 2 * original(x)
    return norm


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: torch.nn.RMSNorm(H, elementwise_affine=False),
        lambda norm: torch.nn.RMSNorm((5, H), dtype=torch.bfloat16),
        lambda norm: Doubled(H, dtype=torch.bfloat16),
        replace_forward_of_the_norm,
        lambda norm: torch.nn.LayerNorm(H, dtype=torch.bfloat16),
        lambda norm: torch.tanh,
        lambda norm: torch.nn.utils.parametrize.register_parametrization(
            norm, "weight", torch.nn.ReLU()
        ),
    ],
)
@torch.no_grad()
def test_other_norms_are_called(change, boundaries):
    model, streams = Stack(HyperConnection), make_streams()
    sublayers = list(model.sublayers())
    sublayers[1] = sublayers[1]._replace(norm=change(model.norms[1]))
    found = run_sublayers(streams, sublayers)
    for each in sublayers:
        streams = each.connection(streams, each.call)
    assert torch.equal(found, streams)
    weights = [call["layer_norm_weight"] is not None for call in boundaries]
    assert weights[1:] == [True, True]


@torch.no_grad()
def test_a_norm_under_autocast_is_called(boundaries):
    model, streams = Stack(HyperConnection), make_streams()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(streams)
    assert not any(call["layer_norm_weight"] is not None for call in boundaries)


def test_the_example_of_the_documentation():
    """In the order in which a reader meets it."""
    hidden = torch.randn(3, H).bfloat16()
    sublayers = [
        SubLayer(HyperConnection(H), torch.tanh, norm=torch.nn.LayerNorm(H, dtype=torch.bfloat16))
        for _ in range(2)
    ]
    out = HyperHead(H)(run_sublayers(expand(hidden, N), sublayers))
    assert out.shape == hidden.shape
    assert "run_sublayers(expand(embedding, 4), sublayers)" in nn.__doc__
