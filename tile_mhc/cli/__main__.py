"""`python -m tile_mhc.cli` is the same as `tile-mhc`."""

from tile_mhc.cli import entry

if __name__ == "__main__":
    entry()
