"""Files that are made once, whichever of several processes and threads asks first."""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("TILE_MHC_EMULATOR_CACHE") or ROOT / "build" / "emulator")


def digest_of(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, after `make` has written it where it was not there: whole or not at all, and once.

    Others that want it meanwhile wait. `make` is given another name to write to, in its folder.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
            make(temporary)
            os.replace(temporary, path)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock ends with the process that holds it, and its file stays: removal would be a race."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
