"""The record of runs: JSON lines, one per op and shape, appended and never rewritten.

Lines of scripts/bench.py, before this module, have no quartiles, no host times and no word on the
method; they were taken with L2 overwritten, between events around the replay.
"""

import datetime
import importlib.metadata
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tile_mhc.bench.measuring import Result, Side
from tile_mhc.bench.timing import Clock, Times

Quartiles = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all lines of a run share."""

    date: str
    gpu: str
    driver: str
    torch: str
    tilelang: str
    commit: str
    copy_gbs: float | None = None
    empty_us: float | None = None  # an empty kernel by the same clock
    flush: str = "overwrite"
    events: str = "around"
    # What ours is beside; lines before this field have TileKernels 1.0.0's times.
    peer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record(Setting):
    """One line. Times are in microseconds, medians."""

    op: str
    T: int
    H: int
    n: int
    us: float
    floor_us: float
    quartiles: Quartiles | None = None
    peer_us: float | None = None
    peer_quartiles: Quartiles | None = None
    host_us: float | None = None
    peer_host_us: float | None = None


def read(path: Path) -> Iterator[Record]:
    """The lines of a file, in their order: the newest last.

    Raises:
        ValueError: a line is no record; the message has its number.
    """
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            for name in ("quartiles", "peer_quartiles"):
                values[name] = values.get(name) and tuple(values[name])
            record = Record(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: no record of a benchmark: {error}") from error
        yield record


def append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def make_record(setting: Setting, result: Result) -> Record | None:
    """The line of a result; None where ours was not timed."""
    if result.ours.us is None:
        return None

    def microseconds(times: Times | None) -> float | None:
        return round(times.median, 2) if times else None

    def quartiles(times: Times | None) -> Quartiles | None:
        return (round(times.lower, 2), round(times.upper, 2)) if times else None

    ours, peer, shape = result.ours, result.peer or Side(), result.shape
    return Record(
        **asdict(setting),
        op=result.op,
        T=shape.T,
        H=shape.H,
        n=shape.n,
        us=round(result.ours.us, 2),
        quartiles=quartiles(ours.device),
        floor_us=round(result.floor_us, 4),
        peer_us=microseconds(peer.device),
        peer_quartiles=quartiles(peer.device),
        host_us=microseconds(ours.host),
        peer_host_us=microseconds(peer.host),
    )


def make_setting(
    clock: Clock, bandwidth: float, empty: Times, commit: str | None, peer: str | None = None
) -> Setting:
    """Of this machine, now; `commit` where the checkout does not know, or is none."""
    return Setting(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        gpu=torch.cuda.get_device_name(clock.device),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        torch=torch.__version__,
        tilelang=importlib.metadata.version("tilelang"),
        commit=commit or find_commit(),
        copy_gbs=round(bandwidth * 1e-3, 1),
        empty_us=round(empty.median, 2),
        flush=clock.flush_by,
        events=clock.events,
        peer=peer,
    )


def find_commit() -> str:
    """That of the checkout this file is tracked in: a wheel may lie in somebody else's."""
    if _output("git", "ls-files", "--error-unmatch", Path(__file__).name) == "unknown":
        return "unknown"
    return _output("git", "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    """The first line of what a command prints."""
    folder = Path(__file__).resolve().parent
    run: Any
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return str(run.stdout).strip().partition("\n")[0] or "unknown"
