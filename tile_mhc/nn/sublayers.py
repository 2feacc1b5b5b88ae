"""A stack of sub-layers, with one op at each boundary between two."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tile_mhc import errors
from tile_mhc._hooks import has_hooks
from tile_mhc.nn.connection import Connection, DelayedHyperConnection, HyperConnection
from tile_mhc.nn.identity import IdentityHyperConnection

METHODS = ("forward", "pre", "post", "post_pre")
# As they are defined: who replaces one, in a subclass, in a class or in a module, is heard.
OWN_METHODS: dict[type[Connection], dict[str, Any]] = {
    kind: {name: getattr(kind, name) for name in METHODS}
    for kind in (HyperConnection, DelayedHyperConnection)
}


class SubLayer(NamedTuple):
    """One entry of a stack: layer_output = layer(norm(layer_input)), in its connection.

    Attributes:
        connection: reads the layer input from the streams, and what writes the output back.
        layer: takes (..., H), of the dtype of the streams, and returns the same shape and dtype,
            contiguous. Further arguments are bound to it, by `functools.partial` or a lambda.
        norm: the norm of the layer input, or None where the layer has it. A `torch.nn.RMSNorm` with
            a weight is applied by the boundary's kernels where no gradients are recorded.
    """

    connection: HyperConnection | DelayedHyperConnection | IdentityHyperConnection
    layer: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None = None

    def call(self, layer_input: Tensor) -> Tensor:
        """The layer and its norm, as a connection's `forward` takes them."""
        return self.layer(layer_input if self.norm is None else self.norm(layer_input))


def run_sublayers(streams: Tensor, sublayers: Iterable[SubLayer]) -> Tensor:
    """Run the sub-layers of a model, of DeepSeek-V4 with `tile_mhc.post_pre` at each boundary.

        for sublayer in sublayers:
            streams = sublayer.connection(streams, sublayer.call)

    What comes out, and every gradient, is that of this loop, but for what `post_pre` says of last
    bits: the gradient of the streams is rounded once less at every boundary. It is plain autograd:
    frozen parameters, `main_grad`, `torch.compile`, and checkpointing of a layer or of a part of
    the stack work as with the modules.

    Layers and norms are called, and so are their hooks. A connection is called only if it has hooks
    (as of FSDP2), if torch has hooks for all modules, or if one of its methods is not the class's
    own; then the boundaries on both of its sides are separate ops.

    Where no gradients are recorded (`torch.no_grad`, `torch.inference_mode`), a `norm` that is a
    `torch.nn.RMSNorm` with a weight of the layer input's size, and nothing that a call of it would
    run besides, is applied by the boundary's kernels, outside of autocast.

    An `IdentityHyperConnection` (HY-V4) is always called, and what comes out has the bits of the
    loop: no op joins its `identity_post` with what reads the streams next.

    Args:
        streams: (..., n, H) bfloat16, float16 or float32, contiguous.
        sublayers: the stack; each connection is a `HyperConnection` or an
            `IdentityHyperConnection`. None at all returns streams.

    Returns:
        (..., n, H), of the dtype of the streams, for a `HyperHead` or further sub-layers.

    Raises:
        ShapeError: an entry is not as above or does not fit the streams, before anything runs; a
            layer's output does not match.
        UnsupportedError: n or H has no kernel.
    """
    kinds = (HyperConnection, IdentityHyperConnection)
    found = _checked("run_sublayers", streams, sublayers, kinds)
    (out,) = _run(streams, (), found)
    return out


def run_delayed_sublayers(
    streams: Tensor, sublayers: Iterable[SubLayer], pre_mix: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the sub-layers of a DeepSeek-V4.1 model; as `run_sublayers` runs those of V4.

        for sublayer in sublayers:
            streams, pre_mix = sublayer.connection(streams, pre_mix, sublayer.call)

    Behind the last sub-layer of a model `tile_mhc.aggregate(streams, pre_mix)` reads its output; a
    part of a model hands both on.

    Args:
        streams: (..., n, H) bfloat16, float16 or float32, contiguous.
        sublayers: the stack; each connection is a `DelayedHyperConnection`.
        pre_mix: (..., n) float32, from the part of the model before; None at its start.

    Returns:
        (..., n, H), of the dtype of the streams, and the pre_mix (..., n) float32 of the last
        sub-layer.

    Raises:
        ShapeError: as of `run_sublayers`.
        UnsupportedError: n or H has no kernel.
    """
    op = "run_delayed_sublayers"
    found = _checked(op, streams, sublayers, (DelayedHyperConnection,))
    if not found:
        raise errors.ShapeError(
            f"{op}: sublayers must hold at least one, which makes a pre_mix; got none"
        )
    streams, last = _run(streams, (pre_mix,), found)
    return streams, last


def _checked(
    op: str,
    streams: Tensor,
    sublayers: Iterable[SubLayer],
    kinds: tuple[type[Connection | IdentityHyperConnection], ...],
) -> Sequence[SubLayer]:
    size = errors.check_streams(op, "streams", streams)
    found: tuple[Any, ...] = tuple(sublayers)
    for index, sublayer in enumerate(found):
        name = f"sublayers[{index}]"
        if not isinstance(sublayer, SubLayer):
            raise errors.ShapeError(
                f"{op}: {name} must be a SubLayer; got {errors.describe(sublayer)}"
            )
        connection: Any = sublayer.connection
        layer: Any = sublayer.layer
        norm: Any = sublayer.norm
        if not isinstance(connection, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise errors.ShapeError(
                f"{op}: {name}.connection must be a {wanted}; got {type(connection).__name__}"
            )
        if (connection.num_streams, connection.hidden_size) != size:
            raise errors.ShapeError(
                f"{op}: {name}.connection must be for n={size[0]}, H={size[1]}, as the streams; "
                f"got n={connection.num_streams}, H={connection.hidden_size}"
            )
        if not callable(layer) or not (norm is None or callable(norm)):
            what, value = ("layer", layer) if not callable(layer) else ("norm", norm)
            raise errors.ShapeError(
                f"{op}: {name}.{what} must be callable; got {errors.describe(value)}"
            )
    return found


def _run(
    streams: Tensor, given: Sequence[Any], sublayers: Sequence[SubLayer]
) -> tuple[Tensor, ...]:
    """The streams, and what goes with them: `given`, the pre_mix of V4.1 or nothing."""
    before: Any = None  # the connection of the sub-layer whose output is not in the streams yet
    layer_output: Any = None
    mixes: list[Any] = []
    for sublayer in sublayers:
        connection: Any = sublayer.connection
        if not _is_joined(connection):
            if before is not None:
                streams, given = before.post(layer_output, streams, *mixes[-2:]), mixes[:-2]
                before = None
            result = connection(streams, *given, sublayer.call)
            streams, *given = result if isinstance(result, tuple) else (result,)
            continue
        norm = sublayer.norm
        if before is None:
            layer_input, *mixes, streams = connection.pre(streams, *given)
        else:
            fused = _fused_norm(norm, streams)
            layer_input, *mixes, streams = connection.post_pre(
                layer_output, streams, *mixes, **fused
            )
            norm = None if fused else norm
        layer_output = sublayer.layer(layer_input if norm is None else norm(layer_input))
        before = connection
    if before is not None:
        streams, given = before.post(layer_output, streams, *mixes[-2:]), mixes[:-2]
    return streams, *given


def _is_joined(connection: Connection | IdentityHyperConnection) -> bool:
    """Whether an op may stand for a call of this connection: it would run its class's own methods.

    No op joins an identity connection with another.
    """
    if isinstance(connection, IdentityHyperConnection):
        return False
    kind = type(connection)
    own = OWN_METHODS[
        HyperConnection if isinstance(connection, HyperConnection) else DelayedHyperConnection
    ]
    return not has_hooks(connection) and all(
        getattr(kind, name) is method and name not in connection.__dict__
        for name, method in own.items()
    )


def _fused_norm(norm: object, streams: Tensor) -> dict[str, Any]:
    """What `post_pre` takes of a norm that it may apply, or nothing."""
    if (
        torch.is_grad_enabled()
        or not isinstance(norm, torch.nn.RMSNorm)
        or type(norm).forward is not torch.nn.RMSNorm.forward
        or "forward" in norm.__dict__
        or has_hooks(norm)
        or torch.is_autocast_enabled(streams.device.type)
    ):
        return {}
    weight: Tensor | None = norm.weight
    if (
        weight is None
        or weight.shape != streams.shape[-1:]
        or weight.dtype not in errors.PARAMETERS
    ):
        return {}
    # As torch's default, whatever the dtype.
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return {"layer_norm_weight": weight, "layer_norm_eps": eps}
