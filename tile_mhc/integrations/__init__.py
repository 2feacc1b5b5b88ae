"""Patches that put tile_mhc under models written for other libraries."""
