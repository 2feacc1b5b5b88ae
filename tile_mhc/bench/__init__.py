"""What `tile-mhc bench` measures, and how: every op on a GPU, beside TileKernels where asked."""
