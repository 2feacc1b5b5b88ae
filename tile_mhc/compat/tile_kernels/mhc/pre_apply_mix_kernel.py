"""Empty: TileKernels has private builders only here; `modeling.mhc.ops.pre_apply_mix` is the op."""
