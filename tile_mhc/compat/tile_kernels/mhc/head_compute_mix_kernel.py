"""TileKernels' module of the gate of the readout: it has private builders only, so nothing is here.

The op is in `modeling.mhc.ops.head_compute_mix`.
"""
