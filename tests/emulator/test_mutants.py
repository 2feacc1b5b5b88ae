"""The emulator finds faults: kernels broken in one place each, and the share that it catches.

A mutant is caught when it is reported as a fault, or when a result is off by more than any
tolerance of the suite, in one of the thread orders. One that gives the same bits in every order,
with no fault, may be no bug at all: a mask that these sizes never need, an index term that is zero.
"""

import dataclasses
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch import Tensor

import oracle
import summary
from cases import OPS, Case
from emulator import launch
from emulator.launch import FaultError, Kernel
from emulator.mutate import Mutant, mutants
from emulator.ops import emulated
from tile_mhc import selection

pytestmark = pytest.mark.scheduled

# Ragged for every block, and so few SMs that one CTA has several tiles: pipelines run full.
CASE = Case(301, 4, 192, "three tiles, the last ragged")
NUM_SMS = 6
FEW = Case(13, 4, 192, "less than a tile")
KERNELS = (
    "expand_bwd", "projection_fwd", "projection_norm", "projection_norm_bwd", "projection_bwd",
    "split_mixes_fwd", "split_mixes_bwd", "column_sums", "sinkhorn_bwd", "gates_bwd",
    "aggregate_bwd", "post_bwd", "contract_cluster_fwd", "contract_cluster_bwd", "fused_pre",
    "post_pre_fwd", "post_pre_bwd", "delayed_mixes", "delayed_sums", "identity_cluster_fwd",
    "identity_cluster_bwd", "identity_post_fwd", "identity_post_bwd", "stream_mean_fwd",
    "stream_mean_bwd",
)  # fmt: skip
PER_KIND = 3
# Of the largest sources, which take g++ longest.
FEWER = {"post_pre_fwd": 2, "post_pre_bwd": 2, "identity_cluster_bwd": 2}
SEEDS = (0, 1)
# Above the tolerances of the suite, by dtype.
OFF = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-10}
WANTED = 0.9


# Survivors that are no bugs: kind, what the removed text holds, and why it changes nothing.
HARMLESS = (
    ("mask", r"(1 <=|0 <) (blocks|slice_tokens)", "the ops launch no empty slice"),
    ("mask", r"^\(1 <= num_tokens\)$", "nor anything for no token"),
    ("mask", r"-\d+ <= ", "what is compared cannot be negative"),
    ("mask", r"^0 <= ((own|t)\[0\]$|\(\(\(step \* )", "nor can a split's or a token's index"),
    ("mask", r"^\(bool\)1$", "it is true as it is"),
    ("mask", r"blockIdx\.x\) - num_tokens\) < num_tokens", "the grid ends there"),
    ("mask", r"^step_\d+ < steps\[0\]$", "nobody reads what is pushed past the last group"),
    ("mask", r"^\(1 <= step_\d+\) && \(step_\d+ <= steps\[0\]\)$", "nor gates of none"),
    ("mask", r"^\(0 < large\[", "the statements beside it have it, too"),
    ("index", r"^ \+ 0$", "nothing is added"),
    (
        "wait",
        "",
        "an earlier wait covers the same copies: the emulator runs the copies of each wait",
    ),
    (
        "barrier",
        "",
        "other barriers part all accesses that it parts: the emulator saw each of them",
    ),
)


@dataclasses.dataclass
class Launch:
    """The arguments of a kernel before, and after."""

    before: list
    after: list


@pytest.fixture(scope="module")
def recorded(built_kernels):
    """For each kernel the launches that its mutants are tried on."""
    kernels: dict[str, Kernel] = {}
    launches: dict[str, list[Launch]] = defaultdict(list)
    seen = set()

    def copies(given):
        return [g.clone() if isinstance(g, Tensor) else g for g in given]

    def watch(kernel, given):
        name = kernel.key[0]
        if name not in KERNELS or name in seen or kernels.setdefault(name, kernel) is not kernel:
            return None
        seen.add(name)
        before = copies(given)
        return lambda: launches[name].append(Launch(before, copies(given)))

    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    every = mock.patch.object(selection, "FEW_TOKENS", 0)  # also of few tokens
    with emulated(num_sms=NUM_SMS), launch.settings(watch=watch), every:
        for vary in (plain, few, huge_token, tf32, two_steps):
            seen.clear()
            for op in OPS:
                vary(op)
    return {name: (kernels[name], launches[name]) for name in kernels}


def run(op, case, tensors, options):
    upstream = oracle.upstream_of(op, tensors, options)
    # Gradients so small that the projection's backward lifts them: a warp's, and whole tiles'.
    t = torch.arange(case.num_tokens)
    tiny = ((t >= 64) & (t < 96)) | (t >= 192)
    upstream = [
        torch.where(tiny.view(-1, *[1] * (g.ndim - 1)), g.float() * 2.0**-80, g).to(g.dtype)
        for g in upstream
    ]
    oracle.evaluate(op.run, tensors, options, upstream, op.outputs)


def plain(op):
    run(op, CASE, *op.inputs(*CASE.shape, "cpu"))


def few(op):
    run(op, FEW, *op.inputs(*FEW.shape, "cpu"))


def huge_token(op):
    """The sum of squares overflows, so the projection is done again on scaled streams."""
    tensors, options = op.inputs(*FEW.shape, "cpu")
    if "weight" in tensors:
        tensors["residual"][3] *= 1e18
        run(op, FEW, tensors, options)


def tf32(op):
    """Rounded weights, also on the way of the overflowed sum."""
    tensors, options = op.inputs(*FEW.shape, "cpu")
    if "weight" in tensors:
        tensors["residual"][3] *= 1e18
        run(op, FEW, tensors, options | {"tf32": True})


def two_steps(op):
    """Where Sinkhorn is far from its limit, one step more or less shows."""
    tensors, options = op.inputs(*FEW.shape, "cpu")
    steps = [name for name in ("repeat", "sinkhorn_repeat") if name in options]
    if steps:
        run(op, FEW, tensors, options | {steps[0]: 2})


def outcome(kernel: Kernel, launches: list[Launch]) -> str:
    """`fault`, `wrong`, `close` (other bits, all within tolerances) or `same`."""
    worst = "same"
    for one in launches:
        for seed in SEEDS:
            given = [g.clone() if isinstance(g, Tensor) else g for g in one.before]
            try:
                with launch.settings(seed=seed, time_limit=10):
                    kernel(*given)
            except FaultError:
                return "fault"
            for old, new in zip(one.after, given, strict=True):
                if not isinstance(old, Tensor) or torch.equal(bits(old), bits(new)):
                    continue
                if far_off(old.double(), new.double(), OFF.get(old.dtype, 0)):
                    return "wrong"
                worst = "close"
    return worst


def far_off(old: Tensor, new: Tensor, limit: float) -> bool:
    """Beside the larger of the element and its row's rms: rows differ much in size."""
    rms = old.nan_to_num(0).square().mean(-1, keepdim=True).sqrt()
    error = (old - new).abs().nan_to_num(torch.inf)
    error[old.isnan() & new.isnan()] = 0
    return bool((error > limit * torch.maximum(rms, old.abs().nan_to_num(0))).any())


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def try_mutants(kernel: Kernel, launches: list[Launch]) -> dict[Mutant, str]:
    chosen = mutants(kernel.lowered, FEWER.get(kernel.key[0], PER_KIND))

    def build(mutant):
        try:
            return Kernel(mutant.of(kernel.lowered))
        except RuntimeError:
            return None  # not C++ any more

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        built = list(pool.map(build, chosen))
    return {m: outcome(k, launches) for m, k in zip(chosen, built, strict=True) if k is not None}


def harmless(mutant: Mutant, result: str) -> bool:
    return result == "same" and any(
        mutant.kind == kind and re.search(text, mutant.removed) for kind, text, _ in HARMLESS
    )


def test_recorded_launches_repeat(recorded):
    assert set(recorded) == set(KERNELS)
    for kernel, launches in recorded.values():
        assert len(launches) >= 2
        assert outcome(kernel, launches) == "same"


def test_share_of_mutants_caught(recorded, request):
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    survivors = []
    for name, (kernel, launches) in recorded.items():
        for mutant, result in try_mutants(kernel, launches).items():
            caught = result in ("fault", "wrong")
            label = result if caught else "harmless" if harmless(mutant, result) else "missed"
            counts[label] += 1
            kinds[f"{mutant.kind} {'caught' if caught else label}"] += 1
            if not caught:
                survivors.append(f"  {label}, {result} bits: {name}, {mutant}")
    caught = counts["fault"] + counts["wrong"]
    lines = [
        f"{caught} of {counts.total() - counts['harmless']} mutants caught "
        f"({counts['fault']} as faults, {counts['wrong']} by their results); "
        f"{counts['harmless']} more are harmless",
        f"  {dict(sorted(kinds.items()))}",
        *survivors,
    ]
    report = "\n".join(lines)
    summary.add(request.config, report)
    assert len(recorded) >= 5
    assert caught >= WANTED * (caught + counts["missed"]), report
