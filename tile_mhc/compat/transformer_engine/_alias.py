"""Make `from transformer_engine.pytorch.triton.mhc import ...` resolve to this package."""

from tile_mhc.compat._alias import Alias

_ALIAS = Alias(
    "transformer_engine",
    __name__.rpartition(".")[0],
    parts=("pytorch.triton.mhc",),
    whole=False,
)


def install(*, force: bool = False) -> None:
    """Let `from transformer_engine.pytorch.triton.mhc import ...` find the module of this package.

    Nothing else of TransformerEngine is pretended: where there is none, `import transformer_engine`
    fails as before, and whoever looks for it finds nothing. So the statement has to be a
    `from ... import`, of the module or from it (or `importlib.import_module`): a plain
    `import transformer_engine.pytorch.triton.mhc` asks for `transformer_engine` too. Installing
    twice is one install, also from two threads.

    Args:
        force: also when a real transformer_engine is there. It is imported, and its
            `pytorch.triton.mhc` is ours until `uninstall()`; the rest of it stays as it is. What
            was imported before keeps working on what it has.

    Raises:
        RuntimeError: a real transformer_engine is installed or imported, and `force` is not set.
    """
    _ALIAS.install(force)


def uninstall() -> None:
    """Undo `install()`: what imports find, and what packages hold, is as before."""
    _ALIAS.uninstall()
