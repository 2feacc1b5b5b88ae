"""A whole decoder stack of transformers': which layers hand their output to the next.

A layer that is followed by another need not write its last output into the streams: the next one
does, together with all that is before its attention (`tile_mhc.post_pre`). Then what goes from
layer to layer is a `Pending`, which nothing but a layer can read. Whoever looks at the streams
between two layers has to see streams: hooks on either of the two, checkpointing, recorded hidden
states.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tile_mhc._hooks import has_hooks, own_hooks
from tile_mhc.integrations.transformers import _recompute_layers as groups
from tile_mhc.integrations.transformers import _state
from tile_mhc.integrations.transformers._family import Family

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


def model(family: Family, self: Any, **kwargs: Any) -> Any:
    """transformers' own code, which tells the layers that they may hand on."""
    original = family.original("model")
    if torch.compiler.is_compiling():  # the layers' code is part of what is compiled
        return original(self, **kwargs | for_layers(family, self, kwargs))
    with _Running(family):
        try:
            return original(self, **kwargs | for_layers(family, self, kwargs))
        finally:
            groups.close()


def for_layers(family: Family, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model gives its layers besides: nothing where they are not all ours.

    Asked for while the model counts as running, as from then on its layers stay ours.
    """
    if KEYWORD in kwargs or not family.serves(model):
        return {}
    reasons = _reasons(family, model, kwargs)
    if reasons is None:
        return {}
    for reason in filter(None, reasons):
        family.count("boundary", f"separate ({reason})")
    return {KEYWORD: tuple(not reason for reason in reasons)}


class _Running:
    """What a layer hands on, only ours can take: see `unpatch`."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def __enter__(self) -> None:
        with _state.lock:
            self._family.running += 1

    def __exit__(self, *_: object) -> None:
        with _state.lock:
            self._family.running -= 1
            if not self._family.running and not self._family.in_force:
                self._family.restore()


def _reasons(family: Family, model: Any, kwargs: dict[str, Any]) -> Sequence[str] | None:
    """Of each layer but the last, why it must not hand on, or "".

    None where a layer is not transformers', or not in its place: it would not know what to do.
    """
    layers = list(model.layers)
    if not all(_is_own(family, layer) for layer in layers):
        return None
    if [family.place(layer)[0] for layer in layers] != list(range(len(layers))):
        return None
    if kwargs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False)):
        return ["hidden states are recorded"] * (len(layers) - 1)
    alone = [_reason(layer) for layer in layers]
    return [alone[at] or alone[at + 1] for at in range(len(layers) - 1)]


def _is_own(family: Family, layer: Any) -> bool:
    forward: Any = type(layer).forward
    # From 5.24 on each class derived of it, as FSDP2 makes them, wraps its forward once more.
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    is_own = family.serves(layer) and family.forwards["layer"].owns(forward)
    return is_own and "forward" not in layer.__dict__


def _reason(layer: Any) -> str:
    if layer.gradient_checkpointing and layer.training:
        return "checkpointing"
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks for all modules"
    if any(hook.__module__ != RECORDING for hook in own_hooks(layer)):
        return "hooks on a layer"
    return ""


def reason_of_call(connection: Any, family: Family) -> str:
    """Why a connection must be called, rather than an op stand for it and for the post before."""
    if has_hooks(connection):
        return "hooks on a hyper-connection"
    forward: Any = type(connection).forward
    if not family.forwards["connection"].owns(forward) or "forward" in connection.__dict__:
        return "a hyper-connection has another forward"
    return ""
