"""What becomes of a weight before it is multiplied: two bfloat16 parts, or TF32's rounding."""

import tilelang.language as T


def rounded_to_tf32(value: T.float32):
    """`value` to the 11 bits of TF32, halves away from zero, as TileKernels does; not NaN.

    With `as_int` and `as_float` contract_cluster_fwd spills; the checks see that no value is stale.
    """
    bits = T.reinterpret(value, T.int32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return T.Select(is_nan, value, T.reinterpret((bits + 0x1000) & -0x2000, T.float32))


def norm_shape(size: int, norm_weight_dtype: str) -> tuple[int]:
    return (size if norm_weight_dtype else 1,)


def high_part(value: T.float32):
    return T.cast(value, T.bfloat16)


def low_part(value: T.float32):
    return T.cast(value - T.cast(T.cast(value, T.bfloat16), T.float32), T.bfloat16)
