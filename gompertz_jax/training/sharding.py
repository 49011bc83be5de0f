"""The devices and processes of a run: the only file of the shell that knows how many there are.

Every process runs the whole program over the same data and the same seeds, and compiled programs span the devices of
all of them. What is not a compiled program (files, the terminal) is done by the first process, which tells the others
through JAX's coordination service: no process looks at a file that another one may be about to write.
"""

import contextlib
import itertools
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import (
    distributed,
)  # its client has no public name; what is posted there needs no device and no collective
from jax.sharding import AxisType, Mesh, NamedSharding

from ..data_parallel import AXIS, REPLICATED
from ..network import PyTree
from .errors import RunError, first_line

T = TypeVar("T")

START_SECONDS = 300  # how long the processes of a run may take to appear
LEAVE_SECONDS = 10  # how long the first process waits for the others to end before it
_POLL_MILLISECONDS = 1000  # a wait for another process is cut into these, so that Ctrl-C ends it
_PREFIX = "gompertz_jax/"
_rounds = itertools.count()


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    detect: bool = False,
) -> None:
    """Join the other processes of this run, before anything touches a device; without arguments, do nothing.

    Args:
      coordinator: `HOST:PORT` of the first process, the same for all; with `processes` and `process`.
      processes: how many there are.
      process: which one this is, from 0.
      detect: let JAX find all this out from Slurm, Kubernetes, Open MPI or the TPU's metadata instead.

    Raises:
      RunError: half the arguments, wrong ones, no cluster found, or the others cannot be reached.
    """
    by_hand = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [flag for flag, value in by_hand.items() if value is not None]
    if detect and given:
        raise RunError(f"--distributed finds out by itself what {given[0]} says: give one of the two")
    if given and len(given) < len(by_hand):
        lacking = [flag for flag in by_hand if flag not in given]
        raise RunError(f"{given[0]} was given without {' and '.join(lacking)}: all three are needed, or --distributed")
    if not given and not detect:
        return
    if coordinator is not None and processes is not None and process is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise RunError(f"--coordinator={coordinator}: must be HOST:PORT of process 0")
        if not 0 <= process < processes:
            raise RunError(f"--process={process}: must lie in [0, {processes}), the number of --processes")
        if process > 0:
            _await(host, int(port))
    try:
        # By hand a process has every device that it sees; Slurm's and Open MPI's processes have one GPU each.
        method = None if detect else "deactivate"
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=method,
            initialization_timeout=START_SECONDS,
        )
    except Exception as error:  # ValueError where nothing is detected, JAX's and the cluster's own errors elsewhere
        way_out = (
            "start it under Slurm, Kubernetes, Open MPI or on a TPU pod, or give --coordinator, --processes, --process"
            if detect
            else "is every process running, with the same --coordinator and --processes and a --process of its own?"
        )
        refusal = "the other processes of this run were not found"
        if distributed.global_state.client is None and "\n" in str(error):
            # What a cluster lacks is said over many lines, all to be read; errors of the connection have traces.
            raise RunError(f"{refusal}. {error}") from error
        raise RunError(f"{refusal} ({first_line(error)}): {way_out}") from error


def _await(host: str, port: int) -> None:
    """Return once the first process listens: JAX would abort the program, without an exception, if it never does."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"--coordinator={host}:{port} cannot be reached ({error}): "
                    "is process 0 running there, and the port open?"
                ) from error
        time.sleep(0.2)


def data_mesh() -> Mesh:
    """All devices of all processes in one row, among which batches are divided."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """A tree's arrays on every device of the mesh; what is there already is not copied again.

    Args:
      tree: arrays of the host or of a device, equal on all processes, which is not checked.
      mesh: where they go.

    Returns:
      The same tree of arrays that compiled programs of all processes can share.
    """
    sharding = NamedSharding(mesh, REPLICATED)

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        array = np.asarray(leaf)
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def check_batch_size(batch_size: int, devices: int, where: str) -> None:
    """Refuse a batch that cannot be divided equally.

    Args:
      batch_size: the whole run's, over all devices.
      devices: how many there are.
      where: the config's key.

    Raises:
      RunError: names the batch, the devices and the nearest batches that would do.
    """
    below = batch_size // devices * devices
    if below != batch_size:
        near = " or ".join(str(size) for size in (below, below + devices) if size)
        raise RunError(
            f"{where} = {batch_size} cannot be divided equally among {devices} devices: take {near}, "
            "or let the run see fewer devices (CUDA_VISIBLE_DEVICES)"
        )


# --- processes --------------------------------------------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process is the one that writes files and prints; the only one, in most runs."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line, once however many processes there are; "?" stands for what the encoding of the output lacks."""
    if is_main():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)


def on_main(work: Callable[[], T]) -> T:
    """Do something on the first process alone; the others wait for it, however long it takes.

    Args:
      work: returns what JSON can hold.

    Returns:
      What it returned, on every process.

    Raises:
      RunError: on every process, if it failed on the first.
    """
    if jax.process_count() == 1:
        return work()
    name = f"{next(_rounds)}"
    if not is_main():
        word = _read(name)
        if "failed" in word:
            raise RunError(word["failed"])
        return word["value"]
    try:
        value = work()
        _post(name, {"value": value})
    except Exception as error:
        _post(name, {"failed": str(error)})
        raise
    return value


def together(work: Callable[[], T]) -> T:
    """Do something on every process, and on the first before the others, so that these find what it prepared.

    Raises:
      RunError: on every process, if it failed on any.
    """
    if jax.process_count() == 1:
        return work()
    done: list[T] = []
    on_main(lambda: done.append(work()))
    failed: Exception | None = None
    if not done:
        try:
            done.append(work())
        except Exception as error:
            failed = error
    name = f"{next(_rounds)}"
    _post(f"{name}/{jax.process_index()}", None if failed is None else str(failed))
    failures = [_read(f"{name}/{process}") for process in range(jax.process_count())]
    if failed is not None:
        raise failed
    for process, failure in enumerate(failures):
        if failure is not None:
            raise RunError(f"process {process}: {failure}")
    return done[0]


def ask_to_stop(number: int) -> None:
    """Let the first process know, from any thread, that this one was asked to stop by signal `number`."""
    if jax.process_count() > 1:
        _post(f"stop/{jax.process_index()}", number)


def asked_to_stop(number: int) -> int:
    """The signal by which any process was asked to stop, the same on all; 0 if none was.

    Args:
      number: the one that this process received; 0 for none.
    """
    if jax.process_count() == 1:
        return number
    return on_main(
        lambda: number or max([int(word) for _, word in _client().key_value_dir_get(_PREFIX + "stop")] + [0])
    )


def connected() -> bool:
    """Whether this process is one of several that `connect` joined; unlike JAX's own count, it starts no device."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def first_leaves_last() -> None:
    """Let the other processes end before the first, after which JAX would abort them: call this, then end at once.

    The first waits for them for at most `LEAVE_SECONDS`: some may be dead, or not know yet that the run is over.
    """
    if not connected():
        return
    here, deadline = distributed.global_state, time.monotonic() + LEAVE_SECONDS
    with contextlib.suppress(Exception):  # nobody is there any more
        if here.process_id > 0:
            _post(f"left/{here.process_id}", True)
            return
        for process in range(1, here.num_processes):
            left = max(1, int(1000 * (deadline - time.monotonic())))
            _client().blocking_key_value_get(f"{_PREFIX}left/{process}", left)
        time.sleep(0.5)  # they have said so, and are ending


def _post(name: str, word: Any) -> None:
    _client().key_value_set(_PREFIX + name, json.dumps(word))


def _read(name: str) -> Any:
    """A value that was posted, or will be. If a process dies, JAX ends the processes that wait for it."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(_PREFIX + name, _POLL_MILLISECONDS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _client() -> Any:
    client = distributed.global_state.client
    if client is None:  # on a TPU pod JAX sees all processes at once, but they cannot speak to each other
        raise RunError(
            f"JAX sees {jax.process_count()} processes, which are not connected: give --distributed to each of them "
            "(in your own code call jax.distributed.initialize() first)"
        )
    return client
