"""What `fused_pre`, `identity_pre` and `post_pre` return, by their flags, for a type checker and
for Python.

`scripts/check.sh types` checks this file, too: a wrong number of outputs is an error there, and an
`ignore` that ignores nothing is one as well.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import tile_mhc
from tile_mhc import functional
from tile_mhc.ops._options import IdentityPreOptions, PostPreOptions, PreOptions

N, H = 2, 64
FLAGS = {"pre_mix", "passes_residual"}
Gates = tuple[Tensor, Tensor, Tensor]
Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gates() -> Gates:
    mixes = N * (N + 2)
    return torch.randn(mixes, N * H), torch.randn(3), torch.randn(mixes)


def streams() -> Tensor:
    return torch.randn(3, N, H)


def pre_mix() -> Tensor:
    return torch.rand(3, N)


def test_fused_pre() -> None:
    weight, scale, bias = gates()
    inputs = (streams(), weight, scale, bias)
    three = tile_mhc.fused_pre(*inputs, norm_eps=1e-5, num_splits=1)
    assert_type(three, Three)
    passed = tile_mhc.fused_pre(*inputs, passes_residual=True)
    assert_type(passed, Four)
    delayed = functional.mhc_pre(*inputs, pre_mix=pre_mix(), passes_residual=False)
    assert_type(delayed, Four)
    both = tile_mhc.fused_pre(*inputs, pre_mix=pre_mix(), passes_residual=True, tf32=True)
    assert_type(both, Five)
    assert [len(outputs) for outputs in (three, passed, delayed, both)] == [3, 4, 4, 5]


def test_identity_pre() -> None:
    inputs = (streams(), torch.randn(2 * N, N * H), torch.randn(2), torch.randn(2 * N))
    two = tile_mhc.identity_pre(*inputs, post_eps=0.0)
    assert_type(two, Two)
    passed = tile_mhc.identity_pre(*inputs, passes_residual=True)
    assert_type(passed, Three)
    assert [len(outputs) for outputs in (two, passed)] == [2, 3]


@pytest.mark.parametrize("flag", [False, True])
def test_fused_pre_with_a_flag_that_is_known_only_then(flag: bool) -> None:
    weight, scale, bias = gates()
    outputs = tile_mhc.fused_pre(streams(), weight, scale, bias, passes_residual=flag)
    assert_type(outputs, tuple[Tensor, ...])
    assert len(outputs) == 3 + flag


@pytest.mark.parametrize("given", [None, pre_mix()], ids=["V4", "V4.1"])
def test_post_pre_with_a_pre_mix_that_may_be_none(given: Tensor | None) -> None:
    comb_mix = torch.rand(3, N, N)
    inputs = (torch.randn(3, H), streams(), pre_mix(), comb_mix, *gates())
    outputs = tile_mhc.post_pre(*inputs, pre_mix=given)
    assert_type(outputs, Four | Five)
    if given is None:
        assert_type(tile_mhc.post_pre(*inputs, layer_bias=torch.randn(H)), Four)
    else:
        assert_type(tile_mhc.post_pre(*inputs, pre_mix=given), Five)
    assert len(outputs) == 4 + (given is not None)


def test_too_few_names_are_an_error() -> None:
    weight, scale, bias = gates()
    with pytest.raises(ValueError, match="too many values"):
        _, _, _ = tile_mhc.fused_pre(  # type: ignore[misc]
            streams(), weight, scale, bias, passes_residual=True
        )


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (tile_mhc.fused_pre, PreOptions),
        (tile_mhc.identity_pre, IdentityPreOptions),
        (tile_mhc.post_pre, PostPreOptions),
    ],
    ids=["fused_pre", "identity_pre", "post_pre"],
)
def test_the_overloads_have_every_option(function: Callable[..., Any], options: type) -> None:
    parameters = inspect.signature(function).parameters.values()
    taken = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {k: v for k, v in taken.items() if k not in FLAGS} == get_type_hints(options)
