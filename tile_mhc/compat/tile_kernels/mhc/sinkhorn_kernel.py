"""TileKernels' module of n x n logits to a doubly stochastic matrix: it has private builders only, so nothing is here.

The op is in `modeling.mhc.ops.sinkhorn`.
"""
