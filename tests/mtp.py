"""Streams that several readers share, as of multi-token prediction: heads, and the next block.

A chain of parts, of two sub-layers each. Behind each part two heads read its streams, and so does
the first sub-layer of the part after: the gradients of all three have to be counted. `WAYS` are the
ways to write it with tile_mhc, `specified` is plain autograd of the specification.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tile_mhc
from tile_mhc import GradAccumulator, functional, reference
from tile_mhc.nn import HyperConnection, HyperHead, SubLayer, run_sublayers

N, PARTS = 4, 3
OPTIONS: dict[str, Any] = {"post_mult": 2.0, "sinkhorn_repeat": 20}
Run = Callable[[nn.ModuleList, Tensor], list[Tensor]]
Around = Callable[[], contextlib.AbstractContextManager[Any]]


class Part(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.connections = nn.ModuleList(HyperConnection(hidden_size, N) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(2))
        self.heads = nn.ModuleList(HyperHead(hidden_size, N) for _ in range(2))
        for module in (*self.connections, *self.heads):
            nn.init.uniform_(module.scale, 0.5, 1.0)
            nn.init.normal_(module.bias)

    def pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(self.connections, self.layers, strict=True))


def make_chain(hidden_size: int) -> nn.ModuleList:
    return nn.ModuleList(Part(hidden_size) for _ in range(PARTS))


def gates(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    return module.weight, module.scale, module.bias


def modules(chain: Any, streams: Tensor, around: Around) -> list[Tensor]:
    outs = []
    for part in chain:
        with around():
            for connection, layer in part.pairs():
                streams = connection(streams, layer)
            outs += [head(streams) for head in part.heads]
    return outs


def stacks(chain: Any, streams: Tensor, around: Around) -> list[Tensor]:
    outs = []
    for part in chain:
        with around():
            streams = run_sublayers(streams, map(SubLayer, part.connections, part.layers))
            outs += [head(streams) for head in part.heads]
    return outs


def functions(chain: Any, streams: Tensor, around: Around) -> list[Tensor]:
    """Without the passed residual."""
    outs = []
    for part in chain:
        with around():
            for connection, layer in part.pairs():
                layer_input, *mixes = tile_mhc.fused_pre(streams, *gates(connection), **OPTIONS)
                streams = tile_mhc.post(layer(layer_input), streams, *mixes)
            outs += [tile_mhc.contract(streams, *gates(head)) for head in part.heads]
    return outs


def passed(chain: Any, streams: Tensor, around: Around) -> list[Tensor]:
    """The heads read the residual that the next block's pre has passed."""
    outs: list[Tensor] = []
    heads: list[Any] = []
    with around():
        for part in chain:
            for connection, layer in part.pairs():
                layer_input, *mixes, streams = connection.pre(streams)
                outs += [head(streams) for head in heads]
                heads = []
                streams = connection.post(layer(layer_input), streams, *mixes)
            heads = list(part.heads)
        return outs + [head(streams) for head in heads]


def boundaries(chain: Any, streams: Tensor, around: Around) -> list[Tensor]:
    """The heads read what the boundary has written, which is the next part's first."""
    outs: list[Tensor] = []
    heads: list[Any] = []
    output: Any = None
    mixes: list[Any] = []
    with around():
        for part in chain:
            for connection, layer in part.pairs():
                if output is None:
                    layer_input, *mixes, streams = connection.pre(streams)
                else:
                    layer_input, *mixes, streams = connection.post_pre(output, streams, *mixes)
                outs += [head(streams) for head in heads]
                heads = []
                output = layer(layer_input)
            heads = list(part.heads)
        streams = connection.post(output, streams, *mixes)
        return outs + [head(streams) for head in heads]


def accumulators(chain: Any, streams: Tensor, around: Around) -> list[Tensor]:
    """Each residual has one, which the heads share with the next block's ops."""
    outs = []
    into = GradAccumulator(streams)
    for part in chain:
        with around():
            for connection, layer in part.pairs():
                given = {"grad_accumulator": into}
                mixes = tile_mhc.projection(streams, connection.weight, **given)
                pre_mix, post_mix, logits = tile_mhc.split_mixes(
                    mixes, connection.scale, connection.bias, num_streams=N, post_mult=2.0
                )
                comb_mix = tile_mhc.sinkhorn(logits, repeat=20)
                layer_input = tile_mhc.aggregate(streams, pre_mix, **given)
                streams = tile_mhc.post(layer(layer_input), streams, post_mix, comb_mix, **given)
                into = GradAccumulator(streams)
            outs += [
                tile_mhc.contract(streams, *gates(head), grad_accumulator=into)
                for head in part.heads
            ]
    return outs


def accumulators_of_boundaries(chain: Any, streams: Tensor, around: Around) -> list[Tensor]:
    """The heads share one with the boundary that reads the streams next, as its residual."""
    outs: list[Tensor] = []
    heads: list[Any] = []
    output: Any = None
    mixes: list[Any] = []
    into: Any = None
    with around():
        for part in chain:
            for connection, layer in part.pairs():
                own = gates(connection)
                if output is None:
                    layer_input, *mixes, streams = functional.mhc_pre(
                        streams, *own, passes_residual=True, **OPTIONS
                    )
                else:
                    streams, layer_input, *mixes = tile_mhc.post_pre(
                        output, streams, *mixes, *own, grad_accumulator=into, **OPTIONS
                    )
                into = GradAccumulator(streams)
                outs += [
                    tile_mhc.contract(streams, *gates(head), grad_accumulator=into)
                    for head in heads
                ]
                heads = []
                output = layer(layer_input)
            heads = list(part.heads)
        streams = tile_mhc.post(output, streams, *mixes, grad_accumulator=into)
        return outs + [head(streams) for head in heads]


WAYS = {
    way.__name__: way
    for way in (
        modules,
        stacks,
        functions,
        passed,
        boundaries,
        accumulators,
        accumulators_of_boundaries,
    )
}


def specified(chain: Any, streams: Tensor) -> list[Tensor]:
    outs = []
    for part in chain:
        for connection, layer in part.pairs():
            layer_input, *mixes = reference.fused_pre(streams, *gates(connection), **OPTIONS)
            streams = reference.post(layer(layer_input), streams, *mixes)
        outs += [reference.contract(streams, *gates(head)) for head in part.heads]
    return outs


def ways(way: str, around: Around = contextlib.nullcontext) -> Run:
    return lambda chain, streams: WAYS[way](chain, streams, around)


def wide(chain: nn.ModuleList) -> nn.ModuleList:
    chain = copy.deepcopy(chain)
    for parameter in chain.parameters():  # `.double()` would leave those of the mixing
        parameter.data = parameter.data.double()
    return chain


def grads_of(
    run: Run, chain: nn.ModuleList, streams: Tensor, upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Of the streams and of every parameter; a head whose upstream is None is not used."""
    leaf = streams.detach().requires_grad_()
    outs = run(chain, leaf)
    used = [(o, g.to(o.dtype)) for o, g in zip(outs, upstream, strict=True) if g is not None]
    outs, given = map(list, zip(*used, strict=True))
    grads = torch.autograd.grad(outs, [leaf, *chain.parameters()], given, allow_unused=True)
    return [None if g is None else g.detach() for g in grads]


def distance(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())
