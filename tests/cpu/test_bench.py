"""The benchmark's byte counts and its refusal of wrong results; the timing itself needs a GPU."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tile_mhc
from tile_mhc import jit, specs

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # the two files import each other as scripts do

bench = importlib.import_module("bench")
bench_ops = importlib.import_module("bench_ops")

# One token of n = 4 streams of H = 64, by hand: bfloat16 is 2 bytes, float32 4, 24 mixes, a weight
# of 24 * 256 float32 = 24576 bytes.
BY_HAND = {
    "expand.fwd": 128 + 512,
    "expand.bwd": 512 + 128,
    "projection.fwd": 512 + 24576 + 96 + 4,  # x, weight; mixes, inv_rms
    "projection.bwd": 512 + 96 + 96 + 4 + 24576 + 512 + 24576,
    "split_mixes.fwd": 96 + 96 + 12 + 96,  # mixes, bias, scale; the three groups
    "split_mixes.bwd": 3 * 96 + 2 * (96 + 12),
    "sinkhorn.fwd": 64 + 64,
    "sinkhorn.bwd": 64 + 64 + 64,
    "aggregate.fwd": 512 + 16 + 128,
    "aggregate.bwd": 128 + 512 + 16 + 512 + 16,
    "post.fwd": 128 + 512 + 16 + 64 + 512,
    "post.bwd": 512 + 128 + 512 + 16 + 64 + 128 + 512 + 16 + 64,
    "head_mix.fwd": 16 + 16 + 4 + 16,
    "head_mix.bwd": 16 + 16 + 20 + 16 + 20,
    "contract.fwd": 512 + 4096 + 20 + 128,
    # x, grad, weight, gates, mixes, inv_rms; four gradients
    "contract.bwd": 512 + 128 + 4096 + 20 + 16 + 4 + 512 + 4096 + 20,
    "fused_pre.fwd": 512 + 24576 + 108 + 128 + 16 + 64,
    # x, weight, gates, mixes, inv_rms, three gradients; four gradients
    "fused_pre.bwd": 512 + 24576 + 108 + 96 + 4 + 128 + 16 + 64 + 512 + 24576 + 108,
    # the first residual; by layer: three mixes, the output, the input, the residual
    "recompute.fwd": 512 + 10 * (16 + 16 + 64 + 128 + 128 + 512),
    # pre: x, layer input; post; its backward: g, x, y, two gradients; that of pre
    "sub_layer.fwd+bwd": (512 + 128)
    + (128 + 512 + 512)
    + (512 + 512 + 128 + 128 + 512)
    + (512 + 128 + 512 + 512)
    + 3 * 24576,
}


def make_ops():
    return {op.name: op for op in bench_ops.make_ops()}


def test_every_op_is_counted_by_hand():
    assert {name: op.floor(1, 64, 4) for name, op in make_ops().items()} == BY_HAND


@pytest.mark.parametrize(
    ("name", "per_token", "once"),
    [
        # Bytes a token at n = 4 with H left open, as the notes of several libraries give them.
        ("expand.fwd", lambda H: 10 * H, lambda H: 0 * H),
        ("projection.fwd", lambda H: 8 * H + 100, lambda H: 384 * H),
        ("projection.bwd", lambda H: 16 * H + 196, lambda H: 768 * H),
        ("aggregate.fwd", lambda H: 10 * H + 16, lambda H: 0 * H),
        ("aggregate.bwd", lambda H: 18 * H + 32, lambda H: 0 * H),
        ("post.fwd", lambda H: 18 * H + 80, lambda H: 0 * H),
        ("post.bwd", lambda H: 28 * H + 160, lambda H: 0 * H),
        ("contract.bwd", lambda H: 18 * H + 20, lambda H: 128 * H + 40),
        ("fused_pre.fwd", lambda H: 10 * H + 80, lambda H: 384 * H + 108),
        ("fused_pre.bwd", lambda H: 18 * H + 180, lambda H: 768 * H + 216),
        ("recompute.fwd", lambda H: 8 * H + 10 * (2 * H + 16) + 10 * (10 * H + 80), lambda H: 0),
        ("sub_layer.fwd+bwd", lambda H: 82 * H, lambda H: 1152 * H),
    ],
)
def test_bytes_scale_with_tokens_and_width(name, per_token, once):
    floor = make_ops()[name].floor
    for tokens, hidden in ((8192, 7168), (16, 7168), (4096, 2560)):
        assert floor(tokens, hidden, 4) == tokens * per_token(hidden) + once(hidden)


def test_bytes_at_two_and_eight_streams():
    # n = 2: 8 mixes; n = 8: 80.
    floor = {name: op.floor for name, op in make_ops().items()}
    assert floor["expand.fwd"](3, 64, 2) == 3 * 64 * 2 * 3
    assert floor["projection.fwd"](3, 64, 2) == 3 * (256 + 36) + 8 * 128 * 4
    assert floor["post.bwd"](3, 64, 8) == 3 * (64 * 2 * 26 + 4 * 144)
    assert floor["sinkhorn.bwd"](3, 64, 8) == 3 * 3 * 64 * 4


@pytest.fixture(scope="module")
def inputs():
    return bench_ops.make_inputs(37, 128, torch.device("cpu"))


@pytest.mark.parametrize("name", list(BY_HAND))
def test_right_results_pass_and_one_wrong_element_does_not(name, inputs, monkeypatch):
    monkeypatch.setattr(bench, "CHUNK", 16)  # 37 tokens: two whole chunks and a ragged one
    op = make_ops()[name]
    prepared = op.prepare(inputs)
    outputs = op.ours(prepared)()
    assert bench.check(op, prepared, outputs) is None
    for index, output in enumerate(outputs):
        for wrong in (float("nan"), float("inf"), 9 * float(output.abs().max()) + 1):
            spoiled = output.clone()
            spoiled.view(-1)[-1] = wrong
            results = (*outputs[:index], spoiled, *outputs[index + 1 :])
            error = bench.check(op, prepared, results)
            assert error is not None
            assert error.startswith(f"output {index}")


def test_a_missing_token_is_an_error():
    want = torch.randn(1, 8, 4, dtype=torch.float64)
    assert bench.find_error(want.float(), want) is None
    assert "for (1, 8, 4)" in bench.find_error(want[:, :7].float(), want)
    assert bench.find_error(torch.zeros(1, 8, 4), want) is not None


def test_tolerances_are_tighter_than_the_next_smaller_format():
    want = torch.randn(1, 4096, 4, dtype=torch.float64)
    assert bench.find_error(want.bfloat16(), want) is None
    assert bench.find_error(want.to(torch.float8_e4m3fn).bfloat16(), want) is not None
    assert bench.find_error(want.to(torch.float8_e4m3fn).float(), want) is not None


def test_select_ops_by_name_and_by_stem():
    assert [op.name for op in bench.select_ops("post,sinkhorn.bwd")] == [
        "sinkhorn.bwd",
        "post.fwd",
        "post.bwd",
    ]
    assert len(bench.select_ops(None)) == len(BY_HAND)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "projection,nonsense"], r"--ops must name some of expand.fwd"),
        (["--ops", ","], "--ops must name some of"),
        (["--shapes", "128"], "--shapes must be TxH,TxH"),
        (["--jobs", "0"], "--jobs must be at least 1; got 0"),
        (["--shapes", "0x64"], "--shapes must be TxH,TxH"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([])
    assert stop.value.code == 2
    assert "a CUDA device is needed" in capsys.readouterr().err


def test_every_stem_is_compiled_before():
    for op in bench.select_ops(None):
        stem = op.name.partition(".")[0]
        assert set(bench.OPS_OF.get(stem, (stem,))) <= set(specs.OPS), stem
    stems = bench.peer_stems(bench.select_ops(None))
    assert "post" in stems
    assert not {"contract", "sub_layer"} & set(stems), "no peer, and covered by the others"
    assert bench.peer_stems(bench.select_ops("sub_layer,post")) == ["post", "sub_layer"]
    command = bench.warm_command("post", bench.select_ops("post,expand"), [(16, 64), (8, 128)])
    assert command[-4:] == ["16x64,8x128", "--warm-peer", "--ops", "post.fwd,post.bwd"]


def test_what_fails_to_compile_is_named_and_stops_nothing(monkeypatch, capsys):
    asked = []

    def compile_kernel(name, args, arch):
        asked.append((name, args, arch))
        if name == "post_bwd":
            raise jit.CompileError("nvcc said no\n" + "source\n" * 1000)

    monkeypatch.setattr(jit, "compile_kernel", compile_kernel)
    monkeypatch.setattr(jit, "device_arch", lambda device: "sm_90a")
    monkeypatch.setattr(jit, "import_tilelang", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        bench, "warm_command", lambda *_: [sys.executable, "-c", "raise OSError(7)"]
    )
    bench.precompile(bench.select_ops("post"), [(16, 64), (8, 64), (16, 128)], object(), 2)
    biased = ("bfloat16", "float32")
    names = [
        (name, (4, hidden, *dtypes))
        for name in ("post_fwd", "post_bwd")
        for hidden in (64, 128)
        for dtypes in ((), biased)
    ]
    names += [("post_bias_bwd", (hidden,)) for hidden in (64, 128)]
    assert sorted(asked) == sorted((*kernel, "sm_90a") for kernel in names)
    printed = capsys.readouterr().out
    assert printed.count("CompileError: nvcc said no") == 4
    assert "OSError: 7" in printed
    assert "source" not in printed


@pytest.mark.parametrize("broken", ["ours", "peer"])
def test_a_failure_of_one_side_keeps_the_other(broken, inputs, monkeypatch):
    class Graph:
        replay = None

    def fails(*_):
        raise RuntimeError("CUDA said no")

    monkeypatch.setattr(
        bench, "capture", lambda op, inputs, run: (run() and None) or (Graph(), None)
    )
    monkeypatch.setattr(bench, "time_replays", lambda graphs, flush: [5.0 for _ in graphs])
    good = make_ops()["expand.fwd"]
    sides = {"ours": good.ours, "peer": lambda peer, x: good.ours(x)}
    sides[broken] = fails
    op = dataclasses.replace(good, **sides)
    ours, theirs, problems = bench.measure(op, inputs, object(), None)
    assert (ours, theirs) == ((None, 5.0) if broken == "ours" else (5.0, None))
    assert problems == [f"{broken}: RuntimeError: CUDA said no"]
    monkeypatch.setattr(bench, "time_replays", fails)
    ours, theirs, problems = bench.measure(good, inputs, None, None)
    assert (ours, theirs, problems) == (None, None, ["timing: RuntimeError: CUDA said no"])


def test_shapes():
    assert bench.parse_shapes("8192x7168, 16x64") == [(8192, 7168), (16, 64)]


def test_row_leaves_out_what_was_not_measured():
    full = bench.row("post.fwd", [8192, 7168, 258.04, 4111.0, 1.04, 250.0, 1.03])
    assert full.split() == ["post.fwd", "8192", "7168", "258.0", "4111", "1.04", "250.0", "1.03"]
    empty = bench.row("contract.fwd", [16, 7168, None, None, None, None, None])
    assert empty.split() == ["contract.fwd", "16", "7168", "-", "-", "-", "-", "-"]
    assert len(full) == len(empty)


def test_peer_is_found_without_running_its_packages(tmp_path):
    """TileKernels' __init__ files import what does not compile: they must not run."""
    package = tmp_path / "tile_kernels"
    ops = package / "modeling" / "mhc" / "ops"
    ops.mkdir(parents=True)
    (package / "mhc").mkdir()
    for path in (package, package / "modeling"):
        (path / "__init__.py").write_text("raise RuntimeError('must not run')")
    (package / "mhc" / "__init__.py").write_text("")
    (package / "mhc" / "multilayer_recompute_kernel.py").write_text("")
    (package / "modeling" / "mhc" / "__init__.py").write_text("")
    (package / "modeling" / "mhc" / "functional.py").write_text("")
    (ops / "__init__.py").write_text("")
    for module, function in (
        ("expand", "ExpandToMHCFn"),
        ("norm_fn", "MHCPreNormFn"),
        ("pre_split_mixes", "MHCPreSplitMixes"),
        ("sinkhorn", "_SinkhornNormalize"),
        ("pre_apply_mix", "MHCPreApplyMix"),
        ("post", "MHCPost"),
        ("head_compute_mix", "MHCHeadComputeMix"),
    ):
        (ops / f"{module}.py").write_text(f"class {function}: pass")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import bench_ops\n"
        "peer = bench_ops.find_peer()\n"
        "sys.exit(sorted(peer.functions)[0] != 'aggregate')"
    )
    arguments = [sys.executable, "-c", code, str(SCRIPTS), str(Path(tile_mhc.__path__[0]).parent)]
    found = subprocess.run([*arguments, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    absent = "import sys; sys.path[:0] = sys.argv[1:]; import bench_ops\n" + (
        "sys.exit(bench_ops.find_peer() is not None)"
    )
    arguments[2] = absent
    assert subprocess.run(arguments).returncode == 0


def test_backward_alone_uses_what_forward_saved():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * ctx.factor + 0 * x, None

    peer = object.__new__(bench_ops.Peer)
    peer.functions = {"double": Double}
    run = bench_ops.first(peer.backward("double", (torch.ones(3), 2.0), (torch.ones(3),)), 1)
    assert torch.equal(run()[0], torch.full((3,), 2.0))
