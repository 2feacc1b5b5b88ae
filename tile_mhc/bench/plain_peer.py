"""TileKernels 2.1.0 beside our ops: plain functions that write into tensors which they are given.

It has no autograd, no projection and no main_grad any more, so there are rows of ours without one
of its. Its memory is allocated in the call, as that of our ops is, and its kernels are launched by
programmatic dependent launch, as ours are. Its aggregate's backward adds to a gradient of the
residual, where ours writes one.
"""

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tile_mhc.bench.inputs import SPLITS, Inputs
from tile_mhc.bench.ops import (
    EPS,
    POST_MULT,
    SINKHORN_STEPS,
    Adding,
    Call,
    Outputs,
    recompute_outputs,
)

MODULE = "tile_kernels.mhc"


class PlainTileKernels:
    """Its functions, and `calls`: how to prepare each op's call, by the op's name."""

    def __init__(self, release: str) -> None:
        self.release = release
        self.mhc = importlib.import_module(MODULE)
        self.config = importlib.import_module("tile_kernels.config")
        self.config.set_pdl(True)
        self.calls: dict[str, Callable[[Inputs], Call]] = {
            "expand.fwd": self.expand,
            "expand.bwd": self.expand_backward,
            "split_mixes.fwd": self.split_mixes,
            "split_mixes.bwd": self.split_mixes_backward,
            "sinkhorn.fwd": self.sinkhorn,
            "sinkhorn.bwd": self.sinkhorn_backward,
            "aggregate.fwd": self.aggregate,
            "aggregate.bwd": self.aggregate_backward,
            "post.fwd": lambda x: (
                lambda: [self.mhc.mhc_post_fwd(x.hidden, x.residual, x.post_mix, x.comb_mix)]
            ),
            "post.bwd": lambda x: (
                lambda: self.mhc.mhc_post_bwd(
                    x.hidden, x.residual, x.post_mix, x.comb_mix, x.grad_residual
                )
            ),
            "head_mix.fwd": self.head_mix,
            "head_mix.bwd": self.head_mix_backward,
            "partials_pre.fwd": self.partials_pre,
            "recompute.fwd": self.recompute,
        }

    def expand(self, x: Inputs) -> Call:
        def call() -> Outputs:
            out = torch.empty_like(x.residual)
            self.mhc.expand_to_mhc_fwd(x.hidden[0], out[0])
            return [out]

        return call

    def expand_backward(self, x: Inputs) -> Call:
        def call() -> Outputs:
            out = torch.empty_like(x.hidden)
            self.mhc.expand_to_mhc_bwd(x.grad_residual[0], out[0])
            return [out]

        return call

    def split_mixes(self, x: Inputs) -> Call:
        def call() -> Outputs:
            pre, post, comb = (torch.empty_like(t) for t in (x.pre_mix, x.post_mix, x.comb_mix))
            self.mhc.mhc_pre_split_mixes_fwd(
                x.mixes[0],
                x.scale,
                x.bias,
                pre.view(-1, x.n),
                post.view(-1, x.n),
                comb.view(-1, x.n * x.n),
                POST_MULT,
                EPS,
            )
            return [pre, post, comb]

        return call

    def split_mixes_backward(self, x: Inputs) -> Call:
        # What the forward wrote, which it asks for.
        post = self.split_mixes(x)()[1].view(-1, x.n)

        def call() -> Outputs:
            grads = [torch.empty_like(t) for t in (x.mixes, x.scale, x.bias)]
            self.mhc.mhc_pre_split_mixes_bwd(
                x.grad_pre.view(-1, x.n),
                x.grad_post.view(-1, x.n),
                x.grad_comb.view(-1, x.n * x.n),
                x.mixes[0],
                post,
                x.scale,
                x.bias,
                grads[0][0],
                *grads[1:],
                POST_MULT,
            )
            return grads

        return call

    def sinkhorn(self, x: Inputs) -> Call:
        def call() -> Outputs:
            out = torch.empty_like(x.logits)
            self.mhc.mhc_sinkhorn_fwd(x.logits[0], out[0], SINKHORN_STEPS, EPS)
            return [out]

        return call

    def sinkhorn_backward(self, x: Inputs) -> Call:
        def call() -> Outputs:
            out = torch.empty_like(x.logits)
            self.mhc.mhc_sinkhorn_bwd(x.grad_comb[0], x.logits[0], out[0], SINKHORN_STEPS, EPS)
            return [out]

        return call

    def aggregate(self, x: Inputs) -> Call:
        def call() -> Outputs:
            out = torch.empty_like(x.hidden)
            self.mhc.mhc_pre_apply_mix_fwd(x.residual[0], x.pre_mix.view(-1, x.n), out[0])
            return [out]

        return call

    def aggregate_backward(self, x: Inputs) -> Call:
        def add(total: Tensor) -> Outputs:
            grad_mix = self.mhc.mhc_pre_apply_mix_bwd(
                x.grad_hidden[0], x.residual[0], x.pre_mix.view(-1, x.n), total[0]
            )
            return [grad_mix.view_as(x.pre_mix)]

        return Adding(torch.zeros_like(x.residual), add)

    def head_mix(self, x: Inputs) -> Call:
        def call() -> Outputs:
            out = torch.empty_like(x.head_mixes)
            self.mhc.mhc_head_compute_mix_fwd(
                x.head_mixes[0], x.head_scale, x.head_bias, out[0], EPS
            )
            return [out]

        return call

    def head_mix_backward(self, x: Inputs) -> Call:
        """With the sums over its rows of partial sums, which it leaves to the caller."""
        rows = self.config.get_num_sms()

        def call() -> Outputs:
            out = torch.empty_like(x.head_mixes)
            scales, biases = x.head_scale.new_empty(rows, 1), x.head_bias.new_empty(rows, x.n)
            self.mhc.mhc_head_compute_mix_bwd(
                x.grad_head_mix[0],
                x.head_mixes[0],
                x.head_scale,
                x.head_bias,
                out[0],
                scales,
                biases,
                rows,
            )
            return [out, scales.sum(0), biases.sum(0)]

        return call

    def partials_pre(self, x: Inputs) -> Call:
        def call() -> Outputs:
            post, comb = torch.empty_like(x.post_mix), torch.empty_like(x.comb_mix)
            layer_input = torch.empty_like(x.hidden)
            self.mhc.mhc_pre_big_fuse_fwd(
                x.split_products,
                x.split_squares,
                x.scale,
                x.bias,
                x.residual[0],
                post.view(-1, x.n),
                comb.view(-1, x.n * x.n),
                layer_input[0],
                EPS,
                EPS,
                EPS,
                POST_MULT,
                SINKHORN_STEPS,
                SPLITS,
            )
            return [layer_input, post, comb]

        return call

    def recompute(self, x: Inputs) -> Call:
        """The kernel alone: the public function copies addresses from pinned memory, which a graph
        cannot capture. So the time of its host is not that of the public function either."""
        layer_inputs, residuals = recompute_outputs(x)
        tables = importlib.import_module(f"{MODULE}.multilayer_recompute_kernel")
        kernels = importlib.import_module(f"{MODULE}.multilayer_recompute_cuda")
        groups = (x.pre_mixes, layer_inputs, residuals, x.layer_outputs, x.post_mixes, x.comb_mixes)
        first = x.residual[0]
        pre, inputs, outputs, layer, post, comb = tables._make_ptr_tables_batched(
            [list(group) for group in groups], device=first.device
        )
        block = math.gcd(512, first.shape[-1])

        def call() -> Outputs:
            kernels.mhc_multilayer_recompute_cuda(
                first,
                pre,
                layer,
                post,
                comb,
                inputs,
                outputs,
                n_thr=64,
                h_blk=block,
                use_pdl=self.config.get_pdl(),
            )
            return [*layer_inputs, *residuals]

        return call
