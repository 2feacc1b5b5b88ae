"""Empty: TileKernels has private builders only here; `modeling.mhc.ops.pre_big_fuse` is the op."""
