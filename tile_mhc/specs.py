"""The table of kernels: which module builds each, for which ops, and with which arguments.

Adding a kernel means adding one line to SPECS: `tile-mhc compile`, the CI compile and the spill
check then cover it.
"""

import functools
import importlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tile_mhc import errors
from tile_mhc.errors import MAX_HIDDEN, SUPPORTED_STREAMS
from tile_mhc.kernels._shapes import FAST_HIDDEN, HISTORY_STEP, TABLE_SLOTS, cluster_size

Arguments = tuple[int | str, ...]

# What `tile-mhc compile` takes; sm_90a and sm_100a are the ones compiled in CI. Not sm_80 to
# sm_89, where TileLang 0.1.15 does not lower the projection's pipelines, nor sm_120a, where its
# 217 KiB of shared memory exceed a CTA's 99.
ARCHS = ("sm_90a", "sm_100a", "sm_103a")


# The dtypes of streams and parameters where nothing else is asked for.
DTYPE = "bfloat16"
PARAMETER = "float32"
PARAMETERS = (PARAMETER,)
# And all that there are.
STREAMS = tuple(map(errors.dtype_name, errors.STREAMS))
EVERY_PARAMETER = tuple(map(errors.dtype_name, errors.PARAMETERS))


class Sizes(NamedTuple):
    """What a user chooses.

    Attributes:
        n: the number of streams.
        hidden: the width of one.
        repeat: how often Sinkhorn normalises.
        dtype: of the streams.
        parameters: the dtypes that each parameter may have, on its own.
        grads: those that gradient accumulators, or every main_grad, may have.
    """

    n: int
    hidden: int
    repeat: int = HISTORY_STEP
    dtype: str = DTYPE
    parameters: tuple[str, ...] = PARAMETERS
    grads: tuple[str, ...] = ()

    @property
    def mixes(self) -> int:
        return self.n * (self.n + 2)

    @property
    def capacity(self) -> int:
        return -(-self.repeat // HISTORY_STEP) * HISTORY_STEP


def dtypes(*given: tuple[str, str]) -> tuple[str, ...]:
    """The trailing arguments of a builder from (dtype, the builder's default) of each.

    Those up to the last that is no default: a kernel has one key.
    """
    count = max((i + 1 for i, (dtype, default) in enumerate(given) if dtype != default), default=0)
    return tuple(dtype for dtype, _ in given[:count])


@functools.cache
def stream_dtypes(dtype: str) -> tuple[str, ...]:
    return dtypes((dtype, DTYPE))


@functools.cache
def parameter_dtypes(dtype: str) -> tuple[str, ...]:
    return dtypes((dtype, PARAMETER))


@functools.cache
def directed_dtypes(dtype: str, into: str) -> tuple[str, ...]:
    return dtypes((dtype, DTYPE), (into, ""))


@functools.cache
def post_dtypes(dtype: str, bias: str, into: str = "") -> tuple[str, ...]:
    return dtypes((dtype, DTYPE), (bias, ""), (into, ""))


@functools.cache
def gate_dtypes(scale: str, bias: str) -> tuple[str, ...]:
    return dtypes((scale, PARAMETER), (bias, PARAMETER))


@functools.cache
def sums_dtypes(scale: str, bias: str, directed: bool) -> Arguments:
    return (scale, bias, directed) if directed else gate_dtypes(scale, bias)


@functools.cache
def weight_dtypes(weight: str, norm_weight: str, *into: str) -> tuple[str, ...]:
    return dtypes((weight, PARAMETER), (norm_weight, ""), *((dtype, "") for dtype in into))


@functools.cache
def norm_dtypes(weight: str, norm_weight: str, dtype: str) -> tuple[str, ...]:
    return dtypes((weight, PARAMETER), (norm_weight, ""), (dtype, DTYPE))


@functools.cache
def pre_dtypes(dtype: str, weight: str, norm_weight: str, scale: str, bias: str) -> tuple[str, ...]:
    return dtypes(
        (weight, PARAMETER),
        (norm_weight, ""),
        (dtype, DTYPE),
        (scale, PARAMETER),
        (bias, PARAMETER),
    )


@functools.cache
def readout_dtypes(weight: str, norm_weight: str, scale: str, bias: str) -> tuple[str, ...]:
    return dtypes((weight, PARAMETER), (norm_weight, ""), (scale, PARAMETER), (bias, PARAMETER))


@dataclass(frozen=True)
class Spec:
    """One kernel.

    Attributes:
        name: the builder's name, and the kernel's name in messages and tables.
        stem: the builder's module, `tile_mhc.kernels.<stem>`.
        ops: the public functions that launch it.
        arguments: the builder's argument tuples for given sizes.
        early: the tensors that it reads beside the kernel before it, which never writes them: see
            `follow_previous` of the kernels.
    """

    name: str
    stem: str
    ops: tuple[str, ...]
    arguments: Callable[[Sizes], list[Arguments]]
    early: tuple[str, ...] = ()


def _n(s: Sizes) -> list[Arguments]:
    return [(s.n,)]


def _steps(s: Sizes) -> list[Arguments]:
    return [(s.n, s.capacity)]


def _streams(s: Sizes) -> list[Arguments]:
    return [(s.n, s.hidden, *stream_dtypes(s.dtype))]


def _gated(sizes: Arguments, s: Sizes) -> list[Arguments]:
    """With the dtypes of scale and bias, each on its own."""
    return [(*sizes, *gate_dtypes(*gates)) for gates in itertools.product(s.parameters, repeat=2)]


def _n_gates(s: Sizes) -> list[Arguments]:
    return _gated((s.n,), s)


def _column_sums(s: Sizes) -> list[Arguments]:
    # One column a bias and a scale.
    counts = ((s.mixes, 3), (s.n, 1))
    grads = _main_grads(s)
    directed = [(*count, *sums_dtypes(grad, grad, True)) for count in counts for grad in grads]
    return [*(args for count in counts for args in _gated(count, s)), *directed]


def _main_grads(s: Sizes) -> list[str]:
    return [grad for grad in s.grads if grad in EVERY_PARAMETER]


def _accumulators(s: Sizes) -> list[str]:
    return [grad for grad in s.grads if grad in ("float32", s.dtype)]


def _aggregate_backwards(s: Sizes) -> list[Arguments]:
    # To autograd, and into an accumulator.
    return [(s.n, s.hidden, *directed_dtypes(s.dtype, into)) for into in ("", *_accumulators(s))]


def _posts(s: Sizes) -> list[Arguments]:
    # Without a bias, and with one.
    return [(s.n, s.hidden, *post_dtypes(s.dtype, bias)) for bias in ("", *s.parameters)]


def _post_backwards(s: Sizes) -> list[Arguments]:
    choices = itertools.product(("", *s.parameters), ("", *_accumulators(s)))
    return [(s.n, s.hidden, *post_dtypes(s.dtype, *choice)) for choice in choices]


def _post_biases(s: Sizes) -> list[Arguments]:
    return [(s.hidden, *parameter_dtypes(bias)) for bias in s.parameters]


def _parameters(s: Sizes) -> list[tuple[str, ...]]:
    """The dtypes of the weight, without and with a norm weight, scale and bias."""
    return list(itertools.product(s.parameters, ("", *s.parameters), s.parameters, s.parameters))


def _pres(s: Sizes) -> list[Arguments]:
    """What reads the streams and all parameters."""
    sizes = [(s.n, s.hidden, many_splits) for many_splits in (False, True)]
    dtypes_of = [pre_dtypes(s.dtype, *choice) for choice in _parameters(s)]
    return [(*size, *given) for size in sizes for given in dtypes_of]


def _clusters(backward: bool) -> Callable[[Sizes], list[Arguments]]:
    """The same for the readout in one pass, where it has a kernel."""

    def of(s: Sizes) -> list[Arguments]:
        if s.dtype != DTYPE or not cluster_size(s.n, s.hidden, backward):
            return []
        return [(s.n, s.hidden, *readout_dtypes(*choice)) for choice in _parameters(s)]

    return of


def _projections(s: Sizes) -> list[Arguments]:
    # n(n+2) mixes before a sub-layer, and the n mixes of the readout.
    return [(s.mixes, s.n * s.hidden), (s.n, s.n * s.hidden)]


def _projection_norms(s: Sizes) -> list[Arguments]:
    """With few splits of K, and with so many that threads share the sum over them."""
    choices = itertools.product(_projections(s), (False, True), s.parameters, ("", *s.parameters))
    return [
        (*sizes, many_splits, *norm_dtypes(weight, norm, s.dtype))
        for sizes, many_splits, weight, norm in choices
    ]


def _projection_readers(s: Sizes) -> list[Arguments]:
    # Alone, and with the aggregate of the same streams: contract's where it makes two passes.
    size = s.n * s.hidden
    readers: list[Arguments] = [(s.mixes, size, 0), (s.n, size, 0), (s.mixes, size, s.n)]
    return readers if _clusters(backward=True)(s) else [*readers, (s.n, size, s.n)]


def _projection_norm_backwards(s: Sizes) -> list[Arguments]:
    # Into an accumulator contract always makes two.
    directed: list[Arguments] = [(s.n, s.n * s.hidden, s.n)] if _accumulators(s) else []
    return [*_projection_readers(s), *directed]


def _has_te(s: Sizes) -> bool:
    """What TransformerEngine has: n = 4, and no float16."""
    return s.n == 4 and s.dtype != "float16"


def _projection_backwards(s: Sizes) -> list[Arguments]:
    # With the aggregate also on top of a gradient that the streams have; alone on top of a buffer.
    size = s.n * s.hidden
    plain = [(*sizes, "") for sizes in _projection_readers(s)]
    buffered = [(s.mixes, size, 0, "float32")] if _has_te(s) else []
    return [*plain, (s.mixes, size, s.n, s.dtype), *buffered]


def _directed_projection_backwards(s: Sizes, into: str) -> list[Arguments]:
    # projection and contract: the first writes to an accumulator, others add.
    size = s.n * s.hidden
    readers = ((s.mixes, size, 0), (s.n, size, s.n))
    return [(*reader, held) for reader in readers for held in ("", into)]


def _has_fast_projection(s: Sizes) -> bool:
    return s.dtype == DTYPE and s.hidden % FAST_HIDDEN == 0


Choice = Callable[[Sizes], list[Arguments]]


def _fast(arguments: Choice) -> Choice:
    """For kernels that read the weight of a fast projection: it alone, and with a norm weight."""
    return lambda s: _with_weights(arguments(s), s) if _has_fast_projection(s) else []


def _into_accumulator(arguments: Choice) -> Choice:
    """Also those that leave the gradient of the streams in an accumulator."""

    def of(s: Sizes) -> list[Arguments]:
        plain = arguments(s)
        dtypes = _accumulators(s) if plain else []
        streams = () if _has_fast_projection(s) else (s.dtype,)
        for into in dtypes:
            sizes = [(*size, *streams) for size in _directed_projection_backwards(s, into)]
            plain = plain + _with_weights(sizes, s, into)
        return plain

    return of


def _into_main_grad(arguments: Choice) -> Choice:
    """Also those that leave the gradient of the weight, and of a norm weight, in main_grad."""

    def of(s: Sizes) -> list[Arguments]:
        plain = arguments(s)
        grads = _main_grads(s) if plain else []
        return plain + [args for g in grads for args in _with_weights(_projections(s), s, g, g)]

    return of


def _any(arguments: Choice) -> Choice:
    """The same for those that take any dtype of streams, which comes first, and any width."""

    def of(s: Sizes) -> list[Arguments]:
        sizes = [(*size, s.dtype) for size in arguments(s)]
        return [] if _has_fast_projection(s) else _with_weights(sizes, s)

    return of


def _with_weights(sizes: list[Arguments], s: Sizes, *into: str) -> list[Arguments]:
    kinds = list(itertools.product(s.parameters, ("", *s.parameters)))
    # The second destination is that of the norm weight.
    return [
        (*size, *weight_dtypes(*kind, *(into if kind[1] else into[:1])))
        for size in sizes
        for kind in kinds
    ]


_PROJECTION = ("projection", "contract", "fused_pre")


def _of_te(arguments: Callable[[Sizes], list[Arguments]]) -> Callable[..., Any]:
    """For kernels behind compat.transformer_engine alone."""
    return lambda s: arguments(s) if _has_te(s) else []


@_of_te
def _interleaved(s: Sizes) -> list[Arguments]:
    return [(s.n, s.hidden, s.dtype)]


@_of_te
def _interleaved_posts(s: Sizes) -> list[Arguments]:
    # The layer's output in the dtype of the streams; without a bias, and with one.
    return [(*sizes, s.dtype, bias) for sizes in _interleaved(s) for bias in ("", *s.parameters)]


def _with_buffer(arguments: Callable[[Sizes], list[Arguments]]) -> Callable[..., Any]:
    """The gradient of the streams in their dtype, and in a float32 buffer."""
    return lambda s: [(*a, g) for a in arguments(s) for g in dict.fromkeys((s.dtype, "float32"))]


@_of_te
def _padded_projections(s: Sizes) -> list[Arguments]:
    return [(s.mixes, s.n * s.hidden)]


@_of_te
def _padded_mixes(s: Sizes) -> list[Arguments]:
    return [(s.n, *gates) for gates in itertools.product(s.parameters, repeat=2)]


_TE = ("transformer_engine",)

SPECS = (
    Spec("expand_fwd", "expand", ("expand",), _streams),
    Spec("expand_bwd", "expand", ("expand",), _streams),
    Spec("projection_fwd", "projection", (*_PROJECTION, *_TE), _fast(_projections)),
    Spec("projection_norm", "projection", ("projection",), _projection_norms),
    Spec("projection_norm_bwd", "projection", _PROJECTION, _projection_norm_backwards),
    Spec(
        "projection_bwd",
        "projection",
        (*_PROJECTION, *_TE),
        _into_accumulator(_fast(_projection_backwards)),
        early=("weight", "norm_weight"),
    ),
    Spec(
        "projection_weight_bwd",
        "projection",
        (*_PROJECTION, *_TE),
        _into_main_grad(lambda s: _with_weights(_projections(s), s)),
    ),
    Spec("projection_any_fwd", "projection_any", (*_PROJECTION, *_TE), _any(_projections)),
    Spec(
        "projection_any_bwd",
        "projection_any",
        (*_PROJECTION, *_TE),
        _into_accumulator(_any(_projection_backwards)),
        early=("weight", "norm_weight"),
    ),
    Spec("split_mixes_fwd", "mixes", ("split_mixes", "fused_pre"), _n_gates),
    Spec("split_mixes_bwd", "mixes", ("split_mixes", "fused_pre"), _n_gates),
    Spec(
        "column_sums",
        "mixes",
        ("split_mixes", "contract", "head_mix", "fused_pre", *_TE),
        _column_sums,
    ),
    Spec("sinkhorn_fwd", "sinkhorn", ("sinkhorn",), _n),
    Spec("sinkhorn_bwd", "sinkhorn", ("sinkhorn", "fused_pre"), _steps),
    Spec("aggregate_fwd", "aggregate", ("aggregate",), _streams),
    Spec("aggregate_last_fwd", "aggregate", ("aggregate",), _streams),
    Spec("aggregate_bwd", "aggregate", ("aggregate",), _aggregate_backwards),
    Spec(
        "aggregate_mix_bwd",
        "aggregate",
        ("fused_pre", "contract"),
        _streams,
        early=("grad", "residual"),
    ),
    Spec("post_fwd", "post", ("post",), _posts),
    Spec("post_bwd", "post", ("post",), _post_backwards),
    Spec("post_bias_bwd", "post", ("post", *_TE), _post_biases),
    Spec("head_mix_fwd", "contract", ("head_mix", "contract"), _n_gates),
    Spec("head_mix_bwd", "contract", ("head_mix", "contract"), _n_gates),
    Spec("contract_fwd", "contract", ("contract",), _pres),
    Spec("contract_cluster_fwd", "contract_cluster", ("contract",), _clusters(backward=False)),
    Spec("contract_cluster_bwd", "contract_cluster", ("contract",), _clusters(backward=True)),
    Spec("fused_pre", "fused_pre", ("fused_pre",), _pres),
    Spec("interleaved_aggregate_fwd", "interleaved_aggregate", _TE, _interleaved),
    Spec("interleaved_aggregate_bwd", "interleaved_aggregate", _TE, _with_buffer(_interleaved)),
    Spec("interleaved_post_fwd", "interleaved_post", _TE, _interleaved_posts),
    Spec("interleaved_post_bwd", "interleaved_post", _TE, _with_buffer(_interleaved_posts)),
    Spec("padded_projection_fwd", "padded_projection", _TE, _padded_projections),
    Spec("padded_projection_pack", "padded_projection", _TE, _padded_projections),
    Spec("padded_mixes_fwd", "padded_mixes", _TE, _padded_mixes),
    Spec("padded_mixes_bwd", "padded_mixes", _TE, _padded_mixes),
    Spec("log_sinkhorn_fwd", "log_sinkhorn", ("sinkhorn", "fused_pre", *_TE), _n),
    Spec("log_sinkhorn_bwd", "log_sinkhorn", ("sinkhorn", "fused_pre", *_TE), _steps),
    Spec("recompute", "recompute", ("recompute",), _streams),
    Spec("recompute_table", "recompute", ("recompute",), lambda _: [(TABLE_SLOTS,)]),
)

BY_NAME = {spec.name: spec for spec in SPECS}
OPS = tuple(sorted({op for spec in SPECS for op in spec.ops}))


def builder(name: str) -> Callable[..., Any]:
    """The function that turns a kernel's arguments into a TileLang prim_func; imports TileLang."""
    if name not in BY_NAME:
        raise ValueError(f"kernel: name must be one of {', '.join(BY_NAME)}; got {name!r}")
    module = importlib.import_module(f"tile_mhc.kernels.{BY_NAME[name].stem}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def pass_configs(name: str, args: Arguments) -> dict[str, Any]:
    """What TileLang is told to do with this kernel, by its builder: fixed, or by the arguments."""
    configs = builder(name).pass_configs  # type: ignore[attr-defined]
    chosen = configs(*args) if callable(configs) else configs
    return {key.value: value for key, value in chosen.items()}


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
    spec = BY_NAME[name]
    for size in _sizes_of(name, args):
        if args in spec.arguments(size):
            command = f"tile-mhc compile --arch {arch} --hidden {size.hidden} --streams {size.n}"
            if size.repeat != HISTORY_STEP:
                command += f" --repeat {size.repeat}"
            if size.dtype != DTYPE:
                command += f" --dtype {size.dtype}"
            if size.parameters != PARAMETERS:
                command += f" --param-dtype {','.join(size.parameters)}"
            if size.grads:
                command += f" --grad-dtype {','.join(size.grads)}"
            return f"{command} --ops {spec.ops[0]}"
    return None


def _sizes_of(name: str, args: Arguments) -> Iterator[Sizes]:
    """Every choice that may give these arguments, the defaults first."""
    numbers = [arg for arg in args if type(arg) is int]  # a flag is none
    words = [arg for arg in args if isinstance(arg, str)]
    repeats = {HISTORY_STEP, numbers[-1]} if name.endswith("sinkhorn_bwd") else {HISTORY_STEP}
    streams = [DTYPE, *(word for word in words if word in STREAMS)]
    parameters = [*((dtype,) for dtype in EVERY_PARAMETER), EVERY_PARAMETER]
    grads: list[tuple[str, ...]] = [(), *((word,) for word in STREAMS)]
    for n in SUPPORTED_STREAMS:
        # A kernel has H, n*H, or neither.
        widths = [64, *numbers, *(number // n for number in numbers)]
        hidden = [width for width in widths if 0 < width <= MAX_HIDDEN]
        choices = (hidden, repeats, streams, parameters, grads)
        yield from (Sizes(n, *choice) for choice in itertools.product(*choices))
