"""CUDA graphs, torch.compile, and torch's own check of every operator."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

import oracle
from cases import operator_calls, post_inputs, pre_inputs, recompute_inputs
from tile_mhc import jit, nn, recompute
from tile_mhc.functional import mhc_post, mhc_pre

CALLS = sorted(operator_calls((2,), 2, 64, "meta"))


LEAVES = ("residual", "weight", "scale", "bias", "norm_weight", "layer_output")


def sub_layer(residual, weight, scale, bias, norm_weight, layer_output):
    layer_input, post_mix, comb_mix = mhc_pre(
        residual, weight, scale, bias, norm_weight=norm_weight
    )
    return mhc_post(layer_input + layer_output, residual, post_mix, comb_mix)


def training_step(forward, grad, **tensors):
    """Forward and backward of a sub-layer: the new residual, then the gradients."""
    leaves = [tensors[name].detach().requires_grad_() for name in LEAVES]
    out = forward(*leaves)
    grads = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach()} | {f"grad_{n}": g for n, g in zip(LEAVES, grads, strict=True)}


def step_inputs(num_tokens=130):
    tensors, _ = pre_inputs((num_tokens,), 4, 1280, "cuda")
    tensors["layer_output"] = post_inputs((num_tokens,), 4, 1280, "cuda")[0]["layer_output"]
    return tensors | {"grad": torch.randn_like(tensors["residual"])}


def capture(function):
    """Warm up on a side stream, then capture; the capture must build nothing and pin nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    kernels = jit.statistics()
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    with torch.cuda.graph(graph):
        results = function()
    assert jit.statistics() == kernels, "a kernel was built during the capture"
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned
    return graph, results


def test_graph_of_a_training_step():
    static = step_inputs()
    graph, results = capture(lambda: training_step(sub_layer, **static))
    for _ in range(2):
        fresh = step_inputs()
        for name, tensor in static.items():
            tensor.copy_(fresh[name])
        graph.replay()
        oracle.check_same_bits(results, training_step(sub_layer, **fresh), "replay and eager:")


def test_graph_of_inference():
    static = step_inputs()
    names = ("residual", "weight", "scale", "bias")

    def run(tensors):
        outputs = mhc_pre(*(tensors[name] for name in names), norm_weight=tensors["norm_weight"])
        return dict(enumerate(outputs))

    graph, results = capture(lambda: run(static))
    fresh = step_inputs()
    for name, tensor in static.items():
        tensor.copy_(fresh[name])
    graph.replay()
    oracle.check_same_bits(results, run(fresh), "replay and eager:")


@pytest.mark.parametrize("layers", [1, 10, 24])
def test_graph_of_recompute(layers):
    """The addresses are in the graph: no host memory is read when it replays."""
    initial, *groups = recompute_inputs(layers, layers, (130,), 4, 192, "cuda")

    def run(*arguments):
        layer_inputs, residuals = recompute(*arguments)
        return dict(enumerate(layer_inputs + residuals))

    graph, results = capture(lambda: run(initial, *groups))
    fresh, *fresh_groups = recompute_inputs(layers, layers, (130,), 4, 192, "cuda")
    initial.copy_(fresh)
    for group, fresh_group in zip(groups, fresh_groups, strict=True):
        for tensor, fresh_tensor in zip(group, fresh_group, strict=True):
            tensor.copy_(fresh_tensor)
    graph.replay()
    oracle.check_same_bits(results, run(fresh, *fresh_groups), "replay and eager:")


def test_compiled_training_step():
    tensors = step_inputs()
    compiled = training_step(torch.compile(sub_layer, fullgraph=True), **tensors)
    eager = training_step(sub_layer, **tensors)
    # Inductor adds the bfloat16 gradients of the residual in float32 and rounds once.
    ours, other = compiled.pop("grad_residual"), eager.pop("grad_residual")
    assert oracle.relative_error(ours, other.double()) < 2**-8
    oracle.check_same_bits(compiled, eager, "compiled and eager:")


def test_compiled_inference():
    tensors, options = pre_inputs((130,), 4, 1280, "cuda")
    compiled = torch.compile(mhc_pre, fullgraph=True)(**tensors, **options)
    eager = mhc_pre(**tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    calls = operator_calls((13,), 4, 64, "cuda")
    opcheck(getattr(torch.ops.tile_mhc, name), calls[name])


KEEPS = """
import torch
from tile_mhc import GradAccumulator, aggregate, functional
def step(dtype):
    streams = torch.randn(13, 4, 64, device="cuda", dtype=dtype).requires_grad_()
    parameters = [torch.randn(24, 256), torch.ones(3), torch.zeros(24)]
    parameters = [p.cuda().requires_grad_() for p in parameters]
    layer_input, post, comb, through = functional.mhc_pre(
        streams, *parameters, passes_residual=True
    )
    streams = functional.mhc_post(layer_input, through, post, comb)
    accumulator = GradAccumulator(streams)
    hidden = aggregate(streams, post, grad_accumulator=accumulator)
    head = functional.mhc_head(streams, parameters[0][:4], parameters[1][:1], parameters[2][:4])
    (hidden.float().square() + head.float().square()).sum().backward()
before = torch.cuda.memory_allocated()
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    step(dtype)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before, (dtype, torch.cuda.memory_allocated())
"""


def test_no_tensor_outlives_a_step():
    """One that is kept may come out of the memory pool of a CUDA graph. A process of its own: here
    others may have run before."""
    subprocess.run([sys.executable, "-c", KEEPS], check=True)


def test_reduce_overhead_trains():
    """CUDA-graph trees: a stack whose passed residuals alias its inputs trains as in eager mode."""
    torch.manual_seed(0)
    hidden = 128

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.connections = torch.nn.ModuleList(
                nn.HyperConnection(hidden, init="deepseek_v4") for _ in range(3)
            )
            self.layers = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden) for _ in range(3))
            self.head = nn.HyperHead(hidden, init="deepseek_v4")

        def forward(self, streams):
            for connection, layer in zip(self.connections, self.layers, strict=True):
                streams = connection(streams, layer)
            return self.head(streams)

    stack = Stack().cuda()
    compiled = torch.compile(stack, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        streams = torch.randn(33, 4, hidden, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(streams).square().mean()
        loss.backward()
        ours = {name: p.grad.clone() for name, p in stack.named_parameters()}
        stack.zero_grad()
        expected = stack(streams).square().mean()
        expected.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in stack.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
        stack.zero_grad()


@pytest.mark.parametrize("name", ["aggregate", "expand", "post"])
def test_out_changes_the_version_of_its_tensor(name):
    """So that autograd notices where a tensor that it has saved is written over."""
    calls = operator_calls((13,), 4, 64, "cuda")[f"{name}_out"]
    before = calls[-1]._version
    getattr(torch.ops.tile_mhc, f"{name}_out")(*calls)
    assert calls[-1]._version > before
