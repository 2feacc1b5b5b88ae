"""The modules on a GPU: against float64 by the ops' own bars, and a model trained on text."""

import contextlib
import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

import oracle
from cases import CONTRACT, Case, Op, norm_weight, post_inputs, pre_inputs
from tile_mhc import aggregate, functional, reference
from tile_mhc.nn import (
    DeepSeekV41Decoder,
    DeepSeekV41Layer,
    DelayedHyperConnection,
    HyperConnection,
    HyperHead,
    SubLayer,
    observe_mixes,
    run_delayed_sublayers,
    run_sublayers,
)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CASES = pytest.mark.parametrize(
    "case",
    [
        Case(0, 4, 64, "no token"),
        Case(13, 4, 192, "less than a tile"),
        Case(65, 8, 128, "most streams"),
        Case(64, 2, 64, "fewest streams"),
    ],
    ids=str,
)


def inputs(lead, num_streams, hidden_size, device):
    """The options are left out: the module's defaults are theirs."""
    tensors, _ = pre_inputs(lead, num_streams, hidden_size, device)
    layer_output = post_inputs(lead, num_streams, hidden_size, device)[0]["layer_output"]
    return tensors | {"layer_output": layer_output}, {}


class Connection(torch.nn.Module):
    """Around a layer whose output is an input, so that its gradient comes from outside."""

    def __init__(self, hidden_size, num_streams):
        super().__init__()
        self.hc = HyperConnection(hidden_size, num_streams, norm_weight=True, device="meta")

    def forward(self, residual, layer_output):
        layer_inputs = []

        def layer(layer_input):
            layer_inputs.append(layer_input)
            return layer_output

        return self.hc(residual, layer), layer_inputs[0]


def connection(residual, layer_output, **parameters):
    module = Connection(residual.shape[-1], residual.shape[-2])
    given = {f"hc.{name}": value for name, value in parameters.items()}
    out, layer_input = torch.func.functional_call(module, given, (residual, layer_output))
    return layer_input, out


def specified(residual, layer_output, **parameters):
    layer_input, post_mix, comb_mix = reference.fused_pre(
        residual, **parameters, post_mult=2.0, sinkhorn_repeat=20
    )
    return layer_input, reference.post(layer_output, residual, post_mix, comb_mix)


def head(residual, **parameters):
    normed = "norm_weight" in parameters
    module = HyperHead(residual.shape[-1], residual.shape[-2], norm_weight=normed, device="meta")
    return torch.func.functional_call(module, parameters, (residual,))


# The name that the bars of tolerances.py know.
CONNECTION = Op("mhc_sub_layer_passing", connection, specified, inputs, ("layer_input", "out"))
HEAD = dataclasses.replace(CONTRACT, run=head)


@CASES
def test_connection(case):
    oracle.check(CONNECTION, case, *inputs(*case.shape, "cuda"))


@pytest.mark.parametrize("norm", [True, False], ids=["norm_weight", "plain"])
@CASES
def test_head(case, norm):
    tensors, options = HEAD.inputs(*case.shape, "cuda")
    if norm:
        tensors["norm_weight"] = norm_weight(tensors["weight"].shape[1], "cuda")
    oracle.check(HEAD, case, tensors, options)


def test_model_in_bfloat16():
    """Built on the CPU, cast and moved; the parameters get float32 gradients of the ops' bits."""
    hc, out = HyperConnection(192, init="deepseek_v4"), HyperHead(192, init="deepseek_v4")
    layer = torch.nn.Linear(192, 192)
    model = torch.nn.ModuleList([hc, layer, out]).to("cuda", torch.bfloat16)
    assert {p.dtype for p in [*hc.parameters(), *out.parameters()]} == {torch.float32}
    assert layer.weight.dtype == torch.bfloat16
    streams = torch.randn(130, 4, 192, device="cuda").bfloat16().requires_grad_()
    layer_input, post_mix, comb_mix, through = functional.mhc_pre(
        streams,
        hc.weight,
        hc.scale,
        hc.bias,
        post_mult=2.0,
        sinkhorn_repeat=20,
        passes_residual=True,
    )
    mixed = functional.mhc_post(layer(layer_input), through, post_mix, comb_mix)
    expected = functional.mhc_head(mixed, out.weight, out.scale, out.bias)
    found = out(hc(streams, layer))
    assert torch.equal(found, expected)
    upstream, leaves = torch.randn_like(found), [streams, *model.parameters()]
    grads = [torch.autograd.grad(each, leaves, upstream) for each in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_definition_of_megatrons_main(num_streams):
    """Comb transposed, and no eps: beside the same on the CPU, through a boundary."""
    options = {"transposes_comb": True, "pre_eps": 0, "sinkhorn_eps": 0, "norm_eps": 1e-12}
    connections = [HyperConnection(192, num_streams, **options) for _ in range(2)]
    for hc in connections:
        torch.nn.init.normal_(hc.scale)
        torch.nn.init.normal_(hc.bias)
    streams = torch.randn(130, num_streams, 192)
    upstream = torch.randn_like(streams)
    results = []
    for device in ("cpu", "cuda"):
        leaf = streams.to(device).requires_grad_()
        moved = [hc.to(device) for hc in connections]
        out = run_sublayers(leaf, [SubLayer(hc, torch.tanh) for hc in moved])
        parameters = [p for hc in moved for p in hc.parameters()]
        grads = torch.autograd.grad(out, [leaf, *parameters], upstream.to(device))
        results.append([out, *grads])
    for ours, theirs in zip(*reversed(results), strict=True):
        # Products of float32 streams are good to 1e-5; the sums of a scale's gradient may cancel.
        assert distance(ours.cpu(), theirs) <= (4e-4 if ours.shape == (3,) else 1e-4)


def make_decoder(hidden_size=192):
    def layer():
        attn, ffn = (torch.nn.Linear(hidden_size, hidden_size) for _ in range(2))
        return DeepSeekV41Layer(hidden_size, attn, ffn)

    decoder = DeepSeekV41Decoder(
        [layer() for _ in range(2)],
        embed=torch.nn.Embedding(32, hidden_size),
        norm=torch.nn.RMSNorm(hidden_size),
        head=torch.nn.Linear(hidden_size, 32, bias=False),
    )
    for name, parameter in decoder.named_parameters():
        if name.endswith(("hc_attn.bias", "hc_ffn.bias")):
            torch.nn.init.normal_(parameter)
        parameter.data = parameter.data.bfloat16().float()
    return decoder


def test_decoder():
    """No further from float32 than the reference in bfloat16, which runs on the CPU."""
    exact = make_decoder()
    ids = torch.randint(32, (2, 65))
    upstream = torch.randn(2, 65, 32).bfloat16()

    def evaluate(device, dtype):
        decoder = make_decoder()
        decoder.load_state_dict(exact.state_dict())
        decoder.to(device, dtype)
        logits = decoder(ids.to(device))
        logits.backward(upstream.to(device, dtype))
        state = decoder.state_dict(keep_vars=True)
        grads = [state[name].grad.float().flatten().cpu() for name in exact.state_dict()]
        return logits.float().cpu(), torch.cat(grads)

    truth = evaluate("cpu", torch.float32)
    theirs, ours = evaluate("cpu", torch.bfloat16), evaluate("cuda", torch.bfloat16)
    for mine, other, exactly in zip(ours, theirs, truth, strict=True):
        # Two equally exact runs differ by chance, here by some percent; and the linear maps round
        # as their device does.
        assert distance(mine, exactly) <= 1.5 * distance(other, exactly)


def test_compiled():
    hc = HyperConnection(192, init="deepseek_v4", device="cuda")
    streams = torch.randn(130, 4, 192, device="cuda").bfloat16()
    compiled = torch.compile(hc, fullgraph=True)
    assert torch.equal(compiled(streams, torch.neg), hc(streams, torch.neg))


class Stack(torch.nn.Module):
    """Sub-layers of one width, and two ways to run them."""

    def __init__(self, kind, dtype, count=4, hidden_size=192):
        super().__init__()
        self.connections = torch.nn.ModuleList(
            kind(hidden_size, init="deepseek_v4") for _ in range(count)
        )
        for connection in self.connections:
            torch.nn.init.normal_(connection.bias)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(hidden_size, hidden_size) for _ in range(count)
        )
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden_size) for _ in range(count))
        self.delayed = kind is DelayedHyperConnection
        self.to("cuda", dtype)

    def sublayers(self):
        return list(map(SubLayer, self.connections, self.layers, self.norms))

    def forward(self, streams):
        if self.delayed:
            return aggregate(*run_delayed_sublayers(streams, self.sublayers()))
        return run_sublayers(streams, self.sublayers()).sum(-2)

    def one_by_one(self, streams):
        pre_mix = None
        for each in self.sublayers():
            if self.delayed:
                streams, pre_mix = each.connection(streams, pre_mix, each.call)
            else:
                streams = each.connection(streams, each.call)
        return aggregate(streams, pre_mix) if self.delayed else streams.sum(-2)


KINDS = pytest.mark.parametrize(
    "kind", [HyperConnection, DelayedHyperConnection], ids=["V4", "V4.1"]
)


def distance(value, truth):
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


@KINDS
def test_observing_waits_for_nothing(kind):
    model, log = Stack(kind, torch.bfloat16), {}
    streams = torch.randn(130, 4, 192, device="cuda").bfloat16()

    def observer(name, mixes):
        pre, post, comb = mixes.logits()
        logits = [each.abs().amax() for each in (pre, post, comb)]
        log[name] = torch.stack([*logits, mixes.row_sums.amax(), mixes.column_sums.amax()])

    def run(observed):
        with observe_mixes(model, observer) if observed else contextlib.nullcontext():
            return model(streams)

    expected, _ = run(False), run(True)  # what is compiled first may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(True)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(found, expected)
    assert list(log) == [f"connections.{index}" for index in range(4)]
    for values in log.values():
        assert (values[-2:] - 1).abs().max() <= 0.1
    log.clear()
    compiled = torch.compile(model, fullgraph=True)
    with observe_mixes(model, observer):
        compiled(streams)
    assert len(log) == 4


@KINDS
def test_a_stack_is_no_further_from_float32_than_the_modules(kind):
    model = Stack(kind, torch.bfloat16)
    exact = Stack(kind, torch.float32)
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    streams = torch.randn(130, 4, 192, device="cuda").bfloat16()
    upstream = torch.randn(130, 192, device="cuda").bfloat16()

    def evaluate(run, module, dtype):
        leaf = streams.to(dtype).requires_grad_()
        module.zero_grad()
        out = run(leaf)
        out.backward(upstream.to(out.dtype))
        grads = [p.grad.float().flatten() for p in module.parameters() if p.grad is not None]
        return out, leaf.grad, torch.cat(grads)

    truth = evaluate(exact.one_by_one, exact, torch.float32)
    theirs = evaluate(model.one_by_one, model, torch.bfloat16)
    ours = evaluate(model, model, torch.bfloat16)
    for mine, other, exactly in zip(ours, theirs, truth, strict=True):
        # Two equally exact runs differ by chance; here by some percent.
        assert distance(mine, exactly) <= 1.1 * distance(other, exactly)


@KINDS
def test_a_stack_without_gradients_takes_the_norms(kind):
    model = Stack(kind, torch.bfloat16)
    streams = torch.randn(130, 4, 192, device="cuda").bfloat16()
    recorded = model(streams.requires_grad_())
    with torch.no_grad():
        # Of each norm, an element in some thousands may fall to the other side of a midpoint.
        assert distance(model(streams), recorded) <= 4e-3


@KINDS
def test_a_compiled_stack(kind):
    model = Stack(kind, torch.bfloat16)
    streams = torch.randn(130, 4, 192, device="cuda").bfloat16().requires_grad_()
    compiled = torch.compile(model, fullgraph=True)
    # Inductor keeps what is between two ops in float32, where eager rounds.
    assert distance(compiled(streams), model(streams)) <= 1e-2


@pytest.mark.parametrize("model", ["v4", "v4.1"])
def test_memory_of_a_stack_is_no_higher_than_of_separate_ops(monkeypatch, model):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("stack_memory")
    peaks = script.measure(model, 4096, 1024, 16)
    # What is kept of a boundary for its backward: the streams and the layer's output.
    assert peaks["boundaries"] > 16 * 4096 * 1024 * 5 * 2
    assert peaks["boundaries"] <= peaks["separate"]


@pytest.mark.parametrize("model", ["v4", "v4.1"])
def test_training_agrees_with_the_reference(capsys, monkeypatch, model):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    train_text = importlib.import_module("train_text")
    arguments = ["--device", "cuda", "--steps", "20", "--json", "--model", model]
    assert train_text.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    assert report["dtype"] == "bfloat16"
    assert all(len(run["losses"]) == 20 for run in report["runs"].values())
