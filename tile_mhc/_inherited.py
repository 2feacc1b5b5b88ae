"""A value of a thread that autograd's own threads take over, for a backward, from who called it.

torch has this for its own use, as `_C._stash_obj_in_tls`; Python's contextvars do not go along.
torch 2.10 takes the reference that it is given without adding one of its own, and drops it in the
end.
"""

import ctypes
import sys

import torch

_PROBE = "tile_mhc_probe"


def _takes_references() -> bool:
    value = object()
    before = sys.getrefcount(value)
    torch._C._stash_obj_in_tls(_PROBE, value)
    taken = sys.getrefcount(value) == before
    if taken:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    return taken


_takes: bool | None = None


def keep(name: str, value: object) -> None:
    """Set the value of this thread, in place of the one before."""
    global _takes
    if _takes is None:
        _takes = _takes_references()
    if _takes:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(name, value)


def get(name: str) -> object:
    """The value of this thread, or of the one whose backward it runs; None without one."""
    return torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else None
