"""TileKernels' names, argument orders, defaults and module paths, and the import alias."""

import importlib
import importlib.util
import inspect
import subprocess
import sys

import pytest

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
    "mhc_pre_norm_fn_ref": NORM_FN,
    "mhc_pre_split_mixes_ref": SPLIT,
    "sinkhorn_normalize_ref": SINKHORN,
}


def pick(*names: str) -> dict[str, str]:
    return {name: OPS[name] for name in names}


INTERFACE = {
    "config": {
        "get_device_num_sms": "",
        "get_max_smem_per_sm": "",
        "get_num_sms": "",
        "set_num_sms": "num_sms",
    },
    "mhc.expand_kernel": {
        "expand_to_mhc_bwd_tl": "hidden, mhc_mult",
        "expand_to_mhc_fwd_tl": "hidden, mhc_mult",
    },
    "mhc.multilayer_recompute_kernel": pick("mhc_multilayer_recompute"),
    "mhc.norm_fn_kernel": {"round_to_tf32": "x"},
    "mhc.post_kernel": pick("mhc_post_fwd", "mhc_post_bwd"),
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


@pytest.fixture
def alias():
    """`tile_kernels` is ours inside the test, whether a real one is installed or not."""
    compat.install(force=True)
    yield
    compat.uninstall()


@pytest.fixture
def no_real_package(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tile_kernels" else find_spec(name, *rest),
    )
    for name in [n for n in sys.modules if n.partition(".")[0] == "tile_kernels"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("path", INTERFACE)
def test_signatures(path: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{path}")
    found = {name: plain_signature(getattr(module, name)) for name in INTERFACE[path]}
    assert found == INTERFACE[path]


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


def test_install_refuses_to_hide_a_package(no_real_package: None, monkeypatch, tmp_path) -> None:
    folder = tmp_path / "tile_kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("MARK = 1\n")
    spec = importlib.util.spec_from_file_location("tile_kernels", folder / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: spec)

    with pytest.raises(RuntimeError, match=r"install: .*force=True.*got the one at .*__init__\.py"):
        compat.install()
    assert "tile_kernels" not in sys.modules

    compat.install(force=True)
    assert sys.modules["tile_kernels"] is compat
    compat.uninstall()
    assert "tile_kernels" not in sys.modules


def test_an_imported_package_comes_back(no_real_package: None, monkeypatch) -> None:
    real = type(sys)("tile_kernels")
    child = type(sys)("tile_kernels.quant")
    monkeypatch.setitem(sys.modules, "tile_kernels", real)
    monkeypatch.setitem(sys.modules, "tile_kernels.quant", child)

    with pytest.raises(RuntimeError, match="install: "):
        compat.install()
    compat.install(force=True)
    assert sys.modules["tile_kernels"] is compat
    assert "tile_kernels.quant" not in sys.modules
    compat.uninstall()
    assert sys.modules["tile_kernels"] is real
    assert sys.modules["tile_kernels.quant"] is child


def test_imports_in_a_fresh_process() -> None:
    """B6: TileKernels 1.0.0 does not import beside tilelang 0.1.15; this needs no tilelang."""
    paths = ", ".join(f"tile_kernels.{path}" for path in INTERFACE)
    code = (
        "import sys; sys.modules['tilelang'] = None\n"
        f"import {PACKAGE} as compat\ncompat.install(force=True)\nimport {paths}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
