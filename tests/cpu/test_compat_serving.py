"""SGLang's and vLLM's names: signatures as read in their releases, and what they compute."""

import functools
import importlib
import inspect
import itertools

import pytest
import torch

import serving
from serving import STEPS, N, boundary_arguments, head_arguments, inputs, pre_arguments
from tile_mhc import ShapeError, UnsupportedError, contract, fused_pre, post, post_pre
from tile_mhc.compat import sglang, vllm

GATES = (
    "fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, "
    "sinkhorn_repeat"
)
POST = "x, residual, post_layer_mix, comb_res_mix"
NORM = "norm_weight=None, norm_eps=1e-06"
# Of SGLang 0.5.23 and vLLM 0.33.0, by the modules that they lie in there.
INTERFACE = {
    "sglang.kernels.ops.layernorm.mhc": {
        "mhc_pre": (
            f"residual, {GATES}, n_splits=1, n_splits_pre=32, *, norm_weight=None, norm_eps=None"
        ),
        "mhc_post": POST,
        "mhc_fused_post_pre": (
            f"{POST}, {GATES}, n_splits=1, tile_n=1, *, norm_weight=None, norm_eps=None"
        ),
    },
    "sglang.kernels.ops.layernorm.mhc_head": {
        "fused_hc_head": "x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps",
    },
    "vllm.model_executor.kernels.mhc.tilelang": {
        "mhc_pre_tilelang": f"residual, {GATES}, n_splits=1, {NORM}",
        "mhc_post_tilelang": POST,
        "mhc_fused_post_pre_tilelang": f"{POST}, {GATES}, n_splits=1, tile_n=1, {NORM}",
        "mhc_pre_delayed_tilelang": f"residual, {GATES}, pre_mix=None, x=None, {NORM}",
        "mhc_fused_post_pre_delayed_tilelang": (
            f"{POST}, {GATES}, pre_mix=None, {NORM}, capture_aux=False"
        ),
        "hc_head_fused_kernel_tilelang": "hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps",
    },
}
NAMES = [(module, name) for module, names in INTERFACE.items() for name in names]
EITHER_PRE = pytest.mark.parametrize("pre", [sglang.mhc_pre, vllm.mhc_pre_tilelang])
EITHER_BOUNDARY = pytest.mark.parametrize(
    "boundary", [sglang.mhc_fused_post_pre, vllm.mhc_fused_post_pre_tilelang]
)
NORMS = pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
# Float32 against Python's floats.
CLOSE = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def signature(function):
    """As it is written, without annotations."""
    parts = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = parameter.default
        parts.append(name if default is inspect.Parameter.empty else f"{name}={default!r}")
    return ", ".join(parts)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=str)
def test_signature(module, name):
    function = getattr(importlib.import_module(f"tile_mhc.compat.{module}"), name)
    assert signature(function) == INTERFACE[module][name]
    assert getattr(importlib.import_module(f"tile_mhc.compat.{module.split('.')[0]}"), name) is (
        function
    )


@pytest.mark.parametrize("package", [sglang, vllm], ids=["sglang", "vllm"])
def test_packages_have_what_they_say_and_no_more(package):
    stack = package.__name__.rpartition(".")[2]
    names = {n for module, n in NAMES if module.startswith(stack)}
    assert set(package.__all__) - {"kernels", "model_executor", "warm_up"} == names
    assert all(getattr(package, name) is not None for name in package.__all__)


def options_of(tensors, normed):
    return {"norm_weight": tensors["norm_weight"], "norm_eps": 0.25} if normed else {}


def loops(tensors, *, normed=False, pre_mix=None, row=None, fn=None, streams=None):
    """(post, comb, layer_input, pre) of all tokens by the loops, as tensors."""
    data = {name: tensor.double().tolist() for name, tensor in tensors.items()}
    streams = data["residual"] if streams is None else streams
    weight = data["norm_weight"] if normed else None
    found = []
    for t, token in enumerate(streams):
        of = [v for stream in token for v in stream] if row is None else row[t]
        given = (fn or data["fn"], data["hc_scale"], data["hc_base"])
        pre, post_mix, comb = serving.loop_mixes(of, *given)
        mix = pre if pre_mix is None else pre_mix[t]
        layer_input = serving.loop_norm(serving.loop_collapse(token, mix), weight, 0.25)
        found.append(([[p] for p in post_mix], comb, layer_input, pre))
    return [torch.tensor(part) for part in zip(*found, strict=True)]


def loop_streams(tensors):
    names = ("x", "residual", "post_layer_mix", "comb_res_mix")
    data = [tensors[name].double().tolist() for name in names]
    return [
        serving.loop_post(x, streams, [p for (p,) in mix], comb)
        for x, streams, mix, comb in zip(*data, strict=True)
    ]


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        CLOSE(a, b.float())


@EITHER_PRE
@NORMS
def test_pre_against_loops(pre, normed):
    tensors = inputs(3, 6, "cpu", torch.float32)
    found = pre(*pre_arguments(tensors), **options_of(tensors, normed))
    check(found, loops(tensors, normed=normed)[:3])


@EITHER_BOUNDARY
@NORMS
def test_boundary_against_loops(boundary, normed):
    tensors = inputs(3, 6, "cpu", torch.float32)
    streams = loop_streams(tensors)
    found = boundary(*boundary_arguments(tensors), **options_of(tensors, normed))
    expected = loops(tensors, normed=normed, streams=streams)[:3]
    check(found, [torch.tensor(streams), *expected])


@NORMS
@pytest.mark.parametrize("given", [False, True], ids=["stream 0", "pre_mix"])
def test_delayed_pre_against_loops(given, normed):
    tensors = inputs(3, 6, "cpu", torch.float32)
    pre_mix = torch.rand(3, N) if given else None
    found = vllm.mhc_pre_delayed_tilelang(
        *pre_arguments(tensors), pre_mix=pre_mix, **options_of(tensors, normed)
    )
    mix = pre_mix.double().tolist() if given else [[1, 0, 0, 0]] * 3
    check(found, loops(tensors, normed=normed, pre_mix=mix))


@NORMS
def test_delayed_pre_of_another_input_against_loops(normed):
    """As for the embedding, whose weight is summed over the streams."""
    tensors = inputs(3, 8, "cpu", torch.float32)
    fn = tensors["fn"].view(-1, N, 8).sum(1)
    arguments = list(pre_arguments(tensors))
    arguments[1] = fn
    found = vllm.mhc_pre_delayed_tilelang(*arguments, x=tensors["x"], **options_of(tensors, normed))
    given = {"row": tensors["x"].double().tolist(), "fn": fn.double().tolist()}
    check(found, loops(tensors, normed=normed, pre_mix=[[1, 0, 0, 0]] * 3, **given))


def test_the_embedding_is_projected_as_its_streams_are():
    """A residual of equal streams has the mixes of one of them with the summed weight."""
    tensors = inputs(3, 64, "cpu", torch.float32)
    tensors["residual"] = tensors["x"].unsqueeze(1).expand(-1, N, -1).contiguous()
    arguments = list(pre_arguments(tensors))
    expected = vllm.mhc_pre_delayed_tilelang(*arguments)
    arguments[1] = tensors["fn"].view(-1, N, 64).sum(1)
    found = vllm.mhc_pre_delayed_tilelang(*arguments, x=tensors["x"])
    for a, b in zip(found, expected, strict=True):
        CLOSE(a, b)


@NORMS
@pytest.mark.parametrize("given", [False, True], ids=["stream 0", "pre_mix"])
def test_delayed_boundary_against_loops(given, normed):
    tensors = inputs(3, 6, "cpu", torch.float32)
    pre_mix = torch.rand(3, N) if given else None
    streams = loop_streams(tensors)
    *found, aux = vllm.mhc_fused_post_pre_delayed_tilelang(
        *boundary_arguments(tensors),
        pre_mix=pre_mix,
        **options_of(tensors, normed),
        capture_aux=True,
    )
    mix = pre_mix.double().tolist() if given else [[1, 0, 0, 0]] * 3
    expected = loops(tensors, normed=normed, pre_mix=mix, streams=streams)
    check(found, [torch.tensor(streams), *expected])
    CLOSE(aux, torch.tensor(streams).mean(1))


def test_no_mean_of_the_streams_by_default():
    tensors = inputs(3, 6, "cpu")
    aux = vllm.mhc_fused_post_pre_delayed_tilelang(*boundary_arguments(tensors))[-1]
    assert aux.shape == (0, 6)
    assert aux.dtype == torch.bfloat16


@pytest.mark.parametrize("head", [sglang.fused_hc_head, vllm.hc_head_fused_kernel_tilelang])
def test_head_against_loops(head):
    tensors = inputs(3, 6, "cpu", torch.float32)
    fn, scale, base = (tensors[n].double().tolist() for n in ("fn", "hc_scale", "hc_base"))
    streams = tensors["residual"].double().tolist()
    expected = [serving.loop_head(token, fn, scale, base) for token in streams]
    CLOSE(head(*head_arguments(tensors)), torch.tensor(expected))


def test_scale_of_a_head_without_a_dimension():
    tensors = inputs(3, 6, "cpu")
    x, fn, scale, *others = head_arguments(tensors)
    expected = sglang.fused_hc_head(x, fn, scale, *others)
    assert torch.equal(sglang.fused_hc_head(x, fn, scale[0], *others), expected)


@pytest.mark.parametrize("mhc_post", [sglang.mhc_post, vllm.mhc_post_tilelang])
def test_post_against_loops(mhc_post):
    tensors = inputs(3, 6, "cpu", torch.float32)
    arguments = boundary_arguments(tensors)[:4]
    CLOSE(mhc_post(*arguments), torch.tensor(loop_streams(tensors)))


@EITHER_PRE
@EITHER_BOUNDARY
@NORMS
def test_bits_are_those_of_the_ops(pre, boundary, normed):
    """Bfloat16, any leading dimensions, mixes with and without the last axis, all dtypes."""
    tensors = inputs(6, 64, "cpu")
    names = ("norm_eps", "pre_eps", "sinkhorn_eps", "post_mult", "sinkhorn_repeat")
    steps = dict(zip(names, STEPS, strict=True))
    if normed:
        steps |= {"layer_norm_weight": tensors["norm_weight"], "layer_norm_eps": 0.25}
    given = options_of(tensors, normed)
    layer_input, post_mix, comb = fused_pre(*pre_arguments(tensors)[:4], **steps)
    found = pre(*pre_arguments(tensors), **given)
    for a, b in zip(found, (post_mix.unsqueeze(-1), comb, layer_input), strict=True):
        assert torch.equal(a, b)
    streams, layer_input, post_mix, comb = post_pre(*boundary_arguments(tensors)[:7], **steps)
    expected = (streams, post_mix.unsqueeze(-1), comb, layer_input)
    for lead, squeezed in itertools.product([(6,), (2, 3)], [False, True]):
        shaped = dict(tensors)
        for name in ("x", "residual", "post_layer_mix", "comb_res_mix"):
            shaped[name] = tensors[name].view(*lead, *tensors[name].shape[1:])
        if squeezed:
            shaped["post_layer_mix"] = shaped["post_layer_mix"].squeeze(-1)
        found = boundary(*boundary_arguments(shaped), **given)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == (*lead, *b.shape[1:])
            assert a.dtype == b.dtype
            assert torch.equal(a.view(b.shape), b)


def test_bits_of_head_and_post_are_those_of_the_ops():
    tensors = inputs(6, 64, "cpu")
    *given, norm_eps, pre_eps = head_arguments(tensors)
    expected = contract(*given, norm_eps=norm_eps, pre_eps=pre_eps)
    assert torch.equal(sglang.fused_hc_head(*given, norm_eps, pre_eps), expected)
    assert torch.equal(vllm.hc_head_fused_kernel_tilelang(*given, norm_eps, pre_eps), expected)
    arguments = boundary_arguments(tensors)[:4]
    assert torch.equal(sglang.mhc_post(*arguments), post(*arguments))


@EITHER_PRE
@EITHER_BOUNDARY
def test_no_token(pre, boundary):
    tensors = inputs(0, 64, "cpu")
    shapes = [(0, N, 1), (0, N, N), (0, 64)]
    assert [tuple(out.shape) for out in pre(*pre_arguments(tensors))] == shapes
    found = boundary(*boundary_arguments(tensors))
    assert [tuple(out.shape) for out in found] == [(0, N, 64), *shapes]
    delayed = vllm.mhc_fused_post_pre_delayed_tilelang(*boundary_arguments(tensors))
    assert [tuple(out.shape) for out in delayed] == [(0, N, 64), *shapes, (0, N), (0, 64)]
    assert sglang.fused_hc_head(*head_arguments(tensors)).shape == (0, 64)


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (sglang.mhc_pre, {"n_splits": 16, "n_splits_pre": 1}),
        (vllm.mhc_pre_tilelang, {"n_splits": 16}),
    ],
    ids=["sglang", "vllm"],
)
def test_splits_change_nothing(run, options):
    arguments = pre_arguments(inputs(3, 64, "cpu"))
    for a, b in zip(run(*arguments), run(*arguments, **options), strict=True):
        assert torch.equal(a, b)


@EITHER_BOUNDARY
def test_gradients_are_the_ops_or_refused(boundary):
    tensors = inputs(3, 64, "cpu")
    tensors["fn"].requires_grad_()
    arguments = boundary_arguments(tensors)
    found = boundary(*arguments)
    names = ("norm_eps", "pre_eps", "sinkhorn_eps", "post_mult", "sinkhorn_repeat")
    expected = post_pre(*arguments[:7], **dict(zip(names, STEPS, strict=True)))
    grads = [
        torch.autograd.grad(outputs[i].float().square().sum(), tensors["fn"])[0]
        for outputs, i in ((found, 3), (expected, 1))
    ]
    assert torch.equal(*grads)
    with pytest.raises(UnsupportedError, match="layer_norm_weight must be None when a gradient"):
        boundary(*arguments, **options_of(tensors, True))
    with torch.inference_mode():
        assert not boundary(*arguments, **options_of(tensors, True))[3].requires_grad


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (sglang.mhc_pre, pre_arguments, "mhc_pre: norm_eps must be a number beside a norm_weight"),
        (
            sglang.mhc_fused_post_pre,
            boundary_arguments,
            "mhc_fused_post_pre: norm_eps must be a number beside a norm_weight; got None beside "
            r"\(64,\) bfloat16 on cpu",
        ),
    ],
    ids=["pre", "boundary"],
)
def test_norm_without_eps(run, arguments, message):
    tensors = inputs(3, 64, "cpu")
    with pytest.raises(ShapeError, match=message):
        run(*arguments(tensors), norm_weight=tensors["norm_weight"])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 62), r"must be \(3, 'K'\) with K a multiple of 4 to match residual"),
        (torch.zeros(2, 64), r"must be \(3, 'K'\) with K a multiple of 4 to match residual"),
        (torch.zeros(3, 128)[:, ::2], "must be contiguous"),
        ([1.0], "must be a torch.Tensor"),
    ],
    ids=["width", "tokens", "strided", "list"],
)
def test_another_input_that_does_not_fit(x, message):
    arguments = list(pre_arguments(inputs(3, 64, "cpu")))
    arguments[1] = torch.zeros(24, 64)
    with pytest.raises(ShapeError, match=f"mhc_pre_delayed_tilelang: x {message}"):
        vllm.mhc_pre_delayed_tilelang(*arguments, x=x)


def test_gradient_through_the_norm_of_another_input_is_refused():
    tensors = inputs(3, 64, "cpu")
    arguments = list(pre_arguments(tensors))
    arguments[1] = torch.zeros(24, 64).requires_grad_()
    with pytest.raises(UnsupportedError, match="mhc_pre_delayed_tilelang: layer_norm_weight must"):
        vllm.mhc_pre_delayed_tilelang(*arguments, x=tensors["x"], **options_of(tensors, True))


def test_capture_aux_that_is_no_flag():
    arguments = boundary_arguments(inputs(3, 64, "cpu"))
    with pytest.raises(ShapeError, match="capture_aux must be True or False; got"):
        vllm.mhc_fused_post_pre_delayed_tilelang(*arguments, capture_aux=1)


@EITHER_PRE
@EITHER_BOUNDARY
def test_compiled_in_one_graph(pre, boundary):
    tensors = inputs(3, 64, "cpu")

    def run(of_pre, of_boundary, norm):
        options = {"norm_weight": norm, "norm_eps": 0.25}
        return *pre(*of_pre, **options), *boundary(*of_boundary, **options)

    given = pre_arguments(tensors), boundary_arguments(tensors), tensors["norm_weight"]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(*given), run(*given), strict=True):
            assert torch.equal(a, b)
