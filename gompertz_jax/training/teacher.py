"""Trained networks on disk, and the gate that a teacher passes before the first step."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from .. import models
from ..data_parallel import COPIED
from ..intact import fault
from ..models import ARRAYS, CARD
from ..network import Network
from ..step import make_eval_step
from .checkpoint import save_arrays
from .data import Dataset, Split
from .errors import RunError
from .files import write_json
from .sharding import data_mesh, on_main, replicate

GATE_IMAGES = 5000
OTHER_NORMALISATION = 0.05  # a teacher that gains this much with the data's normalisation has a wrong one


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
        return models.load(directory, abstract=abstract, sharding=NamedSharding(data_mesh(), COPIED))
    except ValueError as error:
        raise RunError(str(error)) from error


def fingerprint(network: Network) -> str:
    """SHA-256 of a network's arrays: which teacher a student has been learning from."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(network):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def gate(teacher: Network, dataset: Dataset, *, floor: float, origin: str, mesh: Mesh) -> float:
    """Evaluate a teacher before the first step, and refuse one that is broken or weak.

    The images are the validation split, or without one the first 5,000 of the training set.

    Args:
      teacher: the network.
      dataset: what it is to teach.
      floor: the lowest accepted accuracy, a fraction.
      origin: where it came from, for messages.
      mesh: the devices to evaluate it on.

    Returns:
      Its accuracy.

    Raises:
      RunError: a weight is not finite; the accuracy is better with the data's normalisation than with the teacher's
        own, is that of guessing, or is under the floor; or the images are of one class.
    """
    for path, leaf in jax.tree.leaves_with_path({"params": teacher.params, "stats": teacher.stats}):
        broken = int((~np.isfinite(np.asarray(leaf))).sum())
        if broken:
            raise RunError(
                f"the teacher of {origin} is broken: {broken:,} of {leaf.size:,} numbers of "
                f"{jax.tree_util.keystr(path)} are NaN or infinite; train it again, or give another teacher.dir"
            )
    split, images = held_out(dataset), judged_on(dataset)
    if len(set(split.labels.tolist())) == 1:
        which = "held-out images" if dataset.validation is not None else "training images that it is judged on"
        raise RunError(
            f"all {len(split.labels):,} {which} are of class {dataset.class_names[split.labels[0]]!r}, which tells "
            "nothing about a teacher: hold out others (data.split_seed, data.validation)"
        )
    evaluate = make_eval_step(mesh=mesh)

    def accuracy_of(network: Network) -> float:
        classes = evaluate(*replicate((network, *split), mesh)).classes
        return float(np.mean(np.asarray(classes) == split.labels))

    accuracy = accuracy_of(teacher)
    normalised = np.asarray(teacher.mean), np.asarray(teacher.std)
    usual = tuple(
        np.broadcast_to(np.asarray(numbers, own.dtype), own.shape or (len(numbers),))
        for own, numbers in zip(normalised, (dataset.mean, dataset.std), strict=True)
    )
    if not all(np.allclose(own, data, atol=1e-2) for own, data in zip(normalised, usual, strict=True)):
        otherwise = accuracy_of(teacher.replace(mean=usual[0], std=usual[1]))
        if otherwise > accuracy + OTHER_NORMALISATION:
            own, data = (f"mean {np.round(mean, 4)}, std {np.round(std, 4)}" for mean, std in (normalised, usual))
            raise RunError(
                f"the teacher of {origin} classifies {accuracy:.1%} of {images} with its own normalisation "
                f"({own}) and {otherwise:.1%} with that of {dataset.name} ({data}): its own is not the one that it was "
                f"trained with; put the right mean and std into its {CARD}"
            )
    # The best that is possible without looking, where classes are unequal.
    chance = max(1.0 / dataset.num_classes, np.bincount(split.labels).max() / len(split.labels))
    # Untrained networks reach up to twice the chance on a hundred images; with two classes that would be everything.
    if accuracy <= min(2 * chance, chance + 0.15 * (1 - chance)):
        raise RunError(
            f"the teacher of {origin} classifies {accuracy:.1%} of {images}, and guessing {chance:.1%}: "
            f"its weights are untrained, or its classes are in another order than those of {dataset.name}; train it "
            "longer (teacher.recipe.epochs) in another --workdir, or give a teacher.dir with a network trained on it"
        )
    if accuracy < floor:
        raise RunError(
            f"the teacher of {origin} classifies {accuracy:.1%} of {images}, under the floor "
            f"teacher.min_accuracy = {floor:.1%}: lower the floor, or train a better one with another --workdir"
        )
    return accuracy


def held_out(dataset: Dataset) -> Split:
    """The images a teacher is judged on before the first step."""
    if dataset.validation is not None:
        return dataset.validation
    return Split(dataset.train.images[:GATE_IMAGES], dataset.train.labels[:GATE_IMAGES])


def judged_on(dataset: Dataset) -> str:
    """Which images `held_out` gives, in words."""
    return "the held-out images" if dataset.validation is not None else "training images, as none are held out"
