"""More than 2**31 elements in a stream tensor: every offset has to be 64 bits wide.

The reference sees slices only: the first tokens, those around element 2**31, and the last.
Upstream gradients are zero outside the slices, so that sums over tokens need nothing else.
"""

import pytest
import torch

import oracle
from cases import AGGREGATE, EXPAND, FUSED_PRE, PARAMETERS, POST, PROJECTION, recompute_inputs
from tile_mhc import recompute, reference

NUM_STREAMS, HIDDEN_SIZE = 4, 7168
NUM_TOKENS = 80_000
BORDER = 2**31 // (NUM_STREAMS * HIDDEN_SIZE)
SLICES = (slice(0, 32), slice(BORDER - 16, BORDER + 16), slice(NUM_TOKENS - 32, NUM_TOKENS))
PER_TOKEN = ("hidden", "layer_output", "residual", "pre_mix", "post_mix", "comb_mix", "logits")


@pytest.fixture(autouse=True)
def release_memory():
    yield
    torch.cuda.empty_cache()


def sampled(tensor):
    return torch.cat([tensor[s] for s in SLICES])


@pytest.mark.parametrize("op", [EXPAND, AGGREGATE, POST, PROJECTION, FUSED_PRE], ids=str)
def test_beyond_32_bits(op):
    assert NUM_TOKENS * NUM_STREAMS * HIDDEN_SIZE > 2**31
    tensors, options = op.inputs((NUM_TOKENS,), NUM_STREAMS, HIDDEN_SIZE, "cuda")
    small = {n: sampled(t) if n in PER_TOKEN else t for n, t in tensors.items()}
    small_grads = oracle.upstream_of(op, small, options)
    grads = [grad.new_zeros(NUM_TOKENS, *grad.shape[1:]) for grad in small_grads]
    for grad, small_grad in zip(grads, small_grads, strict=True):
        for position, where in enumerate(SLICES):
            grad[where] = small_grad[32 * position : 32 * (position + 1)]
    ours = oracle.evaluate(op.run, tensors, options, grads, op.outputs)
    ours = {
        name: value if name.removeprefix("grad_") in PARAMETERS else sampled(value)
        for name, value in ours.items()
    }
    plain = oracle.evaluate(op.reference, small, options, small_grads, op.outputs)
    truth, terms = oracle.terms_of(op, small, options, small_grads)
    for name, value in ours.items():
        arguments = value, plain[name], truth[name], {}, terms.get(name)
        oracle.check_tensor(op.name, name, *arguments)


def test_recompute_beyond_32_bits():
    initial, *groups = recompute_inputs(1, 1, (NUM_TOKENS,), NUM_STREAMS, HIDDEN_SIZE, "cuda")
    layer_inputs, residuals = recompute(initial, *groups)
    small = [sampled(initial), *([sampled(t) for t in group] for group in groups)]
    wide = [small[0].double(), *([t.double() for t in group] for group in small[1:])]
    plain, truth = reference.recompute(*small), reference.recompute(*wide)
    for ours, others, exact in zip((layer_inputs, residuals), plain, truth, strict=True):
        oracle.check_tensor("recompute", "out", sampled(ours[0]), others[0], exact[0], {})
