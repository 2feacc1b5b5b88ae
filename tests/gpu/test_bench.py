"""The benchmark's clock and its command on a GPU; the figures themselves are no test's business."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")

from tile_mhc.bench import ops
from tile_mhc.bench.inputs import make_inputs
from tile_mhc.bench.measuring import measure
from tile_mhc.bench.timing import Clock
from tile_mhc.cli import main


@pytest.fixture(scope="module", params=[("inside", "copy"), ("around", "copy"), ("inside", "read")])
def clock(request):
    return Clock(torch.device("cuda", torch.cuda.current_device()), *request.param)


def test_what_takes_longer_measures_longer(clock):
    # Ten million cycles take 3333 us at 3 GHz. Other tests may share the GPU: no bound above.
    nothing, long = (
        clock.time_alone(lambda cycles=cycles: torch.cuda._sleep(cycles)).lower
        for cycles in (0, 10**7)
    )
    assert 0 < nothing < 3333 < long


def test_copy_bandwidth_is_that_of_a_memory(clock):
    assert 1e5 < clock.copy_bandwidth() < 3e7  # 100 GB/s to 30 TB/s


def test_host_time_is_not_the_device_time(clock):
    with clock.running():
        (host,) = clock.time_host([lambda: torch.cuda._sleep(10**7)])
    device = clock.time_alone(lambda: torch.cuda._sleep(10**7))
    assert 0 < host.median < device.median / 10


def test_a_backward_is_captured_whose_forward_was_not(clock):
    """On two streams the capture fails, as autograd runs a backward where its forward ran."""
    with clock.running():
        leaf = torch.ones(1000, device="cuda", requires_grad=True)
        out = (leaf * leaf).sum()

        def backward():
            return torch.autograd.grad(out, [leaf], retain_graph=True)

        backward()
        graph = clock.capture(backward)
        graph.outputs[0].zero_()
        graph.replay()
        assert torch.equal(graph.outputs[0], torch.full_like(leaf, 2.0))


def test_inside_is_what_this_torch_offers():
    assert Clock(torch.device("cuda", torch.cuda.current_device())).events == "inside"


@pytest.mark.parametrize(
    "name",
    [
        "post.fwd",
        "projection.bwd_add",
        "fused_pre.bwd_add",
        "sub_layer.fwd+bwd",
        "stack_delayed.fwd+bwd",
        "post_pre_norm_separate.fwd",
    ],
)
def test_ours_is_timed_and_what_is_wrong_is_not(name, clock):
    op = {op.name: op for op in ops.make_ops()}[name]
    with clock.running():
        x = make_inputs(37, 128, 4, clock.device)
        ours, theirs = measure(op, x, clock)
        assert theirs is None
        assert ours.problem is None
        assert 0 < ours.device.lower <= ours.us <= ours.device.upper
        assert ours.host_us > 0
        wrong = dataclasses.replace(op, truth=lambda x: [2 * out for out in op.truth(x)])
        refused, _ = measure(wrong, x, clock)
    assert refused.us is None
    assert refused.problem.startswith("WrongResultError: output 0, tokens from 0: ")


def test_the_command(capsys, tmp_path):
    file = tmp_path / "bench.jsonl"
    arguments = ["expand", "--shapes", "37x128,16x64", "--streams", "2,4"]
    assert main(["bench", *arguments, "--record", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = [(row["op"], *row["shape"].values()) for row in report["results"]]
    assert rows == [
        (f"expand.{way}", *shape, n)
        for n in (2, 4)
        for shape in ((37, 128), (16, 64))
        for way in ("fwd", "bwd")
    ]
    assert report["empty_us"] > 0
    assert len(file.read_text().splitlines()) == len(rows)
    assert main(["bench", *arguments]) == 0
    assert "empty kernel" in capsys.readouterr().out
