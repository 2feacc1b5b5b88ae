"""Is some shape far slower than the shapes next to it?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tile_mhc.bench.measuring import Result, Shape

FACTOR = 1.5
REACH = 2  # a neighbour has at most so many times the tokens, or the width
# Both sides of a tile's edge, a few odd counts, and widths of models.
TOKENS = (1, 2, 13, 16, 127, 128, 129, 4095, 4096, 4097)
HIDDEN = (1280, 2560, 4096, 5120, 6144, 7168)


@dataclass(frozen=True)
class Comparison:
    """`shape` takes `factor` times what `neighbour` would, both by their floors."""

    op: str
    shape: Shape
    neighbour: Shape
    factor: float

    def __str__(self) -> str:
        return f"{self.op} at {self.shape}: {self.factor:.2f} x {self.neighbour}"


def compare(results: Sequence[Result], empty_us: float) -> list[Comparison]:
    """Every timed op and shape beside the neighbour that it does worst against.

    Compared is the time by the floor plus `empty_us`, what a kernel takes that does nothing: the
    bare ratio to the floor halves in small shapes with every doubling of the tokens.
    """
    by_op: dict[str, dict[Shape, float]] = {}
    for result in results:
        if result.ours.us is not None:
            ratio = result.ours.us / (result.floor_us + empty_us)
            by_op.setdefault(result.op, {})[result.shape] = ratio
    compared = []
    for op, ratios in by_op.items():
        for shape, ratio in ratios.items():
            near = list(neighbours(shape, list(ratios)))
            if near:
                best = min(near, key=lambda other: ratios[other])
                compared.append(Comparison(op, shape, best, ratio / ratios[best]))
    return compared


def find_cliffs(compared: Sequence[Comparison]) -> list[Comparison]:
    """Those above FACTOR, the worst first."""
    return sorted(
        (cliff for cliff in compared if cliff.factor > FACTOR), key=lambda cliff: -cliff.factor
    )


def neighbours(shape: Shape, shapes: Sequence[Shape]) -> Iterator[Shape]:
    """The next shapes up and down in tokens, and in width, all else equal."""
    for axis in ("T", "H"):
        line = [other for other in shapes if _others(other, axis) == _others(shape, axis)]
        here = getattr(shape, axis)
        below = [other for other in line if here / REACH <= getattr(other, axis) < here]
        above = [other for other in line if here < getattr(other, axis) <= here * REACH]
        if below:
            yield max(below, key=lambda other: getattr(other, axis))
        if above:
            yield min(above, key=lambda other: getattr(other, axis))


def _others(shape: Shape, axis: str) -> tuple[int, ...]:
    return tuple(value for name, value in vars(shape).items() if name != axis)
