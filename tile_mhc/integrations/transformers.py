"""tile_mhc under Hugging Face's DeepSeek-V4: `patch()`, `unpatch()` and `backend_report()`.

Three forwards of `transformers.models.deepseek_v4.modeling_deepseek_v4` are replaced, on the
class, so that models built before and after are served alike: `DeepseekV4HyperConnection` (read
the layer input), `DeepseekV4DecoderLayer` (write the layer output back) and `DeepseekV4HyperHead`.
Parameters, state dicts and hooks stay as they are. The copy of the embedding into the streams
stays torch's: it is inlined in `DeepseekV4Model.forward`, and has the bits of `tile_mhc.expand`.

What differs from the original arithmetic:
- The decoder layer keeps post_mix and comb_mix in float32 and rounds the new streams once; the
  original rounds both mixes to the dtype of the streams, then both products and their sum.
- Under autocast the mixing runs in float32; the original projects in the autocast dtype.

What runs is decided call by call. Streams of bfloat16, float16 or float32, of a supported shape,
go to the operators of tile_mhc: TileLang on a CUDA device, the reference on a CPU. Any other dtype,
number of streams or hidden size goes to `tile_mhc.reference`, which computes what the original
does, at its speed; nothing is cast down unasked, and `backend_report()` gives the reason.
transformers 5.17 loads the norms of a checkpoint in float32, so the layers' outputs can be float32
and widen the streams to twice the bytes: `patch(streams_dtype=torch.bfloat16)` asks for bfloat16
streams throughout.

Modules whose `forward` was captured before `patch()` (by accelerate's hooks, or by a compilation)
keep what they captured: patch first.
"""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, functional, reference

MODELING = "transformers.models.deepseek_v4.modeling_deepseek_v4"
POST_MULT = 2.0  # a literal in the original forward, not a field of its config

_originals: dict[str, Callable[..., Any]] = {}
_streams_dtype: torch.dtype | None = None
_calls: Counter[tuple[str, str]] = Counter()


class Patch:
    """What `patch()` returns: leaving its `with` block undoes the patch that it made."""

    def __init__(self, applied: bool) -> None:
        self.applied = applied

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.applied:
            unpatch()


def patch(*, streams_dtype: torch.dtype | None = None) -> Patch:
    """Put tile_mhc under every DeepSeek-V4 model of Hugging Face transformers.

    A second call changes nothing. The report of `backend_report` starts afresh with the first.

    Args:
        streams_dtype: round the streams and the layers' outputs to this dtype before they are
            mixed; None leaves every dtype as the model has it.

    Returns:
        A handle for use as `with patch(): ...`; inside a block that was patched already, it
        leaves the outer patch standing.

    Raises:
        ImportError: transformers is missing, or has no DeepSeek-V4.
        UnsupportedError: a class or the signature of a forward is not the one this was written for.
        ValueError: streams_dtype is no floating point dtype, or not that of the patch in force.

    Source: transformers 5.17, `models/deepseek_v4/modeling_deepseek_v4.py`.
    """
    global _streams_dtype
    if streams_dtype is not None and not streams_dtype.is_floating_point:
        raise ValueError(
            f"patch: streams_dtype must be a floating point dtype or None; got {streams_dtype}"
        )
    modeling = _modeling()
    if _originals:
        if streams_dtype != _streams_dtype:
            raise ValueError(
                f"patch: streams_dtype must be {_streams_dtype}, as in the patch in force; "
                f"got {streams_dtype}. Call unpatch() first"
            )
        return Patch(applied=False)
    classes = {name: _class_to_patch(modeling, name) for name in _FORWARDS}
    for name, cls in classes.items():
        _originals[name] = cls.forward
        cls.forward = _FORWARDS[name]
    _streams_dtype = streams_dtype
    _calls.clear()
    return Patch(applied=True)


def unpatch() -> None:
    """Give the classes their original forwards back; without a patch, do nothing.

    Raises:
        RuntimeError: someone else replaced a forward after `patch()`; nothing is changed then.
    """
    if not _originals:
        return
    modeling = _modeling()
    for name in _originals:
        current = getattr(modeling, name).forward
        if current is not _FORWARDS[name]:
            raise RuntimeError(
                f"unpatch: {name}.forward must be the one that patch() set; got {current!r}. "
                "Undo the later patch first"
            )
    for name, original in _originals.items():
        getattr(modeling, name).forward = original
    _originals.clear()


def is_patched() -> bool:
    """Whether `patch()` is in force."""
    return bool(_originals)


def backend_report() -> dict[str, dict[str, int]]:
    """Count the calls since `patch()`, by call and by the backend that served them.

    The calls are "pre", "post" and "head"; a backend is "TileLang" or "reference (why)". A call
    inside torch.compile is counted when it is traced.

    Returns:
        For instance {"pre": {"TileLang": 8}, "post": {"TileLang": 8}, "head": {"TileLang": 1}}.
    """
    report: dict[str, dict[str, int]] = {}
    for (call, backend), count in sorted(_calls.items()):
        report.setdefault(call, {})[backend] = count
    return report


def _modeling() -> ModuleType:
    try:
        return importlib.import_module(MODELING)
    except ImportError as error:
        raise ImportError(
            f"patch: transformers must be installed and have {MODELING} (5.17 has); got: {error}"
        ) from error


def _class_to_patch(modeling: ModuleType, name: str) -> Any:
    import transformers

    installed = f"transformers {transformers.__version__}"
    cls = getattr(modeling, name, None)
    if cls is None:
        raise errors.UnsupportedError(
            f"patch: {MODELING} must have the class {name} (5.17 has); got {installed} without it"
        )
    expected = _parameters(_FORWARDS[name])
    actual = _parameters(cls.forward)
    if actual != expected:
        raise errors.UnsupportedError(
            f"patch: {name}.forward must take ({', '.join(expected)}), as in transformers 5.17; "
            f"got ({', '.join(actual)}) in {installed}"
        )
    return cls


def _parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    # str(p) puts the stars first, then annotation and default.
    return [re.split("[:=]", str(p))[0].strip() for p in parameters]


def _has_operator(call: str, streams: Tensor) -> bool:
    """Whether the operators of tile_mhc take these streams; note the backend either way."""
    num_streams, hidden_size = streams.shape[-2:]
    device = streams.device.type
    reason = ""
    if streams.dtype not in errors.STREAMS:
        reason = f"{errors.dtype_name(streams.dtype)} streams"
    elif device not in ("cuda", "cpu", "meta"):
        reason = f"on {device}"
    else:
        try:
            errors.check_num_streams(call, num_streams)
            errors.check_hidden_size(call, hidden_size)
        except errors.UnsupportedError:
            reason = f"no kernel for n={num_streams}, H={hidden_size}"
    if reason:
        _count(call, f"reference ({reason})")
    else:
        _count(call, "TileLang" if device == "cuda" else f"reference (on {device})")
    return not reason


# Traced once: a counter that changes from call to call would make torch.compile start over.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _count(call: str, backend: str) -> None:
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
    streams = hidden_streams.to(_streams_dtype or hidden_streams.dtype).contiguous()
    pre = functional.mhc_pre if _has_operator("pre", streams) else reference.fused_pre
    with _exact(streams):
        layer_input, post_mix, comb_mix = pre(
            streams,
            _parameter(self.fn),
            _parameter(self.scale),
            _parameter(self.base),
            norm_eps=self.input_norm.eps,
            pre_eps=self.hc_eps,
            sinkhorn_eps=self.hc_eps,
            post_mult=POST_MULT,
            sinkhorn_repeat=self.hc_sinkhorn_iters,
        )
    return post_mix, comb_mix, layer_input


def _hyper_head(self: Any, x: Tensor) -> Tensor:
    streams = x.to(_streams_dtype or x.dtype).contiguous()
    contract = functional.mhc_head if _has_operator("head", streams) else reference.contract
    with _exact(streams):
        return contract(
            streams,
            _parameter(self.hc_fn),
            _parameter(self.hc_scale),
            _parameter(self.hc_base),
            norm_eps=self.input_norm.eps,
            pre_eps=self.eps,
        )


def _decoder_layer(
    self: Any, hidden_states: Tensor, input_ids: Tensor | None = None, **kwargs: Any
) -> Tensor:
    post_mix, comb_mix, layer_input = self.attn_hc(hidden_states)
    attn_output, _ = self.self_attn(self.input_layernorm(layer_input), **kwargs)
    hidden_states = _post(attn_output, hidden_states, post_mix, comb_mix)

    post_mix, comb_mix, layer_input = self.ffn_hc(hidden_states)
    mlp_output = self.mlp(self.post_attention_layernorm(layer_input), input_ids=input_ids)
    return _post(mlp_output, hidden_states, post_mix, comb_mix)


def _post(layer_output: Tensor, streams: Tensor, post_mix: Tensor, comb_mix: Tensor) -> Tensor:
    # A float32 layer output widens bfloat16 streams, as it does in the original.
    dtype = _streams_dtype or torch.promote_types(streams.dtype, layer_output.dtype)
    streams = streams.to(dtype).contiguous()
    post = functional.mhc_post if _has_operator("post", streams) else reference.post
    with _exact(streams):
        return post(layer_output.to(dtype).contiguous(), streams, post_mix, comb_mix)


_FORWARDS: dict[str, Callable[..., Any]] = {
    "DeepseekV4HyperConnection": _hyper_connection,
    "DeepseekV4HyperHead": _hyper_head,
    "DeepseekV4DecoderLayer": _decoder_layer,
}
