"""observe_mixes: what an observer is shown, and that the step does not change for it."""

import contextlib
import textwrap
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tile_mhc import expand, nn, recompute_group, sinkhorn
from tile_mhc.nn import (
    DeepSeekV41Decoder,
    DeepSeekV41Layer,
    DelayedHyperConnection,
    HyperConnection,
    SubLayer,
    connection,
    observe_mixes,
    run_delayed_sublayers,
    run_sublayers,
)

N, H, LAYERS = 4, 32, 3
RUN = {HyperConnection: run_sublayers, DelayedHyperConnection: run_delayed_sublayers}
KINDS = pytest.mark.parametrize("kind", RUN, ids=["V4", "V4.1"])
STACKED = pytest.mark.parametrize("stacked", [True, False], ids=["a stack", "modules"])


class Model(torch.nn.Module):
    def __init__(self, kind, stacked, **options):
        super().__init__()
        self.connections = torch.nn.ModuleList(kind(H, **options) for _ in range(LAYERS))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(H, H) for _ in range(LAYERS))
        self.kind, self.stacked = kind, stacked
        for each in self.connections:
            torch.nn.init.uniform_(each.scale, 0.5, 1.5)
            torch.nn.init.normal_(each.bias)
            if each.norm_weight is not None:
                torch.nn.init.uniform_(each.norm_weight, 0.5, 1.5)

    def forward(self, streams):
        """Of V4.1 with the last pre_mix."""
        if self.stacked:
            return RUN[self.kind](streams, map(SubLayer, self.connections, self.layers))
        out = streams if self.kind is HyperConnection else (streams, None)
        for each, layer in zip(self.connections, self.layers, strict=True):
            out = each(out, layer) if self.kind is HyperConnection else each(*out, layer)
        return out


def loss_of(out):
    return sum(part.sin().sum() for part in (out if isinstance(out, tuple) else (out,)))


def make_streams():
    return torch.randn(2, 5, N, H)


class Seen(list):
    def __call__(self, name, mixes):
        self.append((name, mixes))


@pytest.fixture
def boundaries(monkeypatch):
    """How many calls of `post_pre` there were."""
    calls = []

    def watched(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    original = connection.post_pre
    monkeypatch.setattr(connection, "post_pre", watched)
    return calls


@KINDS
@STACKED
@pytest.mark.parametrize("options", [{}, {"norm_weight": True, "transposes_comb": True}])
def test_what_is_shown(kind, stacked, options, boundaries):
    """The mixes that the model itself used, in its order, and the logits that they are made of."""
    model, streams, seen = Model(kind, stacked, **options), make_streams(), Seen()
    with observe_mixes(model, seen):
        model(streams)
    assert len(boundaries) == (LAYERS - 1 if stacked else 0)
    assert [name for name, _ in seen] == [f"connections.{index}" for index in range(LAYERS)]
    pre_mix = () if kind is HyperConnection else (None,)
    for (_, mixes), own, layer in zip(seen, model.connections, model.layers, strict=True):
        layer_input, *made, _ = own.pre(streams, *pre_mix)
        assert mixes.connection is own
        torch.testing.assert_close(mixes.streams, streams)
        if pre_mix:
            torch.testing.assert_close(mixes.pre_mix, made[0])
            pre_mix = (made[0],)
        else:
            assert mixes.pre_mix is None
        gates = mixes.gates()
        torch.testing.assert_close(mixes.post_mix, made[-2])
        torch.testing.assert_close(mixes.comb_mix, made[-1])
        assert torch.equal(mixes.row_sums, mixes.comb_mix.sum(-1))
        assert torch.equal(mixes.column_sums, mixes.comb_mix.sum(-2))
        pre, post, comb = mixes.logits()
        torch.testing.assert_close(2 * post.sigmoid(), mixes.post_mix)
        comb = sinkhorn(comb, repeat=20)
        torch.testing.assert_close(comb.mT if options else comb, mixes.comb_mix)
        assert gates[1] is mixes.post_mix
        if pre_mix:
            assert gates[0] is mixes.pre_mix
            torch.testing.assert_close(pre.sigmoid() + 1e-6, mixes.pre_mix)
        else:
            collapsed = (gates[0].unsqueeze(-1) * streams).sum(-2)
            torch.testing.assert_close(layer_input, collapsed)
        streams = own.post(layer(layer_input), streams, *made[-2:])


@KINDS
@STACKED
@pytest.mark.parametrize("around", [contextlib.nullcontext, recompute_group])
def test_the_step_is_the_same(kind, stacked, around, boundaries):
    model, streams, seen = Model(kind, stacked), make_streams().requires_grad_(), Seen()
    leaves = [streams, *model.parameters()]

    def step(observed):
        del boundaries[:]
        with around() as group, observed:
            loss = loss_of(model(streams))
        made = len(group._all) if group else 0
        return loss, *torch.autograd.grad(loss, leaves), made, len(boundaries)

    def reduce(name, mixes):
        seen(name, [part.abs().amax() for part in (*mixes.logits(), mixes.row_sums)])

    expected = step(contextlib.nullcontext())
    for observer in (seen, reduce):
        found = step(observe_mixes(model, observer))
        assert found[-2:] == expected[-2:]
        assert all(torch.equal(a, b) for a, b in zip(found[:-2], expected[:-2], strict=True))
    assert len(seen) == 2 * LAYERS
    step(contextlib.nullcontext())
    assert len(seen) == 2 * LAYERS


def test_no_graph_is_kept():
    """What it is shown has none, and does not keep what autograd has saved."""
    model, seen, saved = Model(HyperConnection, True), Seen(), []

    class Saving(torch.nn.Module):
        def forward(self, x):
            out = x.exp()  # which its backward needs
            saved.append(weakref.ref(out))
            return out * out

    model.layers[1] = Saving()
    recording = []
    watched = observe_mixes(model, lambda *_: recording.append(torch.is_grad_enabled()))
    with watched, observe_mixes(model, seen):
        out = model(make_streams().requires_grad_())
    assert recording == [False] * LAYERS
    assert out.requires_grad
    for _, mixes in seen:
        tensors = (mixes.streams, mixes.post_mix, mixes.comb_mix, mixes.row_sums, *mixes.logits())
        assert not any(tensor.requires_grad for tensor in tensors[:4])
    assert saved[0]() is not None
    del out
    assert saved[0]() is None


def test_contexts():
    """Nested, and left by an exception; what is outside is not shown."""
    model, outer, inner = Model(HyperConnection, False), Seen(), Seen()
    streams = make_streams()
    with observe_mixes(model, outer):
        with contextlib.suppress(KeyError), observe_mixes(model.connections[1], inner):
            model(streams)
            raise KeyError
        model(streams)
    model(streams)
    assert [name for name, _ in inner] == [""]
    assert len(outer) == 2 * LAYERS
    assert all(each._observers == () for each in model.connections)
    outer, inner = observe_mixes(model, Seen()), observe_mixes(model, seen := Seen())
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)  # in another order
    model(streams)
    inner.__exit__(None, None, None)
    assert len(seen) == LAYERS


def test_checkpointing():
    """What is run again is shown again, inside of the context alone."""
    model, seen = Model(HyperConnection, False), Seen()
    for inside, count in ((False, LAYERS), (True, 2 * LAYERS)):
        del seen[:]
        with observe_mixes(model, seen):
            out = checkpoint(model, make_streams(), use_reentrant=False)
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        assert len(seen) == count


def test_a_decoder():
    layers = [DeepSeekV41Layer(H, torch.tanh, torch.neg) for _ in range(2)]
    decoder, seen = DeepSeekV41Decoder(layers), Seen()
    with observe_mixes(decoder, seen), torch.no_grad():
        decoder(torch.randn(2, 5, H))
    names = [f"layers.{index}.{name}" for index in range(2) for name in ("hc_attn", "hc_ffn")]
    assert [name for name, _ in seen] == names
    assert all(mixes.pre_mix is not None for _, mixes in seen)


@pytest.mark.parametrize(
    ("kind", "stacked"), [(HyperConnection, True), (DelayedHyperConnection, False)]
)
def test_compiled(kind, stacked):
    """Traced with the model, in one graph; without it again behind the context."""
    model, streams, log = Model(kind, stacked), make_streams(), {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(streams)

    def observer(name, mixes):
        log[name] = torch.stack([mixes.row_sums.amax(), mixes.logits()[2].abs().amax()])

    with observe_mixes(model, observer):
        model(streams)
        plain = dict(log)
    for observed in (False, True, False):
        log.clear()
        with observe_mixes(model, observer) if observed else contextlib.nullcontext():
            out = compiled(streams)
        assert all(torch.equal(a, b) for a, b in zip([*out], [*expected], strict=True))
        assert list(log) == (list(plain) if observed else [])
        for name, value in log.items():
            assert not value.requires_grad
            torch.testing.assert_close(value, plain[name])


def test_the_example_of_the_documentation():
    """Up to its `with`, as it stands there."""
    model, log = Model(HyperConnection, True), {}
    lines = nn.__doc__.splitlines()
    start, stop = (
        lines.index(f"    {line}")
        for line in ("def observer(name, mixes):", "with observe_mixes(model, observer):")
    )
    given = {"log": log, "torch": torch}
    exec(textwrap.dedent("\n".join(lines[start:stop])), given)
    with observe_mixes(model, given["observer"]):
        model(expand(torch.randn(2, 5, H), N))
    assert set(log) == {f"connections.{index}" for index in range(LAYERS)}
    assert all(value.shape == (3,) and value.isfinite().all() for value in log.values())
