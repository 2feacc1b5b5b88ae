"""TileKernels' three conventions about where a gradient goes, as identities in front of an op.

Each function returns its tensor unchanged. Only its backward differs from the identity's, so the
ops themselves stay plain.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tile_mhc import errors, main_grad
from tile_mhc._guards import transforms_active
from tile_mhc.ops._autograd import refuse_tangents, refuse_transforms
from tile_mhc.ops._library import outside_graphs

# An attribute of the residual's untyped storage: a gradient of the residual, to be added to.
POSTED = "grad_from_mhc_post"


def residual_input(op: str, residual: Tensor, *, release: bool) -> Tensor:
    """The residual; its gradient is added in place to the posted one, if backward finds one.

    The gradient that flows on is then None. `release` also takes the attribute off the storage,
    for the last op of a sub-layer's backward. Nothing is looked for under torch.compile and
    torch.func, which know no storage: there the gradient is plain autograd's.
    """
    if not _needs_grad(residual) or torch.compiler.is_compiling() or transforms_active():
        return residual
    refuse_tangents(op, (residual,))
    return _ResidualInput.apply(residual, op, release)  # type: ignore[no-any-return, no-untyped-call]


def parameter_input(op: str, name: str, parameter: Tensor) -> Tensor:
    """The parameter; its gradient is added to `parameter.main_grad`, if backward finds one.

    Under torch.compile one that carries `main_grad` breaks the graph, and one that does not, as it
    is traced, gets its gradient from autograd. So does every one under torch.func.
    """
    if not _needs_grad(parameter) or transforms_active():
        return parameter
    if torch.compiler.is_compiling() and not main_grad.takes_part(parameter):
        return parameter
    return _parameter_input(parameter, op, name)


@outside_graphs
def _parameter_input(parameter: Tensor, op: str, name: str) -> Tensor:
    refuse_tangents(op, (parameter,))
    return _ParameterInput.apply(parameter, op, name)  # type: ignore[no-any-return, no-untyped-call]


def into_out(result: Tensor, out: Tensor) -> Tensor:
    """Copy the result into `out` and return that, with the graph of the result."""
    return _IntoOut.apply(result, out)  # type: ignore[no-any-return, no-untyped-call]


def check_out(
    op: str, out: Tensor, shape: Sequence[int], inputs: Sequence[tuple[str, Tensor]]
) -> None:
    """Check a destination beside inputs that need a gradient; the first gives dtype and device."""
    refuse_transforms(op, "out")
    refuse_tangents(op, (out,))
    errors.check_tensor(op, "out", out, [shape], inputs[0][1].dtype, inputs[0])
    if out.requires_grad:
        raise errors.ShapeError(
            f"{op}: out must not require grad; got {errors.describe(out)} with requires_grad=True"
        )
    # What is not a tensor, the op itself reports.
    tensors = [(name, tensor) for name, tensor in inputs if isinstance(tensor, Tensor)]
    with torch.no_grad():
        errors.check_out(op, out, tensors)


def any_needs_grad(*tensors: object) -> bool:
    return any(_needs_grad(tensor) for tensor in tensors)


def _needs_grad(tensor: object) -> bool:
    return torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad


def _check_accumulator(op: str, name: str, accumulator: object, tensor: Tensor) -> Tensor:
    value = errors.require_tensor(op, name, accumulator)
    if value.numel() != tensor.numel() or value.device != tensor.device:
        raise errors.ShapeError(
            f"{op}: {name} must hold {tensor.numel()} elements on {tensor.device}, for a gradient "
            f"of shape {tuple(tensor.shape)}; got {errors.describe(value)}"
        )
    return value


class _ResidualInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, op: str, release: bool) -> Tensor:
        ctx.save_for_backward(residual)
        ctx.op, ctx.release = op, release
        return residual.view_as(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (residual,) = ctx.saved_tensors
        storage = residual.untyped_storage()
        if not hasattr(storage, POSTED):
            return grad, None, None
        posted = _check_accumulator(ctx.op, POSTED, getattr(storage, POSTED), residual)
        if posted.dtype != residual.dtype or not posted.is_contiguous():
            raise errors.ShapeError(
                f"{ctx.op}: {POSTED} must be contiguous {errors.dtype_name(residual.dtype)}; "
                f"got {errors.describe(posted)}"
            )
        posted.detach().view_as(residual).add_(grad.detach())
        if ctx.release:
            delattr(storage, POSTED)
        return None, None, None


class _ParameterInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, op: str, name: str) -> Tensor:
        # The Python object, not a saved tensor: main_grad is an attribute of that object.
        ctx.parameter, ctx.op, ctx.name = parameter, op, name
        ctx.is_enabled = main_grad.is_enabled()
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        parameter = ctx.parameter
        found = main_grad.locate(parameter) if ctx.is_enabled else None
        if found is None:
            main_grad.left(parameter)
            return grad, None, None
        name = f"{ctx.name}.main_grad"
        target = _check_accumulator(ctx.op, name, found, parameter).detach()
        # Not a view: main_grad may be a strided view into a bucket.
        value = grad.detach().reshape(target.shape)
        (target.add_ if main_grad.adds(parameter, target) else target.copy_)(value)
        # None, as TileKernels returns, but where Megatron's hooks wait for a gradient.
        return main_grad.finish(parameter, target, ctx.next_functions[0][0]), None, None


class _IntoOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, out: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        return out.copy_(result)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
