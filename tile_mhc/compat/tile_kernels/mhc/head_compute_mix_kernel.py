"""Empty: TileKernels has private builders only here; the op is in `modeling.mhc.ops`."""
