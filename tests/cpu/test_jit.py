"""Where kernels come from: memory, the disk cache, the compiler; and what goes wrong on the way.

Each script has a process of its own, since TileLang keeps what it compiled in memory. It imports
TileLang itself, or has it imported already (`tilelang=True`) where how that goes is not at stake.
"""

import importlib
import importlib.metadata
import json
import re
import shlex
import shutil
import threading
from pathlib import Path

import pytest
import torch

import fresh
from tile_mhc import jit, specs
from tile_mhc.errors import UnsupportedError

NAME, ARGS, ARCH = "expand_fwd", (2, 64), "sm_90a"

OBTAIN = """
import dataclasses, json, sys, warnings
from tile_mhc import jit
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    try:
        for hidden in map(int, sys.argv[1:]):
            kernel = jit.compile_kernel("expand_fwd", (2, hidden), "sm_90a")
            assert callable(kernel.launch)
    except jit.CompileError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
        sys.exit()
text = [str(w.message) for w in caught if "tile_mhc" in str(w.message)]
print(json.dumps({"path": str(kernel.path), "warnings": text}
                 | dataclasses.asdict(jit.statistics())))
"""


@pytest.fixture(scope="session")
def nvcc():
    jit.import_tilelang()
    if jit.find_nvcc() is None:
        pytest.skip("needs nvcc")


@pytest.fixture(scope="session")
def filled(nvcc, tmp_path_factory):
    """A cache that another process filled."""
    cache = tmp_path_factory.mktemp("filled")
    assert obtain(cache, tilelang=True)["built"] == 1
    return cache


@pytest.fixture
def cache(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "cache")


def start(code, *arguments, cache, **options):
    return fresh.Script(code, *arguments, TILELANG_CACHE_DIR=str(cache), **options)


def finish(script):
    status, out, err = script.finish()
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def obtain(cache, *hidden, **options):
    return finish(start(OBTAIN, *(hidden or (64,)), cache=cache, **options))


def entry_of(cache):
    (library,) = cache.glob("*/*/kernels/*/executable.so")
    return library.parent


def test_second_process_loads(cache):
    assert obtain(cache) == {
        "path": str(entry_of(cache)),
        "warnings": [],
        "built": 0,
        "loaded": 1,
        "resident": 0,
    }


def truncate(entry):
    library = entry / "executable.so"
    library.write_bytes(library.read_bytes()[:-100])


def flip(entry):
    library = entry / "executable.so"
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 0xFF
    library.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lambda entry: (entry / "params.json").write_text("{"),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (shutil.rmtree(entry), entry.write_text("a file")),
    ],
    ids=["truncated", "flipped", "bad parameters", "no manifest", "a file"],
)
def test_corrupted_entry_is_built_again(cache, damage):
    damage(entry_of(cache))
    found = obtain(cache, tilelang=True)
    assert (found["built"], found["loaded"]) == (1, 0)
    assert found["warnings"] == []


def test_corrupted_entry_is_repaired(cache):
    entry = entry_of(cache)
    sound = (entry / "device_kernel.cu").read_bytes()
    flip(entry)
    obtain(cache, tilelang=True)
    assert (entry / "device_kernel.cu").read_bytes() == sound
    assert obtain(cache, tilelang=True)["loaded"] == 1


def test_impossible_cache_directory(nvcc, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    found = obtain(blocker / "cache", 64, 128)
    assert found["built"] == 2
    assert len(found["warnings"]) == 1, "one warning, however many kernels"
    assert f"cannot be stored in {blocker / 'cache'}" in found["warnings"][0]
    assert "TILELANG_CACHE_DIR" in found["warnings"][0]


def test_unwritable_cache_directory_is_still_read(cache):
    # Permissions do not stop root, so a file stands where TileLang would stage an entry.
    (staging,) = cache.glob("*/*/.staging")
    shutil.rmtree(staging)
    staging.write_text("")
    before = sorted(cache.rglob("*"))
    assert obtain(cache)["loaded"] == 1
    found = obtain(cache, 64, 128)
    assert (found["built"], found["loaded"], len(found["warnings"])) == (1, 1, 1)
    assert sorted(cache.rglob("*")) == before


def test_two_processes_compile_the_same_kernel(nvcc, tmp_path):
    scripts = [start(OBTAIN, 64, cache=tmp_path, tilelang=True) for _ in range(2)]
    found = [finish(script) for script in scripts]
    assert all(f["built"] + f["loaded"] == 1 for f in found)
    assert obtain(tmp_path, tilelang=True)["loaded"] == 1
    entry_of(tmp_path)  # exactly one


def test_two_threads_compile_once(cache, nvcc):
    code = """
import json
from concurrent.futures import ThreadPoolExecutor
from tile_mhc import jit
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda _: jit.compile_kernel("expand_fwd", (2, 192), "sm_90a"), range(4)))
print(json.dumps([jit.statistics().built, len(found), len(set(map(id, found)))]))
"""
    assert finish(start(code, cache=cache, tilelang=True)) == [1, 4, 1]


def test_building_forbidden(cache):
    """What is cached loads; the error for the rest names the command that makes it load too."""
    pytest.importorskip("click")
    pytest.importorskip("rich")
    forbidden = {"tilelang": True, "TILE_MHC_JIT": "0"}
    assert obtain(cache, **forbidden)["loaded"] == 1
    found = obtain(cache, 320, **forbidden)
    assert found["error"] == "NotCompiledError"
    command = "tile-mhc compile --arch sm_90a --hidden 320 --streams 2 --ops expand"
    assert found["text"] == (
        f"kernel expand_fwd(2, 320): is not compiled for sm_90a in {cache}, and TILE_MHC_JIT=0 "
        f"forbids building it now; run `{command}`"
    )
    code = "import sys; from tile_mhc.cli import main; sys.exit(main(sys.argv[1:]))"
    # The command obeys although the variable is still set.
    script = start(code, *shlex.split(command)[1:], cache=cache, **forbidden)
    status, out, err = script.finish()
    assert status == 0, out + err
    assert obtain(cache, 320, **forbidden)["loaded"] == 1


def test_no_nvcc(cache):
    """A cached kernel needs none; for another, the error says what is missing."""
    away = {"CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent"}
    assert obtain(cache, **away)["loaded"] == 1
    found = obtain(cache, 448, **away)
    assert found["error"] == "CompileError"
    assert found["text"].startswith("kernel expand_fwd(2, 448): building it needs nvcc, and none")
    assert "\n" not in found["text"]


@pytest.mark.parametrize("value", [None, "1"])
def test_compilation_is_quiet_unless_the_user_says_otherwise(cache, monkeypatch, value):
    monkeypatch.delenv("TILELANG_PRINT_ON_COMPILATION", raising=False)
    code = """
import json
from tile_mhc import jit
print(json.dumps(jit.import_tilelang().env.is_print_on_compilation_enabled()))
"""
    env = {} if value is None else {"TILELANG_PRINT_ON_COMPILATION": value}
    assert finish(start(code, cache=cache, **env)) is (value == "1")


@pytest.fixture
def device(monkeypatch):
    """A pretended CUDA device, and the calls that reached the compiler."""
    state = {"device": 0, "capturing": False, "capability": (9, 0), "calls": []}

    def compile_kernel(name, args, arch):
        state["calls"].append((name, args, arch))
        launch = (lambda: (name, args, arch)).__call__
        return jit.Compiled(name, args, arch, launch, True, 0.0, "", None, None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state["device"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: state["capability"])
    monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
    monkeypatch.setattr(jit, "_ready", {})
    return state


def test_memory_answers_the_second_time(device):
    first = jit.kernel(NAME, *ARGS)
    assert first() == (NAME, ARGS, ARCH)
    assert jit.kernel(NAME, *ARGS) is first
    assert device["calls"] == [(NAME, ARGS, ARCH)]
    assert jit.statistics().resident == 1


def test_memory_is_per_device(device):
    jit.kernel(NAME, *ARGS)
    device.update(device=1, capability=(10, 0))
    assert jit.kernel(NAME, *ARGS)() == (NAME, ARGS, "sm_100a")
    assert jit.statistics().resident == 2


def test_first_use_inside_a_capture(device):
    device["capturing"] = True
    with pytest.raises(
        jit.NotCompiledError, match=r"expand_fwd\(2, 64\).*before a CUDA graph"
    ) as e:
        jit.kernel(NAME, *ARGS)
    assert "Run the op once" in str(e.value)
    assert device["calls"] == []
    device["capturing"] = False
    jit.kernel(NAME, *ARGS)
    device["capturing"] = True
    assert jit.kernel(NAME, *ARGS)() == (NAME, ARGS, ARCH)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"),
     ((10, 3), "sm_103a"), ((12, 0), "sm_120a")],
)  # fmt: skip
def test_device_arch(device, capability, arch):
    device["capability"] = capability
    assert jit.device_arch(0) == arch


@pytest.mark.parametrize("capability", [(7, 0), (13, 0)])
def test_gpu_without_kernels(device, monkeypatch, capability):
    device["capability"] = capability
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old card")
    expected = rf"the GPU must be one of sm_80, .*; got an old card, sm_{capability[0]}0"
    with pytest.raises(UnsupportedError, match=expected):
        jit.kernel(NAME, *ARGS)
    assert device["calls"] == []


@pytest.mark.parametrize(
    ("value", "allowed"),
    [(None, True), ("1", True), ("yes", True), ("0", False), ("off", False), (" False ", False)],
)
def test_switch(monkeypatch, value, allowed):
    monkeypatch.delenv("TILE_MHC_JIT", raising=False)
    if value is not None:
        monkeypatch.setenv("TILE_MHC_JIT", value)
    assert jit.building_allowed() is allowed


def test_a_builder_that_fails(monkeypatch):
    def broken(*_):
        raise TypeError("no such\nthing")

    monkeypatch.setattr(specs, "builder", lambda _: broken)
    with pytest.raises(
        jit.CompileError, match=r"^kernel broken\(7\): the builder failed: TypeError"
    ):
        jit.compile_kernel("broken", (7,), ARCH)
    assert ("broken", (7,), ARCH) not in jit._compiled


def test_a_parse_that_another_thread_upset_is_done_again():
    problems = [
        RuntimeError("AST constructor recursion depth mismatch (before=117, after=101)")
    ] * 2
    tries = []

    def parse():
        tries.append(1)
        if len(tries) <= len(problems):
            raise problems[len(tries) - 1]
        return "parsed"

    assert jit.undisturbed(parse) == "parsed"
    assert len(tries) == 3
    for always, count in ((problems[0], jit._DISTURBANCES + 1), (RuntimeError("no layout"), 1)):
        problems[:], tries[:] = [always] * 99, []
        with pytest.raises(RuntimeError, match=re.escape(str(always))):
            jit.undisturbed(parse)
        assert len(tries) == count


def test_unknown_kernel():
    with pytest.raises(ValueError, match="name must be one of expand_fwd"):
        jit.compile_kernel("nope", (), ARCH)


def test_cache_problem(tmp_path):
    assert jit.cache_problem(tmp_path / "new" / "folder") is None
    (tmp_path / "file").write_text("")
    assert "NotADirectoryError" in jit.cache_problem(tmp_path / "file" / "cache")
    assert jit.cache_problem(tmp_path / "file") is not None


def test_stray_files_are_no_cache_problem(tmp_path):
    """Only a folder that TileLang writes to can be one, and there a file is."""
    folders = jit._cache_folders(tmp_path)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for folder in (tmp_path, *folders):
        (folder / ".DS_Store").touch()
        (folder / "stray").mkdir()
        (folder / "stray" / "kernels").touch()
    assert jit.cache_problem(tmp_path) is None
    for folder in folders:
        shutil.move(folder, tmp_path / "away")
        folder.touch()
        assert "NotADirectoryError" in jit.cache_problem(tmp_path), folder
        folder.unlink()
        folder.symlink_to("nowhere")
        assert "FileNotFoundError" in jit.cache_problem(tmp_path), folder
        folder.unlink()
        shutil.move(tmp_path / "away", folder)


@pytest.mark.parametrize("version", [None, "0.1.15+cuda.git1a2b.d2026-1", "0.2.0rc1", "0.1.15+_.x"])
def test_cache_folders_are_tilelangs(monkeypatch, version):
    jit.import_tilelang()
    kernels = importlib.import_module("tilelang.cache.kernel_cache").KernelCache
    binaries = importlib.import_module("tilelang.cache.cuda_binary_cache").CUDABinaryCache
    if version is not None:
        metadata = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name: version if name == "tilelang" else metadata(name),
        )
        folder = kernels._format_version_namespace(version)
        assert jit._cache_folders(Path("root"))[0] == Path("root", folder)
        return
    theirs = [
        kernels._get_namespace_root(),
        kernels._get_cache_root(),
        kernels._get_staging_root(),
        binaries._get_namespace_root(),
        binaries._get_cache_root(),
        binaries._get_staging_root(),
    ]
    assert set(map(Path, theirs)) < set(jit._cache_folders(jit.cache_directory()))


AGREE = """
import json, os, sys
from tile_mhc import jit
found = [jit.cache_directory()]
if "first" in sys.argv:
    import tilelang
if "python" in sys.argv:
    tilelang.env.TILELANG_CACHE_DIR = os.environ["PYTHON_CACHE_DIR"]
found.append(jit.cache_directory())
env = jit.import_tilelang().env
os.chdir("/")
print(json.dumps([*map(str, found), str(jit.cache_directory()), env.TILELANG_CACHE_DIR]))
"""
MEANINGS = {
    "": "home/.tilelang/cache",
    "~/x": "home/x",
    "~": "home",
    "x": "x",
    "x/../y/": "x/../y",
    "link/x": "link/x",
    "./~/x": "~/x",
}


def settings(tmp_path, value):
    """The environment of a process that starts in `tmp_path`, with a home below it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("x")
    return {"cwd": tmp_path, "HOME": str(tmp_path / "home"), "cache": value}


@pytest.mark.parametrize("value", MEANINGS)
def test_cache_directory_is_tilelangs(tmp_path, value):
    """Before TileLang is imported, after, and from another working directory."""
    found = finish(start(AGREE, **settings(tmp_path, value)))
    assert found == [str(tmp_path / MEANINGS[value])] * 4


@pytest.mark.parametrize("value", ["~/x", "x"])
def test_cache_directory_where_tilelang_was_there_first(tmp_path, value):
    found = finish(start(AGREE, "first", **settings(tmp_path, value)))
    assert found == [str(tmp_path / MEANINGS[value])] * 4


@pytest.mark.parametrize("value", ["~/x", "y", ""])
def test_cache_directory_that_tilelang_was_told(tmp_path, value):
    """TileLang's env takes a value in Python too, before that of the environment."""
    script = start(AGREE, "first", "python", **settings(tmp_path, "x"), PYTHON_CACHE_DIR=str(value))
    expected = str(tmp_path / (MEANINGS | {"y": "y"})[value])
    assert finish(script) == [str(tmp_path / "x"), *[expected] * 3]


@pytest.mark.parametrize("value", ["", "~/x", "x"])
def test_kernels_are_stored_where_the_variable_says(nvcc, tmp_path, value):
    found = finish(start(OBTAIN, 64, **settings(tmp_path, value)))
    folder = tmp_path / MEANINGS[value]
    assert found["path"] == str(entry_of(folder))
    warning = (
        "tile_mhc: TILELANG_CACHE_DIR must be a folder or not set; got '', and kernels are kept in "
    )
    assert found["warnings"] == ([f"{warning}{folder}"] if value == "" else [])
    assert not (tmp_path / "~").exists()


def test_a_cache_told_in_python(nvcc, tmp_path):
    """It is filled by the processes of `fill_cache` too, and left where it cannot be written."""
    code = """
import json, sys, warnings
from tile_mhc import jit
env = jit.import_tilelang().env
env.TILELANG_CACHE_DIR = sys.argv[1]
problems = jit.fill_cache([("expand_fwd", (2, 64))], "sm_90a", 1)
found = [str(jit.compile_kernel("expand_fwd", (2, 64), "sm_90a").path), jit.statistics().loaded]
env.TILELANG_CACHE_DIR = sys.argv[2]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    jit.compile_kernel("expand_fwd", (2, 128), "sm_90a")
text = [str(w.message) for w in caught if "cannot be stored" in str(w.message)]
print(json.dumps([problems, *found, jit.statistics().built, text, env.TILELANG_CACHE_DIR]))
"""
    (tmp_path / "file").touch()
    told, impossible = tmp_path / "told", tmp_path / "file" / "x"
    script = start(code, told, impossible, cache=tmp_path / "other")
    problems, path, loaded, built, text, after = finish(script)
    assert problems == []
    assert (path, loaded, built) == (str(entry_of(told)), 1, 1)
    assert len(text) == 1
    assert str(impossible) in text[0]
    assert after == str(impossible)


def test_building_forbidden_while_the_cache_is_off(cache):
    found = obtain(cache, tilelang=True, TILE_MHC_JIT="0", TILELANG_DISABLE_CACHE="1")
    assert found["error"] == "NotCompiledError"
    assert found["text"] == (
        "kernel expand_fwd(2, 64): is not compiled for sm_90a while TileLang's cache is off, and "
        "TILE_MHC_JIT=0 forbids building it now; unset TILELANG_DISABLE_CACHE"
    )


def test_statistics_count_under_threads(monkeypatch):
    """Many kernels at once: every one counted, none twice."""
    monkeypatch.setattr(jit, "_compiled", {})
    monkeypatch.setattr(jit, "_locks", {})
    monkeypatch.setattr(jit, "_counts", {"built": 0, "loaded": 0})
    monkeypatch.setattr(
        jit,
        "_load_or_build",
        lambda name, args, arch: jit.Compiled(
            name, args, arch, print, args[0] % 2 == 0, 0.0, "", None, None
        ),
    )

    def work():
        for i in range(100):
            jit.compile_kernel(NAME, (i,), ARCH)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statistics = jit.statistics()
    assert (statistics.built, statistics.loaded) == (50, 50)
