"""What the tests of recompute groups run: stacks of sub-layers, written in each way there is."""

from contextlib import nullcontext

import torch
from torch import nn

import tile_mhc
from tile_mhc import GradAccumulator
from tile_mhc.nn import HyperConnection, SubLayer, run_sublayers

N, H, LAYERS, LEAD = 4, 32, 4, (2, 5)
BF16 = torch.bfloat16


class Layer(nn.Module):
    """A sub-layer of one linear map."""

    def __init__(self, *before, hidden_size=H):
        super().__init__()
        self.before = nn.Sequential(*before)
        self.linear = nn.Linear(hidden_size, hidden_size, dtype=BF16)

    def forward(self, x):
        return self.linear(self.before(x))


class Twice(Layer):
    def forward(self, x):
        return self.linear(x) * torch.sigmoid(x)


class Odd(Layer):
    """Saves views of its input that are not all of it, or not as it lies."""

    def forward(self, x):
        half = x[..., ::2].cos().sum(-1, keepdim=True)
        turned = x.transpose(0, 1).sin().transpose(0, 1)
        return (self.linear(x.reshape(-1, x.shape[-1])).view(x.shape) + half * turned).contiguous()


class InPlace(Layer):
    def forward(self, x):
        x.mul_(0.5)
        return self.linear(x)


class Same(Layer):
    """Returns its input, which a post then reads."""

    def forward(self, x):
        return x


class Negative(Layer):
    """Saves a view that is read with the other sign."""

    def forward(self, x):
        return self.linear(x) * torch._neg_view(x)


class NoInput(Layer):
    """Saves nothing of its input."""

    def forward(self, x):
        return x + self.linear.bias


LAYER_KINDS = {
    "linear": Layer,
    "norm": lambda hidden_size: Layer(nn.RMSNorm(hidden_size, dtype=BF16), hidden_size=hidden_size),
    "twice": Twice,
    "views": Odd,
    "in place": InPlace,
    "its input": Same,
    "negative": Negative,
    "without its input": NoInput,
    "dropout": lambda hidden_size: Layer(nn.Dropout(0.5), hidden_size=hidden_size),
}


class Stack(nn.Module):
    """Sub-layers, with each way to write them."""

    def __init__(self, way="modules", kind="linear", layers=LAYERS, dtype=BF16, hidden_size=H):
        super().__init__()
        self.way = way
        self.connections = nn.ModuleList(HyperConnection(hidden_size) for _ in range(layers))
        self.layers = nn.ModuleList(
            LAYER_KINDS[kind](hidden_size=hidden_size) for _ in range(layers)
        )
        self.biases = nn.ParameterList(torch.randn(hidden_size) for _ in range(layers))
        for connection in self.connections:
            nn.init.constant_(connection.scale, 0.5)
            nn.init.normal_(connection.bias, std=0.3)
        self.layers.to(dtype)

    def forward(self, streams):
        return WAYS[self.way](self, streams, list(zip(self.connections, self.layers, strict=True)))


def gates(connection):
    return connection.weight, connection.scale, connection.bias


def modules(stack, streams, pairs):
    for connection, layer in pairs:
        streams = connection(streams, layer)
    return streams


def functions(stack, streams, pairs):
    """Without the passed residual."""
    for connection, layer in pairs:
        layer_input, post_mix, comb_mix = tile_mhc.fused_pre(streams, *gates(connection))
        streams = tile_mhc.post(layer(layer_input), streams, post_mix, comb_mix)
    return streams


def biased(stack, streams, pairs):
    for (connection, layer), bias in zip(pairs, stack.biases, strict=True):
        layer_input, post_mix, comb_mix = tile_mhc.fused_pre(streams, *gates(connection))
        streams = tile_mhc.post(layer(layer_input), streams, post_mix, comb_mix, bias=bias)
    return streams


def boundaries(stack, streams, pairs):
    (connection, before), *others = pairs
    layer_input, post_mix, comb_mix = tile_mhc.fused_pre(streams, *gates(connection))
    for connection, layer in others:
        streams, layer_input, post_mix, comb_mix = tile_mhc.post_pre(
            before(layer_input), streams, post_mix, comb_mix, *gates(connection)
        )
        before = layer
    return tile_mhc.post(before(layer_input), streams, post_mix, comb_mix)


def stacked(stack, streams, pairs):
    return run_sublayers(streams, [SubLayer(connection, layer) for connection, layer in pairs])


def delayed(stack, streams, pairs):
    """DeepSeek-V4.1: each layer input by the pre_mix that the boundary before has made."""
    (connection, before), *others = pairs
    pre_mix = torch.zeros(streams.shape[:-1], device=streams.device)
    pre_mix[..., 0] = 1
    layer_input, pre_mix, post_mix, comb_mix, streams = tile_mhc.fused_pre(
        streams, *gates(connection), pre_mix=pre_mix, passes_residual=True
    )
    for connection, layer in others:
        streams, layer_input, pre_mix, post_mix, comb_mix = tile_mhc.post_pre(
            before(layer_input), streams, post_mix, comb_mix, *gates(connection), pre_mix=pre_mix
        )
        before = layer
    streams = tile_mhc.post(before(layer_input), streams, post_mix, comb_mix)
    return streams + tile_mhc.aggregate(streams, pre_mix).unsqueeze(-2)


def accumulated(stack, streams, pairs):
    for connection, layer in pairs:
        accumulator = GradAccumulator(streams)
        mixes = tile_mhc.projection(streams, connection.weight, grad_accumulator=accumulator)
        pre_mix, post_mix, logits = tile_mhc.split_mixes(
            mixes, connection.scale, connection.bias, num_streams=N
        )
        layer_input = tile_mhc.aggregate(streams, pre_mix, grad_accumulator=accumulator)
        comb_mix = tile_mhc.sinkhorn(logits)
        streams = tile_mhc.post(
            layer(layer_input), streams, post_mix, comb_mix, grad_accumulator=accumulator
        )
    return streams


def branches(stack, streams, pairs):
    """Streams that two sub-layers read, slices of streams, and other shapes of them."""
    (first, second, third, fourth) = pairs
    streams = first[0](streams, first[1])
    left, right = second[0](streams, second[1]), third[0](streams, third[1])
    streams = left + right
    halves = [fourth[0](streams[i], fourth[1]) for i in range(LEAD[0])]
    streams = first[0](first[0](streams, first[1])[1].view(-1, 1, *streams.shape[-2:]), first[1])
    return torch.stack(halves) + streams.view(halves[0].shape)


WAYS = {
    "modules": modules,
    "functions": functions,
    "bias": biased,
    "boundaries": boundaries,
    "run_sublayers": stacked,
    "V4.1": delayed,
    "accumulator": accumulated,
    "branches": branches,
}


def first_streams(dtype=BF16, lead=LEAD, hidden_size=H, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    streams = torch.randn(*lead, N, hidden_size, generator=generator)
    return streams.to(device, dtype).requires_grad_()


def loss_of(out):
    return out.float().square().mean()


def gradients(stack, around, streams=None, forward=None):
    """The output, and the gradients of the streams and of all parameters."""
    if streams is None:
        streams = first_streams(next(stack.layers.parameters()).dtype)
    else:
        streams = streams.detach().clone().requires_grad_(streams.requires_grad)
    torch.manual_seed(3)
    with around:
        out = (stack if forward is None else forward)(streams)
    loss_of(out).backward()
    found = [out.detach(), streams.grad, *(p.grad for p in stack.parameters())]
    stack.zero_grad()
    return found


def check_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def check_bits(stack, around, streams=None, forward=None):
    """The output and the gradients are those of the stack without anything around it."""
    expected = gradients(stack, nullcontext(), streams)
    check_same(gradients(stack, around, streams, forward), expected)
