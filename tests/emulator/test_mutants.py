"""The emulator finds faults: kernels broken in one place each, and the share that it catches.

A mutant is caught when it is reported as a fault, or when a result is off by more than any
tolerance of the suite, in one of the thread orders. One that gives the same bits in every order,
with no fault, may be no bug at all: a mask that these sizes never need, an index term that is zero.
"""

import dataclasses
import itertools
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
import whole_pre
from cases import DELAYED_PRE, FUSED_PRE, OPS, POST_PRE, POST_PRE_DELAYED, Case
from emulator import launch
from emulator.launch import FaultError, Kernel
from emulator.mutate import Mutant, mutants
from emulator.ops import emulated
from tile_mhc import selection
from tile_mhc.selection import FEW_STREAMS

pytestmark = pytest.mark.scheduled

# Ragged for every block, and so few SMs that one CTA has several tiles: pipelines run full.
CASE = Case(301, 4, 192, "three tiles, the last ragged")
NUM_SMS = 6
# Of few tokens, by all streams a CTA then has two groups.
FEW_SMS = 2
FEW = Case(13, 4, 192, "less than a tile")
KERNELS = (
    "expand_bwd", "projection_fwd", "projection_norm", "projection_norm_bwd", "projection_bwd",
    "split_mixes_fwd", "split_mixes_bwd", "column_sums", "sinkhorn_bwd", "gates_bwd",
    "aggregate_bwd", "post_bwd", "contract_cluster_fwd", "contract_cluster_bwd", "fused_pre",
    "post_pre_fwd", "post_pre_bwd", "delayed_mixes", "delayed_sums", "identity_cluster_fwd",
    "identity_cluster_bwd", "identity_post_fwd", "identity_post_bwd", "stream_mean_fwd",
    "stream_mean_bwd", "delayed_pre_bwd", "few_project", "few_pre",
)  # fmt: skip
# Of these several forms; of the others what comes first.
FORMS = {
    # By warps that have one stream, or all; which also collapse.
    "few_project": ((192, True, 1, False), (192, False, 4, False), (192, True, 4, True)),
    # With all streams, with a given pre_mix, and of a layer input that is there.
    "few_pre": tuple(
        (192, *kind, "layer_norm=float32") for kind in ((False, False), (True, False), (True, True))
    ),
}
PRE_OPS = (FUSED_PRE, DELAYED_PRE, POST_PRE, POST_PRE_DELAYED)
PER_KIND = 3
# Of the largest sources, which take g++ longest.
FEWER = dict.fromkeys(
    ("post_pre_fwd", "post_pre_bwd", "identity_cluster_bwd", "delayed_pre_bwd"), 2
)
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
    (
        "mask",
        r"^\(?step \+ 1\)? < place_of\[2\]$",
        "nobody reads what is loaded past the last step",
    ),
    ("index", r"^ \+ 0$", "nothing is added"),
    ("index", r"^ \+ k_\d+$", "what a NaN of the weight is rounded to"),
    ("factor", r"^others\[i_\d+\] \* $", "Sinkhorn begins with factors of one"),
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
    """For each kernel, or form of one, the launches that its mutants are tried on."""
    kernels: dict[str, Kernel] = {}
    launches: dict[str, list[Launch]] = defaultdict(list)
    seen = set()

    def copies(given):
        return [g.clone() if isinstance(g, Tensor) else g for g in given]

    def watch(kernel, given):
        name, args = kernel.key
        if name in FORMS and args in FORMS[name]:
            name = kernel.lowered.title
        elif name not in KERNELS or name in FORMS:
            return None
        if name in seen or kernels.setdefault(name, kernel) is not kernel:
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
    with emulated(num_sms=FEW_SMS), launch.settings(watch=watch):
        for vary, streams in itertools.product(OF_PRES, FEW_STREAMS):
            seen.clear()
            with mock.patch.object(selection, "few_streams", return_value=streams):
                for op in PRE_OPS:
                    vary(op, FEW.hidden_size)
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


def pre(op, hidden_size, **changes):
    """Forward alone, with a norm of the layer input; eps so large that it shows."""
    tensors = whole_pre.inputs(op, hidden_size, 45, "cpu")
    return run_pre(op, tensors, sinkhorn_eps=0.5, **changes)


def huge_pre(op, hidden_size):
    tensors = whole_pre.inputs(op, hidden_size, 13, "cpu")
    tensors["residual"][3] *= 1e18
    run_pre(op, tensors)


def tf32_pre(op, hidden_size):
    tensors = whole_pre.inputs(op, hidden_size, 13, "cpu")
    tensors["residual"][3] *= 1e18
    run_pre(op, tensors, tf32=True)


def two_steps_pre(op, hidden_size):
    pre(op, hidden_size, sinkhorn_repeat=2)


def small_eps_pre(op, hidden_size):
    """So small that products of four sums may leave float32."""
    tensors = whole_pre.inputs(op, hidden_size, 13, "cpu")
    tensors["bias"] *= 20
    run_pre(op, tensors, sinkhorn_eps=2.0**-60)


OF_PRES = (pre, huge_pre, tf32_pre, two_steps_pre, small_eps_pre)


def run_pre(op, tensors, **options):
    del tensors["norm_weight"]  # one form of each kernel
    norm = torch.rand(tensors["residual"].shape[-1]) + 0.5
    op.run(**tensors, **{**whole_pre.OPTIONS, **options}, layer_norm_weight=norm)


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
    wanted = {name for name in KERNELS if name not in FORMS}
    forms = {(name, args) for name, every in FORMS.items() for args in every}
    assert {kernel.key for kernel, _ in recorded.values()} >= forms
    assert set(recorded) >= wanted
    assert len(recorded) == len(wanted) + len(forms)
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
