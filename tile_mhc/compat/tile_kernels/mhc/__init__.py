"""TileKernels' functions below autograd: they take tensors and build no graph."""
