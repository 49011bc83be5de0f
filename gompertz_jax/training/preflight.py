"""What a run is about to do, said and checked from shapes alone before anything is compiled."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..network import Network, Outputs, PyTree
from ..objective import Objective, Record, evaluate, init_projections, project
from ..step import output_shapes
from . import config as config_module
from .data import Dataset
from .errors import RunError


def check_network(role: str, network: Network, dataset: Dataset, *, batch_size: int = 1) -> Outputs:
    """The shapes of a network's outputs on this data set's images.

    Args:
      role: "teacher" or "student", for messages.
      network: arrays or shapes.
      dataset: whose images and classes it must fit.
      batch_size: of the shapes.

    Returns:
      Outputs of shapes.

    Raises:
      RunError: the network cannot take the images, its classes are not the data's, or its normalisation is not one of
        images in [0, 1] with this number of channels.
    """
    height, width, channels = dataset.train.images.shape[1:]
    mean, std = np.asarray(network.mean, np.float64), np.asarray(network.std, np.float64)
    for name, value in (("mean", mean), ("std", std)):
        if value.size not in (1, channels):
            raise RunError(
                f"the {role}'s {name} has {value.size} channels, the images of {dataset.name} have {channels}: "
                "give one value per channel"
            )
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise RunError(f"the {role}'s normalisation must be finite and std above 0, got mean {mean}, std {std}")
    if mean.max() > 1.0 or std.max() > 1.0:
        raise RunError(
            f"the {role}'s normalisation (mean {mean}, std {std}) is not one of images in [0, 1]; "
            "divide both by 255 if it was measured on 0..255"
        )
    try:
        shapes = output_shapes(network, (height, width, channels), batch_size=batch_size)
    except Exception as error:
        raise RunError(
            f"the {role} cannot take images of {height}x{width}x{channels}: {str(error).splitlines()[0]}; "
            "choose a network, or its stem, for this size"
        ) from error
    if shapes.logits.shape[-1] != dataset.num_classes:
        raise RunError(
            f"the {role} has {shapes.logits.shape[-1]} classes, {dataset.name} has {dataset.num_classes}: "
            f"choose a {role} trained on {dataset.name}"
        )
    if 0 in [size for stage in shapes.features for size in stage.shape]:
        raise RunError(
            f"images of {height}x{width} are too small for the {role}: its stages are {stages(shapes)}; "
            "choose a network with fewer strides"
        )
    return shapes


def check_projections(objective: Objective, student: Outputs, teacher: Outputs) -> None:
    """Refuse a projection between stages that one of the networks does not have."""
    for name, projection in objective.projections.items():
        for role, shapes, stage in (
            ("student", student, projection.student_stage),
            ("teacher", teacher, projection.teacher_stage),
        ):
            count = len(shapes.features)
            if not -count <= stage < count:
                raise RunError(
                    f"objective.projections.{name}.{role}_stage = {stage}: the {role} has stages 0 to {count - 1} "
                    f"({stages(shapes)}), or -1 for the last"
                )


def check_terms(objective: Objective, student: Outputs, teacher: Outputs | None, image_shape: tuple[int, ...]) -> None:
    """Refuse a term that cannot be computed from these shapes, before any of it is compiled."""

    def record(student: Outputs, teacher: Outputs | None) -> Record:
        maps = ({}, {}, {})
        if teacher is not None:
            maps = project(
                objective, *init_projections(objective, student, teacher, jax.random.key(0)), student, teacher
            )

        def pull_back(cotangent: jax.Array) -> jax.Array:
            return jnp.zeros((len(cotangent), *image_shape))

        return Record(
            jnp.zeros(len(student.logits), jnp.int32),
            student,
            teacher,
            student_maps=maps[0],
            teacher_maps=maps[1],
            student_pullback=pull_back,
            teacher_pullback=pull_back,
            leading=lambda count: (student.logits[:count], pull_back, pull_back),
            key=jax.random.key(0),
        )

    for term in objective.terms:
        alone = Objective((term,), objective.projections)
        try:
            jax.eval_shape(lambda s, t, alone=alone: evaluate(alone, record(s, t), 0).raw, student, teacher)
        except (TypeError, ValueError) as error:
            raise RunError(f"objective.terms.{term.name} cannot be computed: {str(error).splitlines()[0]}") from error


def stages(shapes: Outputs) -> str:
    """A network's maps as the field's tables write them, channels@size."""
    return ", ".join(f"{stage.shape[3]}@{_size(stage.shape)}" for stage in shapes.features)


def count_parameters(tree: PyTree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


Role = tuple[str, Mapping[str, Any], Network]  # "teacher" or "student", its description, its arrays or shapes


def describe(
    dataset: Dataset,
    *,
    student: Role,
    teacher: Role | None,
    objective: Objective,
    batch_size: int,
    steps: int,
    steps_per_dispatch: int,
    devices: int,
    label: str,
) -> str:
    """The pre-flight's text. Networks may be arrays or shapes; nothing is computed or compiled.

    Args:
      dataset: what is learnt.
      student: who learns.
      teacher: who teaches, if anybody does.
      objective: what is minimised.
      batch_size: images a step, over all devices.
      steps: how many.
      steps_per_dispatch: how many of them a dispatch takes.
      devices: among which batches are divided, over all processes.
      label: of the run.

    Returns:
      A few lines.

    Raises:
      RunError: as `check_network`, `check_projections` and `check_terms`.
    """
    validation = 0 if dataset.validation is None else len(dataset.validation.labels)
    image_shape = dataset.train.images.shape[1:]
    rows = [
        ("run", f"{label}, {jax.default_backend()} x {devices}{_processes()}, jax {jax.__version__}"),
        (
            "data",
            f"{dataset.name}: {len(dataset.train.labels):,} training images, {validation:,} held out, "
            f"{dataset.num_classes} classes, {'x'.join(map(str, image_shape))}",
        ),
    ]
    shapes = {}
    for role in (teacher, student):
        if role is not None:
            name, spec, network = role
            shapes[name] = check_network(name, network, dataset, batch_size=batch_size)
            parameters = f"{spec['model']}, {count_parameters(network.params):,} parameters"
            rows.append((name, f"{parameters}, {stages(shapes[name])}, {spec['dtype']}"))
    ours, theirs = shapes["student"], shapes.get("teacher")
    projections = {}
    if theirs is not None:
        check_projections(objective, ours, theirs)
        projections, _ = jax.eval_shape(lambda key: init_projections(objective, ours, theirs, key), jax.random.key(0))
        rows += [("matched", text) for text in _matches(objective, ours, theirs, projections)]
    check_terms(objective, ours, theirs, image_shape)
    for term in objective.terms:
        weights = config_module.sampled(term.weight, steps)
        corners = ", ".join(f"{weights[round(part * (steps - 1))]:.3g}" for part in (0, 0.25, 0.5, 0.75, 1))
        rows.append(("term", f"{term.name:<12} weight at 0, 25, 50, 75, 100 %: {corners}; mean {weights.mean():.3g}"))
    epochs = steps * batch_size / len(dataset.train.labels)
    share = f" ({batch_size // devices} a device)" if devices > 1 else ""
    taken = f"{steps:,} of {batch_size} images{share}, {steps_per_dispatch} a dispatch, {epochs:.1f} epochs"
    rows.append(("steps", taken))
    memory = _memory(student[2], teacher[2] if teacher else None, projections, dataset, batch_size // devices)
    what = "weights, optimiser, data, one step's activations"
    rows.append(("memory", f"about {memory / 2**20:,.0f} MiB{' a device' if devices > 1 else ''} ({what})"))
    return "\n".join(f"  {name:<8}  {text}" for name, text in rows)


def _processes() -> str:
    return f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""


def _matches(objective: Objective, student: Outputs, teacher: Outputs, projections: PyTree) -> Iterator[str]:
    """Which stage is matched with which, for what, and at the price of how many parameters."""
    for name, projection in objective.projections.items():
        ours = student.features[projection.student_stage].shape
        theirs = teacher.features[projection.teacher_stage].shape
        readers = [
            term.name for term in objective.terms if getattr(term.loss, "keywords", {}).get("projection") == name
        ]
        yield (
            f"{', '.join(readers)}: student {ours[3]}@{_size(ours)} -> teacher {theirs[3]}@{_size(theirs)} "
            f"by projection '{name}', {count_parameters(projections[name]):,} parameters"
        )


def _size(shape: tuple[int, ...]) -> str:
    return str(shape[1]) if shape[1] == shape[2] else f"{shape[1]}x{shape[2]}"


def _memory(student: Network, teacher: Network | None, projections: PyTree, dataset: Dataset, batch_size: int) -> int:
    """Bytes of what certainly lives at once: an estimate from below, before the compiler's scratch space."""
    images = jax.ShapeDtypeStruct((batch_size, *dataset.train.images.shape[1:]), jnp.float32)

    def residuals(network: Network, images: Any) -> Any:
        def logits(params: PyTree) -> Any:
            return network.replace(params=params).forward(images, train=True)[0].logits

        return jax.vjp(logits, network.params)[1]

    trained = 4 * (count_parameters(student.params) + count_parameters(projections))
    # weights, momentum, gradient, and the best weights so far
    total = 4 * trained + dataset.train.images.nbytes
    total += _bytes(jax.eval_shape(residuals, student, images))
    if teacher is not None:
        shapes = output_shapes(teacher, dataset.train.images.shape[1:], batch_size=batch_size)
        total += _bytes((teacher.params, teacher.stats)) + _bytes(shapes)
    return total


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
