"""`tile-mhc doctor`: does this machine have what the kernels need, and does one of them run?"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click
import torch
from rich.table import Table

from tile_mhc import __version__, jit, specs
from tile_mhc.cli._clean import folder_size
from tile_mhc.cli._options import cache_option, json_option, print_json, print_table
from tile_mhc.kernels._arch import DEFAULT

Status = Literal["ok", "note", "fail"]
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "fail": "[red]fail[/red]"}

REBUILT = "kernels are rebuilt in each process"

TRIAL_ARCH = DEFAULT
TRIAL_TOKENS, TRIAL_STREAMS, TRIAL_HIDDEN = 13, 4, 256


@dataclass(frozen=True)
class Check:
    """One line of the report: ok, a note (works, but mind this), or a failure."""

    name: str
    status: Status
    detail: str


@click.command("doctor")
@cache_option
@json_option
def doctor_command(as_json: bool) -> int:
    """Report versions, the GPU, nvcc and the cache, and try one kernel; exits with 1 on failure."""
    is_empty = os.environ.get("TILELANG_CACHE_DIR") == ""  # until TileLang is imported
    checks = [
        Check("tile_mhc", "ok", __version__),
        Check("python", "ok", platform.python_version()),
        Check("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        _guarded("tilelang", _tilelang),
        _guarded("tvm", _tvm),
        _guarded("nvcc", _nvcc),
        _guarded("gpu", _gpu),
        _guarded("driver", _driver),
        _guarded("cache", lambda: _cache(is_empty)),
        _guarded("kernel", _kernel),
    ]
    failed = [check.name for check in checks if check.status == "fail"]
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        table = Table("check", "", "detail")
        for check in checks:
            table.add_row(check.name, MARKS[check.status], check.detail)
        print_table(table)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")
    return 0


def _guarded(name: str, check: Callable[[], tuple[Status, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _tilelang() -> tuple[Status, str]:
    jit.import_tilelang()
    return "ok", importlib.metadata.version("tilelang")


def _tvm() -> tuple[Status, str]:
    tvm = jit.import_tilelang().tvm
    return "ok", f"{tvm.__version__}, tvm-ffi {importlib.metadata.version('apache-tvm-ffi')}"


def _nvcc() -> tuple[Status, str]:
    jit.import_tilelang()
    nvcc = jit.find_nvcc()
    if nvcc is None:
        return "note", "not found: only kernels already in the cache can be used"
    report = _output([str(nvcc), "--version"]).split("release ")
    version = report[1].split(",")[0] if len(report) > 1 else "unknown version"
    return "ok", f"{version}, {nvcc}"


def _gpu() -> tuple[Status, str]:
    if not torch.cuda.is_available():
        return "note", "none: the ops run the torch reference, on CPU tensors"
    archs = [jit.device_arch(i) for i in range(torch.cuda.device_count())]
    detail = ", ".join(f"{torch.cuda.get_device_name(i)} ({a})" for i, a in enumerate(archs))
    if bare := sorted(set(archs) - set(specs.ARCHS)):
        return "note", f"{detail}; no kernels for {', '.join(bare)}: ops run the torch reference"
    return "ok", detail


def _driver() -> tuple[Status, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "note", "unknown: no nvidia-smi"
    lines = _output([tool, "--query-gpu=driver_version", "--format=csv,noheader"]).split()
    return ("ok", lines[0]) if lines else ("note", "unknown: nvidia-smi reports no GPU")


def _cache(is_empty: bool) -> tuple[Status, str]:
    root = jit.cache_directory()
    if not jit.import_tilelang().env.is_cache_enabled():
        return "note", f"{root} is not used (TILELANG_DISABLE_CACHE): {REBUILT}"
    if problem := jit.cache_problem(root):
        return "note", f"{root} cannot be written ({problem}): {REBUILT}"
    detail = f"{root}, {folder_size(root) / 1e6:.1f} MB, writable"
    if is_empty:
        return "note", f"{detail}; TILELANG_CACHE_DIR is empty, which counts as not set"
    return "ok", detail


def _kernel() -> tuple[Status, str]:
    if torch.cuda.is_available():
        arch = jit.device_arch(torch.cuda.current_device())
        if arch not in specs.ARCHS:
            return "note", f"none to try: they are for {', '.join(specs.ARCHS)}; got {arch}"
        return _run_a_kernel()
    jit.import_tilelang()
    if jit.find_nvcc() is None:
        return "fail", "nothing to try: neither a GPU nor nvcc"
    compiled = jit.compile_kernel("expand_fwd", (TRIAL_STREAMS, TRIAL_HIDDEN), TRIAL_ARCH)
    how = "built" if compiled.built else "loaded from the cache"
    return "ok", f"expand_fwd {how} for {TRIAL_ARCH} in {compiled.seconds:.1f} s; not run: no GPU"


def _run_a_kernel() -> tuple[Status, str]:
    import tile_mhc

    generator = torch.Generator().manual_seed(0)
    shape = (TRIAL_TOKENS, TRIAL_STREAMS, TRIAL_HIDDEN)
    residual = torch.randn(shape, generator=generator).to(torch.bfloat16)
    mix = torch.rand(shape[:2], generator=generator)
    on_gpu = tile_mhc.aggregate(residual.cuda(), mix.cuda()).cpu()
    reference = tile_mhc.aggregate(residual, mix)
    error = (on_gpu.float() - reference.float()).abs().max().item()
    # One bfloat16 rounding of sums whose terms are added in fp32.
    bound = torch.finfo(torch.bfloat16).eps * reference.float().abs().max().item()
    detail = f"aggregate on {torch.cuda.get_device_name()}: largest difference from the reference "
    detail += f"{error:.3g}, bound {bound:.3g}"
    return ("ok" if error <= bound else "fail"), detail


def _output(command: list[str]) -> str:
    run: Any = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return run.stdout if run.returncode == 0 else ""
