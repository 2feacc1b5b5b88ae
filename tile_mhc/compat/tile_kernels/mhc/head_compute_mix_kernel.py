"""Empty: TileKernels has private builders only here; `modeling.mhc.ops.head_compute_mix` is the op."""
