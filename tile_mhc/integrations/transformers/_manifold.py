"""DeepSeek's hyper-connections, with a comb_mix: what DeepSeek-V4 and GLM-5.3 run.

The boundary between two sub-layers is one op, `tile_mhc.post_pre`: within a layer, and from layer
to layer where the model lets them hand on (`_decoder_stack`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tile_mhc import errors, functional
from tile_mhc.integrations.transformers import _decoder_stack, _serving
from tile_mhc.integrations.transformers._decoder_stack import Pending
from tile_mhc.integrations.transformers._family import Family
from tile_mhc.ops.post_pre import post_pre
from tile_mhc.ops.sinkhorn import check_sinkhorn

if TYPE_CHECKING:
    from tile_mhc.ops._options import MixesOptions

POST_MULT = 2.0  # a literal in the original forward, not a field of its config


def connection(family: Family, self: Any, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """post_mix, comb_mix and the layer input, in the order of the original."""
    original = family.original("connection")
    if not family.serves(self):
        return original(self, hidden_streams)  # type: ignore[no-any-return]
    dtype = _serving.streams_dtype(hidden_streams)
    streams = _serving.taken(family, "pre", hidden_streams, dtype, _reason(family, self))
    if streams is None:
        return original(self, hidden_streams)  # type: ignore[no-any-return]
    with _serving.exact(streams):
        layer_input, post_mix, comb_mix = functional.mhc_pre(
            streams, *_serving.parameters_of(self), **_options_of(self)
        )
    return post_mix, comb_mix, layer_input


def run_layer(
    family: Family,
    layer: Any,
    given: Tensor | Pending,
    dtype: torch.dtype | None,
    hands_on: tuple[bool, ...] | None,
    attention: Callable[[Tensor], tuple[Tensor, Any]],
    mlp: Callable[[Tensor], Tensor],
) -> tuple[Tensor | Pending, Any]:
    """The streams behind a decoder layer, and what its attention returns besides its output.

    Args:
        family: the layer's.
        layer: has `attn_hc`, `input_layernorm`, `ffn_hc` and `post_attention_layernorm`.
        given: the streams, or what the layer before has handed on.
        dtype: of the sub-layers' inputs, or None for that of the streams.
        hands_on: what the model says of its layers, or None where it does not.
        attention: given its normed input.
        mlp: given its normed input.
    """
    index, _ = family.place(layer)
    if hands_on is None and index > 0:
        family.count("boundary", "separate (not in a model with layers of transformers alone)")
    streams, post_mix, comb_mix, layer_input = _boundary(family, given, layer.attn_hc)
    output, besides = attention(layer.input_layernorm(layer_input.to(dtype or layer_input.dtype)))

    given = Pending(output, streams, post_mix, comb_mix)
    streams, post_mix, comb_mix, layer_input = _boundary(family, given, layer.ffn_hc)
    output = mlp(layer.post_attention_layernorm(layer_input.to(dtype or layer_input.dtype)))

    given = Pending(output, streams, post_mix, comb_mix)
    if hands_on and index < len(hands_on) and hands_on[index]:
        return given, besides
    return _serving.returned(family, layer, post(family, *given), dtype), besides


def _boundary(
    family: Family, given: Tensor | Pending, connection: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The streams before a sub-layer, its post_mix and comb_mix, and its layer input."""
    if not isinstance(given, Pending):
        return given, *connection(given)
    layer_output, streams, post_mix, comb_mix = given
    dtype = _serving.mixed_dtype(streams, layer_output)
    reason = (
        _decoder_stack.reason_of_call(connection, family)
        or _reason(family, connection)
        or _serving.streams_reason("boundary", streams, dtype)
    )
    if reason:
        family.count("boundary", f"separate ({reason})")
        streams = post(family, *given)
        return streams, *connection(streams)
    family.count("boundary", _serving.backend(streams))
    with _serving.exact(streams):
        streams, layer_input, post_mix, comb_mix = post_pre(
            layer_output.to(dtype).contiguous(),
            streams.to(dtype).contiguous(),
            post_mix.float(),
            comb_mix.float(),
            *_serving.parameters_of(connection),
            **_options_of(connection),
        )
    return streams, post_mix, comb_mix, layer_input


def post(
    family: Family, layer_output: Tensor, streams: Tensor, post_mix: Tensor, comb_mix: Tensor
) -> Tensor:
    dtype = _serving.mixed_dtype(streams, layer_output)
    taken = _serving.taken(family, "post", streams, dtype)
    if taken is None:  # in a line of the original layer
        post_mix, comb_mix = post_mix.to(streams.dtype), comb_mix.to(streams.dtype)
        added = post_mix.unsqueeze(-1) * layer_output.unsqueeze(-2)
        return added + torch.matmul(comb_mix.transpose(-1, -2), streams)
    with _serving.exact(taken):
        return functional.mhc_post(
            layer_output.to(dtype).contiguous(), taken, post_mix.float(), comb_mix.float()
        )


def streams_of(family: Family, given: Tensor | Pending) -> Tensor:
    """For an original layer that was handed something on: the patch has been undone meanwhile."""
    return post(family, *given) if isinstance(given, Pending) else given


def _reason(family: Family, connection: Any) -> str:
    """Why no operator stands for a connection, if so."""
    reason = _serving.norm_reason(family, connection.input_norm, connection.hc_eps)
    if reason:
        return reason
    steps = connection.hc_sinkhorn_iters
    try:
        check_sinkhorn("pre", steps, connection.hc_eps)
    except (errors.ShapeError, errors.UnsupportedError):
        return f"no kernel for hc_sinkhorn_iters={steps}"
    return ""


def _options_of(connection: Any) -> "MixesOptions":
    return {
        "norm_eps": connection.input_norm.eps,
        "pre_eps": connection.hc_eps,
        "sinkhorn_eps": connection.hc_eps,
        "post_mult": POST_MULT,
        "sinkhorn_repeat": connection.hc_sinkhorn_iters,
    }
