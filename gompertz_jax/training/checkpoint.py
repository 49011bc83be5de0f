"""Checkpoints of a run and finished networks on disk: the only file that knows Orbax."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1

from ..network import PyTree
from .errors import RunError

ocp: Any = v1  # its annotations refuse its own policies and pathlib's paths


class Checkpoints:
    """The saved states of one run, `DIRECTORY/<step>`; a state counts once Orbax has renamed it into place.

    A state is any tree of arrays. A small JSON record lies beside it (seconds trained so far).
    """

    def __init__(self, directory: Path, *, keep: int):
        training = ocp.training
        self._checkpointer = training.Checkpointer(
            Path(directory).absolute(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest saved state, None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Save `state` and return once it counts; a step that is saved already is left as it is."""
        if step != self.latest_step:
            self._checkpointer.save(step, state, custom_metadata=record, force=True)

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest state, in the structure, shapes and dtypes of `template`, and its record.

        Raises:
          RunError: what is saved does not fit the template, or cannot be read.
        """
        step = self.latest_step
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
        """Release the directory."""
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save_arrays(directory: Path, tree: PyTree) -> None:
    """Save a tree of arrays under a directory of its own, whole or not at all; one that is there is left as it is."""
    if not directory.exists():
        ocp.save(directory.absolute(), tree)


def load_arrays(directory: Path, template: PyTree) -> PyTree:
    """The tree saved by `save_arrays`, in the structure, shapes and dtypes of `template`.

    Raises:
      RunError: there is no such directory, it does not fit the template, or it cannot be read.
    """
    if not directory.is_dir():
        raise RunError(f"{directory} does not exist, or is no directory")
    try:
        return ocp.load(directory.absolute(), _abstract(template))
    except Exception as error:
        raise RunError(f"{directory} cannot be read ({_first_line(error)})") from error


def _abstract(tree: PyTree) -> PyTree:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or sharding),
        tree,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
