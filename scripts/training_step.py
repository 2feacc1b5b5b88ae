"""What a training step of DeepSeek-V4 takes without tile_mhc, with it, and beside torch.compile.

    tile-mhc compile --arch sm_90a --hidden 4096 --streams 4   # first: no compilation while timing
    python scripts/training_step.py

Layers of Hugging Face's DeepSeek-V4 at their real width, with random weights, few experts and a
small vocabulary, so that they fit one GPU; bfloat16, the hyper-connections float32. A step is
forward, loss, backward and a fused AdamW whose learning rate is 0: each step does the same work on
the same weights. Three variants take turns, several times over:
- original: transformers as it is;
- compiled: transformers with its decoder layers and its head under torch.compile, where attention
  and mixture of experts are left out of the graph: what is compiled is the hyper-connections and
  the norms between them;
- patched: `tile_mhc.integrations.transformers.patch()`.

gpu_ms: the time in which the GPU does anything, from a profile: idle time does not count, and what
    runs beside something else counts once. Median over the turns, of one step each.
wall_ms: a step, between two synchronisations. Median. Where it is well above gpu_ms, the GPU waits
    for Python, and a faster kernel changes nothing.
peak_gb: the most memory that is allocated during a step.
step_gb: how much of that is allocated for the length of the step alone, which is all but the
    parameters and the optimizer's state.

Without a GPU only wall_ms is measured, and says nothing: a test of this script.

Exit codes: 0; 1 the losses of the variants disagree, or another backend ran than the device should
give; 2 bad usage.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepseek_v4 import cast_parameters
from text_batches import device_name
from torch import Tensor

from tile_mhc.integrations import transformers as integration

VARIANTS = ("original", "compiled", "patched")
LAYER_TYPES = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
MEASURES = ("gpu_ms", "wall_ms", "peak_gb", "step_gb")
# What the profiler calls that which keeps a GPU busy; ranges that a user names are no such thing.
BUSY = ("kernel", "gpu_memcpy", "gpu_memset")
WARM_UP = 2
# How far a variant's loss may be from the original's, by its size: bfloat16 rounds by 2**-9.
LOSS_BOUND = 1e-2
GB = 1e9


def build_model(arguments: argparse.Namespace) -> Any:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    layers = arguments.layers
    config = DeepseekV4Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        num_hidden_layers=layers,
        num_attention_heads=arguments.heads,
        head_dim=arguments.head_dim,
        q_lora_rank=arguments.hidden // 4,
        o_lora_rank=arguments.hidden // 4,
        o_groups=min(8, arguments.heads),
        moe_intermediate_size=arguments.hidden // 2,
        n_routed_experts=arguments.experts,
        num_experts_per_tok=2,
        layer_types=[LAYER_TYPES[i % len(LAYER_TYPES)] for i in range(layers)],
        # By token id: the variants send a token to the same experts, however they round.
        mlp_layer_types=["hash_moe"] * layers,
        index_n_heads=arguments.heads,
        index_head_dim=min(128, arguments.head_dim),
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = DeepseekV4ForCausalLM(config)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                routes = torch.rand(config.vocab_size, config.n_routed_experts)
                buffer.copy_(routes.argsort(-1)[:, : config.num_experts_per_tok])
    return cast_parameters(model, "bfloat16, hc float32").train()


def make_compiled(backend: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which the decoder layers and the head are compiled, but not what is inside them.

    The functions are made once, so that what was compiled in one turn serves the next.
    """
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=backend)

    replaced: list[tuple[Any, Any]] = [
        (cls, make(cls.forward))
        for cls, make in (
            (modeling.DeepseekV4Attention, torch.compiler.disable),
            (modeling.DeepseekV4SparseMoeBlock, torch.compiler.disable),
            (modeling.DeepseekV4DecoderLayer, compiled),
            (modeling.DeepseekV4HyperHead, compiled),
        )
    ]

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for cls, forward in replaced:
                stack.enter_context(mock.patch.object(cls, "forward", forward))
            yield

    return context


def make_step(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=ids.is_cuda)

    def step() -> Tensor:
        loss: Tensor = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_ms(step: Callable[[], Tensor], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def busy_ms(events: Sequence[dict[str, Any]]) -> float:
    """The length of the union of the intervals in which a profiled GPU did anything.

    Args:
        events: `traceEvents` of a trace: ts and dur in microseconds.
    """
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in BUSY)
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e3


def gpu_ms(step: Callable[[], Tensor], device: torch.device) -> float:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    synchronise(device)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronise(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        return busy_ms(json.loads(file.read_text())["traceEvents"])


def memory_gb(step: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """The most that is allocated during a step, and how much of it is so for its length alone."""
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated(device)
    return peak / GB, (peak - before) / GB


def measure_turn(
    step: Callable[[], Tensor], device: torch.device, steps: int
) -> tuple[float, dict[str, list[float]]]:
    """The first loss, and what was measured after the warm-up."""
    loss = float(step())
    for _ in range(WARM_UP - 1):
        step()
    found: dict[str, list[float]] = {"wall_ms": [wall_ms(step, device) for _ in range(steps)]}
    if device.type == "cuda":
        found["gpu_ms"] = [gpu_ms(step, device)]
        peak, beyond = memory_gb(step, device)
        found |= {"peak_gb": [peak], "step_gb": [beyond]}
    return loss, found


def run_variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each variant its first loss, the medians, the spread of wall_ms, and what it ran on."""
    device = torch.device(arguments.device)
    model = build_model(arguments)
    shape = (arguments.batch, arguments.length)
    ids = torch.randint(arguments.vocabulary, shape, device=device)
    step = make_step(model, ids)
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "original": contextlib.nullcontext,
        "compiled": make_compiled(arguments.backend),
        "patched": integration.patch,
    }
    losses: dict[str, float] = {}
    backends: dict[str, list[str]] = {}
    values: dict[str, dict[str, list[float]]] = {name: {} for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name in VARIANTS:
            with contexts[name]():
                loss, found = measure_turn(step, device, arguments.steps)
                if name == "patched":
                    report = integration.backend_report()
                    backends[name] = sorted({used for calls in report.values() for used in calls})
            losses.setdefault(name, loss)
            for measure, numbers in found.items():
                values[name].setdefault(measure, []).extend(numbers)
    return {
        name: {
            "loss": losses[name],
            "backends": backends.get(name, ["transformers"]),
            **{key: statistics.median(numbers) for key, numbers in values[name].items()},
            "wall_ms_range": [min(values[name]["wall_ms"]), max(values[name]["wall_ms"])],
        }
        for name in VARIANTS
    }


def check(rows: dict[str, dict[str, Any]], device: torch.device) -> list[str]:
    """What is wrong with a run: another result, or another backend than the device should give."""
    failures = []
    truth = rows["original"]["loss"]
    for name in VARIANTS[1:]:
        loss = rows[name]["loss"]
        if not abs(loss - truth) <= LOSS_BOUND * abs(truth):  # a NaN fails too
            failures.append(f"{name}: the loss must be near {truth:.5f}; got {loss:.5f}")
    expected = ["TileLang" if device.type == "cuda" else f"reference (on {device.type})"]
    if rows["patched"]["backends"] != expected:
        failures.append(
            f"patched: the backend must be {expected[0]}; got {rows['patched']['backends']}"
        )
    return failures


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times less the patched model takes than each of the others."""
    return {
        name: {
            measure: rows[name][measure] / rows["patched"][measure]
            for measure in MEASURES
            if measure in rows[name]
        }
        for name in VARIANTS[:-1]
    }


def print_table(rows: dict[str, dict[str, Any]], against: dict[str, dict[str, float]]) -> None:
    measures = [measure for measure in MEASURES if measure in rows["patched"]]
    print("".join(["variant".ljust(24), *(measure.rjust(12) for measure in measures)]))
    for name, row in rows.items():
        print("".join([name.ljust(24), *(f"{row[measure]:12.2f}" for measure in measures)]))
    for name, times in against.items():
        cells = [f"{times[measure]:11.2f}x" for measure in measures]
        print("".join([f"{name} / patched".ljust(24), *cells]))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default: {device}")
    for name, default, what in (
        ("hidden", 4096, "width of a stream"),
        ("layers", 3, "decoder layers; the three kinds of attention take turns"),
        ("heads", 64, "heads of the attention and of the indexer"),
        ("head-dim", 512, "width of a head"),
        ("experts", 8, "routed experts, of which a token takes two"),
        ("vocabulary", 4096, "tokens"),
        ("batch", 4, "rows of a step"),
        ("length", 1024, "tokens of a row"),
        ("rounds", 3, "turns of each variant"),
        ("steps", 5, "steps of a turn whose wall time is taken"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    rows = run_variants(arguments)
    failures, against = check(rows, device), ratios(rows)
    print(
        f"DeepSeek-V4, {arguments.layers} layers, H = {arguments.hidden}, "
        f"{arguments.batch} x {arguments.length} tokens, on {device_name(device)}"
    )
    print_table(rows, against)
    report = {
        "device": device_name(device),
        "torch": torch.__version__,
        "settings": {key: value for key, value in vars(arguments).items() if key != "device"},
        "variants": rows,
        "ratios": against,
        "failures": failures,
    }
    print(json.dumps(report))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
