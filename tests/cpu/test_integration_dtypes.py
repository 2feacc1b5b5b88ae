"""The dtypes of streams, layers and checkpoints under the patch of Hugging Face's DeepSeek-V4."""

import importlib.metadata

import pytest
import torch

from tile_mhc.integrations import transformers as integration

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
from tiny_deepseek import (
    ONE_STEP,
    cast_parameters,
    distance,
    make_connection,
    make_model,
    mix,
    one_step,
    step,
)

HOOKED = one_step(**{"hooks on a layer": 1})
RELEASE = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def test_float32_layer_output_widens_the_streams():
    streams = torch.randn(1, 7, 4, 64).bfloat16()
    layer_output = torch.randn(1, 7, 64)
    post_mix, comb_mix = torch.rand(1, 7, 4), torch.rand(1, 7, 4, 4)
    mixed = mix(layer_output, streams, post_mix, comb_mix)
    assert mixed.dtype == torch.float32
    expected = post_mix[..., None] * layer_output[..., None, :]
    expected = expected + torch.einsum("btij,btih->btjh", comb_mix, streams.float())
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize(
    ("own", "asked", "bound"),
    [
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.float32, torch.float16, 2e-3),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.bfloat16, torch.bfloat16, 3e-2),
    ],
)
def test_streams_dtype_reaches_the_operators_and_nothing_else(own, asked, bound):
    exact = make_model()
    model = cast_parameters(exact, own)
    ids = torch.randint(32, (2, 24))
    truth, _ = step(exact, ids)
    streams, inputs = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: streams.append(output.dtype))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0].dtype))
    model.model.norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0].dtype))
    with integration.patch(streams_dtype=asked):
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        report = integration.backend_report()
    assert report == HOOKED
    assert streams == [asked, own]  # the last one's go to the head, which returns what it is given
    assert inputs == [own] * 5
    assert output.logits.dtype == own
    assert 0 < distance(output.logits, truth) <= bound
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    with integration.patch():
        again, _ = step(model, ids)
        assert integration.backend_report() == HOOKED
    assert distance(again, truth) <= (1e-5 if own == torch.float32 else bound)


@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_streams_dtype_from_layer_to_layer(asked):
    """The same bits as where hooks keep the layers apart."""
    model = make_model().eval()
    ids = torch.randint(32, (2, 24))
    with torch.no_grad(), integration.patch(streams_dtype=asked):
        logits = model(ids, use_cache=False).logits
        assert integration.backend_report() == ONE_STEP
        model.model.layers[0].register_forward_hook(lambda *call: None)
        assert torch.equal(model(ids, use_cache=False).logits, logits)
    assert logits.dtype == torch.float32


def test_streams_dtype_under_autocast():
    model = make_model()
    ids = torch.randint(32, (2, 24))
    truth, _ = step(model, ids)
    streams = []
    model.model.layers[0].register_forward_hook(lambda *call: streams.append(call[-1].dtype))
    with integration.patch(streams_dtype=torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        logits, grads = step(model, ids)
    assert streams == [torch.bfloat16]
    assert distance(logits, truth) <= 3e-2
    assert all(grad.isfinite().all() for grad in grads.values())


def test_layer_that_may_be_the_last_returns_the_dtype_of_the_model():
    model = make_model()
    model.model.layers[0].layer_idx = 7  # as of a layer that was taken out of a deeper model
    streams = torch.randn(1, 6, 4, 64)
    arguments = {"position_ids": torch.arange(6)[None], "attention_mask": None}
    arguments["position_embeddings"] = {
        kind: model.model.rotary_emb(streams, arguments["position_ids"], layer_type=kind)
        for kind in ("main", "compress")
    }
    arguments["input_ids"] = torch.arange(6)[None]
    integration.patch(streams_dtype=torch.bfloat16)
    assert model.model.layers[0](streams, **arguments).dtype == torch.float32
    model.model.layers[0].layer_idx = 0
    assert model.model.layers[0](streams, **arguments).dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["bfloat16", torch.int8, torch.float64, torch.float8_e4m3fn])
def test_bad_streams_dtype(value):
    message = f"patch: streams_dtype must be one of .*float32, or None; got {value!r}$"
    with pytest.raises(ValueError, match=message):
        integration.patch(streams_dtype=value)
    assert not integration.is_patched()


def test_another_streams_dtype_than_that_of_the_patch_in_force():
    integration.patch()
    with pytest.raises(ValueError, match="streams_dtype must be None, as in the patch in force"):
        integration.patch(streams_dtype=torch.bfloat16)


@pytest.mark.parametrize("streams_dtype", [None, torch.bfloat16])
def test_bfloat16_checkpoint(tmp_path, streams_dtype):
    make_model().bfloat16().save_pretrained(tmp_path)
    model = type(make_model()).from_pretrained(tmp_path, dtype="auto").train()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    ids = torch.randint(32, (2, 24))
    if RELEASE < (5, 20):  # transformers' own fault, which the module's docstring tells of
        with pytest.raises(RuntimeError, match="the same dtype"):
            step(model, ids)
        integration.patch(streams_dtype=streams_dtype)
        with pytest.raises(RuntimeError, match="the same dtype"):
            step(model, ids)
        return
    logits, grads = step(model, ids)
    streams = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *call: streams.append(call[-1].dtype))
    integration.patch(streams_dtype=streams_dtype)
    ours, our_grads = step(model, ids)
    assert integration.backend_report() == HOOKED
    assert streams == [torch.bfloat16] * 2
    assert 0 < distance(ours, logits) <= 3e-2
    assert our_grads.keys() == grads.keys()


def test_autocast_does_not_touch_the_mixing():
    connection = make_connection()
    streams = torch.randn(2, 5, 4, 64)
    integration.patch()
    for dtype in (torch.bfloat16, torch.float32):
        exact = connection(streams.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = connection(streams.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(exact, ours, strict=True))
