"""The serving stacks' functions by their kernels, and that a warm-up knows which those are."""

from unittest import mock

import pytest
import torch

import serving
from emulator import launch
from emulator.ops import NUM_SMS, emulated
from replaying import on_architecture
from tile_mhc import _warm_up, config, jit
from tile_mhc.compat import sglang, vllm
from tile_mhc.kernels._arch import HOPPER

STACKS = pytest.mark.parametrize(
    ("run", "options"),
    [(sglang.warm_up, {}), (vllm.warm_up, {}), (vllm.warm_up, {"delayed": True})],
    ids=["sglang", "vllm", "vllm delayed"],
)


def calls_of(run, hidden_size, options):
    """What a warm-up of the stack would run."""
    with mock.patch.object(_warm_up, "warm_up", lambda call, *_, **__: call):
        return run(hidden_size, [1], norm_dtype=torch.float32, **options)


@STACKS
@pytest.mark.parametrize("hidden_size", [pytest.param(64, marks=pytest.mark.scheduled), 192])
@pytest.mark.parametrize("num_tokens", [0, 13])
def test_a_warm_up_asks_for_what_is_launched(run, options, hidden_size, num_tokens):
    call = calls_of(run, hidden_size, options)
    with on_architecture(HOPPER), mock.patch.object(config, "_num_sms", NUM_SMS):
        asked_for = _warm_up._asked_for(call, num_tokens)
    launched = set()

    def kernel(name, *args):
        built = launch.kernel(name, *args)

        def launch_it(*given):
            launched.add((name, args))
            built(*given)

        return launch_it

    with emulated(), mock.patch.object(jit, "kernel", kernel), torch.no_grad():
        call(num_tokens, torch.device("cpu"))
    assert launched == set(asked_for)
    assert bool(launched) is bool(num_tokens)


def outputs(tensors):
    """Of every function, plain and normed."""
    found = []
    for norm in (None, tensors["norm_weight"].float()):
        options = {"norm_weight": norm, "norm_eps": 0.25}
        found += sglang.mhc_pre(*serving.pre_arguments(tensors), **options)
        found += sglang.mhc_fused_post_pre(*serving.boundary_arguments(tensors), **options)
        found += vllm.mhc_pre_delayed_tilelang(*serving.pre_arguments(tensors), **options)
        found += vllm.mhc_fused_post_pre_delayed_tilelang(
            *serving.boundary_arguments(tensors), **options, capture_aux=True
        )
    return [*found, sglang.fused_hc_head(*serving.head_arguments(tensors))]


def test_against_the_reference():
    tensors = serving.inputs(13, 192, "cpu")
    expected = outputs(tensors)
    with emulated():
        found = outputs(tensors)
    for a, b in zip(found, expected, strict=True):
        close = {"rtol": 2**-7, "atol": 2**-7} if a.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(a, b, **close or {"rtol": 1e-4, "atol": 1e-5})
