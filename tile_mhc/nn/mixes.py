"""What an observer of hyper-connections is shown: `observe_mixes`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tile_mhc.ops.identity_pre import mixes_of
from tile_mhc.ops.projection import projection


class Mixes(NamedTuple):
    """The mixes of one call of a hyper-connection, for an observer: see `observe_mixes`.

    All tensors are detached, and on the device of the model; nothing here waits for it.

    Attributes:
        connection: whose they are.
        streams: (..., n, H), which they were made of, as they are: not a copy.
        post_mix: (..., n) float32.
        comb_mix: (..., n, n) float32, index [in, out], as `post` takes it.
        pre_mix: (..., n) float32, made for the next sub-layer, of DeepSeek-V4.1; otherwise None:
            see `gates`.
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
        pre, post, comb = _logits(own, products, (n, n, n * n))
        return pre, post, comb.unflatten(-1, (n, n))

    def gates(self) -> tuple[Tensor, Tensor]:
        """The pre_mix and the post_mix that the connection makes, (..., n) float32.

        pre_mix = sigmoid(logits) + pre_eps

        Of DeepSeek-V4 that is what the layer input is read by; its op keeps it to itself, so that
        it is made once more, as the logits are.
        """
        pre = _gate(self, self.logits()[0]) if self.pre_mix is None else self.pre_mix
        return pre, self.post_mix


class IdentityMixes(NamedTuple):
    """The mixes of one call of an `IdentityHyperConnection`: as `Mixes`, without a comb_mix.

    Attributes:
        connection: whose they are.
        streams: (..., n, H), which they were made of, as they are: not a copy.
        post_mix: (..., n) float32.
    """

    connection: nn.Module
    streams: Tensor
    post_mix: Tensor

    def logits(self) -> tuple[Tensor, Tensor]:
        """What the gates are given: mixes * scale + bias; made once more, as of `Mixes`.

        Returns:
            The logits of pre_mix and of post_mix, (..., n) float32.
        """
        own: Any = self.connection
        n = self.streams.shape[-2]
        parameters = (own.weight, own.scale, own.bias, own.norm_weight, own.norm_eps)
        pre, post = _logits(own, mixes_of(self.streams, *parameters), (n, n))
        return pre, post

    def gates(self) -> tuple[Tensor, Tensor]:
        """The pre_mix, by which the layer input is read, and the post_mix, (..., n) float32.

        pre_mix = sigmoid(logits) + pre_eps

        The pre_mix is made once more, as the logits are.
        """
        return _gate(self, self.logits()[0]), self.post_mix


def _gate(mixes: Mixes | IdentityMixes, logits: Tensor) -> Tensor:
    own: Any = mixes.connection
    pre_mix: Tensor = torch.sigmoid(logits) + own.pre_eps
    return pre_mix


def _logits(connection: Any, products: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    scale, bias = connection.scale, connection.bias
    parts = zip(products.split(sizes, -1), scale, bias.split(sizes), strict=True)
    return [part * factor + term for part, factor, term in parts]
