"""What the modules share: parameters that stay float32, initial values, state dicts of others."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tile_mhc import errors

INITS = ("megatron", "deepseek_v4")

# For each of our tensors theirs: its rows, in this order.
Names = dict[str, tuple[str, ...]]

DEEPSEEK: Names = {"weight": ("fn",), "scale": ("scale",), "bias": ("base",)}
MEGATRON: Names = {
    "weight": ("mapping_proj.weight",),
    "scale": ("alpha_pre", "alpha_post", "alpha_res"),
    "bias": ("bias",),
}


class Projected(nn.Module):
    """A projection of the flat streams with its gates: what the two modules share."""

    _INITS: ClassVar[tuple[str, ...]] = INITS
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
        if init not in self._INITS:
            raise errors.ShapeError(
                f"{op}: init must be one of {self._INITS}; got {errors.shown(init)}"
            )
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
        getattr(self, f"init_{self.init}")()

    def _init_gates(self, scale: float) -> None:
        nn.init.constant_(self.scale, scale)
        nn.init.zeros_(self.bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def _init_hy_v4(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        self._init_gates(0.01)
        nn.init.constant_(self.bias[: self.num_streams], -math.log(max(self.num_streams - 1, 1)))

    def from_transformers(
        self, state_dict: Mapping[str, Any], prefix: str = ""
    ) -> dict[str, Tensor]:
        """Read this module's state out of one of transformers', for `load_state_dict`.

        ======  ===========================  =====================
        ours    `DeepseekV4HyperConnection`  `DeepseekV4HyperHead`
        ======  ===========================  =====================
        weight  fn                           hc_fn
        scale   scale                        hc_scale
        bias    base                         hc_base
        ======  ===========================  =====================

        `Glm5NextTextHyperConnection` and `HYV4HyperConnection` have the names of the former, and
        `HYV4HyperHead` those of the latter. The options stay those that the module was made with.
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Projected":
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


class OfMegatron(Projected):
    """What Megatron-LM and DeepSeek-V4 both have: their initial values, and the former's names."""

    _MEGATRON_SCALE: ClassVar[float]
    # By the version of Megatron-LM that has such a module, the options that make ours the same.
    _MEGATRON_OPTIONS: ClassVar[dict[str, dict[str, object]]] = {"dev": {}}

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

    def from_megatron(
        self, state_dict: Mapping[str, Any], prefix: str = "", version: str = "dev"
    ) -> dict[str, Tensor]:
        """Read this module's state out of one of Megatron-LM, for `load_state_dict`.

        ======  ======================================  ====================
        ours    `HyperConnectionModule`                 head of a block
        ======  ======================================  ====================
        weight  mapping_proj.weight                     hc_head_fn
        scale   alpha_pre, alpha_post, alpha_res: (1,)  hc_head_scale
        bias    bias                                    hc_head_base
        ======  ======================================  ====================

        The order of rows and columns is the same. The names do not tell what a version computes
        with them:

        - "dev": the dev branch, and main since #6401: DeepSeek's definition. Also, with
          `mhc_single_pass`, that of `DelayedHyperConnection`.
        - "main-4531": main between #4531 and #6401. It is a `HyperConnection` with
          transposes_comb=True, pre_eps=0 and sinkhorn_eps=0, and others are refused. There is no
          head, but the mean of the streams. Their divisors in Sinkhorn are at least 1e-6, which
          ours are not: that differs where all logits of a column lie 14 or more below others of
          their rows, and after 20 steps by less than 2e-3 if they are not more than 60 below.

        Theirs divide by sqrt(mean(x**2)) + 1e-6, unless `mhc_norm_eps_inside_sqrt` or
        `mhc_single_pass` is set. Ours, by sqrt(mean(x**2) + norm_eps), is nearest with a norm_eps
        of 1e-12: to 1e-6 / rms, relative, of streams of that root mean square. With the default of
        1e-6 it is 5e-7 / rms**2: a percent for an rms of 0.007, as of many embeddings. Their head
        takes its `layernorm_epsilon` for norm_eps and pre_eps.

        Args:
            state_dict: a state dict of Megatron-LM; other modules' keys may be in it.
            prefix: what stands before the names above, with its dot: for instance
                "decoder.layers.0.mlp_hyper_connection.", or "decoder." for the head.
            version: "dev" or "main-4531", as above.

        Returns:
            This module's names and float32 tensors. A norm_weight, which theirs lacks, is 1.

        Raises:
            ShapeError: a key is missing, or is none of the module's; a shape or dtype does not
                match; the module does not compute what the version does. This module is as it was.

        Source: Megatron-LM dev (d48bd6be0a), and main at 7cdba422b8 (#4531),
        `transformer/hyper_connection.py` and `transformer_block.py`.
        """
        self._check_version("from_megatron", version)
        return self._from("megatron", state_dict, prefix)

    def to_megatron(self, prefix: str = "", version: str = "dev") -> dict[str, Tensor]:
        """Write this module's state as Megatron-LM names it; the inverse of `from_megatron`.

        Args:
            prefix: put before every name.
            version: as of `from_megatron`.

        Returns:
            Their names and copies of the tensors; a norm_weight is multiplied into the weight.

        Raises:
            ShapeError: the module does not compute what the version does.
        """
        self._check_version("to_megatron", version)
        return self._to("megatron", prefix)

    def _check_version(self, method: str, version: object) -> None:
        op = f"{type(self).__name__}.{method}"
        if not isinstance(version, str) or version not in self._MEGATRON_OPTIONS:
            raise errors.ShapeError(
                f"{op}: version must be one of {tuple(self._MEGATRON_OPTIONS)}; "
                f"got {errors.shown(version)}"
            )
        wanted = self._MEGATRON_OPTIONS[version]
        given = {name: getattr(self, name) for name in wanted}
        if given != wanted:
            raise errors.ShapeError(
                f"{op}: the module must have {_options(wanted)} for version {version!r}; "
                f"got {_options(given)}"
            )


def _checked(op: str, key: str, value: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        raise errors.ShapeError(
            f"{op}: {key} must be {shape} of a floating point dtype; got {errors.describe(value)}"
        )
    return value.detach().to(torch.float32)


def _options(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _some(keys: list[str], limit: int = 4) -> str:
    """The first few of what may be the keys of a whole model."""
    if not keys:
        return "none"
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
