"""The module round a sub-layer whose streams are not mixed, as HY-V4 has it."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from tile_mhc import errors
from tile_mhc.nn._projected import DEEPSEEK, Names, Projected
from tile_mhc.nn.mixes import IdentityMixes
from tile_mhc.nn.observe import Observed
from tile_mhc.ops.identity_post import identity_post
from tile_mhc.ops.identity_pre import identity_pre


class IdentityHyperConnection(Projected, Observed):
    """A hyper-connection that adds a sub-layer's output to every stream, with a learned weight.

    layer_input, post_mix = identity_pre(streams);  out = identity_post(layer_output, streams, ...)

    `forward` does both, around any callable; `pre` and `post` do one each, and `run_sublayers` runs
    a stack. There is no comb_mix: a stream goes on as it is, and its gradient back.

    The defaults are HY-V4's; its `HyperHead` wants a norm_eps of 1e-5, too. What `HyperConnection`
    says of sharding, optimizers and sequence parallelism holds here too.

    Args:
        hidden_size: H, from 1 to 16384; fastest for multiples of 64.
        num_streams: n, one of 2, 4, 8.
        norm_eps: added to the mean square of the RMS norm (HY-V4: `rms_norm_eps`).
        pre_eps: added to pre_mix (HY-V4: `hc_eps`).
        post_eps: added to post_mix (HY-V4: `hc_eps`).
        post_mult: factor of post_mix (HY-V4: `hc_magnitude`).
        norm_weight: whether the RMS norm has a learnable weight.
        init: "hy_v4", as the method `init_hy_v4`.
        sequence_parallel: as in `HyperConnection`.
        device: where the parameters are made; "meta" too.

    Attributes:
        weight: (2*n, n*H) float32.
        scale: (2,) float32.
        bias: (2*n,) float32.
        norm_weight: (n*H,) float32, or None.

    Raises:
        ShapeError: an argument is not as above.
        UnsupportedError: n or H has no kernel.

    Source: transformers `HYV4HyperConnection` and `HYV4DecoderLayer`.
    """

    _INITS = ("hy_v4",)
    _MIXES = IdentityMixes
    _NAMES: ClassVar[dict[str, tuple[str, Names]]] = {"transformers": ("", DEEPSEEK)}

    def __init__(
        self,
        hidden_size: int,
        num_streams: int = 4,
        *,
        norm_eps: float = 1e-5,
        pre_eps: float = 1e-6,
        post_eps: float = 1e-6,
        post_mult: float = 2.0,
        norm_weight: bool = False,
        init: str = "hy_v4",
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        op = type(self).__name__
        errors.check_num_streams(op, num_streams)
        errors.check_number(op, "post_eps", post_eps)
        errors.check_number(op, "post_mult", post_mult)
        super().__init__(
            hidden_size,
            num_streams,
            2 * num_streams,
            2,
            norm_eps,
            pre_eps,
            norm_weight,
            init,
            sequence_parallel,
            device,
        )
        self.post_eps, self.post_mult = post_eps, post_mult

    def init_hy_v4(self, std: float = 0.006) -> None:
        """Initialise as transformers does HY-V4.

        weight normal with mean 0, scale 0.01, bias -log(n - 1) of pre_mix, which then reads about
        the mean of the streams, and 0 of post_mix; norm_weight 1.

        Args:
            std: the standard deviation, `initializer_range` of a config.

        Source: transformers 5.17, `HYV4PreTrainedModel._init_weights`.
        """
        self._init_hy_v4(std)

    def pre(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the layer input and post_mix: `identity_pre` with `passes_residual`.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.

        Returns:
            layer_input (..., H), of the dtype of the streams; post_mix (..., n) float32; and a view
            of the streams for `post`: the gradient of the streams is then rounded once.

        Raises:
            ShapeError: streams do not match the parameters.
            UnsupportedError: n or H has no kernel.
        """
        layer_input, post_mix, through = identity_pre(
            streams,
            self.weight,
            self.scale,
            self.bias,
            norm_weight=self.norm_weight,
            norm_eps=self.norm_eps,
            pre_eps=self.pre_eps,
            post_eps=self.post_eps,
            post_mult=self.post_mult,
            passes_residual=True,
        )
        if self._observers:
            self._observe(streams, post_mix)
        return layer_input, post_mix, through

    def post(self, layer_output: Tensor, streams: Tensor, post_mix: Tensor) -> Tensor:
        """Add the layer output to the streams: `identity_post`.

        Args:
            layer_output: (..., H), of the dtype of the streams, contiguous.
            streams: (..., n, H), contiguous: the last output of `pre`.
            post_mix: (..., n) float32, from `pre`.

        Returns:
            (..., n, H), of the dtype of the streams.

        Raises:
            ShapeError: a shape, dtype, device or layout does not match.
            UnsupportedError: n or H has no kernel.
        """
        return identity_post(layer_output, streams, post_mix)

    def forward(
        self, streams: Tensor, sublayer: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run a sub-layer on the streams.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.
            sublayer: as of `HyperConnection.forward`.
            args: passed on to the sub-layer.
            kwargs: passed on to the sub-layer.

        Returns:
            (..., n, H), of the dtype of the streams.

        Raises:
            ShapeError: streams or the sub-layer's output do not match.
            UnsupportedError: n or H has no kernel.
        """
        layer_input, post_mix, streams = self.pre(streams)
        return self.post(sublayer(layer_input, *args, **kwargs), streams, post_mix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, post_eps={self.post_eps}, post_mult={self.post_mult}"
