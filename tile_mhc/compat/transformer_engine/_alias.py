"""Make `import transformer_engine.pytorch.triton.mhc` resolve to this package."""

from tile_mhc.compat._alias import Alias

_ALIAS = Alias("transformer_engine", __name__.rpartition(".")[0])


def install(*, force: bool = False) -> None:
    """Let `import transformer_engine.pytorch.triton.mhc` find the module of this package.

    The rest of TransformerEngine is not here: a program that uses it imports the functions from
    `tile_mhc.compat.transformer_engine` instead. Installing twice is one install.

    Args:
        force: also when a real transformer_engine is there; all of it is hidden until
            `uninstall()`. What was imported from it before keeps working on it.

    Raises:
        RuntimeError: a real transformer_engine is installed or imported, and `force` is not set.
    """
    _ALIAS.install(force)


def uninstall() -> None:
    """Undo `install()`: a real transformer_engine, if there is one, is what imports find again."""
    _ALIAS.uninstall()
