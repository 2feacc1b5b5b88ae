"""What `tile-mhc bench` measures, and how: every op on a GPU, beside TileKernels where asked.

`ops`, `floors`, `inputs` and `peer` say what is timed, `checking` whether it is right, `timing`
how; `measuring` puts them together. `compiling` comes before; `records` and `cliffs` come after.
"""
