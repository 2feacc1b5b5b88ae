"""Empty: TileKernels has private builders only here; `modeling.mhc.ops.sinkhorn` is the op."""
