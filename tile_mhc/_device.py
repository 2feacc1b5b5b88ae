"""What kernels a CUDA device has, by its architecture, which is asked once a device."""

import functools
import warnings

import torch

from tile_mhc import config
from tile_mhc.errors import UnsupportedError
from tile_mhc.kernels._arch import ARCHITECTURES, DEFAULT, Architecture

_warned: set[str] = set()


def arch_of(device: int) -> str:
    """The architecture TileLang resolves for a device: "a" (all features) from Hopper on."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def limits_of(device: int) -> Architecture | None:
    """The row of a device in the table; None where there are no kernels for it."""
    return ARCHITECTURES.get(arch_of(device))


def limits() -> Architecture:
    """The row of the current device; where it has none, no launch comes to be sized."""
    return limits_of(torch.cuda.current_device()) or ARCHITECTURES[DEFAULT]


def problem_of(device: int) -> str:
    """What a message says of a device without kernels."""
    name = torch.cuda.get_device_name(device)
    return f"the GPU must be one of {', '.join(ARCHITECTURES)}; got {name}, {arch_of(device)}"


def refer(op: str, device: int) -> None:
    """Say, once, that the reference answers where there are no kernels, or raise: see `config`."""
    problem = problem_of(device)
    if config.get_require_kernels():
        raise UnsupportedError(f"{op}: {problem}")
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(
            f"tile_mhc: to have kernels {problem}. Ops are computed by the reference, in torch, "
            "which takes more time and memory; tile_mhc.config.set_require_kernels(True) makes "
            "this an error",
            RuntimeWarning,
            stacklevel=2,
        )
