"""The modules round a sub-layer, for DeepSeek-V4 and for V4.1."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tile_mhc import errors, functional
from tile_mhc.nn._projected import DEEPSEEK, MEGATRON, Names, OfMegatron
from tile_mhc.nn.observe import Observed
from tile_mhc.ops.post_pre import post_pre
from tile_mhc.ops.sinkhorn import check_sinkhorn

if TYPE_CHECKING:
    from tile_mhc.ops._options import MixesOptions


class Connection(OfMegatron, Observed):
    """What the two kinds share: the parameters, the options, and what writes a layer output."""

    _MEGATRON_SCALE = 0.01
    _MEGATRON_OPTIONS: ClassVar[dict[str, dict[str, object]]] = {"dev": {"transposes_comb": False}}
    _NAMES: ClassVar[dict[str, tuple[str, Names]]] = {
        "megatron": ("", MEGATRON),
        "transformers": ("", DEEPSEEK),
    }

    def __init__(
        self,
        hidden_size: int,
        num_streams: int = 4,
        *,
        norm_eps: float = 1e-6,
        pre_eps: float = 1e-6,
        sinkhorn_eps: float = 1e-6,
        post_mult: float = 2.0,
        sinkhorn_repeat: int = 20,
        transposes_comb: bool = False,
        norm_weight: bool = False,
        init: str = "megatron",
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        op = type(self).__name__
        errors.check_num_streams(op, num_streams)
        check_sinkhorn(op, sinkhorn_repeat, sinkhorn_eps, prefix="sinkhorn_")
        errors.check_number(op, "post_mult", post_mult)
        errors.check_bool(op, "transposes_comb", transposes_comb)
        super().__init__(
            hidden_size,
            num_streams,
            num_streams * (num_streams + 2),
            3,
            norm_eps,
            pre_eps,
            norm_weight,
            init,
            sequence_parallel,
            device,
        )
        self.sinkhorn_eps, self.sinkhorn_repeat = sinkhorn_eps, sinkhorn_repeat
        self.post_mult, self.transposes_comb = post_mult, transposes_comb

    def _options(self) -> "MixesOptions":
        return {
            "norm_weight": self.norm_weight,
            "norm_eps": self.norm_eps,
            "pre_eps": self.pre_eps,
            "sinkhorn_eps": self.sinkhorn_eps,
            "post_mult": self.post_mult,
            "sinkhorn_repeat": self.sinkhorn_repeat,
        }

    def post(
        self, layer_output: Tensor, streams: Tensor, post_mix: Tensor, comb_mix: Tensor
    ) -> Tensor:
        """Write the layer output back into the streams: `tile_mhc.post`.

        Args:
            layer_output: (..., H), of the dtype of the streams, contiguous.
            streams: (..., n, H), contiguous: the last output of `pre`.
            post_mix: (..., n) float32, from `pre`.
            comb_mix: (..., n, n) float32, from `pre`.

        Returns:
            (..., n, H), of the dtype of the streams.

        Raises:
            ShapeError: a shape, dtype, device or layout does not match.
            UnsupportedError: n or H has no kernel.
        """
        return functional.mhc_post(layer_output, streams, post_mix, comb_mix)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, sinkhorn_eps={self.sinkhorn_eps}, "
            f"post_mult={self.post_mult}, sinkhorn_repeat={self.sinkhorn_repeat}"
            f"{', transposes_comb=True' if self.transposes_comb else ''}"
        )


class HyperConnection(Connection):
    """A hyper-connection: read a sub-layer's input from the streams, write its output back.

    layer_input, post_mix, comb_mix = fused_pre(streams);  out = post(layer_output, streams, ...)

    `forward` does both, around any callable; `pre` and `post` do one each, for a sub-layer that
    returns more than its output. `post_pre` is the boundary between two sub-layers as one op;
    `run_sublayers` runs a whole stack so.

    The defaults are DeepSeek-V4's and Megatron-LM's, not those of `fused_pre`, which are
    TileKernels': post_mult is 2 and sinkhorn_repeat 20.

    FSDP2 wants parameters of one dtype in a unit. In a block of another dtype make each
    HyperConnection and HyperHead a unit of its own, without a param_dtype, before the block:
    `fully_shard(hc)`, then `fully_shard(block)`. A unit's parameters are gathered for `forward`
    alone: who calls `pre` and `post` needs
    `torch.distributed.fsdp.register_fsdp_forward_method(hc, "pre")`, and so for `post_pre` (`post`
    has no parameters, and may be registered too).

    The weight is a matrix to look at, but each of its rows is a gate's own projection: an optimizer
    that orthogonalises matrices (Muon) has to leave it, with the other parameters, to AdamW. Where
    tokens are split over ranks that all hold these parameters, as in Megatron-LM's sequence
    parallelism, set `sequence_parallel`: without the mark the gradients are those of a rank's own
    tokens, with two ranks about half of what they should be, and nothing says so.

    Args:
        hidden_size: H, from 1 to 16384; fastest for multiples of 64.
        num_streams: n, one of 2, 4, 8.
        norm_eps: added to the mean square of the RMS norm.
        pre_eps: added to pre_mix.
        sinkhorn_eps: added to the softmax and the divisors of Sinkhorn.
        post_mult: factor of post_mix.
        sinkhorn_repeat: Sinkhorn steps, from 1 to 1024.
        transposes_comb: whether Sinkhorn's result is transposed before `post` mixes the streams by
            it: its rows are then destinations, as Megatron-LM's main had it (`from_megatron`). It
            is a small kernel more.
        norm_weight: whether the RMS norm has a learnable weight.
        init: "megatron" or "deepseek_v4", as the methods `init_megatron` and `init_deepseek_v4`.
        sequence_parallel: set `sequence_parallel = True` on every parameter, by which Megatron-LM
            finds the gradients to sum over tensor parallel ranks.
        device: where the parameters are made; "meta" too.

    Attributes:
        weight: (n*(n+2), n*H) float32.
        scale: (3,) float32.
        bias: (n*(n+2),) float32.
        norm_weight: (n*H,) float32, or None.

    Raises:
        ShapeError: an argument is not as above.
        UnsupportedError: n, H or sinkhorn_repeat has no kernel.

    Source: mHC paper (arXiv 2512.24880), sec. 4; Megatron-LM dev `HyperConnectionModule`.
    """

    _MEGATRON_OPTIONS: ClassVar[dict[str, dict[str, object]]] = {
        **Connection._MEGATRON_OPTIONS,
        "main-4531": {"transposes_comb": True, "pre_eps": 0, "sinkhorn_eps": 0},
    }

    def pre(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the layer input and the mixes: `fused_pre` with `passes_residual`.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.

        Returns:
            layer_input (..., H), of the dtype of the streams; post_mix (..., n) and comb_mix
            (..., n, n) float32; and a view of the streams for `post`: the gradient of the streams
            is then rounded once.

        Raises:
            ShapeError: streams do not match the parameters.
            UnsupportedError: n or H has no kernel.
        """
        layer_input, post_mix, comb_mix, through = functional.mhc_pre(
            streams, self.weight, self.scale, self.bias, passes_residual=True, **self._options()
        )
        if self.transposes_comb:
            comb_mix = comb_mix.mT.contiguous()
        if self._observers:
            self._observe(streams, post_mix, comb_mix)
        return layer_input, post_mix, comb_mix, through

    def post_pre(
        self,
        layer_output: Tensor,
        streams: Tensor,
        post_mix: Tensor,
        comb_mix: Tensor,
        *,
        layer_norm_weight: Tensor | None = None,
        layer_norm_eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The `post` of the sub-layer before and the `pre` of this one: `tile_mhc.post_pre`.

        Args:
            layer_output: (..., H) of the sub-layer before, contiguous.
            streams: (..., n, H), contiguous, from the `pre` or `post_pre` before; as the mixes.
            post_mix: (..., n) float32.
            comb_mix: (..., n, n) float32.
            layer_norm_weight: optional (H,), of an RMS norm of the layer input; not allowed when a
                gradient is needed.
            layer_norm_eps: added to the mean square of that norm.

        Returns:
            layer_input, post_mix, comb_mix and the new streams, as `pre` returns them.

        Raises:
            ShapeError: a shape, dtype, device or layout does not match.
            UnsupportedError: n or H has no kernel, or a layer_norm_weight has no gradient.
        """
        streams, layer_input, post_mix, comb_mix = post_pre(
            layer_output,
            streams,
            post_mix,
            comb_mix,
            self.weight,
            self.scale,
            self.bias,
            layer_norm_weight=layer_norm_weight,
            layer_norm_eps=layer_norm_eps,
            **self._options(),
        )
        if self.transposes_comb:
            comb_mix = comb_mix.mT.contiguous()
        if self._observers:
            self._observe(streams, post_mix, comb_mix)
        return layer_input, post_mix, comb_mix, streams

    def forward(
        self, streams: Tensor, sublayer: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run a sub-layer on the streams.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.
            sublayer: what takes the layer input (..., H), of the dtype of the streams, and returns
                the same shape and dtype, contiguous. Its norm, if it has one, is its own.
            args: passed on to the sub-layer.
            kwargs: passed on to the sub-layer.

        Returns:
            (..., n, H), of the dtype of the streams.

        Raises:
            ShapeError: streams or the sub-layer's output do not match.
            UnsupportedError: n or H has no kernel.
        """
        layer_input, post_mix, comb_mix, streams = self.pre(streams)
        return self.post(sublayer(layer_input, *args, **kwargs), streams, post_mix, comb_mix)


class DelayedHyperConnection(Connection):
    """A hyper-connection of DeepSeek-V4.1: the layer input is read by the pre_mix made before.

    layer_input = aggregate(streams, pre_mix)

    What `HyperConnection` says of sharding, optimizers and sequence parallelism holds here too, and
    the parameters, their names and state dicts are the same. A pre_mix goes from each sub-layer to
    the one after: `forward` takes and returns it behind the streams. The first sub-layer's is 1 for
    stream 0 and 0 for the others, which None stands for; the last one's reads the model's output:

        pre_mix = None
        for connection, sublayer in sublayers:
            streams, pre_mix = connection(streams, pre_mix, sublayer)
        hidden = tile_mhc.aggregate(streams, pre_mix)

    `run_delayed_sublayers` does the same with one op a boundary.

    Args:
        hidden_size: H, from 1 to 16384; fastest for multiples of 64.
        num_streams: n, one of 2, 4, 8.
        norm_eps: added to the mean square of the RMS norm.
        options: the other arguments of `HyperConnection`.

    Attributes:
        weight: (n*(n+2), n*H) float32.
        scale: (3,) float32.
        bias: (n*(n+2),) float32.
        norm_weight: (n*H,) float32, or None.

    Raises:
        ShapeError: an argument is not as above.
        UnsupportedError: n, H or sinkhorn_repeat has no kernel.

    Source: DeepSeek-V4.1, as in vLLM's `mhc_fused_post_pre_delayed` and DeepGEMM's `mega_mhc`.
    """

    def __init__(
        self, hidden_size: int, num_streams: int = 4, *, norm_eps: float = 1e-20, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_streams, norm_eps=norm_eps, **options)

    def pre(
        self, streams: Tensor, pre_mix: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Compute the layer input and the mixes: `fused_pre` with a `pre_mix`.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.
            pre_mix: (..., n) float32, from the sub-layer before; None for the first one's.

        Returns:
            layer_input (..., H), of the dtype of the streams; the next pre_mix (..., n), post_mix
            (..., n) and comb_mix (..., n, n) float32; and a view of the streams for `post`.

        Raises:
            ShapeError: streams or pre_mix do not match the parameters.
            UnsupportedError: n or H has no kernel.
        """
        if pre_mix is None:
            errors.check_streams(type(self).__name__, "streams", streams)
            pre_mix = first_pre_mix(streams)
        layer_input, next_mix, post_mix, comb_mix, through = functional.mhc_pre(
            streams,
            self.weight,
            self.scale,
            self.bias,
            pre_mix=pre_mix,
            passes_residual=True,
            **self._options(),
        )
        if self.transposes_comb:
            comb_mix = comb_mix.mT.contiguous()
        if self._observers:
            self._observe(streams, post_mix, comb_mix, next_mix)
        return layer_input, next_mix, post_mix, comb_mix, through

    def post_pre(
        self,
        layer_output: Tensor,
        streams: Tensor,
        pre_mix: Tensor,
        post_mix: Tensor,
        comb_mix: Tensor,
        *,
        layer_norm_weight: Tensor | None = None,
        layer_norm_eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The `post` of the sub-layer before and the `pre` of this one: `tile_mhc.post_pre`.

        Args:
            layer_output: (..., H) of the sub-layer before, contiguous.
            streams: (..., n, H), contiguous, from the `pre` or `post_pre` before; as the mixes.
            pre_mix: (..., n) float32.
            post_mix: (..., n) float32.
            comb_mix: (..., n, n) float32.
            layer_norm_weight: optional (H,), of an RMS norm of the layer input; not allowed when a
                gradient is needed.
            layer_norm_eps: added to the mean square of that norm.

        Returns:
            layer_input, pre_mix, post_mix, comb_mix and the new streams, as `pre` returns them.

        Raises:
            ShapeError: a shape, dtype, device or layout does not match.
            UnsupportedError: n or H has no kernel, or a layer_norm_weight has no gradient.
        """
        streams, layer_input, pre_mix, post_mix, comb_mix = post_pre(
            layer_output,
            streams,
            post_mix,
            comb_mix,
            self.weight,
            self.scale,
            self.bias,
            pre_mix=pre_mix,
            layer_norm_weight=layer_norm_weight,
            layer_norm_eps=layer_norm_eps,
            **self._options(),
        )
        if self.transposes_comb:
            comb_mix = comb_mix.mT.contiguous()
        if self._observers:
            self._observe(streams, post_mix, comb_mix, pre_mix)
        return layer_input, pre_mix, post_mix, comb_mix, streams

    def forward(
        self,
        streams: Tensor,
        pre_mix: Tensor | None,
        sublayer: Callable[..., Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run a sub-layer on the streams.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.
            pre_mix: (..., n) float32, from the sub-layer before; None for the first one's.
            sublayer: as of `HyperConnection.forward`.
            args: passed on to the sub-layer.
            kwargs: passed on to the sub-layer.

        Returns:
            (..., n, H), of the dtype of the streams, and the pre_mix (..., n) for the sub-layer
            after.

        Raises:
            ShapeError: streams, pre_mix or the sub-layer's output do not match.
            UnsupportedError: n or H has no kernel.
        """
        layer_input, pre_mix, post_mix, comb_mix, streams = self.pre(streams, pre_mix)
        layer_output = sublayer(layer_input, *args, **kwargs)
        return self.post(layer_output, streams, post_mix, comb_mix), pre_mix


def first_pre_mix(streams: Tensor) -> Tensor:
    """The pre_mix of the first sub-layer, (..., n) float32: stream 0 alone."""
    *lead, n, _ = streams.shape
    one = torch.eye(1, n, dtype=torch.float32, device=streams.device)
    return one.expand(math.prod(lead), n).reshape(*lead, n)
