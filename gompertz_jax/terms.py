"""What a term of an objective computes: each a pure function of a `Record`, ready for use in a config.

A term reads what it needs from the record (logits, maps, vectors, what a projection made of them, pull-backs) and hands
it to a loss of `gompertz_jax.losses`, which documents the formula, the source and the published weight. Options are
keywords; `temperature` and `epsilon` may be schedules. Where a loss compares one pair of maps, `student_stage` and
`teacher_stage` are indices into `Outputs.features`, -1 the map that is pooled; where it compares several, `pairs` lists
them, and an empty `pairs` means all stages that both networks have after their stem, index by index.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from .losses import closed_forms, features, gradients, logits, relations
from .network import Outputs
from .projections import Pairs, stage_pairs
from .record import Record, TeacherRecord

Diagnostics = dict[str, Float[Array, "..."]]

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)  # of MLKD's three levels


# --- class scores -----------------------------------------------------------------------------------------------------


def cross_entropy(record: Record, *, label_smoothing: float = 0.0) -> Float[Array, " batch"]:
    """Cross-entropy of the student's logits with the labels."""
    return logits.cross_entropy(record.student.logits, record.labels, label_smoothing=label_smoothing)


def soft_targets(record: Record, *, temperature: Any = 4.0, standardize: bool = False) -> Float[Array, " batch"]:
    """`soft_target_kl`; here and in the terms below, `standardize` applies `standardize_logits` first."""
    return logits.soft_target_kl(*_logits(record, standardize), temperature=temperature)


def decoupled(
    record: Record, *, alpha: float = 1.0, beta: float = 8.0, temperature: Any = 4.0, standardize: bool = False
) -> Float[Array, " batch"]:
    """`decoupled_kl` (DKD)."""
    student, teacher = _logits(record, standardize)
    return logits.decoupled_kl(student, teacher, record.labels, alpha=alpha, beta=beta, temperature=temperature)


def multi_temperature(
    record: Record, *, temperatures: tuple[float, ...] = TEMPERATURES, standardize: bool = False
) -> Float[Array, " batch"]:
    """`multi_temperature_kl` (MLKD, single images)."""
    return logits.multi_temperature_kl(*_logits(record, standardize), temperatures=tuple(temperatures))


def interclass_correlation(
    record: Record, *, temperature: Any = 4.0, standardize: bool = False
) -> Float[Array, " batch"]:
    """`interclass_correlation` (DIST, within an image)."""
    return logits.interclass_correlation(*_logits(record, standardize), temperature=temperature)


def intraclass_correlation(
    record: Record, *, temperature: Any = 4.0, standardize: bool = False
) -> Float[Array, " classes"]:
    """`intraclass_correlation` (DIST, within a class over the batch)."""
    return relations.intraclass_correlation(*_logits(record, standardize), temperature=temperature)


def batch_correlation(
    record: Record, *, temperatures: tuple[float, ...] = TEMPERATURES, standardize: bool = False
) -> Float[Array, " batch"]:
    """`batch_correlation` (MLKD, between images), summed over the temperatures."""
    student, teacher = _logits(record, standardize)
    return _total(relations.batch_correlation(student, teacher, temperature=number) for number in temperatures)


def class_correlation(
    record: Record, *, temperatures: tuple[float, ...] = TEMPERATURES, standardize: bool = False
) -> Float[Array, " classes"]:
    """`class_correlation` (MLKD, between classes), summed over the temperatures."""
    student, teacher = _logits(record, standardize)
    return _total(relations.class_correlation(student, teacher, temperature=number) for number in temperatures)


# --- maps -------------------------------------------------------------------------------------------------------------


def hint(record: Record, *, projection: str = "hint") -> Float[Array, " batch"]:
    """`hint_distance` (FitNet) between the student's regressed map and the teacher's."""
    return features.hint_distance(record.student_views[projection], record.teacher_views[projection])


def attention_transfer(record: Record, *, pairs: Pairs = (), power: float = 2.0) -> Float[Array, " batch"]:
    """`attention_transfer` (AT), summed over the pairs of stages."""
    return _over_pairs(record, pairs, partial(features.attention_transfer, power=power))


def neuron_selectivity(record: Record, *, pairs: Pairs = ()) -> Float[Array, " batch"]:
    """`neuron_selectivity` (NST), summed over the pairs of stages."""
    return _over_pairs(record, pairs, features.neuron_selectivity)


def variational_information(record: Record, *, projection: str = "variational") -> Float[Array, " batch"]:
    """`variational_information` (VID), summed over the projection's pairs of stages."""
    predicted, maps = record.student_views[projection], record.teacher_views[projection]
    return _total(
        features.variational_information(mean, variance, target)
        for (mean, variance), target in zip(predicted, maps, strict=True)
    )


def review(record: Record, *, projection: str = "review") -> Float[Array, " batch"]:
    """`hierarchical_context` (ReviewKD), summed over the maps that the projection fused."""
    fused, maps = record.student_views[projection], record.teacher_views[projection]
    return _total(features.hierarchical_context(ours, theirs) for ours, theirs in zip(fused, maps, strict=True))


# --- relations between the images of a batch --------------------------------------------------------------------------


def similarity_preserving(
    record: Record, *, student_stage: int = -1, teacher_stage: int = -1
) -> Float[Array, " batch"]:
    """`similarity_preserving` (SP) of whole maps."""
    ours, theirs = record.student.features[student_stage], record.taught().features[teacher_stage]
    return relations.similarity_preserving(ours, theirs)


def correlation_congruence(record: Record, *, gamma: float = 0.4, order: int = 2) -> Float[Array, " batch"]:
    """`correlation_congruence` (CC) of the pooled vectors."""
    return relations.correlation_congruence(record.student.pooled, record.taught().pooled, gamma=gamma, order=order)


def relational_distance(record: Record) -> Float[Array, " batch"]:
    """`relational_distance` (RKD-D) of the pooled vectors."""
    return relations.relational_distance(record.student.pooled, record.taught().pooled)


def relational_angle(record: Record) -> Float[Array, " batch"]:
    """`relational_angle` (RKD-A) of the pooled vectors."""
    return relations.relational_angle(record.student.pooled, record.taught().pooled)


def probabilistic_transfer(record: Record) -> Float[Array, " batch"]:
    """`probabilistic_transfer` (PKT) of the pooled vectors."""
    return relations.probabilistic_transfer(record.student.pooled, record.taught().pooled)


def contrastive_representation(
    record: Record, *, projection: str = "embedding", temperature: Any = 0.07, other_classes: bool = True
) -> Float[Array, " batch"]:
    """`contrastive_representation` (CRD, in the batch); with `other_classes`, negatives are images of other labels."""
    return relations.contrastive_representation(
        record.student_views[projection],
        record.teacher_views[projection],
        temperature=temperature,
        labels=record.labels if other_classes else None,
    )


# --- transport --------------------------------------------------------------------------------------------------------


def wasserstein(
    record: Record,
    *,
    projection: str = "last",
    epsilon: Any = 0.05,
    debiased: bool = False,
    cloud: str = "image",
    cost: str = "squared_euclidean",
    marginal_penalty: float = 0.0,
    threshold: float = 1e-3,
) -> tuple[Float[Array, "..."], Diagnostics]:
    """Transport between both maps; the squared Euclidean cost is divided by the width (about 0 to 2).

    Args:
      record: the outputs; the projection's views are used.
      projection: which maps.
      epsilon: see `sinkhorn_distance`.
      debiased: see `sinkhorn_distance`.
      cloud: "image": the positions of one image's map, paired with the same image's. "batch": every image of the global
        batch is one point, the mean over its positions; which student and teacher points are the same image is then
        ignored. "class": as "batch", but mass moves only between images of one class.
      cost: see `sinkhorn_distance`.
      marginal_penalty: see `sinkhorn_distance`; 0 keeps both marginals.
      threshold: see `sinkhorn_distance`. A looser one saves iterations where maps are close to each other, which takes
        the most.

    Returns:
      One distance per image, `[B]`, or one for the batch, `[]`; and the diagnostics of the iterations.

    Raises:
      ValueError: `cloud` is none of these, or "class" with a penalty.
    """
    from .losses.wasserstein import class_sinkhorn_distance, sinkhorn_distance

    x, y = _clouds(record, projection)
    if cloud == "class":
        if debiased or marginal_penalty:
            raise ValueError("cloud='class' takes neither debiased nor marginal_penalty")
        transport = partial(class_sinkhorn_distance, cost=cost, threshold=threshold, return_diagnostics=True)
        distance, diagnostics = record.whole_batch(transport)(x.mean(1), y.mean(1), record.labels, epsilon=epsilon)
        return distance, _as_metrics(diagnostics, distance.dtype)
    transport = partial(
        sinkhorn_distance,
        cost=cost,
        marginal_penalty=marginal_penalty or None,
        debiased=debiased,
        threshold=threshold,
        return_diagnostics=True,
    )
    if cloud == "image":
        distance, diagnostics = record.per_image(transport)(x, y, epsilon=epsilon)
    elif cloud == "batch":
        distance, diagnostics = record.whole_batch(transport)(x.mean(1), y.mean(1), epsilon=epsilon)
    else:
        raise ValueError(f"cloud must be 'image', 'batch' or 'class', got {cloud!r}")
    return distance, _as_metrics(diagnostics, distance.dtype)


def gaussian(record: Record, *, projection: str = "last") -> Float[Array, " batch"]:
    """Squared 2-Wasserstein between diagonal Gaussians fitted to both maps, divided by the width."""
    return closed_forms.gaussian_distance(*_clouds(record, projection))


def wasserstein_features(
    record: Record, *, projection: str = "width", mean_weight: float = 4.0, grid: int = 1
) -> Float[Array, " batch"]:
    """`wasserstein_gaussians` (WKD-F) between the student's map in the teacher's width and the teacher's."""
    ours, theirs = record.student_views[projection], record.teacher_views[projection]
    return closed_forms.wasserstein_gaussians(ours, theirs, mean_weight=mean_weight, grid=grid)


def wasserstein_logits(
    record: Record, *, projection: str = "classes", temperature: Any = 8.0, epsilon: Any = 0.05
) -> tuple[Float[Array, " batch"], Diagnostics]:
    """`wasserstein_logits` (WKD-L) over all classes but the label, at the teacher's distances between classes."""
    from .losses.wasserstein import wasserstein_logits

    def transport(student: Array, teacher: Array, labels: Array, **shared: Any) -> Any:
        return wasserstein_logits(student, teacher, labels=labels, return_diagnostics=True, **shared)

    distance, diagnostics = record.per_image(transport)(
        record.student.logits,
        record.taught().logits,
        record.labels,
        class_cost=record.teacher_views[projection],
        temperature=temperature,
        epsilon=epsilon,
    )
    return distance, _as_metrics(diagnostics, distance.dtype)


def target_cross_entropy(record: Record) -> Float[Array, " batch"]:
    """`target_cross_entropy`, the label's part of WKD-L."""
    return logits.target_cross_entropy(record.student.logits, record.taught().logits, record.labels)


def _as_metrics(diagnostics: Any, dtype: Any) -> Diagnostics:
    return {
        "converged": diagnostics.converged.astype(dtype),
        "iterations": diagnostics.iterations.astype(dtype),
        "marginal_error": diagnostics.marginal_error,
    }


# --- gradients --------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """The score whose gradient is taken.

    Attributes:
      direction: `(logits, labels, key) -> cotangent of the logits`.
      own: whether each network uses the direction of its own logits; otherwise both use the teacher's.
    """

    direction: Callable[[Array, Array, Any], Array]
    own: bool


TARGETS: Mapping[str, Target] = {
    "top_class": Target(lambda logits, labels, key: gradients.top_class(logits), own=False),
    "label": Target(lambda logits, labels, key: gradients.label_class(logits, labels), own=True),
    "cross_entropy": Target(lambda logits, labels, key: gradients.cross_entropy_direction(logits, labels), own=True),
    "random": Target(lambda logits, labels, key: gradients.random_direction(logits, key=key), own=False),
}


class TeacherGradient(NamedTuple):
    """The teacher's side of `gradient_match`: its direction, for the student too, and its gradient, a constant."""

    direction: Float[Array, "images classes"]
    gradient: Float[Array, "images ..."]


def teacher_gradient(
    teacher: TeacherRecord, *, target: str = "top_class", images: int = 0, stages: tuple[int, ...] = (), **_: Any
) -> TeacherGradient:
    """What `gradient_match` with these options reads of the teacher; its other options are ignored."""
    if images in (0, len(teacher.labels)):
        outputs, pull_back = teacher.outputs, teacher.pullback
    else:
        assert teacher.leading is not None
        outputs, pull_back = teacher.leading(images)
    direction = TARGETS[target].direction(outputs.logits, teacher.labels[: len(outputs.logits)], teacher.key)
    gradient = jax.lax.stop_gradient(_gradient(outputs, pull_back, direction, stages[1:]))
    return TeacherGradient(direction, gradient)


def gradient_match(
    record: Record,
    *,
    target: str = "top_class",
    kind: str = "cosine",
    pool: int = 4,
    images: int = 0,
    stages: tuple[int, ...] = (),
    of_teacher: TeacherGradient | None = None,
) -> Float[Array, " images"]:
    """Distance between the gradients of a score in both networks, at the images or at a stage of each.

    Args:
      record: the outputs and pull-backs.
      target: the score. "top_class": the logit of the teacher's top class; "label": of the label; "cross_entropy": each
        network's own cross-entropy; "random": a random projection of the logits, drawn anew at each step.
      kind: see `gradient_distance`.
      pool: both gradients are average-pooled by `pool x pool` first: pixel gradients of independently trained networks
        hardly agree, coarse ones do.
      images: how many images are compared, the first ones of the batch; 0 for all. All of them share the training-mode
        forward pass of the other terms; fewer go through the student once more, in evaluation mode.
      stages: empty for the gradient at the images; (student stage, teacher stage) for `contribution_map` at these maps,
        the larger one averaged to the size of the smaller.
      of_teacher: the result of `teacher_gradient` with the same options, if it is already computed.

    Returns:
      One distance per compared image.

    Raises:
      ValueError: `target` is unknown, `images` is negative or exceeds the batch, `stages` is not a pair.
    """
    teacher = record.taught()
    batch = teacher.logits.shape[0]
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if not 0 <= images <= batch:
        raise ValueError(f"images must lie in [0, {batch}], the batch, got {images}")
    if len(stages) not in (0, 2):
        raise ValueError(f"stages must be empty or (student stage, teacher stage), got {stages!r}")
    if of_teacher is None:
        pull_back, leading = record.teacher_pullback, record.teacher_leading
        assert pull_back is not None
        teacher_record = TeacherRecord(record.labels, teacher, pull_back, leading, record.key)
        of_teacher = teacher_gradient(teacher_record, target=target, images=images, stages=stages)
    if images in (0, batch):
        student, pull_student = record.student, record.student_pullback
    else:
        assert record.leading is not None
        student, pull_student = record.leading(images)
    assert pull_student is not None
    direction, theirs = of_teacher
    if TARGETS[target].own:
        direction = TARGETS[target].direction(student.logits, record.labels[: len(student.logits)], record.key)
    ours = _gradient(student, pull_student, direction, stages[:1])
    if stages:
        ours, theirs = features.to_one_size(ours, theirs)
    height, width = ours.shape[1:3]
    if height % pool or width % pool:
        raise ValueError(f"pool = {pool} must divide the gradients' {height}x{width}; 1 always does")
    pooled = gradients.pool_gradient(ours, pool), gradients.pool_gradient(theirs, pool)
    return gradients.gradient_distance(*pooled, kind=kind)


def _gradient(outputs: Outputs, pull_back: Any, cotangent: Array, stage: tuple[int, ...]) -> Array:
    cotangent = cotangent.astype(outputs.logits.dtype)
    if not stage:
        return pull_back(cotangent)
    index = stage[0] % len(outputs.features)
    return gradients.contribution_map(outputs.features[index], pull_back(cotangent, stage=index))[..., None]


# Published forms of `gradient_match`, under their names.
jacobian = partial(gradient_match, target="top_class", kind="normalized_l2", pool=1)
sobolev = partial(gradient_match, target="random", kind="l2", pool=1)
gradient_attention = partial(gradient_match, target="cross_entropy", kind="l2", pool=1)


# --- shared -----------------------------------------------------------------------------------------------------------


def _logits(record: Record, standardize: bool) -> tuple[Array, Array]:
    student, teacher = record.student.logits, record.taught().logits
    return (
        (logits.standardize_logits(student), logits.standardize_logits(teacher)) if standardize else (student, teacher)
    )


def _over_pairs(record: Record, pairs: Pairs, loss: Callable[[Array, Array], Array]) -> Array:
    ours, theirs = record.student.features, record.taught().features
    return _total(loss(ours[i], theirs[j]) for i, j in stage_pairs(pairs, record.student, record.taught()))


def _total(values: Iterable[Array]) -> Array:
    first, *rest = values
    return sum(rest, start=first)


def _clouds(record: Record, projection: str) -> tuple[Array, Array]:
    """Both maps as point clouds `[B, positions, width]`, scaled so that squared distances are per channel."""
    x, y = record.student_views[projection], record.teacher_views[projection]
    scale = y.shape[-1] ** -0.5
    return tuple(scale * a.reshape(a.shape[0], -1, a.shape[-1]) for a in (x, y))  # pyright: ignore[reportReturnType]
