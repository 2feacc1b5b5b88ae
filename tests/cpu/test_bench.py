"""The benchmark without a GPU: its floors, its refusal of wrong results, its clock by the book."""

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import replaying
import tile_mhc
from tile_mhc import config, jit, reference, specs
from tile_mhc.bench import checking, compiling, floors, measuring, ops, peer, stacks, timing
from tile_mhc.bench.inputs import LAYERS, make_inputs
from tile_mhc.bench.measuring import Shape
from tile_mhc.kernels._arch import HOPPER

# What each op reads, by the names of Inputs and of what a forward saves; a name again is a read
# again. What it writes is what it returns.
READS = {
    "expand.fwd": "hidden",
    "expand.bwd": "grad_residual",
    "projection.fwd": "residual weight",
    "projection.bwd": "residual weight mixes inv_rms grad_mixes",
    "projection.bwd_add": "residual weight mixes inv_rms grad_mixes grad_residual",
    "split_mixes.fwd": "mixes scale bias",
    "split_mixes.bwd": "mixes scale bias grad_pre grad_post grad_comb",
    "sinkhorn.fwd": "logits",
    "sinkhorn.bwd": "logits grad_comb",
    "aggregate.fwd": "residual pre_mix",
    "aggregate.bwd": "residual pre_mix grad_hidden",
    "post.fwd": "hidden residual post_mix comb_mix",
    "post.bwd": "hidden residual post_mix comb_mix grad_residual",
    "head_mix.fwd": "head_mixes head_scale head_bias",
    "head_mix.bwd": "head_mixes head_scale head_bias grad_head_mix",
    "contract.fwd": "residual head_weight head_scale head_bias",
    "contract.bwd": "residual head_weight head_scale head_bias head_mixes inv_rms grad_hidden",
    "fused_pre.fwd": "residual weight scale bias",
    "fused_pre.bwd": "residual weight scale bias mixes inv_rms grad_hidden grad_post grad_comb",
    "fused_pre.bwd_add": "residual weight scale bias mixes inv_rms grad_hidden grad_post grad_comb "
    "grad_residual",
    "partials_pre.fwd": "split_products split_squares residual scale bias",
    "delayed_pre.fwd": "residual weight scale bias pre_mix",
    "delayed_pre.bwd": "residual weight scale bias pre_mix mixes inv_rms grad_hidden grad_pre "
    "grad_post grad_comb",
    "delayed_pre.bwd_add": "residual weight scale bias pre_mix mixes inv_rms grad_hidden grad_pre "
    "grad_post grad_comb grad_residual",
    "post_pre.fwd": "hidden residual post_mix comb_mix weight scale bias",
    "post_pre.bwd": "hidden residual post_mix comb_mix weight scale bias mixes inv_rms "
    "grad_residual grad_hidden grad_post grad_comb",
    "post_pre_delayed.fwd": "hidden residual post_mix comb_mix weight scale bias pre_mix",
    "post_pre_delayed.bwd": "hidden residual post_mix comb_mix weight scale bias pre_mix mixes "
    "inv_rms grad_residual grad_hidden grad_pre grad_post grad_comb",
    "identity_pre.fwd": "residual identity_weight identity_scale identity_bias",
    "identity_pre.bwd": "residual identity_weight identity_scale identity_bias identity_mixes "
    "inv_rms grad_hidden grad_post",
    "identity_pre.bwd_add": "residual identity_weight identity_scale identity_bias identity_mixes "
    "inv_rms grad_hidden grad_post grad_residual",
    "identity_post.fwd": "hidden residual post_mix",
    "identity_post.bwd": "hidden post_mix grad_residual",
    "stream_mean.fwd": "residual",
    "stream_mean.bwd": "grad_hidden",
    "recompute.fwd": "residual pre_mixes post_mixes comb_mixes layer_outputs",
    "post_pre_norm.fwd": "hidden residual post_mix comb_mix weight scale bias layer_norm",
    "post_pre_norm_delayed.fwd": "hidden residual post_mix comb_mix weight scale bias pre_mix "
    "layer_norm",
}
# Ops of other rows, and what is read and written besides.
PARTS = {
    "post_pre_norm_separate.fwd": ("post.fwd fused_pre.fwd", "hidden hidden norm_16"),
    "post_pre_norm_delayed_separate.fwd": ("post.fwd delayed_pre.fwd", "hidden hidden norm_16"),
    "post_pre.fwd+bwd": ("post_pre.fwd post_pre.bwd", ""),
    "post_pre_delayed.fwd+bwd": ("post_pre_delayed.fwd post_pre_delayed.bwd", ""),
}
# A linear layer, forward and backward.
LINEAR = "hidden linear hidden  hidden hidden linear linear hidden"
STACKS = {
    "stack.fwd+bwd": "post_pre.fwd+bwd",
    "stack_separate.fwd+bwd": "post.fwd fused_pre.fwd fused_pre.bwd_add post.bwd",
    "stack_delayed.fwd+bwd": "post_pre_delayed.fwd+bwd",
    "stack_delayed_separate.fwd+bwd": "post.fwd delayed_pre.fwd delayed_pre.bwd_add post.bwd",
}
# Forward and backward are passes of their own: read and written by each, and the weight by both.
SUB_LAYER = (
    "residual hidden",  # pre: the streams; the layer input
    "residual hidden residual",  # post: the streams, the layer's output; the new streams
    "grad_residual residual hidden residual hidden",  # its backward: two gradients of these
    "residual grad_hidden grad_residual residual",  # that of pre: one
    "weight weight weight",
)


def table():
    return {op.name: op for op in ops.make_ops()}


def size(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(size, value))


@pytest.fixture(scope="module", params=[2, 4, 8])
def inputs(request):
    return make_inputs(5, 64, request.param, torch.device("cpu"))


@pytest.mark.parametrize("name", list(READS))
def test_floor_is_the_bytes_of_the_tensors(name, inputs):
    op = table()[name]
    x = inputs.with_layers() if op.layers else inputs
    _, inv_rms = reference.projection_with_rms(x.residual, x.weight, None, ops.EPS)
    tensors = vars(x) | {"inv_rms": inv_rms.float()}
    read = sum(size(tensors[operand]) for operand in READS[name].split())
    written = size(op.ours(x)())
    assert op.floor(x.tokens, 64, x.n) == read + written


def test_floor_of_the_sub_layer_is_that_of_its_passes(inputs):
    names = " ".join(SUB_LAYER).split()
    floor = table()["sub_layer.fwd+bwd"].floor(5, 64, inputs.n)
    assert floor == sum(size(getattr(inputs, name)) for name in names)


@pytest.mark.parametrize("name", PARTS)
def test_floor_of_several_ops_is_that_of_each(name, inputs):
    parts, more = PARTS[name]
    tensors = vars(inputs) | {"norm_16": inputs.layer_norm.bfloat16()}
    expected = sum(table()[part].floor(5, 64, inputs.n) for part in parts.split())
    expected += sum(size(tensors[operand]) for operand in more.split())
    assert table()[name].floor(5, 64, inputs.n) == expected


@pytest.mark.parametrize("name", STACKS)
def test_floor_of_a_stack_is_that_of_its_boundaries(name, inputs):
    one = sum(table()[part].floor(5, 64, inputs.n) for part in STACKS[name].split())
    one += sum(size(getattr(inputs, operand)) for operand in LINEAR.split())
    assert table()[name].floor(5, 64, inputs.n) == stacks.BOUNDARIES * one


def test_every_op_has_a_floor_of_its_own():
    assert set(table()) == {*READS, *PARTS, *STACKS, "sub_layer.fwd+bwd"}
    used = [op.floor for op in ops.make_ops()]
    assert len(set(used)) == len(used)
    written = {f for name, f in vars(floors).items() if callable(f) and name[0] != "_"}
    assert written == set(used)


@pytest.mark.parametrize(
    ("name", "per_token", "once"),
    [
        # Bytes at n = 4 with T and H left open, as the papers and threads of several libraries have
        # them: streams of 8H bytes a token, a weight of 384H.
        ("expand.fwd", lambda H: 10 * H, lambda H: 0),
        ("projection.fwd", lambda H: 8 * H + 96, lambda H: 384 * H),
        ("projection.bwd", lambda H: 16 * H + 196, lambda H: 768 * H),
        ("split_mixes.fwd", lambda H: 192, lambda H: 108),
        ("sinkhorn.fwd", lambda H: 128, lambda H: 0),
        ("sinkhorn.bwd", lambda H: 192, lambda H: 0),
        ("aggregate.fwd", lambda H: 10 * H + 16, lambda H: 0),
        ("aggregate.bwd", lambda H: 18 * H + 32, lambda H: 0),
        ("post.fwd", lambda H: 18 * H + 80, lambda H: 0),
        ("post.bwd", lambda H: 28 * H + 160, lambda H: 0),
        ("contract.fwd", lambda H: 10 * H, lambda H: 64 * H + 20),
        ("fused_pre.fwd", lambda H: 10 * H + 80, lambda H: 384 * H + 108),
        ("identity_pre.fwd", lambda H: 10 * H + 16, lambda H: 128 * H + 40),
        ("identity_pre.bwd", lambda H: 18 * H + 52, lambda H: 256 * H + 80),
        ("identity_pre.bwd_add", lambda H: 26 * H + 52, lambda H: 256 * H + 80),
        ("identity_post.fwd", lambda H: 18 * H + 16, lambda H: 0),
        ("identity_post.bwd", lambda H: 12 * H + 32, lambda H: 0),
        ("stream_mean.fwd", lambda H: 10 * H, lambda H: 0),
        ("stream_mean.bwd", lambda H: 10 * H, lambda H: 0),
        ("post_pre.fwd", lambda H: 20 * H + 160, lambda H: 384 * H + 108),
        ("post_pre.bwd", lambda H: 30 * H + 340, lambda H: 768 * H + 216),
        ("post_pre_delayed.fwd", lambda H: 20 * H + 192, lambda H: 384 * H + 108),
        ("recompute.fwd", lambda H: 8 * H + 10 * (2 * H + 16) + 10 * (10 * H + 80), lambda H: 0),
        ("sub_layer.fwd+bwd", lambda H: 82 * H, lambda H: 1152 * H),
    ],
)
def test_floors_are_those_of_the_notes(name, per_token, once):
    for tokens, hidden in ((8192, 7168), (16, 7168), (4096, 2560)):
        assert table()[name].floor(tokens, hidden, 4) == tokens * per_token(hidden) + once(hidden)
    assert LAYERS == 10


@pytest.mark.parametrize("name", [*READS, *PARTS, *STACKS, "sub_layer.fwd+bwd"])
def test_right_results_pass_and_one_wrong_element_does_not(name, monkeypatch):
    monkeypatch.setattr(checking, "CHUNK", 16)  # 37 tokens: two whole chunks and a ragged one
    op = table()[name]
    x = make_inputs(37, 128, 4, torch.device("cpu"))
    x = x.with_layers() if op.layers else x
    outputs = op.ours(x)()
    assert checking.check(op, x, outputs) is None
    for index, output in enumerate(outputs):
        for wrong in (float("nan"), float("inf"), 9 * float(output.abs().max()) + 1):
            spoiled = output.clone()
            spoiled.view(-1)[-1] = wrong
            error = checking.check(op, x, [*outputs[:index], spoiled, *outputs[index + 1 :]])
            assert error is not None
            assert error.startswith(f"output {index}")


def test_a_missing_token_is_an_error():
    want = torch.randn(1, 8, 4, dtype=torch.float64)
    assert checking.find_error(want.float(), want) is None
    assert "for (1, 8, 4)" in checking.find_error(want[:, :7].float(), want)
    assert checking.find_error(torch.zeros(1, 8, 4), want) is not None


def test_the_tolerance_follows_from_the_roundings_of_an_op():
    want = torch.ones(1, 64, 4, dtype=torch.float64)
    for roundings in (3, LAYERS):
        # 4 * rms(want) stands beside |want|.
        allowed = 5 * (roundings + 1) * 2.0**-9
        for factor, is_right in ((0.9, True), (1.1, False)):
            got = (want + factor * allowed).bfloat16()
            assert (checking.find_error(got, want, roundings) is None) == is_right


def test_a_row_is_judged_by_its_own_size():
    want = torch.ones(1, 64, 8, dtype=torch.float64)
    want[0, 0] = 100.0
    for row, by_all, by_row in ((0, "1 of 512", None), (1, None, "8 of 512")):
        got = want.clone()
        got[0, row, : 1 if row == 0 else 8] += 20.0 if row == 0 else 0.5
        found = [checking.find_error(got.bfloat16(), want, 24, by_row=by) for by in (False, True)]
        for text, start in zip(found, (by_all, by_row), strict=True):
            assert text is None if start is None else text.startswith(start)
    deep = {"recompute.fwd", *STACKS}
    assert {op.roundings for op in table().values() if op.name not in deep} == {3}
    assert {table()[name].roundings for name in STACKS} == {3 * stacks.BOUNDARIES}
    assert table()["recompute.fwd"].roundings == LAYERS


def test_tolerances_are_tighter_than_the_next_smaller_format():
    want = torch.randn(1, 4096, 4, dtype=torch.float64)
    assert checking.find_error(want.bfloat16(), want) is None
    assert checking.find_error(want.to(torch.float8_e4m3fn).bfloat16(), want) is not None
    assert checking.find_error(want.to(torch.float8_e4m3fn).float(), want) is not None


def test_poisoned_memory_is_nan():
    with checking.poisoned_memory():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_times_are_median_and_quartiles():
    times = timing.Times.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (times.lower, times.median, times.upper) == (2, 3, 4)
    assert times.spread == pytest.approx(2 / 3)


@pytest.fixture
def clock(monkeypatch):
    """A clock without a device, which writes down what it would do there."""
    clock = object.__new__(timing.Clock)
    clock.log = []
    clock.events, clock.flush_by = "inside", "read"

    class Stream:
        def synchronize(self):
            clock.log.append("wait")

    clock.stream = Stream()
    monkeypatch.setattr(timing.Clock, "flush", lambda self, by: self.log.append(by))
    return clock


@pytest.mark.parametrize(("asked", "flush"), [(None, "read"), ("copy", "copy")])
def test_graphs_are_replayed_in_turn_from_a_flushed_cache(clock, asked, flush):
    class Graph:
        def __init__(self, name):
            self.name, self.replays = name, 0

        def replay(self):
            clock.log.append(self.name)
            self.replays += 1

        def microseconds(self):
            return float(self.replays)

    ours, theirs = clock.time([Graph("ours"), Graph("peer")], rounds=5, flush_by=asked)
    turn = [flush, "ours", "wait", flush, "peer", "wait"]
    assert clock.log == turn * (timing.WARM_ROUNDS + 5)
    # The first replays are not samples.
    assert ours == theirs == timing.Times.of([timing.WARM_ROUNDS + 1.0 + i for i in range(5)])


@pytest.mark.parametrize("flush_by", ["copy", "read", "none"])
def test_a_flush_reads_all_and_writes_only_by_a_copy(flush_by):
    clock = object.__new__(timing.Clock)
    touched = []

    class Memory(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            touched.append((function.__name__, *(kwargs or {})))
            return super().__torch_function__(function, types, args, kwargs)

    clock._source, clock._target = (torch.ones(8).as_subclass(Memory) for _ in range(2))
    clock.flush(flush_by)
    wanted = {"copy": [("mul", "out")], "read": [("amax",), ("amax",)], "none": []}
    assert touched == wanted[flush_by]


def test_the_bandwidth_is_that_after_a_copy(clock, monkeypatch):
    asked = []

    def time_alone(self, call, flush_by=None):
        asked.append(flush_by)
        return timing.Times(2.0, 2.0, 2.0)

    clock.device = torch.device("cpu")
    monkeypatch.setattr(timing, "COPY_BYTES", 64)
    monkeypatch.setattr(timing.Clock, "time_alone", time_alone)
    assert clock.copy_bandwidth() == 64
    assert asked == ["copy"]


def test_host_time_leaves_the_device_out(clock, monkeypatch):
    ticks = iter(range(0, 10**9, 7000))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(ticks))
    calls = [lambda: clock.log.append("ours"), lambda: clock.log.append("peer")]
    ours, theirs = clock.time_host(calls, rounds=2)
    calls_then_wait = [["ours"] * timing.HOST_CALLS, ["peer"] * timing.HOST_CALLS]
    turn = [*calls_then_wait[0], "wait", *calls_then_wait[1], "wait"]
    assert clock.log == turn * (timing.WARM_ROUNDS + 2)
    assert ours.median == theirs.median == 7.0


@pytest.mark.parametrize(
    ("behaviour", "events"),
    [
        (1.5, "inside"),
        (0.0, "around"),
        (TypeError("unexpected keyword argument 'external'"), "around"),
        (ValueError("Both events must be recorded"), "around"),
        (RuntimeError("operation not permitted when stream is capturing"), "around"),
    ],
)
def test_events_are_in_the_graph_where_they_can_be(behaviour, events, clock, monkeypatch):
    class Graph:
        def __init__(self, call, where):
            assert where == "inside"

        def replay(self):
            pass

        def microseconds(self):
            if isinstance(behaviour, Exception):
                raise behaviour
            return behaviour

    monkeypatch.setattr(timing, "Graph", Graph)
    monkeypatch.setattr(timing.Clock, "running", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert clock._find_events() == events


@pytest.mark.parametrize("broken", ["ours", "peer"])
def test_a_failure_of_one_side_keeps_the_other(broken, clock, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA said no\nand then a page of source")

    five = timing.Times(5.0, 4.0, 6.0)
    monkeypatch.setattr(measuring, "capture", lambda op, x, call, clock: call())
    monkeypatch.setattr(clock, "time", lambda graphs: [five for _ in graphs], raising=False)
    monkeypatch.setattr(clock, "time_host", lambda calls: [five for _ in calls], raising=False)
    x = make_inputs(3, 64, 4, torch.device("cpu"))
    good = table()["expand.fwd"]
    tile_kernels = object.__new__(peer.TileKernels)
    tile_kernels.calls = {"expand.fwd": fails if broken == "peer" else good.ours}
    op = dataclasses.replace(good, ours=fails) if broken == "ours" else good
    sides = dict(zip(("ours", "peer"), measuring.measure(op, x, clock, tile_kernels), strict=True))
    assert sides.pop(broken) == measuring.Side(problem="RuntimeError: CUDA said no")
    assert list(sides.values()) == [measuring.Side(five, five)]

    monkeypatch.setattr(clock, "time_host", fails)
    ours, theirs = measuring.measure(good, x, clock)
    assert ours == measuring.Side(problem="timing: RuntimeError: CUDA said no")
    assert theirs is None


def test_an_error_that_hides_another_names_both():
    def capture():
        try:
            raise ValueError("no such stride")
        finally:
            raise RuntimeError("failed due to a previous error")

    with pytest.raises(RuntimeError) as failure:
        capture()
    assert measuring.describe(failure.value) == (
        "RuntimeError: failed due to a previous error, after ValueError: no such stride"
    )


def test_a_peer_for_four_streams_is_not_asked_for_two(clock, monkeypatch):
    monkeypatch.setattr(measuring, "capture", lambda *_: None)
    monkeypatch.setattr(clock, "time", lambda graphs: [None for _ in graphs], raising=False)
    monkeypatch.setattr(clock, "time_host", lambda calls: [None for _ in calls], raising=False)
    tile_kernels = object.__new__(peer.TileKernels)
    tile_kernels.calls = {"expand.fwd": table()["expand.fwd"].ours}
    for n, has_peer in ((4, True), (2, False)):
        x = make_inputs(3, 64, n, torch.device("cpu"))
        _, theirs = measuring.measure(table()["expand.fwd"], x, clock, tile_kernels)
        assert (theirs is not None) == has_peer


class Replay:
    """In place of a captured graph: replaying it computes again what `then` says, or nothing."""

    def __init__(self, outputs, then):
        self.outputs, self.then = outputs, then

    def replay(self):
        if self.then is not None:
            for out, value in zip(self.outputs, self.then, strict=True):
                out.copy_(value)


@pytest.mark.parametrize("case", ["right", "eager wrong", "replay wrong", "replay writes nothing"])
def test_a_wrong_result_is_not_captured(case):
    op = table()["aggregate.fwd"]
    x = make_inputs(3, 64, 4, torch.device("cpu"))
    call = op.ours(x)
    right, wrong = call(), [-call()[0]]
    then = {"replay wrong": wrong, "replay writes nothing": None}.get(case, right)

    class Clock:
        def capture(self, call):
            return Replay([out.clone() for out in call()], then)

    if case == "right":
        assert measuring.capture(op, x, call, Clock()).outputs[0].equal(right[0])
        return
    with pytest.raises(measuring.WrongResultError, match=r"output 0, tokens from 0") as failure:
        measuring.capture(op, x, (lambda: wrong) if case == "eager wrong" else call, Clock())
    assert str(failure.value).startswith("replayed: ") == case.startswith("replay")


def test_what_adds_up_is_reset_before_it_is_checked():
    op = table()["aggregate.bwd"]
    x = make_inputs(3, 64, 4, torch.device("cpu"))
    grads = op.ours(x)()
    grad_mix = torch.empty_like(grads[1])

    def backward():
        x.residual.untyped_storage().grad_from_mhc_post.add_(grads[0])
        return [grad_mix.copy_(grads[1])]

    call = peer.accumulating(x.residual, backward)

    class Clock:
        def capture(self, call):
            class Graph:
                outputs = call()
                replay = call

            return Graph

    assert measuring.capture(op, x, call, Clock()) is not None
    call()
    assert checking.check(op, x, call()) is not None, "the third sum is not the gradient"


SHAPES = [Shape(16, 64, 4), Shape(8, 64, 4), Shape(16, 128, 4), Shape(2, 64, 2)]


def test_every_op_is_compiled_before():
    parts = {part for op in ops.make_ops() for part in compiling.PARTS.get(op.stem, (op.stem,))}
    assert parts == set(specs.OPS) - {"transformer_engine"}
    post = [op for op in ops.make_ops() if op.stem == "post"]
    wanted = compiling.kernels(post, SHAPES)
    assert {name for name, _ in wanted} >= {"post_fwd", "post_bwd"}
    assert {args[:2] for name, args in wanted if name == "post_fwd"} == {(4, 64), (4, 128), (2, 64)}
    into = ("projection_bwd", (24, 256, 0, "held=bfloat16", "into=bfloat16"))
    for name, is_there in (("projection.bwd", False), ("projection.bwd_add", True)):
        wanted = compiling.kernels([table()[name]], SHAPES)
        assert (into in wanted) == is_there
        assert len(set(wanted)) == len(wanted)


def test_what_is_served_compiles_what_it_launches(monkeypatch):
    """On another architecture than this GPU's, all that its ops have."""
    monkeypatch.setattr(config, "_num_sms", replaying.NUM_SMS)
    monkeypatch.setattr(config, "settings", (replaying.NUM_SMS, False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(jit, "device_arch", lambda _: "sm_90a")
    served = [op for op in ops.make_ops() if op.stem in compiling.SERVED]
    assert len(served) == 4
    with replaying.on_architecture(HOPPER):
        wanted = compiling.kernels(served, [Shape(8, 64, 4), Shape(128, 64, 4)], "sm_90a")
        every = compiling.kernels(served, [Shape(8, 64, 4)], "sm_100a")
    assert {name for name, _ in wanted} == {"few_project", "few_pre", "post_fwd"}
    assert len(wanted) == len(set(wanted)) == 13
    assert set(wanted) < set(every)
    assert len(every) > 100


def test_the_peer_runs_each_stem_once_before():
    tile_kernels = object.__new__(peer.TileKernels)
    tile_kernels.calls = dict.fromkeys(set(table()) - {"contract.fwd", "contract.bwd"})
    commands = compiling.peer_commands(ops.make_ops(), SHAPES, tile_kernels)
    assert "fused_pre" in commands
    assert not {"contract", "sub_layer"} & set(commands), "no peer, and covered by the others"
    assert commands["post"][-3:] == ["--shapes", "8x64,16x128", "post"]
    some = [op for op in ops.make_ops() if op.stem in ("sub_layer", "post")]
    assert list(compiling.peer_commands(some, SHAPES, tile_kernels)) == ["post", "sub_layer"]
    assert compiling.peer_commands(some, SHAPES[-1:], tile_kernels) == {}


def test_what_fails_to_compile_is_named_and_stops_nothing(monkeypatch):
    asked = []

    def fill_cache(kernels, arch, jobs):
        asked.extend((*kernel, arch) for kernel in kernels)
        return ["post_bwd(4, 64): nvcc said no\n" + "source\n" * 1000]

    monkeypatch.setattr(jit, "fill_cache", fill_cache)
    monkeypatch.setattr(jit, "device_arch", lambda device: "sm_90a")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    wanted = [("post_fwd", (4, 64)), ("post_bwd", (4, 64))]
    commands = {"post": [sys.executable, "-c", "raise OSError(7)"]}
    problems = compiling.compile_all(wanted, commands, 2)
    assert asked == [(*kernel, "sm_90a") for kernel in wanted]
    assert problems == ["tile_kernels, post: OSError: 7", "post_bwd(4, 64): nvcc said no"]


def test_peer_is_found_without_running_its_packages(tmp_path):
    """TileKernels' __init__ files import what does not compile: they must not run."""
    package = tmp_path / "tile_kernels"
    modules = package / "modeling" / "mhc" / "ops"
    modules.mkdir(parents=True)
    (package / "mhc").mkdir()
    for path in (package, package / "modeling"):
        (path / "__init__.py").write_text("raise RuntimeError('must not run')")
    (package / "mhc" / "__init__.py").write_text("")
    (package / "mhc" / "multilayer_recompute_kernel.py").write_text("")
    (package / "modeling" / "mhc" / "__init__.py").write_text("")
    (package / "modeling" / "mhc" / "functional.py").write_text("")
    (modules / "__init__.py").write_text("")
    for module, function in peer.FUNCTIONS.values():
        (modules / f"{module}.py").write_text(f"class {function}: pass")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tile_mhc.bench import ops, peer\n"
        "found = peer.find()\n"
        "if found is None: sys.exit(3)\n"
        "sys.exit(set(found.calls) - {op.name for op in ops.make_ops()} != set())"
    )
    arguments = [sys.executable, "-c", code, str(Path(tile_mhc.__path__[0]).parent)]
    found = subprocess.run([*arguments, str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert subprocess.run(arguments, check=False).returncode == 3, "not installed"


def write_release_2(folder):
    """A package laid out as release 2.1.0, whose mHC functions are our stand-ins."""
    package = folder / "tile_kernels"
    (package / "mhc").mkdir(parents=True)
    (package / "modeling").mkdir()
    for name in (".", "modeling"):
        (package / name / "__init__.py").write_text("raise RuntimeError('must not run')")
    (package / "mhc" / "__init__.py").write_text("from tile_mhc.compat.tile_kernels.mhc import *\n")
    (package / "_version.py").write_text("__version__ = version = '2.1.0'\n")
    (package / "config.py").write_text(
        "def set_pdl(use): set_pdl.used = use\n"
        "def get_pdl(): return set_pdl.used\n"
        "def get_num_sms(): return 7\n"
    )


def test_the_release_that_is_found(tmp_path):
    """By what it has: 1.0.0 has autograd for mHC, later ones plain functions alone."""
    write_release_2(tmp_path)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tile_mhc.bench import peer, plain_peer\n"
        "found = peer.find()\n"
        "assert type(found) is plain_peer.PlainTileKernels, type(found)\n"
        "assert found.release == '2.1.0', found.release\n"
        "assert found.config.get_pdl() is True\n"
    )
    command = [sys.executable, "-c", code, str(Path(tile_mhc.__path__[0]).parent), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.fixture
def plain_functions(tmp_path, monkeypatch):
    """The peer of release 2.1.0 on our own functions."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tile_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    write_release_2(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = peer.find()
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "tile_kernels"]:
        del sys.modules[name]


def test_the_calls_of_plain_functions_are_those_of_the_ops(plain_functions):
    """Each computes what the op of its row does: the arguments stand where they belong."""
    assert plain_functions.calls.keys() < table().keys()
    assert not {"projection.fwd", "fused_pre.fwd"} & plain_functions.calls.keys()
    x = make_inputs(37, 64, 4, torch.device("cpu"))
    for name, prepare in plain_functions.calls.items():
        if name == "recompute.fwd":
            continue  # calls the kernel itself
        call = prepare(x)
        for _ in range(2):
            measuring.reset(call)
            assert checking.check(table()[name], x, call()) is None, name


def test_backward_alone_uses_what_forward_saved():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * ctx.factor + 0 * x, None

    tile_kernels = object.__new__(peer.TileKernels)
    tile_kernels.functions = {"double": Double}
    call = tile_kernels.backward("double", (torch.ones(3), 2.0), (torch.ones(3),), slice(1))
    (grad,) = call()
    assert torch.equal(grad, torch.full((3,), 2.0))
