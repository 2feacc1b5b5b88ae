"""The kernels that each file of tests/gpu runs, to compile them on all cores before the first."""

from unittest import mock

import readout
import replaying
import serving
import te_cases
import unmixed
from accumulation import GPU_SIZES
from cases import STREAM_CASES, WIDTH_CASES
from tile_mhc import _warm_up, config, specs
from tile_mhc.errors import dtype_name
from tile_mhc.kernels._arch import ARCHITECTURES, DEFAULT

# Which ops a test file runs with default dtypes; those not named run the op of their name, or all.
OPS_OF = {
    "fused_pre": ("fused_pre", "projection", "split_mixes", "sinkhorn", "aggregate"),
    "delayed_pre": ("fused_pre", "projection", "split_mixes", "sinkhorn", "aggregate"),
    "post_pre": ("post_pre", "fused_pre", "post"),
    "few_pre": ("post_pre", "fused_pre"),
    "mixes": ("split_mixes",),
    "contract": ("contract", "projection", "aggregate"),
    "contract_cluster": (),
    "reference": (),
    "architectures": (),
    "compat_plain": ("tile_kernels",),
    "exact_mixes": ("tile_kernels",),
    "head_mix_rows": ("tile_kernels",),
    "norm_weight": ("tile_kernels",),
    "partials": ("tile_kernels", "fused_pre", "projection"),
    "compat_serving": (),
    "identity_pre": ("identity_pre", "identity_post", "projection", "aggregate"),
    "identity_cluster": (),
    "nn": ("fused_pre", "post", "contract"),
    "recompute": ("recompute", "aggregate", "post"),
    "recompute_group": ("recompute", "fused_pre", "post_pre", "post"),
    "accumulator": (),
    "main_grad": (),
    "dtypes": (),
    "errors": (),
    "integration_models": (),
    "projection_any": (),
}
NATIVE = tuple(op for op in specs.OPS if op not in specs.COMPAT)
IDENTITY = ("identity_pre",)
# The files that also run kernels with destinations for gradients, at sizes of their own.
DIRECTED = {
    "accumulator": (
        "projection",
        "aggregate",
        "post",
        "contract",
        "identity_pre",
        "identity_post",
    ),
    "main_grad": (
        "projection",
        "split_mixes",
        "head_mix",
        "contract",
        "fused_pre",
        "identity_pre",
    ),
}
GRADS = ("float32", "bfloat16")
OTHERS_DIRECTED = [
    *(specs.Sizes(2, 33, dtype=dtype, grads=("float32",)) for dtype in ("float16", "float32")),
    specs.Sizes(4, 1280, parameters=("bfloat16",), grads=GRADS),
]
COMPAT_PAIRS = ((2, 128), (4, 128), (8, 128))
TE_STEMS = {
    "compat_transformer_engine",
    "interleaved_aggregate",
    "interleaved_post",
    "log_sinkhorn",
    "padded_mixes",
    "padded_projection",
}
# What test_dtypes.py runs besides; one bfloat16 parameter alone compiles on its way.
WIDTHS = [specs.Sizes(case.num_streams, case.hidden_size) for case in WIDTH_CASES]
ALL_BFLOAT16 = ("bfloat16",)
DTYPES = [
    *WIDTHS,
    *(
        specs.Sizes(*size, dtype=t)
        for size in ((4, 1280), (4, 100))
        for t in ("float16", "float32")
    ),
    *(specs.Sizes(n, 128, dtype="float32") for n in (2, 4, 8)),
    specs.Sizes(4, 2560, dtype="float32"),
    *(
        specs.Sizes(4, 5129, dtype=dtype, parameters=ALL_BFLOAT16)
        for dtype in ("float16", "float32")
    ),
    specs.Sizes(4, 1280, dtype="float32", parameters=ALL_BFLOAT16),
]


def kernels_of(stems, arch=DEFAULT):
    """Every kernel that these files of tests/gpu use, by the (n, H) pairs of cases.py."""
    pairs = {(case.num_streams, case.hidden_size) for case in STREAM_CASES}
    stems = set(stems)
    ops = set()
    kernels = transformer_engine_kernels(arch) if stems & TE_STEMS else []
    for stem in stems - TE_STEMS:
        ops.update(OPS_OF.get(stem, (stem,) if stem in specs.OPS else NATIVE))
    if stems & {"compat", "compat_copies", "compat_plain", "partials"}:
        pairs.update(COMPAT_PAIRS)
    kernels += specs.select([specs.Sizes(*pair) for pair in sorted(pairs)], sorted(ops), arch)
    if stems & DIRECTED.keys():
        directed = {op for stem in stems & DIRECTED.keys() for op in DIRECTED[stem]}
        sizes = [specs.Sizes(*size[1:], grads=GRADS) for size in GPU_SIZES]
        kernels += specs.select([*sizes, *OTHERS_DIRECTED], sorted(directed), arch)
    if "contract_cluster" in stems:
        kernels += readout_kernels(arch)
    if "identity_cluster" in stems:
        sizes = [(4, hidden) for hidden in unmixed.SIZES]
        kernels += specs.select([specs.Sizes(*s) for s in (*sizes, *unmixed.NONE)], IDENTITY, arch)
    if "dtypes" in stems:
        kernels += specs.select(DTYPES, NATIVE, arch)
    if "compat_serving" in stems:
        kernels += serving_kernels(arch)
    return list(dict.fromkeys(kernels))


def serving_kernels(arch):
    """Those of SGLang's and vLLM's functions, for as many SMs as an H200 has."""

    def call(num_tokens, device):
        tensors = serving.inputs(num_tokens, serving.HIDDEN, device)
        for options in ({}, serving.norm_options(tensors)):
            serving.run_all(tensors, options)

    of_arch = replaying.on_architecture(ARCHITECTURES[arch])
    with of_arch, mock.patch.object(config, "_num_sms", replaying.NUM_SMS):
        return [k for count in serving.COUNTS for k in _warm_up._asked_for(call, count)]


def readout_kernels(arch):
    """Those of the readout in one pass, of either parameters; where there is none, of two."""
    both = [
        specs.Sizes(*pair, parameters=(dtype,))
        for pair in readout.SIZES
        for dtype in specs.EVERY_PARAMETER
    ]
    names = {"contract_cluster_fwd", "contract_cluster_bwd", "projection_weight_bwd", "column_sums"}
    kernels = [kernel for kernel in specs.select(both, ("contract",), arch) if kernel[0] in names]
    two_passes = [specs.Sizes(*pair) for pair in readout.NONE]
    return kernels + specs.select(two_passes, ("contract",), arch)


def transformer_engine_kernels(arch):
    """Those of te_cases, whose widths and dtypes are its own."""
    names = [(dtype_name(d.streams), (dtype_name(d.parameters),)) for d in te_cases.DTYPES]
    sizes = [
        specs.Sizes(4, width.hidden_size, dtype=streams, parameters=parameters)
        for width in te_cases.WIDTHS
        for streams, parameters in names
    ]
    # The table has the projections of the other ops, too: with an aggregate, and of four rows.
    return [
        (name, args)
        for name, args in specs.select(sizes, ["transformer_engine"], arch)
        if not name.startswith("projection")
        or (args[0] == 24 and not (name.endswith("_bwd") and "weight" not in name and args[2]))
    ]
