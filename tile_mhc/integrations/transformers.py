"""tile_mhc under Hugging Face's DeepSeek-V4: `patch()`, `unpatch()` and `backend_report()`.

Forwards of `transformers.models.deepseek_v4.modeling_deepseek_v4` are replaced:
`DeepseekV4HyperConnection` (read the layer input), `DeepseekV4DecoderLayer` (write the layer output
back), `DeepseekV4HyperHead`, and `DeepseekV4Model`, whose own code then runs the layers. The
functions stay the objects that they were, and get other code. So whoever holds one of them is
served, and given the original back, whenever it was taken: models built before and after; modules
whose `forward` accelerate's hooks captured; the class that FSDP2 makes of a layer's; the wrapper in
which transformers 5.23 and later do activation checkpointing.
What `torch.compile` has traced is traced again: `patch()` empties its caches, so that everything
compiled so far, in the whole process, is compiled anew at its next call; `unpatch()` need not. Out
of reach is only what no longer runs those functions: exported and ahead-of-time compiled programs,
CUDA graphs captured by hand, and a subclass with a `forward` of its own, which is its author's.

Parameters, state dicts and hooks stay as they are. The copy of the embedding into the streams
stays torch's: it is inlined in `DeepseekV4Model.forward`, and has the bits of `tile_mhc.expand`.

The boundary between two sub-layers is one op, `tile_mhc.post_pre`: always within a layer, and from
layer to layer where nothing looks at the streams between them. Hidden states that are asked for,
checkpointing, and hooks on a layer or on a hyper-connection (also FSDP2's and accelerate's) make it
a post and a pre; `backend_report()` gives the reason.

Adapters of peft on the layers' linear maps change nothing of this, whether the hyper-connections
are trained beside them or frozen. Hyper-connections that are in its `modules_to_save`, or have one
of its `target_parameters`, it wraps, and the boundaries before them are a post and a pre; to train
them as they are, set `requires_grad` on their parameters.

What differs from the original arithmetic:
- The decoder layer keeps post_mix and comb_mix in float32 and rounds the new streams once; the
  original rounds both mixes to the dtype of the streams, then both products and their sum.
- Under autocast the mixing runs in float32; the original projects in the autocast dtype.

What runs is decided call by call. Streams of bfloat16, float16 or float32, of a supported shape,
go to the operators of tile_mhc: TileLang on a CUDA device, the reference on a CPU. What has no
kernel is left to transformers: other dtypes, devices, numbers of streams, hidden sizes and numbers
of Sinkhorn steps, and a module whose `input_norm` was replaced or carries hooks, as the operators
would pass over it. `backend_report()` gives the reason. Hooks for all modules at once, which torch
has for debugging, count for nothing here: they do not see `input_norm`, which does not run.

With transformers 5.17 to 5.19 a bfloat16 checkpoint cannot run, patched or not: their norms, kept
in float32, hand float32 to bfloat16 linear maps ("expected m1 and m2 to have the same dtype").
Take 5.20 or later for those. `patch(streams_dtype=torch.bfloat16)` asks for bfloat16 streams
in a model whose own are float32, as under autocast; the sub-layers keep their dtype.
"""

import functools
import importlib
import inspect
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tile_mhc import _device, errors, functional
from tile_mhc.integrations import _decoder_stack
from tile_mhc.integrations import _recompute_layers as groups
from tile_mhc.integrations._decoder_stack import Pending
from tile_mhc.ops.post_pre import post_pre
from tile_mhc.ops.sinkhorn import check_sinkhorn

if TYPE_CHECKING:
    from tile_mhc.ops._options import MixesOptions

MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"
NORM = "DeepseekV4UnweightedRMSNorm"
CONNECTION, LAYER = "DeepseekV4HyperConnection", "DeepseekV4DecoderLayer"
MODEL = "DeepseekV4Model"
POST_MULT = 2.0  # a literal in the original forward, not a field of its config

_lock = threading.RLock()
_calls_lock = threading.Lock()  # another: a thread that compiles counts while patch() waits for it
_held = 0  # calls of patch() that have not been undone
_period = 0  # how often the patch has been undone as a whole
_running = 0  # models whose layers hand on: their layers keep our code until they have ended
_in_force = False  # read by what torch.compile traces: it starts over when this changes
_streams_dtype: torch.dtype | None = None
_recompute_layers: int | None = None
_norm_class: Any = None
_norm_forward: Any = None  # the class's own; None where the class was given another before
_calls: Counter[tuple[str, str]] = Counter()
# By the name of the class: transformers' function, its code, and a function that keeps this code.
_functions: dict[str, FunctionType] = {}
_codes: dict[str, CodeType] = {}
_originals: dict[str, Callable[..., Any]] = {}


class Patch:
    """What `patch()` returns: leaving its `with` block undoes that call of `patch()`, once.

    The patch itself ends when every call is undone. A handle that is used up, or from before an
    `unpatch()`, undoes nothing. One handle may be entered by several threads; the last to leave
    undoes it.
    """

    def __init__(self) -> None:
        self._period = _period
        self._blocks = 0

    def __enter__(self) -> "Patch":
        with _lock:
            self._blocks += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _held
        with _lock:
            self._blocks -= 1
            if self._blocks or self._period != _period:
                return
            self._period = -1
            _held -= 1
            if not _held:
                unpatch()


def patch(
    *, streams_dtype: torch.dtype | None = None, recompute_layers: int | None = None
) -> Patch:
    """Put tile_mhc under every DeepSeek-V4 model of Hugging Face transformers, in every thread.

    It lasts until `unpatch()`, or for the length of a `with` block: `with patch(): ...`. Blocks may
    be nested, and overlap in several threads; the patch stays until the last of them is left, and
    one that was called without a block holds it until `unpatch()`. The report of `backend_report`
    starts afresh when a patch begins, and everything compiled so far is compiled anew.

    Args:
        streams_dtype: bfloat16, float16 or float32: round the streams and the layers' outputs to
            this dtype before they are mixed. The sub-layers are given, and the model returns, the
            dtype that they would without it: that of the embeddings. None leaves every dtype as the
            model has it.
        recompute_layers: put so many decoder layers after one another into a
            `tile_mhc.recompute_group`: the streams and the inputs of their sub-layers are not kept
            for the backward, which makes those of a group again by one launch; the layers do not
            run again. Layers that transformers checkpoints (`gradient_checkpointing_enable`), or
            that run inside of other hooks of saved tensors or inside torch.compile, are left out.

    Returns:
        A handle, for use as a context.

    Raises:
        ImportError: transformers is missing, or has no DeepSeek-V4.
        UnsupportedError: a class or the signature of a forward is not the one this was written for,
            or a forward is no longer transformers' own.
        ValueError: streams_dtype is none of these, recompute_layers no positive integer, or one is
            not that of the patch in force.

    Source: transformers 5.17 to 5.24, `models/deepseek_v4/modeling_deepseek_v4.py`.
    """
    global _held
    if streams_dtype is not None and streams_dtype not in errors.STREAMS:
        names = ", ".join(map(str, errors.STREAMS))
        raise ValueError(
            f"patch: streams_dtype must be one of {names}, or None; got {streams_dtype!r}"
        )
    if recompute_layers is not None:
        errors.check_positive_int("patch", "recompute_layers", recompute_layers)
    modeling = _modeling()
    with _lock:
        if not _in_force:
            _begin(modeling, streams_dtype, recompute_layers)
        for name, given, in_force in (
            ("streams_dtype", streams_dtype, _streams_dtype),
            ("recompute_layers", recompute_layers, _recompute_layers),
        ):
            if given != in_force:
                raise ValueError(
                    f"patch: {name} must be {in_force}, as in the patch in force; got {given}. "
                    "Call unpatch() first"
                )
        _held += 1
        return Patch()


def _begin(
    modeling: ModuleType, streams_dtype: torch.dtype | None, recompute_layers: int | None
) -> None:
    global _in_force, _norm_class, _norm_forward, _streams_dtype, _recompute_layers
    functions = {name: _function_to_patch(modeling, name) for name in _STAND_INS}
    stand_ins = dict(_STAND_INS)
    for function, stand_in in _model_to_patch(modeling):
        functions[MODEL], stand_ins[MODEL] = function, stand_in
    _norm_class = _class(modeling, NORM)
    forward = _norm_class.forward
    _norm_forward = forward if forward.__module__ == MODELING else None
    for name, function in functions.items():
        if _functions.get(name) is not function:
            _functions[name], _codes[name] = function, function.__code__
            _originals[name] = FunctionType(
                function.__code__, function.__globals__, function.__name__, function.__defaults__
            )
    for name in _functions.keys() - functions.keys():
        del _functions[name]
    _streams_dtype, _recompute_layers = streams_dtype, recompute_layers
    with _calls_lock:
        _calls.clear()
    _in_force = True
    for name, function in functions.items():
        function.__code__ = stand_ins[name].__code__
    # A graph that was traced with the original code has nothing that tells it of the new one.
    if "torch._dynamo.convert_frame" in sys.modules:
        torch.compiler.reset()


def unpatch() -> None:
    """Give transformers its own forwards back, in every thread; without a patch, do nothing.

    Handles of `patch()` that are still open undo nothing any more. A model that runs meanwhile, in
    another thread, runs to its end.
    """
    global _held, _in_force, _period
    with _lock:
        if not _in_force:
            return
        _in_force = False
        _held = 0
        _period += 1
        if not _running:
            _restore()


def _restore() -> None:
    for name, function in _functions.items():
        function.__code__ = _codes[name]


def is_patched() -> bool:
    """Whether `patch()` is in force, and no class has been given another forward since."""
    with _lock:
        return _in_force and all(
            inspect.unwrap(getattr(_modeling(), name).forward) is function
            for name, function in _functions.items()
        )


def backend_report() -> dict[str, dict[str, int]]:
    """Count the calls since the patch began, by call and by the backend that served them.

    The calls are "pre", "boundary", "post" and "head". A backend is "TileLang", "reference (on
    cpu)", on a GPU without kernels "reference (on cuda)", or "transformers (why)" for what was left
    to the original. A boundary, between two sub-layers, may also be "separate (why)": a post and a
    pre, which are counted as such. A call inside torch.compile is counted when it is traced.

    Returns:
        Such as ``{"boundary": {"TileLang": 7}, "post": {"TileLang": 1}, "pre": {"TileLang": 1}}``.
    """
    report: dict[str, dict[str, int]] = {}
    with _calls_lock:
        for (call, backend), count in sorted(_calls.items()):
            report.setdefault(call, {})[backend] = count
    return report


def _modeling() -> ModuleType:
    try:
        return importlib.import_module(MODELING)
    except ImportError as error:
        raise ImportError(
            f"patch: transformers must be installed and have {MODELING} (5.17 to 5.24 have); "
            f"got: {error}"
        ) from error


def _installed() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def _class(modeling: ModuleType, name: str) -> Any:
    cls = getattr(modeling, name, None)
    if cls is None:
        raise errors.UnsupportedError(
            f"patch: {MODELING} must have the class {name} (5.17 to 5.24 have); "
            f"got {_installed()} without it"
        )
    return cls


def _function_to_patch(modeling: ModuleType, name: str) -> FunctionType:
    """The function that a class was defined with, below transformers' own wrappers around it."""
    function: Any = inspect.unwrap(_class(modeling, name).forward)
    expected, actual = _parameters(_STAND_INS[name]), _parameters(function)
    if actual != expected:
        raise errors.UnsupportedError(
            f"patch: {name}.forward must take ({', '.join(expected)}), as in transformers 5.17 to "
            f"5.24; got ({', '.join(actual)}) in {_installed()}"
        )
    if not _is_own(modeling, name, function):
        raise errors.UnsupportedError(
            f"patch: {name}.forward must be the one of {MODELING}; got {function!r} of "
            f"{function.__module__}. Undo the other patch first, or apply it after this one"
        )
    return function  # type: ignore[no-any-return]


def _is_own(modeling: ModuleType, name: str, function: object) -> bool:
    """The code of a function that others share, or that is patched already, is not ours to change.

    But for ours, that a model which still runs has kept in place.
    """
    if not isinstance(function, FunctionType) or function.__globals__ is not vars(modeling):
        return False
    kept = _running > 0 and _functions.get(name) is function
    return not function.__closure__ and (kept or function.__code__.co_name == "forward")


def _model_to_patch(modeling: ModuleType) -> list[tuple[FunctionType, FunctionType]]:
    """The function of `DeepseekV4Model` with what takes its place, or none.

    Without it all else works, with a post and a pre between two layers.
    """
    function: Any = inspect.unwrap(getattr(getattr(modeling, MODEL, None), "forward", lambda: None))
    return [
        (function, stand_in)
        for stand_in in _decoder_stack.MODEL_STAND_INS
        if _is_own(modeling, MODEL, function) and _parameters(function) == _parameters(stand_in)
    ]


def _parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    # str(p) puts the stars first, then annotation and default.
    return [re.split("[:=]", str(p))[0].strip() for p in parameters]


def _taken(call: str, streams: Tensor, dtype: torch.dtype, reason: str = "") -> Tensor | None:
    """The streams as an operator takes them, or None: leave the call to the original. Counts it."""
    reason = reason or _streams_reason(call, streams, dtype)
    if reason:
        _count(call, f"transformers ({reason})")
        return None
    _count(call, _backend(streams))
    return streams.to(dtype).contiguous()


def _backend(streams: Tensor) -> str:
    device = streams.device
    if device.type == "cuda" and _has_kernels(device.index):
        return "TileLang"
    return f"reference (on {device.type})"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: int) -> bool:
    return _device.limits_of(device) is not None


def _streams_reason(call: str, streams: Tensor, dtype: torch.dtype) -> str:
    """Why no operator takes these streams in this dtype, if so."""
    num_streams, hidden_size = streams.shape[-2:]
    if dtype not in errors.STREAMS:
        return f"{errors.dtype_name(dtype)} streams"
    if streams.device.type not in ("cuda", "cpu", "meta"):
        return f"on {streams.device.type}"
    try:
        errors.check_num_streams(call, num_streams)
        errors.check_hidden_size(call, hidden_size)
    except errors.UnsupportedError:
        return f"no kernel for n={num_streams}, H={hidden_size}"
    return ""


def _norm_reason(norm: Any, pre_eps: object) -> str:
    """Why an operator must not stand for this norm, if so: a call of it would do something else."""
    if type(norm) is not _norm_class:
        return f"input_norm is {type(norm).__name__}"
    if "forward" in norm.__dict__ or _norm_class.forward is not _norm_forward:
        return "input_norm has another forward"
    for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        if len(getattr(norm, hooks)):
            return "input_norm has hooks"
    if not isinstance(norm.eps, float | int) or not isinstance(pre_eps, float | int):
        return "an eps that is no number"
    return ""


def _connection_reason(connection: Any) -> str:
    reason = _norm_reason(connection.input_norm, connection.hc_eps)
    if reason:
        return reason
    steps = connection.hc_sinkhorn_iters
    try:
        check_sinkhorn("pre", steps, connection.hc_eps)
    except (errors.ShapeError, errors.UnsupportedError):
        return f"no kernel for hc_sinkhorn_iters={steps}"
    return ""


# Traced once: a counter that changes from call to call would make torch.compile start over.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _count(call: str, backend: str) -> None:
    with _calls_lock:
        _calls[call, backend] += 1


def _exact(streams: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: it would round the arguments of the reference's matmul to its own dtype."""
    device = streams.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _parameter(value: Tensor) -> Tensor:
    return value if value.dtype in errors.PARAMETERS else value.float()


def _hyper_connection(self: Any, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """post_mix, comb_mix and the layer input, in the order of the original."""
    if not _in_force:
        return _originals[CONNECTION](self, hidden_streams)  # type: ignore[no-any-return]
    dtype = _streams_dtype or hidden_streams.dtype
    streams = _taken("pre", hidden_streams, dtype, _connection_reason(self))
    if streams is None:
        return _originals[CONNECTION](self, hidden_streams)  # type: ignore[no-any-return]
    with _exact(streams):
        layer_input, post_mix, comb_mix = functional.mhc_pre(
            streams, *_parameters_of(self), **_options_of(self)
        )
    return post_mix, comb_mix, layer_input


def _parameters_of(connection: Any) -> tuple[Tensor, Tensor, Tensor]:
    fn, scale, base = connection.fn, connection.scale, connection.base
    return _parameter(fn), _parameter(scale), _parameter(base)


def _options_of(connection: Any) -> "MixesOptions":
    return {
        "norm_eps": connection.input_norm.eps,
        "pre_eps": connection.hc_eps,
        "sinkhorn_eps": connection.hc_eps,
        "post_mult": POST_MULT,
        "sinkhorn_repeat": connection.hc_sinkhorn_iters,
    }


def _hyper_head(self: Any, x: Tensor) -> Tensor:
    if not _in_force:
        return _originals["DeepseekV4HyperHead"](self, x)  # type: ignore[no-any-return]
    streams = _taken("head", x, _streams_dtype or x.dtype, _norm_reason(self.input_norm, self.eps))
    if streams is None:
        return _originals["DeepseekV4HyperHead"](self, x)  # type: ignore[no-any-return]
    with _exact(streams):
        hidden: Tensor = functional.mhc_head(
            streams,
            _parameter(self.hc_fn),
            _parameter(self.hc_scale),
            _parameter(self.hc_base),
            norm_eps=self.input_norm.eps,
            pre_eps=self.eps,
        )
    return hidden.to(x.dtype)


def _model(self: Any, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """transformers' own code, which tells the layers that they may hand on."""
    original = _originals[MODEL]
    if torch.compiler.is_compiling():  # the layers' code is part of what is compiled
        return original(self, *given, **kwargs | _for_layers(self, kwargs))
    with _Running():
        try:
            return original(self, *given, **kwargs | _for_layers(self, kwargs))
        finally:
            groups.close()


def _for_layers(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model gives its layers besides: nothing where they are not all ours.

    Asked for while the model counts as running, as from then on its layers stay ours.
    """
    reasons = _decoder_stack.reasons(model, kwargs, _is_our_layer) if _in_force else None
    if reasons is None:
        return {}
    for reason in filter(None, reasons):
        _count("boundary", f"separate ({reason})")
    return {_decoder_stack.KEYWORD: tuple(not reason for reason in reasons)}


def _is_our_layer(layer: Any) -> bool:
    forward = type(layer).forward
    # From 5.24 on each class derived of it, as FSDP2 makes them, wraps its forward once more.
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward is _functions[LAYER]


class _Running:
    """What a layer hands on, only ours can take: see `unpatch`."""

    def __enter__(self) -> None:
        global _running
        with _lock:
            _running += 1

    def __exit__(self, *_: object) -> None:
        global _running
        with _lock:
            _running -= 1
            if not _running and not _in_force:
                _restore()


def _layer_in_group(self: Any, *args: Any, **kwargs: Any) -> Tensor | Pending:
    if not _in_force or _recompute_layers is None:
        return _decoder_layer(self, *args, **kwargs)
    forward = functools.partial(_decoder_layer, self, *args, **kwargs)
    return groups.run(_recompute_layers, self, forward)  # type: ignore[no-any-return]


def _decoder_layer(
    self: Any,
    hidden_states: Tensor | Pending,
    input_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | Pending:
    hands_on = kwargs.pop(_decoder_stack.KEYWORD, None)
    if not _in_force:
        original = _originals[LAYER]
        if isinstance(hidden_states, Pending):  # the patch has been undone meanwhile
            hidden_states = _post(*hidden_states)
        return original(self, hidden_states, input_ids, **kwargs)  # type: ignore[no-any-return]
    if hands_on is None and self.layer_idx > 0:
        _count("boundary", "separate (not in a model with layers of transformers alone)")
    own = hidden_states.streams if isinstance(hidden_states, Pending) else hidden_states
    dtype = _own_dtype(own, kwargs)
    streams, post_mix, comb_mix, layer_input = _boundary(hidden_states, self.attn_hc)
    attn_input = self.input_layernorm(layer_input.to(dtype or layer_input.dtype))
    attn_output, _ = self.self_attn(attn_input, **kwargs)

    given = Pending(attn_output, streams, post_mix, comb_mix)
    streams, post_mix, comb_mix, layer_input = _boundary(given, self.ffn_hc)
    mlp_input = self.post_attention_layernorm(layer_input.to(dtype or layer_input.dtype))
    mlp_output = self.mlp(mlp_input, input_ids=input_ids)

    given = Pending(mlp_output, streams, post_mix, comb_mix)
    if hands_on and self.layer_idx < len(hands_on) and hands_on[self.layer_idx]:
        return given
    streams = _post(*given)
    return streams if dtype is None or _is_followed(self) else streams.to(dtype)


def _boundary(given: Tensor | Pending, connection: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The streams before a sub-layer, its post_mix and comb_mix, and its layer input."""
    if not isinstance(given, Pending):
        return given, *connection(given)
    layer_output, streams, post_mix, comb_mix = given
    dtype = _mixed_dtype(streams, layer_output)
    reason = (
        _decoder_stack.reason_of_call(connection, _functions[CONNECTION])
        or _connection_reason(connection)
        or _streams_reason("boundary", streams, dtype)
    )
    if reason:
        _count("boundary", f"separate ({reason})")
        streams = _post(*given)
        return streams, *connection(streams)
    _count("boundary", _backend(streams))
    with _exact(streams):
        streams, layer_input, post_mix, comb_mix = post_pre(
            layer_output.to(dtype).contiguous(),
            streams.to(dtype).contiguous(),
            post_mix.float(),
            comb_mix.float(),
            *_parameters_of(connection),
            **_options_of(connection),
        )
    return streams, post_mix, comb_mix, layer_input


def _own_dtype(streams: Tensor, kwargs: dict[str, Any]) -> torch.dtype | None:
    """Where streams_dtype was asked for, the dtype that everything else has without it.

    It is that of the embeddings, and the streams themselves have it in the first layer only. The
    model makes the position embeddings in it too, and gives them to every layer.
    """
    if _streams_dtype is None:
        return None
    position = kwargs.get("position_embeddings")
    while isinstance(position, dict | tuple | list) and position:
        position = next(iter(position.values() if isinstance(position, dict) else position))
    if isinstance(position, Tensor) and position.is_floating_point():
        return position.dtype
    return streams.dtype


def _is_followed(layer: Any) -> bool:
    """Whether a layer's streams are known to go to another layer.

    What is not a layer, the head first of all, is given the dtype that it would have without
    streams_dtype: it returns what it is given, for the norm and the output map behind it.
    """
    config = getattr(layer.self_attn, "config", None)
    return bool(layer.layer_idx + 1 < getattr(config, "num_hidden_layers", 0))


def _post(layer_output: Tensor, streams: Tensor, post_mix: Tensor, comb_mix: Tensor) -> Tensor:
    dtype = _mixed_dtype(streams, layer_output)
    taken = _taken("post", streams, dtype)
    if taken is None:  # in a line of the original layer
        post_mix, comb_mix = post_mix.to(streams.dtype), comb_mix.to(streams.dtype)
        added = post_mix.unsqueeze(-1) * layer_output.unsqueeze(-2)
        return added + torch.matmul(comb_mix.transpose(-1, -2), streams)
    with _exact(taken):
        return functional.mhc_post(
            layer_output.to(dtype).contiguous(), taken, post_mix.float(), comb_mix.float()
        )


def _mixed_dtype(streams: Tensor, layer_output: Tensor) -> torch.dtype:
    """A float32 layer output widens bfloat16 streams, as it does in the original."""
    return _streams_dtype or torch.promote_types(streams.dtype, layer_output.dtype)


# Their code takes the place of transformers', in functions whose globals are those of another
# module: so they import what they call. A name that is not `forward` tells them from the originals.
def _stand_in_connection(self: Any, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from tile_mhc.integrations import transformers as integration

    return integration._hyper_connection(self, hidden_streams)


def _stand_in_head(self: Any, x: Tensor) -> Tensor:
    from tile_mhc.integrations import transformers as integration

    return integration._hyper_head(self, x)


def _stand_in_layer(
    self: Any, hidden_states: Any, input_ids: Tensor | None = None, **kwargs: Any
) -> Any:
    from tile_mhc.integrations import transformers as integration

    return integration._layer_in_group(self, hidden_states, input_ids, **kwargs)


_STAND_INS: dict[str, FunctionType] = {
    CONNECTION: _stand_in_connection,  # type: ignore[dict-item]
    "DeepseekV4HyperHead": _stand_in_head,  # type: ignore[dict-item]
    LAYER: _stand_in_layer,  # type: ignore[dict-item]
}
