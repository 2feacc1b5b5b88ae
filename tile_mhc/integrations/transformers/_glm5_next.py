"""GLM-5.3: DeepSeek's hyper-connections, and the mean of the streams at the end.

A decoder layer returns the indices of its attention, for the next one's, besides the streams.
"""

from typing import Any

import torch
from torch import Tensor

from tile_mhc.integrations.transformers import (
    _decoder_stack,
    _manifold,
    _serving,
    _stand_ins,
    _state,
)
from tile_mhc.integrations.transformers._decoder_stack import Pending
from tile_mhc.integrations.transformers._family import Family, Forward
from tile_mhc.ops.stream_mean import stream_mean

# What a layer does not give to its linear attention.
OF_FULL_ATTENTION = ("position_ids", "use_cache", "position_embeddings", "prev_topk_indices")


def _place(layer: Any) -> tuple[int, Any]:
    # Neither the layer nor its linear attention has the config that the model shares with them.
    return layer.self_attn.layer_idx, getattr(layer.mlp, "config", None)


def _mean_head(family: Family, self: Any, hidden_streams: Tensor) -> Tensor:
    streams = None
    if family.serves(self):
        dtype = _serving.streams_dtype(hidden_streams)
        streams = _serving.taken(family, "head", hidden_streams, dtype)
    if streams is None:
        return family.original("head")(self, hidden_streams)  # type: ignore[no-any-return]
    return stream_mean(streams).to(hidden_streams.dtype)


def _layer(
    family: Family, self: Any, hidden_states: Tensor | Pending, **kwargs: Any
) -> tuple[Tensor | Pending, Tensor | None]:
    hands_on = kwargs.pop(_decoder_stack.KEYWORD, None)
    if not family.serves(self):
        original, streams = family.original("layer"), _manifold.streams_of(family, hidden_states)
        return original(self, streams, **kwargs)  # type: ignore[no-any-return]

    def attention(layer_input: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.block_type == "linear_attention":
            return self.self_attn(hidden_states=layer_input, **_for_linear(kwargs)), None
        output, _, indices = self.self_attn(hidden_states=layer_input, **kwargs)
        return output, indices

    def forward() -> tuple[Tensor | Pending, Tensor | None]:
        run, dtype = _manifold.run_layer, _dtype(self)
        return run(family, self, hidden_states, dtype, hands_on, attention, self.mlp)

    return _serving.in_group(family, self, forward)  # type: ignore[no-any-return]


def _for_linear(kwargs: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in kwargs.items() if name not in OF_FULL_ATTENTION}
    if "past_key_values" in given:  # before 5.24
        given["cache_params"] = given.pop("past_key_values")
    return given


def _dtype(layer: Any) -> torch.dtype | None:
    """Where streams_dtype was asked for, the dtype of the model: there is no position embedding."""
    dtype: torch.dtype = layer.input_layernorm.weight.dtype
    return None if _state.streams_dtype is None else dtype


GLM5_NEXT = Family(
    "glm5_next",
    "5.17",
    "Glm5NextTextUnweightedRMSNorm",
    _place,
    (
        Forward(
            "connection", "Glm5NextTextHyperConnection", _manifold.connection, _stand_ins.STREAMS
        ),
        Forward("head", "Glm5NextTextHyperHead", _mean_head, _stand_ins.STREAMS),
        Forward("layer", "Glm5NextTextDecoderLayer", _layer, _stand_ins.LAYER_WITH_INDICES),
        Forward(
            "model", "Glm5NextTextModel", _decoder_stack.model, _stand_ins.MODEL, optional=True
        ),
    ),
)
