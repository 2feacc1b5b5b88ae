"""TileKernels' module of everything before a sub-layer: it has private builders only, so nothing is here.

The op is in `modeling.mhc.ops.pre_big_fuse`.
"""
