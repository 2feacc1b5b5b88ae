"""What the serving stacks' functions have in common, on `fused_pre`, `post_pre` and `contract`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tile_mhc import errors
from tile_mhc.ops.delayed_pre import Norm
from tile_mhc.ops.fused_pre import fused_pre
from tile_mhc.ops.post_pre import post_pre

if TYPE_CHECKING:
    from tile_mhc.ops._options import PreOptions

# As DeepSeek-V4 and V4.1 have it, for a warm-up; the sizes of gates are no part of a kernel.
POST_MULT = 2.0
SINKHORN_REPEAT = 20
EPS = 1e-6


class Gates(NamedTuple):
    """What turns streams into mixes, in the order that the serving stacks take it."""

    fn: Tensor
    scale: Tensor
    base: Tensor
    rms_eps: float
    pre_eps: float
    sinkhorn_eps: float
    post_mult: float
    sinkhorn_repeat: int

    def options(self, norm: Norm | None) -> "PreOptions":
        """Those of `fused_pre` and `post_pre`, with a norm of the layer input."""
        options: PreOptions = {
            "norm_eps": self.rms_eps,
            "pre_eps": self.pre_eps,
            "sinkhorn_eps": self.sinkhorn_eps,
            "post_mult": self.post_mult,
            "sinkhorn_repeat": self.sinkhorn_repeat,
        }
        if norm is not None:
            options["layer_norm_weight"], options["layer_norm_eps"] = norm
        return options


def norm_of(op: str, weight: Tensor | None, eps: float | None) -> Norm | None:
    """The norm of the layer input. Its eps may be None only where there is none."""
    if weight is None:
        return None
    if eps is None:
        raise errors.ShapeError(
            f"{op}: norm_eps must be a number beside a norm_weight; got None beside "
            f"{errors.describe(weight)}"
        )
    return weight, eps


def pre(residual: Tensor, gates: Gates, norm: Norm | None) -> tuple[Tensor, Tensor, Tensor]:
    """post_mix (..., n, 1), comb_mix (..., n, n) and layer_input (..., H)."""
    layer_input, post_mix, comb_mix = fused_pre(
        residual, gates.fn, gates.scale, gates.base, **gates.options(norm)
    )
    return post_mix.unsqueeze(-1), comb_mix, layer_input


def fused_post_pre(
    x: Tensor,
    residual: Tensor,
    post_layer_mix: Tensor,
    comb_res_mix: Tensor,
    gates: Gates,
    norm: Norm | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The streams (..., n, H), and what `pre` returns of them."""
    streams, layer_input, post_mix, comb_mix = post_pre(
        x,
        residual,
        post_layer_mix,
        comb_res_mix,
        gates.fn,
        gates.scale,
        gates.base,
        **gates.options(norm),
    )
    return streams, post_mix.unsqueeze(-1), comb_mix, layer_input


class Example(NamedTuple):
    """Inputs of zeros, for a warm-up."""

    x: Tensor
    residual: Tensor
    post_mix: Tensor
    comb_mix: Tensor
    gates: Gates
    norms: Sequence[Tensor | None]

    @property
    def of_post(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.residual, self.post_mix, self.comb_mix

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        """fn, scale and base of a readout."""
        n = self.residual.shape[-2]
        return self.gates.fn[:n], self.gates.scale[:1], self.gates.base[:n]


def example_maker(
    hidden_size: int,
    num_streams: int,
    dtype: torch.dtype,
    fn_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    sinkhorn_eps: float,
) -> Callable[[int, torch.device], Example]:
    """What makes the inputs of calls with so many tokens, without and with a norm."""
    n, rows = num_streams, num_streams * (num_streams + 2)

    def make(num_tokens: int, device: torch.device) -> Example:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return Example(
            x=zeros(num_tokens, hidden_size, dtype=dtype),
            residual=zeros(num_tokens, n, hidden_size, dtype=dtype),
            post_mix=zeros(num_tokens, n, 1),
            comb_mix=zeros(num_tokens, n, n),
            gates=Gates(
                zeros(rows, n * hidden_size, dtype=fn_dtype),
                zeros(3),
                zeros(rows),
                EPS,
                EPS,
                sinkhorn_eps,
                POST_MULT,
                SINKHORN_REPEAT,
            ),
            norms=(None, zeros(hidden_size, dtype=norm_dtype)),
        )

    return make
