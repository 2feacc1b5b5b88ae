"""Record outputs and gradients of TileKernels in tests/golden; needs a GPU and both releases.

    TILE_KERNELS_2=FOLDER python scripts/make_golden.py [--force | --add]

1.0.0 is the tile_kernels that is installed; 2.1.0, for the plain functions, the one in FOLDER.
`--add` records the cases that are not there, and leaves the others. Each case is run twice and must
give the same bits, and be close to a float64 that rounds to TF32 where TileKernels does, before
anything is written.
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from parity import calls, golden, plain, real

DEVICE = "cuda"


def record(theirs, case):
    """The recorded tensors of a case on the CPU, and its entry in the manifest."""
    call, make = calls.CALLS[case.call], golden.MakerOn(case, DEVICE)
    on_cpu = call.inputs(make)
    inputs = golden.on(DEVICE, on_cpu)
    results, cotangents = calls.evaluate(theirs, call, inputs, make)
    again, _ = calls.evaluate(theirs, call, inputs, make)
    truth = calls.evaluate_exactly(call, inputs, cotangents, calls.TF32_SPECIFICATION)
    everything = on_cpu | {f"grad_{name}": tensor for name, tensor in cotangents.items()}
    return keep(case, call, everything, results, again, truth)


def record_plain(theirs, case):
    """The same of a plain function of release 2."""
    call, inputs = plain.PLAIN[case.call], case.inputs(DEVICE)
    results, again = (plain.evaluate(theirs, call, inputs) for _ in range(2))
    truth = plain.evaluate_exactly(call, inputs)
    return keep(case, call, case.inputs("cpu"), results, again, truth)


def keep(case, call, everything, results, again, truth):
    """Refuse what two runs do not agree in, or float64 does not."""
    errors = {}
    for name, exact in truth.items():
        # TileKernels returns some tensors with an axis of 1 more, or flat; the interface says.
        results[name] = results[name].view(exact.shape)
        if calls.same_bits(results[name], again[name].view(exact.shape)) != exact.numel():
            raise SystemExit(f"{case} {name}: two runs gave different bits; nothing is written")
        errors[name] = calls.relative_error(results[name], exact)
        if not errors[name] <= call.bound(name):
            raise SystemExit(
                f"{case} {name}: error {errors[name]:.3e}, expected at most "
                f"{call.bound(name):.3e}; nothing is written"
            )
    kept = {name: t.cpu().contiguous() for name, t in results.items() if name not in case.left_out}
    entry = {"inputs_sha256": golden.tensors_sha256(everything)}
    entry["errors"] = {name: float(f"{errors[name]:.3e}") for name in kept}
    return kept, entry


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--force", action="store_true", help="replace what is recorded")
    how.add_argument("--add", action="store_true", help="record only what is not there")
    options = parser.parse_args()
    if golden.MANIFEST.exists() and not (options.force or options.add):
        parser.error(f"{golden.MANIFEST} exists; --force replaces it, --add adds to it")
    every = (*golden.CASES, *golden.PLAIN_CASES)
    cases = [case for case in every if not (options.add and case.path.exists())]
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed; torch sees none")
    torch.set_float32_matmul_precision("highest")
    recorded, versions = {}, {}
    # One after the other: both releases have one import name.
    for release, function, its_cases in (
        (real.tile_kernels, record, golden.CASES),
        (real.plain_functions, record_plain, golden.PLAIN_CASES),
    ):
        own = [case for case in its_cases if case in cases]
        if own:
            with release() as theirs:
                versions |= dict.fromkeys(own, theirs.version)
                recorded |= {case: function(theirs, case) for case in own}
    made_with = {
        "tile_kernels": next(iter(versions.values()), None),
        "tilelang": importlib.metadata.version("tilelang"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(),
        "seed": calls.SEED,
    }
    golden.FOLDER.mkdir(exist_ok=True)
    manifest = golden.read_manifest() if options.add else {**made_with, "files": {}}
    files = manifest["files"]
    for stale in golden.FOLDER.glob("*.safetensors"):
        if stale.name not in files:
            stale.unlink()
    for case, (tensors, entry) in recorded.items():
        save_file(tensors, case.path)
        size = case.path.stat().st_size
        files[case.path.name] = {"sha256": golden.file_sha256(case.path), "bytes": size, **entry}
        # What was added later may have been made with something else.
        made = made_with | {"tile_kernels": versions[case]}
        other = {name: value for name, value in made.items() if manifest[name] != value}
        files[case.path.name] |= {"made_with": other} if other else {}
        print(f"{case.path.name}: {size} bytes, errors {entry['errors']}")
    total = sum(entry["bytes"] for entry in files.values())
    if total >= golden.MAX_BYTES:
        raise SystemExit(f"the files have {total} bytes; the limit is {golden.MAX_BYTES}")
    golden.MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(files)} files, {total} bytes, {golden.MANIFEST}")


if __name__ == "__main__":
    main()
