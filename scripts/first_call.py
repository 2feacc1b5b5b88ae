"""Time the first sub-layer of a fresh process, forward and backward, and count what it compiled.

    tile-mhc compile --arch sm_90a --hidden 4096,7168 --streams 4 --cache-dir cache
    TILELANG_CACHE_DIR=cache python scripts/first_call.py      # built must be 0
    TILELANG_CACHE_DIR=empty python scripts/first_call.py      # the same, cold

Prints one JSON line: seconds until the first and the second step were done, and how many kernels
the process built and loaded. Imports are not timed; needs a GPU.
"""

import argparse
import json
import time

import torch

from tile_mhc import functional, jit

STREAMS = 4


def step(tokens: int, hidden_size: int) -> None:
    """expand, one sub-layer and the readout, forward and backward, and one step without a graph."""
    mixes, size = STREAMS * (STREAMS + 2), STREAMS * hidden_size
    weight = torch.randn(mixes, size, device="cuda") * size**-0.5
    weight.requires_grad_()
    scale = torch.ones(3, device="cuda", requires_grad=True)
    bias = torch.zeros(mixes, device="cuda", requires_grad=True)
    hidden = torch.randn(tokens, hidden_size, device="cuda").bfloat16().requires_grad_()
    for needs_grad in (True, False):
        with torch.set_grad_enabled(needs_grad):
            streams = functional.expand_from_embedding(hidden, STREAMS)
            layer_input, post_mix, comb_mix = functional.mhc_pre(streams, weight, scale, bias)
            streams = functional.mhc_post(layer_input, streams, post_mix, comb_mix)
            out = functional.mhc_head(streams, weight[:STREAMS], scale[:1], bias[:STREAMS])
        if needs_grad:
            out.float().sum().backward()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 7168])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed; torch sees none")
    torch.zeros(1, device="cuda")
    jit.import_tilelang()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for hidden_size in options.hidden:
            step(options.tokens, hidden_size)
        seconds.append(round(time.perf_counter() - start, 3))
    counts = jit.statistics()
    print(
        json.dumps(
            {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "hidden": options.hidden,
                "first_s": seconds[0],
                "second_s": seconds[1],
                "built": counts.built,
                "loaded": counts.loaded,
            }
        )
    )


if __name__ == "__main__":
    main()
