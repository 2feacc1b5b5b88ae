"""Lines that pytest prints at the end of a run, also of one in pytest-xdist's workers."""

import pytest

LINES = pytest.StashKey[list[str]]()
_KEY = "tile_mhc_summary"


def add(config: pytest.Config, text: str) -> None:
    """Print `text` at the end, once however many workers add it."""
    worker = getattr(config, "workeroutput", None)
    if worker is not None:
        worker.setdefault(_KEY, []).append(text)
    else:
        config.stash.setdefault(LINES, []).append(text)


def take_over(config: pytest.Config, output: dict[str, list[str]]) -> None:
    """What a worker's `add` left for the controller."""
    config.stash.setdefault(LINES, []).extend(output.get(_KEY, []))


def of(config: pytest.Config) -> list[str]:
    return list(dict.fromkeys(config.stash.get(LINES, [])))
