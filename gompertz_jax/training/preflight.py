"""What a run is about to do, described and checked from shapes alone before anything is compiled."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..network import Network, Outputs, PyTree, output_shapes
from ..objective import Objective, Term, evaluate
from ..projections import init_projections, project, stage_pairs
from ..record import Leading, NotStored, Record, StoredOutputs, no_pullback
from ..report import text_table
from ..schedules import ByProgress, Schedule
from .data import Dataset
from .errors import RunError
from .objectives import QUARTERS, at_quarters, quarter_steps, sampled, weight_warnings

_QUARTERS = [f"{100 * quarter:.0f} %" for quarter in QUARTERS]


def check_network(role: str, network: Network, dataset: Dataset, *, batch_size: int = 1) -> Outputs:
    """The shapes of a network's outputs on this data set's images.

    Args:
      role: "teacher" or "student", for messages.
      network: arrays or shapes.
      dataset: the network must fit its images and classes.
      batch_size: images in the shapes' batch.

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
    """Refuse a projection between stages that one of the networks does not have, or that it cannot join."""
    for name, projection in objective.projections.items():
        where = f"objective.projections.{name}"
        try:
            for pair in projection.stages(student, teacher):
                _check_stages(pair, student, teacher, where)
            jax.eval_shape(lambda key, p=projection: p.init(key, student, teacher), jax.random.key(0))
        except RunError:
            raise
        except Exception as error:  # whatever an option leads to
            raise RunError(f"{where}: {error}") from error


def _check_stages(pair: tuple[int, int], student: Outputs, teacher: Outputs, where: str) -> None:
    for role, shapes, stage in (("student", student, pair[0]), ("teacher", teacher, pair[1])):
        count = len(shapes.features)
        if not -count <= stage < count:
            raise RunError(
                f"{where}: {role} stage {stage}: the {role} has stages 0 to {count - 1} ({stages(shapes)}), "
                "or -1 for the last"
            )


def check_terms(objective: Objective, student: Outputs, teacher: Outputs | None, image_shape: tuple[int, ...]) -> None:
    """Refuse a term that cannot be computed from these shapes, before any of it is compiled."""
    for term in objective.terms:
        try:
            _trace(term, objective, student, teacher, image_shape)
        except Exception as error:  # whatever an option leads to
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"objective.terms.{term.name} cannot be computed: {reason}") from error


def stored_parts(
    objective: Objective, student: Outputs, teacher: Outputs, image_shape: tuple[int, ...]
) -> tuple[str, ...]:
    """Which of a teacher's outputs must be stored so that it need not run: "logits", and "pooled" if a term reads them.

    Raises:
      RunError: a term reads other outputs; the message names the term.
    """
    for parts in (("logits",), ("logits", "pooled")):
        refused: dict[str, NotStored] = {}
        for term in objective.terms:
            try:
                _trace(term, objective, student, teacher, image_shape, stored=parts)
            except NotStored as error:
                refused[term.name] = error
        if not refused:
            return parts
    name, error = next(iter(refused.items()))
    raise RunError(
        f"objective.terms.{name} reads the teacher's {error.what}, and teacher.cache stores only its logits and pooled "
        "vectors: take teacher.cache.views = 0, or leave out the term"
    ) from error


def _trace(
    term: Term,
    objective: Objective,
    student: Outputs,
    teacher: Outputs | None,
    image_shape: tuple[int, ...],
    *,
    stored: tuple[str, ...] = (),
) -> None:
    """Evaluate one term on shapes; if `stored` names any of the teacher's outputs, with only these."""
    named = inspect.signature(term.loss).parameters.get("projection")
    read = {name: p for name, p in objective.projections.items() if named is not None and name == named.default}
    alone = Objective((term,), read)

    def pull_back_of(outputs: Outputs | None) -> Any:
        def pull_back(cotangent: jax.Array, stage: int | None = None) -> jax.Array:
            shape = image_shape if stage is None or outputs is None else outputs.features[stage].shape[1:]
            return jnp.zeros((len(cotangent), *shape))

        return pull_back

    def evaluated(student: Outputs, teacher: Outputs | None) -> jax.Array:
        def leading_of(outputs: Any) -> Callable[[int], Leading]:
            def leading(count: int) -> Leading:
                if stored and outputs is teacher:
                    raise NotStored("gradients")
                first = jax.tree.map(lambda a: a[:count], outputs)
                return Leading(first, pull_back_of(first))

            return leading

        teacher_outputs, views, pull_teacher = teacher, ({}, {}, {}), pull_back_of(teacher)
        if teacher is not None:
            if stored:
                teacher_outputs = StoredOutputs.of(*(getattr(teacher, name) for name in stored))
                pull_teacher = no_pullback
            fresh = init_projections(alone.projections, student, teacher, jax.random.key(0))
            views = project(alone.projections, *fresh, student, teacher_outputs or teacher)
        record = Record(
            jnp.zeros(len(student.logits), jnp.int32),
            student,
            teacher_outputs,
            student_views=views[0],
            teacher_views=views[1],
            student_pullback=pull_back_of(student),
            teacher_pullback=pull_teacher,
            leading=leading_of(student),
            teacher_leading=leading_of(teacher),
            key=jax.random.key(0),
        )
        return evaluate(alone, record, 0, 0.0).raw

    jax.eval_shape(evaluated, student, teacher)


def stages(shapes: Outputs) -> str:
    """A network's maps as the field's tables write them, channels@size."""
    return ", ".join(f"{stage.shape[3]}@{_size(stage.shape)}" for stage in shapes.features)


def count_parameters(tree: PyTree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


Described = tuple[Mapping[str, Any], Network]  # a network's description, and its arrays or shapes


def describe(
    dataset: Dataset,
    *,
    student: Described,
    teacher: Described | None,
    objective: Objective,
    rate: Schedule,
    batch_size: int,
    steps: int,
    steps_per_dispatch: int,
    devices: int,
    sharing: int | None = None,
    label: str,
    views: int = 0,
    room: float = math.inf,
) -> str:
    """The pre-flight's text. Networks may be arrays or shapes; nothing is computed or compiled.

    Args:
      dataset: what is learnt.
      student: who learns.
      teacher: who teaches, if anyone.
      objective: what is minimised.
      rate: the learning rate by step.
      batch_size: images per step, over all devices.
      steps: how many steps are taken.
      steps_per_dispatch: how many of them a dispatch takes.
      devices: how many devices there are, over all processes.
      sharing: among how many of them a batch is divided; None: all.
      label: the run's name in the text.
      views: how many views the teacher's outputs are stored for; 0 for none.
      room: bytes that these may take on a device.

    Returns:
      A few lines.

    Raises:
      RunError: as `check_network`, `check_projections`, `check_terms` and `stored_parts`; or there is not enough room.
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
    for role, described in (("teacher", teacher), ("student", student)):
        if described is not None:
            spec, network = described
            shapes[role] = check_network(role, network, dataset, batch_size=batch_size)
            parameters = f"{spec['model']}, {count_parameters(network.params):,} parameters"
            rows.append((role, f"{parameters}, {stages(shapes[role])}, {spec['dtype']}"))
    ours, theirs = shapes["student"], shapes.get("teacher")
    projections = {}
    if theirs is not None:
        check_projections(objective, ours, theirs)
        projections = _projection_shapes(objective, ours, theirs)
        rows += [("matched", text) for text in matches(objective, ours, theirs)]
    check_terms(objective, ours, theirs, image_shape)
    stored = 0
    if views and theirs is not None:
        parts = stored_parts(objective, ours, theirs, image_shape)
        stored = stored_bytes(theirs, parts, views=views, count=len(dataset.train.labels))
        if stored > room:
            raise RunError(
                f"teacher.cache.views = {views}: the teacher's outputs ({', '.join(parts)}) would take "
                f"{_mebibytes(stored)} on each device, more than data.device_fraction of its memory: take fewer views"
            )
        rows.append(
            (
                "stored",
                f"the teacher's {' and '.join(parts)} for {views} views of each image, {_mebibytes(stored)}, "
                f"computed once, at the cost of {views} epochs of the teacher",
            )
        )
    elif views:
        rows.append(("views", f"{views} of each image"))
    weights = [sampled(term.weight, steps) for term in objective.terms]
    rows += [("terms", line) for line in text_table(_weights(objective.terms, weights))]
    for term, values in zip(objective.terms, weights, strict=True):
        rows += [("warning", text) for text in weight_warnings(term.name, values)]
    per_epoch = max(1, len(dataset.train.labels) // batch_size)
    each = batch_size // (sharing or devices)
    share = f" ({each} a device)" if devices > 1 else ""
    taken = (
        f"{steps:,} of {batch_size} images{share}, {steps_per_dispatch} per dispatch; "
        f"{steps / per_epoch:.3g} epochs of {per_epoch:,} whole batches"
    )
    rows.append(("steps", taken))
    at = zip(quarter_steps(steps), _QUARTERS, strict=True)
    rows.append(("rate", ", ".join(f"{float(rate(step)):.3g} at {quarter}" for step, quarter in at)))
    memory = stored + _memory(student[1], teacher[1] if teacher else None, projections, dataset, each)
    what = "weights, optimiser, data, one step's activations"
    rows.append(("memory", f"about {_mebibytes(memory)}{' a device' if devices > 1 else ''} ({what})"))
    above = ["", *(name for name, _ in rows)]
    return "\n".join(
        f"  {'' if name == last else name:<8}  {text}" for (name, text), last in zip(rows, above[:-1], strict=True)
    )


def _weights(terms: Sequence[Term], weights: Sequence[np.ndarray]) -> list[tuple[str, ...]]:
    """Each term's weight over training, given at every step, as rows of a table."""
    rows: list[tuple[str, ...]] = [("weight at", *_QUARTERS, "mean")]
    for term, values in zip(terms, weights, strict=True):
        shown = [f"{value:.3g}" for value in at_quarters(values)]
        if isinstance(term.weight, ByProgress):  # no step is known to it, so its mean is not either
            rows.append((f"{term.name} (of progress)", *shown, ""))
        else:
            rows.append((term.name, *shown, f"{values.mean():.3g}"))
    return rows


def _processes() -> str:
    return f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""


def matches(objective: Objective, student: Outputs, teacher: Outputs) -> Iterator[str]:
    """Which stage is matched with which, for what, how, and at the price of how many parameters."""

    def joined(pairs: Iterable[tuple[int, int]]) -> str:
        maps = ((student.features[i].shape, teacher.features[j].shape) for i, j in pairs)
        return ", ".join(f"{a[3]}@{_size(a)} -> {b[3]}@{_size(b)}" for a, b in maps) or "logits or pooled vectors"

    options = {term.name: getattr(term.loss, "keywords", {}) for term in objective.terms}
    projections = _projection_shapes(objective, student, teacher)
    for name, projection in objective.projections.items():
        readers = ", ".join(term for term, chosen in options.items() if chosen.get("projection") == name)
        yield (
            f"{readers}: {joined(projection.stages(student, teacher))} by projection '{name}' "
            f"({projection.describe(student, teacher)}), {count_parameters(projections[name]):,} parameters"
        )
    for term in objective.terms:
        if term.bridge:
            yield f"{term.name}: {joined(_pairs(options[term.name], term, student, teacher))}; {term.bridge}"


def _projection_shapes(objective: Objective, student: Outputs, teacher: Outputs) -> PyTree:
    fresh = partial(init_projections, objective.projections, student, teacher)
    return jax.eval_shape(lambda key: fresh(key)[0], jax.random.key(0))


def _pairs(options: Mapping[str, Any], term: Term, student: Outputs, teacher: Outputs) -> Sequence[tuple[int, int]]:
    """The stages that a term without projection joins."""
    parameters = inspect.signature(term.loss).parameters
    where = f"objective.terms.{term.name}"
    try:
        if "pairs" in parameters:
            pairs = stage_pairs(options.get("pairs", ()), student, teacher)
        elif "student_stage" in parameters:
            pairs = [(options.get("student_stage", -1), options.get("teacher_stage", -1))]
        else:
            pairs = [term.gradient_stages] if term.gradient_stages else []
        for pair in pairs:
            _check_stages(pair, student, teacher, where)
    except RunError:
        raise
    except (TypeError, ValueError) as error:
        raise RunError(f"{where}: its stages must be whole numbers, in pairs (student, teacher): {error}") from error
    return pairs


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


def stored_bytes(teacher: Outputs, parts: Sequence[str], *, views: int, count: int) -> int:
    """Bytes of these outputs of a teacher in float32, for `count` images in all their views, from their shapes."""
    return 4 * views * count * sum(math.prod(getattr(teacher, name).shape[1:]) for name in parts)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else "under 1 MiB"


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
