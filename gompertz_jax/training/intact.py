"""The write side of `gompertz_jax.intact`: directories are sealed, and what is damaged is moved, never removed."""

import os
from pathlib import Path

from ..intact import SUMS, sums
from .writer import replace_text

ASIDE = "set_aside"


def seal(directory: Path) -> None:
    """Write the list of a directory's files, once they are on the disk itself."""
    replace_text(directory / SUMS, sums(directory))


def set_aside(path: Path) -> Path:
    """Move something damaged into a folder beside it, where nothing is overwritten; returns where it is now."""
    folder = path.parent / ASIDE
    folder.mkdir(exist_ok=True)
    names = (path.name if count == 0 else f"{path.name}.{count}" for count in range(len(os.listdir(folder)) + 1))
    target = next(folder / name for name in names if not (folder / name).exists())
    return path.rename(target)
