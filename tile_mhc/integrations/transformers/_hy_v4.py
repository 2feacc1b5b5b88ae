"""HY-V4, with and without vision: hyper-connections that leave the streams unmixed.

They have no comb_mix, so no op joins the post of one sub-layer with the pre of the next, and a
layer hands nothing on: the model's own forward is left as it is. The head is DeepSeek-V4's.
"""

from typing import Any

from torch import Tensor

from tile_mhc.integrations.transformers import _decoder_stack, _serving, _stand_ins, _state
from tile_mhc.integrations.transformers._family import Family, Forward
from tile_mhc.ops.identity_post import identity_post
from tile_mhc.ops.identity_pre import identity_pre


def _place(layer: Any) -> tuple[int, Any]:
    return layer.layer_idx, getattr(layer.self_attn, "config", None)


def _connection(family: Family, self: Any, hidden_streams: Tensor) -> tuple[Tensor, Tensor]:
    """post_mix and the layer input, in the order of the original."""
    streams = None
    if family.serves(self):
        dtype = _serving.streams_dtype(hidden_streams)
        streams = _serving.taken(family, "pre", hidden_streams, dtype, _reason(family, self))
    if streams is None:
        return family.original("connection")(self, hidden_streams)  # type: ignore[no-any-return]
    with _serving.exact(streams):
        layer_input, post_mix = identity_pre(
            streams, *_serving.parameters_of(self), **_options_of(self)
        )
    return post_mix, layer_input


def _layer(
    family: Family, self: Any, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if not family.serves(self):
        original = family.original("layer")
        return original(self, hidden_states, **kwargs)  # type: ignore[no-any-return]
    if _state.recompute_layers is not None:
        family.count("recompute", "none (streams that are not mixed are not made again)")
    dtype = _serving.embedded_dtype(hidden_states, kwargs.get("position_embeddings"))
    streams, post_mix, layer_input = _read(family, hidden_states, self.attn_hc)
    attn_input = self.input_layernorm(layer_input.to(dtype or layer_input.dtype))
    output, _, indices = self.self_attn(hidden_states=attn_input, **kwargs)
    streams = post(family, output, streams, post_mix)

    streams, post_mix, layer_input = _read(family, streams, self.ffn_hc)
    mlp_input = self.post_attention_layernorm(layer_input.to(dtype or layer_input.dtype))
    streams = post(family, self.mlp(mlp_input), streams, post_mix)
    return _serving.returned(family, self, streams, dtype), indices


def _read(family: Family, streams: Tensor, connection: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The streams for the post, the post_mix and the layer input.

    The op returns the streams too, and adds what comes back for them inside its backward: where
    the connection must be called, autograd adds the two gradients.
    """
    dtype = _serving.streams_dtype(streams)
    reason = (
        _decoder_stack.reason_of_call(connection, family)
        or _reason(family, connection)
        or _serving.streams_reason("pre", streams, dtype)
    )
    if reason:
        return streams, *connection(streams)
    family.count("pre", _serving.backend(streams))
    with _serving.exact(streams):
        layer_input, post_mix, streams = identity_pre(
            streams.to(dtype).contiguous(),
            *_serving.parameters_of(connection),
            passes_residual=True,
            **_options_of(connection),
        )
    return streams, post_mix, layer_input


def post(family: Family, layer_output: Tensor, streams: Tensor, post_mix: Tensor) -> Tensor:
    # The original adds in float32, and gives back the dtype of the streams.
    mixed, dtype = _serving.mixed_dtype(streams, layer_output), _serving.streams_dtype(streams)
    taken = _serving.taken(family, "post", streams, mixed)
    if taken is None:
        added = post_mix.float().unsqueeze(-1) * layer_output.float().unsqueeze(-2)
        return (added + streams.float()).to(streams.dtype)
    with _serving.exact(taken):
        out = identity_post(layer_output.to(mixed).contiguous(), taken, post_mix.float())
    return out.to(dtype)


def _reason(family: Family, connection: Any) -> str:
    """Why no operator stands for a connection, if so."""
    magnitude = connection.hc_post_magnitude
    if not isinstance(magnitude, float | int):
        return "a magnitude that is no number"
    return _serving.norm_reason(family, connection.input_norm, connection.hc_eps)


def _options_of(connection: Any) -> dict[str, Any]:
    return {
        "norm_eps": connection.input_norm.eps,
        "pre_eps": connection.hc_eps,
        "post_eps": connection.hc_eps,
        "post_mult": connection.hc_post_magnitude,
    }


def _family(model_type: str, since: str, prefix: str) -> Family:
    return Family(
        model_type,
        since,
        f"{prefix}UnweightedRMSNorm",
        _place,
        (
            Forward("connection", f"{prefix}HyperConnection", _connection, _stand_ins.STREAMS),
            Forward("head", f"{prefix}HyperHead", _serving.learned_head, _stand_ins.HEAD),
            Forward("layer", f"{prefix}DecoderLayer", _layer, _stand_ins.LAYER_WITH_INDICES),
        ),
    )


HY_V4 = _family("hy_v4", "5.17", "HYV4")
HY_V4_VL = _family("hy_v4_vl", "5.24", "HYV4VL")
