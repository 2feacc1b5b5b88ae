"""The operators behind `compat.tile_kernels.mhc`: they write into memory of the caller's."""
