"""A whole decoder stack of transformers' DeepSeek-V4: which layers hand their output to the next.

A layer that is followed by another need not write its last output into the streams: the next one
does, together with all that is before its attention (`tile_mhc.post_pre`). Then what goes from
layer to layer is a `Pending`, which nothing but a layer can read. Whoever looks at the streams
between two layers has to see streams: hooks on either of the two, checkpointing, recorded hidden
states.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tile_mhc._hooks import has_hooks, own_hooks

# What a model gives all its layers by keyword: for each but the last, whether it hands on.
KEYWORD = "tile_mhc_hands_on"
# transformers' own hooks stay when hidden states were recorded once, and do nothing otherwise.
RECORDING = "transformers.utils.output_capturing"


class Pending(NamedTuple):
    """Streams that a sub-layer's output is yet to be written into."""

    layer_output: Tensor
    streams: Tensor
    post_mix: Tensor
    comb_mix: Tensor


def reasons(
    model: Any, kwargs: dict[str, Any], is_ours: Callable[[Any], bool]
) -> Sequence[str] | None:
    """Of each layer but the last, why it must not hand on, or "".

    None where a layer is not transformers', or not in its place: it would not know what to do.
    """
    layers = list(model.layers)
    own = all(is_ours(layer) and "forward" not in layer.__dict__ for layer in layers)
    if not own or [layer.layer_idx for layer in layers] != list(range(len(layers))):
        return None
    if kwargs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False)):
        return ["hidden states are recorded"] * (len(layers) - 1)
    alone = [_reason(layer) for layer in layers]
    return [alone[at] or alone[at + 1] for at in range(len(layers) - 1)]


def _reason(layer: Any) -> str:
    if layer.gradient_checkpointing and layer.training:
        return "checkpointing"
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks for all modules"
    if any(hook.__module__ != RECORDING for hook in own_hooks(layer)):
        return "hooks on a layer"
    return ""


def reason_of_call(connection: Any, forward: Callable[..., Any]) -> str:
    """Why a connection must be called, rather than an op stand for it and for the post before."""
    if has_hooks(connection):
        return "hooks on a hyper-connection"
    if type(connection).forward is not forward or "forward" in connection.__dict__:
        return "a hyper-connection has another forward"
    return ""


# In the place of the code of DeepseekV4Model.forward, with the parameters of 5.17 to 5.23 and those
# of 5.24; see the stand-ins of `transformers`.
def _stand_in_model(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Any = None,
    use_cache: Any = None,
    **kwargs: Any,
) -> Any:
    from tile_mhc.integrations import transformers as integration

    given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
    return integration._model(self, given, kwargs)


def _stand_in_model_with_cache(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    cache: Any = None,
    inputs_embeds: Any = None,
    use_cache: Any = None,
    **kwargs: Any,
) -> Any:
    from tile_mhc.integrations import transformers as integration

    given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
    return integration._model(self, given, kwargs)


MODEL_STAND_INS: tuple[Any, ...] = (_stand_in_model, _stand_in_model_with_cache)
