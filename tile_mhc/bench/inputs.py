"""What the timed ops read: one set of random tensors per shape."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tile_mhc import reference

LAYERS = 10  # of the recompute
SPLITS = 16  # of K, in the partial sums of another's matmul


@dataclass(frozen=True)
class Inputs:
    """Tensors of one shape, by the names of the ops' arguments.

    What is by token has the tokens in dimension 1, behind a batch of one, as TileKernels asks.
    """

    hidden: Tensor
    residual: Tensor
    grad_hidden: Tensor
    grad_residual: Tensor
    mixes: Tensor
    head_mixes: Tensor
    identity_mixes: Tensor
    pre_mix: Tensor
    post_mix: Tensor
    comb_mix: Tensor
    logits: Tensor
    grad_mixes: Tensor
    grad_head_mix: Tensor
    grad_pre: Tensor
    grad_post: Tensor
    grad_comb: Tensor
    # Partial sums of a projection: (SPLITS, T, ...).
    split_products: Tensor
    split_squares: Tensor
    # Parameters.
    weight: Tensor
    scale: Tensor
    bias: Tensor
    head_weight: Tensor
    head_scale: Tensor
    head_bias: Tensor
    identity_weight: Tensor
    identity_scale: Tensor
    identity_bias: Tensor
    # Of the layer behind a boundary, and of the norm before it: values of bfloat16.
    linear: Tensor
    layer_norm: Tensor
    # By layer, for the recompute alone: see `with_layers`.
    pre_mixes: tuple[Tensor, ...] = ()
    post_mixes: tuple[Tensor, ...] = ()
    comb_mixes: tuple[Tensor, ...] = ()
    layer_outputs: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        return self.residual.shape[1]

    @property
    def n(self) -> int:
        return self.residual.shape[2]

    @property
    def gates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `fused_pre` reads."""
        return self.residual, self.weight, self.scale, self.bias

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `contract` reads."""
        return self.residual, self.head_weight, self.head_scale, self.head_bias

    @property
    def identity(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `identity_pre` reads."""
        return self.residual, self.identity_weight, self.identity_scale, self.identity_bias

    def with_layers(self) -> "Inputs":
        """A layer's own tensors for each of LAYERS, so that no two share what L2 holds."""

        def rolled(tensor: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensor.roll(layer, 1) for layer in range(LAYERS))

        return replace(
            self,
            pre_mixes=rolled(self.pre_mix),
            post_mixes=rolled(self.post_mix),
            comb_mixes=rolled(self.comb_mix),
            layer_outputs=rolled(self.hidden),
        )

    def double(self, tokens: slice) -> "Inputs":
        """Some of the tokens in float64, with all of the parameters: for the reference."""
        parameters = (
            "weight", "scale", "bias", "head_weight", "head_scale", "head_bias", "identity_weight",
            "identity_scale", "identity_bias", "linear", "layer_norm",
        )  # fmt: skip

        def part(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(tensor[:, tokens].double() for tensor in value)
            return (value if name in parameters else value[:, tokens]).double()

        return replace(self, **{name: part(name, value) for name, value in vars(self).items()})


def make_inputs(T: int, H: int, n: int, device: torch.device) -> Inputs:
    """Normal tensors, weights of the size that a layer starts with, mixes as the ops make them."""
    mixes = n * (n + 2)
    # On the meta device nothing is drawn.
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    logits = normal(1, T, n, n)
    return Inputs(
        hidden=normal(1, T, H, dtype=torch.bfloat16),
        residual=normal(1, T, n, H, dtype=torch.bfloat16),
        grad_hidden=normal(1, T, H, dtype=torch.bfloat16),
        grad_residual=normal(1, T, n, H, dtype=torch.bfloat16),
        mixes=normal(1, T, mixes),
        head_mixes=normal(1, T, n),
        identity_mixes=normal(1, T, 2 * n),
        pre_mix=normal(1, T, n, 1).sigmoid(),
        post_mix=2 * normal(1, T, n, 1).sigmoid(),
        comb_mix=reference.sinkhorn(logits),
        logits=logits,
        grad_mixes=normal(1, T, mixes),
        grad_head_mix=normal(1, T, n),
        grad_pre=normal(1, T, n, 1),
        grad_post=normal(1, T, n, 1),
        grad_comb=normal(1, T, n, n),
        split_products=normal(SPLITS, T, mixes) * (n * H / SPLITS) ** 0.5,
        split_squares=(1 + 0.1 * normal(SPLITS, T)) * (n * H / SPLITS),
        weight=normal(mixes, n * H) / (n * H) ** 0.5,
        scale=1 + 0.1 * normal(3),
        bias=normal(mixes),
        head_weight=normal(n, n * H) / (n * H) ** 0.5,
        head_scale=1 + 0.1 * normal(1),
        head_bias=normal(n),
        identity_weight=normal(2 * n, n * H) / (n * H) ** 0.5,
        identity_scale=1 + 0.1 * normal(2),
        identity_bias=normal(2 * n),
        linear=(normal(H, H) / H**0.5).bfloat16(),
        layer_norm=(1 + 0.1 * normal(H)).bfloat16().float(),
    )
