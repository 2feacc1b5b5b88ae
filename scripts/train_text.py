"""Train a small mHC transformer on text, with tile_mhc and with its torch reference side by side.

A byte-level transformer of the usual kind, but that every sub-layer stands in a
`tile_mhc.nn.HyperConnection`, as in DeepSeek-V4, or with `--model v4.1` in a
`tile_mhc.nn.DelayedHyperConnection`: four streams of bfloat16, parameters in float32. It is trained
from one seed, on the same batches, four times:

- tile_mhc: the modules as they are, in `tile_mhc.nn.run_sublayers` or `run_delayed_sublayers`: one
  op a boundary between two sub-layers. On a GPU that is the TileLang kernels.
- reference: the same modules with `tile_mhc.reference` in the place of the ops, and autograd for
  the gradients.
- float32 streams: the reference again, with nothing rounded in the streams.
- plain residual: x + sublayer(x), the same sub-layers without mHC.

The losses with float32 streams are the truth. The reference is away from them by the rounding of
bfloat16, which the run so measures itself: distances are root mean squares, over the steps, of the
relative difference. tile_mhc may be away by SLACK times as much: small differences grow as training
goes on, so two equally exact runs are not equally far. Measured ratios, 6 seeds on a CPU: tile_mhc
0.4 to 1.7, the same with weights moved by 2**-17 0.3 to 1.2, with every comb_mix transposed 28 to
40.

Without a GPU the ops are the reference: then tile_mhc differs by its gradients alone, which the ops
compute in closed form, and round once where autograd rounds several times.

Exit codes: 0 the losses agree and all fell; 1 they do not; 2 bad usage.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics
from typing import Any

import torch
from text_batches import add_arguments, check_arguments, device_name, read_batches
from torch import Tensor, nn

from tile_mhc import aggregate, functional, reference
from tile_mhc.nn import (
    DelayedHyperConnection,
    HyperConnection,
    HyperHead,
    SubLayer,
    run_delayed_sublayers,
    run_sublayers,
)

SLACK = 4.0
HIDDEN, STREAMS, LAYERS, HEADS = 256, 4, 4, 4
LEARNING_RATE = 1e-3
MANUAL = "the manual that comes with Python"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELS = ("v4", "v4.1")
# Rows of a batch, bytes of a row, steps.
SIZES = {"cpu": (4, 64, 40), "cuda": (32, 256, 200)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.project_in = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.project_out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.project_in(self.norm(x.float())).unflatten(-1, (3, HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project_out(mixed.transpose(1, 2).flatten(-2)).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.project_in = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.project_out = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.project_in(self.norm(x.float())))
        return self.project_out(hidden).to(x.dtype)


def reference_pre(
    connection: HyperConnection | DelayedHyperConnection, streams: Tensor, **given: Tensor
) -> tuple[Tensor, ...]:
    # Under autocast the specification's matmuls would round their arguments.
    with torch.autocast(streams.device.type, enabled=False):
        return reference.fused_pre(
            streams,
            connection.weight,
            connection.scale,
            connection.bias,
            norm_eps=connection.norm_eps,
            pre_eps=connection.pre_eps,
            sinkhorn_eps=connection.sinkhorn_eps,
            post_mult=connection.post_mult,
            sinkhorn_repeat=connection.sinkhorn_repeat,
            **given,
        )


def reference_post(
    layer_output: Tensor, streams: Tensor, post_mix: Tensor, comb_mix: Tensor
) -> Tensor:
    with torch.autocast(streams.device.type, enabled=False):
        return reference.post(layer_output, streams, post_mix, comb_mix)


# Methods of their own: a stack calls these connections one by one.
class ReferenceConnection(HyperConnection):
    """The same parameters and options, computed by the specification."""

    post = staticmethod(reference_post)

    def pre(self, streams: Tensor) -> Any:
        return *reference_pre(self, streams), streams


class ReferenceDelayedConnection(DelayedHyperConnection):
    """The same of DeepSeek-V4.1."""

    post = staticmethod(reference_post)

    def pre(self, streams: Tensor, pre_mix: Tensor | None = None) -> Any:
        if pre_mix is None:
            pre_mix = streams.new_zeros(streams.shape[:-1], dtype=torch.float32)
            pre_mix[..., 0] = 1
        return *reference_pre(self, streams, pre_mix=pre_mix), streams


class ReferenceHead(HyperHead):
    def forward(self, streams: Tensor) -> Tensor:
        with torch.autocast(streams.device.type, enabled=False):
            return reference.contract(
                streams,
                self.weight,
                self.scale,
                self.bias,
                norm_eps=self.norm_eps,
                pre_eps=self.pre_eps,
            )


def run_plain(hidden: Tensor, sublayers: Iterable[SubLayer]) -> Tensor:
    for _, sublayer, _ in sublayers:
        hidden = hidden + sublayer(hidden)
    return hidden


class Delayed(nn.Module):
    """The readout of DeepSeek-V4.1: by the pre_mix that the last sub-layer has made."""

    def __init__(self, collapse: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.collapse = collapse

    def forward(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.collapse(*outputs)


class Transformer(nn.Module):
    """Embeddings, 2 * LAYERS sub-layers each in its connection, the head, logits over bytes."""

    def __init__(
        self,
        length: int,
        expand: Callable[[Tensor], Tensor],
        connection: Callable[[], nn.Module],
        run: Callable[[Tensor, Iterable[SubLayer]], Any],
        head: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.expand, self.run = expand, run
        self.bytes = nn.Embedding(256, HIDDEN)
        self.positions = nn.Embedding(length, HIDDEN)
        self.sublayers = nn.ModuleList(
            kind() for _ in range(LAYERS) for kind in (Attention, FeedForward)
        )
        self.norm = nn.RMSNorm(HIDDEN)
        self.logits = nn.Linear(HIDDEN, 256, bias=False)
        # Last, so that all the above are the same from the same seed, whatever connects them.
        self.connections = nn.ModuleList(connection() for _ in self.sublayers)
        self.head = head()

    def forward(self, text: Tensor) -> Tensor:
        """The mean loss of predicting each byte from those before it."""
        inputs, targets = text[:, :-1], text[:, 1:]
        places = torch.arange(inputs.shape[1], device=text.device)
        streams = self.expand(self.bytes(inputs) + self.positions(places))
        outputs = self.run(streams, map(SubLayer, self.connections, self.sublayers))
        logits = self.logits(self.norm(self.head(outputs).float()))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def mixing(kind: type[HyperConnection | DelayedHyperConnection | HyperHead]) -> Callable[[], Any]:
    """One that from the first step reads, writes and mixes every stream differently.

    As they are initialised the streams stay nearly the same, and a wrong mix would hardly show.
    """

    def make() -> nn.Module:
        module = kind(HIDDEN, STREAMS, init="deepseek_v4")
        nn.init.normal_(module.bias)
        return module

    return make


def build(run: str, length: int, model: str = "v4") -> Transformer:
    if run == "plain residual":
        return Transformer(length, Tensor.bfloat16, nn.Identity, run_plain, nn.Identity)
    ours = run == "tile_mhc"
    dtype = torch.float32 if run == "float32 streams" else torch.bfloat16
    spread = functional.expand_from_embedding if ours else reference.expand

    def expand(hidden: Tensor) -> Tensor:
        return spread(hidden.to(dtype), STREAMS)

    if model == "v4":
        connection = HyperConnection if ours else ReferenceConnection
        head = mixing(HyperHead if ours else ReferenceHead)
        return Transformer(length, expand, mixing(connection), run_sublayers, head)
    delayed = DelayedHyperConnection if ours else ReferenceDelayedConnection
    collapse = aggregate if ours else reference.aggregate
    return Transformer(
        length, expand, mixing(delayed), run_delayed_sublayers, lambda: Delayed(collapse)
    )


RUNS = ("tile_mhc", "reference", "float32 streams", "plain residual")


def train(
    run: str, batches: Tensor, dtype: torch.dtype, seed: int, model: str = "v4"
) -> dict[str, Any]:
    """The loss of every step, and the bytes a second of the median step."""
    torch.manual_seed(seed)
    transformer = build(run, batches.shape[-1], model).to(batches.device)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=LEARNING_RATE)
    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
            loss = transformer(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds)[len(seconds) // 2]
    return {"losses": losses, "bytes_per_second": batches[0].numel() / median}


def differences(losses: list[float], others: list[float]) -> Tensor:
    """Relative, of every step."""
    a, b = torch.tensor(losses, dtype=torch.float64), torch.tensor(others, dtype=torch.float64)
    return (a - b).abs() / b


def compare(losses: dict[str, list[float]]) -> dict[str, Any]:
    """How far the losses are apart, how far they may be, and what is wrong."""
    away = {
        name: float(differences(losses[name], losses["float32 streams"]).square().mean().sqrt())
        for name in ("tile_mhc", "reference")
    }
    bound = SLACK * away["reference"]
    failures = []
    if not away["tile_mhc"] <= bound:  # a NaN fails too
        failures.append(
            f"tile_mhc: the losses must be within {bound:.1e} of those with float32 streams; "
            f"got {away['tile_mhc']:.1e}"
        )
    for name, values in losses.items():
        if not values[-1] < values[0]:
            failures.append(f"{name}: the loss must fall; got {values[0]:.4f} to {values[-1]:.4f}")
    return {
        "distances": away,
        "bound": bound,
        "largest_difference": float(differences(losses["tile_mhc"], losses["reference"]).max()),
        "failures": failures,
    }


def print_table(runs: dict[str, dict[str, Any]], lines: int = 12) -> None:
    steps = len(runs["reference"]["losses"])
    shown = sorted({*range(0, steps, -(-steps // lines)), steps - 1})
    print("  ".join(["  step", *(f"{name:>15}" for name in runs), "tile_mhc - reference"]))
    for step in shown:
        losses = [run["losses"][step] for run in runs.values()]
        cells = [f"{step:6}", *(f"{loss:15.4f}" for loss in losses)]
        print("  ".join([*cells, f"{losses[0] - losses[1]:20.1e}"]))
    speeds = [f"{run['bytes_per_second']:15,.0f}" for run in runs.values()]
    print("  ".join(["byte/s", *speeds]))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, None, MANUAL)
    parser.add_argument("--model", choices=MODELS, default="v4", help="kind of connections (v4)")
    parser.add_argument("--steps", type=int, help="of each run (CPU: 40, GPU: 200)")
    parser.add_argument("--dtype", choices=DTYPES, help="of matmuls (CPU: float32, GPU: bfloat16)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    if arguments.steps is not None and arguments.steps < 2:
        parser.error("--steps must be at least 2")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    rows, length, steps = SIZES["cpu" if device.type == "cpu" else "cuda"]
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    text = arguments.text.read_bytes() if arguments.text else "\n\n".join(topics.values()).encode()
    batches = read_batches(text, (arguments.steps or steps, rows, length), device)
    threads = torch.get_num_threads()
    # The tensors are small: on a CPU with other work, threads wait for each other most of the time.
    torch.set_num_threads(1)
    try:
        options = (DTYPES[dtype], arguments.seed, arguments.model)
        runs = {name: train(name, batches, *options) for name in RUNS}
    finally:
        torch.set_num_threads(threads)
    verdict = compare({name: run["losses"] for name, run in runs.items()})
    if arguments.json:
        given = {"device": device_name(device), "model": arguments.model}
        given |= {"dtype": dtype, "seed": arguments.seed}
        print(json.dumps(given | {"runs": runs} | verdict, indent=2))
        return 1 if verdict["failures"] else 0
    print(f"{batches.numel():,} bytes of {arguments.text or MANUAL}")
    print(f"{arguments.model} on {device_name(device)}, matmuls in {dtype}\n")
    print_table(runs)
    away = verdict["distances"]
    print(
        f"\nlargest relative difference, tile_mhc to reference: {verdict['largest_difference']:.1e}"
    )
    print(
        f"distance from float32 streams: tile_mhc {away['tile_mhc']:.1e}, reference "
        f"{away['reference']:.1e}; bound {verdict['bound']:.1e}"
    )
    if device.type == "cpu":
        print("no GPU: tile_mhc is the reference here, but for its gradients in closed form")
    print("agreement" if not verdict["failures"] else "NO AGREEMENT")
    for failure in verdict["failures"]:
        print(f"  {failure}")
    return 1 if verdict["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
