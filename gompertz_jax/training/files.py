"""Files that are whole or absent: written atomically, sealed with their checksums, set aside where they are damaged."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..intact import SUMS, sums
from .errors import RunError

ASIDE = "set_aside"

_AGAIN = "make room, or make it writable, and start again: the run goes on from the last checkpoint, which is intact"


@contextlib.contextmanager
def writing(path: Path, way_out: str = _AGAIN) -> Iterator[None]:
    """Turn an error of the file system, mostly a full or read-only disk, into the one error that a user reads.

    Raises:
      RunError: names the file and the reason.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}); {way_out}") from error


def replace_text(path: Path, text: str, way_out: str = _AGAIN) -> None:
    """Write a text file so that a reader finds the old one or the new one, never a part of either.

    Raises:
      RunError: it cannot be written; the old one is as it was.
    """
    temporary = path.with_suffix(path.suffix + ".partial")
    with writing(path, way_out):
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader finds the old one or the new one, never a part of either."""
    replace_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
      RunError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it, or choose another --workdir") from error


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts of them; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
