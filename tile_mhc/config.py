"""How launches are sized, for how many SMs and whether for the batch at hand; whether kernels may
be compiled; and what becomes of an op on a GPU that there are no kernels for."""

import functools
import os

import torch

from tile_mhc import errors

_num_sms = 0
_batch_invariant = False
_require_kernels = False
_jit: str | None = None
_JIT_MODES = ("allow", "warn", "forbid")
# What TILE_MHC_JIT may say instead; anything else allows.
_JIT_WORDS = {**dict.fromkeys(("0", "false", "off", "no", "forbid"), "forbid"), "warn": "warn"}
# What launches depend on, for who keeps them.
settings = (_num_sms, _batch_invariant)


@functools.cache
def _device_num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def get_num_sms() -> int:
    """The number of SMs that launches are sized for: `set_num_sms`, else all of the device's.

    Raises:
        RuntimeError: there is no CUDA device, and no number was set.
    """
    if _num_sms:
        return _num_sms
    try:
        device = torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(
            f"get_num_sms: a CUDA device must be there, or a number set; got none ({error})"
        ) from error
    return _device_num_sms(device)


def set_num_sms(num_sms: int) -> None:
    """Size launches for fewer SMs (0: for all), to leave room for communication kernels.

    It decides how sums are split, so it decides their last bits too.

    Args:
        num_sms: at most what the current device has; without a device, only 0.

    Raises:
        ValueError: it is anything else.
    """
    cuda = torch.cuda.is_available()
    limit = _device_num_sms(torch.cuda.current_device()) if cuda else 0
    if isinstance(num_sms, bool) or not isinstance(num_sms, int) or not 0 <= num_sms <= limit:
        expected = f"from 0 to {limit}" if cuda else "0 where there is no CUDA device"
        raise ValueError(f"set_num_sms: num_sms must be {expected}; got {errors.shown(num_sms)}")
    global _num_sms, settings
    _num_sms = num_sms
    settings = (_num_sms, _batch_invariant)


def _leaves_sms() -> bool:
    """Whether `set_num_sms` keeps launches from some of the current device's SMs."""
    return 0 < _num_sms < _device_num_sms(torch.cuda.current_device())


def get_batch_invariant() -> bool:
    """Whether a token's results are the same bits in every batch and on every GPU."""
    return _batch_invariant


def set_batch_invariant(enabled: bool) -> None:
    """Make what the ops compute of a token independent of the tokens beside it.

    What depends on them is how the projection splits its sum over K, so that few tokens still fill
    the GPU, and which kernels take few tokens or many: in prefill, decode and training the last
    bits of a token differ. With this both are fixed, for any number of tokens and SMs. What it
    costs is in docs/log.md. It holds for forward results, and for gradients by token; those of
    parameters are sums over the batch.
    """
    if not isinstance(enabled, bool):
        raise ValueError(
            f"set_batch_invariant: enabled must be True or False; got {errors.shown(enabled)}"
        )
    global _batch_invariant, settings
    _batch_invariant = enabled
    settings = (_num_sms, _batch_invariant)


def get_require_kernels() -> bool:
    """Whether an op raises on a GPU that there are no kernels for."""
    return _require_kernels


def set_require_kernels(enabled: bool) -> None:
    """Have ops raise UnsupportedError on a GPU that there are no kernels for.

    Otherwise the reference answers there, in torch, as it does on a CPU, and the first op says so
    in a RuntimeWarning. The README says which GPUs have kernels.
    """
    if not isinstance(enabled, bool):
        raise ValueError(
            f"set_require_kernels: enabled must be True or False; got {errors.shown(enabled)}"
        )
    global _require_kernels
    _require_kernels = enabled


def get_jit() -> str:
    """What happens when a kernel is neither in memory nor in the disk cache: as `set_jit` says, or
    else the environment's TILE_MHC_JIT."""
    if _jit is not None:
        return _jit
    return _JIT_WORDS.get(os.environ.get("TILE_MHC_JIT", "1").strip().lower(), "allow")


def set_jit(mode: str | None) -> None:
    """Choose what happens when an op needs a kernel that this process does not have yet.

    For servers, once `tile_mhc.warm_up` is done: a compilation takes seconds.

    Args:
        mode: "allow" compiles it. "warn" does, too, and says so to the logger "tile_mhc", with the
            time that it took; also where the kernel came from the disk cache. "forbid" raises
            `tile_mhc.jit.NotCompiledError` where it would have to be compiled. None: as the
            environment's TILE_MHC_JIT says, which is 1, warn or 0.

    Raises:
        ValueError: it is anything else.
    """
    if mode is not None and mode not in _JIT_MODES:
        raise ValueError(
            f"set_jit: mode must be one of {', '.join(_JIT_MODES)}, or None; "
            f"got {errors.shown(mode)}"
        )
    global _jit
    _jit = mode
