"""The readouts at the end of a model."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tile_mhc import errors, functional
from tile_mhc.nn._projected import DEEPSEEK, INITS, Names, OfMegatron
from tile_mhc.ops.stream_mean import stream_mean


class HyperHead(OfMegatron):
    """The readout after the last layer: `contract`.

    Of sharding, optimizers and sequence parallelism `HyperConnection` says what holds here too.

    Args:
        hidden_size: H, from 1 to 16384; fastest for multiples of 64.
        num_streams: n, one of 2, 4, 8.
        norm_eps: added to the mean square of the RMS norm.
        pre_eps: added to the gate.
        norm_weight: whether the RMS norm has a learnable weight.
        init: as in `HyperConnection`, or "hy_v4", as the method `init_hy_v4`.
        sequence_parallel: as in `HyperConnection`.
        device: where the parameters are made; "meta" too.

    Attributes:
        weight: (n, n*H) float32.
        scale: (1,) float32.
        bias: (n,) float32.
        norm_weight: (n*H,) float32, or None.

    Raises:
        ShapeError: an argument is not as above.
        UnsupportedError: n or H has no kernel.

    Source: Megatron-LM dev `learned_output_contract`; transformers `DeepseekV4HyperHead` and
        `HYV4HyperHead`.
    """

    _INITS = (*INITS, "hy_v4")
    _MEGATRON_SCALE = 1.0
    _NAMES: ClassVar[dict[str, tuple[str, Names]]] = {
        "megatron": ("hc_head_", DEEPSEEK),
        "transformers": ("hc_", DEEPSEEK),
    }

    def __init__(
        self,
        hidden_size: int,
        num_streams: int = 4,
        *,
        norm_eps: float = 1e-6,
        pre_eps: float = 1e-6,
        norm_weight: bool = False,
        init: str = "megatron",
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        errors.check_num_streams(type(self).__name__, num_streams)
        super().__init__(
            hidden_size,
            num_streams,
            num_streams,
            1,
            norm_eps,
            pre_eps,
            norm_weight,
            init,
            sequence_parallel,
            device,
        )

    def init_hy_v4(self, std: float = 0.006) -> None:
        """Initialise as transformers does HY-V4.

        weight normal with mean 0, scale 0.01, bias -log(n - 1): at first about the mean of the
        streams. norm_weight 1.

        Args:
            std: the standard deviation, `initializer_range` of a config.

        Source: transformers 5.17, `HYV4PreTrainedModel._init_weights`.
        """
        self._init_hy_v4(std)

    def forward(self, streams: Tensor) -> Tensor:
        """Read one stream out of n, with learned weights per token.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.

        Returns:
            (..., H), of the dtype of the streams.

        Raises:
            ShapeError: streams do not match the parameters.
            UnsupportedError: n or H has no kernel.
        """
        return functional.mhc_head(
            streams,
            self.weight,
            self.scale,
            self.bias,
            norm_weight=self.norm_weight,
            norm_eps=self.norm_eps,
            pre_eps=self.pre_eps,
        )


class MeanHead(nn.Module):
    """The readout of GLM-5.3, and of Megatron-LM without a learned one: `stream_mean`.

    It has no parameters, and takes any n and H that the op takes.

    Source: transformers `Glm5NextTextHyperHead`; Megatron-LM `HyperConnectionModule`.
    """

    def forward(self, streams: Tensor) -> Tensor:
        """Read the mean of the streams.

        Args:
            streams: (..., n, H) bfloat16, float16 or float32, contiguous.

        Returns:
            (..., H), of the dtype of the streams.

        Raises:
            ShapeError: streams are none.
            UnsupportedError: n, H or the dtype has no kernel.
        """
        return stream_mean(streams)
