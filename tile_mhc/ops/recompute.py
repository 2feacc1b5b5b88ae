"""Replay the aggregates and posts of many sub-layers in one pass, for checkpointing."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tile_mhc import _device, _guards, errors, jit, reference
from tile_mhc.kernels._shapes import TABLE_SLOTS
from tile_mhc.ops import _flops
from tile_mhc.ops._library import aligned, dtypes, register
from tile_mhc.ops.aggregate import check_mix


def recompute(
    initial_residual: Tensor,
    pre_mixes: Sequence[Tensor],
    layer_outputs: Sequence[Tensor],
    post_mixes: Sequence[Tensor],
    comb_mixes: Sequence[Tensor],
    *,
    layer_inputs: Sequence[Tensor] | None = None,
    residuals: Sequence[Tensor] | None = None,
    layer_norm_weights: Sequence[Tensor] | None = None,
    layer_norm_eps: float = 1e-6,
) -> tuple[list[Tensor], list[Tensor]]:
    """Recompute every layer input and residual of a group of sub-layers from its first residual.

    x_0 = initial_residual;  layer_inputs[l] = aggregate(x_l, pre_mixes[l])
    residuals[l] = x_{l+1} = post(layer_outputs[l], x_l, post_mixes[l], comb_mixes[l])

    The residual stays in registers from layer to layer (rounded as memory would round
    it), so each tensor is read or written once. Bitwise equal to the separate ops. One
    kernel serves any number of layers.

    In DeepSeek-V4.1 a layer input is read by the pre_mix that the sub-layer before has made, and
    the first by one that is given: those are its `pre_mixes`, each beside the streams that it is
    for.

    With `layer_norm_weights` the layer inputs are written as the layers' own norms make them, by a
    kernel for each behind the replay:

    layer_inputs[l] = layer_input * rsqrt(mean(layer_input**2) + layer_norm_eps)
                      * layer_norm_weights[l]

    Args:
        initial_residual: (..., n, H) bfloat16, float16 or float32, contiguous; n in 2, 4, 8; H up
            to 16384. The other streams have its dtype.
        pre_mixes: L tensors (..., n) or (..., n, 1) float32, contiguous.
        layer_outputs: P tensors (..., H), contiguous; P is L or L - 1.
        post_mixes: P tensors (..., n) or (..., n, 1) float32, contiguous.
        comb_mixes: P tensors (..., n, n) float32, contiguous.
        layer_inputs: optional L destinations (..., H).
        residuals: optional P destinations (..., n, H).
        layer_norm_weights: optional L tensors (H,) float32 or bfloat16, of RMS norms of the layer
            inputs; all of one dtype.
        layer_norm_eps: added to the mean square of those norms.

    Returns:
        layer_inputs and residuals. The replay has no gradient of its own.

    Raises:
        ShapeError: a length, shape, dtype, device or layout does not match, or a destination
            shares memory with an input or another destination.
        UnsupportedError: n or H has no kernel.

    Source: mHC paper (arXiv 2512.24880), sec. 4.3.2; TileKernels
    `mhc/multilayer_recompute_kernel.py`.
    """
    op = "recompute"
    num_streams, hidden_size = errors.check_streams(op, "initial_residual", initial_residual)
    for name, given in (
        ("pre_mixes", pre_mixes),
        ("layer_outputs", layer_outputs),
        ("post_mixes", post_mixes),
        ("comb_mixes", comb_mixes),
        ("layer_inputs", () if layer_inputs is None else layer_inputs),
        ("residuals", () if residuals is None else residuals),
        ("layer_norm_weights", () if layer_norm_weights is None else layer_norm_weights),
    ):
        if not isinstance(given, list | tuple):
            raise errors.ShapeError(
                f"{op}: {name} must be a list of tensors; got {errors.describe(given)}"
            )
    layers, posts = len(pre_mixes), len(layer_outputs)
    if layers < 1 or posts not in (layers - 1, layers):
        raise errors.ShapeError(
            f"{op}: layer_outputs must hold as many tensors as pre_mixes, or one less, and "
            f"pre_mixes at least one; got {layers} pre_mixes and {posts} layer_outputs"
        )
    lead = initial_residual.shape[:-2]
    if layer_inputs is None:
        shape = (*lead, hidden_size)
        layer_inputs = [initial_residual.new_empty(shape) for _ in range(layers)]
    if residuals is None:
        shape = initial_residual.shape
        residuals = [initial_residual.new_empty(shape) for _ in range(posts)]
    groups = {
        "post_mixes": (post_mixes, posts),
        "comb_mixes": (comb_mixes, posts),
        "layer_inputs": (layer_inputs, layers),
        "residuals": (residuals, posts),
    }
    if layer_norm_weights is not None:
        groups["layer_norm_weights"] = (layer_norm_weights, layers)
    for name, (tensors, count) in groups.items():
        if len(tensors) != count:
            raise errors.ShapeError(f"{op}: {name} must hold {count} tensors; got {len(tensors)}")
    like = ("initial_residual", initial_residual)
    dtype = initial_residual.dtype
    _check_all("layer_outputs", layer_outputs, (*lead, hidden_size), dtype, like)
    _check_all("layer_inputs", layer_inputs, (*lead, hidden_size), dtype, like)
    _check_all("residuals", residuals, initial_residual.shape, dtype, like)
    comb_shape = (*lead, num_streams, num_streams)
    _check_all("comb_mixes", comb_mixes, comb_shape, torch.float32, like)
    for name, mixes in (("pre_mixes", pre_mixes), ("post_mixes", post_mixes)):
        for index, mix in enumerate(mixes):
            check_mix(op, f"{name}[{index}]", mix, like)
            errors.check_contiguous(op, f"{name}[{index}]", mix)
    norms = [] if layer_norm_weights is None else list(layer_norm_weights)
    _check_norms(norms, layer_norm_eps, like)
    inputs = [initial_residual, *pre_mixes, *layer_outputs, *post_mixes, *comb_mixes, *norms]
    check_destinations([*layer_inputs, *residuals], inputs)
    _recompute(
        initial_residual,
        list(pre_mixes),
        list(layer_outputs),
        list(post_mixes),
        list(comb_mixes),
        list(layer_inputs),
        list(residuals),
        norms,
        layer_norm_eps,
    )
    return list(layer_inputs), list(residuals)


def launch(
    initial_residual: Tensor,
    pre_mixes: list[Tensor],
    layer_outputs: list[Tensor],
    post_mixes: list[Tensor],
    comb_mixes: list[Tensor],
    layer_inputs: list[Tensor],
    residuals: list[Tensor],
    layer_norm_weights: Sequence[Tensor] = (),
    layer_norm_eps: float = 0.0,
) -> None:
    """Write the layer inputs and residuals. Without a check, and on the current device."""
    lists = pre_mixes, layer_outputs, post_mixes, comb_mixes, layer_inputs, residuals
    call = _cuda if _is_unseen(initial_residual) else _recompute
    call(initial_residual, *lists, list(layer_norm_weights), layer_norm_eps)


def _is_unseen(streams: Tensor) -> bool:
    """Whether a launcher may be called past the dispatcher, which takes most of the host's time.

    The streams are on the current device, and no tensor is misaligned.
    """
    return (
        streams.is_cuda
        and not _guards.is_watched()
        and _device.limits_of(streams.get_device()) is not None
    )


def _check_norms(weights: Sequence[Tensor], eps: float, like: tuple[str, Tensor]) -> None:
    dtypes_allowed: tuple[torch.dtype, ...] = errors.PARAMETERS
    for index, weight in enumerate(weights):
        name = f"layer_norm_weights[{index}]"
        errors.check_tensor("recompute", name, weight, [like[1].shape[-1:]], dtypes_allowed, like)
        dtypes_allowed = (weight.dtype,)
    errors.check_number("recompute", "layer_norm_eps", eps)


def _check_all(
    name: str,
    tensors: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    like: tuple[str, Tensor],
) -> None:
    for index, tensor in enumerate(tensors):
        errors.check_tensor("recompute", f"{name}[{index}]", tensor, [shape], dtype, like)
        errors.check_contiguous("recompute", f"{name}[{index}]", tensor)
        # One access moves up to 16 bytes of a stream, as its rows allow, or a row of a comb.
        alignment = math.gcd(errors.STREAM_ALIGNMENT, shape[-1] * dtype.itemsize)
        errors.check_aligned("recompute", f"{name}[{index}]", tensor, alignment)


def check_destinations(destinations: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """All spans of memory in one sorted pass: no destination may meet anything."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in destinations):
        raise errors.ShapeError(
            "recompute: a destination must not require grad (torch.no_grad() allows it); got one "
            "that does"
        )
    spans = []
    for tensors, is_destination in ((destinations, True), (inputs, False)):
        for tensor in filter(errors.has_memory, tensors):
            start = tensor.data_ptr()
            spans.append((start, start + tensor.numel() * tensor.element_size(), is_destination))
    spans.sort()
    end, end_is_destination = 0, False
    for start, stop, is_destination in spans:
        if start < end and (is_destination or end_is_destination):
            raise errors.ShapeError(
                "recompute: a destination must not share memory with an input or another "
                "destination; got overlapping tensors"
            )
        if stop > end:
            end, end_is_destination = stop, is_destination


def _cuda(
    initial_residual: Tensor,
    pre_mixes: list[Tensor],
    layer_outputs: list[Tensor],
    post_mixes: list[Tensor],
    comb_mixes: list[Tensor],
    layer_inputs: list[Tensor],
    residuals: list[Tensor],
    layer_norm_weights: Sequence[Tensor] = (),
    layer_norm_eps: float = 0.0,
) -> None:
    if initial_residual.numel() == 0:
        return
    n, hidden_size = initial_residual.shape[-2:]
    layers, posts = len(pre_mixes), len(layer_outputs)
    # One row per layer: the six addresses that layer needs. The missing post of a last layer is 0.
    table = initial_residual.new_empty(layers, 6, dtype=torch.int64)
    columns = (pre_mixes, layer_inputs, layer_outputs, post_mixes, comb_mixes, residuals)
    addresses = [
        column[layer].data_ptr() if layer < len(column) else 0
        for layer in range(layers)
        for column in columns
    ]
    _write_table(addresses, table.view(-1))
    given = dtypes(streams=initial_residual.dtype)
    kernel = jit.kernel("recompute", n, hidden_size, *given)
    kernel(initial_residual.view(-1, n, hidden_size), table, posts)
    for layer_input, weight in zip(layer_inputs, layer_norm_weights, strict=False):
        weight = aligned("recompute", "layer_norm_weights", weight.contiguous())
        norm_dtypes = dtypes(streams=layer_input.dtype, layer_norm=weight.dtype)
        jit.kernel("input_norm", hidden_size, *norm_dtypes)(
            layer_input.view(-1, hidden_size), weight, layer_norm_eps
        )
    # Autograd cannot see that a kernel writes: who has saved a destination is to know of it.
    written = [tensor for tensor in (*layer_inputs, *residuals) if not tensor.is_inference()]
    torch.autograd.graph.increment_version(written)


def pre_mixes(
    initial_residual: Tensor,
    mixes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    pre_eps: float,
) -> Tensor:
    """The pre_mixes of `split_mixes` of many sub-layers, by one launch. Without a check, and on
    the current device.

    Args:
        initial_residual: (..., n, H), of which the shape counts.
        mixes: L tensors (..., n*(n+2)) float32, contiguous.
        scales: L tensors (3,), all of one dtype.
        biases: L tensors (n*(n+2),), all of one dtype.
        pre_eps: added to each.

    Returns:
        (L, ..., n) float32, contiguous.
    """
    call = _gates_cuda if _is_unseen(initial_residual) else _gates
    return call(initial_residual, mixes, scales, biases, pre_eps)


def _gates_fake(
    initial_residual: Tensor,
    mixes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    pre_eps: float,
) -> Tensor:
    return mixes[0].new_empty(len(mixes), *initial_residual.shape[:-1])


def _gates_cuda(
    initial_residual: Tensor,
    mixes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    pre_eps: float,
) -> Tensor:
    out = _gates_fake(initial_residual, mixes, scales, biases, pre_eps)
    if out.numel():
        scales = [scale.contiguous() for scale in scales]
        biases = [bias.contiguous() for bias in biases]
        table = out.new_empty(len(mixes), 3, dtype=torch.int64)
        rows = zip(mixes, scales, biases, strict=True)
        _write_table([tensor.data_ptr() for row in rows for tensor in row], table.view(-1))
        given = dtypes(scale=scales[0].dtype, bias=biases[0].dtype)
        n = out.shape[-1]
        jit.kernel("recompute_gates", n, *given)(table, out.view(len(mixes), -1, n), pre_eps)
    return out


def _gates_cpu(
    initial_residual: Tensor,
    mixes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    pre_eps: float,
) -> Tensor:
    n = initial_residual.shape[-2]
    rows = zip(mixes, scales, biases, strict=True)
    return torch.stack(
        [reference.split_mixes(*row, num_streams=n, pre_eps=pre_eps)[0] for row in rows]
    )


def _write_table(addresses: list[int], table: Tensor) -> None:
    """Hand addresses to the device as kernel arguments: no pinned memory, no copy to wait for, and
    a CUDA graph keeps them."""
    kernel = jit.kernel("recompute_table", TABLE_SLOTS)
    for start in range(0, len(addresses), TABLE_SLOTS):
        chunk = addresses[start : start + TABLE_SLOTS]
        kernel(table, start, *chunk, *[0] * (TABLE_SLOTS - len(chunk)))


def _cpu(
    initial_residual: Tensor,
    pre_mixes: list[Tensor],
    layer_outputs: list[Tensor],
    post_mixes: list[Tensor],
    comb_mixes: list[Tensor],
    layer_inputs: list[Tensor],
    residuals: list[Tensor],
    layer_norm_weights: Sequence[Tensor],
    layer_norm_eps: float,
) -> None:
    results = reference.recompute(
        initial_residual,
        pre_mixes,
        layer_outputs,
        post_mixes,
        comb_mixes,
        layer_norm_weights=list(layer_norm_weights) or None,
        layer_norm_eps=layer_norm_eps,
    )
    for destinations, sources in zip((layer_inputs, residuals), results, strict=True):
        for destination, source in zip(destinations, sources, strict=True):
            destination.copy_(source)


_recompute = register(
    "recompute(Tensor initial_residual, Tensor[] pre_mixes, Tensor[] layer_outputs, "
    "Tensor[] post_mixes, Tensor[] comb_mixes, Tensor(a!)[] layer_inputs, "
    "Tensor(b!)[] residuals, Tensor[] layer_norm_weights, float layer_norm_eps) -> ()",
    cuda=_cuda,
    cpu=_cpu,
    fake=lambda *args: None,
    flops=_flops.recompute,
)
_gates = register(
    "recompute_gates(Tensor initial_residual, Tensor[] mixes, Tensor[] scales, Tensor[] biases, "
    "float pre_eps) -> Tensor",
    cuda=_gates_cuda,
    cpu=_gates_cpu,
    fake=_gates_fake,
    flops=_flops.pointwise,
)
