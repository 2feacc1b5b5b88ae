"""DeepSeek-V4. The copy of the embedding into the streams stays torch's: it is inlined in the
model's forward, and has the bits of `tile_mhc.expand`.
"""

from typing import Any

from torch import Tensor

from tile_mhc.integrations.transformers import _decoder_stack, _manifold, _serving, _stand_ins
from tile_mhc.integrations.transformers._decoder_stack import Pending
from tile_mhc.integrations.transformers._family import Family, Forward


def _place(layer: Any) -> tuple[int, Any]:
    return layer.layer_idx, getattr(layer.self_attn, "config", None)


def _layer(
    family: Family,
    self: Any,
    hidden_states: Tensor | Pending,
    input_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | Pending:
    hands_on = kwargs.pop(_decoder_stack.KEYWORD, None)
    if not family.serves(self):
        original, streams = family.original("layer"), _manifold.streams_of(family, hidden_states)
        return original(self, streams, input_ids, **kwargs)  # type: ignore[no-any-return]
    own = hidden_states.streams if isinstance(hidden_states, Pending) else hidden_states
    dtype = _serving.embedded_dtype(own, kwargs.get("position_embeddings"))

    def attention(layer_input: Tensor) -> tuple[Tensor, None]:
        return self.self_attn(layer_input, **kwargs)[0], None

    def mlp(layer_input: Tensor) -> Tensor:
        return self.mlp(layer_input, input_ids=input_ids)  # type: ignore[no-any-return]

    def forward() -> Tensor | Pending:
        run = _manifold.run_layer
        return run(family, self, hidden_states, dtype, hands_on, attention, mlp)[0]

    return _serving.in_group(family, self, forward)  # type: ignore[no-any-return]


DEEPSEEK_V4 = Family(
    "deepseek_v4",
    "5.17",
    "DeepseekV4UnweightedRMSNorm",
    _place,
    (
        Forward(
            "connection", "DeepseekV4HyperConnection", _manifold.connection, _stand_ins.STREAMS
        ),
        Forward("head", "DeepseekV4HyperHead", _serving.learned_head, _stand_ins.HEAD),
        Forward("layer", "DeepseekV4DecoderLayer", _layer, _stand_ins.LAYER_WITH_IDS),
        Forward("model", "DeepseekV4Model", _decoder_stack.model, _stand_ins.MODEL, optional=True),
    ),
)
