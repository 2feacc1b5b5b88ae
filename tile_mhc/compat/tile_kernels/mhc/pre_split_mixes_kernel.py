"""TileKernels' module of mixes to pre, post and comb: it has private builders only, so nothing is here.

The op is in `modeling.mhc.ops.pre_split_mixes`.
"""
