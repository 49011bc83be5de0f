"""Whether saved files are still as they were saved: a list of SHA-256 sums in each directory of arrays.

Orbax loads some damaged files without an error. So every directory gets a list of its files in the form of `sha256sum`,
written once Orbax has renamed the directory into place and compared before anything in it is read. A directory counts
as whole only once it has its list; `cd DIRECTORY && sha256sum -c SHA256SUMS` makes the same check.
"""

import hashlib
import os
from pathlib import Path

SUMS = "SHA256SUMS"


def sums(directory: Path) -> str:
    """The list of a directory's files, each of which is first synced to the disk."""
    return "".join(
        f"{_sha256(path, sync=True)}  {path.relative_to(directory).as_posix()}\n" for path in _files(directory)
    )


def sealed(directory: Path) -> bool:
    """Whether the directory was whole once."""
    return (directory / SUMS).is_file()


def fault(directory: Path) -> str | None:
    """What is wrong with a sealed directory; None if every file is there, is as it was, and there is no other."""
    if not directory.is_dir():
        return "it is gone"
    if not sealed(directory):
        return f"it has no {SUMS}"
    try:
        lines = (directory / SUMS).read_text().splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        present = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
        if missing := sorted(expected.keys() - present.keys()):
            return f"{missing[0]} is missing"
        if unlisted := sorted(present.keys() - expected.keys()):
            return f"{unlisted[0]} is not in {SUMS}"
        for name, path in present.items():
            if _sha256(path) != expected[name]:
                return f"{name} was altered or cut off"
        return None if present else "it is empty"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / SUMS)


def _sha256(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
