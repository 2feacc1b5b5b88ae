"""Make `import tile_kernels` resolve to this package."""

from tile_mhc.compat._alias import Alias

_ALIAS = Alias(
    "tile_kernels",
    __name__.rpartition(".")[0],
    parts=("mhc", "modeling.mhc", "torch.mhc"),
    whole=True,
)


def install(*, force: bool = False) -> None:
    """Let every `import tile_kernels...` of this process find the modules of this package.

    The modules keep their own names: `tile_kernels.modeling.mhc` is
    `tile_mhc.compat.tile_kernels.modeling.mhc`, the same object. Installing twice is one install,
    also from two threads.

    Args:
        force: also when a real tile_kernels is there. It is imported, and `tile_kernels.mhc`,
            `tile_kernels.modeling.mhc` and `tile_kernels.torch.mhc`, with all below them, are ours
            until `uninstall()`; the rest of it (quant, moe, config, ...) stays as it is, also what
            it has taken from those by name. One that cannot be imported is hidden as a whole. What
            was imported before keeps working on what it has.

    Raises:
        RuntimeError: a real tile_kernels is installed or imported, and `force` is not set.
    """
    _ALIAS.install(force)


def uninstall() -> None:
    """Undo `install()`: what imports find, and what packages hold, is as before."""
    _ALIAS.uninstall()
