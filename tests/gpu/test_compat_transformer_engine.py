"""compat.transformer_engine on a GPU: the whole sub-layer and its buffer of gradients."""

import pytest
import torch

import oracle
import te_cases
from te_cases import DTYPES, dtypes, sub_layer, sub_layer_inputs

SHAPES = pytest.mark.parametrize(
    ("num_tokens", "channels"), [(0, 64), (1, 64), (130, 192), (65, 33), (130, 5129), (1024, 2560)]
)


def gradients(leaves, buffer, upstream, bias=None):
    out = sub_layer(**leaves, buffer=buffer, bias=bias)
    inputs = [*leaves.values(), *([] if bias is None else [bias])]
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def setup(num_tokens, channels, dtypes):
    inputs = sub_layer_inputs(num_tokens, channels, dtypes, "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    return leaves, torch.randn_like(leaves["x"])


def nan_buffer(leaves):
    return torch.full(leaves["x"].shape, float("nan"), device="cuda")


@SHAPES
@dtypes
def test_sub_layer_with_and_without_a_buffer(num_tokens, channels, dtypes):
    leaves, upstream = setup(num_tokens, channels, dtypes)
    fused = gradients(leaves, nan_buffer(leaves), upstream)
    plain = gradients(leaves, None, upstream)
    truth, terms = te_cases.sub_layer_truth(leaves, upstream)
    if num_tokens == 0:
        assert not any(tensor.any() for tensor in fused[2:])
        return
    # The layer input is rounded to the streams' dtype, and joins in again.
    most = 2e-2 if torch.bfloat16 in (dtypes.streams, dtypes.parameters) else 3e-5
    assert oracle.relative_error(fused[0], truth[0]) < most
    for ours in (fused, plain):
        assert max(te_cases.sub_layer_errors(ours[1:], truth[1:], terms)) < most
    # Gradients of the mixes are summed in another order beside a float32 buffer.
    assert torch.equal(fused[0], plain[0])
    if dtypes.streams == torch.bfloat16 and num_tokens > 1:
        assert oracle.relative_error(fused[1], truth[1]) <= oracle.relative_error(
            plain[1], truth[1]
        )


@pytest.mark.parametrize("channels", [192, 5129])
@pytest.mark.parametrize("has_buffer", [False, True])
def test_same_bits_every_run(has_buffer, channels):
    leaves, upstream = setup(1300, channels, DTYPES[0])
    bias = torch.randn(channels, device="cuda", requires_grad=True)
    runs = []
    for _ in range(2):
        buffer = nan_buffer(leaves) if has_buffer else None
        results = gradients(leaves, buffer, upstream, bias)
        runs.append({str(i): tensor for i, tensor in enumerate(results)})
    oracle.check_same_bits(*runs, "a sub-layer, run twice:")


def test_layers_share_a_buffer():
    leaves, upstream = setup(130, 192, DTYPES[2])
    others, _ = setup(130, 192, DTYPES[2])

    def run(buffer):
        x = leaves["x"]
        for layer in (leaves, others):
            x = sub_layer(x, layer["phi"], layer["alpha"], layer["beta"], buffer)
        return torch.autograd.grad(x, [leaves["x"], leaves["phi"], others["phi"]], upstream)

    for ours, plain in zip(run(nan_buffer(leaves)), run(None), strict=True):
        assert oracle.relative_error(ours, plain.double()) < 1e-5


def test_replayed_by_a_cuda_graph():
    leaves, upstream = setup(130, 192, DTYPES[0])
    buffer = nan_buffer(leaves)
    expected = gradients(leaves, buffer, upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(leaves, buffer, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(leaves, buffer, upstream)
    buffer.fill_(float("nan"))
    graph.replay()
    for ours, other in zip(captured, expected, strict=True):
        assert torch.equal(ours, other)
