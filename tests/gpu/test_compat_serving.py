"""SGLang's and vLLM's functions on the GPU, and what a warm-up spares them."""

import json
import subprocess
import sys

import pytest
import torch

import oracle
import serving
from serving import (
    COUNTS,
    HIDDEN,
    head_arguments,
    inputs,
    norm_options,
    pre_arguments,
    run_all,
)
from tile_mhc import config, jit, warm_up
from tile_mhc.compat import sglang


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_against_the_reference(num_tokens, normed):
    """That on the CPU, which tests/cpu compares with loops; both round where the other does.

    What a boundary projects are the streams that it has rounded itself, of which a few may fall on
    the other side of a midpoint: float32 outputs are compared as a whole.
    """
    tensors = inputs(num_tokens, HIDDEN, "cuda")
    options = norm_options(tensors) if normed else {}
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    expected = run_all(on_cpu, norm_options(on_cpu) if normed else {})
    for name, outputs in run_all(tensors, options).items():
        for a, b in zip(outputs, expected[name], strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            if a.numel():
                bar = 2**-8 if a.dtype == torch.bfloat16 else 1e-4
                assert oracle.relative_error(a.cpu(), b.double()) < bar, name


def test_stacks_agree_bit_by_bit():
    tensors = inputs(130, HIDDEN, "cuda")
    found = run_all(tensors, norm_options(tensors))
    for ours, others in (("pre", "vllm pre"), ("boundary", "vllm boundary")):
        assert all(map(torch.equal, found[ours], found[others]))


SERVER = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import serving
from tile_mhc import config, jit
from tile_mhc.compat import sglang, vllm

hidden_size = 192
counts, others = [1, 64, 700, 2048], [2, 16, 17, 65, 128, 129, 500, 1999, 3000, 6000]
done = [sglang.warm_up(hidden_size, counts), vllm.warm_up(hidden_size, counts, delayed=True)]
config.set_jit("forbid")
before = jit.statistics()
found = {"kernels": [len(d.kernels) for d in done], "covered": [], "built": before.built}
found["fresh"] = [d.built + d.loaded for d in done]

def run(num_tokens):
    tensors = serving.inputs(num_tokens, hidden_size, "cuda")
    of_pre, of_boundary = serving.pre_arguments(tensors), serving.boundary_arguments(tensors)
    outputs = []
    for norm in (None, tensors["norm_weight"]):
        options = {"norm_weight": norm, "norm_eps": 1e-6}
        outputs += sglang.mhc_pre(*of_pre, **options)
        outputs += sglang.mhc_fused_post_pre(*of_boundary, **options)
        for pre_mix in (None, tensors["post_layer_mix"]):
            options["pre_mix"] = pre_mix
            outputs += vllm.mhc_pre_delayed_tilelang(*of_pre, **options)
            outputs += vllm.mhc_fused_post_pre_delayed_tilelang(*of_boundary, **options)
    outputs.append(sglang.mhc_post(*of_boundary[:4]))
    outputs.append(sglang.fused_hc_head(*serving.head_arguments(tensors)))
    return tensors, outputs

with torch.inference_mode():
    # The very first call with these numbers is inside the capture of a graph.
    tensors = serving.inputs(5, hidden_size, "cuda")
    norm = {"norm_weight": tensors["norm_weight"], "norm_eps": 1e-6}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sglang.mhc_fused_post_pre(*serving.boundary_arguments(tensors), **norm)
        pre = vllm.mhc_pre_delayed_tilelang(*serving.pre_arguments(tensors), **norm)
    graph.replay()
    eager = sglang.mhc_fused_post_pre(*serving.boundary_arguments(tensors), **norm)
    found["graph"] = all(map(torch.equal, captured, eager))
    for num_tokens in [*counts, *others]:
        covered = all(d.covers(num_tokens) for d in done)
        found["covered"].append(covered)
        if covered:
            run(num_tokens)
torch.cuda.synchronize()
found["same"] = jit.statistics() == before
found["again"] = sglang.warm_up(hidden_size, counts).built
print(json.dumps(found))
"""


def test_nothing_is_compiled_or_loaded_after_a_warm_up():
    """In a process that has no kernel yet, where compiling is forbidden afterwards."""
    folder = serving.__file__.rpartition("/")[0]
    run = subprocess.run(
        [sys.executable, "-c", SERVER, folder], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["same"]
    assert found["graph"]
    assert all(found["covered"])
    assert found["fresh"][0] == found["kernels"][0] > 5
    assert found["again"] == 0


def test_without_a_warm_up_the_capture_says_so():
    arguments = head_arguments(inputs(3, 4160, "cuda"))
    torch.cuda.synchronize()
    with (
        torch.inference_mode(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(jit.NotCompiledError, match="before a CUDA graph"),
    ):
        sglang.fused_hc_head(*arguments)


def test_forbidden_without_a_warm_up():
    """A width that nothing else here uses, and that no cache has."""
    tensors = inputs(3, 4224 + 64, "cuda")
    config.set_jit("forbid")
    try:
        with pytest.raises(jit.NotCompiledError, match=r"config.set_jit\('forbid'\) forbids"):
            sglang.mhc_pre(*pre_arguments(tensors))
    finally:
        config.set_jit(None)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_replayed_graph(normed):
    """Of the whole boundary of V4.1, with other inputs than at its capture."""
    static = inputs(130, HIDDEN, "cuda")

    def run(tensors):
        options = norm_options(tensors) if normed else {}
        return run_all(tensors, options)

    warm_up(lambda count, device: run(inputs(count, HIDDEN, device)), [130])
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.graph(graph):
            captured = run(static)
        fresh = inputs(130, HIDDEN, "cuda")
        for name, tensor in static.items():
            tensor.copy_(fresh[name])
        graph.replay()
        expected = run(fresh)
    for name, outputs in captured.items():
        for a, b in zip(outputs, expected[name], strict=True):
            assert torch.equal(a, b), name
