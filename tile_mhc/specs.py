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

import torch

from tile_mhc import errors, selection
from tile_mhc.errors import MAX_HIDDEN, SUPPORTED_STREAMS
from tile_mhc.kernels._arch import ARCHITECTURES, DEFAULT, Architecture
from tile_mhc.kernels._dtypes import Dtypes, split_arguments
from tile_mhc.kernels._shapes import HISTORY_STEP, TABLE_SLOTS

Arguments = tuple[int | str, ...]

# What `tile-mhc compile` takes; CI compiles every kernel for sm_90a and sm_100a, and for the others
# once a week: see scripts/check.sh.
ARCHS = tuple(ARCHITECTURES)


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
        arch: what it is to run on; `select` fills it in.
    """

    n: int
    hidden: int
    repeat: int = HISTORY_STEP
    dtype: str = DTYPE
    parameters: tuple[str, ...] = PARAMETERS
    grads: tuple[str, ...] = ()
    arch: str = DEFAULT

    @property
    def limits(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    @property
    def mixes(self) -> int:
        return self.n * (self.n + 2)

    @property
    def capacity(self) -> int:
        return selection.history_capacity(self.repeat)


def _kernel(*numbers: int, **dtypes: str) -> Arguments:
    """A builder's arguments, with its dtypes by the names of `Dtypes`."""
    return (*numbers, *Dtypes(**dtypes).words)


@dataclass(frozen=True)
class Spec:
    """One kernel.

    Attributes:
        name: the builder's name, and the kernel's name in messages and tables.
        stem: the name of the builder's module; see `module` for its package.
        ops: the public functions that launch it.
        numbers: the names of what its builder takes before the dtypes.
        arguments: the builder's argument tuples for given sizes.
        early: the tensors that it reads beside the kernel before it, which never writes them, and
            those that it writes, of which that one has none: see `follow_previous` of the kernels.
    """

    name: str
    stem: str
    ops: tuple[str, ...]
    numbers: tuple[str, ...]
    arguments: Callable[[Sizes], list[Arguments]]
    early: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The builder's module within `tile_mhc.kernels`; the same within `tile_mhc.ops`.

        What nothing but another library's functions launches has a package of its own.
        """
        package = self.ops[0]
        return f"{package}.{self.stem}" if self.ops in (_TE, _TK) else self.stem


def _n(s: Sizes) -> list[Arguments]:
    return [(s.n,)]


def _steps(s: Sizes) -> list[Arguments]:
    return [(s.n, s.capacity)]


def _streams(s: Sizes) -> list[Arguments]:
    return [_kernel(s.n, s.hidden, streams=s.dtype)]


def _gates(s: Sizes, *numbers: int) -> list[Arguments]:
    """With the dtypes of scale and bias, each on its own."""
    choices = itertools.product(s.parameters, repeat=2)
    return [_kernel(*numbers, scale=scale, bias=bias) for scale, bias in choices]


def _n_gates(s: Sizes) -> list[Arguments]:
    return _gates(s, s.n)


def _has_gates_at_once(s: Sizes) -> bool:
    return selection.has_gates_at_once(s.n, s.repeat, 1.0, s.limits)


def _is_one_pass(s: Sizes) -> bool:
    return selection.is_one_pass(getattr(torch, s.dtype), s.n, s.hidden, None, s.limits)


def _of_gates_at_once(
    arguments: Callable[[Sizes], list[Arguments]],
) -> Callable[[Sizes], list[Arguments]]:
    """Where one kernel takes the gradients of all gates, with some eps."""
    return lambda s: arguments(s) if _has_gates_at_once(s) else []


@_of_gates_at_once
def _gates_at_once(s: Sizes) -> list[Arguments]:
    return _gates(s, s.n, s.capacity)


def _column_sums(s: Sizes) -> list[Arguments]:
    # One column a bias and a scale.
    counts = ((s.mixes, 3), (2 * s.n, 2), (s.n, 1))
    directed = [
        _kernel(*count, True, scale=grad, bias=grad) for count in counts for grad in _main_grads(s)
    ]
    return [*(args for count in counts for args in _gates(s, *count, False)), *directed]


def _main_grads(s: Sizes) -> list[str]:
    return [grad for grad in s.grads if grad in EVERY_PARAMETER]


def _accumulators(s: Sizes) -> list[str]:
    return [grad for grad in s.grads if grad in ("float32", s.dtype)]


def _aggregate_backwards(s: Sizes) -> list[Arguments]:
    # To autograd, and into an accumulator.
    targets = ("", *_accumulators(s))
    return [_kernel(s.n, s.hidden, streams=s.dtype, into=into) for into in targets]


def _posts(s: Sizes) -> list[Arguments]:
    # Without a bias, and with one.
    biases = ("", *s.parameters)
    return [_kernel(s.n, s.hidden, streams=s.dtype, layer_bias=bias) for bias in biases]


def _post_backwards(s: Sizes) -> list[Arguments]:
    # Of few tokens none with a bias.
    few = [_kernel(s.n, s.hidden, True, streams=s.dtype, into=i) for i in ("", *_accumulators(s))]
    return [(n, h, False, *words) for n, h, *words in _identity_post_backwards(s)] + few


def _identity_post_backwards(s: Sizes) -> list[Arguments]:
    choices = itertools.product(("", *s.parameters), ("", *_accumulators(s)))
    return [
        _kernel(s.n, s.hidden, streams=s.dtype, layer_bias=bias, into=into)
        for bias, into in choices
    ]


def _post_biases(s: Sizes) -> list[Arguments]:
    return [_kernel(s.hidden, layer_bias=bias) for bias in s.parameters]


def _input_norms(s: Sizes) -> list[Arguments]:
    return [_kernel(s.hidden, streams=s.dtype, layer_norm=norm) for norm in s.parameters]


def _one_pass(arguments: Callable[[Sizes], list[Arguments]]) -> Callable[[Sizes], list[Arguments]]:
    """For what a given pre_mix has in one pass over the streams."""

    def of(s: Sizes) -> list[Arguments]:
        return arguments(s) if _is_one_pass(s) else []

    return of


@_one_pass
def _weight_parts(s: Sizes) -> list[Arguments]:
    return [_kernel(s.mixes, s.n * s.hidden, **weights) for weights in _weights(s)]


@_one_pass
def _delayed_backwards(s: Sizes) -> list[Arguments]:
    return [_kernel(s.hidden, **weights) for weights in _weights(s)]


@_one_pass
def _delayed_add_backwards(s: Sizes) -> list[Arguments]:
    return [_kernel(s.hidden, **weights, held=s.dtype) for weights in _weights(s)]


def _pass_backwards(s: Sizes) -> list[Arguments]:
    # Alone, and on top of a gradient that the streams have.
    return [*_delayed_backwards(s), *_delayed_add_backwards(s)]


@_one_pass
def _delayed_sums(s: Sizes) -> list[Arguments]:
    # Of pre_mix alone, and of all mixes of a boundary.
    counts = (s.n, s.mixes)
    directed = [
        _kernel(count, s.hidden, True, scale=grad, bias=grad)
        for count in counts
        for grad in _main_grads(s)
    ]
    return [*(args for count in counts for args in _gates(s, count, s.hidden, False)), *directed]


@_one_pass
def _passes(s: Sizes) -> list[Arguments]:
    # The weight split by a kernel before, or by the pass itself.
    return [(s.hidden, False), *(_kernel(s.hidden, True, **weights) for weights in _weights(s))]


def _delayed_mixes(s: Sizes) -> list[Arguments]:
    """As `_fused_pres`; with a norm only where one pass is before them."""
    return _fused_pres(s) if _is_one_pass(s) else _pres(s)


def _weights(s: Sizes) -> list[dict[str, str]]:
    """The dtypes of the weight, without and with a norm weight."""
    choices = itertools.product(s.parameters, ("", *s.parameters))
    return [{"weight": weight, "norm_weight": norm} for weight, norm in choices]


def _parameters(s: Sizes) -> list[dict[str, str]]:
    """The same with those of scale and bias."""
    gates = itertools.product(s.parameters, repeat=2)
    choices = itertools.product(_weights(s), gates)
    return [{**weights, "scale": scale, "bias": bias} for weights, (scale, bias) in choices]


def _pres(s: Sizes) -> list[Arguments]:
    """What reads the streams and all parameters, with few splits of K and with many."""
    return [
        _kernel(s.n, s.hidden, many_splits, streams=s.dtype, **dtypes)
        for many_splits in (False, True)
        for dtypes in _parameters(s)
    ]


def _fused_pres(s: Sizes) -> list[Arguments]:
    """As `_pres`, and with a norm of the layer input too."""
    return [
        _kernel(s.n, s.hidden, many_splits, streams=s.dtype, **dtypes, layer_norm=norm)
        for many_splits in (False, True)
        for dtypes in _parameters(s)
        for norm in ("", *s.parameters)
    ]


def _clusters(backward: bool) -> Callable[[Sizes], list[Arguments]]:
    """The same for the readout in one pass, where it has a kernel."""

    def of(s: Sizes) -> list[Arguments]:
        if not selection.reads_once(getattr(torch, s.dtype), s.n, s.hidden, backward, s.limits):
            return []
        return [_kernel(s.n, s.hidden, **dtypes) for dtypes in _parameters(s)]

    return of


def _pre_clusters(s: Sizes) -> list[Arguments]:
    """All of a pre in one pass, with the post before it and without, with a given pre_mix and
    without, where it has a kernel."""
    dtype = getattr(torch, s.dtype)
    return [
        _kernel(s.hidden, has_post, delayed, **dtypes)
        for has_post, delayed in itertools.product((False, True), repeat=2)
        if selection.has_pre_cluster(dtype, s.n, s.hidden, has_post, delayed, s.limits)
        for dtypes in _parameters(s)
    ]


@_one_pass
def _few_projects(s: Sizes) -> list[Arguments]:
    """Without a post, and with one; by how many streams a warp has, which of all four collapses."""
    choices = itertools.product((False, True), _few_shares(), _weights(s))
    return [
        _kernel(s.hidden, has_post, own, collapses, **weights)
        for has_post, (own, collapses), weights in choices
    ]


def _few_shares() -> list[tuple[int, bool]]:
    one, every = selection.FEW_STREAMS
    return [(one, False), (every, False), (every, True)]


@_one_pass
def _few_pres(s: Sizes) -> list[Arguments]:
    """With a given pre_mix and without, with a norm of the layer input and without."""
    return [
        _kernel(s.hidden, delayed, collapsed, **dtypes, layer_norm=norm)
        for delayed, collapsed in ((False, False), (True, False), (True, True))
        for dtypes in _parameters(s)
        for norm in ("", *s.parameters)
    ]


def _identity_gates(s: Sizes) -> list[Arguments]:
    # Where it makes two passes, as it does into an accumulator.
    twice = selection.identity_reads_twice(getattr(torch, s.dtype), s.n, s.hidden, True, s.limits)
    return _n_gates(s) if twice or _accumulators(s) else []


def _identity_forwards(s: Sizes) -> list[Arguments]:
    """Of streams that are not mixed in one pass, where it has a kernel."""
    of = getattr(torch, s.dtype), s.n, s.hidden, False, False, s.limits
    if not selection.identity_reads_once(*of):
        return []
    return [_kernel(s.hidden, **dtypes) for dtypes in _parameters(s)]


def _identity_backwards(s: Sizes) -> list[Arguments]:
    # Alone, and on top of a gradient that the streams have.
    of = getattr(torch, s.dtype), s.n, s.hidden, True
    return [
        _kernel(s.hidden, **dtypes, held=held)
        for held in ("", s.dtype)
        if selection.identity_reads_once(*of, held != "", s.limits)
        for dtypes in _parameters(s)
    ]


def _projections(s: Sizes) -> list[tuple[int, ...]]:
    # n(n+2) mixes before a sub-layer, and the n mixes of the readout.
    return [(s.mixes, s.n * s.hidden), (s.n, s.n * s.hidden)]


def _all_projections(s: Sizes) -> list[tuple[int, ...]]:
    # And the 2n mixes of streams that are not mixed, which are n(n+2) of no other n.
    return [*_projections(s), (2 * s.n, s.n * s.hidden)]


def _projection_norms(s: Sizes) -> list[Arguments]:
    """With few splits of K, and with so many that threads share the sum over them."""
    choices = itertools.product(_projections(s), (False, True), _weights(s))
    return [
        _kernel(*numbers, many_splits, streams=s.dtype, **weights)
        for numbers, many_splits, weights in choices
    ]


def _projection_readers(s: Sizes) -> list[tuple[int, ...]]:
    # Alone, and with the aggregate of the same streams: contract's where it makes two passes.
    size = s.n * s.hidden
    readers: list[tuple[int, ...]] = [(s.mixes, size, 0), (s.n, size, 0), (s.mixes, size, s.n)]
    return readers if _clusters(backward=True)(s) else [*readers, (s.n, size, s.n)]


def _projection_norm_backwards(s: Sizes) -> list[Arguments]:
    # Into an accumulator contract always makes two.
    directed: list[Arguments] = [(s.n, s.n * s.hidden, s.n)] if _accumulators(s) else []
    return [*_projection_readers(s), *directed]


def _has_te(s: Sizes) -> bool:
    """What TransformerEngine has: n = 4, and no float16."""
    return s.n == 4 and s.dtype != "float16"


def _has_fast_projection(s: Sizes) -> bool:
    return selection.is_fast(getattr(torch, s.dtype), s.hidden)


def _fast(arguments: Callable[[Sizes], list[Arguments]]) -> Callable[[Sizes], list[Arguments]]:
    """For the kernels of `projection` alone, which take bfloat16 streams in whole pieces."""
    return lambda s: arguments(s) if _has_fast_projection(s) else []


def _any(arguments: Callable[[Sizes], list[Arguments]]) -> Callable[[Sizes], list[Arguments]]:
    """For those of `projection_any`, which take what the others do not."""
    return lambda s: [] if _has_fast_projection(s) else arguments(s)


def _projection_forwards(s: Sizes) -> list[Arguments]:
    choices = itertools.product(_all_projections(s), _weights(s))
    return [_kernel(*numbers, streams=s.dtype, **weights) for numbers, weights in choices]


def _projection_backwards(s: Sizes) -> list[Arguments]:
    # With the aggregate also on top of a gradient that the streams have; alone on top of a buffer.
    size = s.n * s.hidden
    choices = [(numbers, "", "") for numbers in _projection_readers(s)]
    choices.append(((s.mixes, size, s.n), s.dtype, ""))
    if _has_te(s):
        choices.append(((s.mixes, size, 0), "float32", ""))
    # That of streams that are not mixed, alone and with what they have, where it makes two passes.
    identity = (2 * s.n, size, s.n)
    dtype = getattr(torch, s.dtype)
    choices += [
        (identity, held, "")
        for held in ("", s.dtype)
        if selection.identity_reads_twice(dtype, s.n, s.hidden, held != "", s.limits)
    ]
    # Into an accumulator these two and projection: the first writes to it, others add.
    for into in _accumulators(s):
        readers = ((s.mixes, size, 0), (s.n, size, s.n), identity)
        choices += [(numbers, held, into) for numbers in readers for held in ("", into)]
    return [
        _kernel(*numbers, streams=s.dtype, **weights, held=held, into=into)
        for numbers, held, into in choices
        for weights in _weights(s)
    ]


def _projection_weight_backwards(s: Sizes) -> list[Arguments]:
    # To autograd, and into main_grad, also that of a norm weight.
    choices = itertools.product(("", *_main_grads(s)), _all_projections(s), _weights(s))
    return [
        _kernel(
            *numbers,
            **weights,
            into_weight=into,
            into_norm_weight=into if weights["norm_weight"] else "",
        )
        for into, numbers, weights in choices
    ]


_GATED = ("projection", "contract", "fused_pre", "post_pre")
_PROJECTION = (*_GATED, "identity_pre")


def _of_te(arguments: Callable[[Sizes], list[Arguments]]) -> Callable[[Sizes], list[Arguments]]:
    """For kernels behind compat.transformer_engine alone."""
    return lambda s: arguments(s) if _has_te(s) else []


# Of TransformerEngine's kernels: the gradient of the streams in their dtype, and in its buffer.
def _buffers(s: Sizes) -> list[str]:
    return [""] if s.dtype == "float32" else ["", "float32"]


@_of_te
def _interleaved(s: Sizes) -> list[Arguments]:
    return _streams(s)


@_of_te
def _interleaved_backwards(s: Sizes) -> list[Arguments]:
    return [_kernel(s.n, s.hidden, streams=s.dtype, into=into) for into in _buffers(s)]


def _interleaved_layers(s: Sizes) -> list[dict[str, str]]:
    # The layer's output in the dtype of the streams; without a bias, and with one.
    biases = ("", *s.parameters)
    return [{"streams": s.dtype, "layer_output": s.dtype, "layer_bias": bias} for bias in biases]


@_of_te
def _interleaved_posts(s: Sizes) -> list[Arguments]:
    return [_kernel(s.n, s.hidden, **dtypes) for dtypes in _interleaved_layers(s)]


@_of_te
def _interleaved_post_backwards(s: Sizes) -> list[Arguments]:
    choices = itertools.product(_interleaved_layers(s), _buffers(s))
    return [_kernel(s.n, s.hidden, **dtypes, into=into) for dtypes, into in choices]


@_of_te
def _padded_projections(s: Sizes) -> list[Arguments]:
    return [(s.mixes, s.n * s.hidden)]


@_of_te
def _padded_mixes(s: Sizes) -> list[Arguments]:
    return _n_gates(s)


def _partials_norms(s: Sizes) -> list[Arguments]:
    # Of one group, as DeepSeek's models have it.
    return [(s.mixes, 1), (s.n, 1)]


def _weights_of_a_norm(s: Sizes) -> list[Arguments]:
    return [_kernel(*numbers) for numbers in _projections(s)]


def _exact_sums(s: Sizes) -> list[Arguments]:
    return _gates(s, s.mixes, 3)


def _partials_pres(s: Sizes) -> list[Arguments]:
    return [
        _kernel(s.n, s.hidden, streams=s.dtype, scale=scale, bias=bias)
        for scale, bias in itertools.product(s.parameters, repeat=2)
    ]


# The numbers of builders.
_N = ("n",)
_STEPS = ("n", "capacity")
_STREAMS = ("n", "hidden_size")
_CHANNELS = ("n", "channels")
_MATMUL = ("num_mixes", "size")
_READER = ("num_mixes", "size", "n")
_NORM = ("num_mixes", "size", "many_splits")
_PRE = ("n", "hidden_size", "many_splits")
_PASS = ("hidden_size", "splits_weight")

_TE = ("transformer_engine",)
_TK = ("tile_kernels",)
# What functions under another library's names launch goes by the name of the library.
COMPAT = (*_TE, *_TK)
_PRE_OPS = ("fused_pre", "post_pre")

SPECS = (
    Spec("expand_fwd", "expand", ("expand", *_TK), _STREAMS, _streams),
    Spec("expand_bwd", "expand", ("expand", *_TK), _STREAMS, _streams),
    Spec(
        "projection_fwd", "projection", (*_PROJECTION, *_TE), _MATMUL, _fast(_projection_forwards)
    ),
    Spec("projection_norm", "projection", ("projection",), _NORM, _projection_norms),
    Spec("projection_norm_bwd", "projection", _GATED, _READER, _projection_norm_backwards),
    Spec(
        "projection_bwd",
        "projection",
        (*_PROJECTION, *_TE),
        _READER,
        _fast(_projection_backwards),
        early=("weight", "norm_weight", "x", "grad_input"),
    ),
    Spec(
        "projection_weight_bwd",
        "projection",
        (*_PROJECTION, *_TE),
        _MATMUL,
        _projection_weight_backwards,
    ),
    Spec(
        "projection_any_fwd",
        "projection_any",
        (*_PROJECTION, *_TE),
        _MATMUL,
        _any(_projection_forwards),
    ),
    Spec(
        "projection_any_bwd",
        "projection_any",
        (*_PROJECTION, *_TE),
        _READER,
        _any(_projection_backwards),
        early=("weight", "norm_weight"),
    ),
    Spec("split_mixes_fwd", "mixes", ("split_mixes", *_PRE_OPS, *_TK), _N, _n_gates),
    Spec("split_mixes_bwd", "mixes", ("split_mixes", *_PRE_OPS), _N, _n_gates),
    Spec(
        "column_sums",
        "mixes",
        ("split_mixes", "contract", "head_mix", *_PRE_OPS, "identity_pre", *_TE),
        ("biases", "scales", "directed"),
        _column_sums,
        early=("partials", "grad_bias", "grad_scale"),
    ),
    Spec("sinkhorn_fwd", "sinkhorn", ("sinkhorn", *_TK), _N, _n),
    Spec("sinkhorn_bwd", "sinkhorn", ("sinkhorn", *_PRE_OPS, *_TK), _STEPS, _steps),
    Spec(
        "gates_bwd",
        "gates",
        ("fused_pre", "post_pre"),
        _STEPS,
        _gates_at_once,
        early=("grad_post", "grad_comb", "mixes", "inv_rms", "scale", "bias"),
    ),
    Spec("delayed_gates_bwd", "gates", ("fused_pre", "post_pre"), _STEPS, _gates_at_once),
    Spec("aggregate_fwd", "aggregate", ("aggregate", *_PRE_OPS, *_TK), _STREAMS, _streams),
    Spec("aggregate_last_fwd", "aggregate", ("aggregate", *_PRE_OPS, *_TK), _STREAMS, _streams),
    Spec("aggregate_bwd", "aggregate", ("aggregate", *_TK), _STREAMS, _aggregate_backwards),
    Spec(
        "aggregate_mix_bwd",
        "aggregate",
        ("fused_pre", "contract", "post_pre"),
        _STREAMS,
        _streams,
        early=("grad", "residual"),
    ),
    Spec(
        "aggregate_mix_first_bwd",
        "aggregate",
        ("fused_pre", "post_pre", "identity_pre"),
        _STREAMS,
        _streams,
    ),
    Spec("post_fwd", "post", ("post", "post_pre", *_TK), _STREAMS, _posts),
    Spec(
        "post_bwd",
        "post",
        ("post", "post_pre", *_TK),
        ("n", "hidden_size", "few_tokens"),
        _post_backwards,
    ),
    Spec(
        "post_bias_bwd",
        "post",
        ("post", "post_pre", "identity_post", *_TE),
        ("hidden_size",),
        _post_biases,
    ),
    Spec("identity_pre_fwd", "identity_pre", ("identity_pre",), _PRE, _pres),
    Spec("identity_gates_bwd", "identity_pre", ("identity_pre",), _N, _identity_gates),
    Spec(
        "identity_cluster_fwd",
        "identity_cluster",
        ("identity_pre",),
        ("hidden_size",),
        _identity_forwards,
    ),
    Spec(
        "identity_cluster_bwd",
        "identity_cluster",
        ("identity_pre",),
        ("hidden_size",),
        _identity_backwards,
    ),
    Spec("identity_post_fwd", "identity_post", ("identity_post",), _STREAMS, _posts),
    Spec(
        "identity_post_bwd",
        "identity_post",
        ("identity_post",),
        _STREAMS,
        _identity_post_backwards,
    ),
    Spec("stream_mean_fwd", "stream_mean", ("stream_mean",), _STREAMS, _streams),
    Spec("stream_mean_bwd", "stream_mean", ("stream_mean",), _STREAMS, _streams),
    Spec("head_mix_fwd", "head_mix", ("head_mix", "contract", *_TK), _N, _n_gates),
    Spec("head_mix_bwd", "head_mix", ("head_mix", "contract"), _N, _n_gates),
    Spec("contract_fwd", "contract", ("contract",), _PRE, _pres),
    Spec(
        "contract_cluster_fwd",
        "contract_cluster",
        ("contract",),
        _STREAMS,
        _clusters(backward=False),
    ),
    Spec(
        "contract_cluster_bwd",
        "contract_cluster",
        ("contract",),
        _STREAMS,
        _clusters(backward=True),
    ),
    Spec("fused_pre", "fused_pre", _PRE_OPS, _PRE, _fused_pres),
    Spec(
        "pre_cluster_fwd",
        "pre_cluster",
        _PRE_OPS,
        ("hidden_size", "has_post", "delayed"),
        _pre_clusters,
    ),
    Spec("delayed_mixes", "delayed_pre", _PRE_OPS, _PRE, _delayed_mixes),
    Spec("weight_parts", "delayed_pre", _PRE_OPS, _MATMUL, _weight_parts),
    Spec("delayed_pre_fwd", "delayed_pre", _PRE_OPS, _PASS, _passes),
    Spec(
        "delayed_pre_bwd",
        "delayed_pre",
        _PRE_OPS,
        ("hidden_size",),
        _delayed_backwards,
        early=("weight", "norm_weight", "x", "grad_input"),
    ),
    Spec(
        "delayed_pre_add_bwd",
        "delayed_pre",
        _PRE_OPS,
        ("hidden_size",),
        _delayed_add_backwards,
        early=("weight", "norm_weight"),
    ),
    Spec(
        "delayed_sums",
        "delayed_pre",
        _PRE_OPS,
        ("num_sums", "hidden_size", "directed"),
        _delayed_sums,
        early=(
            "sums",
            "partials",
            "grad_comb",
            "grad_post",
            "grad_pre",
            "grad_bias",
            "grad_scale",
        ),
    ),
    Spec("post_pre_fwd", "post_pre", ("post_pre",), _PASS, _passes),
    Spec("post_project_fwd", "post_pre", ("post_pre",), _PASS, _passes),
    Spec(
        "post_pre_bwd",
        "post_pre",
        ("post_pre",),
        ("hidden_size",),
        _pass_backwards,
        early=("weight", "norm_weight"),
    ),
    Spec(
        "few_project",
        "few_pre",
        _PRE_OPS,
        ("hidden_size", "has_post", "own", "collapses"),
        _few_projects,
    ),
    Spec(
        "few_pre",
        "few_pre",
        _PRE_OPS,
        ("hidden_size", "delayed", "collapsed"),
        _few_pres,
        early=("scale", "bias", "given_mix", "layer_norm_weight"),
    ),
    Spec("input_norm", "post_pre", (*_PRE_OPS, "recompute"), ("hidden_size",), _input_norms),
    Spec("interleaved_aggregate_fwd", "interleaved_aggregate", _TE, _CHANNELS, _interleaved),
    Spec(
        "interleaved_aggregate_bwd", "interleaved_aggregate", _TE, _CHANNELS, _interleaved_backwards
    ),
    Spec("interleaved_post_fwd", "interleaved_post", _TE, _CHANNELS, _interleaved_posts),
    Spec("interleaved_post_bwd", "interleaved_post", _TE, _CHANNELS, _interleaved_post_backwards),
    Spec("padded_projection_fwd", "padded_projection", _TE, _MATMUL, _padded_projections),
    Spec("padded_projection_pack", "padded_projection", _TE, _MATMUL, _padded_projections),
    Spec("padded_mixes_fwd", "padded_mixes", _TE, _N, _padded_mixes),
    Spec("padded_mixes_bwd", "padded_mixes", _TE, _N, _padded_mixes),
    Spec("partials_norm_fwd", "partials", _TK, ("num_mixes", "groups"), _partials_norms),
    Spec("partials_norm_bwd", "partials", _TK, ("num_mixes", "groups"), _partials_norms),
    Spec("partials_pre", "partials", _TK, _STREAMS, _partials_pres),
    Spec("partials_last_pre", "partials", _TK, _STREAMS, _partials_pres),
    Spec("exact_mixes_bwd", "exact_mixes", _TK, _N, _n_gates),
    Spec("exact_sums", "exact_mixes", _TK, ("biases", "scales"), _exact_sums),
    Spec("head_mix_rows_bwd", "head_mix_rows", _TK, _N, _n_gates),
    Spec("norm_weight_bwd", "norm_weight", _TK, _MATMUL, _weights_of_a_norm),
    Spec("log_sinkhorn_fwd", "log_sinkhorn", ("sinkhorn", *_PRE_OPS, *_TE, *_TK), _N, _n),
    Spec("log_sinkhorn_bwd", "log_sinkhorn", ("sinkhorn", *_PRE_OPS, *_TE, *_TK), _STEPS, _steps),
    Spec("recompute", "recompute", ("recompute", *_TK), _STREAMS, _streams),
    Spec("recompute_gates", "recompute", ("recompute",), _N, _n_gates),
    Spec(
        "recompute_table", "recompute", ("recompute", *_TK), ("slots",), lambda _: [(TABLE_SLOTS,)]
    ),
)

BY_NAME = {spec.name: spec for spec in SPECS}
OPS = tuple(sorted({op for spec in SPECS for op in spec.ops}))


def builder(name: str) -> Callable[..., Any]:
    """The function that turns a kernel's arguments into a TileLang prim_func; imports TileLang."""
    if name not in BY_NAME:
        raise ValueError(f"kernel: name must be one of {', '.join(BY_NAME)}; got {name!r}")
    module = importlib.import_module(f"tile_mhc.kernels.{BY_NAME[name].module}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def pass_configs(name: str, args: Arguments) -> dict[str, Any]:
    """What TileLang is told to do with this kernel, by its builder: fixed, or by the arguments."""
    configs = builder(name).pass_configs  # type: ignore[attr-defined]
    chosen = configs(*args) if callable(configs) else configs
    return {key.value: value for key, value in chosen.items()}


def select(
    sizes: Iterable[Sizes], ops: Iterable[str] = OPS, arch: str = DEFAULT
) -> list[tuple[str, Arguments]]:
    """Every kernel that `ops` launch at `sizes` on an architecture, each once, in the order of the
    table."""
    sizes, ops = [size._replace(arch=arch) for size in sizes], set(ops)
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
    sources = [path.read_text() for folder in folders for path in Path(folder).rglob("*.py")]
    prim_funcs = re.findall(r"@T\.prim_func\s+def (\w+)\(", "\n".join(sources))
    # TileLang names the device function after the prim_func.
    return {f"{name}_kernel" for name in prim_funcs}


def compile_command(name: str, args: Arguments, arch: str) -> str | None:
    """The command line that puts this kernel into the cache; None where the table has no entry."""
    spec = BY_NAME[name]
    for size in _sizes_of(spec, args, arch):
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


def _sizes_of(spec: Spec, args: Arguments, arch: str) -> Iterator[Sizes]:
    """The choices that these arguments leave open, what is usual first."""
    numbers, words = split_arguments(args)
    of, dtypes = dict(zip(spec.numbers, numbers, strict=True)), Dtypes.parse(words).given
    rows = of.get("num_mixes", of.get("biases"))
    # A reader of the streams that has no aggregate beside it says n = 0.
    counts = [
        n
        for n in SUPPORTED_STREAMS
        if of.get("n", 0) in (0, n) and (rows is None or rows in (n, 2 * n, n * (n + 2)))
    ]
    streams = [dtypes["streams"]] if "streams" in dtypes else [DTYPE, *STREAMS]
    parameters = [*((dtype,) for dtype in EVERY_PARAMETER), EVERY_PARAMETER]
    grads: list[tuple[str, ...]] = [(), *((word,) for word in STREAMS)]
    for n in counts:
        hidden = of.get("hidden_size", of.get("channels", of.get("size", 64 * n) // n))
        if 0 < hidden <= MAX_HIDDEN:
            repeat = of.get("capacity", HISTORY_STEP)
            for choice in itertools.product(streams, parameters, grads):
                yield Sizes(n, hidden, repeat, *choice, arch)
