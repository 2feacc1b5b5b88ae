"""Empty: TileKernels has private builders only here; `modeling.mhc.ops.pre_split_mixes` is the op."""
