"""tile_mhc under models of Hugging Face transformers: `patch()`, `unpatch()`, `backend_report()`.

===========  ===========  =================  ===================  ====
model        model type   hyper-connections  head                 from
===========  ===========  =================  ===================  ====
DeepSeek-V4  deepseek_v4  mHC                learned              5.17
GLM-5.3      glm5_next    mHC                mean of the streams  5.17
HY-V4        hy_v4        streams not mixed  learned              5.17
HY-V4        hy_v4_vl     streams not mixed  learned              5.24
===========  ===========  =================  ===================  ====

The forwards of four classes of each model are replaced: of its hyper-connection (read the layer
input), its decoder layer (write the layer output back), its head and, where streams are mixed, the
model, whose own code then runs the layers. The functions stay the objects that they were, and get
other code. So whoever holds one of them is served, and given the original back, whenever it was
taken: models built before and after; modules whose `forward` accelerate's hooks captured; the class
that FSDP2 makes of a layer's; the wrapper in which transformers 5.23 and later do activation
checkpointing. What `torch.compile` has traced is traced again: `patch()` empties its caches, so
that everything compiled so far, in the whole process, is compiled anew at its next call;
`unpatch()` need not. Out of reach is only what no longer runs those functions: exported and
ahead-of-time compiled programs, CUDA graphs captured by hand, and a subclass with a `forward` of
its own, which is its author's.

Another way in is `patch_mapping()`, for transformers' own `register_patch_mapping`: then the models
that `from_pretrained` and `from_config` build are served, and no others.

Parameters, state dicts and hooks stay as they are. The copy of the embedding into the streams
stays torch's: it is inlined in the model's forward, and has the bits of `tile_mhc.expand`.

Of mHC the boundary between two sub-layers is one op, `tile_mhc.post_pre`: always within a layer,
and from layer to layer where nothing looks at the streams between them. Hidden states that are
asked for, checkpointing, and hooks on a layer or on a hyper-connection (also FSDP2's and
accelerate's) make it a post and a pre; `backend_report()` gives the reason. HY-V4 has no such op:
its boundaries are `identity_post` and `identity_pre`.

Adapters of peft on the layers' linear maps change nothing of this, whether the hyper-connections
are trained beside them or frozen. Hyper-connections that are in its `modules_to_save`, or have one
of its `target_parameters`, it wraps, and the boundaries before them are a post and a pre; to train
them as they are, set `requires_grad` on their parameters.

What differs from the original arithmetic:
- The decoder layer of DeepSeek-V4 and GLM-5.3 keeps post_mix and comb_mix in float32 and rounds
  the new streams once; the original rounds both mixes to the dtype of the streams, then both
  products and their sum. HY-V4's original adds in float32, too.
- Under autocast the mixing runs in float32; the original of DeepSeek-V4 and GLM-5.3 projects in the
  autocast dtype.

What runs is decided call by call. Streams of bfloat16, float16 or float32, of a supported shape,
go to the operators of tile_mhc: TileLang on a CUDA device, the reference on a CPU. What has no
kernel is left to transformers: other dtypes, devices, numbers of streams, hidden sizes and numbers
of Sinkhorn steps, and a module whose `input_norm` was replaced or carries hooks, as the operators
would pass over it. `backend_report()` gives the reason. Hooks for all modules at once, which torch
has for debugging, count for nothing here: they do not see `input_norm`, which does not run.

With transformers 5.17 to 5.19 a bfloat16 checkpoint of DeepSeek-V4 cannot run, patched or not:
their norms, kept in float32, hand float32 to bfloat16 linear maps ("expected m1 and m2 to have the
same dtype"). Take 5.20 or later for those. `patch(streams_dtype=torch.bfloat16)` asks for bfloat16
streams in a model whose own are float32, as under autocast; the sub-layers keep their dtype.
"""

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Literal, TypedDict, overload

import torch

from tile_mhc import errors
from tile_mhc.integrations.transformers import _built, _state
from tile_mhc.integrations.transformers._family import Family, installed
from tile_mhc.integrations.transformers._models import FAMILIES

MODELING = FAMILIES["deepseek_v4"].modeling_name


class Patch:
    """What `patch()` returns: leaving its `with` block undoes that call of `patch()`, once.

    The patch itself ends when every call is undone. A handle that is used up, or from before an
    `unpatch()`, undoes nothing. One handle may be entered by several threads; the last to leave
    undoes it.
    """

    def __init__(self) -> None:
        self._period = _state.period
        self._blocks = 0

    def __enter__(self) -> "Patch":
        with _state.lock:
            self._blocks += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _state.lock:
            self._blocks -= 1
            if self._blocks or self._period != _state.period:
                return
            self._period = -1
            _state.held -= 1
            if not _state.held:
                unpatch()


def patch(
    *,
    streams_dtype: torch.dtype | None = None,
    recompute_layers: int | None = None,
    models: Iterable[str] | None = None,
) -> Patch:
    """Put tile_mhc under models of Hugging Face transformers, in every thread.

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
            that run inside of other hooks of saved tensors or inside torch.compile, are left out,
            as are HY-V4's, of which `recompute` makes nothing: the report counts them under
            "recompute".
        models: the model types to patch, as the table above has them; None stands for all that the
            installed transformers has.

    Returns:
        A handle, for use as a context.

    Raises:
        ImportError: transformers is missing, or has none of the models, or lacks one of `models`.
        UnsupportedError: a class or the signature of a forward is not the one this was written for,
            or a forward is no longer transformers' own. Nothing is patched then.
        ValueError: an argument is none of these, or is not that of the patch in force.

    Source: transformers 5.17 to 5.24, `models/*/modeling_*.py`.
    """
    if streams_dtype is not None and streams_dtype not in errors.STREAMS:
        names = ", ".join(map(str, errors.STREAMS))
        raise ValueError(
            f"patch: streams_dtype must be one of {names}, or None; got {streams_dtype!r}"
        )
    if recompute_layers is not None:
        errors.check_positive_int("patch", "recompute_layers", recompute_layers)
    chosen = _chosen("patch", models)
    with _state.lock:
        if not _is_in_force():
            _begin(chosen, streams_dtype, recompute_layers)
        in_force = [family for family in FAMILIES.values() if family.in_force]
        for name, given, expected in (
            ("streams_dtype", streams_dtype, _state.streams_dtype),
            ("recompute_layers", recompute_layers, _state.recompute_layers),
            ("models", _types(chosen), _types(in_force)),
        ):
            if given != expected:
                raise ValueError(
                    f"patch: {name} must be {expected}, as in the patch in force; got {given}. "
                    "Call unpatch() first"
                )
        _state.held += 1
        return Patch()


def patch_mapping(models: Iterable[str] | None = None) -> dict[str, type[torch.nn.Module]]:
    """The classes for transformers' `register_patch_mapping`, by the names of those they replace.

        from transformers.monkey_patching import register_patch_mapping

        register_patch_mapping(mhc.patch_mapping())
        model = AutoModelForCausalLM.from_pretrained(...)

    Models that `from_pretrained` and `from_config` build from then on are served as under `patch`,
    for as long as they live, and no others are. `unregister_patch_mapping(list(patch_mapping()))`
    ends it for models that are built later. The two ways may be combined; the arguments of a patch
    in force then hold for all. transformers does not replace the class that is called itself:
    where that is the bare model, as with `AutoModel`, a layer hands nothing on to the next one.

    The classes are subclasses, with the parameters, state dicts and names of the originals. Before
    5.21 `register_patch_mapping` needs torchvision, for whatever class
    (findings/transformers-patch-mapping.sh).

    Args:
        models: as of `patch`.

    Returns:
        The same classes on every call.

    Raises:
        ImportError, UnsupportedError, ValueError: as of `patch`.

    Source: transformers 5.17 to 5.24, `monkey_patching.py`.
    """
    mapping: dict[str, type[torch.nn.Module]] = {}
    with _state.lock:
        for family in _chosen("patch_mapping", models):
            if not family.in_force:
                family.find("patch_mapping")
            mapping |= _built.classes(family)
    return mapping


def _chosen(op: str, models: Iterable[str] | None) -> list[Family]:
    """The families to serve, all of which are there."""
    if models is None:
        chosen = list(FAMILIES.values())
    else:
        names = [models] if isinstance(models, str) else list(models)
        wrong = [repr(name) for name in names if name not in FAMILIES]
        if wrong or not names:
            raise ValueError(
                f"{op}: models must name some of {', '.join(FAMILIES)}; "
                f"got {', '.join(wrong) or 'none'}"
            )
        chosen = [family for family in FAMILIES.values() if family.model_type in names]
    absent = {family: _absence(family) for family in chosen}
    there = [family for family, why in absent.items() if not why]
    if there and models is None:
        return there
    for family, why in absent.items():
        if why:
            raise ImportError(
                f"{op}: transformers must be installed and have {family.modeling_name} "
                f"({family.since} to 5.24 have); got: {why}"
            )
    return chosen


def _absence(family: Family) -> str:
    """Why a model is not there, if so."""
    try:
        family.modeling()
    except ImportError as error:
        return str(error)
    return ""


def _types(families: Iterable[Family]) -> list[str]:
    return [family.model_type for family in families]


def _begin(
    chosen: list[Family], streams_dtype: torch.dtype | None, recompute_layers: int | None
) -> None:
    for family in chosen:
        family.find("patch")
    _state.streams_dtype, _state.recompute_layers = streams_dtype, recompute_layers
    _state.forget_calls()
    for family in chosen:
        family.replace()
    # A graph that was traced with the original code has nothing that tells it of the new one.
    if "torch._dynamo.convert_frame" in sys.modules:
        torch.compiler.reset()


def unpatch() -> None:
    """Give transformers its own forwards back, in every thread; without a patch, do nothing.

    Handles of `patch()` that are still open undo nothing any more. A model that runs meanwhile, in
    another thread, runs to its end.
    """
    with _state.lock:
        if not _is_in_force():
            return
        _state.held = 0
        _state.period += 1
        _state.streams_dtype = _state.recompute_layers = None
        for family in FAMILIES.values():
            family.in_force = False
            if not family.running:
                family.restore()


def _is_in_force() -> bool:
    return any(family.in_force for family in FAMILIES.values())


def is_patched() -> bool:
    """Whether `patch()` is in force, and no class has been given another forward since."""
    with _state.lock:
        in_force = [family for family in FAMILIES.values() if family.in_force]
        return bool(in_force) and all(family.stands() for family in in_force)


class ModelReport(TypedDict):
    """What `backend_report(by_model=True)` says of one model type."""

    served: list[str]
    not_served: dict[str, str]
    calls: dict[str, dict[str, int]]


@overload
def backend_report(*, by_model: Literal[False] = False) -> dict[str, dict[str, int]]: ...
@overload
def backend_report(*, by_model: Literal[True]) -> dict[str, ModelReport]: ...
def backend_report(*, by_model: bool = False) -> dict[str, dict[str, int]] | dict[str, ModelReport]:
    """Count the calls since the patch began, by call and by the backend that served them.

    The calls are "pre", "boundary", "post" and "head". A backend is "TileLang", "reference (on
    cpu)", on a GPU without kernels "reference (on cuda)", or "transformers (why)" for what was left
    to the original. A boundary, between two sub-layers, may also be "separate (why)": a post and a
    pre, which are counted as such. A call inside torch.compile is counted when it is traced. What
    `recompute_layers` leaves out is counted as "recompute".

    Args:
        by_model: say of each model type which classes are patched, which are not and why, and its
            calls; also of those that the installed transformers lacks.

    Returns:
        Such as ``{"boundary": {"TileLang": 7}, "post": {"TileLang": 1}, "pre": {"TileLang": 1}}``;
        by model, such as ``{"glm5_next": {"served": ["Glm5NextTextDecoderLayer", ...],
        "not_served": {"Glm5NextTextModel": "..."}, "calls": {...}}, ...}``. What holds for all of a
        model stands under its type.
    """
    if not by_model:
        return _state.calls()
    with _state.lock:
        return {name: _report_of(family) for name, family in FAMILIES.items()}


def _report_of(family: Family) -> ModelReport:
    not_served = dict(family.left)
    absence = _absence(family)
    if absence:
        not_served = {family.model_type: f"not in {_installed()}: {absence}"}
    elif not family.in_force:
        not_served = {family.model_type: "not patched"}
    return {
        "served": family.served() if family.in_force else [],
        "not_served": not_served,
        "calls": _state.calls(family.model_type),
    }


def _installed() -> str:
    try:
        return installed()
    except ImportError:
        return "this environment"
