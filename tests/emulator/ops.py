"""The public ops on CPU tensors, run by the kernels: what a user of a GPU calls, on the emulator.

The operators' own CUDA implementations stand in for their CPU ones; checks, fakes and autograd stay
as they are. So is the architecture that kernels are compiled, and launches sized, for.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import replaying
from emulator import launch
from tile_mhc import config, jit, selection
from tile_mhc.kernels._arch import ARCHITECTURES, DEFAULT

# The H200's: splits and slices, and so the last bits, depend on it.
NUM_SMS = replaying.NUM_SMS


def operators() -> list[str]:
    """The names of all operators of tile_mhc."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("tile_mhc::") for n in names if n.startswith("tile_mhc::"))


@contextlib.contextmanager
def emulated(seed: int = 0, num_sms: int = NUM_SMS, arch: str = DEFAULT) -> Iterator[None]:
    """Within: every op on CPU tensors runs its TileLang kernels in the emulator.

    Few `num_sms` make long loops of the splits and slices: more of them in one CTA.
    """
    with (
        replaying.launchers_on_cpu(*operators(), around=_tensors_known),
        mock.patch.object(jit, "kernel", functools.partial(launch.kernel, arch=arch)),
        mock.patch.object(config, "get_num_sms", return_value=num_sms),
        replaying.on_architecture(ARCHITECTURES[arch]),
        mock.patch.object(selection, "has_clusters_of", return_value=True),
        launch.settings(seed=seed),
    ):
        yield


def _tensors_known(args: Sequence[Any]) -> AbstractContextManager[None]:
    """Kernels may reach all tensors of the op by their addresses."""
    known = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
    return launch.settings(known=[t for t in known if isinstance(t, Tensor)])
