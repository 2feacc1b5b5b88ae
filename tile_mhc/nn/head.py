"""The readout at the end of a model."""

from typing import ClassVar

import torch
from torch import Tensor

from tile_mhc import errors, functional
from tile_mhc.nn._projected import DEEPSEEK, Names, Projected


class HyperHead(Projected):
    """The readout after the last layer: `contract`.

    Of sharding, optimizers and sequence parallelism `HyperConnection` says what holds here too.

    Args:
        hidden_size: H, from 1 to 16384; fastest for multiples of 64.
        num_streams: n, one of 2, 4, 8.
        norm_eps: added to the mean square of the RMS norm.
        pre_eps: added to the gate.
        norm_weight: whether the RMS norm has a learnable weight.
        init: as in `HyperConnection`.
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

    Source: Megatron-LM dev `learned_output_contract`; transformers `DeepseekV4HyperHead`.
    """

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
