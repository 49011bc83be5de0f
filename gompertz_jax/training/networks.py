"""Networks of a config: made, described by a card, saved and loaded again."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .. import models
from ..data_parallel import REPLICATED
from ..intact import fault
from ..models import ARRAYS, CARD
from ..network import Network
from .checkpoint import save_arrays
from .data import Dataset
from .errors import RunError
from .files import write_json
from .sharding import data_mesh, on_main


def network_from(spec: Mapping[str, Any], dataset: Dataset, *, seed: int) -> Network:
    """A fresh network as `config.student` or `config.teacher` describes it, for this data set.

    Raises:
      RunError: the model refuses its options.
    """
    try:
        return models.create(
            spec["model"],
            num_classes=dataset.num_classes,
            key=jax.random.key(seed),
            dtype=jnp.dtype(spec["dtype"]),
            in_channels=dataset.train.images.shape[-1],
            mean=dataset.mean,
            std=dataset.std,
            **spec["options"],
        )
    except Exception as error:  # whatever an option leads to
        raise RunError(f"model {spec['model']!r} with options {dict(spec['options'])}: {error}") from error


def network_shapes(spec: Mapping[str, Any], dataset: Dataset) -> Network:
    """The same network as shapes, with its normalisation, for a pre-flight: nothing is drawn or compiled."""
    shapes = jax.eval_shape(lambda: network_from(spec, dataset, seed=0))
    return shapes.replace(mean=np.asarray(dataset.mean), std=np.asarray(dataset.std))


def network_card(spec: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """The description of a network made by `network_from`; `gompertz_jax.models.from_card` rebuilds it from this."""
    return {
        "model": spec["model"],
        "options": dict(spec["options"]),
        "dtype": spec["dtype"],
        "num_classes": dataset.num_classes,
        "in_channels": dataset.train.images.shape[-1],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "dataset": dataset.name,
    }


def save_network(directory: Path, network: Network, card: Mapping[str, Any]) -> None:
    """Save a network under `directory`: its arrays, then the card from which `load_network` rebuilds it."""
    save_arrays(directory / ARRAYS, {"params": network.params, "stats": network.stats})
    on_main(lambda: write_json(directory / CARD, card))


def read_card(directory: Path) -> dict[str, Any]:
    """The description of a saved network.

    Raises:
      RunError: the directory holds no finished network.
    """
    try:
        return models.read_card(directory)
    except ValueError as error:
        raise RunError(str(error)) from error


def network_fault(directory: Path) -> str | None:
    """What is wrong with a network that was saved in a directory; None if it is intact."""
    try:
        read_card(directory)
    except RunError as error:
        return str(error)
    return fault(directory / ARRAYS)


def load_network(directory: Path, *, abstract: bool = False) -> Network:
    """The network that `save_network` saved.

    Args:
      directory: a finished run's workdir, or its `teacher` folder.
      abstract: give shapes instead of arrays, and read the card only.

    Returns:
      A Network with its own normalisation.

    Raises:
      RunError: no network is there, or it does not fit its card, or it cannot be read.
    """
    on_main(lambda: read_card(directory))  # no process looks before the first one has found a whole network
    try:
        return models.load(directory, abstract=abstract, sharding=NamedSharding(data_mesh(), REPLICATED))
    except ValueError as error:
        raise RunError(str(error)) from error


def fingerprint(network: Network) -> str:
    """SHA-256 of a network's arrays: which teacher a student has been learning from."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(network):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
