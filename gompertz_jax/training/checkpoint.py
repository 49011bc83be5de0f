"""Checkpoints of a run and finished networks on disk: the only file of the shell that knows Orbax.

With several processes all of them call everything here, at the same place of the program; the directories are shared.
"""

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from orbax.checkpoint import v1

from ..data_parallel import REPLICATED
from ..intact import SUMS, fault, sealed
from ..network import PyTree
from .errors import RunError, first_line
from .files import read_json, seal, set_aside, write_json, writing
from .sharding import data_mesh, is_main, on_main, say

RECORD = "record.json"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of the directories in which Orbax saves

ocp: Any = v1  # its annotations refuse its own policies and pathlib's paths


class Checkpoints:
    """The saved states of one run, `DIRECTORY/<step>`; each is whole once it is sealed, after Orbax has renamed it.

    A state is any tree of arrays. A small JSON record lies with it (what a later start must know besides the state).
    `DIRECTORY.json` says which step was saved last: it distinguishes what was lost from what was never finished.

    Args:
      directory: made if need be.
      keep: how many of the newest states stay. An older one goes only after a newer one is sealed.
      agrees: `(step, record) -> bool`, whether what was written alongside still matches that state. Of the intact
        states the newest that agrees is taken; if none does, the newest.

    Raises:
      RunError: states were saved here, and none is intact.
    """

    def __init__(
        self, directory: Path, *, keep: int, agrees: Callable[[int, dict[str, Any]], bool] = lambda step, record: True
    ):
        self._directory, self._keep = Path(directory).absolute(), keep
        self._ledger = self._directory.with_suffix(".json")

        def choose() -> dict[str, Any]:
            with writing(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
                return self._choose(agrees)

        found = on_main(choose)
        self._latest: int | None = found["step"]
        for line in found["messages"]:
            say(line)
        self._thread = ThreadPoolExecutor(1, "seal")
        self._in_flight: tuple[int, Future[None]] | None = None

    @property
    def latest_step(self) -> int | None:
        """The step of the newest state that is known to be on disk and intact; None if there is none."""
        return self._latest

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Begin to save `state` and return once its arrays, which may then be donated, have been copied.

        Waits for the save before it. A step that is saved already is left as it is.

        Raises:
          RunError: as `wait`.
        """
        self.wait()
        if step != self._latest:
            context = _saving()
            # With its folders made in the background, a save that cannot make them would never end.
            context.asynchronous.create_directories_asynchronously = False
            with self._writing(step), context:
                response = ocp.save_async(self._directory / str(step), state)
                self._in_flight = step, self._thread.submit(self._finish, step, response, record)

    def _finish(self, step: int, response: Any, record: dict[str, Any]) -> None:
        """Once Orbax is done, in a thread: the state counts when it is sealed, and then the oldest one may go."""
        response.result()
        if is_main():
            write_json(self._directory / str(step) / RECORD, record)
            seal(self._directory / str(step))
            write_json(self._ledger, {"saved": step})
            for old in self._steps()[: -self._keep]:
                # The list goes first: what an interrupted removal leaves is then not taken for a damaged state.
                shutil.rmtree(_unsealed(self._directory / str(old)), ignore_errors=True)

    def wait(self) -> None:
        """Return once the save that was begun last is on disk; at once if there is none under way.

        Raises:
          RunError: it could not be written.
        """
        if self._in_flight is not None:
            (step, finished), self._in_flight = self._in_flight, None
            with self._writing(step):
                finished.result()
            self._latest = step

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except RunError:
            raise
        except Exception as error:
            raise RunError(
                f"the checkpoint {self._directory / str(step)} cannot be written ({first_line(error)}); "
                "make room and start again, and the run goes on from the one before it"
            ) from error

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest state, in the structure, shapes and dtypes of `template`, and its record.

        Raises:
          RunError: what is saved does not fit the template, or cannot be read.
        """
        self.wait()
        step = self._latest
        if step is None:
            raise RunError(f"{self._directory} holds no checkpoint")
        try:
            state = ocp.load(self._directory / str(step), _abstract(template))
        except Exception as error:
            raise RunError(
                f"the checkpoint {self._directory / str(step)} cannot be read "
                f"({first_line(error)}); move it away to go on from the one before it"
            ) from error
        return state, on_main(lambda: read_json(self._directory / str(step) / RECORD))

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

    def _last_saved(self) -> int | float:
        """The step that was sealed last; -1 if none ever was; infinity where that cannot be read any more."""
        try:
            return read_json(self._ledger)["saved"] if self._ledger.exists() else -1
        except RunError:
            return math.inf

    def _choose(self, agrees: Callable[[int, dict[str, Any]], bool]) -> dict[str, Any]:
        """Find the state to resume from, and move newer ones out of the way of those to come."""
        for path in self._directory.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(path)
        steps, saved = self._steps(), self._last_saved()
        # Only one save is under way at a time, so only the newest state can be one whose save was cut off by a kill.
        cut_off = [step for step in steps[-1:] if step > saved and not sealed(self._directory / str(step))]
        faults = dict.fromkeys(cut_off, "it was never finished")
        chosen = newest = None
        for step in reversed([step for step in steps if step not in faults]):
            if reason := fault(self._directory / str(step)):
                faults[step] = reason
                continue
            newest = step if newest is None else newest
            if agrees(step, read_json(self._directory / str(step) / RECORD)):
                chosen = step
                break
        if newest is None and (len(faults) > len(cut_off) or saved >= 0):
            reasons = [f"{step}: {reason}" for step, reason in faults.items()] or ["they are gone"]
            raise RunError(
                f"no checkpoint of the workdir {self._directory.parent} is intact ({'; '.join(reasons)}): restore "
                f"{self._directory} from a copy, or start anew with another --workdir"
            )
        chosen = newest if chosen is None else chosen
        messages = []
        for step in steps:
            if chosen is None or step > chosen:
                path, reason = self._directory / str(step), faults.get(step, "metrics.jsonl lost lines from before it")
                messages.append(f"the checkpoint {path} is left out ({reason}) and kept as {set_aside(path)}")
        return {"step": chosen, "messages": messages}

    def close(self) -> None:
        """Wait for what is under way, and release the directory.

        Raises:
          RunError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except RunError as error:
            if kind is None:
                raise
            say(f"besides: {error}")  # raised, it would hide what the run ends with


def saved_steps(directory: Path) -> list[int]:
    """The steps whose states are whole, in order; for readers beside the run, which take no part in it."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit() and sealed(path))


def read_state(directory: Path) -> PyTree:
    """A state of `Checkpoints` as it lies on disk: what was a named tuple is a dict.

    Raises:
      RunError: it is damaged, or its run has removed it meanwhile.
    """
    if reason := fault(directory):
        raise RunError(
            f"the checkpoint {directory} cannot be read: {reason}; the run may have replaced it by a newer one"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about loading without a template
        return ocp.load(directory.absolute())


def save_arrays(directory: Path, tree: PyTree) -> None:
    """Save a tree of arrays in its own directory, whole or not at all; one that is whole is left as it is.

    Raises:
      RunError: it cannot be written.
    """

    def is_needed() -> bool:
        if directory.exists() and (reason := fault(directory)):  # by damage, or by a kill while it was saved
            say(f"{directory} is not whole ({reason}); it is saved again, and what there was is kept")
            set_aside(directory)
        return not directory.exists()

    if on_main(is_needed):
        try:
            with _saving():
                ocp.save(directory.absolute(), tree)
        except Exception as error:
            raise RunError(f"{directory} cannot be written ({first_line(error)}); make room and start again") from error
        on_main(lambda: seal(directory))


def load_arrays(directory: Path, template: PyTree) -> PyTree:
    """The tree saved by `save_arrays`, in the structure, shapes and dtypes of `template`.

    Args:
      directory: where it was saved.
      template: arrays or shapes; where one has a sharding, so has what is loaded.

    Returns:
      The tree; what has no sharding in the template is copied to every device.

    Raises:
      RunError: there is no such directory, it is damaged, it does not fit the template, or it cannot be read.
    """
    if not on_main(directory.is_dir):
        raise RunError(
            f"{directory} is no checkpoint: it does not exist, or is no directory; restore it from a copy, or give the "
            "workdir of a finished run"
        )
    if reason := on_main(lambda: fault(directory)):
        raise RunError(f"{directory} is damaged or no checkpoint: {reason}; restore it from a copy, with its {SUMS}")
    try:
        return ocp.load(directory.absolute(), _abstract(template))
    except Exception as error:
        raise RunError(f"{directory} cannot be read ({first_line(error)})") from error


def _saving() -> Any:
    # Every device has the whole state. By default Orbax lets each write a slice of every array, cut while the loop
    # waits: with eight devices a first save took 8 s (104 programs to compile) for .2, and later ones .6 s for .1.
    return ocp.Context(
        array_options=ocp.options.ArrayOptions(saving=ocp.options.ArrayOptions.Saving(use_replica_parallel=False))
    )


def _abstract(tree: PyTree) -> PyTree:
    everywhere = NamedSharding(data_mesh(), REPLICATED)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or everywhere
        ),
        tree,
    )


def _unsealed(directory: Path) -> Path:
    (directory / SUMS).unlink(missing_ok=True)
    return directory
