"""Kernels that only TileKernels' plain functions need.

Sums that another library's matmul has left, and partial sums in rows that the caller asks for.
"""
