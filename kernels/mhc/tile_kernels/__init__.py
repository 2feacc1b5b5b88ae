"""Kernels that only TileKernels' plain functions need.

Sums that another library's matmul has left, partial sums in rows that the caller asks for, and
gradients that are rounded once, so that none is less exact than TileKernels'.
"""
