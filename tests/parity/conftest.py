"""The table of the parity tests: printed at the end, and kept in TILE_MHC_PARITY_REPORT's file."""

import json
import os
from pathlib import Path

import pytest

ROWS = pytest.StashKey[list[dict[str, object]]]()
COLUMNS = (
    "call",
    "shape",
    "tensor",
    "elements",
    "same bits",
    "difference",
    "our error",
    "native error",
    "their error",
    "our error beside TF32",
    "their error beside TF32",
)


@pytest.fixture
def report(request):
    """A list; what a test appends to it is a row of the table, a dict with the keys of COLUMNS."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section(
        "beside TileKernels: ||out - fp64|| / ||fp64||, exact and with TF32 products"
    )
    for line in markdown(rows):
        terminalreporter.write_line(line)
    path = os.environ.get("TILE_MHC_PARITY_REPORT")
    if path:
        text = json.dumps(rows, indent=1) if path.endswith(".json") else "\n".join(markdown(rows))
        Path(path).write_text(text + "\n")


def markdown(rows):
    """The rows as an aligned Markdown table."""
    cells = [COLUMNS, *([cell(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def cell(value):
    return f"{value:.3e}" if isinstance(value, float) else str(value)
