"""Checkpoints of a run and finished networks on disk: the only file that knows Orbax.

With several processes all of them call everything here, at the same place of the program; the directories are shared.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from orbax.checkpoint import v1

from ..data_parallel import COPIED
from ..network import PyTree
from .errors import RunError
from .sharding import data_mesh, on_main

ocp: Any = v1  # its annotations refuse its own policies and pathlib's paths


class Checkpoints:
    """The saved states of one run, `DIRECTORY/<step>`; a state counts once Orbax has renamed it into place.

    A state is any tree of arrays. A small JSON record lies beside it (seconds trained so far).
    """

    def __init__(self, directory: Path, *, keep: int):
        training = ocp.training
        self._checkpointer = training.Checkpointer(
            Path(directory).absolute(),
            # With its folders made in the background, a save that cannot make them would never end.
            context=ocp.Context(async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._in_flight: tuple[int, Any] | None = None
        self._latest: int | None = on_main(lambda: getattr(self._checkpointer.latest, "step", None))

    @property
    def latest_step(self) -> int | None:
        """The step of the newest state that is known to be on disk; None if there is none."""
        return self._latest

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Begin to save `state` and return once its arrays, which may then be donated, have been copied.

        Waits for the save before it. A step that is saved already is left as it is.

        Raises:
          RunError: as `wait`.
        """
        self.wait()
        if step != self._latest:
            with self._writing(step):
                self._in_flight = step, self._checkpointer.save_async(step, state, custom_metadata=record, force=True)

    def wait(self) -> None:
        """Return once the save that was begun last is on disk; at once if there is none under way.

        Raises:
          RunError: it could not be written.
        """
        if self._in_flight is not None:
            (step, response), self._in_flight = self._in_flight, None
            with self._writing(step):
                response.result()
            self._latest = step

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RunError(
                f"the checkpoint {self._checkpointer.directory / str(step)} cannot be written ({_first_line(error)}); "
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
            raise RunError(f"{self._checkpointer.directory} holds no checkpoint")
        try:
            state = self._checkpointer.load(step, _abstract(template))
            record = self._checkpointer.metadata(step).custom_metadata
        except Exception as error:
            raise RunError(
                f"the checkpoint {self._checkpointer.directory / str(step)} cannot be read "
                f"({_first_line(error)}); move it away to go on from the one before it"
            ) from error
        return state, dict(record or {})

    def close(self) -> None:
        """Wait for what is under way, and release the directory.

        Raises:
          RunError: as `wait`.
        """
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # Orbax says once more what `wait` has said
                self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save_arrays(directory: Path, tree: PyTree) -> None:
    """Save a tree of arrays under a directory of its own, whole or not at all; one that is there is left as it is."""
    if not on_main(directory.exists):
        ocp.save(directory.absolute(), tree)


def load_arrays(directory: Path, template: PyTree) -> PyTree:
    """The tree saved by `save_arrays`, in the structure, shapes and dtypes of `template`.

    Args:
      directory: where it was saved.
      template: arrays or shapes; where one has a sharding, so has what is loaded.

    Returns:
      The tree; what has no sharding in the template is copied to every device.

    Raises:
      RunError: there is no such directory, it does not fit the template, or it cannot be read.
    """
    if not on_main(directory.is_dir):
        raise RunError(f"{directory} does not exist, or is no directory")
    try:
        return ocp.load(directory.absolute(), _abstract(template))
    except Exception as error:
        raise RunError(f"{directory} cannot be read ({_first_line(error)})") from error


def _abstract(tree: PyTree) -> PyTree:
    everywhere = NamedSharding(data_mesh(), COPIED)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or everywhere
        ),
        tree,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
