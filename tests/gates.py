"""What holds of every op that makes gates of mixes, on a GPU."""

from typing import Any
from unittest import mock

import torch

import oracle
import replaying
from cases import DELAYED_PRE, FUSED_PRE, Case, Op
from tile_mhc import selection

LEADS = ((), (1,), (3, 5), (1, 2, 3, 5))
SIZES = (0.0, 1e4, 1e35)


def check_repeatable(op: Op) -> None:
    oracle.check_repeatable(op, *op.inputs((20000,), 4, 64, "cuda"))


def check_isolation(op: Op) -> None:
    oracle.check_isolation(op, *op.inputs((130,), 8, 64, "cuda"), "mixes")


def check_lead(op: Op, lead: tuple[int, ...]) -> None:
    case = Case(0, 4, 64, "any leading dimensions")
    oracle.check(op, case, *op.inputs(lead, 4, 64, "cuda"))


def check_strided(op: Op) -> None:
    tensors, options = op.inputs((130,), 4, 64, "cuda")
    tensors["mixes"] = torch.randn(tensors["mixes"].shape[1], 260, device="cuda").mT[::2]
    tensors["bias"] = torch.randn(2 * tensors["bias"].numel(), device="cuda")[::2]
    tensors["scale"] = torch.randn(2 * tensors["scale"].numel(), device="cuda")[::2]
    oracle.check(op, Case(130, 4, 64, "any layout"), tensors, options)


def check_extreme(op: Op, size: float) -> None:
    """The sigmoid saturates; it does not overflow."""
    tensors, options = op.inputs((130,), 4, 64, "cuda")
    tensors["mixes"] = tensors["mixes"].sign() * size
    oracle.check(op, Case(130, 4, 64, "values of any size"), tensors, options)


def check_at_once(
    num_tokens: int, n: int, device: str, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """One kernel for all of a pre's gates gives the bits of the separate ops' kernels."""
    assert selection.has_gates_at_once(n, options.get("sinkhorn_repeat", 20), 1.0)
    for op in (FUSED_PRE, DELAYED_PRE):
        tensors, given = op.inputs((num_tokens,), n, 64, device)
        for name in ("scale", "bias"):
            tensors[name] = tensors[name].to(dtype)
        given |= options
        upstream = oracle.upstream_of(op, tensors, given)
        runs = []
        for at_once in (True, False):
            replaying.forget()
            with mock.patch.object(selection, "has_gates_at_once", return_value=at_once) as asked:
                runs.append(oracle.evaluate(op.run, tensors, given, upstream, op.outputs))
            assert asked.called
        oracle.check_same_bits(*runs, f"{op.name} of {num_tokens} tokens:")
