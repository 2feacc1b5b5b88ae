"""TileKernels' module of n -> 1, weighted by the mix: it has private builders only, so nothing is here.

The op is in `modeling.mhc.ops.pre_apply_mix`.
"""
