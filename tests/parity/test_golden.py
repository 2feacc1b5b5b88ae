"""Outputs and gradients of TileKernels 1.0.0, recorded on an H200, against both backends.

The CPU is held to the precision of TileKernels, which multiplies as TF32 and stores bfloat16; the
kernels also to being no further from float64 than TileKernels was.
"""

import pytest
import torch
from safetensors.torch import load_file

from parity import calls, golden

pytestmark = pytest.mark.skipif(
    not golden.MANIFEST.exists(),
    reason="nothing is recorded: scripts/make_golden.py writes tests/golden",
)
cases = pytest.mark.parametrize("case", golden.CASES, ids=str)


def load(case: golden.Case) -> dict[str, torch.Tensor]:
    assert case.path.exists(), (
        f"{case.path.name} is in the manifest's cases but not in tests/golden"
    )
    return load_file(case.path)


def run(case: golden.Case, device: str):
    """Our results, and the exact ones, on the recorded inputs."""
    call, make = calls.CALLS[case.call], golden.MakerOn(case, device)
    inputs = golden.on(device, call.inputs(make))
    ours = calls.functions("tile_mhc.compat.tile_kernels")
    found, cotangents = calls.evaluate(ours, call, inputs, make)
    truth = calls.evaluate_exactly(call, inputs, cotangents)
    return golden.on("cpu", found), golden.on("cpu", truth)


@pytest.mark.cpu
def test_manifest():
    manifest = golden.read_manifest()
    for key in ("tile_kernels", "tilelang", "torch", "gpu", "seed"):
        assert manifest[key] not in (None, "")
    assert manifest["tile_kernels"] == "1.0.0"
    assert manifest["seed"] == calls.SEED
    assert manifest["files"].keys() == {case.path.name for case in golden.CASES}
    on_disk = {path.name: path for path in golden.FOLDER.glob("*.safetensors")}
    assert on_disk.keys() == manifest["files"].keys()
    for name, entry in manifest["files"].items():
        assert golden.file_sha256(on_disk[name]) == entry["sha256"], name
    assert sum(path.stat().st_size for path in on_disk.values()) < golden.MAX_BYTES


@pytest.mark.cpu
@cases
def test_inputs_are_the_recorded_ones(case):
    """Where this fails, the hash or its use changed: a difference below means nothing."""
    call, make = calls.CALLS[case.call], golden.MakerOn(case, "cpu")
    inputs = call.inputs(make)
    ours = calls.functions("tile_mhc.compat.tile_kernels")
    _, cotangents = calls.evaluate(ours, call, inputs, make)
    everything = inputs | {f"grad_{name}": tensor for name, tensor in cotangents.items()}
    entry = golden.read_manifest()["files"][case.path.name]
    assert golden.tensors_sha256(everything) == entry["inputs_sha256"]


@pytest.mark.cpu
@cases
def test_cpu_backend(case):
    recorded = load(case)
    found, truth = run(case, "cpu")
    check_names_and_precision(case, recorded, found, truth)


@cases
def test_kernels(case):
    recorded = load(case)
    found, truth = run(case, "cuda")
    check_names_and_precision(case, recorded, found, truth)
    for name, theirs in recorded.items():
        error = calls.relative_error(found[name], truth[name])
        their_error = calls.relative_error(theirs, truth[name])
        allowed = calls.allowed_error(their_error, truth[name], theirs.dtype)
        assert error <= allowed, f"{name}: {error:.3e}; TileKernels has {their_error:.3e}"


def check_names_and_precision(case, recorded, found, truth):
    call = calls.CALLS[case.call]
    assert recorded.keys() == found.keys() - set(case.left_out)
    for name, theirs in recorded.items():
        ours, bound = found[name], call.bound(name)
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        # Theirs within its precision of the truth, and ours of theirs.
        assert calls.relative_error(theirs, truth[name]) <= bound, name
        assert calls.relative_error(ours, theirs) <= bound, name
