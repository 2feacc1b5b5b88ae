"""The recompute group that is open in this thread, for ops to tell it what they make.

An op tells it in the function that saves for its backward: what nothing is saved for needs no
replay, and all ways of an op into autograd pass there, the known calls of `_replay` too.

Compiled code tells it nothing, and must not look: torch 2.10 cannot guard on a group.
"""

import threading
from typing import Any


class _Active(threading.local):
    # A `tile_mhc.RecomputeGroup`, which imports the ops.
    group: Any = None


active = _Active()
