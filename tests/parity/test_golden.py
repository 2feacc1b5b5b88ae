"""Outputs and gradients of TileKernels 1.0.0, recorded on an H200, against both backends.

The names of TileKernels round to TF32 where it does, so both sides have to meet a float64 that
rounds there too, and each other, within what sums in float32 leave: ten times closer than TF32 is
to exact. The kernels, so and in tile_mhc's own precision, are also no further from plain float64
than TileKernels was.
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


def run(case: golden.Case, device: str, functions, specification):
    """Our results, and those of a specification, on the recorded inputs."""
    call, make = calls.CALLS[case.call], golden.MakerOn(case, device)
    inputs = golden.on(device, call.inputs(make))
    found, cotangents = calls.evaluate(functions, call, inputs, make)
    truth = calls.evaluate_exactly(call, inputs, cotangents, specification)
    return golden.on("cpu", found), golden.on("cpu", truth)


def compat():
    return calls.functions("tile_mhc.compat.tile_kernels")


@pytest.mark.cpu
def test_manifest():
    manifest = golden.read_manifest()
    for key in ("tile_kernels", "tilelang", "torch", "gpu", "seed"):
        assert manifest[key] not in (None, "")
    assert manifest["tile_kernels"] == "1.0.0"
    assert manifest["seed"] == calls.SEED
    cases = (*golden.CASES, *golden.PLAIN_CASES)
    assert manifest["files"].keys() == {case.path.name for case in cases}
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
    _, cotangents = calls.evaluate(compat(), call, inputs, make)
    everything = inputs | {f"grad_{name}": tensor for name, tensor in cotangents.items()}
    entry = golden.read_manifest()["files"][case.path.name]
    assert golden.tensors_sha256(everything) == entry["inputs_sha256"]


@pytest.mark.cpu
@cases
def test_cpu_backend(case):
    recorded = load(case)
    found, truth = run(case, "cpu", compat(), calls.TF32_SPECIFICATION)
    check_names_and_precision(case, recorded, found, truth)


@cases
def test_kernels(case):
    recorded = load(case)
    found, truth = run(case, "cuda", compat(), calls.TF32_SPECIFICATION)
    check_names_and_precision(case, recorded, found, truth)


@pytest.mark.parametrize("functions", [compat, calls.native], ids=["compat", "native"])
@cases
def test_kernels_are_no_worse(case, functions):
    recorded = load(case)
    found, truth = run(case, "cuda", functions(), calls.SPECIFICATION)
    for name, theirs in recorded.items():
        error = calls.relative_error(found[name].view_as(truth[name]), truth[name])
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
