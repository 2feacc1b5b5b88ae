"""Every mHC call of TileKernels 1.0.0 as one value: its inputs, how to run it, and how exact it is.

`run` takes a namespace of functions with TileKernels' names, so that one call serves theirs, ours
and the float64 specification. Inputs come from an integer hash: the same bits under any version of
torch, on any device. n is 4, as TileKernels' backward wants; residuals are (1, T, n, H), as its
wrappers want.
"""

import hashlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

import tile_mhc
from tile_mhc import reference

Named = dict[str, Tensor]
SEED = 0
NUM_STREAMS = 4
NUM_MIXES = NUM_STREAMS * (NUM_STREAMS + 2)
LAYERS, POSTS = 3, 2  # of the recompute: an aggregate follows the last post

# The largest relative error, in norm, of rounding once to a format: half a unit in the last place
# of the smallest mantissa, spread evenly. Measured values are a quarter below.
BF16 = 2.0**-8 / math.sqrt(3)
# A few dozen float32 operations of 6e-8 each.
FLOAT32 = 1e-6
# Where both sides round the weight, and the gradient of the bare product, to TF32, only sums in
# float32 tell their products apart,
PRODUCT = 2e-5
# and, of few tokens, a gradient within a float32 error of a midpoint that goes the other way:
# 2**-10 of one of some hundred terms.
PRODUCT_GRADIENT = 1e-4


def hashed(key: str, *shape: int, device: str = "cpu") -> Tensor:
    """Near normal float64 values, mean 0 and variance 1, |value| < 3.5, named by `key`."""
    digest = hashlib.sha256(f"{SEED}:{key}".encode()).digest()
    bits = torch.arange(math.prod(shape), device=device) + int.from_bytes(digest[:7], "big")
    # The finalizer of splitmix64; int64 products wrap, and shifts need their sign bits cleared.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        bits = bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))
        bits = bits if factor is None else bits * (factor - 2**64)
    total = sum((bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
    # A product: a division by a constant is rounded differently on a CPU and a GPU.
    return ((total.double() - 4 * 32767.5) * (math.sqrt(3) / 65536)).view(shape)


class Maker:
    """Makes the tensors of one call: float32 ones and bfloat16 ones, by name."""

    def __init__(self, call: str, num_tokens: int, hidden_size: int, device: str) -> None:
        self.key = f"{call}-T{num_tokens}-H{hidden_size}"
        self.num_tokens, self.hidden_size, self.device = num_tokens, hidden_size, device

    def float32(self, name: str, *shape: int) -> Tensor:
        return hashed(f"{self.key}-{name}", *shape, device=self.device).float()

    def bfloat16(self, name: str, *shape: int) -> Tensor:
        return self.float32(name, *shape).bfloat16()

    def mix(self, name: str, *shape: int) -> Tensor:
        """float32 per token, within (0, 1) as mixes are."""
        value = self.float32(name, 1, self.num_tokens, *shape)
        return (value + 4) / 8

    def hidden(self, name: str) -> Tensor:
        return self.bfloat16(name, 1, self.num_tokens, self.hidden_size)

    def residual(self, name: str = "residual") -> Tensor:
        return self.bfloat16(name, 1, self.num_tokens, NUM_STREAMS, self.hidden_size)

    def block(self) -> Named:
        size = NUM_STREAMS * self.hidden_size
        return {
            "residual": self.residual(),
            # A power of two, for exactness; the mixes are near 1, as a trained model's are.
            "fn": self.float32("fn", NUM_MIXES, size) * 2.0 ** -round(math.log2(size) / 2),
            "scale": self.float32("scale", 3) / 2,
            "base": self.float32("base", NUM_MIXES) / 2,
        }

    def norm_weight(self) -> Tensor:
        return self.float32("norm_weight", NUM_STREAMS * self.hidden_size) / 8 + 1

    def cotangents(self, outputs: Named) -> Named:
        """A gradient for every output."""
        return {
            name: self.float32(f"grad_{name}", *out.shape).to(out.dtype)
            for name, out in outputs.items()
        }


@dataclass(frozen=True)
class Call:
    """One call; `bounds` are TileKernels' errors beside a float64 that rounds where it rounds.

    That is, with weights and gradients of products as TF32. A tensor without a bound has FLOAT32.
    """

    name: str
    inputs: Callable[[Maker], Named]
    run: Callable[[SimpleNamespace, Named], Named]
    bounds: dict[str, float]
    has_gradient: bool = True

    def bound(self, tensor: str) -> float:
        return self.bounds.get(tensor, FLOAT32)


def _expand(tk: SimpleNamespace, x: Named) -> Named:
    return {"out": tk.expand_to_mhc(x["hidden"], NUM_STREAMS)}


def _norm_fn(tk: SimpleNamespace, x: Named) -> Named:
    # Without fuse_grad_acc: with it, TileKernels wants the caller to have posted a gradient.
    weight = x.get("norm_weight")
    return {"out": tk.mhc_pre_norm_fn(x["residual"], x["fn"], weight, 1e-6, False)}


def _split_mixes(tk: SimpleNamespace, x: Named) -> Named:
    outputs = tk.mhc_pre_split_mixes(x["mixes"], x["scale"], x["base"], NUM_STREAMS, 2.0, 1e-6)
    return dict(zip(("pre_mix", "post_mix", "comb"), outputs, strict=True))


def _sinkhorn(tk: SimpleNamespace, x: Named) -> Named:
    return {"out": tk.sinkhorn_normalize(x["logits"], 20, 1e-6)}


def _apply_mix(tk: SimpleNamespace, x: Named) -> Named:
    return {"out": tk.mhc_pre_apply_mix(x["residual"], x["mix"])}


def _post(tk: SimpleNamespace, x: Named) -> Named:
    return {"out": tk.mhc_post(x["x"], x["residual"], x["post_mix"], x["comb_mix"])}


def _head_compute_mix(tk: SimpleNamespace, x: Named) -> Named:
    return {"out": tk.mhc_head_compute_mix(x["mix"], x["scale"], x["base"], 1e-6)}


def _big_fuse(tk: SimpleNamespace, x: Named) -> Named:
    outputs = tk.mhc_pre_big_fuse(*x.values(), 1e-6, 1e-6, 1e-6, 2.0, 20)
    return dict(zip(("post_mix", "comb_mix", "layer_input"), outputs, strict=True))


def _recompute(tk: SimpleNamespace, x: Named) -> Named:
    def listed(name: str) -> list[Tensor]:
        return [tensor for key, tensor in x.items() if key.startswith(name)]

    residual = x["initial_residual"]
    inputs = [torch.empty_like(residual[..., 0, :]) for _ in range(LAYERS)]
    residuals = [torch.empty_like(residual) for _ in range(POSTS)]
    names = ("pre_mix", "layer_output", "post_mix", "comb_mix")
    tk.mhc_multilayer_recompute(residual, *map(listed, names), inputs, residuals)
    return {f"layer_input_{i}": t for i, t in enumerate(inputs)} | {
        f"residual_{i}": t for i, t in enumerate(residuals)
    }


def _recompute_inputs(make: Maker) -> Named:
    inputs = {"initial_residual": make.residual()}
    for i in range(LAYERS):
        inputs[f"pre_mix_{i}"] = make.mix(f"pre_mix_{i}", NUM_STREAMS, 1)
    for i in range(POSTS):
        inputs[f"layer_output_{i}"] = make.hidden(f"layer_output_{i}")
        inputs[f"post_mix_{i}"] = make.mix(f"post_mix_{i}", NUM_STREAMS, 1)
        # Rows that sum to about 1 keep the residual of one size.
        inputs[f"comb_mix_{i}"] = make.mix(f"comb_mix_{i}", NUM_STREAMS, NUM_STREAMS) / 2
    return inputs


def _sub_layer(tk: SimpleNamespace, x: Named) -> Named:
    layer_input, (post_mix, comb_mix) = tk.mhc_pre(
        x["residual"], x["fn"], x["scale"], x["base"], post_mult_value=2.0, sinkhorn_repeat=20
    )
    # Half of its input is a layer whose own gradient is exact.
    return {"out": tk.mhc_post(layer_input * 0.5, x["residual"], post_mix, comb_mix)}


def _boundary(tk: SimpleNamespace, x: Named) -> Named:
    """A post and all that is before the next sub-layer; with a pre_mix DeepSeek-V4.1's.

    TileKernels has it op by op; without fuse_grad_acc, as the streams are an output.
    """
    run = getattr(tk, "post_pre", None) or _op_by_op(tk)
    of_post = [x[name] for name in ("x", "residual", "post_mix", "comb_mix")]
    gates = [x[name] for name in ("fn", "scale", "base")]
    names = ["streams", "layer_input", "next_post", "next_comb"]
    if "pre_mix" in x:
        names.insert(2, "next_pre")
    outputs = run(*of_post, *gates, x.get("pre_mix"))
    shapes = {"next_pre": -1, "next_post": -1}
    return {
        name: out.squeeze(shapes[name]) if name in shapes and out.ndim == 4 else out
        for name, out in zip(names, outputs, strict=True)
    }


def _op_by_op(tk: SimpleNamespace) -> Callable[..., tuple[Tensor, ...]]:
    def run(layer_output, residual, post_mix, comb_mix, fn, scale, base, pre_mix):
        streams = tk.mhc_post(layer_output, residual, post_mix, comb_mix)
        mixes = tk.mhc_pre_norm_fn(streams, fn, None, 1e-6, False)
        own, *others = tk.mhc_pre_split_mixes(mixes, scale, base, NUM_STREAMS, 2.0, 1e-6)
        next_comb = tk.sinkhorn_normalize(others[1], 20, 1e-6)
        layer_input = tk.mhc_pre_apply_mix(streams, own if pre_mix is None else pre_mix)
        next_pre = () if pre_mix is None else (own,)
        return streams, layer_input, *next_pre, others[0], next_comb

    return run


def _boundary_inputs(make: Maker) -> Named:
    inputs = make.block()
    inputs["x"] = make.hidden("x")
    inputs["post_mix"] = make.mix("post_mix", NUM_STREAMS, 1)
    # Rows that sum to about 1 keep the residual of one size.
    inputs["comb_mix"] = make.mix("comb_mix", NUM_STREAMS, NUM_STREAMS) / 2
    return inputs


def _delayed_inputs(make: Maker) -> Named:
    return _boundary_inputs(make) | {"pre_mix": make.mix("pre_mix", NUM_STREAMS, 1)}


def _without_gates(make: Maker) -> Named:
    inputs = make.block()
    return {name: inputs[name] for name in ("residual", "fn")}


# The weight and the gradient of the product are multiplied as TF32; the residual is bfloat16.
NORM_FN_BOUNDS = {
    "out": PRODUCT,
    "grad_residual": BF16,
    "grad_fn": PRODUCT_GRADIENT,
    "grad_norm_weight": PRODUCT_GRADIENT,
}
# Roundings to bfloat16 on the way. Of outputs: the streams; then the layer input; the mixes are
# sums over K of the rounded streams. Of gradients: of the streams one after each of two parts, and
# where autograd adds them to what the streams have; then the result. Those of scale and bias are
# sums over tokens, of which few may cancel.
BOUNDARY_BOUNDS = {
    "streams": BF16,
    "layer_input": BF16 * math.sqrt(2),
    **dict.fromkeys(("next_pre", "next_post", "next_comb"), BF16 / 2),
    **dict.fromkeys(("grad_x", "grad_residual"), BF16 * math.sqrt(5)),
    **dict.fromkeys(("grad_post_mix", "grad_comb_mix"), BF16 * 2),
    **dict.fromkeys(("grad_fn", "grad_pre_mix"), BF16 * math.sqrt(2)),
    **dict.fromkeys(("grad_scale", "grad_base"), BF16 * 4),
}
CALLS = {
    call.name: call
    for call in (
        Call(
            "expand",
            lambda make: {"hidden": make.hidden("hidden")},
            _expand,
            {"out": 0.0, "grad_hidden": BF16},
        ),
        Call("norm_fn", _without_gates, _norm_fn, NORM_FN_BOUNDS),
        Call(
            "norm_fn_weight",
            lambda make: _without_gates(make) | {"norm_weight": make.norm_weight()},
            _norm_fn,
            NORM_FN_BOUNDS,
        ),
        Call(
            "split_mixes",
            lambda make: {
                "mixes": make.float32("mixes", 1, make.num_tokens, NUM_MIXES),
                "scale": make.float32("scale", 3),
                "base": make.float32("base", NUM_MIXES),
            },
            _split_mixes,
            {},
        ),
        Call(
            "sinkhorn",
            lambda make: {
                "logits": make.float32("logits", 1, make.num_tokens, NUM_STREAMS, NUM_STREAMS)
            },
            _sinkhorn,
            {},
        ),
        Call(
            "apply_mix",
            lambda make: {"residual": make.residual(), "mix": make.mix("mix", NUM_STREAMS, 1)},
            _apply_mix,
            {"out": BF16, "grad_residual": BF16},
        ),
        Call(
            "post",
            lambda make: {
                "x": make.hidden("x"),
                "residual": make.residual(),
                "post_mix": make.mix("post_mix", NUM_STREAMS, 1),
                "comb_mix": make.mix("comb_mix", NUM_STREAMS, NUM_STREAMS),
            },
            _post,
            {"out": BF16, "grad_x": BF16, "grad_residual": BF16},
        ),
        Call(
            "head_compute_mix",
            lambda make: {
                "mix": make.float32("mix", 1, make.num_tokens, NUM_STREAMS),
                "scale": make.float32("scale", 1),
                "base": make.float32("base", NUM_STREAMS),
            },
            _head_compute_mix,
            {},
        ),
        Call(
            "big_fuse",
            lambda make: make.block(),
            _big_fuse,
            # Sigmoid and Sinkhorn damp the error of the mixes, TF32's to 2e-5.
            {"post_mix": PRODUCT / 5, "comb_mix": PRODUCT / 5, "layer_input": BF16},
            has_gradient=False,
        ),
        Call(
            "recompute",
            _recompute_inputs,
            _recompute,
            # Every stored residual on the way adds one rounding.
            {f"layer_input_{i}": BF16 * math.sqrt(i + 1) for i in range(LAYERS)}
            | {f"residual_{i}": BF16 * math.sqrt(i + 1) for i in range(POSTS)},
            has_gradient=False,
        ),
        Call(
            "sub_layer",
            lambda make: make.block(),
            _sub_layer,
            # Roundings to bfloat16 on the way: layer_input and out; of the residual's gradient,
            # one after each of three parts and up to two more where autograd adds them; of the
            # parameters' gradients, layer_input and its gradient.
            {"out": BF16 * math.sqrt(2), "grad_residual": BF16 * math.sqrt(5)}
            | {f"grad_{name}": BF16 * math.sqrt(2) for name in ("fn", "scale", "base")},
        ),
        Call("boundary", _boundary_inputs, _boundary, BOUNDARY_BOUNDS),
        Call("boundary_delayed", _delayed_inputs, _boundary, BOUNDARY_BOUNDS),
    )
}


def functions(package: str) -> SimpleNamespace:
    """The functions of `modeling.mhc` and its ops, of TileKernels or of its stand-in."""
    ops = importlib.import_module(f"{package}.modeling.mhc.ops")
    functional = importlib.import_module(f"{package}.modeling.mhc.functional")
    public = {name: value for name, value in vars(ops).items() if callable(value)}
    return SimpleNamespace(**public, mhc_pre=functional.mhc_pre, mhc_head=functional.mhc_head)


def _spec_recompute(residual, pre, outputs, post, comb, inputs, residuals) -> None:
    results = reference.recompute(residual, pre, outputs, post, comb)
    for destinations, sources in zip((inputs, residuals), results, strict=True):
        for destination, source in zip(destinations, sources, strict=True):
            destination.copy_(source)


def _spec_split_mixes(mixes, scale, base, n, post_mult, pre_eps):
    pre, post, comb = reference.split_mixes(
        mixes, scale, base, num_streams=n, post_mult=post_mult, pre_eps=pre_eps
    )
    return pre.unsqueeze(-1), post.unsqueeze(-1), comb


class _Tf32Projection(torch.autograd.Function):
    """The projection with both roundings; autograd alone would leave out the gradient's."""

    @staticmethod
    def forward(ctx, residual, fn, weight, eps):
        mixes, inv_rms = reference.projection_with_rms(residual, fn, weight, eps, tf32=True)
        ctx.save_for_backward(residual, fn, weight, mixes, inv_rms)
        return mixes

    @staticmethod
    def backward(ctx, grad):
        return *reference.projection_backward(grad, *ctx.saved_tensors, tf32=True), None


def _exact_product(residual, fn, weight, eps, _=None):
    return reference.projection(residual, fn, norm_weight=weight, norm_eps=eps)


def _tf32_product(residual, fn, weight, eps, _=None):
    return _Tf32Projection.apply(residual, fn, weight, eps)


def _spec_pre(product):
    def pre(residual, fn, scale, base, *, post_mult_value=1.0, sinkhorn_repeat=10):
        pre_mix, post_mix, comb = reference.split_mixes(
            product(residual, fn, None, 1e-6),
            scale,
            base,
            num_streams=NUM_STREAMS,
            post_mult=post_mult_value,
        )
        comb_mix = reference.sinkhorn(comb, repeat=sinkhorn_repeat)
        return reference.aggregate(residual, pre_mix), (post_mix, comb_mix)

    return pre


def _big_fuse_of(pre):
    """`mhc_pre_big_fuse`, as `_big_fuse` calls it, of an `mhc_pre`."""

    def big_fuse(residual, fn, scale, base, rms_eps, pre_eps, sinkhorn_eps, post_mult, repeat):
        if (rms_eps, pre_eps, sinkhorn_eps) != (1e-6, 1e-6, 1e-6):
            raise NotImplementedError("the calls here keep every eps at its default")
        layer_input, (post_mix, comb_mix) = pre(
            residual, fn, scale, base, post_mult_value=post_mult, sinkhorn_repeat=repeat
        )
        return post_mix.reshape(*residual.shape[:-1], 1), comb_mix, layer_input

    return big_fuse


def _specification(product) -> SimpleNamespace:
    pre = _spec_pre(product)
    return SimpleNamespace(
        expand_to_mhc=reference.expand,
        mhc_pre_norm_fn=product,
        mhc_pre_split_mixes=_spec_split_mixes,
        sinkhorn_normalize=lambda x, repeat, eps: reference.sinkhorn(x, repeat=repeat, eps=eps),
        mhc_pre_apply_mix=reference.aggregate,
        mhc_post=reference.post,
        mhc_head_compute_mix=lambda mix, scale, base, eps: reference.head_mix(
            mix, scale, base, pre_eps=eps
        ),
        mhc_pre_big_fuse=_big_fuse_of(pre),
        mhc_multilayer_recompute=_spec_recompute,
        mhc_pre=pre,
    )


SPECIFICATION = _specification(_exact_product)
TF32_SPECIFICATION = _specification(_tf32_product)


def native() -> SimpleNamespace:
    """Our functions under TileKernels' names, with products of tile_mhc's own precision."""

    def pre(residual, fn, scale, base, *, post_mult_value=1.0, sinkhorn_repeat=10):
        layer_input, *mixes = tile_mhc.fused_pre(
            residual, fn, scale, base, post_mult=post_mult_value, sinkhorn_repeat=sinkhorn_repeat
        )
        return layer_input, tuple(mixes)

    def norm_fn(residual, fn, weight, eps, _):
        return tile_mhc.projection(residual, fn, norm_weight=weight, norm_eps=eps)

    def post_pre(*inputs):
        *inputs, pre_mix = inputs
        return tile_mhc.post_pre(*inputs, pre_mix=pre_mix, post_mult=2.0, sinkhorn_repeat=20)

    found = functions("tile_mhc.compat.tile_kernels")
    found.post_pre = post_pre
    found.mhc_pre, found.mhc_pre_norm_fn, found.mhc_pre_big_fuse = pre, norm_fn, _big_fuse_of(pre)
    return found


def evaluate(tk: SimpleNamespace, call: Call, inputs: Named, make: Maker) -> tuple[Named, Named]:
    """The outputs and gradients of a call by name, and the output gradients it was given."""
    if not call.has_gradient:
        with torch.no_grad():
            return call.run(tk, inputs), {}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = call.run(tk, leaves)
    cotangents = make.cotangents(outputs)
    torch.autograd.backward(list(outputs.values()), list(cotangents.values()))
    result = {name: out.detach() for name, out in outputs.items()}
    for name, tensor in leaves.items():
        if tensor.grad is None:
            raise AssertionError(f"{call.name}: no gradient came for {name}")
        result[f"grad_{name}"] = tensor.grad
    return result, cotangents


def evaluate_exactly(
    call: Call, inputs: Named, cotangents: Named, specification: SimpleNamespace = SPECIFICATION
) -> Named:
    """A specification in float64 on the same inputs and output gradients."""
    if not call.has_gradient:
        with torch.no_grad():
            return call.run(specification, {name: t.double() for name, t in inputs.items()})
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    outputs = call.run(specification, leaves)
    torch.autograd.backward(list(outputs.values()), [cotangents[k].double() for k in outputs])
    result = {name: out.detach() for name, out in outputs.items()}
    return result | {f"grad_{name}": tensor.grad for name, tensor in leaves.items()}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||; NaN where value holds one."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def allowed_error(theirs: float, truth: Tensor, dtype: torch.dtype) -> float:
    """How large our error may be, where TileKernels' is `theirs`.

    No larger, with 2 % for ties. Two sound results differ by chance, and the ratio of two error
    norms of n elements is uncertain by 1/sqrt(n): three of these come on top, which is 1 % for a
    hundred thousand elements and matters only for the few numbers of a scale or a bias. The exact
    result, rounded to the format, is good enough whatever they have.
    """
    slack = 1.02 + 3 / math.sqrt(truth.numel())
    return max(theirs * slack + 1e-9, relative_error(truth.to(dtype), truth))


def same_bits(a: Tensor, b: Tensor) -> int:
    """How many elements are equal, bit by bit."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.contiguous().view(bits) == b.contiguous().view(bits)).sum())
