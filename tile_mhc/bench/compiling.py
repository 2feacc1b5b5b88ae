"""Compile what a run needs before it, on many cores: one after another it would take minutes.

In processes, as tracing holds the interpreter: ours several per process; the peer's by running its
calls once, one process per stem. Both leave them in TileLang's cache. What fails here fails again
where it is measured.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from tile_mhc import jit, specs
from tile_mhc.bench.inputs import make_inputs
from tile_mhc.bench.measuring import Shape, describe
from tile_mhc.bench.ops import SINKHORN_STEPS, Op
from tile_mhc.bench.peer import NAME, STREAMS, Peer
from tile_mhc.kernels._arch import DEFAULT

PEER_SECONDS = 120
# The ops of `specs` behind a stem that is not one of them, and the peer's.
PARTS = {
    "sub_layer": ("fused_pre", "post"),
    "delayed_pre": ("fused_pre",),
    "partials_pre": ("tile_kernels",),
    "post_pre_delayed": ("post_pre",),
    **dict.fromkeys(("stack", "stack_delayed"), ("post_pre",)),
    **dict.fromkeys(("stack_separate", "stack_delayed_separate"), ("fused_pre", "post")),
    **dict.fromkeys(("post_pre_norm", "post_pre_norm_delayed"), ("post_pre",)),
    **dict.fromkeys(
        ("post_pre_norm_separate", "post_pre_norm_delayed_separate"), ("fused_pre", "post")
    ),
}
# Stems without gradients: of all kernels of their ops they launch one in ten.
SERVED = {stem for stem in PARTS if stem.startswith("post_pre_norm")}
PEER_PARTS = {"sub_layer": ("projection", "split_mixes", "sinkhorn", "aggregate", "post")}


def kernels(
    ops: Sequence[Op], shapes: Sequence[Shape], arch: str = DEFAULT
) -> list[tuple[str, specs.Arguments]]:
    """Our kernels behind `ops` on an architecture.

    All of them by the sizes, whatever the number of tokens; of what is served those that the calls
    ask for, where the current GPU is of that architecture.
    """
    wanted: list[tuple[str, specs.Arguments]] = []
    served = [op for op in ops if op.stem in SERVED]
    if served and _is_current(arch):
        wanted = [kernel for shape in shapes for kernel in _asked_for(served, shape)]
        ops = [op for op in ops if op not in served]
    for grads in ((), ("bfloat16",)):
        chosen = [op for op in ops if op.directed == bool(grads)]
        names = [name for op in chosen for name in PARTS.get(op.stem, (op.stem,))]
        sizes = {specs.Sizes(shape.n, shape.H, SINKHORN_STEPS, grads=grads) for shape in shapes}
        wanted += specs.select(sorted(sizes), names, arch) if names else []
    return list(dict.fromkeys(wanted))


def _is_current(arch: str) -> bool:
    return torch.cuda.is_available() and jit.device_arch(torch.cuda.current_device()) == arch


def _asked_for(ops: Sequence[Op], shape: Shape) -> list[tuple[str, specs.Arguments]]:
    x = make_inputs(shape.T, shape.H, shape.n, torch.device("meta"))
    with torch.no_grad(), jit.asking() as asked_for:
        for op in ops:
            op.ours(x)()
    return list(asked_for)


def peer_commands(ops: Sequence[Op], shapes: Sequence[Shape], peer: Peer) -> dict[str, list[str]]:
    """The commands that run the peer's side of `ops` once, by stem.

    Its kernels are for one hidden size and any number of tokens, so the fewest will do. A stem
    whose parts have commands of their own needs none.
    """
    fewest: dict[int, int] = {}
    for shape in shapes:
        if shape.n == STREAMS:
            fewest[shape.H] = min(shape.T, fewest.get(shape.H, shape.T))
    stems = dict.fromkeys(op.stem for op in ops if op.name in peer.calls)
    if not fewest:
        return {}
    start = [sys.executable, "-m", "tile_mhc.cli", "bench", "--vs", NAME, "--warm-peer"]
    small = ",".join(f"{tokens}x{hidden}" for hidden, tokens in fewest.items())
    return {
        stem: [*start, "--shapes", small, stem]
        for stem in stems
        if stem not in PEER_PARTS or not stems.keys() >= set(PEER_PARTS[stem])
    }


def compile_all(
    wanted: Sequence[tuple[str, specs.Arguments]], commands: dict[str, list[str]], jobs: int
) -> list[str]:
    """Compile `wanted` for this GPU and run `commands`, `jobs` at a time; what failed."""
    arch = jit.device_arch(torch.cuda.current_device())

    def theirs(stem: str) -> str | None:
        title, command = f"{NAME}, {stem}", commands[stem]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{title}: took more than {PEER_SECONDS} s"
        lines = done.stderr.strip().splitlines()
        return f"{title}: {lines[-1] if lines else ''}" if done.returncode else None

    with ThreadPoolExecutor(jobs) as pool:
        problems = [problem for problem in pool.map(theirs, commands) if problem]
    return problems + [text.partition("\n")[0] for text in jit.fill_cache(wanted, arch, jobs)]


def warm_peer(
    ops: Sequence[Op], shapes: Sequence[Shape], peer: Peer, device: torch.device
) -> Iterator[str]:
    """Run the peer's side of `ops` once, for what that leaves in the cache; what failed."""
    for shape in shapes:
        x = make_inputs(shape.T, shape.H, shape.n, device)
        for op in ops:
            if op.name not in peer.calls:
                continue
            try:
                peer.calls[op.name](x.with_layers() if op.layers else x)()
                torch.cuda.synchronize(device)
            except Exception as failure:
                yield f"{op.name}: {describe(failure)}"
