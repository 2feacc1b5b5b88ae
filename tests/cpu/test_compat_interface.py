"""TileKernels' names, argument orders, defaults and module paths, and the import alias."""

import importlib
import importlib.util
import inspect
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fresh
import tile_mhc.compat.tile_kernels as compat

PACKAGE = "tile_mhc.compat.tile_kernels"

RECOMPUTE = (
    "initial_residual, pre_mix_list, layer_output_list, post_mix_list, comb_mix_list, "
    "layer_input_list, residual_list"
)
POST = "x, residual, post_layer_mix, comb_res_mix"
PRE = "residual, fn, scale, base, *, norm_weight=None, norm_eps=1e-06, mhc_mult=4"
EXPAND = "hidden, mhc_mult, out=None"
HEAD_MIX = "input_mix, mhc_scale, mhc_base, mhc_pre_eps"
NORM_FN = "residual, mhc_fn, mhc_norm_weight, mhc_norm_eps"
SPLIT = "input_mixes, mhc_scale, mhc_base, mhc_mult, mhc_post_mult_value, mhc_pre_eps"
SINKHORN = "x, repeat=10, eps=1e-06"
BIG_FUSE = (
    "residual, fn, mhc_scale, mhc_base, rms_eps, mhc_pre_eps, mhc_sinkhorn_eps, "
    "mhc_post_mult_value, sinkhorn_repeat, n_splits=16"
)
OPS = {
    "expand_to_mhc": EXPAND,
    "mhc_head_compute_mix": HEAD_MIX,
    "mhc_multilayer_recompute": RECOMPUTE,
    "mhc_post": f"{POST}, out=None",
    "mhc_post_bwd": f"{POST}, d_o, fuse_grad_acc=True",
    "mhc_post_fwd": f"{POST}, out=None",
    "mhc_pre_apply_mix": "x, mix, out=None",
    "mhc_pre_big_fuse": BIG_FUSE,
    "mhc_pre_norm_fn": f"{NORM_FN}, fuse_grad_acc=True, n_splits=16",
    "mhc_pre_split_mixes": SPLIT,
    "sinkhorn_normalize": SINKHORN,
}
CALLS = {
    "expand_from_embedding": "x, mhc_mult=4",
    "mhc_head": f"{PRE}, pre_eps=1e-06, n_splits=16",
    "mhc_pre": (
        f"{PRE}, post_mult_value=1.0, pre_eps=1e-06, sinkhorn_eps=1e-06, sinkhorn_repeat=10, "
        "n_splits=16"
    ),
}
REFERENCES = {
    "expand_to_mhc_ref": "hidden, mhc_mult",
    "mhc_head_compute_mix_ref": HEAD_MIX,
    "mhc_post_ref": POST,
    "mhc_pre_apply_mix_ref": "x, mix",
    "mhc_pre_norm_fn_partials_ref": "residual, fn, n_splits",
    "mhc_pre_norm_fn_ref": NORM_FN,
    "mhc_pre_split_mixes_ref": SPLIT,
    "sinkhorn_normalize_ref": SINKHORN,
}


def pick(*names: str) -> dict[str, str]:
    return {name: OPS[name] for name in names}


# What release 2.1.0 has of plain functions, by module; all of them also in `mhc` itself.
GATES = "mhc_scale, mhc_base"
BIG_FUSE_OPTIONS = (
    "rms_eps, mhc_pre_eps, mhc_sinkhorn_eps, mhc_post_mult_value, sinkhorn_repeat, n_splits=16"
)
PLAIN = {
    "expand_kernel": {
        "expand_to_mhc_bwd": "o_grad, x_grad",
        "expand_to_mhc_fwd": "x, o",
    },
    "head_compute_mix_kernel": {
        "mhc_head_compute_mix_bwd": (
            f"output_mix_grad, input_mix, {GATES}, input_mix_grad, mhc_scale_grad_partial, "
            "mhc_base_grad_partial, num_sms, token_block_size=0"
        ),
        "mhc_head_compute_mix_fwd": (
            f"input_mix, {GATES}, output_mix, mhc_pre_eps, token_block_size=0"
        ),
    },
    "multilayer_recompute_kernel": pick("mhc_multilayer_recompute"),
    "norm_fn_kernel": {
        "mhc_fn_normw_merge_bwd": "fn, normw, out_fn_grad, fn_grad, normw_grad",
        "mhc_fn_normw_merge_fwd": "fn, normw, out_fn",
        "mhc_reduce_partials_and_rmsnorm_bwd": (
            "out_grad, out_mul, sqrsum, out_mul_grad, sqrsum_grad, rms_group_size, rms_eps"
        ),
        "mhc_reduce_partials_and_rmsnorm_fwd": (
            "out_mul_splitted, sqrsum_splitted, out_mul, sqrsum, out, rms_group_size, rms_eps, "
            "n_splits"
        ),
    },
    "post_kernel": {
        # 2.1.0's, which ends before it; 1.0.0's default is True, as in `modeling.mhc.ops`.
        "mhc_post_bwd": f"{POST}, d_o, fuse_grad_acc=False",
        "mhc_post_fwd": f"{POST}, out=None",
    },
    "pre_apply_mix_kernel": {
        "mhc_pre_apply_mix_bwd": "o_grad, x, mix, x_grad",
        "mhc_pre_apply_mix_fwd": "x, mix, o",
    },
    "pre_big_fuse_kernel": {
        "mhc_pre_big_fuse_fwd": (
            f"gemm_out_mul, gemm_out_sqrsum, {GATES}, residual, post_mix, comb_mix, layer_input, "
            f"{BIG_FUSE_OPTIONS}"
        ),
    },
    "pre_split_mixes_kernel": {
        "mhc_pre_split_mixes_bwd": (
            "pre_layer_mix_grad, post_layer_mix_grad, comb_res_mix_grad, input_mixes, "
            f"post_layer_mix, {GATES}, input_mixes_grad, mhc_scale_grad, mhc_base_grad, "
            "mhc_post_mult_value"
        ),
        "mhc_pre_split_mixes_fwd": (
            f"input_mixes, {GATES}, pre_layer_mix, post_layer_mix, comb_res_mix, "
            "mhc_post_mult_value, mhc_pre_eps"
        ),
    },
    "sinkhorn_kernel": {
        "mhc_sinkhorn_bwd": "grad_output, x, grad_input, repeat, eps",
        "mhc_sinkhorn_fwd": "comb_res_mix, comb_res_mix_out, repeat, eps",
    },
}
MATMUL = "mhc_mult3, n_rms_group, rms_group_size"
# What else those modules have: 1.0.0's functions, and builders of its that others import.
BUILDERS = {
    "expand_kernel": {
        "expand_to_mhc_bwd_tl": "hidden, mhc_mult",
        "expand_to_mhc_fwd_tl": "hidden, mhc_mult",
    },
    "head_compute_mix_kernel": {
        "_mhc_head_compute_mix_bwd": "mhc_mult, token_block_size, num_sms",
        "_mhc_head_compute_mix_fwd": "mhc_mult, mhc_pre_eps, token_block_size",
    },
    "post_kernel": {
        "_mhc_post_bwd": "mhc, hidden, n_thr=128, h_blk=256",
        "_mhc_post_fwd": "mhc, hidden, n_thr=128, h_blk=1024",
    },
    "pre_apply_mix_kernel": {
        "_mhc_pre_apply_mix_bwd": "mhc_mult, hidden, n_thr=128, h_blk=1024",
        "_mhc_pre_apply_mix_fwd": "mhc_mult, hidden, n_thr=128, h_blk=1024",
    },
    "pre_split_mixes_kernel": {
        "_mhc_pre_split_mixes_bwd": (
            "mhc_mult, mhc_post_mult_value, token_block_size, num_sms=148, dtype='float32'"
        ),
        "_mhc_pre_split_mixes_fwd": (
            "mhc_mult, mhc_post_mult_value, mhc_pre_eps, token_block_size, dtype='float32'"
        ),
    },
    "norm_fn_kernel": {
        "_mhc_pre_norm_fn_bwd_mul": f"{MATMUL}, token_block=128, hidden_block=128",
        "_mhc_pre_norm_fn_bwd_norm": f"{MATMUL}, rms_eps",
        "_mhc_pre_norm_fn_fwd_mul": f"{MATMUL}, token_block=32, hidden_block=256",
        "_mhc_pre_norm_fn_fwd_norm": f"{MATMUL}, rms_eps, n_splits",
        "round_to_tf32": "x",
    },
    "pre_big_fuse_kernel": {"_mhc_pre_big_fuse": f"hidden_size, {BIG_FUSE_OPTIONS}, mhc_mult=4"},
    "sinkhorn_kernel": {
        "_mhc_sinkhorn_bwd": "hidden_size, token_block_size, repeat, eps",
        "_mhc_sinkhorn_fwd": "hidden_size, token_block_size, repeat, eps",
    },
}
SWITCHES = {
    "get_deterministic_algorithms": "",
    "get_device_num_sms": "",
    "get_max_smem_per_sm": "",
    "get_num_sms": "",
    "get_pdl": "",
    "set_num_sms": "num_sms",
    "set_pdl": "use_pdl",
    "use_deterministic_algorithms": "enabled",
}
INTERFACE = {
    "config": {**SWITCHES, "get_device": "", "is_ascend": "", "reset_runtime_config": ""},
    "mhc": {name: s for functions in PLAIN.values() for name, s in functions.items()},
    **{f"mhc.{stem}": {**PLAIN[stem], **BUILDERS.get(stem, {})} for stem in PLAIN},
    "modeling.mhc": CALLS,
    "modeling.mhc.functional": {
        name: signature
        for name, signature in {**CALLS, **OPS}.items()
        if name not in ("mhc_multilayer_recompute", "mhc_post_bwd", "mhc_post_fwd")
    },
    "modeling.mhc.ops": OPS,
    "modeling.mhc.ops.expand": pick("expand_to_mhc"),
    "modeling.mhc.ops.head_compute_mix": pick("mhc_head_compute_mix"),
    "modeling.mhc.ops.multilayer_recompute": pick("mhc_multilayer_recompute"),
    "modeling.mhc.ops.norm_fn": {**pick("mhc_pre_norm_fn"), "round_to_tf32": "x"},
    "modeling.mhc.ops.post": pick("mhc_post", "mhc_post_bwd", "mhc_post_fwd"),
    "modeling.mhc.ops.pre_apply_mix": pick("mhc_pre_apply_mix"),
    "modeling.mhc.ops.pre_big_fuse": {**pick("mhc_pre_big_fuse"), "round_to_tf32": "x"},
    "modeling.mhc.ops.pre_split_mixes": pick("mhc_pre_split_mixes"),
    "modeling.mhc.ops.sinkhorn": pick("sinkhorn_normalize"),
    "torch": REFERENCES,
    "torch.mhc": REFERENCES,
}
AUTOGRAD_NAMES = {
    "expand": ("ExpandToMHCFn", EXPAND),
    "head_compute_mix": ("MHCHeadComputeMix", HEAD_MIX),
    "norm_fn": ("MHCPreNormFn", "x, fn, norm_eps, fuse_grad_acc, n_splits"),
    "post": ("MHCPost", f"{POST}, out=None"),
    "pre_apply_mix": ("MHCPreApplyMix", "x, mix, out=None"),
    "pre_split_mixes": ("MHCPreSplitMixes", SPLIT),
}


def plain_signature(function: object) -> str:
    """The parameters without their annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def forget(monkeypatch, name: str) -> None:
    """Take `name` and all below it out of the imported modules, until the test ends."""
    for loaded in [n for n in sys.modules if n.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)


@pytest.fixture
def no_real_package(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tile_kernels" else find_spec(name, *rest),
    )
    forget(monkeypatch, "tile_kernels")


@pytest.fixture
def alias(no_real_package):
    """`tile_kernels` is ours inside the test, whether a real one is installed or not."""
    compat.install()
    yield
    compat.uninstall()


# The parts of a real one that the tests need: laid out as release 2.1.0, with 1.0.0's modeling.mhc.
REAL = {
    "__init__.py": "from . import mhc, modeling, quant, torch",
    "config.py": "MARK = 'real config'",
    "mhc/__init__.py": "from .post_kernel import MARK",
    "mhc/post_kernel.py": "MARK = 'real post'",
    "mhc/post_cuda.py": "MARK = 'real post_cuda'",
    "modeling/__init__.py": "from . import engram, mhc",
    "modeling/engram.py": "MARK = 'real engram'",
    "modeling/mhc.py": "MARK = 'real calls'",
    "quant/__init__.py": "from tile_kernels.config import MARK",
    # A name that ours does not have, taken while the real package is imported.
    "torch/__init__.py": "from .mhc import partials_ref\nfrom . import cast",
    "torch/cast.py": "MARK = 'real cast'",
    "torch/mhc.py": "def partials_ref(): return 'real partials'",
}


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.fixture
def real_package(monkeypatch, tmp_path):
    """A real tile_kernels, importable; returns its folder."""
    forget(monkeypatch, "tile_kernels")
    write_package(tmp_path / "tile_kernels", REAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "tile_kernels"
    compat.uninstall()
    for name in [n for n in sys.modules if n.partition(".")[0] == "tile_kernels"]:
        del sys.modules[name]


def state_of(name: str) -> dict[str, tuple[object, dict[str, object]]]:
    """The imported modules below `name`, and what each holds."""
    return {
        n: (module, dict(vars(module)))
        for n, module in sys.modules.items()
        if n.partition(".")[0] == name
    }


@pytest.mark.parametrize("path", INTERFACE)
def test_signatures(path: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{path}")
    found = {name: plain_signature(getattr(module, name)) for name in INTERFACE[path]}
    assert found == INTERFACE[path]


def test_switches_are_also_at_the_top() -> None:
    assert {name: plain_signature(getattr(compat, name)) for name in SWITCHES} == SWITCHES


def test_mhc_has_the_plain_functions_alone() -> None:
    assert set(compat.mhc.__all__) == INTERFACE["mhc"].keys()


@pytest.mark.parametrize("stem", AUTOGRAD_NAMES)
def test_autograd_names(stem: str) -> None:
    name, signature = AUTOGRAD_NAMES[stem]
    module = importlib.import_module(f"{PACKAGE}.modeling.mhc.ops.{stem}")
    assert plain_signature(getattr(module, name).apply) == signature


@pytest.mark.parametrize("path", INTERFACE)
def test_alias_is_the_same_module(alias: None, path: str) -> None:
    assert importlib.import_module(f"tile_kernels.{path}") is importlib.import_module(
        f"{PACKAGE}.{path}"
    )


def test_import_statements(alias: None) -> None:
    import tile_kernels.modeling.mhc.ops as ops
    from tile_kernels.modeling import mhc
    from tile_kernels.modeling.mhc.ops.sinkhorn import sinkhorn_normalize

    assert ops.sinkhorn_normalize is sinkhorn_normalize
    assert ops.__name__ == f"{PACKAGE}.modeling.mhc.ops"
    assert mhc.mhc_pre.__module__ == f"{PACKAGE}.modeling.mhc.functional"
    with pytest.raises(ModuleNotFoundError, match=r"tile_kernels\.quant"):
        importlib.import_module("tile_kernels.quant")


def test_install_twice_and_uninstall(no_real_package: None) -> None:
    compat.install()
    compat.install()
    assert sys.modules["tile_kernels"] is compat
    compat.uninstall()
    compat.uninstall()
    assert not [name for name in sys.modules if name.partition(".")[0] == "tile_kernels"]


def test_install_refuses_to_hide_a_package(real_package) -> None:
    with pytest.raises(RuntimeError, match=r"install: .*force=True.*got the one at .*__init__\.py"):
        compat.install()
    assert "tile_kernels" not in sys.modules
    importlib.import_module("tile_kernels.quant")
    with pytest.raises(RuntimeError, match=r"install: .*force=True.*got the one at .*__init__\.py"):
        compat.install()
    assert importlib.import_module("tile_kernels.modeling.mhc").MARK == "real calls"


def test_force_replaces_the_mhc_modules_only(real_package) -> None:
    compat.install(force=True)
    import tile_kernels.mhc.post_kernel
    import tile_kernels.modeling.mhc.ops as ops
    from tile_kernels.modeling import engram, mhc
    from tile_kernels.torch import cast, partials_ref
    from tile_kernels.torch.mhc import mhc_post_ref

    assert tile_kernels.__file__ == str(real_package / "__init__.py")
    assert tile_kernels.mhc.post_kernel is compat.mhc.post_kernel
    assert tile_kernels.modeling.mhc.ops is ops is compat.modeling.mhc.ops
    assert mhc is compat.modeling.mhc
    assert mhc_post_ref is compat.torch.mhc_post_ref
    assert engram.MARK == "real engram"
    assert cast.MARK == "real cast"
    assert partials_ref() == "real partials"
    assert importlib.import_module("tile_kernels.quant").MARK == "real config"
    assert importlib.import_module("tile_kernels.config").MARK == "real config"
    with pytest.raises(ModuleNotFoundError, match=r"tile_kernels\.mhc\.post_cuda"):
        importlib.import_module("tile_kernels.mhc.post_cuda")


@pytest.mark.parametrize("missing", ["modeling/mhc.py", "torch/mhc.py", "modeling", "torch"])
def test_force_where_the_real_one_lacks_a_part(real_package, missing) -> None:
    """Release 2.1.0 has no modeling.mhc."""
    path = real_package / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    name = missing.partition("/")[0]
    (real_package / "__init__.py").write_text("from . import quant\n")
    if path.suffix:
        (real_package / name / "__init__.py").write_text("MARK = 'real package'\n")
    compat.install(force=True)
    for part in ("modeling.mhc.functional", "torch.mhc", "mhc.post_kernel"):
        ours = importlib.import_module(f"{PACKAGE}.{part}")
        assert importlib.import_module(f"tile_kernels.{part}") is ours
    real = importlib.import_module("tile_kernels")
    assert real.quant.MARK == "real config"
    assert getattr(real, name).mhc is getattr(compat, name).mhc
    assert getattr(getattr(real, name), "MARK", None) == ("real package" if path.suffix else None)
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError, match=rf"tile_kernels\.{name}"):
        importlib.import_module(f"tile_kernels.{name}.mhc")
    assert not hasattr(getattr(real, name, None), "mhc")


def test_uninstall_restores_exactly(real_package) -> None:
    importlib.import_module("tile_kernels.mhc.post_cuda")
    before = state_of("tile_kernels")
    compat.install(force=True)
    assert sys.modules["tile_kernels.mhc"] is compat.mhc
    importlib.import_module("tile_kernels.mhc.post_kernel")
    compat.uninstall()
    assert state_of("tile_kernels") == before
    compat.uninstall()
    assert state_of("tile_kernels") == before


def test_a_real_package_that_does_not_import_is_hidden(real_package) -> None:
    """B6: as TileKernels 1.0.0 beside tilelang 0.1.15."""
    (real_package / "quant" / "__init__.py").write_text("raise OSError('no library')\n")
    compat.install(force=True)
    assert sys.modules["tile_kernels"] is compat
    with pytest.raises(ModuleNotFoundError, match=r"tile_kernels\.quant"):
        importlib.import_module("tile_kernels.quant")
    compat.uninstall()
    with pytest.raises(OSError, match="no library"):
        importlib.import_module("tile_kernels")


def test_an_imported_package_comes_back(no_real_package: None, monkeypatch) -> None:
    """Modules made by hand, that no import would find again."""
    real = type(sys)("tile_kernels")
    child = type(sys)("tile_kernels.quant")
    monkeypatch.setitem(sys.modules, "tile_kernels", real)
    monkeypatch.setitem(sys.modules, "tile_kernels.quant", child)
    before = state_of("tile_kernels")

    with pytest.raises(RuntimeError, match=r"install: .*got the one at an unknown place"):
        compat.install()
    compat.install(force=True)
    assert sys.modules["tile_kernels"] is real
    assert sys.modules["tile_kernels.quant"] is child
    assert importlib.import_module("tile_kernels.modeling.mhc") is compat.modeling.mhc
    compat.uninstall()
    assert state_of("tile_kernels") == before


def test_install_from_many_threads(real_package) -> None:
    """One install, whoever comes first; afterwards one uninstall undoes it."""
    importlib.import_module("tile_kernels")
    before = state_of("tile_kernels")
    barrier = threading.Barrier(4)

    def install() -> object:
        barrier.wait()
        compat.install(force=True)
        return sys.modules["tile_kernels.modeling.mhc"]

    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            found = [future.result() for future in [pool.submit(install) for _ in range(4)]]
        assert all(module is compat.modeling.mhc for module in found)
        compat.uninstall()
        assert state_of("tile_kernels") == before


def test_imports_in_a_fresh_process() -> None:
    """B6: TileKernels 1.0.0 does not import beside tilelang 0.1.15; this needs no tilelang."""
    paths = ", ".join(f"tile_kernels.{path}" for path in INTERFACE)
    code = (
        "import sys; sys.modules['tilelang'] = None\n"
        f"import {PACKAGE} as compat\ncompat.install(force=True)\nimport {paths}\n"
    )
    status, _, err = fresh.run(code)
    assert status == 0, err
