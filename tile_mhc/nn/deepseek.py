"""DeepSeek-V4.1's decoder, by the names of its checkpoints."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tile_mhc import errors
from tile_mhc._hooks import has_hooks
from tile_mhc.nn._projected import DEEPSEEK
from tile_mhc.nn.connection import DelayedHyperConnection
from tile_mhc.nn.sublayers import SubLayer, run_delayed_sublayers
from tile_mhc.ops.aggregate import aggregate
from tile_mhc.ops.expand import expand

# What a layer's connections have, and by what name the checkpoints do.
NAMES = {
    f"{connection}.{ours}": f"{connection}_{theirs}"
    for connection in ("hc_attn", "hc_ffn")
    for ours, (theirs,) in DEEPSEEK.items()
}


class DeepSeekV41Layer(nn.Module):
    """A layer of DeepSeek-V4.1: attention and feed-forward, each with its norm and connection.

    The two modules are the caller's. State dicts have the names of DeepSeek's checkpoints: beside
    `attn.*`, `ffn.*` and `engram.*`, which are the caller's too,

    ==========================  ===============================================
    of a checkpoint             here
    ==========================  ===============================================
    attn_norm.weight            attn_norm.weight
    ffn_norm.weight             ffn_norm.weight
    hc_attn_fn, hc_ffn_fn       weight of hc_attn, of hc_ffn: (n*(n+2), n*H)
    hc_attn_scale, ..           scale of them: (3,)
    hc_attn_base, ..            bias of them: (n*(n+2),)
    ==========================  ===============================================

    A parameter's own name, as in `named_parameters`, is by the module: `hc_attn.weight`.
    `load_state_dict` takes either. With FSDP2 make hc_attn and hc_ffn units of their own before the
    layer, as `HyperConnection` says.

    Args:
        hidden_size: H, from 1 to 16384; fastest for multiples of 64.
        attn: takes the normed layer input (..., H) and the keyword arguments of the decoder's call;
            returns the same shape, of the dtype of the streams, contiguous.
        ffn: the same, but that it is given the layer input alone.
        engram: optional; takes the streams (..., n, H) before the layer, and the keyword arguments
            of the decoder's call, and returns streams.
        num_streams: n, one of 2, 4, 8.
        norm_eps: `rms_norm_eps` of a config: added to the mean square of all RMS norms.
        hc_eps: `hc_eps` of a config: added to pre_mix, and in Sinkhorn.
        sinkhorn_repeat: `hc_sinkhorn_iters` of a config.
        init: as in `HyperConnection`.
        sequence_parallel: as in `HyperConnection`.
        device: where norms and connections are made; "meta" too.
        dtype: of the norms; None is torch's default. The connections are float32.

    Attributes:
        hc_attn: the `DelayedHyperConnection` of attn.
        hc_ffn: that of ffn.
        attn_norm: the `torch.nn.RMSNorm` before attn.
        ffn_norm: that before ffn.

    Raises:
        ShapeError: an argument is not as above.
        UnsupportedError: n, H or sinkhorn_repeat has no kernel.

    Source: DeepSeek-V4.1's checkpoints, as vLLM's `models/deepseek_v4_1` loads and runs them.
    """

    def __init__(
        self,
        hidden_size: int,
        attn: Callable[..., Tensor],
        ffn: Callable[[Tensor], Tensor],
        *,
        engram: Callable[..., Tensor] | None = None,
        num_streams: int = 4,
        norm_eps: float = 1e-20,
        hc_eps: float = 1e-6,
        sinkhorn_repeat: int = 20,
        init: str = "deepseek_v4",
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, module in (("attn", attn), ("ffn", ffn), ("engram", engram)):
            if not callable(module) and not (name == "engram" and module is None):
                raise errors.ShapeError(
                    f"{op}: {name} must be callable; got {errors.describe(module)}"
                )
        connection = partial(
            DelayedHyperConnection,
            hidden_size,
            num_streams,
            norm_eps=norm_eps,
            pre_eps=hc_eps,
            sinkhorn_eps=hc_eps,
            sinkhorn_repeat=sinkhorn_repeat,
            init=init,
            sequence_parallel=sequence_parallel,
            device=device,
        )
        norm = partial(nn.RMSNorm, hidden_size, eps=norm_eps, device=device, dtype=dtype)
        self.engram, self.attn, self.ffn = engram, attn, ffn
        self.hc_attn, self.hc_ffn = connection(), connection()
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.register_state_dict_post_hook(_to_checkpoint)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_checkpoint)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_name_missing)  # type: ignore[no-untyped-call]

    def forward(
        self, streams: Tensor, pre_mix: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the layer alone.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.
            pre_mix: (..., n) float32, from the layer before; None for the first one.
            kwargs: passed on to `attn` and `engram`.

        Returns:
            (..., n, H), of the dtype of the streams, and the pre_mix (..., n) float32 for the layer
            after.

        Raises:
            ShapeError: as of `run_sublayers`.
            UnsupportedError: n or H has no kernel.
        """
        if self.engram is not None:
            streams = self.engram(streams, **kwargs)
        return run_delayed_sublayers(streams, self.sublayers(**kwargs), pre_mix)

    def sublayers(self, **kwargs: Any) -> tuple[SubLayer, SubLayer]:
        """The two entries of a stack; a subclass may call its modules in another way.

        Args:
            kwargs: those of the decoder's call.

        Returns:
            attn and ffn, each in its connection, with its norm.
        """
        attn = partial(self.attn, **kwargs) if kwargs else self.attn
        return (
            SubLayer(self.hc_attn, attn, norm=self.attn_norm),
            SubLayer(self.hc_ffn, self.ffn, norm=self.ffn_norm),
        )


def _parameter(ours: str) -> property:
    return property(lambda layer: layer.get_parameter(ours))


# What takes the keys of a state dict for attributes, as torch.distributed.checkpoint does, finds
# them.
for _ours, _theirs in NAMES.items():
    setattr(DeepSeekV41Layer, _theirs, _parameter(_ours))


class DeepSeekV41Decoder(nn.Module):
    """DeepSeek-V4.1 from the embedding to the logits, of the caller's attention and feed-forward.

        streams, pre_mix = expand(embed(inputs), n), None
        for layer in layers:  # with one op a boundary
            streams, pre_mix = layer.hc_attn(streams, pre_mix, lambda x: attn(attn_norm(x)))
            streams, pre_mix = layer.hc_ffn(streams, pre_mix, lambda x: ffn(ffn_norm(x)))
        logits = head(norm(aggregate(streams, pre_mix)))

    The streams of the first layer are the embedding n times. A layer input is read by the pre_mix
    that the sub-layer before has made, the first by stream 0, and the output by that of the last
    feed-forward: there is no head of hyper-connections, and the checkpoints have no `hc_head_*`.

    State dicts have the names of DeepSeek's checkpoints: `embed.weight`, `layers.0.*` as in
    `DeepSeekV41Layer`, `norm.weight`, `head.weight`. A whole checkpoint has further keys, of the
    multi-token prediction (`mtp.*`) and of images (`vision.*`, `aligner.*`, `image_*`), which are
    no part of the decoder: leave them out, or load with `strict=False`.

    Layers that have an engram, hooks (as of FSDP2) or another forward, or stand in a module that
    checkpoints or compiles them, are called; then the ops of the boundary before them are separate.

    Args:
        layers: one `DeepSeekV41Layer` or more, of one width.
        embed: optional; makes hidden states (..., H) of what the decoder is called with.
        norm: optional; the norm of the output, such as `torch.nn.RMSNorm(H, eps=1e-20)`.
        head: optional; makes logits of the normed output.

    Raises:
        ShapeError: an argument is not as above.

    Source: DeepSeek-V4.1's checkpoints, as vLLM's `models/deepseek_v4_1` loads and runs them.
    """

    def __init__(
        self,
        layers: Iterable[DeepSeekV41Layer],
        *,
        embed: Callable[..., Tensor] | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        found: list[Any] = list(layers)
        if not found or not all(isinstance(layer, DeepSeekV41Layer) for layer in found):
            raise errors.ShapeError(
                f"{op}: layers must be of DeepSeekV41Layer, and one or more; "
                f"got {[type(layer).__name__ for layer in found]}"
            )
        for name, module in (("embed", embed), ("norm", norm), ("head", head)):
            if module is not None and not callable(module):
                raise errors.ShapeError(
                    f"{op}: {name} must be callable or None; got {errors.describe(module)}"
                )
        self.embed, self.norm, self.head = embed, norm, head
        self.layers = nn.ModuleList(found)
        self.num_streams: int = found[0].hc_attn.num_streams

    def forward(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        """Run the model.

        Args:
            inputs: what `embed` takes, or without one hidden states (..., H) bfloat16, float16 or
                float32, contiguous.
            kwargs: passed on to every `attn` and `engram`.

        Returns:
            What `head` makes, or without one (..., H).

        Raises:
            ShapeError: the hidden states or a layer's output do not match.
            UnsupportedError: n or H has no kernel.
        """
        hidden = inputs if self.embed is None else self.embed(inputs)
        streams = expand(hidden, self.num_streams)
        hidden = aggregate(*self.run_layers(streams, **kwargs))
        hidden = hidden if self.norm is None else self.norm(hidden)
        return hidden if self.head is None else self.head(hidden)

    def run_layers(
        self, streams: Tensor, pre_mix: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the layers alone: what lies between two stages of a pipeline is streams and pre_mix.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.
            pre_mix: (..., n) float32, from the stage before; None at the start of the model.
            kwargs: passed on to every `attn` and `engram`.

        Returns:
            (..., n, H), of the dtype of the streams, and the pre_mix (..., n) float32 of the last
            sub-layer.

        Raises:
            ShapeError: as of `run_sublayers`.
            UnsupportedError: n or H has no kernel.
        """
        stack: list[SubLayer] = []
        mix: Any = pre_mix
        layer: Any
        for layer in self.layers:
            if _is_plain(layer):
                stack += layer.sublayers(**kwargs)
                continue
            if stack:
                streams, mix = run_delayed_sublayers(streams, stack, mix)
                stack = []
            streams, mix = layer(streams, mix, **kwargs)
        if stack:
            streams, mix = run_delayed_sublayers(streams, stack, mix)
        return streams, mix


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of this layer would run nothing but its two sub-layers."""
    return (
        isinstance(layer, DeepSeekV41Layer)  # not what checkpoints or compiles one
        and type(layer).forward is DeepSeekV41Layer.forward
        and "forward" not in layer.__dict__
        and layer.engram is None
        and not has_hooks(layer)
    )


def _to_checkpoint(_module: nn.Module, state_dict: Any, prefix: str, _: object) -> None:
    for ours, theirs in NAMES.items():
        if prefix + ours in state_dict:  # not if what holds it has wrapped it
            state_dict[prefix + theirs] = state_dict.pop(prefix + ours)


def _from_checkpoint(_module: nn.Module, state_dict: Any, prefix: str, *_: object) -> None:
    for ours, theirs in NAMES.items():
        if prefix + theirs in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)


def _name_missing(_module: nn.Module, incompatible: Any) -> None:
    """What `load_state_dict` complains of, by the names that the caller knows."""
    for index, key in enumerate(incompatible.missing_keys):
        for ours, theirs in NAMES.items():
            if f".{key}".endswith(f".{ours}"):
                incompatible.missing_keys[index] = key.removesuffix(ours) + theirs
