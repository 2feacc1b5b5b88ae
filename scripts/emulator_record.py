#!/usr/bin/env python3
"""Hold the emulator against a GPU: the same inputs through both, op by op and kernel by kernel.

    emulator_record.py make FOLDER             without a GPU: run the emulator, keep what went in
                                               and came out
    emulator_record.py compare FOLDER --out F  with a GPU: run the same through the ops and kernels
                                               there, write F.md and F.json; exits with 1 where a
                                               bound is exceeded

Every kernel of the table is launched in `make`, at the shapes of tests/emulator. A kernel's own
inputs are kept, so that no error of one before it counts against it; `recompute` takes addresses
and is compared as an op only.
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import oracle  # noqa: E402
from cases import Case, recompute_inputs  # noqa: E402
from emulator.suite import EVERY_OP, run_everything  # noqa: E402
from tile_mhc import config, jit, recompute, specs  # noqa: E402

# As tests/emulator has it: the splits, and so the last bits, depend on it.
NUM_SMS = 132
CASES = (
    Case(1, 4, 192, "one token"),
    Case(13, 4, 192, "less than a block"),
    Case(130, 2, 64, "a block and a pair"),
    Case(33, 8, 128, "most streams"),
)
BY_ADDRESS = ("recompute", "recompute_table")

# |GPU - emulator| <= bound * max(|GPU|, rms of the tensor), per element; 0: the same bits.
COPIED = 0.0
# The same operations in the same order: a few last bits, where the compilers contract to fused
# multiply-adds differently, and where expf, rsqrtf and rcp.approx are not libm's.
LIBM = 2.0**-19
# Below a tensor core's product: it truncates each addition of 16 products, some bits below float32,
# where the emulator rounds once.
TENSOR_CORE = 2.0**-16
# One bfloat16 rounding of such a value that goes the other way, or one above it.
BFLOAT16 = 2.0**-7
COPYING = {"expand_fwd", "recompute_table"}
MATMUL = {"projection_fwd", "projection_bwd"}
MATMUL_OPS = {"projection", "contract", "fused_pre", "identity_pre"}


def bound(name: str, is_op: bool, dtype: torch.dtype) -> float:
    if name in COPYING or (is_op and name == "expand"):
        return COPIED if not is_op or dtype != torch.bfloat16 else BFLOAT16
    if dtype == torch.bfloat16:
        return BFLOAT16
    return TENSOR_CORE if name in (MATMUL_OPS if is_op else MATMUL) else LIBM


def run_recompute(arguments: list[Any]) -> dict[str, Tensor]:
    outputs = recompute(*arguments)
    return {
        f"{name}[{i}]": tensor
        for name, tensors in zip(("layer_inputs", "residuals"), outputs, strict=True)
        for i, tensor in enumerate(tensors)
    }


class Store:
    """Tensors by content: most of them are the output of one kernel and the input of others."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def keep(self, tensor: Tensor) -> str:
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        key = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()[
            :16
        ]
        self.tensors[key] = tensor
        return key

    def keep_all(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        return {name: self.keep(tensor) for name, tensor in tensors.items()}


def make(folder: Path) -> None:
    from emulator import launch
    from emulator.ops import emulated

    folder.mkdir(parents=True, exist_ok=True)
    store = Store()
    index: list[dict[str, Any]] = []
    for case in CASES:
        with emulated(seed=1), launch.settings(watch=launch_recorder(case, store, index)):
            for number, op in enumerate(EVERY_OP):
                torch.manual_seed(case.num_tokens)
                tensors, options = op.inputs(*case.shape, "cpu")
                upstream = oracle.upstream_of(op, tensors, options)
                outputs = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)
                index.append(
                    {"op": op.name, "number": number, "case": str(case), "options": options,
                     "in": store.keep_all(tensors), "upstream": [store.keep(g) for g in upstream],
                     "out": store.keep_all(outputs)}
                )  # fmt: skip
            # The kernels that those do not launch.
            run_everything(case)
            arguments = recompute_inputs(3, 2, *case.shape, "cpu")
            kept = [[store.keep(t) for t in a] if isinstance(a, list) else store.keep(a)
                    for a in arguments]  # fmt: skip
            out = store.keep_all(run_recompute(list(arguments)))
            index.append({"op": "recompute", "case": str(case), "in": kept, "out": out})
    recorded = {entry["kernel"] for entry in index if "kernel" in entry}
    missing = {spec.name for spec in specs.SPECS} - recorded - set(BY_ADDRESS)
    if missing:
        raise SystemExit(f"make: launched no {', '.join(sorted(missing))}")
    save_file(store.tensors, folder / "tensors.safetensors")
    (folder / "index.json").write_text(json.dumps(index))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(index)} records, {size / 1e6:.1f} MB in {folder}")


def launch_recorder(case: Case, store: Store, index: list[dict[str, Any]]) -> Any:
    """What `launch.settings` calls around each launch; keeps the first of each kernel."""
    seen = set()

    def watch(kernel: Any, given: Any) -> Any:
        if kernel.key in seen or kernel.key[0] in BY_ADDRESS:
            return None
        seen.add(kernel.key)
        before = [g.clone() if isinstance(g, Tensor) else g for g in given]

        def after() -> None:
            arguments: list[dict[str, Any]] = []
            for (name, dtype, _), old, new in zip(
                kernel.lowered.inputs, before, given, strict=True
            ):
                if not isinstance(new, Tensor):
                    arguments.append({"name": name, "number": new})
                elif torch.equal(bits(old), bits(new)):
                    arguments.append({"name": name, "in": store.keep(new)})
                else:
                    shape = list(new.shape)
                    arguments.append(
                        {"name": name, "out": store.keep(new), "shape": shape, "dtype": dtype}
                    )
            name, args = kernel.key
            index.append({"kernel": name, "args": args, "case": str(case), "arguments": arguments})

        return after

    return watch


def bits(tensor: Tensor) -> Tensor:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(width)


def row(kind: str, entry: dict[str, Any], tensor: str, gpu: Tensor, emulator: Tensor) -> dict:
    name = entry[kind]
    title = name if kind == "op" else f"{name}({', '.join(map(str, entry['args']))})"
    wide, ours = gpu.double(), emulator.double()
    limit = bound(name, kind == "op", gpu.dtype)
    both_nan = wide.isnan() & ours.isnan()
    error = torch.where(both_nan | (wide == ours), 0.0, (wide - ours).abs()).nan_to_num(torch.inf)
    scale = wide.abs().nan_to_num(0.0).clamp_min(float(wide.nan_to_num(0.0).square().mean().sqrt()))
    relative = torch.where(error == 0, 0.0, error / scale.clamp_min(torch.finfo(gpu.dtype).tiny))
    equal = bits(gpu) == bits(emulator)
    return {
        "kind": kind,
        "name": title,
        "shape": entry["case"],
        "tensor": tensor,
        "dtype": str(gpu.dtype)[6:],
        "elements": gpu.numel(),
        "bit_equal": float(equal.double().mean()),
        "max_error": float(relative.max()),
        "bound": limit,
        "within": bool((relative <= limit).all()),
    }


def compare(folder: Path, out: Path) -> int:
    if not torch.cuda.is_available():
        raise SystemExit("compare: needs a CUDA device, and torch sees none")
    # A device of another size would split the sums elsewhere.
    config.get_num_sms = lambda: NUM_SMS
    rows = []
    recorded = load_file(folder / "tensors.safetensors")
    for entry in json.loads((folder / "index.json").read_text()):
        rows += (compare_op if "op" in entry else compare_kernel)(entry, recorded)
    write_tables(rows, out)
    bad = [r for r in rows if not r["within"]]
    for r in bad:
        print(f"out of bound: {r['name']} {r['shape']} {r['tensor']}: {r['max_error']:.3e}")
    exact = sum(r["bit_equal"] == 1 for r in rows)
    print(f"{len(rows)} tensors, {exact} bit-equal, {len(bad)} out of their bound")
    return 1 if bad else 0


def compare_op(entry: dict[str, Any], recorded: dict[str, Tensor]) -> list[dict]:
    def fetch(kept: Any) -> Any:
        if isinstance(kept, dict):
            return {name: fetch(item) for name, item in kept.items()}
        return [fetch(item) for item in kept] if isinstance(kept, list) else recorded[kept].cuda()

    if entry["op"] == "recompute":
        found = run_recompute(fetch(entry["in"]))
    else:
        op = EVERY_OP[entry["number"]]
        upstream = fetch(entry["upstream"])
        found = oracle.evaluate(op.run, fetch(entry["in"]), entry["options"], upstream, op.outputs)
    return [
        row("op", entry, name, tensor.cpu(), recorded[entry["out"][name]])
        for name, tensor in found.items()
    ]


def compare_kernel(entry: dict[str, Any], recorded: dict[str, Tensor]) -> list[dict]:
    given: list[Any] = []
    for argument in entry["arguments"]:
        if "number" in argument:
            given.append(argument["number"])
        elif "in" in argument:
            given.append(recorded[argument["in"]].cuda())
        else:
            dtype = getattr(torch, argument["dtype"])
            given.append(torch.full(argument["shape"], torch.nan, dtype=dtype, device="cuda"))
    jit.kernel(entry["kernel"], *entry["args"])(*given)
    torch.cuda.synchronize()
    return [
        row("kernel", entry, argument["name"], tensor.cpu(), recorded[argument["out"]])
        for argument, tensor in zip(entry["arguments"], given, strict=True)
        if "out" in argument
    ]


def write_tables(rows: list[dict], out: Path) -> None:
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tilelang": importlib.metadata.version("tilelang"),
        "bounds": {
            "copied": COPIED, "libm": LIBM, "tensor core": TENSOR_CORE, "bfloat16": BFLOAT16
        },
    }  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}))
    lines = [
        f"# The emulator beside {about['gpu']}",
        "",
        f"torch {about['torch']}, tilelang {about['tilelang']}; written by "
        "`scripts/emulator_record.py`, which has the bounds and their reasons. Errors are relative "
        "to the larger of the element and the tensor's rms.",
        "",
        "| kernel or op | shape | tensor | elements | same bits | max error | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['name']} | {r['shape']} | {r['tensor']} {r['dtype']} | {r['elements']} | "
        f"{100 * r['bit_equal']:.2f} % | {r['max_error']:.1e} | {r['bound']:.1e} |"
        + ("" if r["within"] else " **exceeded**")
        for r in rows
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("make", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("emulator_record"))
    arguments = parser.parse_args()
    # Fills torch.empty with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    if arguments.what == "make":
        make(arguments.folder)
        return 0
    return compare(arguments.folder, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
