"""Make `tile_mhc.kernels` importable in a checkout that is not installed.

Installed, it is a package inside tile_mhc; in a checkout it is the folder kernels/mhc beside it. An
editable install maps the one to the other. Python started in a checkout beside a wheel, or with
nothing installed, finds the checkout's tile_mhc first and would look for kernels in vain.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "tile_mhc.kernels"
FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "mhc"


def find_kernels() -> None:
    """Register kernels/mhc as `tile_mhc.kernels`, unless that is found without."""
    if importlib.util.find_spec(NAME) is not None:
        return
    spec = importlib.util.spec_from_file_location(NAME, FOLDER / "__init__.py")
    if spec is None or spec.loader is None or not FOLDER.is_dir():
        return  # the import that follows says what is missing
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    setattr(importlib.import_module("tile_mhc"), "kernels", module)  # noqa: B010


find_kernels()
