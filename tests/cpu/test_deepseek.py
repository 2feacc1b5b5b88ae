"""DeepSeek-V4.1's decoder beside its definition, by the names of DeepSeek's checkpoints.

The definition is written again in loops over tokens, sub-layers and streams, in float64, and reads
a checkpoint by its names; autograd of it gives the gradients. As in vLLM's `models/deepseek_v4_1`:
the input of a sub-layer is read by the pre gate of the one before, the first one's is stream 0, and
the pre gate of the last reads the output.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as distributed_state
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import distributed
import sharding
from tile_mhc import aggregate, expand, recompute_group
from tile_mhc.nn import DeepSeekV41Decoder, DeepSeekV41Layer, deepseek

N, H, VOCAB, LAYERS, STEPS = 4, 24, 11, 2, 20
EPS, HC_EPS = 1e-20, 1e-6
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Attention(torch.nn.Module):
    """Of one head, causal; scores are `sharper` times as large."""

    def __init__(self):
        super().__init__()
        self.wq, self.wkv, self.wo = (torch.nn.Linear(H, H, bias=False) for _ in range(3))

    def forward(self, x, sharper=1.0):
        keys = self.wkv(x)
        scores = self.wq(x) @ keys.mT / H**0.5 * sharper
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return self.wo(scores.masked_fill(later, -torch.inf).softmax(-1) @ keys)


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = torch.nn.Linear(H, 2 * H), torch.nn.Linear(2 * H, H)

    def forward(self, x):
        return self.w2(torch.nn.functional.silu(self.w1(x)))


class Engram(torch.nn.Module):
    """Something of its own for every stream."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(N, H))

    def forward(self, streams, sharper=1.0):
        return streams + self.table * sharper


CONNECTION = {"fn": (N * (N + 2), N * H), "base": (N * (N + 2),), "scale": (3,)}


def make_checkpoint(engram=()):
    """By the public names, all of the decoder, of what differs from layer to layer."""
    shapes = {"embed.weight": (VOCAB, H), "norm.weight": (H,), "head.weight": (VOCAB, H)}
    for layer in (f"layers.{index}." for index in range(LAYERS)):
        for part in ("attn", "ffn"):
            shapes[f"{layer}{part}_norm.weight"] = (H,)
            shapes |= {f"{layer}hc_{part}_{name}": of for name, of in CONNECTION.items()}
        shapes |= {f"{layer}attn.{name}.weight": (H, H) for name in ("wq", "wkv", "wo")}
        shapes |= {f"{layer}ffn.w1.weight": (2 * H, H), f"{layer}ffn.w1.bias": (2 * H,)}
        shapes |= {f"{layer}ffn.w2.weight": (H, 2 * H), f"{layer}ffn.w2.bias": (H,)}
    shapes |= {f"layers.{index}.engram.table": (N, H) for index in engram}
    checkpoint = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    for name in checkpoint:
        if name.endswith(("_scale", "norm.weight")):
            checkpoint[name] = torch.rand_like(checkpoint[name]) + 0.5
        if name.endswith("_base"):
            checkpoint[name] = torch.randn_like(checkpoint[name])
    return checkpoint


def make_decoder(engram=(), **options):
    layers = [
        DeepSeekV41Layer(
            H, Attention(), FeedForward(), engram=Engram() if i in engram else None, **options
        )
        for i in range(LAYERS)
    ]
    return DeepSeekV41Decoder(
        layers,
        embed=torch.nn.Embedding(VOCAB, H),
        norm=torch.nn.RMSNorm(H, eps=EPS),
        head=torch.nn.Linear(H, VOCAB, bias=False),
    )


def named(module, checkpoint, prefix):
    """A module of the caller's, on a checkpoint's tensors."""
    own = {name: checkpoint[prefix + name] for name, _ in module.named_parameters()}
    return lambda *args, **kwargs: torch.func.functional_call(module, own, args, kwargs)


# The definition.


def rms_norm(x, weight):
    return x / (sum(value * value for value in x) / H + EPS).sqrt() * weight


def sigmoid(z):
    return 1 / (1 + (-z).exp())


def gates(streams, fn, scale, base):
    """The pre and post gates and the comb of one token, number by number."""
    flat = torch.cat(streams)
    rms = ((flat * flat).sum() / (N * H) + EPS).sqrt()
    factor = [scale[0]] * N + [scale[1]] * N + [scale[2]] * (N * N)
    logits = [
        (row * flat).sum() / rms * by + offset
        for row, by, offset in zip(fn, factor, base, strict=True)
    ]
    pre = [sigmoid(z) + HC_EPS for z in logits[:N]]
    post = [2 * sigmoid(z) for z in logits[N : 2 * N]]
    comb = []
    for source in range(N):
        exponents = [z.exp() for z in logits[2 * N + source * N :][:N]]
        comb.append([value / sum(exponents) + HC_EPS for value in exponents])
    for step in range(STEPS):
        if step:
            comb = [[value / (sum(row) + HC_EPS) for value in row] for row in comb]
        sums = [sum(row[j] for row in comb) + HC_EPS for j in range(N)]
        comb = [[value / sums[j] for j, value in enumerate(row)] for row in comb]
    return pre, post, comb


def collapse(streams, mix):
    return sum(m * stream for m, stream in zip(mix, streams, strict=True))


def define(checkpoint, ids, modules, engram=(), sharper=1.0):
    """The logits (tokens, VOCAB) of one sequence."""
    tokens = [[checkpoint["embed.weight"][token]] * N for token in ids.tolist()]
    mixes = [[1.0] + [0.0] * (N - 1) for _ in tokens]
    for index in range(LAYERS):
        prefix = f"layers.{index}."
        if index in engram:
            table = checkpoint[f"{prefix}engram.table"] * sharper
            tokens = [[stream + row for stream, row in zip(t, table, strict=True)] for t in tokens]
        for part in ("attn", "ffn"):
            own = [checkpoint[f"{prefix}hc_{part}_{name}"] for name in ("fn", "scale", "base")]
            made = [gates(streams, *own) for streams in tokens]
            weight = checkpoint[f"{prefix}{part}_norm.weight"]
            inputs = [
                rms_norm(collapse(streams, mix), weight)
                for streams, mix in zip(tokens, mixes, strict=True)
            ]
            module = named(modules[index][part], checkpoint, f"{prefix}{part}.")
            given = {"sharper": sharper} if part == "attn" else {}
            outputs = module(torch.stack(inputs), **given)
            tokens = [
                [
                    post[j] * output + sum(comb[i][j] * streams[i] for i in range(N))
                    for j in range(N)
                ]
                for streams, output, (_, post, comb) in zip(tokens, outputs, made, strict=True)
            ]
            mixes = [pre for pre, _, _ in made]
    hidden = [
        rms_norm(collapse(streams, mix), checkpoint["norm.weight"])
        for streams, mix in zip(tokens, mixes, strict=True)
    ]
    return torch.stack(hidden) @ checkpoint["head.weight"].mT


def of_definition(checkpoint, upstream, **options):
    """Logits and every gradient, in float64."""
    leaves = {name: value.double().requires_grad_() for name, value in checkpoint.items()}
    modules = [{"attn": Attention(), "ffn": FeedForward()} for _ in range(LAYERS)]
    logits = torch.stack([define(leaves, ids, modules, **options) for ids in IDS])
    grads = torch.autograd.grad(logits, list(leaves.values()), upstream.double())
    return logits, dict(zip(leaves, grads, strict=True))


def of_decoder(decoder, upstream, **kwargs):
    decoder.zero_grad()
    logits = decoder(IDS, **kwargs)
    logits.backward(upstream)
    return logits, {name: p.grad for name, p in decoder.state_dict(keep_vars=True).items()}


def distance(value, truth):
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def check(found, truth):
    """The definition itself in float32 is up to 1e-6 away, and 1e-5 in gradients."""
    assert distance(found[0], truth[0]) <= 4e-6
    assert found[1].keys() == truth[1].keys()
    for name, grad in truth[1].items():
        # A scale's gradient may cancel: beside the bias's, a sum of the same terms.
        unit = truth[1][name.replace("_scale", "_base")].norm()
        assert float((found[1][name].double() - grad).norm() / max(grad.norm(), unit)) <= 4e-5, name


@pytest.mark.parametrize(
    ("engram", "given"),
    [((), {}), ((1,), {"sharper": 3.0})],
    ids=["plain", "with an Engram and an argument"],
)
def test_the_definition(engram, given):
    checkpoint = make_checkpoint(engram)
    decoder = make_decoder(engram)
    decoder.load_state_dict(checkpoint)
    upstream = torch.randn(*IDS.shape, VOCAB)
    truth = of_definition(checkpoint, upstream, engram=engram, **given)
    check(of_decoder(decoder, upstream, **given), truth)
    if given:
        assert distance(decoder(IDS), truth[0]) > 1e-2


@pytest.fixture
def stacks(monkeypatch):
    """The length of every stack that is run."""
    lengths = []

    def watched(streams, sublayers, pre_mix=None):
        sublayers = list(sublayers)
        lengths.append(len(sublayers))
        return original(streams, sublayers, pre_mix)

    original = deepseek.run_delayed_sublayers
    monkeypatch.setattr(deepseek, "run_delayed_sublayers", watched)
    return lengths


def with_a_hook(layer, seen):
    layer.register_forward_hook(lambda *call: seen.append("hook"))
    return layer


def with_a_forward(layer, seen):
    original = layer.forward

    def forward(*args, **kwargs):
        seen.append("forward")
        return original(*args, **kwargs)

    layer.forward = forward
    return layer


def checkpointed(layer, seen):
    def run(function, *args, **kwargs):
        seen.append("checkpoint")
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return checkpoint_wrapper(layer, checkpoint_fn=run)


def compiled(layer, seen):
    def backend(graph, inputs):
        seen.append("compiled")
        return aot_eager(graph, inputs)

    return torch.compile(layer, backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("change", "at"),
    [
        (None, 0),
        (None, 1),
        (with_a_hook, 0),
        (with_a_hook, 1),
        (with_a_forward, 0),
        (checkpointed, 1),
        (compiled, 1),
    ],
)
def test_a_layer_with_more_to_run_is_called(change, at, stacks):
    decoder, upstream, seen = make_decoder(), torch.randn(*IDS.shape, VOCAB), []
    expected, grads = of_decoder(decoder, upstream)
    assert stacks == [4]
    del stacks[:]
    if change is None:
        decoder.layers[at].engram = Engram()
        decoder(IDS)
    else:
        decoder.layers[at] = change(decoder.layers[at], seen)
        logits, found = of_decoder(decoder, upstream)
        assert len(seen) == 1
        assert distance(logits, expected) <= 1e-6
        names = [name.replace("_orig_mod.", "") for name in found]
        for name, grad in zip(names, found.values(), strict=True):
            assert distance(grad, grads[name]) <= 4e-5, name
    assert stacks == [2] * (3 if change is checkpointed else 2)  # one of them again


def test_without_gradients_and_in_a_group():
    """The same bits: the norms by the boundaries, the streams made again."""
    decoder, upstream = make_decoder((1,)), torch.randn(*IDS.shape, VOCAB)
    logits, grads = of_decoder(decoder, upstream)
    with torch.no_grad():
        assert torch.equal(decoder(IDS), logits)
    decoder.zero_grad()
    with recompute_group():
        again = decoder(IDS)
    again.backward(upstream)
    assert torch.equal(again, logits)
    for name, parameter in decoder.state_dict(keep_vars=True).items():
        assert torch.equal(parameter.grad, grads[name]), name


def test_compiled():
    decoder, upstream = make_decoder((1,)), torch.randn(*IDS.shape, VOCAB)
    expected, grads = of_decoder(decoder, upstream)
    decoder.zero_grad()
    out = torch.compile(decoder, backend="aot_eager", fullgraph=True)(IDS)
    out.backward(upstream)
    assert distance(out, expected) <= 1e-6
    for name, parameter in decoder.state_dict(keep_vars=True).items():
        assert distance(parameter.grad, grads[name]) <= 4e-5, name


def test_stages_of_a_pipeline():
    decoder = make_decoder()
    first, last = (DeepSeekV41Decoder([layer]) for layer in decoder.layers)
    streams, pre_mix = first.run_layers(expand(decoder.embed(IDS), N))
    hidden = aggregate(*last.run_layers(streams, pre_mix))
    assert torch.equal(decoder.head(decoder.norm(hidden)), decoder(IDS))
    embedded = decoder.embed(IDS)
    decoder.embed = decoder.norm = decoder.head = None
    assert torch.equal(decoder(embedded), hidden)


def test_options():
    layer = DeepSeekV41Layer(
        H,
        torch.tanh,
        torch.tanh,
        num_streams=2,
        norm_eps=0.5,
        hc_eps=0.25,
        sinkhorn_repeat=3,
        init="megatron",
        sequence_parallel=True,
        dtype=torch.bfloat16,
    )
    for connection, norm in ((layer.hc_attn, layer.attn_norm), (layer.hc_ffn, layer.ffn_norm)):
        assert "num_streams=2, norm_eps=0.5, pre_eps=0.25" in repr(connection)
        assert "sinkhorn_eps=0.25, post_mult=2.0, sinkhorn_repeat=3" in repr(connection)
        assert connection.init == "megatron"
        assert connection.scale.sequence_parallel
        assert (norm.eps, norm.weight.dtype) == (0.5, torch.bfloat16)
    layer = DeepSeekV41Layer(H, torch.tanh, torch.tanh)
    assert "norm_eps=1e-20, pre_eps=1e-06" in repr(layer.hc_ffn)
    assert layer.attn_norm.eps == 1e-20


class OtherCalls(DeepSeekV41Layer):
    def sublayers(self, **kwargs):
        attn, ffn = super().sublayers()
        return attn, ffn._replace(layer=lambda x: kwargs["factor"] * self.ffn(x))


def test_a_layer_with_other_calls():
    layers = [OtherCalls(H, Attention(), FeedForward())]
    decoder = DeepSeekV41Decoder(layers)
    hidden = torch.randn(2, 5, H)
    doubled = decoder(hidden, factor=2.0)
    with torch.no_grad():
        for parameter in layers[0].ffn.w2.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(decoder(hidden, factor=1.0), doubled)


# State dicts.


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def test_there_and_back():
    checkpoint = make_checkpoint((0,))
    before = dict(checkpoint)
    decoder = make_decoder((0,))
    decoder.load_state_dict(checkpoint)
    assert same(checkpoint, before)
    assert same(decoder.state_dict(), checkpoint)
    layer = decoder.layers[1]
    assert torch.equal(layer.hc_attn.weight, checkpoint["layers.1.hc_attn_fn"])
    assert torch.equal(layer.hc_ffn.bias, checkpoint["layers.1.hc_ffn_base"])
    assert torch.equal(layer.hc_ffn.scale, checkpoint["layers.1.hc_ffn_scale"])
    alone = DeepSeekV41Layer(H, Attention(), FeedForward())
    alone.load_state_dict(layer.state_dict())
    assert same(alone.state_dict(), layer.state_dict())
    other = make_decoder((0,))
    other.load_state_dict(dict(decoder.named_parameters()))  # by the modules' names
    assert same(other.state_dict(), checkpoint)


def test_copies():
    decoder = make_decoder()
    again = copy.deepcopy(decoder)
    with torch.no_grad():
        again.layers[0].hc_attn.weight.zero_()
    assert not same(again.state_dict(), decoder.state_dict())
    again.load_state_dict(decoder.state_dict())
    assert same(again.state_dict(), decoder.state_dict())


def test_from_meta():
    checkpoint = make_checkpoint()
    with torch.device("meta"):
        decoder = make_decoder()
    decoder.load_state_dict(checkpoint, assign=True)
    assert not any(parameter.is_meta for parameter in decoder.parameters())
    assert decoder(IDS).isfinite().all()


def test_what_a_checkpoint_lacks_is_named_as_there():
    decoder, checkpoint = make_decoder(), make_checkpoint()
    del checkpoint["layers.1.hc_ffn_fn"], checkpoint["norm.weight"]
    checkpoint["hc_head_fn"] = torch.zeros(N, N * H)
    found = decoder.load_state_dict(checkpoint, strict=False)
    assert sorted(found.missing_keys) == ["layers.1.hc_ffn_fn", "norm.weight"]
    assert found.unexpected_keys == ["hc_head_fn"]
    layer = decoder.layers[0]
    found = layer.load_state_dict({}, strict=False)
    assert {"hc_attn_fn", "hc_attn_scale", "hc_ffn_base", "attn.wq.weight"} <= {*found.missing_keys}
    checkpoint = make_checkpoint()
    checkpoint["layers.0.hc_attn_base"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"hc_attn\.bias: copying a param with shape"):
        decoder.load_state_dict(checkpoint)


def test_distributed_checkpoints():
    """torch.distributed.checkpoint looks for the tensor behind every key."""
    checkpoint, decoder = make_checkpoint(), make_decoder()
    distributed_state.set_model_state_dict(decoder, dict(checkpoint))
    assert same(distributed_state.get_model_state_dict(decoder), checkpoint)
    decoder(IDS).square().sum().backward()
    optimizer = torch.optim.AdamW(decoder.parameters())
    optimizer.step()
    state = distributed_state.get_optimizer_state_dict(decoder, optimizer)
    other = make_decoder()
    fresh = torch.optim.AdamW(other.parameters())
    distributed_state.set_optimizer_state_dict(other, fresh, state)
    moments = (
        o.state[p]["exp_avg"]
        for o, m in ((optimizer, decoder), (fresh, other))
        for p in m.parameters()
    )
    moments = list(moments)
    half = len(moments) // 2
    assert all(torch.equal(a, b) for a, b in zip(moments[:half], moments[half:], strict=True))


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_sharded(tmp_path):
    """fully_shard round connections and layers, on two ranks: outputs, logits, gradients, state."""
    found = distributed.spawn(sharding.of_decoder, tmp_path)
    decoder = sharding.make_decoder()
    state = decoder.state_dict()
    out, logits = sharding.run_decoder(decoder, 0)
    assert torch.equal(found.pop("out"), out)
    assert same(found.pop("logits"), logits)
    assert same(found.pop("state"), state)
    for rank in range(1, distributed.RANKS):
        sharding.run_decoder(decoder, rank)  # adds to the gradients
    grads = {name: p.grad / distributed.RANKS for name, p in decoder.named_parameters()}
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert distance(found[name], grad) <= 1e-5, name
