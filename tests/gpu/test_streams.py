"""Work goes to the stream and the device of the caller."""

import pytest
import torch

import oracle
from cases import OPS, POST, recompute_inputs
from tile_mhc import recompute

SLEEP_CYCLES = 100_000_000  # some 50 ms: far longer than any launch takes


def late(function, tensors):
    """Run on a side stream whose inputs are written late; a launch elsewhere reads the NaNs."""
    late_inputs = [torch.full_like(tensor, float("nan")) for tensor in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for destination, source in zip(late_inputs, tensors, strict=True):
            destination.copy_(source)
        results = function(*late_inputs)
    torch.cuda.current_stream().wait_stream(stream)
    return results


@pytest.mark.parametrize("op", OPS, ids=str)
def test_side_stream(op):
    tensors, options = op.inputs((130,), 4, 192, "cuda")
    upstream = oracle.upstream_of(op, tensors, options)
    expected = oracle.evaluate(op.run, tensors, options, upstream, op.outputs)

    def run(*values):
        inputs = dict(zip(tensors, values, strict=False))
        return oracle.evaluate(op.run, inputs, options, values[len(tensors) :], op.outputs)

    results = late(run, [*tensors.values(), *upstream])
    oracle.check_same_bits(results, expected, f"{op.name} on a side stream:")


def test_recompute_on_a_side_stream():
    initial, *groups = recompute_inputs(3, 3, (130,), 4, 192, "cuda")
    expected = recompute(initial, *groups)
    layer_inputs, residuals = late(lambda value: recompute(value, *groups), [initial])
    for ours, other in zip(layer_inputs + residuals, expected[0] + expected[1], strict=True):
        assert torch.equal(ours, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_other_device():
    """The current device is 0; the tensors are on 1."""
    tensors, options = POST.inputs((130,), 4, 192, "cuda:0")
    upstream = oracle.upstream_of(POST, tensors, options)
    expected = oracle.evaluate(POST.run, tensors, options, upstream, POST.outputs)
    moved = {name: tensor.to("cuda:1") for name, tensor in tensors.items()}
    grads = [grad.to("cuda:1") for grad in upstream]
    ours = oracle.evaluate(POST.run, moved, options, grads, POST.outputs)
    back = {name: tensor.to("cuda:0") for name, tensor in ours.items()}
    oracle.check_same_bits(back, expected, "post on another device:")
