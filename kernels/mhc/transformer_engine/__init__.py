"""Kernels that only TransformerEngine's layout and its split of the ops need.

Streams lie innermost, rows of mixes are padded, projection gives products and mean squares.
"""
