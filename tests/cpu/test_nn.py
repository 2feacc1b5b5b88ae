"""HyperConnection and HyperHead: the ops' bits, initial values, state dicts, float32 parameters."""

import ast
import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tile_mhc import ShapeError, UnsupportedError, functional, nn
from tile_mhc.nn import HyperConnection, HyperHead

N, H = 4, 64
KINDS = pytest.mark.parametrize("kind", [HyperConnection, HyperHead])
NORM = pytest.mark.parametrize("norm_weight", [True, False], ids=["norm_weight", "plain"])
MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"


def trained(module):
    """Every stream read, written and mixed differently, as none is at first."""
    with torch.no_grad():
        module.weight.normal_(std=0.3)
        module.scale.uniform_(0.5, 1.5)
        module.bias.normal_()
        if module.norm_weight is not None:
            module.norm_weight.normal_(1.0, 0.3)
    return module


def make_streams(num_streams=N, hidden_size=H):
    return torch.randn(2, 5, num_streams, hidden_size).bfloat16().requires_grad_()


def attributes(module):
    return [getattr(p, "sequence_parallel", False) for p in module.parameters()]


def dtypes(module):
    return {p.dtype for p in module.parameters()}


def same_state(module, other):
    states = module.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )


def distance(value, truth):
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def check_bits(found, expected, leaves):
    """Outputs, and the gradients of `leaves` under one random upstream gradient."""
    upstream = torch.randn_like(expected)
    assert torch.equal(found, expected)
    grads = (
        torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in (found, expected)
    )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# The arithmetic: the functional calls'.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden_size", [1, 65])
def test_any_width_and_dtype_of_the_streams(hidden_size, dtype):
    hc, head = trained(HyperConnection(hidden_size)), trained(HyperHead(hidden_size))
    streams = torch.randn(3, N, hidden_size, dtype=dtype, requires_grad=True)
    layer_input, post_mix, comb_mix, through = hc.pre(streams)
    out = hc.post(torch.tanh(layer_input), through, post_mix, comb_mix)
    assert torch.equal(hc(streams, torch.tanh), out)
    assert [t.dtype for t in (layer_input, through, out, head(out))] == [dtype] * 4
    assert post_mix.dtype == comb_mix.dtype == torch.float32
    (grad,) = torch.autograd.grad(head(out).float().square().sum(), streams)
    assert grad.dtype == dtype
    assert grad.float().norm() > 0


@NORM
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_connection_is_the_functional_calls(num_streams, norm_weight):
    hc = trained(HyperConnection(128, num_streams, norm_weight=norm_weight))
    layer = torch.nn.Linear(128, 128, dtype=torch.bfloat16)
    streams = make_streams(num_streams, 128)
    layer_input, post_mix, comb_mix, through = functional.mhc_pre(
        streams,
        hc.weight,
        hc.scale,
        hc.bias,
        norm_weight=hc.norm_weight,
        post_mult=2.0,
        sinkhorn_repeat=20,
        passes_residual=True,
    )
    expected = functional.mhc_post(layer(layer_input), through, post_mix, comb_mix)
    check_bits(hc(streams, layer), expected, [streams, layer.weight, *hc.parameters()])
    *mixes, through = hc.pre(streams)
    found = hc.post(layer(mixes[0]), through, *mixes[1:])
    check_bits(found, expected, [streams, layer.weight, *hc.parameters()])
    assert through.data_ptr() == streams.data_ptr()


@NORM
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_head_is_the_functional_call(num_streams, norm_weight):
    head = trained(HyperHead(128, num_streams, norm_weight=norm_weight))
    streams = make_streams(num_streams, 128)
    expected = functional.mhc_head(
        streams, head.weight, head.scale, head.bias, norm_weight=head.norm_weight
    )
    check_bits(head(streams), expected, [streams, *head.parameters()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_eps", 0.5),
        ("pre_eps", 0.25),
        ("sinkhorn_eps", 0.125),
        ("post_mult", 1.5),
        ("sinkhorn_repeat", 2),
    ],
)
def test_every_option_of_a_connection(name, value):
    plain = trained(HyperConnection(H))
    hc = HyperConnection(H, **{name: value})
    hc.load_state_dict(plain.state_dict())
    streams = make_streams()
    options = {"post_mult": 2.0, "sinkhorn_repeat": 20, name: value}
    expected = functional.mhc_pre(streams, hc.weight, hc.scale, hc.bias, **options)
    found, before = hc.pre(streams), plain.pre(streams)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
    assert not all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert f"{name}={value}" in repr(hc)


@pytest.mark.parametrize(("name", "value"), [("norm_eps", 0.5), ("pre_eps", 0.25)])
def test_every_option_of_a_head(name, value):
    plain = trained(HyperHead(H))
    head = HyperHead(H, **{name: value})
    head.load_state_dict(plain.state_dict())
    streams = make_streams()
    expected = functional.mhc_head(streams, head.weight, head.scale, head.bias, **{name: value})
    assert torch.equal(head(streams), expected)
    assert not torch.equal(head(streams), plain(streams))
    assert f"{name}={value}" in repr(head)


def test_repr():
    assert repr(HyperConnection(H, 2, norm_weight=True)) == (
        "HyperConnection(64, num_streams=2, norm_eps=1e-06, pre_eps=1e-06, norm_weight=True, "
        "sinkhorn_eps=1e-06, post_mult=2.0, sinkhorn_repeat=20)"
    )
    assert repr(HyperConnection(H, transposes_comb=True)).endswith("=20, transposes_comb=True)")
    assert repr(HyperHead(H)) == (
        "HyperHead(64, num_streams=4, norm_eps=1e-06, pre_eps=1e-06, norm_weight=False)"
    )


def test_arguments_reach_the_sublayer():
    hc = trained(HyperConnection(H))
    streams = make_streams()

    def sublayer(x, factor, *, shift):
        return x * factor + shift

    expected = hc(streams, lambda x: x * 3 + 2)
    assert torch.equal(hc(streams, sublayer, 3, shift=2), expected)


def test_autocast_does_not_touch_the_mixing():
    hc, head = trained(HyperConnection(H)), trained(HyperHead(H))
    streams = make_streams()
    expected = head(hc(streams, torch.tanh))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(hc(streams, torch.tanh))
    check_bits(found, expected, [streams, *hc.parameters(), *head.parameters()])


def test_compiled():
    hc, head = trained(HyperConnection(H)), trained(HyperHead(H))
    streams = make_streams()

    def model(streams):
        return head(hc(streams, torch.tanh))

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check_bits(compiled(streams), model(streams), [streams, *hc.parameters(), *head.parameters()])


def test_checkpointed():
    hc = trained(HyperConnection(H))
    streams = make_streams()
    found = checkpoint(hc, streams, torch.tanh, use_reentrant=False)
    check_bits(found, hc(streams, torch.tanh), [streams, *hc.parameters()])


# Initial values.


@NORM
@KINDS
def test_init_as_megatron(kind, norm_weight):
    """Megatron-LM is not installed: the rule is written out, for torch's own generator."""
    torch.manual_seed(3)
    module = kind(H, norm_weight=norm_weight)
    torch.manual_seed(3)
    rows = N * (N + 2) if kind is HyperConnection else N
    bound = math.sqrt(6 / (rows + N * H))
    assert torch.equal(module.weight, torch.empty(rows, N * H).uniform_(-bound, bound))
    assert module.scale.tolist() == [pytest.approx(0.01)] * 3 if rows == 24 else [1.0]
    assert module.bias.tolist() == [0.0] * rows
    assert module.norm_weight is None or module.norm_weight.tolist() == [1.0] * (N * H)
    assert dtypes(module) == {torch.float32}


@pytest.mark.parametrize("std", [0.02, 0.1])
@KINDS
def test_init_as_transformers(kind, std):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(transformers, initializer_range=std).model
    theirs = model.layers[0].attn_hc if kind is HyperConnection else model.hc_head
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(3)
    model._init_weights(theirs)
    torch.manual_seed(3)
    if std == 0.02:
        module = kind(H, init="deepseek_v4")
    else:
        module = kind(H)
        torch.manual_seed(3)
        module.init_deepseek_v4(std)
    for name, value in module.to_transformers().items():
        assert torch.equal(value, theirs.get_parameter(name)), name


@KINDS
def test_meta_then_reset(kind):
    for init in nn.INITS:
        on_meta = kind(H, norm_weight=True, init=init, sequence_parallel=True, device="meta")
        assert all(p.is_meta for p in on_meta.parameters())
        module = on_meta.to_empty(device="cpu")
        torch.manual_seed(3)
        module.reset_parameters()
        torch.manual_seed(3)
        assert same_state(module, kind(H, norm_weight=True, init=init))
        assert all(attributes(module))


# State dicts of others.


def tiny_model(transformers, **changes):
    pytest.importorskip(MODELING)
    fields = {
        "vocab_size": 32,
        "hidden_size": H,
        "hc_mult": N,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention"],
        "mlp_layer_types": ["hash_moe"],
        "sliding_window": 16,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hc" in name:
                torch.nn.init.normal_(parameter, std=1.0 if parameter.ndim == 1 else 0.3)
    return model


def test_transformers_model():
    """Its connections and its readout, one after another, out of the state of the whole model."""
    model = tiny_model(pytest.importorskip("transformers"), hc_sinkhorn_iters=7)
    state = model.state_dict()
    streams = make_streams()
    for name in ("attn_hc", "ffn_hc"):
        theirs = getattr(model.model.layers[0], name)
        hc = HyperConnection(H, sinkhorn_repeat=7)
        prefix = f"model.layers.0.{name}."
        hc.load_state_dict(hc.from_transformers(state, prefix))
        post_mix, comb_mix, layer_input = theirs(streams)
        ours = hc.pre(streams)
        # The layer input may fall to the other side of a midpoint; all else is float32.
        assert distance(ours[0], layer_input) <= 1e-3
        assert distance(ours[1], post_mix) <= 2e-6
        assert distance(ours[2], comb_mix) <= 2e-6
        exact = post_mix[..., None] * layer_input[..., None, :].float()
        exact = exact + comb_mix.mT @ streams.float()
        mixed = hc.post(layer_input, streams, post_mix.detach(), comb_mix.detach())
        assert torch.equal(mixed, exact.bfloat16())
        back = hc.to_transformers(prefix)
        assert back.keys() == {key for key in state if key.startswith(prefix)}
        assert all(torch.equal(value, state[key]) for key, value in back.items())
    head = HyperHead(H)
    head.load_state_dict(head.from_transformers(state, "model.hc_head."))
    assert distance(head(streams), model.model.hc_head(streams)) <= 1e-3
    back = head.to_transformers("model.hc_head.")
    assert back.keys() == {key for key in state if key.startswith("model.hc_head.")}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_back_into_transformers():
    model = tiny_model(pytest.importorskip("transformers")).model
    streams = make_streams()
    hc, head = (trained(kind(H, norm_weight=True)) for kind in (HyperConnection, HyperHead))
    model.layers[0].attn_hc.load_state_dict(hc.to_transformers())
    model.hc_head.load_state_dict(head.to_transformers())
    post_mix, comb_mix, _ = model.layers[0].attn_hc(streams)
    assert distance(hc.pre(streams)[1], post_mix) <= 2e-6
    assert distance(hc.pre(streams)[2], comb_mix) <= 2e-6
    assert distance(head(streams), model.hc_head(streams)) <= 1e-3


CONNECTION = "decoder.layers.0.mlp_hyper_connection."


def megatron_state():
    """What a block of Megatron-LM has, by its names, and something of other modules."""
    return {
        f"{CONNECTION}mapping_proj.weight": torch.randn(N * (N + 2), N * H) * 0.3,
        f"{CONNECTION}alpha_pre": torch.tensor([0.5]),
        f"{CONNECTION}alpha_post": torch.tensor([1.5]),
        f"{CONNECTION}alpha_res": torch.tensor([-1.0]),
        f"{CONNECTION}bias": torch.randn(N * (N + 2)),
        "decoder.layers.0.mlp.linear_fc1.weight": torch.randn(2, 2),
        "decoder.final_layernorm.weight": torch.randn(H),
        "decoder.hc_head_fn": torch.randn(N, N * H) * 0.3,
        "decoder.hc_head_base": torch.randn(N),
        "decoder.hc_head_scale": torch.tensor([0.75]),
    }


def test_megatron_connection():
    """Beside Megatron's formulas on its own names: which rows and which alpha are whose."""
    state = megatron_state()
    theirs = {key.removeprefix(CONNECTION): value for key, value in state.items()}
    hc = HyperConnection(H)
    hc.load_state_dict(hc.from_megatron(state, CONNECTION))
    streams = make_streams()
    x = streams.detach().float().flatten(-2)
    proj = x @ theirs["mapping_proj.weight"].mT / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
    bias = theirs["bias"]
    h_pre = torch.sigmoid(theirs["alpha_pre"] * proj[..., :N] + bias[:N]) + 1e-6
    h_post = 2 * torch.sigmoid(theirs["alpha_post"] * proj[..., N : 2 * N] + bias[N : 2 * N])
    logits = theirs["alpha_res"] * proj[..., 2 * N :] + bias[2 * N :]
    h_res = logits.unflatten(-1, (N, N)).softmax(-1) + 1e-6
    h_res = h_res / (h_res.sum(-2, keepdim=True) + 1e-6)
    for _ in range(19):
        h_res = h_res / (h_res.sum(-1, keepdim=True) + 1e-6)
        h_res = h_res / (h_res.sum(-2, keepdim=True) + 1e-6)
    aggregated = (streams.detach().float() * h_pre.unsqueeze(-1)).sum(-2)
    layer_input, post_mix, comb_mix, _ = hc.pre(streams)
    assert distance(layer_input, aggregated) <= 3e-3  # one rounding to bfloat16
    assert distance(post_mix, h_post) <= 1e-5  # where the epsilon of the norm stands
    assert distance(comb_mix, h_res) <= 1e-5
    back = hc.to_megatron(CONNECTION)
    assert back.keys() == {key for key in state if key.startswith(CONNECTION)}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_megatron_head():
    state = megatron_state()
    head = HyperHead(H, norm_eps=1e-5, pre_eps=1e-5)
    head.load_state_dict(head.from_megatron(state, "decoder."))
    streams = make_streams()
    x = streams.detach().float()
    flat = x.flatten(-2)
    mixes = flat @ state["decoder.hc_head_fn"].mT
    mixes = mixes * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-5)
    gate = (
        torch.sigmoid(mixes * state["decoder.hc_head_scale"] + state["decoder.hc_head_base"]) + 1e-5
    )
    assert distance(head(streams), (gate.unsqueeze(-1) * x).sum(-2)) <= 3e-3
    back = head.to_megatron("decoder.")
    assert back.keys() == {key for key in state if "hc_head" in key}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_names_of_deepseek():
    """DeepSeek's own checkpoints: the connection under transformers' names, the head Megatron's."""
    state = {
        "layers.0.hc_attn_fn": torch.randn(N * (N + 2), N * H),
        "layers.0.hc_attn_base": torch.randn(N * (N + 2)),
        "layers.0.hc_attn_scale": torch.randn(3),
        "layers.0.hc_ffn_fn": torch.randn(2, 2),
        "hc_head_fn": torch.randn(N, N * H),
        "hc_head_base": torch.randn(N),
        "hc_head_scale": torch.randn(1),
    }
    hc, head = HyperConnection(H), HyperHead(H)
    hc.load_state_dict(hc.from_transformers(state, "layers.0.hc_attn_"))
    head.load_state_dict(head.from_megatron(state))
    assert torch.equal(hc.weight, state["layers.0.hc_attn_fn"])
    assert torch.equal(hc.bias, state["layers.0.hc_attn_base"])
    assert torch.equal(hc.scale, state["layers.0.hc_attn_scale"])
    assert torch.equal(head.scale, state["hc_head_scale"])


@KINDS
@pytest.mark.parametrize("peer", ["megatron", "transformers"])
def test_there_and_back(kind, peer):
    """A norm_weight is folded on the way out, and comes back as ones: the same function."""
    module, prefix = trained(kind(H, norm_weight=True)), "a.b."
    theirs = getattr(module, f"to_{peer}")(prefix)
    again = kind(H, norm_weight=True, device="meta")
    again.load_state_dict(getattr(again, f"from_{peer}")(theirs, prefix), assign=True)
    assert torch.equal(again.weight, module.weight * module.norm_weight)
    assert torch.equal(again.norm_weight, torch.ones(N * H))
    assert torch.equal(again.scale, module.scale)
    assert torch.equal(again.bias, module.bias)
    assert not any(value.requires_grad for value in theirs.values())
    addresses = {p.untyped_storage().data_ptr() for p in module.parameters()}
    own = [value.untyped_storage().data_ptr() for value in theirs.values()]
    assert len(set(own)) == len(own)  # safetensors saves no tensors that share memory
    assert not addresses & set(own)


def test_other_floating_dtypes_become_float32():
    state = {key: value.bfloat16() for key, value in megatron_state().items()}
    mapped = HyperConnection(H).from_megatron(state, CONNECTION)
    assert {value.dtype for value in mapped.values()} == {torch.float32}
    assert torch.equal(mapped["bias"], state[f"{CONNECTION}bias"].float())


@KINDS
@pytest.mark.parametrize("peer", ["megatron", "transformers"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_state_is_float32_whatever_the_default_dtype(kind, peer, default):
    module = trained(kind(H, norm_weight=True))
    theirs = getattr(module, f"to_{peer}")()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        state = getattr(module, f"from_{peer}")(theirs)
        made = kind(H, norm_weight=True)
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(state["norm_weight"], torch.ones(N * H))
    assert dtypes(made) == {torch.float32}


# Parameters stay float32, and marked.


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "to like": lambda module: module.to(torch.zeros(1, dtype=torch.bfloat16)),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.bfloat16),
}


@KINDS
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casts_leave_float32(kind, cast):
    hyper = trained(kind(H, norm_weight=True))
    before = copy.deepcopy(hyper)
    hyper.weight.grad = torch.randn_like(hyper.weight)
    grad = hyper.weight.grad.clone()
    model = torch.nn.Sequential(hyper, torch.nn.Linear(4, 4))
    cast(model)
    assert dtypes(hyper) == {torch.float32}
    assert same_state(hyper, before)
    assert torch.equal(hyper.weight.grad, grad)
    assert dtypes(model[1]) != {torch.float32}


@KINDS
def test_devices_are_taken(kind):
    model = torch.nn.Sequential(kind(H, norm_weight=True), torch.nn.Linear(4, 4))
    model.to("meta", torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    assert dtypes(model[0]) == {torch.float32}
    assert dtypes(model[1]) == {torch.bfloat16}


def test_children_of_a_subclass_are_cast():
    class WithLayer(HyperConnection):
        def __init__(self):
            super().__init__(H)
            self.layer = torch.nn.Linear(H, H)

        def forward(self, streams):
            return super().forward(streams, self.layer)

    module = WithLayer().bfloat16()
    assert dtypes(module.layer) == {torch.bfloat16}
    assert module.weight.dtype == torch.float32
    assert module(make_streams()).dtype == torch.bfloat16


MOVES = {
    "constructed": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "bfloat16": lambda module: module.bfloat16(),
    "meta": lambda module: module.to("meta"),
    "to_empty": lambda module: module.to("meta").to_empty(device="cpu"),
    "load": lambda module: loaded(module, {}),
    "assign": lambda module: loaded(module, {"assign": True}),
}


def loaded(module, options):
    state = {name: value.bfloat16() for name, value in module.state_dict().items()}
    module.load_state_dict(state, **options)
    return module


@KINDS
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_marks_stay(kind, move):
    module = move(kind(H, norm_weight=True, sequence_parallel=True))
    assert attributes(module) == [True] * 4
    assert dtypes(module) == {torch.float32}
    unmarked = move(kind(H, norm_weight=True))
    assert not any(hasattr(p, "sequence_parallel") for p in unmarked.parameters())


@KINDS
@pytest.mark.parametrize("move", [copy.deepcopy, MOVES["pickle"]], ids=["deepcopy", "pickle"])
def test_copies(kind, move):
    module = trained(kind(H, 2, norm_weight=True))
    again = move(module)
    assert same_state(module, again)
    assert repr(module) == repr(again)
    assert all(p is not q for p, q in zip(module.parameters(), again.parameters(), strict=True))


@NORM
@KINDS
def test_state_dict_round_trip(kind, norm_weight, tmp_path):
    module = trained(kind(H, norm_weight=norm_weight))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    again = kind(H, norm_weight=norm_weight)
    assert not same_state(module, again)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert same_state(module, again)
    names = ["weight", "scale", "bias", "norm_weight"]
    assert list(module.state_dict()) == names[: 4 if norm_weight else 3]


# Mistakes.


def from_state(method, *, kind=HyperConnection, prefix=CONNECTION, without=(), **changes):
    state = megatron_state() | {
        "model.layers.0.attn_hc.fn": torch.zeros(N * (N + 2), N * H),
        "model.layers.0.attn_hc.base": torch.zeros(N * (N + 2)),
        "model.layers.0.attn_hc.scale": torch.zeros(3),
    }
    for key in without:
        del state[prefix + key]
    state.update({prefix + key.replace("__", "."): value for key, value in changes.items()})
    return getattr(kind(H), method)(state, prefix)


def sublayer(connection=None, **changes):
    """A right one but for `changes`."""
    connection = HyperConnection(H) if connection is None else connection
    return nn.SubLayer(**{"connection": connection, "layer": torch.tanh} | changes)


def observe(module, observer=print):
    with nn.observe_mixes(module, observer):
        pass


HF = "model.layers.0.attn_hc."

# (what is wrong, the call, the exception, its message)
MISTAKES = [
    ("three streams", lambda: HyperConnection(H, 3), UnsupportedError,
     "HyperConnection: the number of streams n must be one of (2, 4, 8); got 3"),
    ("a float of streams", lambda: HyperHead(H, 4.0), UnsupportedError,
     "HyperHead: the number of streams n must be one of (2, 4, 8); got 4.0"),
    ("a wide H", lambda: HyperConnection(16385), UnsupportedError,
     "HyperConnection: the hidden size H must be from 1 to 16384; got 16385"),
    ("a float H", lambda: HyperHead(64.0), ShapeError,
     "HyperHead: hidden_size must be an integer of at least 1; got 64.0"),
    ("norm_eps", lambda: HyperConnection(H, norm_eps="1e-6"), ShapeError,
     "HyperConnection: norm_eps must be a number; got str '1e-6'"),
    ("pre_eps", lambda: HyperHead(H, pre_eps=None), ShapeError,
     "HyperHead: pre_eps must be a number; got None"),
    ("sinkhorn_eps", lambda: HyperConnection(H, sinkhorn_eps=[]), ShapeError,
     "HyperConnection: sinkhorn_eps must be a number; got list []"),
    ("post_mult", lambda: HyperConnection(H, post_mult=True), ShapeError,
     "HyperConnection: post_mult must be a number; got bool True"),
    ("no step", lambda: HyperConnection(H, sinkhorn_repeat=0), ShapeError,
     "HyperConnection: sinkhorn_repeat must be an integer of at least 1; got 0"),
    ("many steps", lambda: HyperConnection(H, sinkhorn_repeat=1025), UnsupportedError,
     "HyperConnection: sinkhorn_repeat must be at most 1024; got 1025"),
    ("norm_weight", lambda: HyperHead(H, norm_weight=torch.ones(H)), ShapeError,
     "HyperHead: norm_weight must be True or False; got (64,) float32 on cpu"),
    ("sequence_parallel", lambda: HyperConnection(H, sequence_parallel=1), ShapeError,
     "HyperConnection: sequence_parallel must be True or False; got int 1"),
    ("another init", lambda: HyperConnection(H, init="xavier"), ShapeError,
     "HyperConnection: init must be one of ('megatron', 'deepseek_v4'); got 'xavier'"),
    ("nothing delayed", lambda: nn.run_delayed_sublayers(make_streams(), []), ShapeError,
     "run_delayed_sublayers: sublayers must hold at least one, which makes a pre_mix; got none"),
    ("no streams", lambda: nn.run_sublayers([], []), ShapeError,
     "run_sublayers: streams must be a torch.Tensor; got list []"),
    ("a pair for a sub-layer", lambda: nn.run_sublayers(
        make_streams(), [(HyperConnection(H), torch.tanh)]), ShapeError,
     "run_sublayers: sublayers[0] must be a SubLayer; got tuple"),
    ("a connection of V4.1", lambda: nn.run_sublayers(
        make_streams(), [sublayer(), sublayer(nn.DelayedHyperConnection(H))]), ShapeError,
     "run_sublayers: sublayers[1].connection must be a HyperConnection or IdentityHyperConnection; "
     "got DelayedHyperConnection"),
    ("a connection of V4", lambda: nn.run_delayed_sublayers(make_streams(), [sublayer()]),
     ShapeError, "run_delayed_sublayers: sublayers[0].connection must be a "
     "DelayedHyperConnection; got HyperConnection"),
    ("a connection of another width", lambda: nn.run_sublayers(
        make_streams(), [sublayer(), sublayer(HyperConnection(128, 2))]), ShapeError,
     "run_sublayers: sublayers[1].connection must be for n=4, H=64, as the streams; "
     "got n=2, H=128"),
    ("a layer that is none", lambda: nn.run_sublayers(make_streams(), [sublayer(layer=None)]),
     ShapeError, "run_sublayers: sublayers[0].layer must be callable; got None"),
    ("a norm that is none", lambda: nn.run_sublayers(make_streams(), [sublayer(norm=1e-6)]),
     ShapeError, "run_sublayers: sublayers[0].norm must be callable; got float 1e-06"),
    ("a tuple behind a boundary", lambda: nn.run_sublayers(
        make_streams(), [sublayer(layer=lambda x: (x, None)), sublayer()]), ShapeError,
     "post_pre: layer_output must be a torch.Tensor; got tuple"),
    ("no attention", lambda: nn.DeepSeekV41Layer(H, None, torch.tanh), ShapeError,
     "DeepSeekV41Layer: attn must be callable; got None"),
    ("a number for a feed-forward", lambda: nn.DeepSeekV41Layer(H, torch.tanh, 3), ShapeError,
     "DeepSeekV41Layer: ffn must be callable; got int 3"),
    ("an engram that is none", lambda: nn.DeepSeekV41Layer(H, torch.tanh, torch.tanh, engram=True),
     ShapeError, "DeepSeekV41Layer: engram must be callable; got bool True"),
    ("three streams of V4.1", lambda: nn.DeepSeekV41Layer(H, torch.tanh, torch.tanh, num_streams=3),
     UnsupportedError,
     "DelayedHyperConnection: the number of streams n must be one of (2, 4, 8); got 3"),
    ("no layer", lambda: nn.DeepSeekV41Decoder([]), ShapeError,
     "DeepSeekV41Decoder: layers must be of DeepSeekV41Layer, and one or more; got []"),
    ("another layer", lambda: nn.DeepSeekV41Decoder([torch.nn.Identity()]), ShapeError,
     "DeepSeekV41Decoder: layers must be of DeepSeekV41Layer, and one or more; got ['Identity']"),
    ("a norm that is none", lambda: nn.DeepSeekV41Decoder(
        [nn.DeepSeekV41Layer(H, torch.tanh, torch.tanh)], norm=1e-6), ShapeError,
     "DeepSeekV41Decoder: norm must be callable or None; got float 1e-06"),
    ("layers of two widths", lambda: nn.DeepSeekV41Decoder(
        [nn.DeepSeekV41Layer(size, torch.tanh, torch.tanh) for size in (H, 128)])(
            torch.randn(2, 5, H)), ShapeError,
     "run_delayed_sublayers: sublayers[2].connection must be for n=4, H=64, as the streams; "
     "got n=4, H=128"),
    ("nothing to observe", lambda: observe(torch.nn.Linear(1, 1)), ShapeError,
     "observe_mixes: module must hold a HyperConnection, DelayedHyperConnection or "
     "IdentityHyperConnection; got Linear"),
    ("no module to observe", lambda: observe([HyperConnection(H)]), ShapeError,
     "observe_mixes: module must hold a HyperConnection, DelayedHyperConnection or "
     "IdentityHyperConnection; got list"),
    ("an observer that is none", lambda: observe(HyperConnection(H), {}), ShapeError,
     "observe_mixes: observer must be callable; got dict {}"),
    ("no streams to delay", lambda: nn.DelayedHyperConnection(H).pre(None), ShapeError,
     "DelayedHyperConnection: streams must be a torch.Tensor; got None"),
    ("other streams", lambda: HyperConnection(H)(make_streams(2), torch.tanh), ShapeError,
     "fused_pre: weight must be (8, 128) float32 or bfloat16 to match residual"),
    ("float64 streams", lambda: HyperHead(H)(make_streams().double()), UnsupportedError,
     "contract: residual must be (..., n, H) bfloat16, float16 or float32; "
     "got (2, 5, 4, 64) float64 on cpu"),
    ("a tuple of a sub-layer", lambda: HyperConnection(H)(make_streams(), lambda x: (x, None)),
     ShapeError, "post: layer_output must be a torch.Tensor; got tuple"),
    ("a float32 sub-layer", lambda: HyperConnection(H)(make_streams(), torch.Tensor.float),
     ShapeError, "post: layer_output must be (2, 5, 64) bfloat16 to match residual"),
    ("a missing alpha", lambda: from_state("from_megatron", without=["alpha_post"]), ShapeError,
     f"HyperConnection.from_megatron: state_dict must hold {CONNECTION}mapping_proj.weight, "
     f"{CONNECTION}alpha_pre, {CONNECTION}alpha_post, {CONNECTION}alpha_res, {CONNECTION}bias and "
     f"nothing else that begins with '{CONNECTION}'; "
     f"got {CONNECTION}alpha_post missing, none unexpected"),
    ("another Megatron", lambda: HyperConnection(H).from_megatron({}, version="main"), ShapeError,
     "HyperConnection.from_megatron: version must be one of ('dev', 'main-4531'); got 'main'"),
    ("a list of versions", lambda: HyperConnection(H).from_megatron({}, version=["dev"]),
     ShapeError, "HyperConnection.from_megatron: version must be one of ('dev', 'main-4531'); "
     "got list ['dev']"),
    ("a head that Megatron did not have", lambda: HyperHead(H).to_megatron(version="main-4531"),
     ShapeError, "HyperHead.to_megatron: version must be one of ('dev',); got 'main-4531'"),
    ("V4.1 of Megatron's main", lambda: nn.DelayedHyperConnection(H).from_megatron(
        {}, version="main-4531"), ShapeError,
     "DelayedHyperConnection.from_megatron: version must be one of ('dev',); got 'main-4531'"),
    ("DeepSeek's definition for main's", lambda: HyperConnection(H).from_megatron(
        {}, version="main-4531"), ShapeError,
     "HyperConnection.from_megatron: the module must have transposes_comb=True, pre_eps=0, "
     "sinkhorn_eps=0 for version 'main-4531'; got transposes_comb=False, pre_eps=1e-06, "
     "sinkhorn_eps=1e-06"),
    ("main's definition for DeepSeek's", lambda: HyperConnection(
        H, transposes_comb=True).to_megatron(), ShapeError,
     "HyperConnection.to_megatron: the module must have transposes_comb=False for version 'dev'; "
     "got transposes_comb=True"),
    ("transposes_comb", lambda: HyperConnection(H, transposes_comb=None), ShapeError,
     "HyperConnection: transposes_comb must be True or False; got None"),
    ("one key more", lambda: from_state("from_megatron", norm__weight=torch.ones(N * H)),
     ShapeError, f"HyperConnection.from_megatron: state_dict must hold {CONNECTION}mapping_proj."
     f"weight, {CONNECTION}alpha_pre, {CONNECTION}alpha_post, {CONNECTION}alpha_res, "
     f"{CONNECTION}bias and nothing else that begins with '{CONNECTION}'; "
     f"got none missing, {CONNECTION}norm.weight unexpected"),
    ("no prefix", lambda: from_state("from_transformers", prefix=""), ShapeError,
     "HyperConnection.from_transformers: state_dict must hold fn, scale, base and nothing else "
     "that begins with ''; got fn, scale, base missing, "
     f"{CONNECTION}mapping_proj.weight, {CONNECTION}alpha_pre, {CONNECTION}alpha_post, "
     f"{CONNECTION}alpha_res and 9 more unexpected"),
    ("a head in the wrong place", lambda: from_state("from_megatron", kind=HyperHead), ShapeError,
     f"HyperHead.from_megatron: state_dict must hold {CONNECTION}hc_head_fn, "
     f"{CONNECTION}hc_head_scale, {CONNECTION}hc_head_base and nothing else"),
    ("a head with more", lambda: from_state(
        "from_megatron", kind=HyperHead, prefix="decoder.", hc_head_gain=torch.ones(1)),
     ShapeError, "HyperHead.from_megatron: state_dict must hold decoder.hc_head_fn, "
     "decoder.hc_head_scale, decoder.hc_head_base and nothing else that begins with "
     "'decoder.hc_head_'; got none missing, decoder.hc_head_gain unexpected"),
    ("another width", lambda: from_state("from_transformers", prefix=HF, fn=torch.zeros(24, 512)),
     ShapeError, f"HyperConnection.from_transformers: {HF}fn must be (24, 256) of a floating "
     "point dtype; got (24, 512) float32 on cpu"),
    ("three alphas in one", lambda: from_state("from_megatron", alpha_pre=torch.zeros(3)),
     ShapeError, f"HyperConnection.from_megatron: {CONNECTION}alpha_pre must be (1,) of a "
     "floating point dtype; got (3,) float32 on cpu"),
    ("integers", lambda: from_state("from_transformers", prefix=HF, base=torch.arange(24)),
     ShapeError, f"HyperConnection.from_transformers: {HF}base must be (24,) of a floating "
     "point dtype; got (24,) int64 on cpu"),
    ("no tensor", lambda: from_state("from_transformers", prefix=HF, scale=[1.0, 1.0, 1.0]),
     ShapeError, f"HyperConnection.from_transformers: {HF}scale must be (3,) of a floating "
     "point dtype; got list [1.0, 1.0, 1.0]"),
]  # fmt: skip
IDS = [mistake[0] for mistake in MISTAKES]


@pytest.mark.parametrize(("what", "mistake", "exception", "message"), MISTAKES, ids=IDS)
def test_message(what, mistake, exception, message):
    with pytest.raises(exception, match="^" + re.escape(message)):
        mistake()


def test_every_raise_is_reached():
    reached = set()
    for _, mistake, exception, _ in MISTAKES:
        with pytest.raises(exception) as caught:
            mistake()
        reached.add((str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1))
    statements = []
    for file in Path(nn.__file__).parent.glob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        statements += [(str(file), node) for node in nodes if isinstance(node, ast.Raise)]
    assert len(statements) > 2
    for file, statement in statements:
        lines = range(statement.lineno, statement.end_lineno + 1)
        assert any((file, line) in reached for line in lines), f"{file}:{statement.lineno}"


def test_nothing_is_half_loaded():
    hc = trained(HyperConnection(H))
    before = copy.deepcopy(hc)
    for change in ({"bias": torch.zeros(3)}, {"more": torch.zeros(1)}):
        state = megatron_state() | {CONNECTION + key: value for key, value in change.items()}
        with pytest.raises(ShapeError):
            hc.load_state_dict(hc.from_megatron(state, CONNECTION))
        assert same_state(hc, before)
