"""What takes the place of transformers' code, one function for each signature.

The code goes into functions whose globals are those of another module: so each imports what it
calls, and has the two strings for the model and the forward filled in (`code_for`). A name that is
not `forward` tells them from the originals.
"""

from types import CodeType, FunctionType
from typing import Any

MODEL_TYPE, FORWARD = "<model type>", "<forward>"


def code_for(stand_in: FunctionType, model_type: str, forward: str) -> CodeType:
    code, filled = stand_in.__code__, {MODEL_TYPE: model_type, FORWARD: forward}
    consts = (filled.get(each, each) if isinstance(each, str) else each for each in code.co_consts)
    return code.replace(co_consts=tuple(consts))


def _streams(self: Any, hidden_streams: Any) -> Any:
    from tile_mhc.integrations.transformers import _models

    return _models.run("<model type>", "<forward>", self, hidden_streams)


def _head(self: Any, x: Any) -> Any:
    from tile_mhc.integrations.transformers import _models

    return _models.run("<model type>", "<forward>", self, x)


def _layer_with_ids(self: Any, hidden_states: Any, input_ids: Any = None, **kwargs: Any) -> Any:
    from tile_mhc.integrations.transformers import _models

    return _models.run("<model type>", "<forward>", self, hidden_states, input_ids, **kwargs)


def _layer_with_indices(
    self: Any,
    hidden_states: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    prev_topk_indices: Any = None,
    **kwargs: Any,
) -> Any:
    from tile_mhc.integrations.transformers import _models

    return _models.run(
        "<model type>",
        "<forward>",
        self,
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        prev_topk_indices=prev_topk_indices,
        **kwargs,
    )


def _layer_with_indices_and_cache(
    self: Any,
    hidden_states: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    cache: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    prev_topk_indices: Any = None,
    **kwargs: Any,
) -> Any:
    from tile_mhc.integrations.transformers import _models

    return _models.run(
        "<model type>",
        "<forward>",
        self,
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        prev_topk_indices=prev_topk_indices,
        **kwargs,
    )


def _model(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Any = None,
    use_cache: Any = None,
    **kwargs: Any,
) -> Any:
    from tile_mhc.integrations.transformers import _models

    return _models.run(
        "<model type>",
        "<forward>",
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


def _model_with_cache(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    cache: Any = None,
    inputs_embeds: Any = None,
    use_cache: Any = None,
    **kwargs: Any,
) -> Any:
    from tile_mhc.integrations.transformers import _models

    return _models.run(
        "<model type>",
        "<forward>",
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


# What a forward may be like: 5.24 calls `cache` what was `past_key_values`.
STREAMS: tuple[Any, ...] = (_streams,)
HEAD: tuple[Any, ...] = (_head,)
LAYER_WITH_IDS: tuple[Any, ...] = (_layer_with_ids,)
LAYER_WITH_INDICES: tuple[Any, ...] = (_layer_with_indices, _layer_with_indices_and_cache)
MODEL: tuple[Any, ...] = (_model, _model_with_cache)
