"""Replay of L aggregates and their posts in one launch; the residual never leaves registers.

A table of addresses, one row per layer, names the tensors: pre_mix, layer_input, layer_output,
post_mix, comb_mix, residual. One kernel serves every number of layers.
"""

import tilelang.language as T

from tile_mhc.kernels._common import (
    SIMT,
    builder,
    follow_previous,
    load_streams,
    row_chunks,
    row_threads,
    row_vector,
    weighted_sum,
)
from tile_mhc.kernels._shapes import TABLE_SLOTS
from tile_mhc.kernels.mixes import logit, sigmoid
from tile_mhc.kernels.post import combine

# More, smaller CTAs: two warps wait less for each other than eight that start and end together.
MOST_THREADS = 64
# A thread a token.
GATE_THREADS = 128
PRE_MIX, LAYER_INPUT, LAYER_OUTPUT, POST_MIX, COMB_MIX, RESIDUAL = range(6)


@builder(SIMT)
def recompute(n: int, hidden_size: int, *, streams_dtype: str):
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_layers")
    vector = row_vector(hidden_size, streams_dtype)
    threads = row_threads(hidden_size, vector, MOST_THREADS)
    chunks = row_chunks(hidden_size, threads, vector)

    @T.prim_func
    def recompute_kernel(
        initial_residual: T.Tensor[(tokens, n, hidden_size), streams_dtype],
        table: T.Tensor[(rows, 6), T.ptr],
        posts: T.int32,
    ):
        with T.Kernel(tokens * chunks, threads=threads) as block:
            follow_previous()
            t = block // chunks
            h = (block % chunks * threads + T.get_thread_binding()) * vector
            streams = T.alloc_local((n, vector), streams_dtype)
            mixed = T.alloc_local((n, vector), streams_dtype)
            output = T.alloc_local((vector,), streams_dtype)
            pre = T.alloc_local((n,), T.float32)
            post = T.alloc_local((n,), T.float32)
            comb = T.alloc_local((n, n), T.float32)
            total = T.alloc_local((vector,), T.float32)
            if h < hidden_size:
                load_streams(initial_residual, t, h, n, streams)
                for layer in T.serial(rows):
                    pre_mix = T.make_tensor(table[layer, PRE_MIX], (tokens, n), T.float32)
                    layer_input = T.make_tensor(
                        table[layer, LAYER_INPUT], (tokens, hidden_size), streams_dtype
                    )
                    for i in T.unroll(n):
                        pre[i] = pre_mix[t, i]
                    if layer < posts:
                        # Read before the aggregate is written: the loads overlap its arithmetic.
                        layer_output = T.make_tensor(
                            table[layer, LAYER_OUTPUT], (tokens, hidden_size), streams_dtype
                        )
                        post_mix = T.make_tensor(table[layer, POST_MIX], (tokens, n), T.float32)
                        comb_mix = T.make_tensor(table[layer, COMB_MIX], (tokens, n, n), T.float32)
                        for v in T.vectorized(vector):
                            output[v] = layer_output[t, h + v]
                        for i in T.unroll(n):
                            post[i] = post_mix[t, i]
                            for j in T.vectorized(n):
                                comb[i, j] = comb_mix[t, i, j]
                    weighted_sum(pre, streams, n, total)
                    for v in T.vectorized(vector):
                        layer_input[t, h + v] = T.cast(total[v], streams_dtype)
                    if layer < posts:
                        residual = T.make_tensor(
                            table[layer, RESIDUAL], (tokens, n, hidden_size), streams_dtype
                        )
                        for j in T.unroll(n):
                            combine(post, comb, output, streams, j, n, total)
                            for v in T.vectorized(vector):
                                mixed[j, v] = T.cast(total[v], streams_dtype)
                            for v in T.vectorized(vector):
                                residual[t, j, h + v] = mixed[j, v]
                        for j in T.unroll(n):
                            for v in T.vectorized(vector):
                                streams[j, v] = mixed[j, v]

    return recompute_kernel


@builder(SIMT)
def recompute_gates(n: int, *, scale_dtype: str, bias_dtype: str):
    """The pre_mixes that `fused_pre` has not kept, of all layers: to its bits, as split_mixes."""
    tokens = T.dynamic("num_tokens")
    rows = T.dynamic("num_layers")
    num_mixes = n * (n + 2)

    @T.prim_func
    def recompute_gates_kernel(
        table: T.Tensor[(rows, 3), T.ptr],
        pre_mixes: T.Tensor[(rows, tokens, n), T.float32],
        pre_eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(tokens, GATE_THREADS), rows, threads=GATE_THREADS) as (
            block,
            layer,
        ):
            follow_previous()
            t = block * GATE_THREADS + T.get_thread_binding()
            z = T.alloc_local((n,), T.float32)
            gate = T.alloc_local((1,), T.float32)
            if t < tokens:
                mixes = T.make_tensor(table[layer, 0], (tokens, num_mixes), T.float32)
                scale = T.make_tensor(table[layer, 1], (3,), scale_dtype)
                bias = T.make_tensor(table[layer, 2], (num_mixes,), bias_dtype)
                for i in T.unroll(n):
                    logit(mixes[t, i], scale[0], bias[i], gate)
                    sigmoid(gate[0], gate)
                    z[i] = gate[0] + pre_eps
                for i in T.vectorized(n):
                    pre_mixes[layer, t, i] = z[i]

    return recompute_gates_kernel


@builder(SIMT)
def recompute_table(slots: int):
    """Write addresses that came as launch arguments: a CUDA graph keeps those by value."""
    if slots != TABLE_SLOTS:
        raise ValueError(f"recompute_table: slots must be {TABLE_SLOTS}; got {slots}")
    entries = T.dynamic("num_entries")

    # One line per layer.
    # fmt: off
    @T.prim_func
    def recompute_table_kernel(
        table: T.Tensor[(entries,), T.int64],
        start: T.int32,
        a0: T.int64, a1: T.int64, a2: T.int64, a3: T.int64, a4: T.int64, a5: T.int64,
        a6: T.int64, a7: T.int64, a8: T.int64, a9: T.int64, a10: T.int64, a11: T.int64,
        a12: T.int64, a13: T.int64, a14: T.int64, a15: T.int64, a16: T.int64, a17: T.int64,
        a18: T.int64, a19: T.int64, a20: T.int64, a21: T.int64, a22: T.int64, a23: T.int64,
        a24: T.int64, a25: T.int64, a26: T.int64, a27: T.int64, a28: T.int64, a29: T.int64,
        a30: T.int64, a31: T.int64, a32: T.int64, a33: T.int64, a34: T.int64, a35: T.int64,
        a36: T.int64, a37: T.int64, a38: T.int64, a39: T.int64, a40: T.int64, a41: T.int64,
        a42: T.int64, a43: T.int64, a44: T.int64, a45: T.int64, a46: T.int64, a47: T.int64,
    ):
        with T.Kernel(1, threads=32):
            follow_previous()
            values = (
                a0, a1, a2, a3, a4, a5,
                a6, a7, a8, a9, a10, a11,
                a12, a13, a14, a15, a16, a17,
                a18, a19, a20, a21, a22, a23,
                a24, a25, a26, a27, a28, a29,
                a30, a31, a32, a33, a34, a35,
                a36, a37, a38, a39, a40, a41,
                a42, a43, a44, a45, a46, a47,
            )
            for k, value in enumerate(values):
                if T.get_thread_binding() == k % 32 and start + k < entries:
                    table[start + k] = value
    # fmt: on

    return recompute_table_kernel
