"""Every plain function of TileKernels 2.1.0's `mhc` as one value, like the calls of `calls`.

They write into tensors that they are given, which hold NaN before, and know no autograd: a backward
is a call of its own. `run` takes whatever has the functions: TileKernels, or our stand-in. `exact`
is `tile_mhc.reference` in float64, whose gradients autograd takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parity import calls
from parity.calls import BF16, FLOAT32, Named
from tile_mhc import reference

# As in the calls: what is added to every gate, norm and divisor, and what Sinkhorn repeats.
EPS, POST_MULT, STEPS = 1e-6, 2.0, 20
# Rows of partial sums, and tokens of a block: neither divides the tokens.
ROWS, BLOCK = 7, 32
SPLITS, GROUPS = 16, 4


class Maker(calls.Maker):
    """Tensors of flat tokens, of any number of streams."""

    def __init__(
        self, name: str, num_tokens: int, hidden_size: int, device: str, num_streams: int = 4
    ) -> None:
        super().__init__(f"plain-{name}-n{num_streams}", num_tokens, hidden_size, device)
        self.num_streams = num_streams
        self.num_mixes = num_streams * (num_streams + 2)

    def by_token(self, name: str, *shape: int) -> Tensor:
        return self.float32(name, self.num_tokens, *shape)

    def weights(self, name: str, *shape: int) -> Tensor:
        """Within (0, 1), as mixes are."""
        return (self.by_token(name, *shape) + 4) / 8

    def streams(self, name: str, *lead: int) -> Tensor:
        return self.by_token(name, *lead, self.hidden_size).bfloat16()

    def partials(self, splits: int, groups: int) -> Named:
        """Products and sums of squares, over splits of K, of groups of K."""
        shape = (splits, self.num_tokens, groups)
        squares = self.float32("squares", *shape).square() + 0.5
        return {
            "products": self.float32("products", *shape, self.num_mixes),
            "squares": squares * (self.num_streams * self.hidden_size / (splits * groups)),
        }

    def gates(self) -> Named:
        return {
            "scale": self.float32("scale", 3),
            "base": self.float32("base", self.num_mixes),
        }


@dataclass(frozen=True)
class Plain:
    """One call; a tensor without a bound has FLOAT32's, as the kernels compute in that."""

    name: str
    inputs: Callable[[Maker], Named]
    run: Callable[[Any, Named], Named]
    exact: Callable[[Named], Named]
    bounds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def bound(self, tensor: str) -> float:
        return self.bounds.get(tensor, FLOAT32)


def unwritten(like: Tensor, *shape: int) -> Tensor:
    """Of the dtype of another tensor."""
    return torch.full(shape or like.shape, float("nan"), dtype=like.dtype, device=like.device)


def by_autograd(function: Callable[..., Any], cotangents: list[Tensor], **leaves: Tensor) -> Named:
    """The gradients of the leaves, which are the function's arguments."""
    given = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    outputs = function(**given)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    with torch.enable_grad():
        grads = torch.autograd.grad(outputs, list(given.values()), cotangents)
    return dict(zip(given, grads, strict=True))


def _expand_fwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["x"], *x["x"].shape[:1], x["n"].numel(), *x["x"].shape[1:])
    tk.expand_to_mhc_fwd(x["x"], out)
    return {"o": out}


def _expand_bwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["o_grad"], *x["o_grad"][:, 0].shape)
    tk.expand_to_mhc_bwd(x["o_grad"], out)
    return {"x_grad": out}


def _head_inputs(make: Maker) -> Named:
    n = make.num_streams
    return {
        "mix": make.by_token("mix", n),
        "scale": make.float32("scale", 1),
        "base": make.float32("base", n),
    }


def _head_fwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["mix"])
    tk.mhc_head_compute_mix_fwd(x["mix"], x["scale"], x["base"], out, EPS)
    return {"out": out}


def _head_bwd(tk: Any, x: Named) -> Named:
    grad, scales, bases = (
        unwritten(x["mix"]),
        unwritten(x["mix"], ROWS, 1),
        unwritten(x["mix"], ROWS, *x["base"].shape),
    )
    given = (x["grad"], x["mix"], x["scale"], x["base"])
    tk.mhc_head_compute_mix_bwd(*given, grad, scales, bases, ROWS)
    return {"mix_grad": grad, "scale_rows": scales, "base_rows": bases}


def _exact_head_bwd(x: Named) -> Named:
    def gate(mix: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return reference.head_mix(mix, scale, bias, pre_eps=EPS)

    rows: list[list[Tensor]] = [[], []]
    whole = by_autograd(gate, [x["grad"]], mix=x["mix"], scale=x["scale"], bias=x["base"])
    block = torch.arange(len(x["mix"]), device=x["mix"].device) // BLOCK
    for row in range(ROWS):
        own = block % ROWS == row
        of = by_autograd(
            gate, [x["grad"][own]], mix=x["mix"][own], scale=x["scale"], bias=x["base"]
        )
        rows[0].append(of["scale"])
        rows[1].append(of["bias"])
    return {
        "mix_grad": whole["mix"],
        "scale_rows": torch.stack(rows[0]),
        "base_rows": torch.stack(rows[1]),
    }


def _merge_inputs(make: Maker) -> Named:
    size = make.num_streams * make.hidden_size
    return {"fn": make.float32("fn", make.num_mixes, size), "normw": make.float32("normw", size)}


def _merge_fwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["fn"])
    tk.mhc_fn_normw_merge_fwd(x["fn"], x["normw"], out)
    return {"out_fn": out}


def _merge_bwd(tk: Any, x: Named) -> Named:
    fn_grad, normw_grad = x["fn_grad"].clone(), x["normw_grad"].clone()
    tk.mhc_fn_normw_merge_bwd(x["fn"], x["normw"], x["grad"], fn_grad, normw_grad)
    return {"fn_grad": fn_grad, "normw_grad": normw_grad}


def _exact_merge_bwd(x: Named) -> Named:
    grads = by_autograd(torch.mul, [x["grad"]], input=x["fn"], other=x["normw"])
    return {
        "fn_grad": x["fn_grad"] + grads["input"],
        "normw_grad": x["normw_grad"] + grads["other"],
    }


def _reduce_fwd(tk: Any, x: Named) -> Named:
    splits, tokens, groups, num_mixes = x["products"].shape
    out_mul = unwritten(x["products"], tokens, groups, num_mixes)
    sqrsum = unwritten(x["squares"], tokens, groups)
    out = unwritten(x["products"], tokens, num_mixes)
    size = x["size"].numel()
    written = (out_mul, sqrsum, out)
    tk.mhc_reduce_partials_and_rmsnorm_fwd(x["products"], x["squares"], *written, size, EPS, splits)
    return dict(zip(("out_mul", "sqrsum", "out"), written, strict=True))


def _exact_reduce_fwd(x: Named) -> Named:
    products, squares = x["products"].sum(0), x["squares"].sum(0)
    return {"out_mul": products, "sqrsum": squares, "out": _normed(products, squares, x["size"])}


def _normed(products: Tensor, squares: Tensor, size: Tensor) -> Tensor:
    return (products / (squares.unsqueeze(-1) / size.numel() + EPS).sqrt()).sum(-2)


def sized(make: Maker, groups: int) -> Named:
    """The size of a group, as the elements of a tensor: all inputs are tensors."""
    return {"size": torch.zeros(make.num_streams * make.hidden_size // groups, device=make.device)}


def _reduce_bwd(tk: Any, x: Named) -> Named:
    products, squares = unwritten(x["products"]), unwritten(x["squares"])
    given = (x["grad"], x["products"], x["squares"])
    tk.mhc_reduce_partials_and_rmsnorm_bwd(*given, products, squares, x["size"].numel(), EPS)
    return {"out_mul_grad": products, "sqrsum_grad": squares}


def _exact_reduce_bwd(x: Named) -> Named:
    grads = by_autograd(
        lambda products, squares: _normed(products, squares, x["size"]),
        [x["grad"]],
        products=x["products"],
        squares=x["squares"],
    )
    return {"out_mul_grad": grads["products"], "sqrsum_grad": grads["squares"]}


def reduce_bwd_inputs(make: Maker, groups: int) -> Named:
    summed = {name: tensor[0] for name, tensor in make.partials(1, groups).items()}
    return summed | {"grad": make.by_token("grad", make.num_mixes)} | sized(make, groups)


def _post_inputs(make: Maker) -> Named:
    # TileKernels wants two leading dimensions here.
    n = make.num_streams
    flat = {
        "x": make.streams("x"),
        "residual": make.streams("residual", n),
        "post_mix": make.weights("post_mix", n, 1),
        "comb_mix": make.weights("comb_mix", n, n),
    }
    return {name: tensor.unsqueeze(0) for name, tensor in flat.items()}


def _post_fwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["residual"])
    result = tk.mhc_post_fwd(*x.values(), out=out)
    if result is not out:
        raise AssertionError("mhc_post_fwd must return the out that it was given")
    return {"out": out}


def _post_bwd(tk: Any, x: Named) -> Named:
    names = ("x_grad", "residual_grad", "post_mix_grad", "comb_mix_grad")
    return dict(zip(names, tk.mhc_post_bwd(*x.values()), strict=True))


def _exact_post_bwd(x: Named) -> Named:
    *given, grad = x.values()
    names = ("layer_output", "residual", "post_mix", "comb_mix")
    grads = by_autograd(reference.post, [grad], **dict(zip(names, given, strict=True)))
    return {f"{name}_grad": grad for name, grad in zip(list(x)[:4], grads.values(), strict=True)}


def _apply_inputs(make: Maker) -> Named:
    n = make.num_streams
    return {"x": make.streams("x", n), "mix": make.weights("mix", n)}


def _apply_fwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["x"], *x["x"][:, 0].shape)
    tk.mhc_pre_apply_mix_fwd(x["x"], x["mix"], out)
    return {"o": out}


def _apply_bwd(tk: Any, x: Named) -> Named:
    x_grad = x["x_grad"].clone()
    return {
        "mix_grad": tk.mhc_pre_apply_mix_bwd(x["o_grad"], x["x"], x["mix"], x_grad),
        "x_grad": x_grad,
    }


def _exact_apply_bwd(x: Named) -> Named:
    grads = by_autograd(reference.aggregate, [x["o_grad"]], residual=x["x"], pre_mix=x["mix"])
    return {"mix_grad": grads["pre_mix"], "x_grad": x["x_grad"] + grads["residual"]}


def _split_inputs(make: Maker) -> Named:
    return {"mixes": make.by_token("mixes", make.num_mixes), **make.gates()}


def _split(mixes: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    n = {8: 2, 24: 4, 80: 8}[mixes.shape[-1]]
    return reference.split_mixes(
        mixes, scale, base, num_streams=n, post_mult=POST_MULT, pre_eps=EPS
    )


def _split_fwd(tk: Any, x: Named) -> Named:
    like = _split(*x.values())
    outs = [unwritten(x["mixes"], *out.flatten(1).shape) for out in like]
    tk.mhc_pre_split_mixes_fwd(*x.values(), *outs, POST_MULT, EPS)
    return dict(zip(("pre", "post", "comb"), outs, strict=True))


def _split_bwd_inputs(make: Maker) -> Named:
    inputs = _split_inputs(make)
    n = make.num_streams
    grads = {f"grad_{i}": make.by_token(f"grad_{i}", k) for i, k in enumerate((n, n, n * n))}
    return grads | inputs | {"post": _split(*inputs.values())[1]}


def _split_bwd(tk: Any, x: Named) -> Named:
    outs = [unwritten(x[name]) for name in ("mixes", "scale", "base")]
    names = ("grad_0", "grad_1", "grad_2", "mixes", "post", "scale", "base")
    tk.mhc_pre_split_mixes_bwd(*(x[name] for name in names), *outs, POST_MULT)
    return dict(zip(("mixes_grad", "scale_grad", "base_grad"), outs, strict=True))


def _exact_split_bwd(x: Named) -> Named:
    pre, post, comb = (x[f"grad_{i}"] for i in range(3))
    n = pre.shape[-1]
    leaves = {name: x[name] for name in ("mixes", "scale", "base")}
    grads = by_autograd(_split, [pre, post, comb.view(-1, n, n)], **leaves)
    return {f"{name}_grad": grad for name, grad in grads.items()}


def _logits(make: Maker) -> Named:
    n = make.num_streams
    return {"logits": make.by_token("logits", n, n)}


def _sinkhorn_fwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["logits"])
    tk.mhc_sinkhorn_fwd(x["logits"], out, STEPS, EPS)
    return {"out": out}


def _sinkhorn_bwd(tk: Any, x: Named) -> Named:
    out = unwritten(x["logits"])
    tk.mhc_sinkhorn_bwd(x["grad"], x["logits"], out, STEPS, EPS)
    return {"grad_input": out}


def _exact_sinkhorn(logits: Tensor) -> Tensor:
    return reference.sinkhorn(logits, repeat=STEPS, eps=EPS)


def _big_fuse_inputs(make: Maker) -> Named:
    sums = {name: tensor[:, :, 0] for name, tensor in make.partials(SPLITS, 1).items()}
    # Mixes near 1, as a trained model's are, and gates within what they resolve.
    sums["products"] = sums["products"] * (make.num_streams * make.hidden_size / SPLITS) ** 0.5
    gates = {name: tensor / 2 for name, tensor in make.gates().items()}
    sums = {name: tensor.contiguous() for name, tensor in sums.items()}
    return {**sums, **gates, "residual": make.streams("residual", make.num_streams)}


def _big_fuse(tk: Any, x: Named) -> Named:
    tokens, n, hidden_size = x["residual"].shape
    outs = (
        unwritten(x["products"], tokens, n),
        unwritten(x["products"], tokens, n * n),
        unwritten(x["residual"], tokens, hidden_size),
    )
    tk.mhc_pre_big_fuse_fwd(*x.values(), *outs, EPS, EPS, EPS, POST_MULT, STEPS, SPLITS)
    return dict(zip(("post_mix", "comb_mix", "layer_input"), outs, strict=True))


def big_fuse_by_parts(tk: Any, x: Named) -> Named:
    """The same by the functions for its parts."""
    tokens, n, hidden_size = x["residual"].shape
    splits, _, num_mixes = x["products"].shape
    summed, squares, mixes = (
        unwritten(x["products"], tokens, 1, num_mixes),
        unwritten(x["squares"], tokens, 1),
        unwritten(x["products"], tokens, num_mixes),
    )
    sums = (x["products"].unsqueeze(2), x["squares"].unsqueeze(2))
    tk.mhc_reduce_partials_and_rmsnorm_fwd(
        *sums, summed, squares, mixes, n * hidden_size, EPS, splits
    )
    pre, post, comb = (unwritten(mixes, tokens, count) for count in (n, n, n * n))
    gates = (x["scale"], x["base"])
    tk.mhc_pre_split_mixes_fwd(mixes, *gates, pre, post, comb, POST_MULT, EPS)
    logits, matrix = comb.view(tokens, n, n), unwritten(comb, tokens, n, n)
    tk.mhc_sinkhorn_fwd(logits, matrix, STEPS, EPS)
    layer_input = unwritten(x["residual"], tokens, hidden_size)
    tk.mhc_pre_apply_mix_fwd(x["residual"], pre, layer_input)
    return {"post_mix": post, "comb_mix": matrix.flatten(1), "layer_input": layer_input}


def _exact_big_fuse(x: Named) -> Named:
    products, squares = x["products"].sum(0), x["squares"].sum(0)
    size = x["residual"].shape[-2:].numel()
    mixes = products / (squares.unsqueeze(-1) / size + EPS).sqrt()
    pre, post, comb = _split(mixes, x["scale"], x["base"])
    return {
        "post_mix": post,
        "comb_mix": _exact_sinkhorn(comb),
        "layer_input": reference.aggregate(x["residual"], pre),
    }


def _expand_inputs(make: Maker) -> Named:
    return {"x": make.streams("x"), "n": torch.zeros(make.num_streams, device=make.device)}


PLAIN = {
    plain.name: plain
    for plain in (
        Plain(
            "expand_fwd",
            _expand_inputs,
            _expand_fwd,
            lambda x: {"o": reference.expand(x["x"], x["n"].numel())},
            {"o": 0.0},
        ),
        Plain(
            "expand_bwd",
            lambda make: {"o_grad": make.streams("o_grad", make.num_streams)},
            _expand_bwd,
            lambda x: {"x_grad": x["o_grad"].sum(1)},
            {"x_grad": BF16},
        ),
        Plain(
            "head_compute_mix_fwd",
            _head_inputs,
            _head_fwd,
            lambda x: {"out": reference.head_mix(*x.values(), pre_eps=EPS)},
        ),
        Plain(
            "head_compute_mix_bwd",
            lambda make: _head_inputs(make) | {"grad": make.by_token("grad", make.num_streams)},
            _head_bwd,
            _exact_head_bwd,
        ),
        Plain(
            "fn_normw_merge_fwd",
            _merge_inputs,
            _merge_fwd,
            lambda x: {"out_fn": x["fn"] * x["normw"]},
        ),
        Plain(
            "fn_normw_merge_bwd",
            lambda make: (
                _merge_inputs(make)
                | {
                    "grad": make.float32("grad", *_merge_inputs(make)["fn"].shape),
                    "fn_grad": make.float32("fn_grad", *_merge_inputs(make)["fn"].shape),
                    "normw_grad": make.float32("normw_grad", *_merge_inputs(make)["normw"].shape),
                }
            ),
            _merge_bwd,
            _exact_merge_bwd,
        ),
        Plain(
            "reduce_partials_fwd",
            lambda make: make.partials(SPLITS, 1) | sized(make, 1),
            _reduce_fwd,
            _exact_reduce_fwd,
        ),
        Plain(
            "reduce_partials_of_groups_fwd",
            lambda make: make.partials(3, GROUPS) | sized(make, GROUPS),
            _reduce_fwd,
            _exact_reduce_fwd,
        ),
        Plain(
            "reduce_partials_bwd",
            lambda make: reduce_bwd_inputs(make, 1),
            _reduce_bwd,
            _exact_reduce_bwd,
        ),
        Plain(
            "reduce_partials_of_groups_bwd",
            lambda make: reduce_bwd_inputs(make, GROUPS),
            _reduce_bwd,
            _exact_reduce_bwd,
        ),
        Plain(
            "post_fwd",
            _post_inputs,
            _post_fwd,
            lambda x: {"out": reference.post(*x.values())},
            {"out": BF16},
        ),
        Plain(
            "post_bwd",
            lambda make: (
                _post_inputs(make) | {"d_o": make.streams("d_o", make.num_streams).unsqueeze(0)}
            ),
            _post_bwd,
            _exact_post_bwd,
            {"x_grad": BF16, "residual_grad": BF16},
        ),
        Plain(
            "pre_apply_mix_fwd",
            _apply_inputs,
            _apply_fwd,
            lambda x: {"o": reference.aggregate(x["x"], x["mix"])},
            {"o": BF16},
        ),
        Plain(
            "pre_apply_mix_bwd",
            lambda make: (
                _apply_inputs(make)
                | {
                    "o_grad": make.streams("o_grad"),
                    "x_grad": make.streams("x_grad", make.num_streams),
                }
            ),
            _apply_bwd,
            _exact_apply_bwd,
            {"x_grad": BF16},
        ),
        Plain(
            "pre_split_mixes_fwd",
            _split_inputs,
            _split_fwd,
            lambda x: dict(
                zip(
                    ("pre", "post", "comb"),
                    (out.flatten(1) for out in _split(*x.values())),
                    strict=True,
                )
            ),
        ),
        Plain("pre_split_mixes_bwd", _split_bwd_inputs, _split_bwd, _exact_split_bwd),
        Plain(
            "sinkhorn_fwd",
            _logits,
            _sinkhorn_fwd,
            lambda x: {"out": _exact_sinkhorn(x["logits"])},
        ),
        Plain(
            "sinkhorn_bwd",
            lambda make: (
                _logits(make) | {"grad": make.by_token("grad", make.num_streams, make.num_streams)}
            ),
            _sinkhorn_bwd,
            lambda x: {
                "grad_input": by_autograd(_exact_sinkhorn, [x["grad"]], logits=x["logits"])[
                    "logits"
                ]
            },
        ),
        Plain(
            "pre_big_fuse_fwd",
            _big_fuse_inputs,
            _big_fuse,
            _exact_big_fuse,
            {"layer_input": BF16},
        ),
    )
}


def evaluate(tk: Any, plain: Plain, inputs: Named) -> Named:
    """What the call wrote and returned; its inputs must be as they were."""
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    results = plain.run(tk, inputs)
    for name, tensor in inputs.items():
        if not torch.equal(tensor, before[name]):
            raise AssertionError(f"{plain.name}: its input {name} was written to")
    return results


def evaluate_exactly(plain: Plain, inputs: Named) -> Named:
    return plain.exact({name: tensor.double() for name, tensor in inputs.items()})


# What of the backward ours rounds once, sums included.
ROUNDED_ONCE = (
    "head_compute_mix_bwd",
    "fn_normw_merge_bwd",
    "reduce_partials_bwd",
    "reduce_partials_of_groups_bwd",
    "pre_split_mixes_bwd",
)


def check_rounded_once(tk: Any, plain: Plain, inputs: Named) -> None:
    """As near to float64 as float32 can be: with 2 % for what float64 has as a tie."""
    found, truth = evaluate(tk, plain, inputs), evaluate_exactly(plain, inputs)
    for name, exact in truth.items():
        error = calls.relative_error(found[name].view(exact.shape), exact)
        limit = 1.02 * calls.relative_error(exact.float(), exact)
        if not error <= limit:
            raise AssertionError(f"{plain.name}: {name}: {error:.3e}, allowed {limit:.3e}")
