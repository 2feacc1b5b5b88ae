"""The wheel: one top-level package, nothing missing, Hugging Face's `kernels` untouched."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def python(code, *arguments, cwd, flags=(), **env):
    run = subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **env} if env else None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def sources():
    """The files that belong in the wheel, by the name they have there."""
    for folder, prefix in (("tile_mhc", "tile_mhc"), ("kernels/mhc", "tile_mhc/kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py" or path.name == "py.typed":
                yield f"{prefix}/{path.relative_to(ROOT / folder)}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("tile_mhc", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    name = python(BUILD, "dist", cwd=folder)[-1]
    return folder / "dist" / name


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_only_top_level_is_tile_mhc(names):
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tile_mhc"}


def test_every_source_file_is_in_the_wheel_and_nothing_else(names):
    assert {name for name in names if ".dist-info/" not in name} == set(sources())


def test_metadata(wheel, names):
    info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "tile-mhc = tile_mhc.cli:entry" in entry_points
    assert f"{info}/licenses/LICENSE" in names
    version = re.search(r"^Version: (.*)$", metadata, re.M).group(1)
    init = (ROOT / "tile_mhc" / "__init__.py").read_text()
    assert f'__version__ = "{version}"' in init


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "mhc" / "__init__.py").exists()


def test_a_package_named_kernels_survives(wheel, tmp_path):
    """The wheel is installed beside it, and Python is started in the checkout."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert sorted(path.name for path in (site / "kernels").iterdir()) == ["__init__.py"]
    code = "import kernels; print(kernels.get_kernel, kernels.__file__)"
    found = python(code, cwd=ROOT, PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1")
    assert found == ["theirs", str(site / "kernels" / "__init__.py")]
    code = "from importlib.util import find_spec; print(find_spec('tile_mhc.kernels').origin)"
    path = ":".join([str(site), *filter(None, sys.path)])
    found = python(code, cwd=tmp_path, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    assert found == [str(site / "tile_mhc" / "kernels" / "__init__.py")]


def test_the_checkout_imports_without_an_install(tmp_path):
    """As where a wheel is installed and Python is started in the checkout, which it then hides."""
    for name in ("tile_mhc", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    # No site-packages of the running interpreter: an editable install in it would serve kernels.
    code = (
        "import sys, tile_mhc, tile_mhc.kernels, tile_mhc.kernels._shapes as shapes; "
        "import tile_mhc.kernels.transformer_engine; "
        "from tile_mhc import specs; "
        "print(tile_mhc.__file__, tile_mhc.kernels.__file__, shapes.__file__); "
        "assert specs.device_functions()"
    )
    path = ":".join(filter(None, sys.path))
    found = python(code, cwd=tmp_path, flags=["-S"], PYTHONPATH=f"{tmp_path}:{path}")
    folder = tmp_path / "kernels" / "mhc"
    assert found == [
        str(tmp_path / "tile_mhc" / "__init__.py"),
        str(folder / "__init__.py"),
        str(folder / "_shapes.py"),
    ]


def test_imports_need_no_compiler_and_no_gpu(tmp_path):
    """One after the other in one process: with the first that does, it stays."""
    modules = ["functional", "nn", "specs", "jit"]
    if all(map(importlib.util.find_spec, ("click", "rich"))):
        modules.append("cli")
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'tile_mhc.{name}')\n"
        "    heavy = {'tilelang', 'tvm', 'transformers'} & set(sys.modules)\n"
        "    print(name, *heavy, sep=':')"
    )
    assert python(code, *modules, cwd=tmp_path) == modules


def test_lint_version_is_pinned_once():
    pins = set()
    for name in ("pyproject.toml", ".pre-commit-config.yaml"):
        found = re.findall(r"ruff==([\d.]+)", (ROOT / name).read_text())
        assert found, name
        pins.update(found)
    assert len(pins) == 1
