"""`tile-mhc`: what it prints, what it refuses, and that its numbers are ptxas's."""

import json
import re
import subprocess

import pytest
import torch

pytest.importorskip("rich")
CliRunner = pytest.importorskip("click.testing").CliRunner

import fresh
from tile_mhc import __version__, jit, specs
from tile_mhc.cli import _clean, _compile, _doctor, _list, _measure, _resources, app, main

SPILLING = """
extern "C" __global__ void plain(float* x) {
    __shared__ float s[300];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
    float l[100];
#pragma unroll
    for (int i = 0; i < 100; i++) l[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 100; i++) x[i * 1024 + threadIdx.x] = l[99 - i];
}
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Options set this variable, and a test must not leave it set."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TILE_MHC_JIT", "1")
    return tmp_path / "cache"


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def nvcc():
    jit.import_tilelang()
    path = jit.find_nvcc()
    if path is None:
        pytest.skip("needs nvcc")
    return path


def check_refusal(result, code, pattern):
    """A failure is a code, nothing on stdout, and one line on stderr that names what is allowed."""
    got, out, err = result
    assert got == code
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("tile-mhc: error: ")
    assert re.search(pattern, err), err


ARCH = ("--arch", "sm_90a")
HIDDEN = ("--hidden", "4096")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((*ARCH, "--hidden", "0"), r"--hidden.*an integer from 1 to 16384; got '0'"),
        ((*ARCH, "--hidden", "16385"), r"an integer from 1 to 16384; got '16385'"),
        ((*ARCH, "--hidden", "4096,big"), r"an integer from 1 to 16384; got 'big'"),
        ((*ARCH, "--hidden", ""), r"an integer from 1 to 16384; got ''"),
        ((*ARCH, *HIDDEN, "--dtype", "float64"), r"--dtype.*bfloat16, float16, .*got 'float64'"),
        ((*ARCH, *HIDDEN, "--param-dtype", "float16"), r"--param-dtype.*float32.*got 'float16'"),
        ((*ARCH, *HIDDEN, "--streams", "3"), r"--streams.*must be one of 2, 4, 8; got '3'"),
        ((*ARCH, *HIDDEN, "--repeat", "0"), r"--repeat.*an integer from 1 to 1024; got '0'"),
        ((*ARCH, *HIDDEN, "--repeat", "1025"), r"--repeat.*from 1 to 1024; got '1025'"),
        ((*ARCH, *HIDDEN, "--ops", "expand,nope"), r"--ops.*aggregate, contract, .*got 'nope'"),
        (("--arch", "sm_90", *HIDDEN), r"--arch.*sm_89, sm_90a.*got 'sm_90'"),
        ((*ARCH, *HIDDEN, "--jobs", "0"), r"--jobs.*x>=1"),
        (ARCH, r"Missing option '--hidden'"),
        ((*ARCH, *HIDDEN, "extra"), r"unexpected extra argument"),
    ],
)
def test_compile_refuses(run, arguments, pattern):
    check_refusal(run("compile", *arguments), 2, pattern)


def test_compile_needs_an_arch_without_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refusal(run("compile", *HIDDEN), 2, r"--arch must be given.*sm_90a")


def test_compile_refuses_a_gpu_below_ampere(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    check_refusal(run("compile", *HIDDEN), 2, r"--arch must be among sm_80, .*got sm_75, this")


def test_compile_refuses_a_cache_it_cannot_write(run, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    result = run("compile", *ARCH, *HIDDEN, "--cache-dir", str(folder))
    check_refusal(result, 1, r"--cache-dir must be writable; got .*file/cache \(NotADirectoryError")


def test_unknown_command(run):
    check_refusal(run("compil"), 2, r"No such command 'compil'")


def test_no_arguments_show_the_help(run):
    code, _, err = run()
    assert code == 2
    assert all(name in err for name in ("compile", "list", "doctor", "clean"))


@pytest.mark.parametrize("name", ["compile", "list", "doctor", "clean"])
def test_help(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output


def test_version(run):
    assert run("--version") == (0, f"tile-mhc, version {__version__}\n", "")


def test_an_unforeseen_error_is_one_line(run, monkeypatch):
    def broken(_):
        raise KeyError("a\nb")

    monkeypatch.setattr(_list, "print_table", broken)
    check_refusal(run("list"), 1, r"KeyError: .*TILE_MHC_TRACEBACK=1")


def test_list(run):
    code, out, err = run("list", "--hidden", "4096,7168", "--streams", "4")
    assert (code, err) == (0, "")
    for spec in specs.SPECS:
        assert (spec.name in out) == (spec.stem != "projection_any"), "for other streams"
    assert "(4, 7168)" in out


def test_list_for_another_architecture(run):
    names = {}
    for arch in ("sm_80", "sm_90a", "sm_120a"):
        code, out, _ = run("list", "--arch", arch, "--json")
        assert code == 0
        names[arch] = {kernel["name"] for kernel in json.loads(out)}
    ops, ways = ("contract", "identity"), ("fwd", "bwd")
    clusters, passes = {f"{op}_cluster_{way}" for op in ops for way in ways}, {"post_pre_fwd"}
    clusters |= {"pre_cluster_fwd"}
    assert names["sm_90a"] - names["sm_80"] == clusters
    assert names["sm_90a"] - names["sm_120a"] >= clusters | passes
    check_refusal(run("list", "--arch", "sm_75"), 2, r"'sm_75' is not one of 'sm_80'")


def test_list_of_dtypes(run):
    arguments = ("--streams", "4", "--hidden", "100", "--ops", "projection,post")
    dtypes = ("--dtype", "float16,float32", "--param-dtype", "bfloat16")
    code, out, _ = run("list", *arguments, *dtypes, "--json")
    assert code == 0
    listed = {kernel["name"]: kernel["arguments"] for kernel in json.loads(out)}
    assert not [name for name in listed if name in ("projection_fwd", "projection_bwd")]
    assert listed["post_fwd"] == [
        [4, 100, *dtypes]
        for streams in ("float16", "float32")
        for dtypes in ([f"streams={streams}"], [f"streams={streams}", "layer_bias=bfloat16"])
    ]
    projections = listed["projection_any_fwd"]
    assert [24, 400, "streams=float16", "weight=bfloat16", "norm_weight=bfloat16"] in projections
    assert [4, 400, "streams=float32", "weight=bfloat16"] in projections


def test_list_as_json(run):
    code, out, _ = run("list", "--hidden", "64", "--streams", "2,8", "--ops", "post", "--json")
    biased = "layer_bias=float32"
    of_streams = [[2, 64], [2, 64, biased], [8, 64], [8, 64, biased]]
    backwards = [[2, 64, False], [2, 64, False, biased], [2, 64, True]]
    backwards += [[8, *words] for _, *words in backwards]
    biasing = ["post", "post_pre", "identity_post"]
    assert code == 0
    assert json.loads(out) == [
        {
            "name": name,
            "stem": "post",
            "ops": ops,
            "arguments": arguments,
        }
        for name, ops, arguments in (
            ("post_fwd", ["post", "post_pre", "tile_kernels"], of_streams),
            ("post_bwd", ["post", "post_pre", "tile_kernels"], backwards),
            ("post_bias_bwd", [*biasing, "transformer_engine"], [[64, biased]]),
        )
    ]


def cli(*arguments):
    return fresh.run("from tile_mhc.cli import entry; entry()", *arguments, tilelang=True)


def test_compile_then_cached_then_cleaned(nvcc, private_cache):
    """Both generations, from nothing; then the same again as text; then clean."""
    arguments = ("--arch", "sm_90a,sm_100a", "--hidden", "64", "--streams", "2", "--ops", "expand")
    code, out, err = cli("compile", *arguments, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["cache_dir"] == str(private_cache)
    assert [(k["name"], k["arch"]) for k in report["kernels"]] == [
        (name, arch) for arch in ("sm_90a", "sm_100a") for name in ("expand_fwd", "expand_bwd")
    ]
    for kernel in report["kernels"]:
        assert kernel["status"] == "built"
        assert 0 < kernel["registers"] <= 255
        assert (kernel["stack"], kernel["spill_stores"], kernel["spill_loads"]) == (0, 0, 0)
        assert kernel["shared_memory"] == 0
        assert list(private_cache.glob(f"*/*/kernels/{kernel['key']}"))

    numbers = ("name", "args", "arch", "registers", "shared_memory", "stack", "spill_stores")
    code, out, err = cli("compile", *ARCH, *arguments[2:], "--measure", "--json")
    assert (code, err) == (0, "")
    measured = json.loads(out)["kernels"]
    assert [kernel["status"] for kernel in measured] == ["measured"] * 2
    for one, other in zip(measured, report["kernels"][:2], strict=True):
        assert {name: one[name] for name in numbers} == {name: other[name] for name in numbers}

    code, out, err = cli("compile", *arguments)
    assert code == 0
    assert len(err.splitlines()) == 4, "a plain line for each kernel"
    assert all(" cached " in line for line in err.splitlines())
    assert "0 built, 4 cached, 0 failed" in out
    assert all(
        word in out for word in ("registers", "shared memory", "spills", "expand_bwd(2, 64)")
    )

    foreign = private_cache / "0.1.15" / "linux-x86_64" / "kernels" / "foreign"
    foreign.mkdir(parents=True)
    (foreign / "device_kernel.cu").write_text("__global__ void their_kernel_kernel() {}")
    code, out, err = cli("clean")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("tile-mhc: error: --yes must be given where there is no")
    assert "Remove 8 cache entries" in err
    assert len(_clean.find_entries(private_cache)) == 8
    code, out, err = cli("clean", "--yes", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["removed"] == 8
    assert _clean.find_entries(private_cache) == []
    assert foreign.exists()


def test_resources_of_a_kernel_that_first_use_compiled(nvcc, private_cache):
    """No record lies beside it then, so dynamic shared memory is worked out anew."""
    build = "from tile_mhc import jit; jit.compile_kernel('sinkhorn_bwd', (2, 32), 'sm_90a')"
    assert fresh.run(build, tilelang=True)[0] == 0
    assert not list(private_cache.rglob(_resources.CACHE_NAME))
    arguments = (*ARCH, "--hidden", "64", "--streams", "2", "--ops", "sinkhorn", "--json")
    found = {}
    for _ in range(2):
        code, out, err = cli("compile", *arguments)
        assert code == 0, err
        (kernel,) = [k for k in json.loads(out)["kernels"] if k["name"] == "sinkhorn_bwd"]
        assert kernel["status"] == "cached"
        found.setdefault("shared_memory", kernel["shared_memory"])
        assert kernel["shared_memory"] == found["shared_memory"] > 0
        assert list(private_cache.rglob(_resources.CACHE_NAME))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_registers_stack_and_static_shared_memory_are_those_of_ptxas(nvcc, tmp_path, arch):
    source = tmp_path / "kernel.cu"
    source.write_text(SPILLING)
    command = [nvcc, "--cubin", "-O3", f"-arch={arch}", "--ptxas-options=-v", "-o"]
    report = subprocess.run(
        [*command, tmp_path / "kernel.cubin", source], capture_output=True, text=True, check=True
    ).stderr
    used = max(map(int, re.findall(r"Used (\d+) registers", report)))
    stack = max(map(int, re.findall(r"(\d+) bytes stack frame", report)))
    assert stack > 0
    image = b"a host library" + (tmp_path / "kernel.cubin").read_bytes()
    usages = [_resources._usage(cubin, arch) for cubin in _resources._cubins(image)]
    assert usages == [(used, stack, 1200)]


def sources(arch, *texts):
    kernels = [("expand_fwd", (i,), arch) for i in range(len(texts))]
    return [_measure._Source(k, text, 0) for k, text in zip(kernels, texts, strict=True)]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernels_of_one_file_take_what_each_takes_alone(nvcc, tmp_path, arch):
    """Static shared memory, a stack, spills, and names that are the same."""
    plain, spilling = (f'extern "C"{kernel}' for kernel in SPILLING.split('extern "C"')[1:])
    spilling = spilling.replace("spilling(", "plain(")
    together = sources(arch, plain, spilling, plain)
    found = list(_measure._compile(together, arch, ()).values())
    assert found[0] == found[2]
    assert found[1].spill_stores > 0
    for text, resources in zip((plain, spilling), found, strict=False):
        (tmp_path / "kernel.cu").write_text(text)
        cubin = tmp_path / "kernel.cubin"
        command = [nvcc, "--cubin", "-O3", f"-arch={arch}", "-o", cubin, tmp_path / "kernel.cu"]
        subprocess.run(command, check=True)
        usage = (resources.registers, resources.stack, resources.shared_memory)
        assert usage == _resources._usage(cubin.read_bytes(), arch)


def test_a_kernel_that_does_not_compile_leaves_the_others_their_resources(nvcc):
    good = 'extern "C" __global__ void fine(float* x) { *x = 1; }'
    found = _measure._compile(sources("sm_90a", good, good.replace("*x =", "y =")), "sm_90a", ())
    resources, error = found.values()
    assert resources.registers > 0
    assert re.match(r'nvcc: .*identifier "y" is undefined', error)


def test_a_kernel_that_is_not_lowered(nvcc, run, monkeypatch):
    def broken(*_):
        raise ValueError("no layout\nfor it")

    monkeypatch.setattr(_resources, "lower", broken)
    code, out, err = run(*EXPAND, "--measure")
    assert code == 1
    assert "0 measured, 2 failed" in out
    assert "nothing stored" in out
    assert err.splitlines()[-1].endswith(
        "2 kernels failed, the first with: ValueError: no layout for it"
    )


def fake_entry(folder, nvcc, arch):
    """A cache entry whose library is a cubin of the spilling kernel."""
    source = folder / _resources.SOURCE_NAME
    source.write_text(SPILLING)
    subprocess.run(
        [nvcc, "--cubin", "-O3", "-lineinfo", f"-arch={arch}", "-std=c++20", "-o",
         folder / _resources.LIBRARY_NAME, source],
        check=True,
    )  # fmt: skip

    class Source:
        class artifact:  # noqa: N801
            class device_mod:  # noqa: N801
                functions = {}  # noqa: RUF012

    return jit.Compiled("expand_fwd", (2, 64), arch, print, True, 0.0, "key", folder, Source)


def test_spills_are_those_of_ptxas(nvcc, tmp_path):
    resources = _resources.measure(fake_entry(tmp_path, nvcc, "sm_90a"))
    assert resources.stack > 0
    assert resources.spill_stores > 0
    assert resources.spill_loads > 0
    # The second time from the record, whatever the library.
    (tmp_path / _resources.LIBRARY_NAME).unlink()
    compiled = jit.Compiled("expand_fwd", (2, 64), "sm_90a", print, False, 0.0, "k", tmp_path, None)
    assert _resources.measure(compiled) == resources


def test_spills_are_unknown_when_the_compilation_differs(nvcc, tmp_path):
    compiled = fake_entry(tmp_path, nvcc, "sm_90a")
    # A source that is not what the library was made from: half as many CTAs, so more registers.
    source = tmp_path / _resources.SOURCE_NAME
    source.write_text(SPILLING.replace("(1024, 2)", "(1024, 1)"))
    resources = _resources.measure(compiled)
    assert resources.stack > 0
    assert (resources.spill_stores, resources.spill_loads) == (None, None)


@pytest.fixture
def compiled_with(monkeypatch, tmp_path):
    """`compile` with a pretended compiler: kernels of these resources, or failing ones."""

    def use(resources):
        def compile_kernel(name, args, arch):
            if resources is None:
                raise jit.CompileError(f"kernel {name}: broken\nin two lines")
            return jit.Compiled(name, args, arch, print, True, 0.0, "key", tmp_path, None)

        monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
        monkeypatch.setattr(_resources, "measure", lambda _: resources)

    return use


EXPAND = ("compile", *ARCH, "--hidden", "64", "--streams", "2", "--ops", "expand")


@pytest.mark.parametrize(
    ("spills", "code"), [((0, 0), 0), ((8, 0), 1), ((0, 8), 1), ((None, None), 1)]
)
def test_fail_on_spills(run, compiled_with, spills, code):
    compiled_with(_resources.Resources(32, 0, 8, *spills))
    assert run(*EXPAND)[0] == 0
    got, out, err = run(*EXPAND, "--fail-on-spills")
    assert got == code
    assert ("2 of 2 kernels spill registers" in err) == bool(code)
    assert ("?" in out) == (spills == (None, None))


def test_a_kernel_that_fails(run, compiled_with):
    """The table still comes, with the others; then one line and a code."""
    compiled_with(None)
    code, out, err = run(*EXPAND)
    assert code == 1
    assert "0 built, 0 cached, 2 failed" in out
    last = err.splitlines()[-1]
    assert last == (
        "tile-mhc: error: 2 of 2 kernels failed, the first with: "
        "kernel expand_fwd: broken in two lines"
    )
    code, out, err = run(*EXPAND, "--json")
    assert code == 1
    assert [k["status"] for k in json.loads(out)["kernels"]] == ["failed", "failed"]
    assert len(err.splitlines()) == 1


def test_clean_asks_and_json_cannot(run, private_cache):
    entry = private_cache / "0.1.15" / "linux-x86_64" / "kernels" / "ours"
    entry.mkdir(parents=True)
    (entry / "device_kernel.cu").write_text("__global__ void expand_fwd_kernel_kernel() {}")
    check_refusal(run("clean", "--json"), 2, r"--json must come with --yes")
    result = CliRunner().invoke(app, ["clean"], input="n\n")
    assert result.exit_code == 1
    assert entry.exists()
    result = CliRunner().invoke(app, ["clean"], input="y\n")
    assert result.exit_code == 0
    assert "removed 1 cache entries" in result.output
    assert not entry.exists()


def test_clean_counts_an_entry_once(run, private_cache):
    """Several files of it may name the kernel."""
    entry = private_cache / "0.1.15" / "cuda-binaries" / "ours"
    entry.mkdir(parents=True)
    for suffix in ("cu", "cubin"):
        (entry / f"kernel.{suffix}").write_text("__global__ void expand_fwd_kernel_kernel() {}")
    code, out, err = run("clean", "--yes", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["removed"] == 1
    assert not entry.exists()


def test_clean_of_nothing(run, private_cache):
    assert run("clean") == (0, f"removed 0 cache entries (0.0 MB) from {private_cache}\n", "")


CHECKS = [
    "tile_mhc",
    "python",
    "torch",
    "tilelang",
    "tvm",
    "nvcc",
    "gpu",
    "driver",
    "cache",
    "kernel",
]


def test_doctor(nvcc):
    code, out, err = cli("doctor", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["ok"] is True
    assert [check["name"] for check in report["checks"]] == CHECKS
    trial = report["checks"][-1]
    assert trial["status"] == "ok"
    assert ("largest difference" if torch.cuda.is_available() else "expand_fwd") in trial["detail"]


def test_doctor_with_nothing_to_try(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jit, "find_nvcc", lambda: None)
    code, out, err = run("doctor")
    assert code == 1
    assert err == "tile-mhc: error: failed: kernel\n"
    assert "neither a GPU nor nvcc" in out


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_doctor_says_which_gpus_have_kernels(run, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(_doctor, "_run_a_kernel", lambda: ("ok", "it ran"))
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0
    if capability == (8, 0):
        assert checks["gpu"] == {"name": "gpu", "status": "ok", "detail": "a card (sm_80)"}
        assert checks["kernel"]["detail"] == "it ran"
    else:
        assert checks["gpu"]["status"] == checks["kernel"]["status"] == "note"
        assert "a card (sm_75); no kernels for sm_75: ops run the torch" in checks["gpu"]["detail"]
        assert checks["kernel"]["detail"].endswith("sm_120a; got sm_75")


def test_doctor_survives_what_it_examines(run, monkeypatch):
    def broken():
        raise RuntimeError("bad\ndriver")

    monkeypatch.setattr(_doctor, "_driver", broken)
    monkeypatch.setattr(_doctor, "_kernel", lambda: ("ok", ""))
    code, out, err = run("doctor", "--json")
    assert code == 1
    driver = next(c for c in json.loads(out)["checks"] if c["name"] == "driver")
    assert driver == {"name": "driver", "status": "fail", "detail": "RuntimeError: bad driver"}
    assert err == "tile-mhc: error: failed: driver\n"


def test_doctor_reports_an_unwritable_cache(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(_doctor, "_kernel", lambda: ("ok", ""))
    code, out, _ = run("doctor", "--json", "--cache-dir", str(tmp_path / "file" / "cache"))
    cache = next(c for c in json.loads(out)["checks"] if c["name"] == "cache")
    assert code == 0
    assert cache["status"] == "note"
    assert "cannot be written" in cache["detail"]


def test_doctor_reports_a_cache_that_is_off(run, monkeypatch, private_cache):
    monkeypatch.setattr(_doctor, "_kernel", lambda: ("ok", ""))
    monkeypatch.setenv("TILELANG_DISABLE_CACHE", "1")
    code, out, _ = run("doctor", "--json")
    cache = next(c for c in json.loads(out)["checks"] if c["name"] == "cache")
    assert (code, cache["status"]) == (0, "note")
    assert cache["detail"].startswith(f"{private_cache} is not used (TILELANG_DISABLE_CACHE)")


@pytest.mark.filterwarnings("ignore:tile_mhc. TILELANG_CACHE_DIR")
@pytest.mark.parametrize(("value", "status"), [("", "note"), ("~/.tilelang/cache", "ok")])
def test_doctor_names_the_folder_that_tilelang_uses(run, monkeypatch, tmp_path, value, status):
    # What TileLang took for its default when it was imported.
    default = vars(type(jit.import_tilelang().env))["TILELANG_CACHE_DIR"]
    monkeypatch.setattr(default, "default", str(tmp_path / ".tilelang" / "cache"))
    monkeypatch.setattr(_doctor, "_kernel", lambda: ("ok", ""))
    monkeypatch.setenv("TILELANG_CACHE_DIR", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert (code, checks["tilelang"]["status"], checks["cache"]["status"]) == (0, "ok", status)
    assert checks["cache"]["detail"].startswith(f"{tmp_path / '.tilelang' / 'cache'}, ")
    assert ("TILELANG_CACHE_DIR is empty" in checks["cache"]["detail"]) is (value == "")
    told = jit.import_tilelang().env.TILELANG_CACHE_DIR
    assert told == str(tmp_path / ".tilelang" / "cache")


def test_compile_refuses_a_cache_that_is_off(run, monkeypatch):
    monkeypatch.setenv("TILELANG_DISABLE_CACHE", "1")
    result = run("compile", *ARCH, *HIDDEN)
    check_refusal(result, 1, r"TILELANG_DISABLE_CACHE must not be set, .*; got '1'")


@pytest.mark.parametrize("command", [["compile", "--hidden", "64"], ["clean"], ["doctor"]])
def test_no_folder_is_refused(run, command):
    """An empty variable of a script: not the working directory."""
    check_refusal(run(*command, "--cache-dir", ""), 2, r"--cache-dir.*must be a folder; got ''")


def test_the_home_folder_in_an_option(run, monkeypatch, tmp_path):
    """As a shell leaves --cache-dir=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("clean", "--cache-dir=~/x")[1].endswith(f" from {tmp_path / 'x'}\n")


def test_progress_bar_on_a_terminal(monkeypatch):
    """On a terminal the lines give way to one bar, which is cleared at the end."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    outcome = _compile.Outcome("expand_fwd", (2, 64), "sm_90a", error="x")
    with _compile._reporter(1, quiet=False) as report:
        report(outcome)
    assert report(outcome) is None
