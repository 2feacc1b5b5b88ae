"""The fewest bytes each op can move, by tokens T, hidden size H and streams n.

Every operand is read once and every result written once, a parameter once in all. Streams and what
is of their width are bfloat16, mixes and parameters float32. What a forward keeps for its backward
is not counted, what a backward must be given is.
"""

BF16, FP32 = 2, 4


def expand_fwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (1 + n)


def expand_bwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (n + 1)


def projection_fwd(T: int, H: int, n: int) -> int:
    mixes = n * (n + 2)
    return BF16 * T * n * H + FP32 * (T * mixes + mixes * n * H)


def projection_bwd(T: int, H: int, n: int) -> int:
    """Reads x, the weight, the mixes with their gradient and 1 / rms; writes two gradients."""
    mixes = n * (n + 2)
    return BF16 * T * 2 * n * H + FP32 * (T * (2 * mixes + 1) + 2 * mixes * n * H)


def projection_bwd_add(T: int, H: int, n: int) -> int:
    """The same, and a gradient that x already has."""
    return projection_bwd(T, H, n) + BF16 * T * n * H


def split_mixes_fwd(T: int, H: int, n: int) -> int:  # noqa: ARG001
    mixes = n * (n + 2)
    return FP32 * (T * 2 * mixes + mixes + 3)


def split_mixes_bwd(T: int, H: int, n: int) -> int:  # noqa: ARG001
    mixes = n * (n + 2)
    return FP32 * (T * 3 * mixes + 2 * (mixes + 3))


def sinkhorn_fwd(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * T * 2 * n * n


def sinkhorn_bwd(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * T * 3 * n * n


def aggregate_fwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (n + 1) + FP32 * T * n


def aggregate_bwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (2 * n + 1) + FP32 * T * 2 * n


def post_fwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (2 * n + 1) + FP32 * T * n * (n + 1)


def post_bwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (3 * n + 2) + FP32 * T * 2 * n * (n + 1)


def head_mix_fwd(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * (T * 2 * n + n + 1)


def head_mix_bwd(T: int, H: int, n: int) -> int:  # noqa: ARG001
    return FP32 * (T * 3 * n + 2 * (n + 1))


def contract_fwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (n + 1) + FP32 * (n * n * H + n + 1)


def contract_bwd(T: int, H: int, n: int) -> int:
    """Reads x, the mixes, 1 / rms and a gradient, writes that of x; the parameters in and out."""
    return BF16 * T * H * (2 * n + 1) + FP32 * (T * (n + 1) + 2 * (n * n * H + n + 1))


def fused_pre_fwd(T: int, H: int, n: int) -> int:
    mixes = n * (n + 2)
    return BF16 * T * H * (n + 1) + FP32 * (T * n * (n + 1) + mixes * n * H + mixes + 3)


def partials_pre_fwd(T: int, H: int, n: int) -> int:
    """As `fused_pre`, from partial sums of 16 slices of K in place of the weight."""
    mixes = n * (n + 2)
    sums = T * 16 * (mixes + 1)
    return BF16 * T * H * (n + 1) + FP32 * (sums + T * n * (n + 1) + mixes + 3)


def fused_pre_bwd(T: int, H: int, n: int) -> int:
    """Reads x, the mixes, 1 / rms and three gradients, writes that of x; the parameters in and
    out."""
    mixes = n * (n + 2)
    by_token = mixes + 1 + n * (n + 1)
    return BF16 * T * H * (2 * n + 1) + FP32 * (T * by_token + 2 * (mixes * n * H + mixes + 3))


def fused_pre_bwd_add(T: int, H: int, n: int) -> int:
    """The same, and a gradient that x already has."""
    return fused_pre_bwd(T, H, n) + BF16 * T * n * H


def identity_pre_fwd(T: int, H: int, n: int) -> int:
    """As fused_pre's, of 2n mixes and without a comb_mix."""
    mixes = 2 * n
    return BF16 * T * H * (n + 1) + FP32 * (T * n + mixes * n * H + mixes + 2)


def identity_pre_bwd(T: int, H: int, n: int) -> int:
    """Reads x, the mixes, 1 / rms, two gradients, writes that of x; the parameters in and out."""
    mixes = 2 * n
    parameters = mixes * n * H + mixes + 2
    return BF16 * T * H * (2 * n + 1) + FP32 * (T * (mixes + 1 + n) + 2 * parameters)


def identity_pre_bwd_add(T: int, H: int, n: int) -> int:
    """The same, and a gradient that x already has."""
    return identity_pre_bwd(T, H, n) + BF16 * T * n * H


def identity_post_fwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (2 * n + 1) + FP32 * T * n


def identity_post_bwd(T: int, H: int, n: int) -> int:
    """Reads a gradient, the layer's output and its mix; that of the streams is the one it reads."""
    return BF16 * T * H * (n + 2) + FP32 * T * 2 * n


def stream_mean_fwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (n + 1)


def stream_mean_bwd(T: int, H: int, n: int) -> int:
    return BF16 * T * H * (1 + n)


def delayed_pre_fwd(T: int, H: int, n: int) -> int:
    """As fused_pre's, with a pre_mix in and one out."""
    return fused_pre_fwd(T, H, n) + FP32 * T * 2 * n


def delayed_pre_bwd(T: int, H: int, n: int) -> int:
    """As fused_pre's, with a pre_mix, the gradient of the next one, and its own that is written."""
    return fused_pre_bwd(T, H, n) + FP32 * T * 3 * n


def delayed_pre_bwd_add(T: int, H: int, n: int) -> int:
    """The same, and a gradient that x already has."""
    return delayed_pre_bwd(T, H, n) + BF16 * T * n * H


def post_pre_fwd(T: int, H: int, n: int) -> int:
    """Reads the streams, the layer's output and its mixes; writes streams, layer input, mixes."""
    mixes = n * (n + 2)
    streams = BF16 * T * H * (2 * n + 2)
    return streams + FP32 * (T * 2 * n * (n + 1) + mixes * n * H + mixes + 3)


def post_pre_bwd(T: int, H: int, n: int) -> int:
    """Reads what the forward did, but for the parameters' part, with two gradients of streams'
    width and what is by token of the next pre; writes gradients of all of it. The streams between
    the two are made again.
    """
    mixes = n * (n + 2)
    streams = BF16 * T * H * (3 * n + 3)
    by_token = 2 * n * (n + 1) + mixes + 1 + n * (n + 1)
    return streams + FP32 * (T * by_token + 2 * (mixes * n * H + mixes + 3))


def post_pre_delayed_fwd(T: int, H: int, n: int) -> int:
    """The same with a pre_mix in and one out."""
    return post_pre_fwd(T, H, n) + FP32 * T * 2 * n


def post_pre_delayed_bwd(T: int, H: int, n: int) -> int:
    """The same with a pre_mix, the gradient of the next one, and its own that is written."""
    return post_pre_bwd(T, H, n) + FP32 * T * 3 * n


def post_pre_both(T: int, H: int, n: int) -> int:
    """Forward and backward, each a pass of its own."""
    return post_pre_fwd(T, H, n) + post_pre_bwd(T, H, n)


def post_pre_delayed_both(T: int, H: int, n: int) -> int:
    """The same with a pre_mix."""
    return post_pre_delayed_fwd(T, H, n) + post_pre_delayed_bwd(T, H, n)


def post_pre_norm_fwd(T: int, H: int, n: int) -> int:
    """With the norm of the layer input, and its weight."""
    return post_pre_fwd(T, H, n) + FP32 * H


def post_pre_norm_delayed_fwd(T: int, H: int, n: int) -> int:
    """The same with a pre_mix."""
    return post_pre_delayed_fwd(T, H, n) + FP32 * H


def post_pre_norm_separate_fwd(T: int, H: int, n: int) -> int:
    """Three ops: the streams are read again, and so is the layer input, by a norm whose weight is
    bfloat16."""
    return post_fwd(T, H, n) + fused_pre_fwd(T, H, n) + BF16 * (2 * T * H + H)


def post_pre_norm_delayed_separate_fwd(T: int, H: int, n: int) -> int:
    """The same with a pre_mix."""
    return post_fwd(T, H, n) + delayed_pre_fwd(T, H, n) + BF16 * (2 * T * H + H)


def _linear(T: int, H: int) -> int:
    """Forward and backward of a layer of H to H: x in, y out; x and the gradient of y in, that of x
    out; the weight twice in, its gradient out."""
    return BF16 * (5 * T * H + 3 * H * H)


def stack(T: int, H: int, n: int, boundaries: int = 8) -> int:
    """Forward and backward of boundaries, behind each a linear layer."""
    return boundaries * (post_pre_both(T, H, n) + _linear(T, H))


def stack_delayed(T: int, H: int, n: int, boundaries: int = 8) -> int:
    """The same with a pre_mix."""
    return boundaries * (post_pre_delayed_both(T, H, n) + _linear(T, H))


def stack_separate(T: int, H: int, n: int, boundaries: int = 8) -> int:
    """Of separate ops, where fused_pre adds the gradient that the streams have from their post."""
    of_post = post_fwd(T, H, n) + post_bwd(T, H, n)
    of_pre = fused_pre_fwd(T, H, n) + fused_pre_bwd_add(T, H, n)
    return boundaries * (of_post + of_pre + _linear(T, H))


def stack_delayed_separate(T: int, H: int, n: int, boundaries: int = 8) -> int:
    """The same with a pre_mix."""
    of_post = post_fwd(T, H, n) + post_bwd(T, H, n)
    of_pre = delayed_pre_fwd(T, H, n) + delayed_pre_bwd_add(T, H, n)
    return boundaries * (of_post + of_pre + _linear(T, H))


def recompute_fwd(T: int, H: int, n: int, layers: int = 10) -> int:
    """The first residual; by layer its mixes, its input, its output and the residual after it."""
    return BF16 * T * H * (n + layers * (n + 2)) + FP32 * T * layers * n * (n + 2)


def sub_layer(T: int, H: int, n: int) -> int:
    """Forward and backward: pre reads x and writes the layer input; post reads x and the layer's
    output and writes the streams; its backward reads those two and a gradient and writes two; that
    of pre reads x and two gradients and writes one.

    The mixes may stay on the chip or be computed again: not counted. The weight is read by both
    passes and its gradient written; the few gates are left out as well.
    """
    streams = (n + 1) + (2 * n + 1) + (3 * n + 2) + (3 * n + 1)
    return BF16 * T * H * streams + FP32 * 3 * n * (n + 2) * n * H
