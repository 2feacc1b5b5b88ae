"""The table of kernels: which module builds each, for which ops, and with which arguments.

Adding a kernel means adding one line to SPECS: `tile-mhc compile`, the CI compile and the spill
check then cover it.
"""

import importlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tile_mhc.errors import MAX_HIDDEN, PARAMETER_DTYPES, STREAM_DTYPES, SUPPORTED_STREAMS
from tile_mhc.kernels._shapes import HISTORY_STEP, NO_TENSOR, TABLE_SLOTS

Arguments = tuple[int | str, ...]

# What `tile-mhc compile` takes; sm_90a and sm_100a are the ones compiled in CI. Not sm_80 to
# sm_89, where TileLang 0.1.15 does not lower the projection's pipelines, nor sm_120a, where its
# 217 KiB of shared memory exceed a CTA's 99.
ARCHS = ("sm_90a", "sm_100a", "sm_103a")


# The dtypes of streams and parameters where nothing else is asked for.
DTYPE = "bfloat16"
PARAMETERS = ("float32",)


class Sizes(NamedTuple):
    """What a user chooses.

    Attributes:
        n: the number of streams.
        hidden: the width of one.
        repeat: how often Sinkhorn normalises.
        dtype: of the streams.
        parameters: the dtypes that each parameter may have, on its own.
    """

    n: int
    hidden: int
    repeat: int = HISTORY_STEP
    dtype: str = DTYPE
    parameters: tuple[str, ...] = PARAMETERS

    @property
    def mixes(self) -> int:
        return self.n * (self.n + 2)

    @property
    def capacity(self) -> int:
        return -(-self.repeat // HISTORY_STEP) * HISTORY_STEP


@dataclass(frozen=True)
class Spec:
    """One kernel.

    Attributes:
        name: the builder's name, and the kernel's name in messages and tables.
        stem: the builder's module, `tile_mhc.kernels.<stem>`.
        ops: the public functions that launch it.
        arguments: the builder's argument tuples for given sizes.
    """

    name: str
    stem: str
    ops: tuple[str, ...]
    arguments: Callable[[Sizes], list[Arguments]]


def _n(s: Sizes) -> list[Arguments]:
    return [(s.n,)]


def _streams(s: Sizes) -> list[Arguments]:
    return [(s.n, s.hidden, s.dtype)]


def _gates(s: Sizes) -> list[Arguments]:
    """The dtypes of scale and bias, each on its own."""
    return list(itertools.product(s.parameters, repeat=2))


def _n_gates(s: Sizes) -> list[Arguments]:
    return [(s.n, *gates) for gates in _gates(s)]


def _streams_gates(s: Sizes) -> list[Arguments]:
    return [(*_streams(s)[0], *gates) for gates in _gates(s)]


def _column_sums(s: Sizes) -> list[Arguments]:
    # One column a bias and a scale.
    return [(*count, *gates) for count in ((s.mixes, 3), (s.n, 1)) for gates in _gates(s)]


def _posts(s: Sizes) -> list[Arguments]:
    # Without a bias, and with one.
    return [(*_streams(s)[0], bias) for bias in (NO_TENSOR, *s.parameters)]


def _projections(s: Sizes) -> list[Arguments]:
    # n(n+2) mixes before a sub-layer, and the n mixes of the readout.
    return [(s.mixes, s.n * s.hidden), (s.n, s.n * s.hidden)]


def _projection_norm_backwards(s: Sizes) -> list[Arguments]:
    # Alone, and with the aggregate of the same streams.
    size = s.n * s.hidden
    return [(s.mixes, size, 0), (s.n, size, 0), (s.mixes, size, s.n), (s.n, size, s.n)]


def _projection_backwards(s: Sizes) -> list[Arguments]:
    # With the aggregate also on top of a gradient that the streams have.
    alone = [(*sizes, False) for sizes in _projection_norm_backwards(s)]
    return [*alone, (s.mixes, s.n * s.hidden, s.n, True)]


def _with_parameters(arguments: Callable[[Sizes], list[Arguments]]) -> Callable[..., Any]:
    """For kernels that read the weight: it alone, and with a norm weight."""
    kinds: list[Arguments] = [(), ("float32", "float32")]
    return lambda s: [(*sizes, *kind) for sizes in arguments(s) for kind in kinds]


_PROJECTION = ("projection", "contract", "fused_pre")

SPECS = (
    Spec("expand_fwd", "expand", ("expand",), _streams),
    Spec("expand_bwd", "expand", ("expand",), _streams),
    Spec("projection_fwd", "projection", _PROJECTION, _with_parameters(_projections)),
    Spec("projection_norm", "projection", ("projection",), _with_parameters(_projections)),
    Spec("projection_norm_bwd", "projection", _PROJECTION, _projection_norm_backwards),
    Spec("projection_bwd", "projection", _PROJECTION, _with_parameters(_projection_backwards)),
    Spec("projection_weight_bwd", "projection", _PROJECTION, _with_parameters(_projections)),
    Spec("split_mixes_fwd", "mixes", ("split_mixes", "fused_pre"), _n_gates),
    Spec("split_mixes_bwd", "mixes", ("split_mixes", "fused_pre"), _n_gates),
    Spec(
        "column_sums",
        "mixes",
        ("split_mixes", "contract", "head_mix", "fused_pre"),
        _column_sums,
    ),
    Spec("sinkhorn_fwd", "sinkhorn", ("sinkhorn",), _n),
    Spec("sinkhorn_bwd", "sinkhorn", ("sinkhorn", "fused_pre"), lambda s: [(s.n, s.capacity)]),
    Spec("aggregate_fwd", "aggregate", ("aggregate",), _streams),
    Spec("aggregate_bwd", "aggregate", ("aggregate",), _streams),
    Spec("aggregate_mix_bwd", "aggregate", ("fused_pre", "contract"), _streams),
    Spec("post_fwd", "post", ("post",), _posts),
    Spec("post_bwd", "post", ("post",), _posts),
    Spec("post_bias_bwd", "post", ("post",), lambda s: [(s.hidden, p) for p in s.parameters]),
    Spec("head_mix_fwd", "contract", ("head_mix", "contract"), _n_gates),
    Spec("head_mix_bwd", "contract", ("head_mix", "contract"), _n_gates),
    Spec("contract_fwd", "contract", ("contract",), _with_parameters(_streams_gates)),
    Spec("fused_pre", "fused_pre", ("fused_pre",), _with_parameters(_streams_gates)),
    Spec("recompute", "recompute", ("recompute",), _streams),
    Spec("recompute_table", "recompute", ("recompute",), lambda _: [(TABLE_SLOTS,)]),
)

_BY_NAME = {spec.name: spec for spec in SPECS}
OPS = tuple(sorted({op for spec in SPECS for op in spec.ops}))


def builder(name: str) -> Callable[..., Any]:
    """The function that turns a kernel's arguments into a TileLang prim_func; imports TileLang."""
    if name not in _BY_NAME:
        raise ValueError(f"kernel: name must be one of {', '.join(_BY_NAME)}; got {name!r}")
    module = importlib.import_module(f"tile_mhc.kernels.{_BY_NAME[name].stem}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def select(sizes: Iterable[Sizes], ops: Iterable[str] = OPS) -> list[tuple[str, Arguments]]:
    """Every kernel that `ops` launch at `sizes`, each once, in the order of the table."""
    sizes, ops = list(sizes), set(ops)
    return list(
        dict.fromkeys(
            (spec.name, args)
            for spec in SPECS
            if ops.intersection(spec.ops)
            for size in sizes
            for args in spec.arguments(size)
        )
    )


def device_functions() -> set[str]:
    """The names of our kernels in device code, read from their sources without importing them."""
    spec = importlib.util.find_spec("tile_mhc.kernels")
    folders = (spec.submodule_search_locations if spec else None) or []
    sources = [path.read_text() for folder in folders for path in Path(folder).glob("*.py")]
    prim_funcs = re.findall(r"@T\.prim_func\s+def (\w+)\(", "\n".join(sources))
    # TileLang names the device function after the prim_func.
    return {f"{name}_kernel" for name in prim_funcs}


def compile_command(name: str, args: Arguments, arch: str) -> str | None:
    """The command line that puts this kernel into the cache; None where the table has no entry."""
    spec = _BY_NAME[name]
    for size in _sizes_of(name, args):
        if args in spec.arguments(size):
            command = f"tile-mhc compile --arch {arch} --hidden {size.hidden} --streams {size.n}"
            if size.repeat != HISTORY_STEP:
                command += f" --repeat {size.repeat}"
            if size.dtype != DTYPE:
                command += f" --dtype {size.dtype}"
            if size.parameters != PARAMETERS:
                command += f" --param-dtype {','.join(size.parameters)}"
            return f"{command} --ops {spec.ops[0]}"
    return None


def _sizes_of(name: str, args: Arguments) -> Iterator[Sizes]:
    """Every choice that may give these arguments, the defaults first."""
    numbers = [arg for arg in args if isinstance(arg, int)]
    words = {arg for arg in args if isinstance(arg, str)}
    repeats = {HISTORY_STEP, numbers[-1]} if name == "sinkhorn_bwd" else {HISTORY_STEP}
    dtypes = [DTYPE, *words.intersection(STREAM_DTYPES.values())]
    one_each = [(dtype,) for dtype in PARAMETER_DTYPES.values()]
    for n in SUPPORTED_STREAMS:
        # A kernel has H, n*H, or neither.
        widths = [64, *numbers, *(number // n for number in numbers)]
        hidden = [width for width in widths if 0 < width <= MAX_HIDDEN]
        choices = (hidden, repeats, dtypes, [*one_each, tuple(PARAMETER_DTYPES.values())])
        yield from (Sizes(n, *choice) for choice in itertools.product(*choices))
