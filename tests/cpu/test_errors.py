"""Every `raise` of the op layer, by its message. One row a mistake."""

import ast
import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard

import fresh
import tile_mhc
from cases import (
    AGGREGATE,
    CONTRACT,
    DELAYED_PRE,
    EXPAND,
    FUSED_PRE,
    HEAD_MIX,
    IDENTITY_POST,
    IDENTITY_PRE,
    OPS,
    POST,
    POST_PRE,
    POST_PRE_DELAYED,
    PROJECTION,
    SINKHORN,
    SPLIT_MIXES,
    STREAM_MEAN,
    recompute_inputs,
)
from tile_mhc import GradAccumulator, ShapeError, UnsupportedError, config, errors

BF16, F32 = torch.bfloat16, torch.float32
T, N, H = 3, 4, 64


def bf16(*shape, device="cpu"):
    return torch.zeros(shape, dtype=BF16, device=device)


def f32(*shape, device="cpu"):
    return torch.zeros(shape, dtype=F32, device=device)


class Unprintable:
    """Such as an output of a model, whose text has the values of its tensors."""

    def __repr__(self):
        raise RuntimeError("a synchronisation")


def call(op, **changes):
    """Call an op with right arguments but for `changes`."""
    tensors, options = op.inputs((T,), N, H, "cpu")
    return op.run(**(tensors | options | changes))


def overlapping(op, name, *shape):
    """Call an op with an `out` that lies inside the memory of input `name`."""
    tensors, options = op.inputs((T,), N, H, "cpu")
    storage = torch.zeros(4 * T * N * H, dtype=BF16)
    old = tensors[name]
    tensors[name] = storage[: old.numel()].view(old.shape)
    out = storage[1 : 1 + torch.Size(shape).numel()].view(shape)
    return op.run(**tensors, **options, out=out)


def needs_grad(op, name, *shape):
    tensors, options = op.inputs((T,), N, H, "cpu")
    tensors[name].requires_grad_()
    return op.run(**tensors, **options, out=bf16(*shape))


@contextlib.contextmanager
def one_rank():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def distributed(op, name):
    with one_rank() as mesh:
        tensors, options = op.inputs((T,), N, H, "cpu")
        tensors[name] = DTensor.from_local(tensors[name], mesh)
        return op.run(**tensors, **options)


def on_another_backend():
    with FakeTensorMode():
        residual = bf16(T, N, H, device="xpu")
        return tile_mhc.aggregate(residual, f32(T, N, device="xpu"))


def recompute(index=None, value=None, **destinations):
    arguments = list(recompute_inputs(2, 1, (T,), N, H, "cpu"))
    if index is not None:
        arguments[index] = value
    return tile_mhc.recompute(*arguments, **destinations)


def recompute_overlapping():
    initial, *groups = recompute_inputs(2, 1, (T,), N, H, "cpu")
    inside = initial.view(-1)[: T * H].view(T, H)
    return tile_mhc.recompute(initial, *groups, layer_inputs=[inside, bf16(T, H)])


def recompute_into_grad():
    return recompute(layer_inputs=[bf16(T, H).requires_grad_(), bf16(T, H)])


def freed_weight():
    weight = f32(24, N * H)
    weight.untyped_storage().resize_(0)
    call(PROJECTION, weight=weight)


def gradient_of_a_gradient():
    tensors, options = SINKHORN.inputs((T,), N, H, "cpu")
    logits = tensors["logits"].requires_grad_()
    out = SINKHORN.run(**tensors, **options)
    (grad,) = torch.autograd.grad(out.square().sum(), logits, create_graph=True)
    grad.square().sum().backward()


def tangent():
    return torch.func.jvp(AGGREGATE.run, (bf16(T, N, H), f32(T, N)), (bf16(T, N, H), f32(T, N)))


def accumulator_inside_a_transform():
    residual = bf16(T, N, H).requires_grad_()
    accumulator = GradAccumulator(residual)

    def loss(pre_mix):
        return AGGREGATE.run(residual, pre_mix, grad_accumulator=accumulator).sum()

    return torch.func.grad(loss)(f32(T, N))


def out_under_vmap():
    def run(residual, pre_mix, out):
        return AGGREGATE.run(residual, pre_mix, out=out)

    return torch.vmap(run)(bf16(T, N, H), f32(T, N), bf16(T, H))


def no_sample():
    return torch.vmap(AGGREGATE.run)(bf16(0, N, H), f32(0, N))


def recompute_same_destination_twice():
    initial, *groups = recompute_inputs(2, 1, (T,), N, H, "cpu")
    same = bf16(T, H)
    return tile_mhc.recompute(initial, *groups, layer_inputs=[same, same])


# Two bytes past the start of an allocation, and four.
SHIFTED = bf16(T * H + 1)[1:].view(T, H)
SHIFTED_COMB = f32(T * N * N + 1)[1:].view(T, N, N)
STRIDED = bf16(N, T, H).transpose(0, 1)


# (what is wrong, the call, the exception, its message)
def second_gradient_of_an_accumulator():
    residual = bf16(T, N, H).requires_grad_()
    out = call(AGGREGATE, residual=residual, grad_accumulator=GradAccumulator(residual))
    torch.autograd.grad(out.sum(), residual, create_graph=True)


PLAIN = (
    "must be a plain tensor, such as to_local() gives, or a parameter of a module that is gathered "
    "(an FSDP unit of its own; register_fsdp_forward_method for methods other than forward)"
)
MISTAKES = [
    # A tensor is not a tensor, or has another dtype, shape, device, layout.
    ("a list", lambda: call(AGGREGATE, residual=[1.0]), ShapeError,
     "aggregate: residual must be a torch.Tensor; got list [1.0]"),
    ("None", lambda: call(POST, comb_mix=None), ShapeError,
     "post: comb_mix must be a torch.Tensor; got None"),
    ("integer streams", lambda: call(AGGREGATE, residual=bf16(T, N, H).int()), ShapeError,
     "aggregate: residual must be (..., n, H) bfloat16, float16 or float32; got (3, 4, 64) int32 "
     "on cpu"),
    ("float64 streams", lambda: call(POST, residual=f32(T, N, H).double()), UnsupportedError,
     "post: residual must be (..., n, H) bfloat16, float16 or float32; got (3, 4, 64) float64 on "
     "cpu"),
    ("output of another dtype", lambda: call(POST, layer_output=f32(T, H)), ShapeError,
     "post: layer_output must be (3, 64) bfloat16 to match residual (3, 4, 64) bfloat16 on cpu; "
     "got (3, 64) float32 on cpu"),
    ("float16 weight", lambda: call(PROJECTION, weight=f32(24, N * H).half()), ShapeError,
     "projection: weight must be (24, 256) or (4, 256) float32 or bfloat16 to match residual"),
    ("float16 norm weight", lambda: call(FUSED_PRE, norm_weight=f32(N * H).half()), ShapeError,
     "fused_pre: norm_weight must be (256,) float32 or bfloat16 to match residual"),
    ("float16 scale", lambda: call(SPLIT_MIXES, scale=f32(3).half()), ShapeError,
     "split_mixes: scale must be (3,) float32 or bfloat16 to match mixes"),
    ("float16 bias", lambda: call(HEAD_MIX, bias=f32(N).half()), ShapeError,
     "head_mix: bias must be (4,) float32 or bfloat16 to match mixes"),
    ("short bias of a post", lambda: call(POST, bias=f32(H - 1)), ShapeError,
     "post: bias must be (64,) float32 or bfloat16 to match residual"),
    ("one axis", lambda: call(PROJECTION, residual=bf16(H)), ShapeError,
     "projection: residual must be (..., n, H) bfloat16, float16 or float32; got (64,) bfloat16 on "
     "cpu"),
    ("bfloat16 mix", lambda: call(AGGREGATE, pre_mix=bf16(T, N)), ShapeError,
     "aggregate: pre_mix must be (3, 4) or (3, 4, 1) float32 to match residual "
     "(3, 4, 64) bfloat16 on cpu; got (3, 4) bfloat16 on cpu"),
    ("mix of other tokens", lambda: call(POST, post_mix=f32(T + 1, N)), ShapeError,
     "post: post_mix must be (3, 4) or (3, 4, 1) float32 to match residual "
     "(3, 4, 64) bfloat16 on cpu; got (4, 4) float32 on cpu"),
    ("flat comb", lambda: call(POST, comb_mix=f32(T, N * N)), ShapeError,
     "post: comb_mix must be (3, 4, 4) float32 to match residual"),
    ("wide output", lambda: call(POST, layer_output=bf16(T, 2 * H)), ShapeError,
     "post: layer_output must be (3, 64) bfloat16 to match residual"),
    ("another device", lambda: call(AGGREGATE, pre_mix=f32(T, N, device="meta")), ShapeError,
     "aggregate: pre_mix must be on cpu, where residual is; got (3, 4) float32 on meta"),
    ("weight elsewhere", lambda: call(PROJECTION, weight=f32(24, N * H, device="meta")),
     ShapeError, "projection: weight must be on cpu, where residual is; got (24, 256)"),
    ("bias elsewhere", lambda: call(HEAD_MIX, bias=f32(N, device="meta")), ShapeError,
     "head_mix: bias must be on cpu, where mixes is; got (4,) float32 on meta"),
    ("no backend", on_another_backend, UnsupportedError,
     "aggregate: residual must be on a CUDA device or the CPU; got (3, 4, 64) bfloat16 on xpu"),
    ("strided streams", lambda: call(AGGREGATE, residual=STRIDED), ShapeError,
     "aggregate: residual must be contiguous (call .contiguous() first); got (3, 4, 64) bfloat16 "
     "on cpu with strides (64, 192, 1)"),
    ("strided output", lambda: call(POST, layer_output=bf16(H, T).mT), ShapeError,
     "post: layer_output must be contiguous (call .contiguous() first); got"),
    ("strided hidden", lambda: call(EXPAND, hidden=bf16(H, T).mT), ShapeError,
     "expand: hidden must be contiguous (call .contiguous() first); got"),
    ("sparse streams", lambda: call(AGGREGATE, residual=bf16(T, N, H).to_sparse()), ShapeError,
     "aggregate: residual must be a dense tensor; got (3, 4, 64) bfloat16 on cpu with layout "
     "sparse_coo"),
    ("sparse mix", lambda: call(POST, post_mix=f32(T, N).to_sparse()), ShapeError,
     "post: post_mix must be a dense tensor; got (3, 4) float32 on cpu with layout sparse_coo"),
    ("sharded streams", lambda: distributed(AGGREGATE, "residual"), ShapeError,
     f"aggregate: residual {PLAIN}; got a DTensor (3, 4, 64) bfloat16 on cpu"),
    # What is no tensor, without a look at what it holds.
    ("a list of streams", lambda: call(AGGREGATE, residual=[bf16(T, N, H), f32(T)] * 3),
     ShapeError, "aggregate: residual must be a torch.Tensor; got list [(3, 4, 64) bfloat16 "
     "on cpu, (3,) float32 on cpu, (3, 4, 64) bfloat16 on cpu, ... 6 in all]"),
    ("a sub-layer's tuple", lambda: call(POST, layer_output=(bf16(T, H), None, [f32(T)] * 2)),
     ShapeError, "post: layer_output must be a torch.Tensor; got tuple ((3, 64) bfloat16 on "
     "cpu, None, list of 2)"),
    ("a sub-layer's output", lambda: call(POST, layer_output={"last": bf16(T, H), "loss": 2.5}),
     ShapeError, "post: layer_output must be a torch.Tensor; got dict {'last': (3, 64) "
     "bfloat16 on cpu, 'loss': 2.5}"),
    ("no item", lambda: call(POST, layer_output=()), ShapeError,
     "post: layer_output must be a torch.Tensor; got tuple ()"),
    ("an object", lambda: call(POST, layer_output=Unprintable()), ShapeError,
     "post: layer_output must be a torch.Tensor; got Unprintable"),
    ("a long word", lambda: call(POST, layer_output="x" * 10**6), ShapeError,
     f"post: layer_output must be a torch.Tensor; got str '{'x' * 59}..."),
    ("a tensor of steps", lambda: call(SINKHORN, repeat=f32(T)), ShapeError,
     "sinkhorn: repeat must be an integer of at least 1; got (3,) float32 on cpu"),
    ("a tensor of streams", lambda: call(EXPAND, num_streams=torch.tensor(4)), UnsupportedError,
     "expand: the number of streams n must be one of (2, 4, 8); got () int64 on cpu"),
    # n and H.
    ("4.0 streams", lambda: call(SPLIT_MIXES, num_streams=4.0), UnsupportedError,
     "split_mixes: the number of streams n must be one of (2, 4, 8); got 4.0"),
    ("three streams", lambda: call(AGGREGATE, residual=bf16(T, 3, H)), UnsupportedError,
     "aggregate: the number of streams n must be one of (2, 4, 8); got 3"),
    ("one stream", lambda: call(EXPAND, num_streams=1), UnsupportedError,
     "expand: the number of streams n must be one of (2, 4, 8); got 1"),
    ("five streams", lambda: call(SPLIT_MIXES, num_streams=5), UnsupportedError,
     "split_mixes: the number of streams n must be one of (2, 4, 8); got 5"),
    ("sixteen streams", lambda: call(SINKHORN, logits=f32(T, 16, 16)), UnsupportedError,
     "sinkhorn: the number of streams n must be one of (2, 4, 8); got 16"),
    ("no H", lambda: call(EXPAND, hidden=bf16(T, 0)), UnsupportedError,
     "expand: the hidden size H must be from 1 to 16384; got 0"),
    ("wide H", lambda: call(AGGREGATE, residual=bf16(T, N, 16448)), UnsupportedError,
     "aggregate: the hidden size H must be from 1 to 16384; got 16448"),
    # What one op alone asks.
    ("float64 hidden", lambda: call(EXPAND, hidden=f32(T, H).double()), UnsupportedError,
     "expand: hidden must be (..., H) bfloat16, float16 or float32; got (3, 64) float64 on cpu"),
    ("scalar hidden", lambda: call(EXPAND, hidden=bf16()), ShapeError,
     "expand: hidden must be (..., H) bfloat16, float16 or float32; got () bfloat16 on cpu"),
    ("float64 logits", lambda: call(SINKHORN, logits=f32(T, N, N).double()), ShapeError,
     "sinkhorn: logits must be (..., n, n) float32; got (3, 4, 4) float64 on cpu"),
    ("oblong logits", lambda: call(SINKHORN, logits=f32(T, N, 2)), ShapeError,
     "sinkhorn: logits must be (..., n, n) float32; got (3, 4, 2) float32 on cpu"),
    ("no step", lambda: call(SINKHORN, repeat=0), ShapeError,
     "sinkhorn: repeat must be an integer of at least 1; got 0"),
    ("too many steps", lambda: call(SINKHORN, repeat=1025), UnsupportedError,
     "sinkhorn: repeat must be at most 1024; got 1025"),
    ("too many steps of fused_pre", lambda: call(FUSED_PRE, sinkhorn_repeat=1025),
     UnsupportedError, "fused_pre: sinkhorn_repeat must be at most 1024; got 1025"),
    ("half a step", lambda: call(SINKHORN, repeat=1.5), ShapeError,
     "sinkhorn: repeat must be an integer of at least 1; got 1.5"),
    ("True steps", lambda: call(FUSED_PRE, sinkhorn_repeat=True), ShapeError,
     "fused_pre: sinkhorn_repeat must be an integer of at least 1; got True"),
    ("no split", lambda: call(PROJECTION, num_splits=0), ShapeError,
     "projection: num_splits must be an integer of at least 1; got 0"),
    ("no split of contract", lambda: call(CONTRACT, num_splits=0), ShapeError,
     "contract: num_splits must be an integer of at least 1; got 0"),
    ("no split of fused_pre", lambda: call(FUSED_PRE, num_splits=False), ShapeError,
     "fused_pre: num_splits must be an integer of at least 1; got False"),
    ("eps of text", lambda: call(PROJECTION, norm_eps="small"), ShapeError,
     "projection: norm_eps must be a number; got str 'small'"),
    ("eps of a tensor", lambda: call(HEAD_MIX, pre_eps=f32(1)), ShapeError,
     "head_mix: pre_eps must be a number; got (1,) float32 on cpu"),
    ("eps of contract", lambda: call(CONTRACT, pre_eps="small"), ShapeError,
     "contract: pre_eps must be a number; got str 'small'"),
    ("eps of fused_pre's Sinkhorn", lambda: call(FUSED_PRE, sinkhorn_eps="small"), ShapeError,
     "fused_pre: sinkhorn_eps must be a number; got str 'small'"),
    ("tf32 of text", lambda: call(PROJECTION, tf32="yes"), ShapeError,
     "projection: tf32 must be True or False; got str 'yes'"),
    ("tf32 of contract", lambda: call(CONTRACT, tf32=None), ShapeError,
     "contract: tf32 must be True or False; got None"),
    ("tf32 of fused_pre", lambda: call(FUSED_PRE, tf32=1), ShapeError,
     "fused_pre: tf32 must be True or False; got int 1"),
    ("no mult", lambda: call(SPLIT_MIXES, post_mult=None), ShapeError,
     "split_mixes: post_mult must be a number; got None"),
    ("weight of another n", lambda: call(PROJECTION, weight=f32(25, N * H)), ShapeError,
     "projection: weight must be (24, 256) or (4, 256) float32 or bfloat16 to match residual"),
    ("weight of the head", lambda: call(FUSED_PRE, weight=f32(N, N * H)), ShapeError,
     "fused_pre: weight must be (24, 256) float32 or bfloat16 to match residual"),
    ("weight of a block", lambda: call(CONTRACT, weight=f32(24, N * H)), ShapeError,
     "contract: weight must be (4, 256) float32 or bfloat16 to match residual"),
    ("short norm weight", lambda: call(PROJECTION, norm_weight=f32(H)), ShapeError,
     "projection: norm_weight must be (256,) float32 or bfloat16 to match residual"),
    ("short mixes", lambda: call(SPLIT_MIXES, mixes=f32(T, 23)), ShapeError,
     "split_mixes: mixes must be (3, 24) float32; got (3, 23) float32 on cpu"),
    ("two scales", lambda: call(SPLIT_MIXES, scale=f32(2)), ShapeError,
     "split_mixes: scale must be (3,) float32 or bfloat16 to match mixes"),
    ("scalar head mixes", lambda: call(HEAD_MIX, mixes=f32()), ShapeError,
     "head_mix: mixes must be (..., n) float32; got () float32 on cpu"),
    ("bfloat16 head mixes", lambda: call(HEAD_MIX, mixes=bf16(T, N)), ShapeError,
     "head_mix: mixes must be (..., n) float32; got (3, 4) bfloat16 on cpu"),
    ("freed weight", freed_weight, ShapeError,
     "projection: weight must be in memory; got (24, 256) float32 on cpu, whose storage is freed."),
    # The boundary, and a pre with a pre_mix.
    ("wide pre_mix of a pre", lambda: call(DELAYED_PRE, pre_mix=f32(T, N + 1)), ShapeError,
     "fused_pre: pre_mix must be (3, 4) or (3, 4, 1) float32 to match residual"),
    ("pre_mix of a boundary", lambda: call(POST_PRE_DELAYED, pre_mix=bf16(T, N)), ShapeError,
     "post_pre: pre_mix must be (3, 4) or (3, 4, 1) float32 to match residual"),
    ("output of a boundary", lambda: call(POST_PRE, layer_output=bf16(T, 2 * H)), ShapeError,
     "post_pre: layer_output must be (3, 64) bfloat16 to match residual"),
    ("short bias of a layer", lambda: call(POST_PRE, layer_bias=f32(H - 1)), ShapeError,
     "post_pre: layer_bias must be (64,) float32 or bfloat16 to match residual"),
    ("weight of a readout", lambda: call(POST_PRE, weight=f32(N, N * H)), ShapeError,
     "post_pre: weight must be (24, 256) float32 or bfloat16 to match residual"),
    ("norm of the streams' size", lambda: call(POST_PRE, layer_norm_weight=f32(N * H)), ShapeError,
     "post_pre: layer_norm_weight must be (64,) float32 or bfloat16 to match residual"),
    ("norm of fused_pre of the streams' size",
     lambda: call(FUSED_PRE, layer_norm_weight=f32(N * H)), ShapeError,
     "fused_pre: layer_norm_weight must be (64,) float32 or bfloat16 to match residual"),
    ("eps of fused_pre's norm", lambda: call(FUSED_PRE, layer_norm_eps="small"), ShapeError,
     "fused_pre: layer_norm_eps must be a number; got str 'small'"),
    ("a gradient through fused_pre's norm",
     lambda: call(FUSED_PRE, layer_norm_weight=f32(H), scale=f32(3).requires_grad_()),
     UnsupportedError, "fused_pre: layer_norm_weight must be None when a gradient is needed; got "
     "(64,) float32 on cpu, whose norm is for inference"),
    ("eps of the layer's norm", lambda: call(POST_PRE, layer_norm_eps=None), ShapeError,
     "post_pre: layer_norm_eps must be a number; got None"),
    ("gradient of the layer's norm",
     lambda: call(POST_PRE, layer_norm_weight=f32(H), scale=f32(3).requires_grad_()),
     UnsupportedError, "post_pre: layer_norm_weight must be None when a gradient is needed; got "
     "(64,) float32 on cpu, whose norm is for inference"),
    ("no accumulator of a boundary", lambda: call(POST_PRE, grad_accumulator=1), ShapeError,
     "post_pre: grad_accumulator must be a GradAccumulator or None; got int 1"),
    # Streams that are not mixed, and their mean.
    ("weight of a mixed block", lambda: call(IDENTITY_PRE, weight=f32(24, N * H)), ShapeError,
     "identity_pre: weight must be (8, 256) float32 or bfloat16 to match residual"),
    ("three scales of two gates", lambda: call(IDENTITY_PRE, scale=f32(3)), ShapeError,
     "identity_pre: scale must be (2,) float32 or bfloat16 to match residual"),
    ("bias of one gate", lambda: call(IDENTITY_PRE, bias=f32(N)), ShapeError,
     "identity_pre: bias must be (8,) float32 or bfloat16 to match residual"),
    ("eps of a write", lambda: call(IDENTITY_PRE, post_eps="0"), ShapeError,
     "identity_pre: post_eps must be a number; got str '0'"),
    ("eps of a read", lambda: call(IDENTITY_PRE, pre_eps=True), ShapeError,
     "identity_pre: pre_eps must be a number; got bool True"),
    ("magnitude of None", lambda: call(IDENTITY_PRE, post_mult=None), ShapeError,
     "identity_pre: post_mult must be a number; got None"),
    ("passes of 1", lambda: call(IDENTITY_PRE, passes_residual=1), ShapeError,
     "identity_pre: passes_residual must be True or False; got int 1"),
    ("an accumulator of what is passed",
     lambda: call(IDENTITY_PRE, passes_residual=True, grad_accumulator=1), ShapeError,
     "identity_pre: grad_accumulator must be None with passes_residual, whose gradient this op "
     "adds itself; got int 1"),
    ("wide output of an identity", lambda: call(IDENTITY_POST, layer_output=bf16(T, 2 * H)),
     ShapeError, "identity_post: layer_output must be (3, 64) bfloat16 to match residual"),
    ("strided output of an identity", lambda: call(IDENTITY_POST, layer_output=bf16(H, T).mT),
     ShapeError, "identity_post: layer_output must be contiguous (call .contiguous() first); got"),
    ("bfloat16 write", lambda: call(IDENTITY_POST, post_mix=bf16(T, N)), ShapeError,
     "identity_post: post_mix must be (3, 4) or (3, 4, 1) float32 to match residual"),
    ("short bias of an identity", lambda: call(IDENTITY_POST, bias=f32(H - 1)), ShapeError,
     "identity_post: bias must be (64,) float32 or bfloat16 to match residual"),
    ("output of an identity needs grad",
     lambda: needs_grad(IDENTITY_POST, "layer_output", T, N, H), ShapeError,
     "identity_post: out must be None when a gradient is needed; got an out, and layer_output"),
    ("three streams of a mean", lambda: call(STREAM_MEAN, residual=bf16(T, 3, H)),
     UnsupportedError, "stream_mean: the number of streams n must be one of (2, 4, 8); got 3"),
    ("wide mean", lambda: call(STREAM_MEAN, out=bf16(T, N, H)), ShapeError,
     "stream_mean: out must be (3, 64) bfloat16 to match residual"),
    ("mean over its streams", lambda: overlapping(STREAM_MEAN, "residual", T, H), ShapeError,
     "stream_mean: out must not share memory with an input; got an out that overlaps residual"),
    # out=
    ("short out", lambda: call(AGGREGATE, out=bf16(T, N, H)), ShapeError,
     "aggregate: out must be (3, 64) bfloat16 to match residual"),
    ("float32 out", lambda: call(EXPAND, out=f32(T, N, H)), ShapeError,
     "expand: out must be (3, 4, 64) bfloat16 to match hidden"),
    ("strided out", lambda: call(POST, out=STRIDED), ShapeError,
     "post: out must be contiguous (call .contiguous() first); got"),
    ("out needs grad", lambda: call(EXPAND, out=bf16(T, N, H).requires_grad_()), ShapeError,
     "expand: out must be None when a gradient is needed; got an out, and out requires grad"),
    ("input needs grad", lambda: needs_grad(AGGREGATE, "pre_mix", T, H), ShapeError,
     "aggregate: out must be None when a gradient is needed; got an out, and pre_mix requires"),
    ("input of post needs grad", lambda: needs_grad(POST, "comb_mix", T, N, H), ShapeError,
     "post: out must be None when a gradient is needed; got an out, and comb_mix requires grad"),
    ("out in hidden", lambda: overlapping(EXPAND, "hidden", T, N, H), ShapeError,
     "expand: out must not share memory with an input; got an out that overlaps hidden"),
    ("out in residual", lambda: overlapping(AGGREGATE, "residual", T, H), ShapeError,
     "aggregate: out must not share memory with an input; got an out that overlaps residual"),
    ("out in output", lambda: overlapping(POST, "layer_output", T, N, H), ShapeError,
     "post: out must not share memory with an input; got an out that overlaps layer_output"),
    # Of a backward op.
    ("gradient of a gradient", gradient_of_a_gradient, UnsupportedError,
     "sinkhorn_backward: the gradient must be taken once; got a gradient of the gradient"),
    # Transforms of torch.func; more of them in test_transforms.py.
    ("a tangent", tangent, UnsupportedError,
     "aggregate: every input must be without a tangent, as no kernel has a forward mode; got a"),
    ("an accumulator inside", accumulator_inside_a_transform, UnsupportedError,
     "aggregate: grad_accumulator must be None inside a transform of torch.func; got one"),
    ("an out under vmap", out_under_vmap, UnsupportedError,
     "aggregate_out: must not write to a tensor that it is given under torch.vmap"),
    ("no sample", no_sample, UnsupportedError,
     "aggregate: torch.vmap must map over at least one sample; got a dimension of size 0"),
    # Destinations of gradients.
    ("no accumulator", lambda: call(POST, grad_accumulator=torch.float32), ShapeError,
     "post: grad_accumulator must be a GradAccumulator or None; got dtype torch.float32"),
    ("second gradient", second_gradient_of_an_accumulator, UnsupportedError,
     "aggregate: the gradient must be taken once where it goes into a buffer"),
    # recompute
    ("no list", lambda: recompute(1, None), ShapeError,
     "recompute: pre_mixes must be a list of tensors; got None"),
    ("a tensor of destinations", lambda: recompute(layer_inputs=bf16(2, T, H)), ShapeError,
     "recompute: layer_inputs must be a list of tensors; got (2, 3, 64) bfloat16 on cpu"),
    ("shifted output", lambda: recompute(2, [SHIFTED]), ShapeError,
     "recompute: layer_outputs[0] must start at a multiple of 16 bytes; got (3, 64) bfloat16 "
     "on cpu, 2 bytes off"),
    ("shifted comb", lambda: recompute(4, [SHIFTED_COMB]), ShapeError,
     "recompute: comb_mixes[0] must start at a multiple of 16 bytes; got (3, 4, 4) float32 "
     "on cpu, 4 bytes off"),
    ("destination needs grad", recompute_into_grad, ShapeError,
     "recompute: a destination must not require grad (torch.no_grad() allows it); got one that"),
    ("no layer", lambda: recompute(1, []), ShapeError,
     "recompute: layer_outputs must hold as many tensors as pre_mixes, or one less, and "
     "pre_mixes at least one; got 0 pre_mixes and 1 layer_outputs"),
    ("two posts short", lambda: recompute(2, []), ShapeError,
     "recompute: layer_outputs must hold as many tensors as pre_mixes, or one less"),
    ("a comb short", lambda: recompute(4, []), ShapeError,
     "recompute: comb_mixes must hold 1 tensors; got 0"),
    ("a destination short", lambda: recompute(layer_inputs=[bf16(T, H)]), ShapeError,
     "recompute: layer_inputs must hold 2 tensors; got 1"),
    ("wrong second mix", lambda: recompute(1, [f32(T, N), f32(T, 2)]), ShapeError,
     "recompute: pre_mixes[1] must be (3, 4) or (3, 4, 1) float32 to match initial_residual"),
    ("strided mix", lambda: recompute(3, [f32(N, T).mT]), ShapeError,
     "recompute: post_mixes[0] must be contiguous (call .contiguous() first); got"),
    ("strided comb", lambda: recompute(4, [f32(T, N, N).mT]), ShapeError,
     "recompute: comb_mixes[0] must be contiguous (call .contiguous() first); got"),
    ("wrong residual", lambda: recompute(residuals=[bf16(T, N, 2 * H)]), ShapeError,
     "recompute: residuals[0] must be (3, 4, 64) bfloat16 to match initial_residual"),
    ("destination in an input", recompute_overlapping, ShapeError,
     "recompute: a destination must not share memory with an input or another destination; "
     "got overlapping tensors"),
    ("a norm short", lambda: recompute(layer_norm_weights=[f32(H)]), ShapeError,
     "recompute: layer_norm_weights must hold 2 tensors; got 1"),
    ("wrong norm", lambda: recompute(layer_norm_weights=[f32(H), f32(2 * H)]), ShapeError,
     "recompute: layer_norm_weights[1] must be (64,) float32 to match initial_residual"),
    ("norms of two dtypes", lambda: recompute(layer_norm_weights=[f32(H), bf16(H)]), ShapeError,
     "recompute: layer_norm_weights[1] must be (64,) float32 to match initial_residual"),
    ("no number for a norm", lambda: recompute(layer_norm_eps="0"), ShapeError,
     "recompute: layer_norm_eps must be a number; got str '0'"),
    ("one destination twice", recompute_same_destination_twice, ShapeError,
     "recompute: a destination must not share memory with an input or another destination; "
     "got overlapping tensors"),
]  # fmt: skip
IDS = [mistake[0] for mistake in MISTAKES]


@pytest.mark.parametrize(("what", "mistake", "exception", "message"), MISTAKES, ids=IDS)
def test_message(what, mistake, exception, message):
    with pytest.raises(exception, match="^" + re.escape(message)):
        mistake()


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_op_refuses_distributed_tensors(op):
    """Each of its tensors, sharded or replicated, parameters too: torch would have no rule."""
    with one_rank() as mesh:
        tensors, options = op.inputs((T,), N, H, "cpu")
        for name, tensor in tensors.items():
            for placement in (Shard(0), Replicate()):
                value = DTensor.from_local(tensor, mesh, [placement])
                for given in (value, torch.nn.Parameter(value)):
                    with pytest.raises(ShapeError, match=re.escape(f"{name} {PLAIN}; got a DT")):
                        op.run(**tensors | {name: given}, **options)
            local = DTensor.from_local(tensor, mesh).to_local()
            op.run(**tensors | {name: local}, **options)


def test_recompute_refuses_distributed_tensors():
    arguments = recompute_inputs(2, 1, (T,), N, H, "cpu")
    with one_rank() as mesh:
        for index, argument in enumerate(arguments):
            given = list(arguments)
            if isinstance(argument, list):
                given[index] = [DTensor.from_local(tensor, mesh) for tensor in argument]
            else:
                given[index] = DTensor.from_local(argument, mesh)
            with pytest.raises(ShapeError, match=re.escape(PLAIN)):
                tile_mhc.recompute(*given)


def test_a_check_does_not_import_distributed_tensors():
    code = (
        "import sys, torch, tile_mhc\n"
        "before = 'torch.distributed.tensor' in sys.modules\n"
        "class Ours(torch.Tensor): pass\n"
        "tile_mhc.sinkhorn(torch.zeros(2, 4, 4).as_subclass(Ours))\n"
        "print('torch.distributed.tensor' in sys.modules, before)"
    )
    status, out, err = fresh.run(code)
    assert status == 0, err
    loaded, before = out.split()
    assert loaded == before


@pytest.mark.parametrize("op", OPS, ids=str)
def test_jit_trace(op):
    """Sizes are tensors then; the graph has n and H as they were, and any number of tokens."""
    tensors, options = op.inputs((T,), N, H, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        traced = torch.jit.trace(
            lambda *values: op.run(**dict(zip(tensors, values, strict=True)), **options),
            tuple(tensors.values()),
        )
    others, _ = op.inputs((2, T), N, H, "cpu")
    found, expected = traced(*others.values()), op.run(**others, **options)
    if isinstance(expected, torch.Tensor):
        found, expected = (found,), (expected,)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def trace_wrong(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(
            lambda x: tile_mhc.aggregate(x, f32(*shape[:-1])), (bf16(*shape),), check_trace=False
        )


@pytest.mark.parametrize(
    ("shape", "exception", "message"),
    [
        ((T, 3, H), UnsupportedError, "n must be one of (2, 4, 8); got 3"),
        ((T, N, 16385), UnsupportedError, "H must be from 1 to 16384; got 16385"),
        ((H,), ShapeError, "float16 or float32; got (64,) bfloat16 on cpu"),
    ],
)
def test_messages_under_jit_trace(shape, exception, message):
    with pytest.raises(exception, match=re.escape(message) + "$"):
        trace_wrong(shape)


def test_num_sms_without_a_gpu(monkeypatch):
    def no_device():
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", no_device)
    monkeypatch.setattr(config, "_num_sms", 7)
    assert config.get_num_sms() == 7
    config.set_num_sms(0)
    with pytest.raises(RuntimeError, match=r"^get_num_sms: a CUDA device must be there, or a num"):
        config.get_num_sms()
    for wrong, shown in ((1, "1"), (True, "True"), ("4", "'4'"), (f32(2), r"\(2,\) float32")):
        message = rf"^set_num_sms: num_sms must be 0 where there is no CUDA device; got {shown}"
        with pytest.raises(ValueError, match=message):
            config.set_num_sms(wrong)


def test_num_sms_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(config, "_device_num_sms", lambda index: 132)
    monkeypatch.setattr(config, "_num_sms", 0)
    assert config.get_num_sms() == 132
    config.set_num_sms(16)
    assert config.get_num_sms() == 16
    with pytest.raises(ValueError, match=r"^set_num_sms: num_sms must be from 0 to 132; got 133$"):
        config.set_num_sms(133)
    assert config.get_num_sms() == 16
    config.set_num_sms(0)
    assert config.get_num_sms() == 132


def test_batch_invariance_is_true_or_false():
    with pytest.raises(ValueError, match=r"^set_batch_invariant: enabled must be True or False;"):
        config.set_batch_invariant(1)


def test_exceptions_are_the_builtin_kinds():
    assert issubclass(ShapeError, ValueError)
    assert issubclass(UnsupportedError, NotImplementedError)


def raise_statements():
    """(file, first line, last line) of every `raise` in errors.py and the ops."""
    folder = Path(errors.__file__).parent
    for path in (folder / "errors.py", *sorted((folder / "ops").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                yield str(path), node.lineno, node.end_lineno


def test_every_raise_is_reached():
    reached = set()
    for _, mistake, exception, _ in MISTAKES:
        with pytest.raises(exception) as caught:
            mistake()
        last = caught.traceback[-1]
        reached.add((str(last.path), last.lineno + 1))
    missing = [
        f"{Path(path).name}:{first}"
        for path, first, last in raise_statements()
        if not any(path == where and first <= line <= last for where, line in reached)
    ]
    assert not missing, f"no mistake reaches {missing}"


def test_no_assert_in_the_package():
    for path in Path(errors.__file__).parent.rglob("*.py"):
        asserts = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not asserts, path
