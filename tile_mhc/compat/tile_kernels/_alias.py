"""Make `import tile_kernels` resolve to this package."""

from tile_mhc.compat._alias import Alias

_ALIAS = Alias("tile_kernels", __name__.rpartition(".")[0])


def install(*, force: bool = False) -> None:
    """Let every `import tile_kernels...` of this process find the modules of this package.

    The modules keep their own names: `tile_kernels.modeling.mhc` is
    `tile_mhc.compat.tile_kernels.modeling.mhc`, the same object. Installing twice is one install.

    Args:
        force: also when a real tile_kernels is there; it is hidden until `uninstall()`. What was
            imported from it before keeps working on it.

    Raises:
        RuntimeError: a real tile_kernels is installed or imported, and `force` is not set.
    """
    _ALIAS.install(force)


def uninstall() -> None:
    """Undo `install()`: a real tile_kernels, if there is one, is what imports find again."""
    _ALIAS.uninstall()
