"""The peak memory of a training step of a stack of boundaries: one op each, and separate ops.

    python scripts/stack_memory.py --tokens 8192 --hidden 7168

Sub-layers are a linear layer in a `tile_mhc.nn.HyperConnection`, or with `--model v4.1` in a
`DelayedHyperConnection`; there is one more of them than boundaries. `boundaries` runs them by
`run_sublayers` (`run_delayed_sublayers`), `separate` connection by connection. The peak is what is
asked for at most in a forward and a backward, beyond the parameters, their gradients, and the
streams that the first sub-layer is given.

Exit codes: 0; 1 the boundaries' peak is higher; 2 bad usage.
"""

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tile_mhc import aggregate
from tile_mhc.nn import (
    DelayedHyperConnection,
    HyperConnection,
    HyperHead,
    SubLayer,
    run_delayed_sublayers,
    run_sublayers,
)

MODELS = ("v4", "v4.1")
WAYS = ("boundaries", "separate")
STREAMS = 4


def build(model: str, boundaries: int, hidden_size: int, device: str) -> nn.ModuleDict:
    kind = HyperConnection if model == "v4" else DelayedHyperConnection
    count = boundaries + 1
    connections = [kind(hidden_size, STREAMS, device=device) for _ in range(count)]
    layers = [
        nn.Linear(hidden_size, hidden_size, device=device, dtype=torch.bfloat16)
        for _ in range(count)
    ]
    modules = {"connections": nn.ModuleList(connections), "layers": nn.ModuleList(layers)}
    if model == "v4":
        modules["head"] = HyperHead(hidden_size, STREAMS, device=device)
    return nn.ModuleDict(modules)


def run(modules: nn.ModuleDict, way: str, streams: Tensor) -> Tensor:
    sublayers = list(map(SubLayer, modules["connections"], modules["layers"]))
    if "head" in modules:
        if way == "boundaries":
            return modules["head"](run_sublayers(streams, sublayers))
        for connection, layer, _ in sublayers:
            streams = connection(streams, layer)
        return modules["head"](streams)
    pre_mix = None
    if way == "boundaries":
        streams, pre_mix = run_delayed_sublayers(streams, sublayers)
    else:
        for connection, layer, _ in sublayers:
            streams, pre_mix = connection(streams, pre_mix, layer)
    return aggregate(streams, pre_mix)


def requested(device: torch.device, when: str) -> int:
    """Bytes as asked for: a block that is reused may have up to a MiB more, by what came before."""
    return torch.cuda.memory_stats(device).get(f"requested_bytes.all.{when}", 0)


def peak_bytes(modules: nn.ModuleDict, way: str, tokens: int) -> int:
    """Of the second step: the first one makes the gradients and what libraries keep."""
    hidden_size = modules["layers"][0].in_features
    device = modules["layers"][0].weight.device
    streams = torch.randn(tokens, STREAMS, hidden_size, device=device).bfloat16().requires_grad_()
    peak = 0
    for _ in range(2):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = requested(device, "current")
        out = run(modules, way, streams)
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize(device)
        peak = requested(device, "peak") - before
        del out
    return peak


def measure(model: str, tokens: int, hidden_size: int, boundaries: int) -> dict[str, int]:
    torch.manual_seed(0)
    modules = build(model, boundaries, hidden_size, "cuda")
    return {way: peak_bytes(modules, way, tokens) for way in WAYS}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--boundaries", type=int, default=16)
    parser.add_argument("--model", choices=MODELS, help="one of them (both)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    for name in ("tokens", "hidden", "boundaries"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(arguments, name)}")
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed; torch sees none")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    shape = (arguments.tokens, arguments.hidden, arguments.boundaries)
    models = (arguments.model,) if arguments.model else MODELS
    found: dict[str, Any] = {model: measure(model, *shape) for model in models}
    if arguments.json:
        print(json.dumps(dict(zip(("tokens", "hidden", "boundaries"), shape, strict=True)) | found))
    else:
        print(f"{shape[2]} boundaries, {shape[0]} tokens of width {shape[1]}; GB at the peak")
        for model, peaks in found.items():
            print("  ".join([f"{model:5}", *(f"{way} {peaks[way] / 1e9:.3f}" for way in WAYS)]))
    return int(any(peaks["boundaries"] > peaks["separate"] for peaks in found.values()))


if __name__ == "__main__":
    sys.exit(main())
