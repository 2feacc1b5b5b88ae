"""The table of kernels against the code: builders, launches, and the four places of a stem."""

import ast
import inspect
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import tile_mhc
from tile_mhc import specs
from tile_mhc.kernels._arch import ARCHITECTURES, HOPPER
from tile_mhc.kernels._dtypes import Dtypes, split_arguments
from tile_mhc.kernels._shapes import BACKWARD_TOKENS, BLOCK_K
from tile_mhc.ops import recompute
from tile_mhc.ops._library import dtypes

ROOT = Path(__file__).resolve().parents[2]
DIRECTED = [specs.Sizes(4, 320, grads=("float32", "bfloat16"))]
SIZES = [
    specs.Sizes(2, 64),
    specs.Sizes(4, 1280),
    specs.Sizes(8, 7168, 40),
    specs.Sizes(2, 33, dtype="float16"),
    specs.Sizes(4, 5129, dtype="float32", parameters=("bfloat16",)),
    specs.Sizes(8, 1),
    *DIRECTED,
    specs.Sizes(2, 35, dtype="float16", parameters=("bfloat16",), grads=("float32",)),
]
# The first have no kernel of `projection_any`, only n = 4 has TransformerEngine's, and only several
# CTAs a token those of `pre_cluster`.
ONE_OF_EACH = specs.select([SIZES[0], specs.Sizes(2, 33), specs.Sizes(4, 64), specs.Sizes(4, 256)])
KERNELS = specs.select(SIZES)
# A quarter of a second each: the smallest, the widest, and what only other dtypes bring.
TRACED = specs.select([SIZES[0], *SIZES[2:5]])
TRACED += [k for k in specs.select(DIRECTED) if k not in specs.select([specs.Sizes(4, 320)])]
# Files of kernels below kernels/mhc and of ops below tile_mhc/ops, without their suffix.
MODULES = sorted({spec.module.replace(".", "/") for spec in specs.SPECS})
# Kernels that the op of another module launches, for what its own do not take.
LAUNCHED_BY = {"projection_any": "projection"}
PUBLIC = [op for op in specs.OPS if op not in specs.COMPAT]
# Modules of ops that launch no kernel of their own.
SHARED = {
    "transformer_engine/reference",
    "tile_kernels/norm_fn",
    "tile_kernels/outputs",
    "tile_kernels/reference",
}


def launches():
    """(kernel name, number of arguments) of every jit.kernel("name", ...) in the ops.

    Without the words of the dtypes, which come last.
    """
    for path in sorted((ROOT / "tile_mhc" / "ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jit.kernel":
                assert isinstance(node.args[0], ast.Constant), f"{path.name}: name it literally"
                sizes = [arg for arg in node.args[1:] if not isinstance(arg, ast.Starred)]
                yield node.args[0].value, len(sizes)


def test_every_launch_is_in_the_table_and_the_other_way_round():
    assert {name for name, _ in launches()} == {spec.name for spec in specs.SPECS}


def test_launches_pass_as_many_arguments_as_the_table():
    table = {name: len(split_arguments(args)[0]) for name, args in ONE_OF_EACH}
    for name, count in launches():
        assert count == table[name], name


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_first_waits_for_the_one_before(module):
    """It may have been launched while that one still runs: an earlier access would be a race.

    A launch beside that one waits at last: all tensors of such a kernel are early ones.
    """
    path = ROOT / "kernels" / "mhc" / f"{module}.py"
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    kernels = [
        (function, node.body)
        for function in functions
        for node in function.body
        if isinstance(node, ast.With) and "T.Kernel(" in ast.unparse(node.items[0])
    ]
    assert len(kernels) == path.read_text().count("with T.Kernel(") > 0
    for function, body in kernels:
        statements = [ast.unparse(statement) for statement in body]
        if "follow_previous_unless(beside)" in statements:
            waits = statements.index("follow_previous_at_last(beside)")
            assert waits == len(statements) - 1, function.name
        else:
            waits = statements.index("follow_previous()")
        before = {
            node.id
            for statement in body[:waits]
            for node in ast.walk(statement)
            if isinstance(node, ast.Name)
        }
        tensors = {a.arg for a in function.args.args if "T.Tensor" in ast.unparse(a.annotation)}
        spec = specs.BY_NAME.get(function.name.removesuffix("_kernel"))
        assert before & tensors == set(spec.early if spec else ()), function.name


def test_what_kernels_take_is_within_the_limits_of_the_architecture():
    for limits in ARCHITECTURES.values():
        for taken in (limits.matmul_bytes, limits.history_bytes, limits.ring_bytes):
            assert taken <= limits.shared_bytes < limits.shared_bytes_per_sm
        assert BLOCK_K % limits.matmul_columns == 0
        assert BACKWARD_TOKENS % limits.matmul_tokens == 0
        assert limits.kept_bytes < limits.l2_bytes < limits.last_read_bytes
        for ctas in (limits.post_ctas, limits.interleaved_post_ctas, limits.any_ctas):
            assert limits.post_ctas_of_eight <= ctas <= limits.ctas


def test_two_generations_of_clusters_make_the_same_choices():
    """What was measured on Hopper counts where an SM has the same limits."""
    own = {"l2_bytes": 0, "has_wgmma": False}
    rows = [asdict(replace(ARCHITECTURES[arch], **own)) for arch in ("sm_90a", "sm_100a")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("arch", specs.ARCHS)
def test_kernels_of_an_architecture(arch):
    """One row says what is launched there, and what its kernels are made of."""
    limits = ARCHITECTURES[arch]
    kernels = specs.select([specs.Sizes(4, 4096), specs.Sizes(8, 4096)], arch=arch)
    names = {name for name, _ in kernels}
    assert ("contract_cluster_bwd" in names) == (limits.ring_bytes > 0)
    assert ("post_pre_fwd" in names) == ("delayed_pre_bwd" in names) == limits.has_one_pass
    assert specs.compile_command("expand_fwd", (4, 64), arch) == (
        f"tile-mhc compile --arch {arch} --hidden 64 --streams 4 --ops expand"
    )
    for name in ("expand_fwd", "projection_fwd"):
        args = next(args for kernel, args in kernels if kernel == name)
        text = specs.builder(name)(*args, arch=arch).script()
        assert ("pdl_sync" in text) == limits.has_tma
    assert ("fence_proxy_async" in text) == limits.has_tma


def test_a_builder_is_told_the_limits_of_the_architecture(monkeypatch):
    assert (HOPPER.warps(48), HOPPER.warps(255)) == (40, 8)
    few = replace(HOPPER, matmul_bytes=HOPPER.matmul_bytes // 2)
    monkeypatch.setitem(ARCHITECTURES, "sm_few", few)
    texts = [
        specs.builder("projection_fwd")(24, 256, arch=a).script() for a in ("sm_90a", "sm_few")
    ]
    stages = [int(re.search(r"num_stages\W+(\d+)", text)[1]) for text in texts]
    assert stages[0] > stages[1] > 0


def test_names_are_unique():
    names = [spec.name for spec in specs.SPECS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_places(module):
    op, stem = LAUNCHED_BY.get(module, module), Path(module).name
    for place in (f"kernels/mhc/{module}.py", f"tile_mhc/ops/{op}.py", f"tests/gpu/test_{stem}.py"):
        assert (ROOT / place).is_file(), f"{module} lacks {place}"


@pytest.mark.parametrize("folder", ["kernels/mhc", "tile_mhc/ops"])
def test_every_module_is_in_the_table(folder):
    paths = [path for path in (ROOT / folder).rglob("*.py") if path.name[0] != "_"]
    found = {path.relative_to(ROOT / folder).with_suffix("").as_posix() for path in paths}
    if folder == "tile_mhc/ops":
        assert found == {*MODULES, *SHARED} - LAUNCHED_BY.keys()
    else:
        assert found == set(MODULES)


def test_ops_are_public():
    assert set(PUBLIC) <= set(tile_mhc.__all__)
    assert all(callable(getattr(tile_mhc, op)) for op in PUBLIC)


@pytest.mark.parametrize("spec", specs.SPECS, ids=lambda spec: spec.name)
def test_a_builder_takes_the_arguments_of_the_table(spec):
    builder = specs.builder(spec.name)
    assert builder.__module__ == f"tile_mhc.kernels.{spec.module}"
    for size in SIZES:
        for args in spec.arguments(size):
            numbers, words = split_arguments(args)
            dtypes = {f"{name}_dtype" for name in Dtypes.parse(words).given}
            parameters = inspect.signature(builder).parameters.values()
            names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            assert list(spec.numbers) == names
            assert len(numbers) == len(names)
            assert dtypes <= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            assert isinstance(specs.pass_configs(spec.name, args), dict)


def test_how_a_kernel_is_compiled_may_depend_on_its_arguments():
    few, many = (specs.pass_configs("fused_pre", (4, 256, splits)) for splits in (False, True))
    assert few != many
    assert few == specs.pass_configs("aggregate_last_fwd", (4, 256))
    assert many == specs.pass_configs("aggregate_fwd", (4, 256))


@pytest.mark.parametrize(("name", "args"), TRACED, ids=str)
def test_a_builder_elaborates(name, args):
    """Tracing alone, no compiler: type and shape mistakes show here for every size."""
    func = specs.builder(name)(*args)
    # `tile-mhc clean` recognises our cache entries by this name.
    assert f"{func.attrs['global_symbol']}_kernel" in specs.device_functions()


@pytest.mark.parametrize(("name", "args"), KERNELS, ids=str)
def test_the_command_compiles_the_kernel(name, args):
    words = shlex.split(specs.compile_command(name, args, "sm_90a"))
    assert words[:4] == ["tile-mhc", "compile", "--arch", "sm_90a"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    size = specs.Sizes(
        int(options["--streams"]),
        int(options["--hidden"]),
        int(options.get("--repeat", 1)),
        options.get("--dtype", "bfloat16"),
        tuple(options.get("--param-dtype", "float32").split(",")),
        tuple(options["--grad-dtype"].split(",")) if "--grad-dtype" in options else (),
    )
    assert (name, args) in specs.select([size], [options["--ops"]])


def test_the_command_for_parameters_of_two_dtypes():
    dtypes = Dtypes(streams="float16", weight="bfloat16", norm_weight="float32", bias="bfloat16")
    command = specs.compile_command("fused_pre", (4, 100, False, *dtypes.words), "sm_90a")
    assert command == (
        "tile-mhc compile --arch sm_90a --hidden 100 --streams 4 --dtype float16 "
        "--param-dtype float32,bfloat16 --ops fused_pre"
    )


def test_dtypes_that_are_defaults_are_left_out():
    assert Dtypes().words == ()
    assert Dtypes(streams="bfloat16", weight="float32", norm_weight="").words == ()
    words = ("streams=float16", "layer_bias=bfloat16")
    assert Dtypes(layer_bias="bfloat16", streams="float16").words == words
    assert dtypes(layer_bias=torch.bfloat16, streams=torch.float16, held=None) == words


def test_dtypes_come_back_from_their_words():
    for _, args in KERNELS:
        _, words = split_arguments(args)
        assert Dtypes.parse(words).words == words


def test_a_builder_refuses_the_dtype_of_a_tensor_that_its_kernel_does_not_have():
    with pytest.raises(TypeError, match="expand_fwd: has no dtype of weight"):
        specs.builder("expand_fwd")(4, 64, "weight=bfloat16")


def test_a_projection_has_one_kind_of_kernels():
    fast = {name for name, _ in specs.select([specs.Sizes(4, 64)], ["projection"])}
    other = {name for name, _ in specs.select([specs.Sizes(4, 65)], ["projection"])}
    shared = {"projection_norm", "projection_norm_bwd", "projection_weight_bwd"}
    assert fast & other == shared
    for size in (specs.Sizes(4, 64, dtype="float16"), specs.Sizes(4, 64, dtype="float32")):
        assert {name for name, _ in specs.select([size], ["projection"])} == other


def test_no_command_for_what_no_size_gives():
    assert specs.compile_command("expand_fwd", (3, 64), "sm_90a") is None


def test_select_names_each_kernel_once():
    chosen = specs.select([*SIZES, *SIZES])
    assert len(chosen) == len(set(chosen)) == len(KERNELS)


def test_select_takes_only_the_ops_asked_for():
    assert specs.select([specs.Sizes(4, 64)], ["expand"]) == [
        ("expand_fwd", (4, 64)),
        ("expand_bwd", (4, 64)),
    ]


def test_the_gate_of_the_readout_is_an_op_of_its_own():
    assert specs.select([specs.Sizes(4, 64)], ["head_mix"]) == [
        ("column_sums", (24, 3, False)),
        ("column_sums", (8, 2, False)),
        ("column_sums", (4, 1, False)),
        ("head_mix_fwd", (4,)),
        ("head_mix_bwd", (4,)),
    ]


def test_every_public_op_can_be_compiled():
    others = {"recompute_group", "warm_up", "without_main_grad"}
    ops = {name for name in tile_mhc.__all__ if name[0].islower()} - others
    assert set(PUBLIC) == ops


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r"kernel: name must be one of expand_fwd, .*got 'nope'"):
        specs.builder("nope")


def test_constants_agree_with_the_ops():
    assert specs.TABLE_SLOTS == recompute.TABLE_SLOTS


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels" / "mhc").rglob("*.py")), ids=lambda p: p.stem
)
def test_kernels_import_no_layer_above_them(path):
    allowed = (
        "tilelang",
        "tile_mhc.kernels",
        "collections.abc",
        "contextvars",
        "dataclasses",
        "functools",
        "inspect",
        "math",
        "typing",
    )
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"imports {name}"
