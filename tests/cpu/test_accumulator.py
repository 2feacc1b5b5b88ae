"""GradAccumulator: which gradient comes out, whatever reads the residual, and what is refused."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import oracle
import tile_mhc
from accumulation import ORDERS, ROUNDED_ONCE, SUB_LAYER, Readers, chain, rounding_of
from tile_mhc import AccumulatorError, GradAccumulator, ShapeError, UnsupportedError

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPE = (5, 4, 64, "cpu")
SIZE = 5 * 4 * 64


def readers(names=SUB_LAYER):
    return Readers(names, *SHAPE)


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_any_subset_in_any_order(names):
    """Rounded once: as near float64 as its rounding. Every other gradient has the same bits."""
    case = readers(names)
    plain = case.gradients()
    accumulator = GradAccumulator(case.residual)
    found = case.gradients(grad_accumulator=accumulator)
    truth = case.truth()
    residual = found.pop("residual")
    assert residual.dtype == torch.bfloat16
    assert oracle.relative_error(residual, truth) <= ROUNDED_ONCE * rounding_of(truth)
    del plain["residual"]
    oracle.check_same_bits(plain, found, "with an accumulator:")
    assert not accumulator.holds


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_bfloat16_rounds_at_each_addition(names):
    """What autograd does with the same gradients: no worse than that."""
    case = readers(names)
    truth = case.truth()
    plain = case.gradients()["residual"]
    found = case.gradients(grad_accumulator=GradAccumulator(case.residual, torch.bfloat16))
    error = oracle.relative_error(found["residual"], truth)
    assert error <= ROUNDED_ONCE * max(oracle.relative_error(plain, truth), rounding_of(truth))


def test_float32_buffer_is_better_than_autograd():
    case = readers()
    truth = case.truth()
    plain = case.gradients()["residual"]
    assert oracle.relative_error(plain, truth) > 1.3 * rounding_of(truth), "or there is no point"


def test_where_the_residual_needs_no_gradient():
    case = readers()
    residual = case.residual.detach()
    outputs = case.outputs(residual, grad_accumulator=GradAccumulator(residual))
    torch.autograd.backward(outputs, case.upstream)
    case.residual.requires_grad_(False)
    expected = [out.detach() for out in case.outputs(residual)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_without_gradients():
    case = readers()
    with torch.no_grad():
        outputs = case.outputs(case.residual, grad_accumulator=GradAccumulator(case.residual))
    assert not any(out.requires_grad for out in outputs)


@DTYPES
def test_other_consumers(dtype):
    """Of the residual, of the view, before and after the ops, and one that gives no gradient."""
    case = readers()
    accumulator = GradAccumulator(case.residual, dtype)
    first = (case.residual.float() * 2).sum() + (accumulator.residual.float() * 4).sum()
    outputs = case.outputs(case.residual, grad_accumulator=accumulator)
    last = (accumulator.residual.float().square() * 8).sum() + case.residual.detach().sum()
    case.upstream += [torch.ones(()), torch.ones(())]
    found = case.gradients_of([*outputs, first, last])["residual"]
    case.upstream = case.upstream[:-2]
    truth = case.truth(lambda x: 6 * x.sum() + 8 * x.square().sum())
    # Those of the residual itself, and each part of the view's, autograd rounds on their way.
    assert oracle.relative_error(found, truth) <= 2 * rounding_of(truth)


def test_consumers_of_the_view_join_before_the_rounding():
    case = readers()
    accumulator = GradAccumulator(case.residual)
    outputs = case.outputs(case.residual, grad_accumulator=accumulator)
    extra = torch.randn_like(case.residual)
    case.upstream.append(torch.ones(()))
    # Exact in bfloat16: its only rounding is that of the sum.
    found = case.gradients_of([*outputs, (accumulator.residual * extra).sum()])["residual"]
    case.upstream.pop()
    truth = case.truth() + extra.double()
    assert oracle.relative_error(found, truth) <= ROUNDED_ONCE * rounding_of(truth)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_unused_outputs(used):
    case = readers()
    outputs = case.outputs(case.residual, grad_accumulator=GradAccumulator(case.residual))
    upstream = [case.upstream[i] for i in used]
    (found,) = torch.autograd.grad([outputs[i] for i in used], case.residual, upstream)
    plain = case.outputs(case.residual)
    (expected,) = torch.autograd.grad([plain[i] for i in used], case.residual, upstream)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


@DTYPES
def test_backward_twice(dtype):
    case = readers()
    outputs = case.outputs(case.residual, grad_accumulator=GradAccumulator(case.residual, dtype))
    first = case.gradients_of(outputs, retain_graph=True)
    second = case.gradients_of(outputs)
    oracle.check_same_bits(first, second, "the second time:")


def test_backward_for_other_tensors_leaves_nothing_behind():
    case = readers()
    accumulator = GradAccumulator(case.residual)
    outputs = case.outputs(case.residual, grad_accumulator=accumulator)
    mix = case.inputs["aggregate"]["pre_mix"]
    torch.autograd.grad(outputs, mix, case.upstream, retain_graph=True)
    torch.autograd.backward(outputs, case.upstream, inputs=[mix], retain_graph=True)
    assert not accumulator.holds
    oracle.check_same_bits(
        case.gradients_of(outputs),
        case.gradients(grad_accumulator=GradAccumulator(case.residual)),
        "after a backward for others:",
    )


def test_gradient_of_the_view_itself():
    case = readers()
    accumulator = GradAccumulator(case.residual)
    outputs = case.outputs(case.residual, grad_accumulator=accumulator)
    more, view = accumulator.residual * 3, accumulator.residual
    upstream = [*case.upstream, torch.ones_like(more)]
    (found,) = torch.autograd.grad([*outputs, more], view, upstream, retain_graph=True)
    assert (found == 3).all(), "that of its own consumers"
    assert not accumulator.holds
    assert torch.autograd.grad(outputs, view, case.upstream, allow_unused=True) == (None,)
    assert not accumulator.holds


def test_residual_that_others_made():
    """Not a leaf: the gradient goes on, and hooks on the residual see all of it."""
    case = readers()
    source = case.residual.detach().requires_grad_()
    residual = source * 2
    seen = []
    residual.register_hook(seen.append)
    outputs = case.outputs(residual, grad_accumulator=GradAccumulator(residual))
    torch.autograd.backward(outputs, case.upstream)
    assert torch.equal(source.grad, seen[0] * 2)


def layers(depth, shape=SHAPE):
    """Sub-layers after one another, each with its own parameters."""
    return [Readers(SUB_LAYER, *shape) for _ in range(depth)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_buffer_for_every_layer(dtype):
    """And what it returns is never the buffer: that is written again by the layer before."""
    stack = layers(4)
    buffer = torch.full((SIZE,), torch.nan, dtype=dtype)
    residual = stack[0].residual
    shared = chain(stack, residual, lambda r: GradAccumulator(r, dtype, buffer))
    own = chain(stack, residual, lambda r: GradAccumulator(r, dtype))
    upstream = torch.randn_like(shared)
    (found,) = torch.autograd.grad(shared, residual, upstream)
    (expected,) = torch.autograd.grad(own, residual, upstream)
    assert torch.equal(found, expected)
    before = found.clone()
    buffer.fill_(7)
    assert torch.equal(found, before)


def test_one_accumulator_for_two_layers_is_refused():
    case = readers()
    accumulator = GradAccumulator(case.residual)
    out = case.outputs(case.residual, grad_accumulator=accumulator)[-1]
    with pytest.raises(ShapeError, match=r"post: residual must be the tensor that grad_accumula"):
        tile_mhc.post(residual=out, **case.inputs["post"], grad_accumulator=accumulator)


@pytest.mark.parametrize("overlap", ["all", "half"])
def test_one_buffer_for_two_residuals_at_a_time(overlap):
    """Two residuals whose readers alternate, as a model and its multi-token prediction."""
    first, second = readers(("aggregate",)), readers(("aggregate",))
    memory = torch.zeros(2 * SIZE)
    start = 0 if overlap == "all" else SIZE // 2
    accumulators = [
        GradAccumulator(first.residual, buffer=memory[:SIZE]),
        GradAccumulator(second.residual, buffer=memory[start : start + SIZE]),
    ]
    both = [
        case.outputs(case.residual, grad_accumulator=accumulator)[0]
        for case, accumulator in zip((first, second), accumulators, strict=True)
    ]
    # One more reader of each, which runs last: both sums are waited for.
    more = [
        tile_mhc.aggregate(a.residual, c.inputs["aggregate"]["pre_mix"], grad_accumulator=a)
        for c, a in zip((first, second), accumulators, strict=True)
    ]
    loss = sum(out.float().sum() for out in (*more, *both))
    message = "aggregate: grad_accumulator must have its buffer to itself"
    with pytest.raises(AccumulatorError, match=message):
        loss.backward()
    for accumulator in accumulators:
        accumulator.reset()


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("in the middle of a backward")


@pytest.mark.parametrize("given", [True, False], ids=["buffer", "own"])
def test_after_a_backward_that_failed(given):
    case = readers(("projection", "aggregate"))
    buffer = torch.empty(SIZE) if given else None
    accumulator = GradAccumulator(case.residual, buffer=buffer)
    options = {"residual": case.residual, "grad_accumulator": accumulator}
    first = tile_mhc.projection(**case.inputs["projection"], **options)
    failing = Fails.apply(first)
    last = tile_mhc.aggregate(**case.inputs["aggregate"], **options)
    with pytest.raises(ArithmeticError):
        # The later op's backward runs first.
        torch.autograd.backward([failing, last], case.upstream, retain_graph=True)
    assert accumulator.holds
    held = accumulator._state.buffer.clone()
    message = r"must be empty at the start of a backward; got one.*Call its reset\(\)"
    with pytest.raises(AccumulatorError, match=r"aggregate: grad_accumulator " + message):
        torch.autograd.backward([first, last], case.upstream, retain_graph=True)
    # Also where only others have a gradient: the node that collects must not add what is held.
    with pytest.raises(AccumulatorError, match=message):
        accumulator.residual.sum().backward(retain_graph=True)
    assert torch.equal(accumulator._state.buffer, held), "never overwritten silently"
    accumulator.reset()
    found = case.gradients_of([first, last])
    expected = case.gradients(grad_accumulator=GradAccumulator(case.residual))
    oracle.check_same_bits(found, expected, "after reset:")


def test_gradient_of_the_gradient_is_refused():
    case = readers()
    accumulator = GradAccumulator(case.residual)
    outputs = case.outputs(case.residual, grad_accumulator=accumulator)
    with pytest.raises(UnsupportedError, match="post: the gradient must be taken once where"):
        case.gradients_of(outputs, create_graph=True)
    assert not accumulator.holds


def run(case, residual):
    return case.outputs(residual, grad_accumulator=GradAccumulator(residual))


def test_compiled():
    case = readers()

    def function(residual):
        return [out * 2 for out in run(case, residual * 1)]

    expected = case.gradients_of(function(case.residual))
    compiled = torch.compile(function, backend="aot_eager")
    for _ in range(2):
        oracle.check_same_bits(expected, case.gradients_of(compiled(case.residual)), "compiled:")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    case = readers()
    expected = case.gradients_of(run(case, case.residual))
    found = []
    for _ in range(2):
        residual = case.residual.detach().requires_grad_()
        outputs = checkpoint(lambda r: run(case, r), residual, use_reentrant=reentrant)
        torch.autograd.backward(outputs, case.upstream)
        found.append(residual.grad)
    assert all(torch.equal(grad, expected["residual"]) for grad in found)


def test_checkpointed_inside_an_accumulator():
    """Made outside, used by a checkpointed op and by others."""
    case = readers()
    accumulator = GradAccumulator(case.residual)

    def function(residual):
        return case.outputs(residual, grad_accumulator=accumulator)

    outputs = checkpoint(function, case.residual, use_reentrant=False)
    expected = case.gradients(grad_accumulator=GradAccumulator(case.residual))
    oracle.check_same_bits(expected, case.gradients_of(outputs), "checkpointed:")
    with pytest.raises(ShapeError, match="residual must be the tensor that grad_accumulator was"):
        torch.autograd.backward(
            checkpoint(function, case.residual, use_reentrant=True), case.upstream
        )


def test_saved_tensors_elsewhere():
    """Hooks that move what is saved, as offloading does, change nothing."""
    case = readers()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        outputs = run(case, case.residual)
    expected = case.gradients_of(run(case, case.residual))
    oracle.check_same_bits(expected, case.gradients_of(outputs), "saved elsewhere:")


def test_no_token():
    case = Readers(SUB_LAYER, 0, 4, 64, "cpu")
    found = case.gradients(grad_accumulator=GradAccumulator(case.residual))
    assert all(found[f"projection.{name}"].any() == 0 for name in ("weight", "norm_weight"))
    assert found["residual"].shape == (0, 4, 64)


def test_memory_is_given_back():
    """No cycle: graph and buffer go with the outputs, without a collector."""
    case = readers()
    accumulator = GradAccumulator(case.residual)
    outputs = case.outputs(case.residual, grad_accumulator=accumulator)
    case.gradients_of(outputs)
    assert accumulator._state.buffer is None


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


LEAF = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
MISTAKES = [
    ("a residual of two axes too few", lambda: GradAccumulator(bf16(64)), ShapeError,
     "GradAccumulator: residual must be"),
    ("dtype", lambda: GradAccumulator(LEAF, torch.float16), ShapeError,
     "GradAccumulator: dtype must be float32 or bfloat16, the residual's; got torch.float16"),
    ("too small", lambda: GradAccumulator(LEAF, buffer=torch.zeros(511)), ShapeError,
     "GradAccumulator: buffer must hold 512 elements float32 on cpu, for residual (2, 4, 64) "
     "bfloat16 on cpu; got (511,) float32 on cpu"),
    ("another dtype", lambda: GradAccumulator(LEAF, buffer=bf16(2, 4, 64)), ShapeError,
     "GradAccumulator: buffer must hold 512 elements float32 on cpu, for residual (2, 4, 64) "
     "bfloat16 on cpu; got (2, 4, 64) bfloat16 on cpu"),
    ("elsewhere", lambda: GradAccumulator(LEAF, buffer=torch.zeros(512, device="meta")), ShapeError,
     "GradAccumulator: buffer must hold 512 elements float32 on cpu, for residual (2, 4, 64) "
     "bfloat16 on cpu; got (512,) float32 on meta"),
    ("not a tensor", lambda: GradAccumulator(LEAF, buffer=3), ShapeError,
     "GradAccumulator: buffer must be a torch.Tensor; got int 3"),
    ("strided", lambda: GradAccumulator(LEAF, buffer=torch.zeros(1024)[::2]), ShapeError,
     "GradAccumulator: buffer must be contiguous, and not require grad; got (512,) float32 on cpu "
     "with strides (2,)"),
    ("a leaf", lambda: GradAccumulator(LEAF, buffer=torch.zeros(512, requires_grad=True)),
     ShapeError, "GradAccumulator: buffer must be contiguous, and not require grad; got (512,) "
     "float32 on cpu with requires_grad=True"),
    ("shifted", lambda: GradAccumulator(LEAF, buffer=torch.zeros(513)[1:]), ShapeError,
     "GradAccumulator: buffer must start at a multiple of 32 bytes"),
    ("the residual", lambda: GradAccumulator(LEAF, torch.bfloat16, LEAF), ShapeError,
     "GradAccumulator: buffer must not share memory with the residual; got one that does"),
    ("no accumulator", lambda: tile_mhc.aggregate(LEAF, torch.zeros(2, 4), grad_accumulator=1),
     ShapeError, "aggregate: grad_accumulator must be a GradAccumulator or None; got int 1"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "mistake", "exception", "message"), MISTAKES)
def test_message(what, mistake, exception, message):
    with pytest.raises(exception, match="^" + re.escape(message)):
        mistake()


def test_made_where_no_gradient_is_recorded():
    case = readers()
    with torch.no_grad():
        accumulator = GradAccumulator(case.residual)
    message = "projection: grad_accumulator must be made where gradients are recorded"
    with pytest.raises(ShapeError, match=message):
        case.outputs(case.residual, grad_accumulator=accumulator)
