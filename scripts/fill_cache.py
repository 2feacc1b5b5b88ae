"""Compile what the tests and timings of a GPU run, without one: there it takes most of the time.

    TILELANG_CACHE_DIR=cache python scripts/fill_cache.py [--arch sm_90a] [--jobs 2]

That is what tests/gpu compile ahead, `tile-mhc bench` at its default shapes, accumulators.py,
first_call.py and train_text.py. Run again, it does what is missing. What TransformerEngine's own
tests need: `run_transformer_engine_tests.py PATH --compile sm_90a`.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from tile_mhc import jit, specs
from tile_mhc.bench import compiling
from tile_mhc.bench.measuring import Shape
from tile_mhc.bench.ops import make_ops
from tile_mhc.cli._bench import DEFAULT_SHAPES

ROOT = Path(__file__).resolve().parents[1]
# accumulators.py as gpu.sh calls it, first_call.py, and the model of train_text.py.
SCRIPTS = (
    specs.Sizes(4, 7168, grads=("bfloat16", "float32")),
    specs.Sizes(4, 4096),
    specs.Sizes(4, 256),
)
SUB_LAYER = ("projection", "split_mixes", "sinkhorn", "aggregate", "post", "fused_pre", "contract")
BATCH = 64


def kernels_of_tests(arch: str) -> list[tuple[str, specs.Arguments]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from gpu_kernels import kernels_of

    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    kernels: list[tuple[str, specs.Arguments]] = kernels_of(
        [file.stem.removeprefix("test_") for file in files], arch
    )
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=specs.ARCHS, default="sm_90a")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {arguments.jobs}")
    shapes = [Shape(tokens, hidden, 4) for tokens, hidden in DEFAULT_SHAPES]
    kernels = [
        *compiling.kernels(make_ops(), shapes, arguments.arch),
        *specs.select(SCRIPTS, SUB_LAYER, arguments.arch),
        *kernels_of_tests(arguments.arch),
    ]
    wanted = list(dict.fromkeys(kernels))
    print(f"{len(wanted)} kernels into {jit.cache_directory()}", flush=True)
    start, problems, done = time.monotonic(), 0, 0
    # By batches, so that a run that is cut off has said how far it came.
    for first in range(0, len(wanted), BATCH):
        batch = wanted[first : first + BATCH]
        for problem in jit.fill_cache(batch, arguments.arch, arguments.jobs):
            problems += 1
            print(problem, file=sys.stderr, flush=True)
        done += len(batch)
        print(f"{done} of {len(wanted)}, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
