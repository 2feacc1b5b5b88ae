"""Time on the host of an eager sub-layer, of this checkout and of an earlier commit.

    python scripts/host_time.py --base 0cf2b7e
    python scripts/host_time.py --base base.tar.gz     # of `git archive COMMIT tile_mhc kernels`

Both register the same operators, so each is measured in processes of its own, which take turns.
What counts is the time until the call returns. Between two synchronisations run a few iterations
only, so that the GPU's queue is never full and the host never waits. Printed: the medians over the
processes of the medians over the iterations, microseconds, and their ratio.

Cases: `step` is a forward and backward of mhc_pre(passes_residual=True) and mhc_post; `forward` the
same without gradients; `main_grad` a step whose parameters have one; `module` a step of
nn.HyperConnection; `accumulator` the separate ops with a GradAccumulator.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((16, 7168), (4096, 2560), (8192, 7168))
CASES = ("step", "forward", "main_grad", "module", "accumulator")
NUM_STREAMS = 4
WARM_UP, ROUNDS, ITERATIONS = 10, 60, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="the commit, or the archive of it, to compare with")
    parser.add_argument("--processes", type=int, default=5, help="of each, in turn")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure()))
        return
    with tempfile.TemporaryDirectory() as folder:
        packages = {"now": lay_out(ROOT, Path(folder, "now"))}
        if options.base:
            packages["base"] = lay_out(unpack(options.base, Path(folder)), Path(folder, "base"))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in packages}
        for _ in range(options.processes):
            for name, package in packages.items():
                results[name].append(run_child(package))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    show(medians)
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "processes": results}, indent=1))


def lay_out(source: Path, target: Path) -> Path:
    """The package as it is installed: kernels/mhc inside tile_mhc."""
    shutil.copytree(source / "tile_mhc", target / "tile_mhc")
    shutil.copytree(source / "kernels" / "mhc", target / "tile_mhc" / "kernels")
    return target


def unpack(base: str, folder: Path) -> Path:
    archive, target = Path(base), folder / "unpacked"
    if not archive.exists():
        archive = folder / "base.tar.gz"
        subprocess.run(
            ["git", "archive", "--format=tar.gz", "-o", archive, base, "tile_mhc", "kernels"],
            cwd=ROOT,
            check=True,
        )
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target


def run_child(package: Path) -> dict[str, float]:
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=package,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    numbers: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return numbers


def show(medians: dict[str, dict[str, float]]) -> None:
    print("| case | " + " | ".join(f"{name}, us" for name in medians) + " | ratio |")
    print("|---" * (len(medians) + 2) + "|")
    for key, value in medians["now"].items():
        base = medians.get("base", {}).get(key)
        cells = [f"{numbers[key]:.0f}" for numbers in medians.values()]
        print(f"| {key} | {' | '.join(cells)} | {f'{value / base:.3f}' if base else '-'} |")


def measure() -> dict[str, float]:
    return {
        f"{case} {tokens}x{hidden_size}": time_of(build(case, tokens, hidden_size))
        for tokens, hidden_size in SIZES
        for case in CASES
    }


def time_of(function: Callable[[], None]) -> float:
    """The median time until a call returns, in microseconds."""
    import torch

    for _ in range(WARM_UP):
        function()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ITERATIONS):
            function()
        times.append((time.perf_counter() - start) / ITERATIONS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def build(case: str, tokens: int, hidden_size: int) -> Callable[[], None]:
    """An iteration of a case."""
    import torch

    from tile_mhc import aggregate, nn, post, projection, sinkhorn, split_mixes
    from tile_mhc.accumulator import GradAccumulator
    from tile_mhc.functional import mhc_post, mhc_pre

    n = NUM_STREAMS
    num_mixes = n * (n + 2)
    shape = (tokens, n, hidden_size)
    streams = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
    grad = torch.randn(shape, device="cuda").bfloat16()
    weight = (torch.randn(num_mixes, n * hidden_size, device="cuda") * 0.01).requires_grad_()
    scale = torch.ones(3, device="cuda", requires_grad=True)
    bias = torch.zeros(num_mixes, device="cuda", requires_grad=True)
    module = nn.HyperConnection(hidden_size, device="cuda")
    parameters = [weight, scale, bias]

    def sub_layer() -> torch.Tensor:
        layer_input, post_mix, comb_mix, residual = mhc_pre(
            streams, weight, scale, bias, passes_residual=True
        )
        return mhc_post(layer_input, residual, post_mix, comb_mix)

    def forward() -> None:
        with torch.no_grad():
            sub_layer()

    def step() -> None:
        sub_layer().backward(grad)
        for tensor in (streams, *parameters):
            tensor.grad = None

    def with_module() -> None:
        module(streams, lambda layer_input: layer_input).backward(grad)
        for tensor in (streams, *module.parameters()):
            tensor.grad = None

    def with_accumulator() -> None:
        accumulator = GradAccumulator(streams)
        mixes = projection(streams, weight, grad_accumulator=accumulator)
        pre_mix, post_mix, logits = split_mixes(mixes, scale, bias, num_streams=n)
        comb_mix = sinkhorn(logits)
        layer_input = aggregate(streams, pre_mix, grad_accumulator=accumulator)
        out = post(layer_input, streams, post_mix, comb_mix, grad_accumulator=accumulator)
        out.backward(grad)
        for tensor in (streams, *parameters):
            tensor.grad = None

    if case == "main_grad":
        for parameter in parameters:
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return {
        "step": step,
        "forward": forward,
        "main_grad": step,
        "module": with_module,
        "accumulator": with_accumulator,
    }[case]


if __name__ == "__main__":
    main()
