"""What an observer of hyper-connections is shown: `observe_mixes`."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from tile_mhc.ops.projection import projection


class Mixes(NamedTuple):
    """The mixes of one call of a hyper-connection, for an observer: see `observe_mixes`.

    All tensors are detached, and on the device of the model; nothing here waits for it.

    Attributes:
        connection: whose they are.
        streams: (..., n, H), which they were made of, as they are: not a copy.
        post_mix: (..., n) float32.
        comb_mix: (..., n, n) float32, index [in, out], as `post` takes it.
        pre_mix: (..., n) float32, made for the next sub-layer, of DeepSeek-V4.1; otherwise None.
    """

    connection: nn.Module
    streams: Tensor
    post_mix: Tensor
    comb_mix: Tensor
    pre_mix: Tensor | None = None

    @property
    def row_sums(self) -> Tensor:
        """How much of each stream is handed on, the sums over out, (..., n); near 1."""
        return self.comb_mix.sum(-1)

    @property
    def column_sums(self) -> Tensor:
        """How much each new stream is made of, the sums over in, (..., n); near 1."""
        return self.comb_mix.sum(-2)

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the gates and Sinkhorn are given: mixes * scale + bias.

        The mixes are projected once more, which reads the streams. Where the parameters are
        gathered for a call (FSDP), this has to be called by the observer.

        Returns:
            The logits of pre_mix (..., n), of post_mix (..., n) and of comb_mix (..., n, n)
            float32, before a transposition of that.
        """
        own: Any = self.connection
        n = self.streams.shape[-2]
        products = projection(
            self.streams, own.weight, norm_weight=own.norm_weight, norm_eps=own.norm_eps
        )
        sizes = (n, n, n * n)
        parts = zip(products.split(sizes, -1), own.scale, own.bias.split(sizes), strict=True)
        pre, post, comb = (part * scale + bias for part, scale, bias in parts)
        return pre, post, comb.unflatten(-1, (n, n))
