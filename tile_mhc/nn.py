"""Modules: `HyperConnection` around a sub-layer, `HyperHead` at the end.

    streams = expand(embedding, 4)
    streams = attention_hc(streams, attention)  # post(attention(layer_input), ...)
    streams = mlp_hc(streams, mlp)
    hidden = head(streams)

They hold the parameters and the options of `fused_pre`, `post` and `contract`, and call them: the
outputs and gradients are theirs, bit for bit.

Parameters stay float32: `.to(torch.bfloat16)`, `.half()` or `.double()` on a module or on a model
around it moves them where it is told to, and leaves their dtype. That is a choice, as the ops take
bfloat16 parameters too: DeepSeek-V4's checkpoints hold them in float32, and Megatron-LM and
transformers keep them so. Streams are bfloat16, float16 or float32.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tile_mhc import errors, functional
from tile_mhc.ops.sinkhorn import check_sinkhorn

__all__ = ["HyperConnection", "HyperHead"]

INITS = ("megatron", "deepseek_v4")

# For each of our tensors theirs: its rows, in this order.
Names = dict[str, tuple[str, ...]]

DEEPSEEK: Names = {"weight": ("fn",), "scale": ("scale",), "bias": ("base",)}
MEGATRON: Names = {
    "weight": ("mapping_proj.weight",),
    "scale": ("alpha_pre", "alpha_post", "alpha_res"),
    "bias": ("bias",),
}


class _Projected(nn.Module):
    """A projection of the flat streams with its gates: what the two modules share."""

    _MEGATRON_SCALE: ClassVar[float]
    _NAMES: ClassVar[dict[str, tuple[str, Names]]]  # what the names begin with, and the rest

    weight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter
    norm_weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_streams: int,
        num_mixes: int,
        num_scales: int,
        norm_eps: float,
        pre_eps: float,
        norm_weight: bool,
        init: str,
        sequence_parallel: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        errors.check_positive_int(op, "hidden_size", hidden_size)
        errors.check_hidden_size(op, hidden_size)
        errors.check_number(op, "norm_eps", norm_eps)
        errors.check_number(op, "pre_eps", pre_eps)
        errors.check_bool(op, "norm_weight", norm_weight)
        errors.check_bool(op, "sequence_parallel", sequence_parallel)
        if init not in INITS:
            raise errors.ShapeError(f"{op}: init must be one of {INITS}; got {errors.shown(init)}")
        self.hidden_size, self.num_streams = hidden_size, num_streams
        self.norm_eps, self.pre_eps = norm_eps, pre_eps
        self.init, self.sequence_parallel = init, sequence_parallel
        size = num_streams * hidden_size
        shapes = {"weight": (num_mixes, size), "scale": (num_scales,), "bias": (num_mixes,)}
        if norm_weight:
            shapes["norm_weight"] = (size,)
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(empty))
        if not norm_weight:
            self.register_parameter("norm_weight", None)
        self.reset_parameters()
        self._settle()

    def reset_parameters(self) -> None:
        """Initialise as the argument `init` says; after `to_empty`, for instance."""
        if self.init == "megatron":
            self.init_megatron()
        else:
            self.init_deepseek_v4()

    def init_megatron(self) -> None:
        """Initialise as Megatron-LM does by default.

        weight uniform by Xavier's rule, scale 0.01 (of a head: 1), bias 0, norm_weight 1.

        Source: Megatron-LM dev, `HyperConnectionModule`; `TransformerBlock` for the head.
        """
        nn.init.xavier_uniform_(self.weight)
        self._init_gates(self._MEGATRON_SCALE)

    def init_deepseek_v4(self, std: float = 0.02) -> None:
        """Initialise as transformers does DeepSeek-V4.

        weight normal with mean 0, scale 1, bias 0, norm_weight 1.

        Args:
            std: the standard deviation, `initializer_range` of a config.

        Source: transformers 5.17, `DeepseekV4PreTrainedModel._init_weights`.
        """
        nn.init.normal_(self.weight, std=std)
        self._init_gates(1.0)

    def _init_gates(self, scale: float) -> None:
        nn.init.constant_(self.scale, scale)
        nn.init.zeros_(self.bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def from_megatron(self, state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
        """Read this module's state out of one of Megatron-LM, for `load_state_dict`.

        ======  ======================================  ====================
        ours    `HyperConnectionModule`                 head of a block
        ======  ======================================  ====================
        weight  mapping_proj.weight                     hc_head_fn
        scale   alpha_pre, alpha_post, alpha_res: (1,)  hc_head_scale
        bias    bias                                    hc_head_base
        ======  ======================================  ====================

        The order of rows and columns is the same. Theirs divides by sqrt(mean(x**2)) + 1e-6 where
        ours has sqrt(mean(x**2) + norm_eps): of streams that are not tiny, the same mixes. Their
        head takes its `layernorm_epsilon` for norm_eps and pre_eps.

        Args:
            state_dict: a state dict of Megatron-LM; other modules' keys may be in it.
            prefix: what stands before the names above, with its dot: for instance
                "decoder.layers.0.mlp_hyper_connection.", or "decoder." for the head.

        Returns:
            This module's names and float32 tensors. A norm_weight, which theirs lacks, is 1.

        Raises:
            ShapeError: a key is missing, or is none of the module's; a shape or dtype does not
                match. This module is as it was.

        Source: Megatron-LM dev, `transformer/hyper_connection.py` and `transformer_block.py`.
        """
        return self._from("megatron", state_dict, prefix)

    def to_megatron(self, prefix: str = "") -> dict[str, Tensor]:
        """Write this module's state as Megatron-LM names it; the inverse of `from_megatron`.

        Args:
            prefix: put before every name.

        Returns:
            Their names and copies of the tensors; a norm_weight is multiplied into the weight.
        """
        return self._to("megatron", prefix)

    def from_transformers(
        self, state_dict: Mapping[str, Any], prefix: str = ""
    ) -> dict[str, Tensor]:
        """Read this module's state out of one of transformers' DeepSeek-V4, for `load_state_dict`.

        ======  ===========================  =====================
        ours    `DeepseekV4HyperConnection`  `DeepseekV4HyperHead`
        ======  ===========================  =====================
        weight  fn                           hc_fn
        scale   scale                        hc_scale
        bias    base                         hc_base
        ======  ===========================  =====================

        DeepSeek's own checkpoints are read with the prefixes "layers.0.hc_attn_" and
        "layers.0.hc_ffn_", and the head's by `from_megatron`, which has its names.

        Args:
            state_dict: a state dict of transformers; other modules' keys may be in it.
            prefix: what stands before the names above, with its dot: for instance
                "model.layers.0.attn_hc.", or "model.hc_head." for the head.

        Returns:
            This module's names and float32 tensors. A norm_weight, which theirs lacks, is 1.

        Raises:
            ShapeError: a key is missing, or is none of the module's; a shape or dtype does not
                match. This module is as it was.

        Source: transformers 5.17, `models/deepseek_v4/modeling_deepseek_v4.py`.
        """
        return self._from("transformers", state_dict, prefix)

    def to_transformers(self, prefix: str = "") -> dict[str, Tensor]:
        """Write this module's state as transformers names it; the inverse of `from_transformers`.

        Args:
            prefix: put before every name.

        Returns:
            Their names and copies of the tensors; a norm_weight is multiplied into the weight.
        """
        return self._to("transformers", prefix)

    def _from(self, peer: str, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
        op = f"{type(self).__name__}.from_{peer}"
        # Megatron's head is no module of its own: its keys stand among those of a whole block.
        stem, names = prefix + self._NAMES[peer][0], self._NAMES[peer][1]
        theirs = [stem + key for keys in names.values() for key in keys]
        missing = [key for key in theirs if key not in state_dict]
        unexpected = [key for key in state_dict if key.startswith(stem) and key not in theirs]
        if missing or unexpected:
            raise errors.ShapeError(
                f"{op}: state_dict must hold {', '.join(theirs)} and nothing else that begins with "
                f"{stem!r}; got {_some(missing)} missing, {_some(unexpected)} unexpected"
            )
        state = {}
        for name, keys in names.items():
            rows, *rest = getattr(self, name).shape
            shape = (rows // len(keys), *rest)
            parts = [_checked(op, stem + key, state_dict[stem + key], shape) for key in keys]
            state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.norm_weight is not None:
            # As the others, of float32 whatever torch's default dtype is.
            state["norm_weight"] = torch.ones_like(state["weight"][0])
        return state

    def _to(self, peer: str, prefix: str) -> dict[str, Tensor]:
        state = {}
        stem, names = self._NAMES[peer]
        for name, keys in names.items():
            tensor = getattr(self, name).detach()
            if name == "weight" and self.norm_weight is not None:
                tensor = tensor * self.norm_weight.detach()
            for key, part in zip(keys, tensor.chunk(len(keys)), strict=True):
                state[prefix + stem + key] = part.clone()
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Projected":
        """What `.to()` and its kin run: a new device is taken, a new dtype is not."""
        if recurse:  # a subclass may have children, whose dtypes are their own
            for child in self.children():
                child._apply(fn)

        def keep(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        super()._apply(keep, recurse=False)  # type: ignore[no-untyped-call]
        self._settle()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._settle()

    def _settle(self) -> None:
        """Parameters float32 and marked, where torch has made new ones.

        `load_state_dict(assign=True)` takes the dtype it is given; it, `to_empty` of meta
        parameters and `copy.deepcopy` drop the attributes of a parameter.
        """
        for parameter in self.parameters(recurse=False):
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.to(torch.float32)
            if self.sequence_parallel:
                parameter.sequence_parallel = True  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, num_streams={self.num_streams}, norm_eps={self.norm_eps}, "
            f"pre_eps={self.pre_eps}, norm_weight={self.norm_weight is not None}"
        )


class HyperConnection(_Projected):
    """A hyper-connection: read a sub-layer's input from the streams, write its output back.

    layer_input, post_mix, comb_mix = fused_pre(streams);  out = post(layer_output, streams, ...)

    `forward` does both, around any callable; `pre` and `post` do one each, for a sub-layer that
    returns more than its output.

    The defaults are DeepSeek-V4's and Megatron-LM's, not those of `fused_pre`, which are
    TileKernels': post_mult is 2 and sinkhorn_repeat 20.

    FSDP2 wants parameters of one dtype in a unit. In a block of another dtype make each
    HyperConnection and HyperHead a unit of its own, without a param_dtype, before the block:
    `fully_shard(hc)`, then `fully_shard(block)`. A unit's parameters are gathered for `forward`
    alone: who calls `pre` and `post` needs
    `torch.distributed.fsdp.register_fsdp_forward_method(hc, "pre")` (`post` has no parameters, and
    may be registered too).

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

    _MEGATRON_SCALE = 0.01
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
        norm_weight: bool = False,
        init: str = "megatron",
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        op = type(self).__name__
        errors.check_num_streams(op, num_streams)
        check_sinkhorn(op, sinkhorn_repeat, sinkhorn_eps, prefix="sinkhorn_")
        errors.check_number(op, "post_mult", post_mult)
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
        self.post_mult = post_mult

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
            streams,
            self.weight,
            self.scale,
            self.bias,
            norm_weight=self.norm_weight,
            norm_eps=self.norm_eps,
            pre_eps=self.pre_eps,
            sinkhorn_eps=self.sinkhorn_eps,
            post_mult=self.post_mult,
            sinkhorn_repeat=self.sinkhorn_repeat,
            passes_residual=True,
        )
        return layer_input, post_mix, comb_mix, through

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

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, sinkhorn_eps={self.sinkhorn_eps}, "
            f"post_mult={self.post_mult}, sinkhorn_repeat={self.sinkhorn_repeat}"
        )


class HyperHead(_Projected):
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


def _checked(op: str, key: str, value: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        raise errors.ShapeError(
            f"{op}: {key} must be {shape} of a floating point dtype; got {errors.describe(value)}"
        )
    return value.detach().to(torch.float32)


def _some(keys: list[str], limit: int = 4) -> str:
    """The first few of what may be the keys of a whole model."""
    if not keys:
        return "none"
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
