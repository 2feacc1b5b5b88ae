"""The plain functions beside TileKernels 2.1.0: live, recorded, and its references in torch.

The live tests need release 2.1.0 on sys.path, or unpacked in $TILE_KERNELS_2. It stands in
sys.modules for as long as this module's tests run, under the import name that 1.0.0 has in others.
"""

import ast
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fresh
from parity import calls, golden, plain, real
from tile_mhc.compat.tile_kernels import mhc
from tile_mhc.compat.tile_kernels.torch import mhc_pre_norm_fn_partials_ref

# (tokens, hidden size), as TileKernels' own tests have them; tokens that are no multiple of a tile.
STREAMS = ((1021, 1280), (4096, 2560), (128, 7168))
NUMBERS = ((1, 64), (1001, 64), (8192, 64))
SHAPES = {
    **dict.fromkeys(plain.PLAIN, STREAMS),
    **dict.fromkeys(
        (
            "head_compute_mix_fwd",
            "head_compute_mix_bwd",
            "pre_split_mixes_fwd",
            "pre_split_mixes_bwd",
            "sinkhorn_fwd",
            "sinkhorn_bwd",
            "reduce_partials_fwd",
            "reduce_partials_of_groups_fwd",
            "reduce_partials_bwd",
            "reduce_partials_of_groups_bwd",
        ),
        NUMBERS,
    ),
    **dict.fromkeys(("fn_normw_merge_fwd", "fn_normw_merge_bwd"), ((1, 320), (1, 7168))),
}
LIVE = [(name, *shape) for name, shapes in SHAPES.items() for shape in shapes]
cases = pytest.mark.parametrize("case", golden.PLAIN_CASES, ids=str)


@pytest.fixture(scope="module")
def theirs():
    try:
        with real.plain_functions() as namespace:
            yield namespace
    except ImportError as error:
        pytest.skip(f"TileKernels 2.1.0 does not import: {error}")


@pytest.fixture(scope="module")
def wheel():
    """Release 2.1.0's folder, from which nothing is imported."""
    try:
        return real.release_2()
    except ImportError as error:
        pytest.skip(str(error))


# Live


@pytest.mark.parametrize(("name", "num_tokens", "hidden_size"), LIVE)
def test_beside_tile_kernels(theirs, report, name, num_tokens, hidden_size):
    call = plain.PLAIN[name]
    inputs = call.inputs(plain.Maker(name, num_tokens, hidden_size, "cuda"))
    found, wanted = (plain.evaluate(tk, call, inputs) for tk in (mhc, theirs))
    truth = plain.evaluate_exactly(call, inputs)
    torch.cuda.synchronize()
    assert found.keys() == wanted.keys() == truth.keys()
    worse = []
    for tensor, exact in truth.items():
        ours, other = found[tensor].view(exact.shape), wanted[tensor].view(exact.shape)
        assert ours.dtype == other.dtype
        row = {
            "call": f"2.1.0: {name}",
            "shape": f"T={num_tokens} H={hidden_size}",
            "tensor": tensor,
            "elements": exact.numel(),
            "same bits": calls.same_bits(ours, other),
            "difference": calls.relative_error(ours, other),
            "our error": calls.relative_error(ours, exact),
            "their error": calls.relative_error(other, exact),
        }
        report.append(row)
        limit = calls.allowed_error(row["their error"], exact, ours.dtype)
        if not row["our error"] <= limit:
            worse.append(f"{tensor}: {row['our error']:.3e}, allowed {limit:.3e}: {row}")
    assert not worse, "\n".join(worse)


def test_the_fused_pre_beside_its_parts(theirs):
    """TileKernels' own test asks for the same bits; both have them."""
    call = plain.PLAIN["pre_big_fuse_fwd"]
    inputs = call.inputs(plain.Maker(call.name, 509, 4096 + 64, "cuda"))
    for tk in (mhc, theirs):
        fused, parts = call.run(tk, inputs), plain.big_fuse_by_parts(tk, inputs)
        for name, tensor in fused.items():
            assert torch.equal(tensor, parts[name]), name


# Recorded


def check_recorded(case, device):
    """Theirs within its precision of float64, and ours of theirs."""
    recorded, call = load_file(case.path), plain.PLAIN[case.call]
    inputs = case.inputs(device)
    found = golden.on("cpu", plain.evaluate(mhc, call, inputs))
    truth = golden.on("cpu", plain.evaluate_exactly(call, inputs))
    assert recorded.keys() == found.keys() - set(case.left_out)
    for name, other in recorded.items():
        ours, bound = found[name].view(other.shape), call.bound(name)
        assert ours.dtype == other.dtype, name
        assert calls.relative_error(other, truth[name]) <= bound, name
        assert calls.relative_error(ours, other) <= bound, name
        if device == "cuda":
            error = calls.relative_error(ours, truth[name])
            their_error = calls.relative_error(other, truth[name])
            assert error <= calls.allowed_error(their_error, truth[name], ours.dtype), name


@pytest.mark.cpu
@cases
def test_inputs_are_the_recorded_ones(case):
    load_file(case.path)
    entry = golden.read_manifest()["files"][case.path.name]
    assert golden.tensors_sha256(case.inputs("cpu")) == entry["inputs_sha256"]


@pytest.mark.cpu
@cases
def test_recorded_on_a_cpu(case):
    check_recorded(case, "cpu")


@cases
def test_recorded_on_the_kernels(case):
    check_recorded(case, "cuda")


# Beside the files of the release


@pytest.mark.cpu
def test_every_function_of_the_release_is_compared(wheel):
    """And has its arguments and defaults, read from the sources."""
    compared = set()
    for file in sorted((wheel / "mhc").glob("*_kernel.py")):
        module = importlib.import_module(f"{mhc.__name__}.{file.stem}")
        for function in ast.parse(file.read_text()).body:
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                continue
            args, code = function.args, getattr(module, function.name).__code__
            names = [arg.arg for arg in args.args]
            if function.name == "mhc_post_bwd":
                names.append("fuse_grad_acc")  # 1.0.0's, False here
            assert names == list(code.co_varnames[: code.co_argcount]), function.name
            defaults = [ast.literal_eval(value) for value in args.defaults]
            own = list(getattr(module, function.name).__defaults__ or ())
            assert own[: len(defaults)] == defaults, function.name
            compared.add(function.name)
    assert compared == set(mhc.__all__)


def references(wheel):
    """Its functions in torch, which import nothing else of it."""
    spec = importlib.util.spec_from_file_location("their_references", wheel / "torch" / "mhc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.cpu
def test_beside_their_references(wheel):
    """Forwards, and by autograd backwards, in float64 where they take it."""
    ref = references(wheel)
    make = plain.Maker("references", 13, 128, "cpu")
    steps, eps, mult = plain.STEPS, plain.EPS, plain.POST_MULT
    mixes, gates = plain.PLAIN["pre_split_mixes_fwd"].inputs(make)["mixes"], make.gates()
    apply = plain.PLAIN["pre_apply_mix_fwd"].inputs(make)
    post = plain.PLAIN["post_bwd"].inputs(make)
    head, logits = plain.PLAIN["head_compute_mix_bwd"].inputs(make), make.by_token("logits", 4, 4)
    grad = make.by_token("grad", 4, 4)
    pairs = {
        "expand": (ref.expand_to_mhc_ref(post["x"][0], 4), _run("expand_fwd", x=post["x"][0])["o"]),
        "sinkhorn": (
            ref.sinkhorn_normalize_ref(logits.double(), steps, eps),
            _run("sinkhorn_fwd", logits=logits)["out"],
        ),
        "sinkhorn_bwd": (
            plain.by_autograd(
                lambda x: ref.sinkhorn_normalize_ref(x, steps, eps),
                [grad.double()],
                x=logits.double(),
            )["x"],
            _run("sinkhorn_bwd", logits=logits, grad=grad)["grad_input"],
        ),
        "head_mix": (
            ref.mhc_head_compute_mix_ref(head["mix"], head["scale"], head["base"], eps),
            _run("head_compute_mix_fwd", **{k: head[k] for k in ("mix", "scale", "base")})["out"],
        ),
        "post": (
            ref.mhc_post_ref(*list(post.values())[:4]),
            _run("post_fwd", **dict(list(post.items())[:4]))["out"],
        ),
    }
    theirs = ref.mhc_pre_split_mixes_ref(mixes[None], *gates.values(), 4, mult, eps)
    ours = _run("pre_split_mixes_fwd", mixes=mixes, **gates)
    for name, wanted in zip(ours, theirs, strict=True):
        pairs[f"split_mixes {name}"] = (wanted.reshape(ours[name].shape), ours[name])
    pairs["apply_mix"] = (
        ref.mhc_pre_apply_mix_ref(apply["x"], apply["mix"].unsqueeze(-1)),
        _run("pre_apply_mix_fwd", x=apply["x"], mix=apply["mix"])["o"],
    )
    for name, (wanted, found) in pairs.items():
        bound = calls.BF16 if found.dtype == torch.bfloat16 else calls.FLOAT32
        assert calls.relative_error(found, wanted) <= bound, name


@pytest.mark.cpu
def test_their_partial_sums(wheel):
    """What their reference makes of a matmul that splits K, ours makes too, and the mixes of it."""
    ref = references(wheel)
    make = plain.Maker("partials", 26, 128, "cpu")
    residual = make.streams("residual", 4).unflatten(0, (2, 13))
    fn = make.float32("fn", 24, 512) / 512**0.5
    theirs = ref.mhc_pre_norm_fn_partials_ref(residual, fn, 16)
    ours = mhc_pre_norm_fn_partials_ref(residual, fn, 16)
    for found, wanted in zip(ours, theirs, strict=True):
        assert found.shape == wanted.shape
        assert calls.relative_error(found, wanted) < calls.FLOAT32
    products, squares = theirs
    sums = {"products": products, "squares": squares, "size": torch.empty(512)}
    found = _run("reduce_partials_fwd", **sums)
    wanted = ref.mhc_pre_norm_fn_ref(residual, fn, None, plain.EPS)
    assert calls.relative_error(found["out"].view_as(wanted), wanted) < calls.FLOAT32


def _run(name, **inputs):
    if name == "expand_fwd":
        inputs["n"] = torch.empty(4)
    return plain.PLAIN[name].run(mhc, inputs)


ALIAS = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
import tile_kernels
from tile_mhc.compat import tile_kernels as ours
ours.install(force=True)
import tile_kernels.config, tile_kernels.quant
from tile_kernels.mhc import mhc_post_bwd
from tile_kernels.mhc.sinkhorn_kernel import _mhc_sinkhorn_bwd, _mhc_sinkhorn_fwd
from tile_kernels.modeling import engram
from tile_kernels.modeling.mhc.ops import sinkhorn_normalize
from tile_kernels.torch.mhc import mhc_pre_norm_fn_partials_ref
assert mhc_post_bwd is ours.mhc.mhc_post_bwd
assert mhc_pre_norm_fn_partials_ref is ours.torch.mhc_pre_norm_fn_partials_ref
for module in (tile_kernels, tile_kernels.config, tile_kernels.quant, engram):
    assert module.__file__.startswith(sys.argv[1]), module
try:
    importlib.import_module("tile_kernels.mhc.post_cuda")
except ModuleNotFoundError:
    ours.uninstall()
import tile_kernels.mhc
assert tile_kernels.mhc.__file__.startswith(sys.argv[1])
"""


@pytest.mark.cpu
def test_install_beside_the_release(wheel):
    """It loses its mHC modules alone, until they come back."""
    status, _, err = fresh.run(ALIAS, wheel.parent, tilelang=True)
    assert status == 0, err


def test_the_release_that_is_tested():
    """$TILE_KERNELS_2 is what the live tests run on, where it is set."""
    folder = os.environ.get(real.RELEASE_2)
    if not folder:
        pytest.skip(f"${real.RELEASE_2} is not set")
    assert real.version_of(Path(folder) / "tile_kernels")[:2] == (2, 1)
