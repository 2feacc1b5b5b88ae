"""Whether CUDA that TileLang has written reads a value that has changed since.

TileLang 0.1.15 gives the operand of `T.reinterpret`, and of a cast of a vector, a variable, and an
operand of the same text in the same scope the same variable, though its registers may have been
written in between: findings/tilelang-stale-reinterpret.sh. Such a kernel is wrong without a word.
"""

import re

from tile_mhc.jit import CompileError

_NAME = re.compile(r"[A-Za-z_]\w*")
# What it calls such variables, and how it declares arrays in registers and in shared memory.
_VARIABLE = re.compile(r"[\w:]+ (v_\w*) = (.*);")
_ARRAY = re.compile(r"(?:[\w():]+ )*?[\w:]+ (\w+)\[[^\]]*\];|void\* (\w+) = .*")
_ASSIGNMENT = re.compile(r"(.*?[^=!<>+\-*/|&^]) = .*;")


def check_source(source: str) -> None:
    """Raise jit.CompileError if CUDA computes something else than its kernel says."""
    line = stale_value(source)
    if line is not None:
        raise CompileError(
            f"TileLang's CUDA must read values as they are; got a changed one: {line}"
        )


def stale_value(source: str) -> str | None:
    """The first line that reads one, or None."""
    lines = [line.strip() for line in source.split("\n")]
    declared = filter(None, map(_ARRAY.fullmatch, lines))
    arrays = {array[1] or array[2] for array in declared}
    reads: dict[str, set[str]] = {}
    changed: set[str] = set()
    for line in lines:
        names = _NAME.findall(line)
        if variable := _VARIABLE.fullmatch(line):
            changed.discard(variable[1])
            reads[variable[1]] = arrays.intersection(_NAME.findall(variable[2]))
        if not changed.isdisjoint(names):
            return line
        if not variable:
            written = _written(line, arrays)
            changed |= {name for name, of in reads.items() if not of.isdisjoint(written)}
    return None


def _written(line: str, arrays: set[str]) -> set[str]:
    """The array that a line assigns to; those that a call is given may be written, too."""
    if assignment := _ASSIGNMENT.fullmatch(line):
        target = filter(arrays.__contains__, _NAME.findall(assignment[1]))
        return set(next(([name] for name in target), []))
    return arrays.intersection(_NAME.findall(line)) if line.endswith(");") else set()
