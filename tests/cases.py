"""What the op tests run on: the ops with their inputs, and shapes, each with a reason.

Shapes change one factor at a time. Every (n, H) pair is a compilation on the GPU, so all tests
draw on the same few pairs.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tile_mhc
import tile_mhc.compat.tile_kernels  # noqa: F401  (registers its operators)
import tile_mhc.compat.transformer_engine  # noqa: F401  (the same)
from tile_mhc import reference

Inputs = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by argument name, and the options


@dataclass(frozen=True)
class Case:
    num_tokens: int
    num_streams: int
    hidden_size: int
    why: str

    def __str__(self) -> str:
        return f"T{self.num_tokens}-n{self.num_streams}-H{self.hidden_size}"

    @property
    def shape(self) -> tuple[tuple[int], int, int]:
        return (self.num_tokens,), self.num_streams, self.hidden_size


STREAM_CASES = (
    Case(0, 4, 64, "no token: nothing to launch, and still a gradient"),
    Case(1, 4, 64, "one token of the smallest stream"),
    Case(13, 4, 192, "a ragged tile, and an H that no power of two above 64 divides"),
    Case(64, 2, 64, "fewest streams, exactly one tile"),
    Case(65, 8, 128, "most streams, one token over a tile"),
    Case(130, 4, 1280, "smallest H of TileKernels' tests, one pair over two tiles"),
    Case(64, 8, 2560, "most streams on a wide H"),
    Case(13, 2, 7168, "fewest streams on a wide H"),
    Case(65, 4, 7168, "DeepSeek-V3's width"),
    Case(1, 4, 16384, "one token of the widest stream"),
    Case(130, 4, 16384, "the widest stream, several tiles"),
    Case(4096, 4, 2560, "many tokens, and where TileKernels' error was measured"),
    Case(4096, 4, 7168, "a real training shape"),
)
MIX_CASES = (
    Case(0, 4, 64, "no token"),
    Case(1, 4, 64, "one token"),
    Case(13, 2, 64, "fewest streams, less than a warp of tokens"),
    Case(64, 8, 64, "most streams"),
    Case(128, 4, 64, "exactly one row of partial sums"),
    Case(130, 8, 64, "one pair over it"),
    Case(4096, 4, 64, "many tokens"),
    Case(4097, 2, 64, "one token over"),
    Case(20000, 4, 64, "more rows of partial sums than threads of a CTA"),
)
# Any width, on kernels that load as wide as its rows are aligned; for every op, and for recompute.
WIDTH_CASES = (
    Case(13, 4, 5129, "TransformerEngine's odd width: one element an access"),
    Case(65, 2, 65, "an odd width of fewest streams: rows of x aligned to 4 bytes"),
    Case(130, 8, 100, "accesses of four, and columns of a block in two streams"),
    Case(3, 2, 1, "the narrowest: most of a block is masked"),
)
# For what is built of ops that all cases above cover.
FEW_STREAM_CASES = tuple(case for case in STREAM_CASES if case.hidden_size in (64, 128, 192, 1280))
streams = pytest.mark.parametrize("case", STREAM_CASES, ids=str)
widths = pytest.mark.parametrize("case", WIDTH_CASES, ids=str)
few_streams = pytest.mark.parametrize("case", FEW_STREAM_CASES, ids=str)
mixes = pytest.mark.parametrize("case", MIX_CASES, ids=str)


def normal(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def stream(*shape: int, device: str) -> Tensor:
    return normal(*shape, device=device, dtype=torch.bfloat16)


def _residual(lead: Sequence[int], n: int, hidden_size: int, device: str) -> dict[str, Tensor]:
    return {"residual": stream(*lead, n, hidden_size, device=device)}


def _gates(scales: int, biases: int, device: str) -> dict[str, Tensor]:
    return {"scale": normal(scales, device=device), "bias": normal(biases, device=device)}


def _weight(rows: int, size: int, device: str) -> dict[str, Tensor]:
    """Scaled so that the mixes are near 1, as a trained model's are."""
    return {"weight": normal(rows, size, device=device) * size**-0.5}


def norm_weight(size: int, device: str) -> Tensor:
    return torch.rand(size, device=device) + 0.5


def expand_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    return {"hidden": stream(*lead, hidden_size, device=device)}, {"num_streams": n}


def projection_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    size = n * hidden_size
    tensors = _residual(lead, n, hidden_size, device) | _weight(n * (n + 2), size, device)
    return tensors | {"norm_weight": norm_weight(size, device)}, {}


def split_mixes_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    num_mixes = n * (n + 2)
    tensors = {"mixes": normal(*lead, num_mixes, device=device)} | _gates(3, num_mixes, device)
    return tensors, {"num_streams": n, "post_mult": 2.0}


def sinkhorn_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    return {"logits": normal(*lead, n, n, device=device)}, {"repeat": 20}


def aggregate_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    mix = torch.rand(*lead, n, device=device)
    return _residual(lead, n, hidden_size, device) | {"pre_mix": mix}, {}


def post_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors = {"layer_output": stream(*lead, hidden_size, device=device)}
    tensors |= _residual(lead, n, hidden_size, device)
    tensors |= {"post_mix": torch.rand(*lead, n, device=device)}
    return tensors | {"comb_mix": torch.rand(*lead, n, n, device=device)}, {}


def post_bias_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors, options = post_inputs(lead, n, hidden_size, device)
    return tensors | {"bias": normal(hidden_size, device=device)}, options


def head_mix_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    return {"mixes": normal(*lead, n, device=device)} | _gates(1, n, device), {}


def contract_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors = _residual(lead, n, hidden_size, device) | _weight(n, n * hidden_size, device)
    return tensors | _gates(1, n, device), {}


def pre_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors, _ = projection_inputs(lead, n, hidden_size, device)
    options = {"post_mult": 2.0, "sinkhorn_repeat": 20}
    return tensors | _gates(3, n * (n + 2), device), options


def delayed_pre_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors, options = pre_inputs(lead, n, hidden_size, device)
    return tensors | {"pre_mix": torch.rand(*lead, n, device=device)}, options


def identity_pre_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    size = n * hidden_size
    tensors = _residual(lead, n, hidden_size, device) | _weight(2 * n, size, device)
    tensors |= {"norm_weight": norm_weight(size, device)}
    return tensors | _gates(2, 2 * n, device), {"post_mult": 2.0, "post_eps": 1e-3}


def identity_post_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors, options = post_inputs(lead, n, hidden_size, device)
    del tensors["comb_mix"]
    return tensors, options


def identity_post_bias_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors, options = identity_post_inputs(lead, n, hidden_size, device)
    return tensors | {"bias": normal(hidden_size, device=device)}, options


def stream_mean_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    return _residual(lead, n, hidden_size, device), {}


def post_pre_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors, _ = post_inputs(lead, n, hidden_size, device)
    pre, options = pre_inputs(lead, n, hidden_size, device)
    del pre["residual"]
    # A comb near doubly stochastic keeps the streams near 1.
    comb_mix = normal(*lead, n, n, device=device).softmax(-1)
    return tensors | {"comb_mix": comb_mix} | pre, options


def post_pre_delayed_inputs(lead: Sequence[int], n: int, hidden_size: int, device: str) -> Inputs:
    tensors, options = post_pre_inputs(lead, n, hidden_size, device)
    return tensors | {"pre_mix": torch.rand(*lead, n, device=device)}, options


def post_pre_reference(streams: Tensor | None = None, **inputs: Any) -> tuple[Tensor, ...]:
    """The specification; what is projected and collapsed is `streams`, if given, which are rounded.

    A rounding that went the other way near a midpoint is an error of the streams alone so.
    """
    if streams is None:
        return reference.post_pre(**inputs)
    names = ("layer_output", "residual", "post_mix", "comb_mix")
    of_post = [inputs.pop(name) for name in names]
    exact = reference.post(*of_post, bias=inputs.pop("layer_bias", None))
    rounded = exact + (streams.to(exact.dtype) - exact).detach()
    return exact, *reference.fused_pre(rounded, **inputs)


@dataclass(frozen=True)
class Op:
    """A differentiable op beside its specification.

    Where the op `rounds` streams that it goes on with, its reference takes them as `streams`.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Sequence[int], int, int, str], Inputs]
    outputs: tuple[str, ...] = ("out",)
    rounds: bool = False

    def given(self, streams: Tensor | None) -> Callable[..., Any]:
        """The reference, for the streams that the op went on with."""
        return functools.partial(self.reference, streams=streams) if self.rounds else self.reference

    def __str__(self) -> str:
        return self.name


PRE_OUTPUTS = ("layer_input", "post_mix", "comb_mix")
EXPAND = Op("expand", tile_mhc.expand, reference.expand, expand_inputs)
PROJECTION = Op("projection", tile_mhc.projection, reference.projection, projection_inputs)
SPLIT_MIXES = Op(
    "split_mixes",
    tile_mhc.split_mixes,
    reference.split_mixes,
    split_mixes_inputs,
    ("pre_mix", "post_mix", "comb"),
)
SINKHORN = Op("sinkhorn", tile_mhc.sinkhorn, reference.sinkhorn, sinkhorn_inputs)
AGGREGATE = Op("aggregate", tile_mhc.aggregate, reference.aggregate, aggregate_inputs)
POST = Op("post", tile_mhc.post, reference.post, post_inputs)
POST_BIAS = Op("post_bias", tile_mhc.post, reference.post, post_bias_inputs)
HEAD_MIX = Op("head_mix", tile_mhc.head_mix, reference.head_mix, head_mix_inputs)
CONTRACT = Op("contract", tile_mhc.contract, reference.contract, contract_inputs)
FUSED_PRE = Op("fused_pre", tile_mhc.fused_pre, reference.fused_pre, pre_inputs, PRE_OUTPUTS)
DELAYED_OUTPUTS = ("layer_input", "next_pre", "post_mix", "comb_mix")
DELAYED_PRE = Op(
    "delayed_pre", tile_mhc.fused_pre, reference.fused_pre, delayed_pre_inputs, DELAYED_OUTPUTS
)
POST_PRE = Op(
    "post_pre",
    tile_mhc.post_pre,
    post_pre_reference,
    post_pre_inputs,
    ("streams", *PRE_OUTPUTS),
    rounds=True,
)
POST_PRE_DELAYED = Op(
    "post_pre_delayed",
    tile_mhc.post_pre,
    post_pre_reference,
    post_pre_delayed_inputs,
    ("streams", *DELAYED_OUTPUTS),
    rounds=True,
)
IDENTITY_OUTPUTS = ("layer_input", "post_mix")
IDENTITY_PRE = Op(
    "identity_pre",
    tile_mhc.identity_pre,
    reference.identity_pre,
    identity_pre_inputs,
    IDENTITY_OUTPUTS,
)
IDENTITY_POST = Op(
    "identity_post", tile_mhc.identity_post, reference.identity_post, identity_post_inputs
)
IDENTITY_POST_BIAS = Op(
    "identity_post_bias", tile_mhc.identity_post, reference.identity_post, identity_post_bias_inputs
)
STREAM_MEAN = Op("stream_mean", tile_mhc.stream_mean, reference.stream_mean, stream_mean_inputs)
OPS = (
    EXPAND,
    PROJECTION,
    SPLIT_MIXES,
    SINKHORN,
    AGGREGATE,
    POST,
    POST_BIAS,
    HEAD_MIX,
    CONTRACT,
    FUSED_PRE,
    DELAYED_PRE,
    POST_PRE,
    POST_PRE_DELAYED,
    IDENTITY_PRE,
    IDENTITY_POST,
    IDENTITY_POST_BIAS,
    STREAM_MEAN,
)

# Arguments without a token axis: their gradient is a sum over tokens.
PARAMETERS = ("weight", "norm_weight", "scale", "bias")


@dataclass(frozen=True)
class Dtypes:
    """The dtype of the streams, and of the parameters that are not float32."""

    streams: torch.dtype
    bfloat16_parameters: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        streams = str(self.streams).removeprefix("torch.")
        return "-".join((streams, *self.bfloat16_parameters))

    def of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of an op in these dtypes."""
        cast = {name: torch.bfloat16 for name in self.bfloat16_parameters}
        return {
            name: tensor.to(
                self.streams if tensor.dtype == torch.bfloat16 else cast.get(name, tensor.dtype)
            )
            for name, tensor in tensors.items()
        }


DEFAULT_DTYPES = Dtypes(torch.bfloat16, (), "what the other tests have")
DTYPES = (
    Dtypes(torch.float16, (), "float16 streams: two exact parts"),
    Dtypes(torch.float32, (), "float32 streams: two parts"),
    *(Dtypes(torch.bfloat16, (name,), f"a bfloat16 {name} alone") for name in PARAMETERS),
    Dtypes(torch.float32, PARAMETERS, "float32 streams beside bfloat16 parameters"),
)
dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


def recompute_inputs(
    layers: int,
    posts: int,
    lead: Sequence[int],
    n: int,
    hidden_size: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The arguments of `recompute`. Combs near doubly stochastic keep the residual near 1."""
    return (
        normal(*lead, n, hidden_size, device=device, dtype=dtype),
        [torch.rand(*lead, n, device=device) for _ in range(layers)],
        [normal(*lead, hidden_size, device=device, dtype=dtype) for _ in range(posts)],
        [torch.rand(*lead, n, device=device) for _ in range(posts)],
        [normal(*lead, n, n, device=device).softmax(-1) for _ in range(posts)],
    )


# The gradients, by position, that a backward can leave in a tensor it is given.
DESTINATIONS = {
    "projection": (0, 1, 2),
    "split_mixes": (1, 2),
    "aggregate": (0,),
    "post": (1,),
    "head_mix": (1, 2),
    "contract": (0, 1, 2, 3, 4),
    "fused_pre": (1, 2, 3, 4),
    "delayed_pre": (1, 2, 3, 5),
    "post_pre": (1, 4, 5, 6, 9),
    "identity_pre": (0, 1, 2, 3, 4),
}


def operator_calls(
    lead: Sequence[int], n: int, hidden_size: int, device: str
) -> dict[str, tuple[Any, ...]]:
    """Arguments of every torch.library operator, for `torch.library.opcheck`.

    Tensors that have a gradient require it; those of backward and of out variants do not.
    """

    def tensors(op: Op) -> list[Tensor]:
        return list(op.inputs(lead, n, hidden_size, device)[0].values())

    def leaves(op: Op) -> list[Tensor]:
        return [tensor.requires_grad_() for tensor in tensors(op)]

    residual, weight, norm_of_block = tensors(PROJECTION)
    saved = torch.ops.tile_mhc.projection(residual, weight, norm_of_block, 1e-6, None, False)
    wide, narrow = residual, residual[..., 0, :].contiguous()
    # The operator takes the norm weight last.
    pre, leaf_pre = tensors(FUSED_PRE), leaves(FUSED_PRE)
    pre, leaf_pre = ([*t[:2], *t[3:], t[2]] for t in (pre, leaf_pre))
    pre_outputs = torch.ops.tile_mhc.fused_pre(*pre, 1e-6, 1e-6, 1e-6, 2.0, 5, None, False)
    names = ("residual", "weight", "scale", "bias", "pre_mix", "norm_weight")
    delayed = [DELAYED_PRE.inputs(lead, n, hidden_size, device)[0][name] for name in names]
    leaf_delayed = [tensor.clone().requires_grad_() for tensor in delayed]
    steps = (1e-6, 1e-6, 1e-6, 2.0, 5)
    delayed_outputs = torch.ops.tile_mhc.delayed_pre(*delayed, *steps, None, False)
    normed = [tensor.detach() for tensor in leaf_delayed]
    normed.append(norm_weight(hidden_size, device))
    boundary = POST_PRE_DELAYED.inputs(lead, n, hidden_size, device)[0]
    boundary["layer_bias"] = normal(hidden_size, device=device)
    names = ("layer_output", "residual", "post_mix", "comb_mix", *names[1:5], "layer_bias")
    ends = [boundary[name] for name in (*names, "norm_weight")]
    leaf_ends = [tensor.clone().requires_grad_() for tensor in ends]
    ends_outputs = torch.ops.tile_mhc.post_pre(*ends, None, *steps, 1e-6, None, False)
    names = ("residual", "weight", "scale", "bias", "norm_weight")
    identity = [IDENTITY_PRE.inputs(lead, n, hidden_size, device)[0][name] for name in names]
    leaf_identity = [tensor.clone().requires_grad_() for tensor in identity]
    identity_outputs = torch.ops.tile_mhc.identity_pre(
        *identity, 1e-6, 1e-6, 1e-3, 2.0, None, False
    )
    # The operator takes the residual last.
    names = ("layer_output", "post_mix", "bias", "residual")
    written = [IDENTITY_POST_BIAS.inputs(lead, n, hidden_size, device)[0][name] for name in names]
    leaf_written = [tensor.clone().requires_grad_() for tensor in written]
    norm = norm_weight(n * hidden_size, device)
    head, leaf_head = [*tensors(CONTRACT), norm], [*leaves(CONTRACT), norm.clone()]
    head_outputs = torch.ops.tile_mhc.contract(*head, 1e-6, 1e-6, None, False)
    initial, *lists = recompute_inputs(2, 1, lead, n, hidden_size, device)
    split = torch.ops.tile_mhc.split_mixes(*tensors(SPLIT_MIXES), n, 2.0, 1e-6)
    square = tensors(SINKHORN)[0]
    calls: dict[str, tuple[Any, ...]] = {
        **_interleaved_calls(lead, device),
        **_written_calls(lead, n, hidden_size, device),
        "expand": (*leaves(EXPAND), n),
        "expand_out": (narrow, torch.zeros_like(wide)),
        "expand_backward": (wide,),
        "projection": (*leaves(PROJECTION), 1e-6, None, False),
        "projection_backward": (saved[0], residual, weight, norm_of_block, *saved, True),
        "split_mixes": (*leaves(SPLIT_MIXES), n, 2.0, 1e-6),
        "split_mixes_backward": (*split, *tensors(SPLIT_MIXES), n, 2.0),
        "sinkhorn": (*leaves(SINKHORN), 5, 1e-6),
        "sinkhorn_backward": (square, *tensors(SINKHORN), 5, 1e-6),
        "aggregate": tuple(leaves(AGGREGATE)),
        "aggregate_out": (*tensors(AGGREGATE), torch.zeros_like(narrow)),
        "aggregate_backward": (narrow, *tensors(AGGREGATE)),
        "post": tuple(leaves(POST_BIAS)),
        "post_out": (*tensors(POST), None, torch.zeros_like(wide)),
        "post_backward": (wide, *tensors(POST_BIAS)),
        "head_mix": (*leaves(HEAD_MIX), 1e-6),
        "head_mix_backward": (tensors(HEAD_MIX)[0], *tensors(HEAD_MIX)),
        "contract": (*leaf_head, 1e-6, 1e-6, None, False),
        "contract_backward": (narrow, *head, *head_outputs[1:], 1e-6, True),
        "fused_pre": (*leaf_pre, 1e-6, 1e-6, 1e-6, 2.0, 5, None, False),
        "fused_pre_backward": (
            *pre_outputs[:3],
            *pre,
            *pre_outputs[3:],
            1e-6,
            1e-6,
            2.0,
            5,
            True,
            wide,
        ),
        "delayed_pre": (*leaf_delayed, *steps, None, False),
        "delayed_pre_backward": (
            *delayed_outputs[:4],
            *delayed,
            *delayed_outputs[4:],
            *steps[1:],
            True,
            True,
            wide,
        ),
        "normed_pre": (*normed, *steps, 1e-6, None, False),
        "post_pre": (*leaf_ends, None, *steps, 1e-6, None, False),
        "post_pre_backward": (
            *ends_outputs[:5],
            *ends,
            ends_outputs[0],
            *ends_outputs[5:],
            *steps[1:],
            True,
            True,
        ),
        "identity_pre": (*leaf_identity, 1e-6, 1e-6, 1e-3, 2.0, None, False),
        "identity_pre_backward": (
            *identity_outputs[:2],
            *identity,
            *identity_outputs[2:],
            1e-6,
            2.0,
            True,
            wide,
        ),
        "identity_post": tuple(leaf_written),
        "identity_post_out": (*written[:2], None, wide, torch.zeros_like(wide)),
        "identity_post_backward": (wide, *written[:3]),
        "identity_post_backward_into": (
            wide,
            *written[:3],
            torch.zeros_like(wide, dtype=torch.float32),
            [True],
        ),
        "stream_mean": tuple(leaves(STREAM_MEAN)),
        "stream_mean_out": (wide, torch.zeros_like(narrow)),
        "stream_mean_backward": (narrow, n),
        "recompute": (
            initial,
            *lists,
            [torch.zeros_like(narrow) for _ in range(2)],
            [torch.zeros_like(wide)],
            [torch.ones_like(narrow.view(-1, hidden_size)[0]) for _ in range(2)],
            1e-6,
        ),
        "recompute_gates": (
            wide,
            *map(list, zip(*[tensors(SPLIT_MIXES) for _ in range(2)], strict=True)),
            1e-6,
        ),
    }
    for name, positions in DESTINATIONS.items():
        backward = calls[f"{name}_backward"]
        grads = getattr(torch.ops.tile_mhc, f"{name}_backward")(*backward)
        into = [torch.zeros_like(grads[p], dtype=torch.float32) for p in positions]
        adds = [p % 2 == 0 for p in positions]
        calls[f"{name}_backward_into"] = (*backward, *into, adds)
    return calls


def _written_calls(lead: Sequence[int], n: int, hidden_size: int, device: str) -> dict[str, Any]:
    """The operators behind compat.tile_kernels.mhc, which write into what they are given."""
    tokens, num_mixes, size = torch.Size(lead).numel(), n * (n + 2), n * hidden_size

    def plain(*shape: int) -> Tensor:
        return normal(*shape, device=device)

    gates, splits = (plain(3), plain(num_mixes)), (2, tokens)
    mixes, narrow, square = (plain(tokens, count) for count in (num_mixes, n, n * n))
    groups = (tokens, 2)
    streams, hidden = (
        plain(*shape).bfloat16() for shape in ((tokens, n, hidden_size), (tokens, hidden_size))
    )
    return {
        "expand_backward_out": (streams, hidden),
        "sinkhorn_out": (square.view(-1, n, n), 5, 1e-6, plain(tokens, n, n)),
        "sinkhorn_backward_out": (
            square.view(-1, n, n),
            plain(tokens, n, n),
            5,
            1e-6,
            plain(tokens, n, n),
        ),
        "split_mixes_out": (
            mixes,
            *gates,
            2.0,
            1e-6,
            plain(tokens, n),
            plain(tokens, n),
            plain(tokens, n * n),
        ),
        "split_mixes_backward_out": (
            narrow,
            plain(tokens, n),
            square,
            mixes,
            *gates,
            2.0,
            plain(tokens, num_mixes),
            plain(3),
            plain(num_mixes),
        ),
        "head_mix_out": (narrow, plain(1), plain(n), 1e-6, plain(tokens, n)),
        "head_mix_rows_backward_out": (
            narrow,
            plain(tokens, n),
            plain(1),
            plain(n),
            2,
            plain(tokens, n),
            plain(3, 1),
            plain(3, n),
        ),
        "norm_weight_backward_add": (
            plain(num_mixes, size),
            plain(size),
            plain(num_mixes, size),
            plain(num_mixes, size),
            plain(size),
        ),
        "norm_fn_products_out": (
            streams.view(tokens, size),
            plain(num_mixes, size),
            plain(tokens, num_mixes),
            plain(tokens),
        ),
        "norm_fn_backward_out": (
            mixes,
            plain(tokens),
            streams.view(tokens, size),
            plain(num_mixes, size),
            plain(tokens, size).bfloat16(),
            plain(num_mixes, size),
        ),
        "partials_norm_out": (
            plain(*splits, 2, num_mixes),
            plain(*splits, 2).square(),
            size,
            1e-6,
            plain(*groups, num_mixes),
            plain(*groups),
            plain(tokens, num_mixes),
        ),
        "partials_norm_backward_out": (
            mixes,
            plain(*groups, num_mixes),
            plain(*groups).square(),
            size,
            1e-6,
            plain(*groups, num_mixes),
            plain(*groups),
        ),
        "partials_pre_out": (
            plain(*splits, num_mixes),
            plain(*splits).square() * size,
            *gates,
            streams,
            1e-6,
            1e-6,
            1e-6,
            2.0,
            5,
            plain(tokens, n),
            plain(tokens, n * n),
            torch.empty_like(hidden),
        ),
    }


def _interleaved_calls(lead: Sequence[int], device: str) -> dict[str, tuple[Any, ...]]:
    """The operators behind compat.transformer_engine: four streams, which lie innermost."""
    n, channels, tokens = 4, 33, torch.Size(lead).numel()
    size, num_mixes = n * channels, n * (n + 2)

    def leaf(*shape: int) -> Tensor:
        return normal(*shape, device=device).requires_grad_()

    x, f, wide_mix = (*lead, channels, n), (*lead, channels), (*lead, n, n)
    narrow_mix, h = (*lead, n), (tokens, 32)
    post = (f, (channels,), x, narrow_mix, wide_mix)
    projection = ((tokens, size), (num_mixes, size), (size,))
    grad_gates = ((tokens, n), (tokens, n), (tokens, n * n))

    def leaves(*shapes: Sequence[int]) -> list[Tensor]:
        return [leaf(*shape) for shape in shapes]

    def plain(*shapes: Sequence[int]) -> list[Tensor]:
        return [tensor.detach() for tensor in leaves(*shapes)]

    return {
        "interleaved_aggregate": (*leaves(x, narrow_mix),),
        "interleaved_aggregate_backward": (*plain(f, x, narrow_mix),),
        "interleaved_aggregate_accumulate": (*plain(f, x, narrow_mix), True, *plain(x)),
        "interleaved_post": (*leaves(*post),),
        "interleaved_post_backward": (*plain(x, *post),),
        "interleaved_post_accumulate": (*plain(x, *post), True, *plain(x)),
        "padded_projection": (*leaves(*projection),),
        "padded_projection_backward": (*plain(h, (tokens,), *projection, (tokens, size)),),
        "padded_mixes": (
            leaf(*h),
            normal(tokens, device=device).square().requires_grad_(),
            *leaves((3,), (num_mixes,)),
            n,
        ),
        "padded_mixes_backward": (
            *plain(*grad_gates, h),
            normal(tokens, device=device).square(),
            *plain((3,), (num_mixes,)),
            n,
        ),
        "log_sinkhorn": (*leaves(wide_mix), 5),
        "log_sinkhorn_backward": (*plain(wide_mix, wide_mix), 5),
    }
