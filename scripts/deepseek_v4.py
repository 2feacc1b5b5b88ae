"""Train a small DeepSeek-V4 of Hugging Face with and without tile_mhc, and compare the two.

The model has random weights, one layer of each kind of attention, and reads a text file as bytes.
Every parameter is rounded to bfloat16 first, so that three models share the same weights: float32,
bfloat16 with float32 hyper-connections (as checkpoints are loaded), and bfloat16 throughout. Each
runs unpatched and patched. All are measured against one run: the unpatched model in float32.

Agreement is asked of the first step's logits and gradients, as distances ||a - truth|| / ||truth||:
- a float32 model: at most FLOAT32_BOUND;
- a bfloat16 model: at most SLACK times the distance of the unpatched model of the same dtypes.
  Most of either distance is the rounding of everything else in the model, so two equally exact
  runs are not equally far. Measured ratios, 8 seeds and 2 texts on a CPU: logits 0.96 to 0.98, all
  gradients 0.95 to 1.02, the few gradients of the hyper-connections alone 0.89 to 1.22.
The routing does not depend on the activations (hash routing, every compressed key selected): no
near tie can send two runs to different experts or keys, so distances measure arithmetic alone.

Exit codes: 0 agreement; 1 no agreement, or not the backend the device should give; 2 bad usage.
"""

import argparse
import copy
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from text_batches import add_arguments, check_arguments, device_name, read_batches
from torch import Tensor

from tile_mhc.integrations import transformers as integration

FLOAT32_BOUND = 1e-4
SLACK = {"logits": 1.05, "grads": 1.1, "hc_grads": 1.5}
SEED = 0
BATCH = 2
LEARNING_RATE = 1e-3
MODELS = ("float32", "bfloat16, hc float32", "bfloat16")
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Run:
    """One model, patched or not: what its steps gave."""

    losses: list[float]
    seconds: list[float]
    logits: Tensor
    grads: dict[str, Tensor]
    backends: dict[str, dict[str, int]]


def build_model(device: torch.device) -> Any:
    try:
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    except ImportError as error:
        raise SystemExit(
            f"deepseek_v4: transformers with DeepSeek-V4 (5.17 or later) is needed; got: {error}"
        ) from error
    torch.manual_seed(SEED)
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=64,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        mlp_layer_types=["hash_moe"] * 3,
        sliding_window=128,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=4096,
        max_position_embeddings=16384,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = DeepseekV4ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The initial biases are zero and the scales one: as trained ones would, make every
            # stream read, written and mixed differently.
            if name.endswith(("hc.base", "hc_base")):
                parameter.normal_(0.0, 0.5)
            elif name.endswith(("hc.scale", "hc_scale")):
                parameter.uniform_(0.5, 1.5)
            parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                routes = torch.rand(config.vocab_size, config.n_routed_experts)
                buffer.copy_(routes.argsort(-1)[:, : config.num_experts_per_tok])
    return model.to(device).train()


def cast_parameters(model: Any, kind: str) -> Any:
    """Parameters only: the rotary frequencies stay float32 in every model."""
    for name, parameter in model.named_parameters():
        if kind == "bfloat16" or (kind != "float32" and not is_hyper(name)):
            parameter.data = parameter.data.bfloat16()
    return model


def is_hyper(name: str) -> bool:
    return any(part in ("attn_hc", "ffn_hc", "hc_head") for part in name.split("."))


def train(base: Any, kind: str, batches: Tensor, patched: bool) -> Run:
    model = cast_parameters(copy.deepcopy(base), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    run = Run([], [], torch.empty(0), {}, {})
    if patched:
        integration.patch()
    try:
        for step, batch in enumerate(batches):
            start = time.perf_counter()
            output = model(batch, labels=batch)
            output.loss.backward()
            run.losses.append(output.loss.item())  # waits for the device
            if batch.is_cuda:
                torch.cuda.synchronize()
            run.seconds.append(time.perf_counter() - start)
            if step == 0:
                run.logits = output.logits.detach().float()
                run.grads = {
                    name: parameter.grad.detach().float().clone()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            optimizer.step()
            optimizer.zero_grad()
        run.backends = integration.backend_report() if patched else {}
    finally:
        integration.unpatch()
    return run


def distance(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, in float64; NaN anywhere gives NaN."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm())


def cosine(value: Tensor, truth: Tensor) -> float:
    return float(torch.cosine_similarity(value.double(), truth.double(), dim=0))


def flat_grads(run: Run, names: list[str]) -> Tensor:
    return torch.cat([run.grads[name].flatten() for name in names])


def measure(kind: str, patched: bool, run: Run, original: Run, truth: Run) -> dict[str, Any]:
    if run.grads.keys() != truth.grads.keys():
        missing = sorted(run.grads.keys() ^ truth.grads.keys())
        raise SystemExit(f"deepseek_v4: gradients reach different parameters: {missing}")
    names = list(truth.grads)
    hyper = [name for name in names if is_hyper(name)]
    used = sorted({backend for counts in run.backends.values() for backend in counts})
    return {
        "model": kind,
        "patched": patched,
        "backend": " + ".join(used) if patched else "transformers",
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "logits_max": float((run.logits - original.logits).abs().max()),
        "logits": distance(run.logits, truth.logits),
        "grads": distance(flat_grads(run, names), flat_grads(truth, names)),
        "grads_cosine": cosine(flat_grads(run, names), flat_grads(truth, names)),
        "hc_grads": distance(flat_grads(run, hyper), flat_grads(truth, hyper)),
        # The first step pays for compilation.
        "milliseconds": 1e3 * min(run.seconds[1:] or run.seconds),
        "calls": run.backends,
    }


def check(original: dict[str, Any], patched: dict[str, Any], device: torch.device) -> list[str]:
    """What is wrong with a patched run, given the original one of the same model."""
    failures = []
    kind = patched["model"]
    for name, slack in SLACK.items():
        bound = FLOAT32_BOUND if kind == "float32" else slack * original[name]
        if not patched[name] <= bound:  # a NaN fails too
            failures.append(f"{kind}: {name} must be within {bound:.2e}; got {patched[name]:.2e}")
    expected = "TileLang" if device.type == "cuda" else f"reference (on {device.type})"
    if patched["backend"] != expected:
        failures.append(f"{kind}: the backend must be {expected}; got {patched['backend']!r}")
    return failures


def print_table(rows: list[dict[str, Any]]) -> None:
    columns: list[tuple[str, str, str]] = [
        ("model", "model", ""),
        ("mixing by", "backend", ""),
        ("loss, first", "loss_first", ".5f"),
        ("loss, last", "loss_last", ".5f"),
        ("max apart", "logits_max", ".1e"),
        ("logits", "logits", ".2e"),
        ("gradients", "grads", ".2e"),
        ("cosine", "grads_cosine", ".7f"),
        ("hc gradients", "hc_grads", ".2e"),
        ("ms / step", "milliseconds", ".1f"),
    ]
    table = [[title for title, _, _ in columns]]
    table += [[format(row[key], spec) for _, key, spec in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    text = ROOT / "README.md"
    text = text if text.exists() else ROOT / "LICENSE"
    add_arguments(parser, text, text.name)
    parser.add_argument("--steps", type=int, default=3, help="training steps of each run (3)")
    parser.add_argument("--length", type=int, default=384, help=f"bytes a row, {BATCH} rows (384)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.length < 2:
        parser.error("--steps must be at least 1 and --length at least 2")
    check_arguments(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    base = build_model(device)
    shape = (arguments.steps, BATCH, arguments.length)
    batches = read_batches(arguments.text.read_bytes(), shape, device)
    rows, failures = [], []
    truth = train(base, "float32", batches, patched=False)
    for kind in MODELS:
        original = truth if kind == "float32" else train(base, kind, batches, patched=False)
        pair = [
            measure(kind, False, original, original, truth),
            measure(kind, True, train(base, kind, batches, patched=True), original, truth),
        ]
        failures += check(pair[0], pair[1], device)
        rows += pair
    if arguments.json:
        report = {"device": device_name(device), "runs": rows, "failures": failures}
        print(json.dumps(report, indent=2))
    else:
        tokens = arguments.steps * BATCH * arguments.length
        print(f"DeepSeek-V4, {sum(p.numel() for p in base.parameters()):,} parameters, on {device}")
        print(f"{tokens:,} bytes of {arguments.text.name}")
        print("max apart: logits against the unpatched model of the same dtypes")
        print("logits, gradients: distance from the unpatched float32 model\n")
        print_table(rows)
        print("\n" + ("agreement" if not failures else "NO AGREEMENT"))
        for failure in failures:
            print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
