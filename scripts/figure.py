"""Draw time against tokens from the records: the floor, ours, and TileKernels in its place.

    python scripts/figure.py [--hidden 7168] [--commit ID] [OPS]...

Of one run: the file's last, or the last of --commit. Needs matplotlib (`pip install '.[figure]'`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tile_mhc.bench import records
from tile_mhc.bench.records import Record

SCRIPTS = Path(__file__).resolve().parent
RECORDS = SCRIPTS / "records" / "bench.jsonl"
FIGURE = SCRIPTS.parent / "docs" / "bench.svg"
OPS = (
    "projection.fwd",
    "sinkhorn.fwd",
    "post.fwd",
    "fused_pre.fwd",
    "fused_pre.bwd",
    "sub_layer.fwd+bwd",
)
COLUMNS = 3
INK, MUTED, OURS, PEER = "#222222", "#8a8a8a", "#0b6bcb", "#d9730d"


@dataclass(frozen=True)
class Series:
    """Points of one op, by rising tokens; the peer's are None where it has no figure."""

    tokens: list[int]
    floor: list[float]
    ours: list[float]
    peer: list[float | None]


def select(
    lines: Sequence[Record], ops: Sequence[str], hidden: int, streams: int, commit: str | None
) -> tuple[Record, dict[str, Series]]:
    """A line of the run that is drawn, and the points of each op.

    Raises:
        ClickException: the run has fewer than two token counts of an op.
    """
    run = [line for line in lines if commit in (None, line.commit)]
    if not run:
        raise click.ClickException(f"no record of commit {commit}")
    last = run[-1]
    series = {}
    for op in ops:
        # Of what was measured twice the later line counts.
        points = {
            line.T: line
            for line in run
            if (line.gpu, line.commit, line.flush) == (last.gpu, last.commit, last.flush)
            and line.op == op
            and (line.H, line.n) == (hidden, streams)
        }
        if len(points) < 2:
            raise click.ClickException(
                f"{op} needs two token counts at H = {hidden}, n = {streams} in the run of commit "
                f"{last.commit} on {last.gpu}; it has {sorted(points)}"
            )
        line = [points[tokens] for tokens in sorted(points)]
        series[op] = Series(
            [point.T for point in line],
            [point.floor_us for point in line],
            [point.us for point in line],
            [point.peer_us for point in line],
        )
    return last, series


def draw(run: Record, series: dict[str, Series], hidden: int, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    # The same records give the same file; text stays text.
    matplotlib.rcParams |= {"svg.hashsalt": "tile_mhc", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    rows = -(-len(series) // COLUMNS)
    figure, axes = pyplot.subplots(
        rows, COLUMNS, figsize=(3.1 * COLUMNS, 2.5 * rows), sharex=True, squeeze=False
    )
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    for axis, (op, points) in zip(axes.flat, series.items(), strict=False):
        gaps = [float("nan") if value is None else value for value in points.peer]
        axis.plot(points.tokens, gaps, "s-", color=PEER, markersize=3.5, label="TileKernels")
        axis.plot(points.tokens, points.ours, "o-", color=OURS, markersize=3.5, label="tile_mhc")
        axis.plot(points.tokens, points.floor, "--", color=INK, linewidth=1, label="byte floor")
        if run.empty_us is not None:
            axis.axhline(run.empty_us, color=MUTED, linestyle=":", label="empty kernel")
        axis.set(xscale="log", yscale="log")
        axis.set_title(op, fontsize=9, loc="left")
        axis.set_xticks(points.tokens, [str(count) for count in points.tokens])
        axis.minorticks_off()
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("microseconds")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"{run.gpu}, H = {hidden}, n = {run.n}; commit {run.commit[:7]}, {run.date}",
        x=0.01,
        ha="left",
        fontsize=9,
        color=INK,
    )
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


@click.command()
@click.argument("ops", nargs=-1)
@click.option("--hidden", type=click.IntRange(min=1), default=7168, show_default=True)
@click.option("--streams", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--commit", help="Draw this commit's run.  [default: the last run]")
@click.option(
    "--records",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=RECORDS,
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=FIGURE)
def main(
    ops: tuple[str, ...], hidden: int, streams: int, commit: str | None, source: Path, out: Path
) -> None:
    """Draw OPS, by default those of the README, from the records of `tile-mhc bench`."""
    run, series = select(list(records.read(source)), ops or OPS, hidden, streams, commit)
    draw(run, series, hidden, out)


if __name__ == "__main__":
    main()
