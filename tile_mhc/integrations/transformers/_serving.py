"""What every model's calls share: whether an operator takes them, and the dtype of the streams."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tile_mhc import _device, errors, functional
from tile_mhc._hooks import own_hooks
from tile_mhc.integrations.transformers import _recompute_layers as groups
from tile_mhc.integrations.transformers import _state
from tile_mhc.integrations.transformers._family import Family


def taken(
    family: Family, call: str, streams: Tensor, dtype: torch.dtype, reason: str = ""
) -> Tensor | None:
    """The streams as an operator takes them, or None: leave the call to the original. Counts it."""
    reason = reason or streams_reason(call, streams, dtype)
    if reason:
        family.count(call, f"transformers ({reason})")
        return None
    family.count(call, backend(streams))
    return streams.to(dtype).contiguous()


def backend(streams: Tensor) -> str:
    device = streams.device
    if device.type == "cuda" and _has_kernels(device.index):
        return "TileLang"
    return f"reference (on {device.type})"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: int) -> bool:
    return _device.limits_of(device) is not None


def streams_reason(call: str, streams: Tensor, dtype: torch.dtype) -> str:
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


def norm_reason(family: Family, norm: Any, *numbers: object) -> str:
    """Why an operator must not stand for this norm, if so: a call of it would do something else."""
    if type(norm) is not family.norm_class:
        return f"input_norm is {type(norm).__name__}"
    if "forward" in norm.__dict__ or family.norm_class.forward is not family.norm_forward:
        return "input_norm has another forward"
    if own_hooks(norm):
        return "input_norm has hooks"
    if not all(isinstance(number, float | int) for number in (norm.eps, *numbers)):
        return "an eps that is no number"
    return ""


def exact(streams: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: it would round the arguments of the reference's matmul to its own dtype."""
    device = streams.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def parameter(value: Tensor) -> Tensor:
    return value if value.dtype in errors.PARAMETERS else value.float()


def parameters_of(connection: Any) -> tuple[Tensor, Tensor, Tensor]:
    return parameter(connection.fn), parameter(connection.scale), parameter(connection.base)


def streams_dtype(streams: Tensor) -> torch.dtype:
    return _state.streams_dtype or streams.dtype


def mixed_dtype(streams: Tensor, layer_output: Tensor) -> torch.dtype:
    """A float32 layer output widens bfloat16 streams, as it does in the original."""
    return _state.streams_dtype or torch.promote_types(streams.dtype, layer_output.dtype)


def embedded_dtype(streams: Tensor, position: Any) -> torch.dtype | None:
    """Where streams_dtype was asked for, the dtype that everything else has without it.

    It is that of the embeddings, and the streams themselves have it in the first layer only. The
    model makes the position embeddings in it too, and gives them to every layer.
    """
    if _state.streams_dtype is None:
        return None
    while isinstance(position, dict | tuple | list) and position:
        position = next(iter(position.values() if isinstance(position, dict) else position))
    if isinstance(position, Tensor) and position.is_floating_point():
        return position.dtype
    return streams.dtype


def returned(family: Family, layer: Any, streams: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A layer's streams, in the dtype of the model unless they are known to go to another layer.

    What is not a layer, the head first of all, is given the dtype that it would have without
    streams_dtype: it returns what it is given, for the norm and the output map behind it.
    """
    index, config = family.place(layer)
    is_followed = index + 1 < getattr(config, "num_hidden_layers", 0)
    return streams if dtype is None or is_followed else streams.to(dtype)


def learned_head(family: Family, self: Any, x: Tensor) -> Tensor:
    """The readout of DeepSeek-V4 and HY-V4."""
    original = family.original("head")
    if not family.serves(self):
        return original(self, x)  # type: ignore[no-any-return]
    reason = norm_reason(family, self.input_norm, self.eps)
    streams = taken(family, "head", x, streams_dtype(x), reason)
    if streams is None:
        return original(self, x)  # type: ignore[no-any-return]
    with exact(streams):
        hidden: Tensor = functional.mhc_head(
            streams,
            parameter(self.hc_fn),
            parameter(self.hc_scale),
            parameter(self.hc_base),
            norm_eps=self.input_norm.eps,
            pre_eps=self.eps,
        )
    return hidden.to(x.dtype)


def in_group(family: Family, layer: Any, forward: Callable[[], Any]) -> Any:
    """A decoder layer's forward, in a recompute group where the patch asks for them."""
    if not family.in_force or _state.recompute_layers is None:
        return forward()
    return groups.run(_state.recompute_layers, *family.place(layer), forward)
