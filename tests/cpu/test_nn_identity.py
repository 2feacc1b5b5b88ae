"""IdentityHyperConnection, MeanHead, HY-V4's readout: the ops' bits, and transformers' states."""

import copy
import pickle
import re

import pytest
import torch

import tiny_hy
from tile_mhc import ShapeError, UnsupportedError, expand, identity_post, identity_pre, stream_mean
from tile_mhc.nn import (
    HyperConnection,
    HyperHead,
    IdentityHyperConnection,
    MeanHead,
    SubLayer,
    observe_mixes,
    run_sublayers,
)
from tiny_deepseek import distance
from tiny_glm import modeling as glm

N, H = 4, 64


def trained(module):
    """Every stream read and written differently, as none is at first."""
    with torch.no_grad():
        module.weight.normal_(std=0.3)
        module.scale.uniform_(0.5, 1.5)
        module.bias.normal_()
        if module.norm_weight is not None:
            module.norm_weight.normal_(1.0, 0.3)
    return module


def make_streams(num_streams=N, hidden_size=H, dtype=torch.bfloat16):
    return torch.randn(2, 5, num_streams, hidden_size).to(dtype).requires_grad_()


def check_bits(found, expected, leaves):
    upstream = torch.randn_like(expected)
    assert torch.equal(found, expected)
    grads = (
        torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in (found, expected)
    )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("norm_weight", [False, True])
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_it_is_the_calls_of_the_ops(num_streams, norm_weight):
    hc = trained(IdentityHyperConnection(128, num_streams, norm_weight=norm_weight))
    layer = torch.nn.Linear(128, 128, dtype=torch.bfloat16)
    streams = make_streams(num_streams, 128)
    layer_input, post_mix, through = identity_pre(
        streams,
        hc.weight,
        hc.scale,
        hc.bias,
        norm_weight=hc.norm_weight,
        norm_eps=1e-5,
        pre_eps=1e-6,
        post_eps=1e-6,
        post_mult=2.0,
        passes_residual=True,
    )
    expected = identity_post(layer(layer_input), through, post_mix)
    leaves = [streams, layer.weight, *hc.parameters()]
    check_bits(hc(streams, layer), expected, leaves)
    layer_input, post_mix, through = hc.pre(streams)
    check_bits(hc.post(layer(layer_input), through, post_mix), expected, leaves)
    assert through.data_ptr() == streams.data_ptr()


@pytest.mark.parametrize(
    ("name", "value"),
    [("norm_eps", 0.5), ("pre_eps", 0.25), ("post_eps", 0.125), ("post_mult", 1.5)],
)
def test_every_option(name, value):
    plain = trained(IdentityHyperConnection(H))
    hc = IdentityHyperConnection(H, **{name: value})
    hc.load_state_dict(plain.state_dict())
    streams = make_streams()
    options = {"norm_eps": 1e-5, "pre_eps": 1e-6, "post_eps": 1e-6, "post_mult": 2.0, name: value}
    expected = identity_pre(streams, hc.weight, hc.scale, hc.bias, **options)
    found, before = hc.pre(streams)[:2], plain.pre(streams)[:2]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert f"{name}={value}" in repr(hc)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_mean_head(num_streams, dtype):
    streams = make_streams(num_streams, 65, dtype)
    check_bits(MeanHead()(streams), stream_mean(streams), [streams])
    theirs = glm.Glm5NextTextHyperHead()(streams.detach().double())
    bound = {2: 5e-3, 4: 1e-6}[dtype.itemsize]
    assert distance(MeanHead()(streams), theirs) <= bound
    assert list(MeanHead().parameters()) == []


def test_a_model_of_theirs_is_one_of_ours():
    """Its connections and its readout, out of the state of the whole model."""
    model = tiny_hy.make_model()
    state, config = model.state_dict(), model.config
    streams = make_streams(dtype=torch.float32)
    options = {"norm_eps": config.rms_norm_eps, "pre_eps": config.hc_eps}
    for name in ("attn_hc", "ffn_hc"):
        theirs = getattr(model.model.layers[1], name)
        hc = IdentityHyperConnection(
            H, post_eps=config.hc_eps, post_mult=config.hc_magnitude, **options
        )
        hc.load_state_dict(hc.from_transformers(state, f"model.layers.1.{name}."))
        post_mix, layer_input = theirs(streams)
        found = hc.pre(streams)
        assert distance(found[0], layer_input) <= 2e-6
        assert distance(found[1], post_mix) <= 2e-6
        back = hc.to_transformers(f"model.layers.1.{name}.")
        assert all(torch.equal(value, state[key]) for key, value in back.items())
        assert len(back) == 3
    head = HyperHead(H, **options)
    head.load_state_dict(head.from_transformers(state, "model.hc_head."))
    assert distance(head(streams), model.model.hc_head(streams)) <= 2e-6


@pytest.mark.parametrize("std", [0.006, 0.1])
@pytest.mark.parametrize("kind", [IdentityHyperConnection, HyperHead])
def test_init_as_transformers(kind, std):
    model = tiny_hy.make_model(initializer_range=std).model
    theirs = model.layers[0].attn_hc if kind is IdentityHyperConnection else model.hc_head
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(3)
    model._init_weights(theirs)
    torch.manual_seed(3)
    if std == 0.006:
        module = kind(H, init="hy_v4")
    else:
        module = kind(H)
        torch.manual_seed(3)
        module.init_hy_v4(std)
    for name, value in module.to_transformers().items():
        assert torch.equal(value, theirs.get_parameter(name)), name
    on_meta = kind(H, init="hy_v4", norm_weight=True, device="meta").to_empty(device="cpu")
    on_meta.reset_parameters()
    assert on_meta.scale.tolist() == pytest.approx([0.01] * len(on_meta.scale))
    assert on_meta.norm_weight.tolist() == [1.0] * (N * H)


def test_it_reads_about_the_mean_at_first():
    streams = make_streams(dtype=torch.float32)
    layer_input, post_mix, _ = IdentityHyperConnection(H).pre(streams)
    assert distance(layer_input, stream_mean(streams)) <= 1e-2
    assert (post_mix - 1).abs().max() <= 1e-2


@pytest.mark.parametrize("marked", [False, True])
def test_parameters_stay_float32_and_marked(marked, tmp_path):
    hc = trained(IdentityHyperConnection(H, norm_weight=True, sequence_parallel=marked))
    torch.save(hc.state_dict(), tmp_path / "state.pt")
    again = IdentityHyperConnection(H, norm_weight=True, sequence_parallel=marked, device="meta")
    state = torch.load(tmp_path / "state.pt")
    again.load_state_dict({k: v.bfloat16() for k, v in state.items()}, assign=True)
    moved = [
        copy.deepcopy(hc).to(torch.bfloat16),
        copy.deepcopy(hc).half(),
        pickle.loads(pickle.dumps(hc)),
        again,
    ]
    for each in moved:
        assert {p.dtype for p in each.parameters()} == {torch.float32}
        assert {getattr(p, "sequence_parallel", False) for p in each.parameters()} == {marked}
    for each in moved[:3]:
        assert torch.equal(each.weight, hc.weight)


def test_compiled_and_under_autocast():
    hc, streams = trained(IdentityHyperConnection(H)), make_streams()

    def model(streams):
        return MeanHead()(hc(streams, torch.tanh))

    expected = model(streams)
    leaves = [streams, *hc.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_bits(compiled(streams), expected, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_bits(model(streams), expected, leaves)


class Stack(torch.nn.Module):
    """A model of HY-V4's, and its readout; with `mixed` DeepSeek-V4's connections in between."""

    def __init__(self, mixed=False, **options):
        super().__init__()
        kinds = [HyperConnection if mixed and at in (1, 2) else IdentityHyperConnection
                 for at in range(5)]  # fmt: skip
        self.connections = torch.nn.ModuleList(trained(kind(H, **options)) for kind in kinds)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(H, H, dtype=torch.bfloat16) for _ in kinds
        )
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(H, dtype=torch.bfloat16) for _ in kinds)
        self.head = trained(HyperHead(H, init="hy_v4"))

    def sublayers(self):
        return list(map(SubLayer, self.connections, self.layers, self.norms))

    def forward(self, streams):
        return self.head(run_sublayers(streams, self.sublayers()))

    def one_by_one(self, streams):
        for each in self.sublayers():
            streams = each.connection(streams, each.call)
        return self.head(streams)


@pytest.mark.parametrize("options", [{}, {"norm_weight": True}])
def test_a_stack(options):
    """The bits of layer by layer, gradients too; without gradients the same."""
    model, streams = Stack(**options), make_streams()
    leaves = [streams, *model.parameters()]
    check_bits(model(streams), model.one_by_one(streams), leaves)
    with torch.no_grad():
        assert torch.equal(model(streams), model.one_by_one(streams))
    first, second = model.sublayers()[:2], model.sublayers()[2:]
    parts = run_sublayers(run_sublayers(streams, first), second)
    assert torch.equal(model.head(parts), model(streams))


def test_a_stack_of_two_kinds():
    """DeepSeek-V4's two have a boundary, whose gradient is rounded once less."""
    model, streams = Stack(mixed=True), make_streams()
    found, expected = model(streams), model.one_by_one(streams)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    grads, wanted = (torch.autograd.grad(out, streams, upstream) for out in (found, expected))
    assert distance(grads[0], wanted[0]) <= 2e-2


def test_a_stack_runs_hooks():
    model, seen = Stack(), []
    for module in (*model.connections, *model.layers, *model.norms):
        module.register_forward_hook(lambda *call: seen.append(call[0]))
    model(make_streams())
    assert len(seen) == 15


def test_a_stack_compiled():
    model, streams = Stack(), make_streams()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_bits(compiled(streams), model(streams), [streams, *model.parameters()])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_weight": True, "pre_eps": 0.25, "post_mult": 3.0}])
def test_observed(options, compiled):
    """The mixes that each connection used, and the gates and logits that they are made of."""
    model, streams, seen = Stack(**options), make_streams(), {}
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model

    def observer(name, mixes):
        seen[name] = mixes.streams, mixes.post_mix, *mixes.logits(), *mixes.gates()
        if not compiled:
            assert mixes.connection is model.get_submodule(name)
            assert not hasattr(mixes, "comb_mix")

    expected = model(streams)
    with observe_mixes(model, observer):
        out = run(streams)
    assert list(seen) == [f"connections.{at}" for at in range(5)]
    check_bits(out, expected, [streams, *model.parameters()])
    for (name, each), hc, (_, layer, norm) in zip(
        seen.items(), model.connections, model.sublayers(), strict=True
    ):
        layer_input, post_mix, _ = hc.pre(streams)
        given, post, pre_logits, post_logits, pre_gate, post_gate = each
        assert not any(tensor.requires_grad for tensor in each), name
        assert torch.equal(given, streams)
        assert torch.equal(post, post_mix)
        assert torch.equal(post_gate, post_mix)
        torch.testing.assert_close(
            post_logits.sigmoid() * hc.post_mult + hc.post_eps, post_mix, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(pre_gate, pre_logits.sigmoid() + hc.pre_eps)
        collapsed = (pre_gate.unsqueeze(-1) * streams.float()).sum(-2)
        assert distance(layer_input, collapsed) <= 3e-3
        streams = hc(streams, lambda x, layer=layer, norm=norm: layer(norm(x)))
    seen.clear()
    run(streams)
    assert not seen


def test_training_lowers_a_loss():
    connections = torch.nn.ModuleList(IdentityHyperConnection(H) for _ in range(2))
    layers = torch.nn.ModuleList(torch.nn.Linear(H, H) for _ in range(2))
    head = HyperHead(H, init="hy_v4")
    modules = torch.nn.ModuleList([connections, layers, head])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2)
    given, wanted = torch.randn(8, H), torch.randn(8, H)
    losses = []
    for _ in range(12):
        streams = expand(given, N)
        for connection, layer in zip(connections, layers, strict=True):
            streams = connection(streams, layer)
        loss = (head(streams) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in modules.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


MISTAKES = [
    ("three streams", lambda: IdentityHyperConnection(H, 3), UnsupportedError,
     "IdentityHyperConnection: the number of streams n must be one of (2, 4, 8); got 3"),
    ("post_eps", lambda: IdentityHyperConnection(H, post_eps="no"), ShapeError,
     "IdentityHyperConnection: post_eps must be a number; got str 'no'"),
    ("post_mult", lambda: IdentityHyperConnection(H, post_mult=True), ShapeError,
     "IdentityHyperConnection: post_mult must be a number; got bool True"),
    ("another init", lambda: IdentityHyperConnection(H, init="megatron"), ShapeError,
     "IdentityHyperConnection: init must be one of ('hy_v4',); got 'megatron'"),
    ("another init of a head", lambda: HyperHead(H, init="no"), ShapeError,
     "HyperHead: init must be one of ('megatron', 'deepseek_v4', 'hy_v4'); got 'no'"),
    ("a state with a comb_mix", lambda: IdentityHyperConnection(H).from_transformers(
        {"fn": torch.zeros(24, N * H), "scale": torch.zeros(3), "base": torch.zeros(24)}),
     ShapeError, "IdentityHyperConnection.from_transformers: fn must be (8, 256) of a floating "
     "point dtype; got (24, 256) float32 on cpu"),
    ("other streams", lambda: IdentityHyperConnection(H).pre(make_streams(2)), ShapeError,
     "identity_pre: weight must be (4, 128) float32 or bfloat16 to match residual"),
    ("a tuple of a sub-layer",
     lambda: IdentityHyperConnection(H)(make_streams(), lambda x: (x, None)), ShapeError,
     "identity_post: layer_output must be a torch.Tensor; got tuple"),
    ("no streams", lambda: MeanHead()(None), ShapeError,
     "stream_mean: residual must be a torch.Tensor; got None"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "mistake", "exception", "message"), MISTAKES, ids=[each[0] for each in MISTAKES]
)
def test_message(what, mistake, exception, message):
    with pytest.raises(exception, match="^" + re.escape(message)):
        mistake()
