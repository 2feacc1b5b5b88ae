"""Break a kernel's generated source in one place at a time, as a bug in a kernel would."""

import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from emulator.lowering import Lowered

KINDS = ("wait", "parity", "arrival", "barrier", "mask", "index", "factor")
_WAIT = re.compile(r"(?:tl::cp_async_wait<\d+>|cudaGridDependencySynchronize)\(\);")
# Of mbarriers.
_WAITS_FOR = re.compile(r"(?<=\])\.wait\((.*)\);$")
_ARRIVES = re.compile(r"\S+\]\.arrive\(\);$")
_BARRIER = re.compile(r"__sync(?:threads|warp)\(\);|tl::__sync_thread_partial\([^;]*\);")
# A factor that is a float of an array, before or behind the other one.
_FACTOR = re.compile(r"(?<=\() *\w+\[[^\[\]]*\] \* | \* \w+\[[^\[\]]*\](?=\))")
# The condition of a copy that fills with zeros comes last.
_CONDITIONAL = "tl::cp_async_gs_conditional<"


@dataclass(frozen=True)
class Mutant:
    kind: str
    line: int
    before: str
    after: str

    @property
    def removed(self) -> str:
        return _difference(self.before, self.after)[0]

    def __str__(self) -> str:
        put = _difference(self.before, self.after)[1]
        return f"{self.kind} at line {self.line}: {self.removed[:160]!r} became {put!r}"

    def of(self, lowered: Lowered) -> Lowered:
        lines = lowered.source.split("\n")
        lines[self.line - 1] = self.after
        return dataclasses.replace(lowered, source="\n".join(lines))


def mutants(lowered: Lowered, per_kind: int, seed: int = 0) -> list[Mutant]:
    """Up to `per_kind` mutants of each kind, drawn from all there are."""
    found = {kind: [m for m in _all(lowered.source) if m.kind == kind] for kind in KINDS}
    draw = random.Random(f"{lowered.title} {seed}")
    chosen = []
    for of_kind in found.values():
        chosen += draw.sample(of_kind, min(per_kind, len(of_kind)))
    return chosen


def _all(source: str) -> Iterator[Mutant]:
    lines = source.split("\n")
    start = next(i for i, line in enumerate(lines) if line.endswith(") {") and "__global__" in line)
    for number, line in enumerate(lines[start + 1 :], start + 2):
        for kind, after in _changes(line):
            if after != line:
                yield Mutant(kind, number, line, after)


def _changes(line: str) -> Iterator[tuple[str, str]]:
    if _WAIT.search(line):
        yield "wait", _WAIT.sub(r"/* \g<0> */", line)
    if _WAITS_FOR.search(line):
        yield "wait", f"{line[: len(line) - len(line.lstrip())]};"
        yield "parity", _WAITS_FOR.sub(r".wait((\1) ^ 1);", line)
    if _ARRIVES.search(line):
        yield "arrival", _ARRIVES.sub(";", line)
    if _BARRIER.search(line):
        yield "barrier", _BARRIER.sub("", line)
    condition = re.match(r"\s*if \((.*)\) \{$", line)
    if condition and "<" in condition[1]:
        yield "mask", line.replace(f"({condition[1]}) {{", "(true) {")
    if _CONDITIONAL in line:
        at = _last_comma(line)
        yield "mask", f"{line[:at]}, true);"
    # Terms of an address: ` + ...` up to the bracket that closes around it.
    if any(mark in line for mark in ("threadIdx", "blockIdx", "int64_t")) and "[" in line + "*(":
        for at in (m.start() for m in re.finditer(r" \+ ", line)):
            end = _end_of_term(line, at + 3)
            if _in_address(line, at):
                yield "index", line[:at] + line[end:]
    for found in _FACTOR.finditer(line):
        if not _in_address(line, found.start()):
            yield "factor", line[: found.start()] + line[found.end() :]


def _end_of_term(line: str, at: int) -> int:
    depth = 0
    for i in range(at, len(line)):
        depth += (line[i] in "([") - (line[i] in ")]")
        if depth < 0 or (depth == 0 and line[i : i + 3] in (" + ", " - ", " < ")):
            return i
    return len(line)


def _in_address(line: str, at: int) -> bool:
    """Whether position `at` is inside an index, or inside the pointer of `*(float4*)(p + i)`."""
    depth = 0
    for i in range(at, -1, -1):
        depth += (line[i] in ")]") - (line[i] in "([")
        if depth < 0:
            if line[i] == "[":
                return True
            if line[:i].endswith("*)") and line[i] == "(":
                return True
            depth = 0
    return False


def _last_comma(line: str) -> int:
    depth = 0
    for i in range(line.rindex(")") - 1, -1, -1):
        depth += (line[i] in ")]") - (line[i] in "([")
        if line[i] == "," and depth == 0:
            return i
    raise ValueError(line)


def _difference(before: str, after: str) -> tuple[str, str]:
    pairs = zip(before, after, strict=False)
    head = next((i for i, (a, b) in enumerate(pairs) if a != b), len(after))
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    return before[head : len(before) - tail], after[head : len(after) - tail]
