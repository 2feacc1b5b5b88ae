"""What `patch()` has put in force, in every thread, and what was counted since."""

import threading
from collections import Counter

import torch

lock = threading.RLock()
held = 0  # calls of patch() that have not been undone
period = 0  # how often the patch has been undone as a whole
streams_dtype: torch.dtype | None = None
recompute_layers: int | None = None

_calls_lock = threading.Lock()  # another: a thread that compiles counts while patch() waits for it
_calls: Counter[tuple[str, str, str]] = Counter()


# Traced once: a counter that changes from call to call would make torch.compile start over.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def count(model_type: str, call: str, backend: str) -> None:
    with _calls_lock:
        _calls[model_type, call, backend] += 1


def forget_calls() -> None:
    with _calls_lock:
        _calls.clear()


def calls(model_type: str | None = None) -> dict[str, dict[str, int]]:
    """The counts by call and backend, of one model or of all."""
    report: dict[str, dict[str, int]] = {}
    with _calls_lock:
        for (model, call, backend), times in sorted(_calls.items()):
            if model_type in (None, model):
                backends = report.setdefault(call, {})
                backends[backend] = backends.get(backend, 0) + times
    return {call: dict(sorted(backends.items())) for call, backends in sorted(report.items())}
