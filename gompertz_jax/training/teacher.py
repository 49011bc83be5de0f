"""The teacher of a run: loaded or trained, and the gate that it passes before the first step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..models import CARD
from ..network import Network
from ..objective import student_alone
from ..step import make_eval_step
from .config import Config
from .data import Dataset, Split
from .drive import Plan, make_plan
from .errors import RunError
from .feed import Images
from .files import write_json
from .fit import fit
from .networks import load_network, network_card, network_fault, network_from, network_shapes, read_card, save_network
from .sharding import check_batch_size, on_main, replicate, say
from .stop import Stop
from .workdir import TEACHER_RESULT, claim_workdir, finished_result, provenance, sole_use

GATE_IMAGES = 5000
OTHER_NORMALISATION = 0.05  # a teacher that gains this much with the data's normalisation has a wrong one


class Teacher(NamedTuple):
    """A network that passed the gate, and where it came from."""

    network: Network
    name: str
    validation_accuracy: float | None
    seconds: float


def teacher_shapes(
    config: Config, content: Mapping[str, Any], dataset: Dataset, devices: int
) -> tuple[dict[str, Any], Network]:
    """The teacher for the pre-flight: its description, and a Network of shapes."""
    if config.teacher.dir:
        directory = teacher_directory(config)
        return on_main(lambda: read_card(directory)), load_network(directory, abstract=True)
    check_batch_size(config.teacher.recipe.batch_size, devices, "teacher.recipe.batch_size")
    Plan.of(config.teacher.recipe, config, len(dataset.train.labels), where="teacher.recipe")
    return content["teacher"], network_shapes(content["teacher"], dataset)


def obtain_teacher(
    config: Config, content: Mapping[str, Any], dataset: Dataset, data: Images, workdir: Path, mesh: Mesh, stop: Stop
) -> Teacher:
    """The teacher that the config names, loaded or trained, once it has passed the gate.

    Raises:
      RunError: it did not pass, or does not exist.
    """
    if config.teacher.dir:
        origin, seconds = teacher_directory(config), 0.0
        network, name = load_network(origin), on_main(lambda: read_card(origin)["model"])
    else:
        origin, name = workdir / "teacher", config.teacher.model
        with sole_use(origin):
            network, seconds = train_teacher(config, content, dataset, data, origin, mesh, stop)
    accuracy = gate(network, dataset, floor=config.teacher.min_accuracy, origin=str(origin), mesh=mesh)
    say(f"teacher {name} ({origin}): accuracy {accuracy:.2%} on {judged_on(dataset)}")
    # That on training images is no measure of a teacher, and is not recorded as one.
    return Teacher(network, name, accuracy if dataset.validation is not None else None, seconds)


def teacher_directory(config: Config) -> Path:
    """Where a teacher that is not trained here is."""
    return Path(config.teacher.dir).expanduser()


def train_teacher(
    config: Config, content: Mapping[str, Any], dataset: Dataset, data: Images, workdir: Path, mesh: Mesh, stop: Stop
) -> tuple[Network, float]:
    """Train the teacher that `config.teacher` describes with this same program, or take the one trained before.

    Args:
      config: the whole experiment's.
      content: the same, frozen.
      dataset: what it learns.
      data: its images.
      workdir: the teacher's own workdir.
      mesh: the devices to train on.
      stop: checked after every dispatch.

    Returns:
      The teacher and the seconds that its training took.

    Raises:
      RunError: the workdir holds a teacher of another config.
    """
    spec = content["teacher"]
    content = {
        "teacher": {key: value for key, value in spec.items() if key not in ("dir", "min_accuracy", "cache")},
        **{key: content[key] for key in ("data", "augment", "steps_per_dispatch", "evaluate_every_epochs")},
    }
    card = on_main(lambda: finished_result(workdir, TEACHER_RESULT, content))
    reason = None if card is None else on_main(lambda: network_fault(workdir))
    if reason is not None:
        say(f"the teacher in {workdir} is damaged ({reason}); it is made again from its last checkpoint")
    elif card is not None:
        return load_network(workdir), card["timing"]["train_seconds"]
    on_main(lambda: claim_workdir(workdir, content))
    origin, recipe = provenance(), config.teacher.recipe
    plan = make_plan(recipe, config, dataset, workdir, where="teacher.recipe")
    say(f"training the teacher {spec['model']}: {plan.steps:,} steps of {recipe.batch_size} images")
    fitted = fit(
        config,
        recipe,
        plan,
        label="teacher",
        workdir=workdir,
        network=network_from(spec, dataset, seed=config.teacher.seed),
        objective=student_alone(label_smoothing=recipe.label_smoothing),
        teacher=None,
        data=data,
        seed=config.teacher.seed,
        mesh=mesh,
        stop=stop,
    )
    save_network(workdir, fitted.selected, network_card(spec, dataset))
    card = {
        "dataset": dataset.name,
        "model": spec["model"],
        "seed": config.teacher.seed,
        "steps": plan.steps,
        "validation_accuracy": fitted.best_accuracy,
        "selected_step": fitted.best_step or plan.steps,
        "config": content,
        **origin,
        "timing": {
            "train_seconds": round(fitted.seconds, 3),
            "images_per_second": round(fitted.images_per_second, 1),
        },
    }
    on_main(lambda: write_json(workdir / TEACHER_RESULT, card))
    # Read from disk the first time too, so that a run and its continuation get the same arrays in the same way.
    return load_network(workdir), card["timing"]["train_seconds"]


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
