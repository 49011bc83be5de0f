"""The directory of a run: whose it is, whether it can be written, and what computed in it."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from .config import OPEN, Config, differing_keys, get_default
from .errors import RunError
from .files import read_json, set_aside, write_json, writing
from .sharding import on_main, say
from .writer import METRICS

CONFIG, DATA, CHANGES, LOCK = "config.json", "data.json", "evaluation_changes.json", "lock"
CHECKPOINTS = "checkpoints"
# The result of a run, of a teacher's training, of a comparison and of a search, the last file of each to be written.
RESULT, TEACHER_RESULT, COMPARISON, SEARCH = "result.json", "teacher.json", "results.json", "tune.json"


def frozen(config: Config) -> dict[str, Any]:
    """A config as JSON would give it back, so that a saved and a fresh one compare equal."""
    return json.loads(json.dumps(config.to_dict()))


def with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """A frozen config with the keys that it lacks at their defaults: it may be older than some of them."""
    return _filled(content, frozen(get_default()))


def _filled(content: Mapping[str, Any], default: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    whole = {**default, **content}
    for key in default.keys() & content.keys():
        if isinstance(default[key], dict) and f"{prefix}{key}" not in OPEN:
            whole[key] = _filled(content[key], default[key], f"{prefix}{key}.")
    return whole


def check_workdir(workdir: Path, content: Mapping[str, Any]) -> None:
    """Refuse a workdir that cannot be written or that belongs to another config; creates it if need be.

    Raises:
      RunError: says which keys differ.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another start may have probed at the same time
    except OSError as error:
        reason = f"the workdir {workdir} cannot be written ({error.strerror})"
        raise RunError(f"{reason}; choose another --workdir") from error
    if (workdir / CONFIG).exists():
        before = read_json(workdir / CONFIG)
        kinds = {False: "a single run", True: "a comparison or a search"}
        held, wanted = (kinds["arms" in config] for config in (before, content))
        if held != wanted:
            raise RunError(f"the workdir {workdir} holds {held}; {wanted} needs its own --workdir")
        if changes := differing_keys(with_defaults(before), with_defaults(content)):
            seeds = "seeds" in content and before.get("seeds") != content["seeds"]
            raise RunError(
                f"the workdir {workdir} belongs to a run with another config; choose another --workdir. "
                f"Changed: {'; '.join(changes)}{'; seeds cannot be added to a comparison' if seeds else ''}"
            )
    elif leftovers := [name for name in (CHECKPOINTS, "network", METRICS) if (workdir / name).exists()]:
        raise RunError(f"the workdir {workdir} holds {leftovers[0]} but no {CONFIG}; choose another --workdir")


def finished_result(workdir: Path, name: str, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result `name` of a workdir, if it is there and the workdir can be this config's.

    A damaged one is moved aside and made again from the last checkpoint.

    Raises:
      RunError: as `check_workdir`.
    """
    check_workdir(workdir, content)
    path = workdir / name
    if not path.exists():
        return None
    try:
        return read_json(path)
    except RunError:
        say(f"{path} is damaged and kept as {set_aside(path)}; it is made again from the last checkpoint")
        return None


def begun_with(workdir: Path, key: str) -> Any:
    """What a key of the config was at the first start; None before it."""
    return with_defaults(read_json(workdir / CONFIG))[key] if (workdir / CONFIG).exists() else None


def evaluation_changes(workdir: Path, content: Mapping[str, Any]) -> list[str]:
    """What differs, or at an earlier start differed, from the first start in how a run is evaluated.

    Results record it, so it is kept in the workdir; and the user is told.
    """
    keys = ("evaluate_every_epochs", "teacher")
    both = (with_defaults(config) for config in (read_json(workdir / CONFIG), content))
    old, new = ({key: config[key] for key in keys} for config in both)
    earlier = read_json(workdir / CHANGES)["changes"] if (workdir / CHANGES).exists() else []
    changes = list(dict.fromkeys([*earlier, *differing_keys(old, new, without=())]))
    if changes != earlier:
        write_json(workdir / CHANGES, {"changes": changes})
    if changes:
        say(f"evaluated otherwise than at its first start: {'; '.join(changes)}")
    return changes


def check_data(workdir: Path, name: str, sha256: str) -> None:
    """Refuse to continue with images other than those that a run began with.

    Args:
      workdir: the run's.
      name: the data set's, for the message.
      sha256: checksum of its training images and labels; "" for sets that are checked against official checksums.

    Raises:
      RunError: they differ.
    """
    if (workdir / DATA).exists() and (before := read_json(workdir / DATA)["sha256"]) != sha256:
        raise RunError(
            f"the training images of {name} (sha256 {sha256[:12]}...) are not those that the run in {workdir} began "
            f"with ({before[:12]}...); restore them, or choose another --workdir"
        )


def claim_workdir(workdir: Path, content: Mapping[str, Any], data_sha256: str = "") -> None:
    """Freeze the config of a run into its workdir, and the checksum of its own images, at its first start."""
    if data_sha256 and not (workdir / DATA).exists():
        write_json(workdir / DATA, {"sha256": data_sha256})
    if not (workdir / CONFIG).exists():
        write_json(workdir / CONFIG, content)


@contextlib.contextmanager
def sole_use(workdir: Path) -> Iterator[None]:
    """Hold a workdir for this run; the first of several processes does so for all.

    The hold is on an open file: the system ends it with the process, however that ends.

    Raises:
      RunError: another run holds it; or it cannot be written.
    """
    held: list[TextIO] = []
    on_main(lambda: held.append(_locked(workdir)))
    try:
        yield
    finally:
        for file in held:
            file.close()


def _locked(workdir: Path) -> TextIO:
    with writing(workdir / LOCK):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunError(
            f"the workdir {workdir} is in use by {holder}: wait for it, stop it, or choose another --workdir"
        ) from error
    except OSError as error:
        say(f"{workdir} is on a file system without locks ({error.strerror}): nothing keeps a second run out of it")
    with writing(workdir / LOCK):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def provenance() -> dict[str, Any]:
    """Versions of everything that computes, and the commit of this code where it is in a checkout."""
    packages = ("gompertz-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "orbax-checkpoint", "numpy")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            versions[name] = None
    return {
        "versions": versions | {"python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "commit": _commit(),
    }


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        tracked = git("ls-files", Path(__file__).name)
        if not tracked:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
