"""What a warm-up asks for, compiles and runs, with a pretended GPU; and the setting behind it."""

import contextlib
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

import replaying
from tile_mhc import (
    ShapeError,
    UnsupportedError,
    _device,
    _warm_up,
    config,
    fused_pre,
    jit,
    post_pre,
    recompute,
    selection,
    specs,
    warm_up,
)
from tile_mhc.compat import sglang, vllm
from tile_mhc.kernels._arch import HOPPER
from tile_mhc.kernels._dtypes import split_arguments

HIDDEN = 4096
N = 4


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(config, "_num_sms", replaying.NUM_SMS)
    monkeypatch.setattr(selection, "has_clusters_of", lambda _: True)
    monkeypatch.setattr(config, "settings", (replaying.NUM_SMS, False))
    monkeypatch.setattr(config, "_jit", None)
    monkeypatch.delenv("TILE_MHC_JIT", raising=False)
    with replaying.on_architecture(HOPPER):
        yield


@pytest.fixture
def gpu(monkeypatch):
    """A pretended CUDA device 0: what was compiled for it, and by how many threads at once."""
    state = SimpleNamespace(compiled=[], most=0, cached=set(), at_once=0, together=None)
    lock = threading.Lock()
    monkeypatch.setattr(jit, "_compiled", {})
    monkeypatch.setattr(jit, "_locks", {})
    monkeypatch.setattr(jit, "_counts", {"built": 0, "loaded": 0})

    def load_or_build(name, args, arch):
        with lock:
            state.at_once += 1
            state.most = max(state.most, state.at_once)
            state.compiled.append((name, args))
        if state.together is not None and len(state.compiled) <= 2:
            state.together.wait(timeout=30)
        with lock:
            state.at_once -= 1
        built = (name, args) not in state.cached
        return jit.Compiled(name, args, arch, print, built, 1.5, "", None, None)

    monkeypatch.setattr(jit, "_load_or_build", load_or_build)
    monkeypatch.setattr(jit, "device_arch", lambda _: "sm_90a")
    monkeypatch.setattr(_warm_up, "_chosen", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return state


def tensors_on(device, num_tokens, hidden_size=HIDDEN):
    mixes = N * (N + 2)
    return (
        torch.zeros(num_tokens, N, hidden_size, device=device, dtype=torch.bfloat16),
        torch.zeros(mixes, N * hidden_size, device=device),
        torch.zeros(3, device=device),
        torch.zeros(mixes, device=device),
    )


class Served:
    """A call of `fused_pre` on the meta device; on the pretended GPU it is only counted."""

    def __init__(self):
        self.ran = []

    def __call__(self, num_tokens, device):
        if device.type == "meta":
            fused_pre(*tensors_on(device, num_tokens))
        else:
            self.ran.append(num_tokens)


def names(kernels):
    return {name for name, _ in kernels}


def test_asking_launches_nothing_and_says_what_would_be():
    with jit.asking() as asked_for:
        outputs = fused_pre(*tensors_on("meta", 16))
    assert outputs[0].shape == (16, HIDDEN)
    assert [name for name, _ in asked_for] == ["few_project", "few_pre"]
    assert all(args in specs.BY_NAME[name].arguments(specs.Sizes(N, HIDDEN))
               for name, args in asked_for)  # fmt: skip
    assert not jit.is_asking()


def test_asking_is_of_its_thread_and_ends_with_an_error():
    seen = []

    def ask():
        with jit.asking():
            thread = threading.Thread(target=lambda: seen.append(jit.is_asking()))
            thread.start()
            thread.join()
            seen.append(jit.is_asking())
            fused_pre(*tensors_on("meta", 16)[:3], None)

    with pytest.raises(ShapeError):
        ask()
    assert seen == [False, True]
    assert not jit.is_asking()


def test_asking_changes_no_result_on_the_cpu_later():
    """Sightings of a call that asks are not counted: nothing that launches nothing is kept."""
    inputs = tensors_on("cpu", 3, 64)
    expected = fused_pre(*inputs)
    with jit.asking():
        for _ in range(10):
            fused_pre(*inputs)
    assert all(map(torch.equal, fused_pre(*inputs), expected))


@pytest.mark.parametrize("num_tokens", [0, 1, 1024, 8192])
@pytest.mark.parametrize("hidden_size", [64, 100, 4096, 7168])
@pytest.mark.parametrize(
    "stack",
    [(sglang.warm_up, {}), (vllm.warm_up, {}), (vllm.warm_up, {"delayed": True})],
    ids=["sglang", "vllm", "vllm delayed"],
)
def test_kernels_of_the_stacks_are_in_the_table(monkeypatch, stack, hidden_size, num_tokens):
    """By dtype of the norm, too: what `tile-mhc compile` can be asked for."""
    calls = []
    monkeypatch.setattr(_warm_up, "warm_up", lambda call, counts, **_: calls.append(call))
    run, options = stack
    run(hidden_size, [num_tokens], **options)
    kernels = _warm_up._asked_for(calls[0], num_tokens)
    assert bool(kernels) is bool(num_tokens)
    # An `x` is projected as streams of a quarter of its width.
    table = specs.select(
        specs.Sizes(N, width, parameters=("float32", "bfloat16"))
        for width in (hidden_size, hidden_size // N)
    )
    assert set(kernels) <= set(table)
    for name, _ in kernels:
        assert not name.endswith("_bwd")
    norms = {
        word for _, args in kernels for word in split_arguments(args)[1] if "layer_norm" in word
    }
    assert norms == ({"layer_norm=bfloat16"} if num_tokens else set())


def test_each_kernel_is_compiled_once_several_at_a_time(gpu):
    served = Served()
    # The first two wait for one another.
    gpu.together = threading.Barrier(2)
    done = warm_up(served, [2047, 1, 7, 16, 2047], jobs=2)
    assert sorted(gpu.compiled) == sorted(set(gpu.compiled)) == sorted(done.kernels)
    assert gpu.most == 2
    assert names(done.kernels) == {"few_project", "few_pre", "projection_fwd", "fused_pre"}
    assert len(done.kernels) == 4
    assert (done.built, done.loaded) == (4, 0)
    assert done.token_counts == (2047, 1, 7, 16)
    # Of those that launch the same the smallest.
    assert served.ran == [1, 2047]


def test_again_nothing_is_compiled(gpu):
    served = Served()
    first = warm_up(served, [1, 8192])
    before = jit.statistics()
    second = warm_up(served, [2, 4096])
    assert second.kernels == first.kernels
    assert (second.built, second.loaded) == (0, 0)
    assert len(gpu.compiled) == 3
    assert jit.statistics() == before


def test_what_the_disk_has_is_counted_apart(gpu):
    served = Served()
    with torch.no_grad():
        gpu.cached.update(_warm_up._asked_for(served, 1))
    done = warm_up(served, [1, 8192])
    assert (done.built, done.loaded) == (1, 2)


def test_covers(gpu):
    served = Served()
    few = warm_up(served, [1])
    assert few.covers(0)
    assert few.covers(16)
    assert not few.covers(17)
    assert not few.covers(8192)
    assert warm_up(served, [1, 8192]).covers(5000)
    with pytest.raises(
        ShapeError, match="covers: num_tokens must be an integer of at least 0; got"
    ):
        few.covers(-1)


def test_six_counts_cover_every_number(gpu):
    """What docs/api/serving.md says, of all that the stacks call at DeepSeek's models' widths."""
    calls = []
    real, _warm_up.warm_up = _warm_up.warm_up, lambda call, counts, **_: calls.append(call)
    try:
        for hidden_size in (4096, 5120, 7168):
            sglang.warm_up(hidden_size, [])
            vllm.warm_up(hidden_size, [], delayed=True)
    finally:
        _warm_up.warm_up = real
    for call in calls:
        kernels = set()
        for count in (1, 64, 256, 1024, 2048, 8192):
            kernels.update(_warm_up._asked_for(call, count))
        for count in [*range(1, 300, 7), *range(300, 20000, 97), 1023, 1025, 65536]:
            assert set(_warm_up._asked_for(call, count)) <= kernels, count


def test_settings_count(gpu):
    """Batch-invariant splits are others: the warm-up is for the settings of its time."""
    served = Served()
    config.set_batch_invariant(True)
    try:
        invariant = set(_warm_up._asked_for(served, 1))
    finally:
        config.set_batch_invariant(False)
    assert invariant != set(_warm_up._asked_for(served, 1))


def test_what_it_has_done_is_logged(gpu, caplog):
    with caplog.at_level(logging.INFO, "tile_mhc"):
        warm_up(Served(), [1, 2])
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith(
        "warm_up: 2 kernels for 1, 2 tokens on cuda:0: 2 compiled, 0 loaded from the cache, in "
    )


def test_nothing_to_do_on_a_cpu():
    served = Served()
    done = warm_up(served, [1, 2], device="cpu")
    assert done == _warm_up.WarmUp((), 0, 0, 0.0, (1, 2), served)
    assert served.ran == []


def test_a_gpu_without_kernels(gpu, monkeypatch):
    """The reference answers there, which has nothing to warm up; or nothing does."""
    monkeypatch.setattr(_device, "limits_of", lambda _: None)
    monkeypatch.setattr(_device, "problem_of", lambda _: "the GPU must be newer; got an old one")
    monkeypatch.setattr(_device, "_warned", set())
    served = Served()
    with pytest.warns(RuntimeWarning, match="to have kernels the GPU must be newer"):
        assert warm_up(served, [1]).kernels == ()
    assert served.ran == gpu.compiled == []
    monkeypatch.setattr(config, "_require_kernels", True)
    with pytest.raises(UnsupportedError, match="warm_up: the GPU must be newer; got an old one"):
        warm_up(served, [1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is the default")
def test_without_a_gpu_the_cpu_is_the_default():
    assert sglang.warm_up(64, [1]).kernels == ()
    assert vllm.warm_up(64, [1], delayed=True).kernels == ()


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([], {}, "warm_up: token_counts must have at least one number; got none"),
        ([1, -1], {}, "warm_up: each of token_counts must be an integer of at least 0; got -1"),
        ([1.5], {}, "warm_up: each of token_counts must be an integer of at least 0; got 1.5"),
        ([1], {"jobs": 0}, "warm_up: jobs must be an integer of at least 1; got 0"),
    ],
)
def test_mistakes(counts, options, message):
    with pytest.raises(ShapeError, match=message):
        warm_up(Served(), counts, **options)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _warm_up._chosen(2) == torch.device("cuda:2")
    assert _warm_up._chosen("cuda") == torch.device("cuda:3")
    assert _warm_up._chosen("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _warm_up._chosen(None) == torch.device("cuda:3")


def test_another_failure_of_one_kernel_is_raised(gpu, monkeypatch):
    def fail(name, args, arch):
        raise jit.CompileError(f"{name}: no")

    monkeypatch.setattr(jit, "_load_or_build", fail)
    with pytest.raises(jit.CompileError, match="no"):
        warm_up(Served(), [1])


def test_an_op_that_reads_addresses_can_be_asked():
    def call(num_tokens, device):
        initial = torch.zeros(num_tokens, N, 64, device=device, dtype=torch.bfloat16)
        recompute(initial, [torch.zeros(num_tokens, N, device=device)], [], [], [])

    assert "recompute" in names(_warm_up._asked_for(call, 3))


@pytest.mark.parametrize(
    ("value", "mode"),
    [(None, "allow"), ("1", "allow"), ("yes", "allow"), ("0", "forbid"), (" Off ", "forbid"),
     ("forbid", "forbid"), ("warn", "warn"), ("WARN", "warn")],
)  # fmt: skip
def test_mode_of_the_environment(monkeypatch, value, mode):
    if value is not None:
        monkeypatch.setenv("TILE_MHC_JIT", value)
    assert config.get_jit() == mode
    for chosen in ("allow", "warn", "forbid"):
        config.set_jit(chosen)
        assert config.get_jit() == chosen
        assert jit.building_allowed() is (chosen != "forbid")
    config.set_jit(None)
    assert config.get_jit() == mode


@pytest.mark.parametrize("wrong", ["never", True, 0])
def test_mode_that_is_none(wrong):
    with pytest.raises(ValueError, match="set_jit: mode must be one of allow, warn, forbid, or N"):
        config.set_jit(wrong)


def test_warned_of(gpu, caplog):
    gpu.cached.add(("expand_fwd", (2, 64)))
    config.set_jit("warn")
    for _ in range(2):
        jit.compile_kernel("expand_fwd", (2, 64), "sm_90a")
        jit.compile_kernel("expand_fwd", (2, 128), "sm_90a")
    assert [record.getMessage() for record in caplog.records] == [
        "kernel expand_fwd(2, 64): was loaded from the cache now, which took 1.50 s; "
        "tile_mhc.warm_up does it beforehand",
        "kernel expand_fwd(2, 128): was compiled now, which took 1.50 s; "
        "tile_mhc.warm_up does it beforehand",
    ]
    assert {record.name for record in caplog.records} == {"tile_mhc"}
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.parametrize("mode", ["allow", "forbid"])
def test_not_warned_of_otherwise(gpu, caplog, mode):
    config.set_jit(mode)
    jit.compile_kernel("expand_fwd", (2, 64), "sm_90a")
    assert caplog.records == []


def test_a_warm_up_does_not_warn_of_itself(gpu, caplog):
    config.set_jit("warn")
    warm_up(Served(), [1])
    assert caplog.records == []
    jit.compile_kernel("expand_fwd", (2, 64), "sm_90a")
    assert len(caplog.records) == 1


def test_the_calls_run_without_gradients():
    """They need no `torch.no_grad` of their own: a norm's weight may be a parameter."""
    norm = torch.nn.Parameter(torch.ones(HIDDEN, device="meta"))

    def call(num_tokens, device):
        residual, *gates = tensors_on("meta", num_tokens)
        mixes = torch.zeros(num_tokens, N, N, device="meta")
        post_pre(residual[:, 0].contiguous(), residual, mixes[:, 0].contiguous(), mixes, *gates,
                 layer_norm_weight=norm)  # fmt: skip

    assert names(_warm_up._asked_for(call, 4)) == {"few_project", "few_pre"}
