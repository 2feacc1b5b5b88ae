"""How far a result may be from float64, and why. Loosening one is a commit of its own.

Every element: |ours - fp64| <= 2 * |torch - fp64| + ATOL * max(|fp64|, rms(fp64)), where
torch computes in the same dtypes as ours.
Every tensor: ||ours - fp64|| / ||fp64|| <= its bar, or for 16-bit results the error of rounding
the fp64 result, times ROUNDING, where that is more.
"""

# The factor 2 covers two sound roundings that fall on either side of one midpoint. ATOL is for
# elements where torch happens to be exact: a few units in the last place of what was summed.
FACTOR = 2.0
FLOAT32 = 2.0**-20

# A sum over H or over tokens, or forty normalisations: many roundings, in an order of our own.
FLOAT32_SUM = 2.0**-18

# The weight, and in the backward the gradient, enter the tensor cores as two bfloat16 parts: each
# product is off by up to 2**-17. Few products may dominate a sum, so one of 8 rms has to fit. What
# holds a whole tensor down is the bar of 1e-5 below.
SPLIT_WEIGHT = 2.0**-14

# A sum of bfloat16 gradients that were rounded one by one, as plain autograd adds them: two
# implementations may differ by one unit in the last place of the largest term, up to 8 rms.
BF16_SUM = 2.0**-5

# One product, of up to 4 rms, whose factor was rounded to TF32 the other way: 2**-10 of it.
TF32_MIDPOINT = 2.0**-8

# A sum over H of products with a gradient of the streams that was rounded on its way: half a unit
# in the last place of its largest terms, of up to 8 rms, as plain autograd has it.
ROUNDED_TERMS = 2.0**-6

ATOL = {
    "projection": SPLIT_WEIGHT,
    "projection_tf32": TF32_MIDPOINT,
    "fused_pre": SPLIT_WEIGHT,
    "contract": SPLIT_WEIGHT,
    "identity_pre": SPLIT_WEIGHT,
    "delayed_pre": SPLIT_WEIGHT,
    "post_pre": SPLIT_WEIGHT,
    "post_pre_delayed": SPLIT_WEIGHT,
    "mhc_sub_layer": SPLIT_WEIGHT,
    "mhc_sub_layer_passing": SPLIT_WEIGHT,
    "sinkhorn": FLOAT32_SUM,
    "te_projection": SPLIT_WEIGHT,
    "te_sinkhorn": FLOAT32_SUM,
    "te_pre": SPLIT_WEIGHT,
}
# Tensors that an op's own tolerance does not fit.
ATOL_OF = {
    # Through the gradient of the streams, which may be rounded between the two halves.
    **{
        (op, f"grad_{name}"): tolerance
        for op in ("post_pre", "post_pre_delayed")
        for name, tolerance in (
            ("residual", BF16_SUM),
            ("layer_output", BF16_SUM),
            ("post_mix", ROUNDED_TERMS),
            ("comb_mix", ROUNDED_TERMS),
            ("layer_bias", ROUNDED_TERMS),
        )
    },
    ("delayed_pre", "grad_pre_mix"): FLOAT32_SUM,
    ("post_pre_delayed", "grad_pre_mix"): FLOAT32_SUM,
    ("mhc_sub_layer", "grad_residual"): BF16_SUM,
    ("mhc_sub_layer_passing", "grad_residual"): BF16_SUM,
    ("split_mixes", "grad_scale"): FLOAT32_SUM,
    ("split_mixes", "grad_bias"): FLOAT32_SUM,
    ("head_mix", "grad_scale"): FLOAT32_SUM,
    ("head_mix", "grad_bias"): FLOAT32_SUM,
    ("te_scale", "grad_scale"): FLOAT32_SUM,
    ("te_scale", "grad_bias"): FLOAT32_SUM,
    ("te_scale", "grad_ms"): FLOAT32_SUM,
    ("te_aggregate", "grad_mix"): FLOAT32_SUM,
    ("te_post", "grad_post_mix"): FLOAT32_SUM,
    ("te_post", "grad_comb_mix"): FLOAT32_SUM,
    ("te_post", "grad_bias"): FLOAT32_SUM,
    ("aggregate", "grad_pre_mix"): FLOAT32_SUM,
    ("post", "grad_post_mix"): FLOAT32_SUM,
    ("post", "grad_comb_mix"): FLOAT32_SUM,
    ("post_bias", "grad_post_mix"): FLOAT32_SUM,
    ("post_bias", "grad_comb_mix"): FLOAT32_SUM,
    ("post_bias", "grad_bias"): FLOAT32_SUM,
    ("identity_post", "grad_post_mix"): FLOAT32_SUM,
    ("identity_post_bias", "grad_post_mix"): FLOAT32_SUM,
    ("identity_post_bias", "grad_bias"): FLOAT32_SUM,
}

# A float32 result differs by 1e-6, so a few of its bfloat16 roundings go the other way: no more.
# The same for float16, whose own error is an eighth.
ROUNDING = 1.03
# Where plain autograd adds bfloat16 gradients: the error of torch doing the same.
BF16_SUM_ROUNDING = 1.1

# What the docstring of `projection` promises; TileKernels has 2.1e-4 (TF32). The norm of few
# elements is chance, so bars count from NORM_MIN_ELEMENTS on.
NORM_MIN_ELEMENTS = 1024
PROMISED = {
    ("projection", "out"): 1e-5,
    ("projection", "grad_weight"): 1e-5,
    ("projection", "grad_norm_weight"): 1e-5,
    # Of float32 streams: both operands are two parts, with 2**-18 of each left out.
    ("projection", "grad_residual"): 1e-5,
    ("fused_pre", "layer_input"): 1e-5,
    ("fused_pre", "grad_residual"): 2e-5,
    ("delayed_pre", "layer_input"): 1e-5,
    ("delayed_pre", "grad_residual"): 2e-5,
    ("delayed_pre", "grad_weight"): 2e-5,
    ("delayed_pre", "grad_norm_weight"): 2e-5,
    ("post_pre", "grad_weight"): 2e-5,
    ("post_pre", "grad_norm_weight"): 2e-5,
    ("post_pre_delayed", "grad_weight"): 2e-5,
    ("post_pre_delayed", "grad_norm_weight"): 2e-5,
    ("contract", "out"): 1e-5,
    ("contract", "grad_residual"): 2e-5,
    ("identity_pre", "layer_input"): 1e-5,
    ("identity_pre", "grad_residual"): 2e-5,
    ("identity_pre", "grad_weight"): 2e-5,
    ("identity_pre", "grad_norm_weight"): 2e-5,
    # The mixes' error once more, through gates and Sinkhorn.
    ("fused_pre", "grad_weight"): 2e-5,
    ("fused_pre", "grad_norm_weight"): 2e-5,
    ("mhc_sub_layer", "grad_weight"): 2e-5,
    ("mhc_sub_layer", "grad_norm_weight"): 2e-5,
    ("mhc_sub_layer_passing", "grad_weight"): 2e-5,
    ("mhc_sub_layer_passing", "grad_norm_weight"): 2e-5,
    # The gradient of the post is rounded, and the sum of all: what TileKernels needs three for.
    ("mhc_sub_layer_passing", "grad_residual"): 2.3e-3,
    # Two parts of one rounding each, and autograd's sum of them, where bfloat16 often ties: 2.4 to
    # 2.5e-3 at every shape. With a third part it is 2.9e-3.
    ("mhc_sub_layer", "grad_residual"): 2.6e-3,
    # Both sides round to TF32. A gradient within float32's error of a midpoint, one in some
    # thousands, may go the other way by 2**-10: 1e-5 in norm. Without the switch it is 2e-4.
    ("projection_tf32", "out"): 1e-5,
    ("projection_tf32", "grad_weight"): 2e-5,
    ("projection_tf32", "grad_norm_weight"): 2e-5,
}

# What TileKernels 1.0.0 reaches on an H200, at these T, n and H; ours may be no worse there.
MEASURED_AT = (4096, 4, 2560)
MEASURED = {
    ("aggregate", "grad_pre_mix"): 7.6e-8,
    ("post", "grad_post_mix"): 7.5e-8,
    ("post", "grad_comb_mix"): 7.5e-8,
}
# The same for ten steps of Sinkhorn, T=4096 and n=4.
MEASURED_SINKHORN = {("sinkhorn", "out"): 9.4e-8, ("sinkhorn", "grad_logits"): 1.7e-7}


def atol(op: str, tensor: str) -> float:
    return ATOL_OF.get((op, tensor), ATOL.get(op, FLOAT32))


def norm_bars(num_tokens: int, num_streams: int, hidden_size: int) -> dict[tuple[str, str], float]:
    """The bars that hold for a shape."""
    measured = (num_tokens, num_streams, hidden_size) == MEASURED_AT
    return PROMISED | (MEASURED if measured else {})
