"""What a gradient accumulator saves in the backward of a sub-layer: bytes, time, and rounding.

    python scripts/accumulators.py --tokens 8192 --hidden 4096

The sub-layer is projection, split_mixes, sinkhorn, aggregate and post, op by op: three of them read
the residual. `bytes` counts what passes through memory for the gradient of the residual alone, each
tensor read and written once; `ms` is the whole backward, the median of its repetitions; `error` is
||gradient - float64|| / ||float64||, beside that of rounding the float64 gradient once. Without a
GPU the errors alone are shown, of the reference.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tile_mhc import (
    GradAccumulator,
    aggregate,
    fused_pre,
    post,
    projection,
    reference,
    sinkhorn,
    split_mixes,
)

STREAMS = 4
OPTIONS = {"post_mult": 2.0, "pre_eps": 1e-6}
STEPS = 20
# Passes over the gradient of the streams, in elements of a stream: what each op writes, and reads
# of what is there; what autograd adds; what is collected at the end. By bytes of an element.
BF16, FP32 = 2, 4
BYTES = {
    # Three gradients written; two sums, each of two tensors read and one written.
    "autograd": 3 * BF16 + 2 * 3 * BF16,
    # One written, two added to; the sum itself is the gradient.
    "accumulator, bfloat16": BF16 + 2 * 2 * BF16,
    # One written, two added to; the sum read and its rounding written.
    "accumulator, float32": FP32 + 2 * 2 * FP32 + FP32 + BF16,
    # The gradient of post written, and read by fused_pre, which writes the sum.
    "fused_pre, passing the residual": 3 * BF16,
}
Leaves = dict[str, Tensor]


def inputs(num_tokens: int, hidden_size: int, device: str) -> Leaves:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    n, num_mixes = STREAMS, STREAMS * (STREAMS + 2)
    size = n * hidden_size
    return {
        "residual": normal(num_tokens, n, hidden_size).bfloat16(),
        "weight": normal(num_mixes, size) * size**-0.5,
        "scale": normal(3),
        "bias": normal(num_mixes),
        "layer_output": normal(num_tokens, hidden_size).bfloat16(),
    }


def op_by_op(x: Leaves, ops: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The layer input and the next residual."""
    mixes = ops["projection"](x["residual"], x["weight"], **options)
    pre, post_mix, logits = ops["split_mixes"](
        mixes, x["scale"], x["bias"], num_streams=STREAMS, **OPTIONS
    )
    comb = ops["sinkhorn"](logits, repeat=STEPS)
    layer_input = ops["aggregate"](x["residual"], pre, **options)
    return layer_input, ops["post"](x["layer_output"], x["residual"], post_mix, comb, **options)


OURS = {
    "projection": projection,
    "split_mixes": split_mixes,
    "sinkhorn": sinkhorn,
    "aggregate": aggregate,
    "post": post,
}
REFERENCE = {name: getattr(reference, name) for name in OURS}


def passing(x: Leaves) -> tuple[Tensor, Tensor]:
    layer_input, post_mix, comb, residual = fused_pre(
        x["residual"],
        x["weight"],
        x["scale"],
        x["bias"],
        sinkhorn_repeat=STEPS,
        passes_residual=True,
        **OPTIONS,
    )
    return layer_input, post(x["layer_output"], residual, post_mix, comb)


def accumulated(dtype: torch.dtype) -> Callable[[Leaves], tuple[Tensor, Tensor]]:
    def forward(x: Leaves) -> tuple[Tensor, Tensor]:
        return op_by_op(x, OURS, grad_accumulator=GradAccumulator(x["residual"], dtype))

    return forward


FORWARDS: dict[str, Callable[[Leaves], tuple[Tensor, Tensor]]] = {
    "autograd": lambda x: op_by_op(x, OURS),
    "accumulator, bfloat16": accumulated(torch.bfloat16),
    "accumulator, float32": accumulated(torch.float32),
    "fused_pre, passing the residual": passing,
}


def backward(
    forward: Callable[[Leaves], tuple[Tensor, Tensor]], x: Leaves, upstream: list[Tensor]
) -> Callable[[], Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    outputs = forward(leaves)

    def run() -> Tensor:
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, retain_graph=True)
        return grads[0]

    return run


def milliseconds(run: Callable[[], Tensor], repetitions: int) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def measure(num_tokens: int, hidden_size: int, repetitions: int) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = inputs(num_tokens, hidden_size, device)
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in op_by_op(x, OURS)]
    wide = {name: tensor.double() for name, tensor in x.items()}
    truth = backward(
        lambda leaves: op_by_op(leaves, REFERENCE), wide, [grad.double() for grad in upstream]
    )()
    rows = []
    for name, forward in FORWARDS.items():
        run = backward(forward, x, upstream)
        row: dict[str, Any] = {
            "how": name,
            "bytes": BYTES[name] * num_tokens * STREAMS * hidden_size,
            "error": relative_error(run(), truth),
        }
        if device == "cuda":
            row["ms"] = milliseconds(run, repetitions)
        rows.append(row)
    rows.append({"how": "float64, rounded once", "error": relative_error(truth.bfloat16(), truth)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.tokens, options.hidden, options.repetitions)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'backward of a sub-layer':34} {'MB':>8} {'ms':>8} {'error':>10}")
    for row in rows:
        size = f"{row['bytes'] / 1e6:8.1f}" if "bytes" in row else " " * 8
        time = f"{row['ms']:8.3f}" if "ms" in row else " " * 8
        print(f"{row['how']:34} {size} {time} {row['error']:10.2e}")


if __name__ == "__main__":
    main()
