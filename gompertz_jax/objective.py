"""The objective as data: named terms, each with its own schedule, over one record of both networks' outputs.

    L(step) = w_ce(step) CE + G(step) [ a T^2 KL(teacher || student) + b W + c M ]

G is the Gompertz curve, W the transport between feature maps, M the distance between input gradients. The Gompertz-CNN
paper (Yang and Qin, 2025, https://arxiv.org/abs/2510.21649) states in its abstract that such losses are unified under
such a curve; every concrete choice here is our reconstruction.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .losses.gradients import gradient_distance, pool_gradient
from .losses.logits import cross_entropy as _cross_entropy
from .losses.logits import soft_target_kl
from .network import Outputs, PyTree
from .schedules import Schedule, constant_schedule, gompertz_schedule

PROJECTION_MOMENTUM = 0.9
PROJECTION_EPSILON = 1e-5


@dataclass(frozen=True)
class Record:
    """What the terms may read: both networks' outputs on one batch. Nothing is computed that no term asks for.

    Attributes:
      labels: class indices, `[B]`.
      student: the student's outputs in training mode.
      teacher: the teacher's outputs in evaluation mode; None when the student learns alone.
      student_maps: by projection name, the student's map in the teacher's width, `[B, h, w, c]`.
      teacher_maps: by projection name, the teacher's map with standardised channels, `[B, h', w', c]`.
      student_pullback: cotangent of the student's logits `[B, K]` -> gradient at the images `[B, h, w, c]`. It shares
        the forward pass behind `student`, in training mode: BatchNorm's cross terms between images are included.
      teacher_pullback: the same of the teacher, in evaluation mode.
      leading: `count -> (student logits, student pull-back, teacher pull-back)` of the first `count` images, by forward
        passes of their own; the student's too is in evaluation mode there, on the running statistics.
      per_image: makes `f(*arrays [B, ...], **scalars) -> [B]`, which treats every image alone, run on each device's
        images without communication. As it stands, for one device: f itself.
      whole_batch: makes a function of the same form that compares the images of the batch with each other run on the
        global batch, gathered before and not inside.
      key: this step's random key, for losses that draw.
    """

    labels: Int[Array, " batch"]
    student: Outputs
    teacher: Outputs | None = None
    student_maps: Mapping[str, Float[Array, "batch _ _ _"]] = field(default_factory=dict)
    teacher_maps: Mapping[str, Float[Array, "batch _ _ _"]] = field(default_factory=dict)
    student_pullback: Callable[..., Any] | None = None
    teacher_pullback: Callable[..., Any] | None = None
    leading: Callable[[int], tuple[Array, Callable[..., Any], Callable[..., Any]]] | None = None
    per_image: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    whole_batch: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    key: Any = None


class Term(NamedTuple):
    """One summand of the objective.

    Attributes:
      name: how the term is logged; unique within an objective.
      weight: step -> coefficient.
      loss: `loss(record, **scheduled) -> [B]`, or `([B], {name: [B]})` with diagnostics to log.
      schedules: keyword arguments of `loss` that change over training, each a step -> value.
      distils: whether the term needs a teacher.
      every_k_steps: the term is computed at steps divisible by k, and costs nothing at the others, where it is logged
        as NaN. Its weight is not raised to make up for the steps without it: `k * curve` does that.
    """

    name: str
    weight: Schedule
    loss: Callable[..., Any]
    schedules: Mapping[str, Schedule] = {}
    distils: bool = True
    every_k_steps: int = 1


class Projection(NamedTuple):
    """A learned 1x1 linear map + BatchNorm from a student's stage to the width of a teacher's stage.

    It is there at equal widths too: the channels of two independently trained networks have no common order.

    Attributes:
      student_stage: index into `Outputs.features`; -1 is the map that is pooled.
      teacher_stage: the same in the teacher.
    """

    student_stage: int = -1
    teacher_stage: int = -1


class Objective(NamedTuple):
    """Named terms and the projections that they read, by name."""

    terms: tuple[Term, ...]
    projections: Mapping[str, Projection] = {}


# --- the terms: pure functions of a record ----------------------------------------------------------------------------


def cross_entropy(record: Record, *, label_smoothing: float = 0.0) -> Float[Array, " batch"]:
    """Cross-entropy of the student's logits with the labels."""
    return _cross_entropy(record.student.logits, record.labels, label_smoothing=label_smoothing)


def soft_targets(record: Record, *, temperature: Any = 4.0) -> Float[Array, " batch"]:
    """`T^2 KL(teacher || student)` at temperature T (Hinton, Vinyals, Dean, 2015, https://arxiv.org/abs/1503.02531)."""
    return soft_target_kl(record.student.logits, _teacher(record).logits, temperature=temperature)


def wasserstein(
    record: Record, *, projection: str = "last", epsilon: Any = 0.05, debiased: bool = False, cloud: str = "image"
) -> tuple[Float[Array, "..."], dict[str, Float[Array, "..."]]]:
    """Transport between both maps; the cost is divided by the width (about 0 to 2).

    Args:
      record: the outputs; the projection's maps are used.
      projection: which maps.
      epsilon: see `sinkhorn_distance`.
      debiased: likewise.
      cloud: "image": the positions of one image's map, paired with the same image's. "batch": every image of the global
        batch is one point, the mean over its positions; which image is which is then ignored.

    Returns:
      One distance per image, `[B]`, or one for the batch, `[]`; and the health of the iterations.

    Raises:
      ValueError: `cloud` is neither.
    """
    from .losses.wasserstein import sinkhorn_distance

    x, y = _clouds(record, projection)
    if cloud not in ("image", "batch"):
        raise ValueError(f"cloud must be 'image' or 'batch', got {cloud!r}")
    transport = partial(sinkhorn_distance, debiased=debiased, return_diagnostics=True)
    if cloud == "image":
        distance, health = record.per_image(transport)(x, y, epsilon=epsilon)
    else:
        distance, health = record.whole_batch(transport)(x.mean(1), y.mean(1), epsilon=epsilon)
    return distance, {
        "converged": health.converged.astype(distance.dtype),
        "iterations": health.iterations.astype(distance.dtype),
        "marginal_error": health.marginal_error,
    }


def gaussian(record: Record, *, projection: str = "last") -> Float[Array, " batch"]:
    """Squared 2-Wasserstein between diagonal Gaussians fitted to both maps, divided by the width.

    The per-channel Gaussian form is WKD-F's (Lv, Yang, Li, 2024, https://arxiv.org/abs/2412.08139).
    """
    from .losses.wasserstein import gaussian_distance

    return gaussian_distance(*_clouds(record, projection))


def gradient_match(record: Record, *, pool: int = 4, kind: str = "cosine", images: int = 0) -> Float[Array, " images"]:
    """Distance between both networks' input gradients of the score of the teacher's top class.

    Args:
      record: the outputs and pull-backs.
      pool: both gradients are average-pooled by `pool x pool` first: pixel gradients of independently trained networks
        hardly agree, coarse ones do.
      kind: see `gradient_distance`.
      images: how many images of the batch are compared, its first ones; 0 for all. All share the training-mode forward
        pass of the other terms; fewer are passed through the student once more, in evaluation mode.

    Returns:
      One distance per compared image.

    Raises:
      ValueError: `images` is negative or exceeds the batch.
    """
    logits = _teacher(record).logits
    batch = logits.shape[0]
    if not 0 <= images <= batch:
        raise ValueError(f"images must lie in [0, {batch}], the batch, got {images}")
    if images in (0, batch):
        student_logits, student_pullback, teacher_pullback = (
            record.student.logits,
            record.student_pullback,
            record.teacher_pullback,
        )
    else:
        assert record.leading is not None
        student_logits, student_pullback, teacher_pullback = record.leading(images)
        logits = logits[:images]
    assert student_pullback is not None and teacher_pullback is not None
    top = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    student = student_pullback(top.astype(student_logits.dtype))
    teacher = teacher_pullback(top.astype(logits.dtype))
    return gradient_distance(pool_gradient(student, pool), pool_gradient(teacher, pool), kind=kind)


def _teacher(record: Record) -> Outputs:
    if record.teacher is None:
        raise ValueError("this term needs a teacher, and the step was given none: pass teacher=... or drop the term")
    return record.teacher


def _clouds(record: Record, projection: str) -> tuple[Array, Array]:
    """Both maps as point clouds `[B, positions, width]`, scaled so that squared distances are per channel."""
    x, y = record.student_maps[projection], record.teacher_maps[projection]
    scale = y.shape[-1] ** -0.5
    return tuple(scale * a.reshape(a.shape[0], -1, a.shape[-1]) for a in (x, y))  # pyright: ignore[reportReturnType]


# --- the default ------------------------------------------------------------------------------------------------------


def gompertz_objective(
    total_steps: int,
    *,
    curve: Schedule | None = None,
    soft_target_weight: float = 1.0,
    temperature: float = 4.0,
    wasserstein_weight: float = 4.0,
    gradient_weight: float = 0.7,
    label_smoothing: float = 0.0,
) -> Objective:
    """The whole objective `CE + G [a T^2 KL + b W + c M]` under one curve G (our reconstruction).

    Args:
      total_steps: length of training in steps, what the curve is indexed by.
      curve: G, step -> weight; the default is `gompertz_schedule(total_steps)`.
      soft_target_weight: a.
      temperature: T of the soft targets.
      wasserstein_weight: b; the default gives W's gradient about 0.3 times the norm of the cross-entropy's at mid-run
        of `configs/cifar10_small.py`.
      gradient_weight: c; likewise, about 0.1 times.
      label_smoothing: of the cross-entropy.

    Returns:
      Terms `ce`, `kd`, `wasserstein`, `gradient`; a term whose coefficient is 0 is left out, and with it its cost.

    Examples:
      >>> import gompertz_jax as gj
      >>> [term.name for term in gj.gompertz_objective(1000, gradient_weight=0.0).terms]
      ['ce', 'kd', 'wasserstein']
    """
    curve = gompertz_schedule(total_steps) if curve is None else curve

    def under_curve(coefficient: float) -> Schedule:
        return lambda step: coefficient * curve(step)

    terms = [
        Term("ce", constant_schedule(1.0), partial(cross_entropy, label_smoothing=label_smoothing), distils=False),
        Term("kd", under_curve(soft_target_weight), soft_targets, {"temperature": constant_schedule(temperature)}),
        Term("wasserstein", under_curve(wasserstein_weight), wasserstein),
        Term("gradient", under_curve(gradient_weight), gradient_match),
    ]
    coefficients = (1.0, soft_target_weight, wasserstein_weight, gradient_weight)
    kept = tuple(term for term, coefficient in zip(terms, coefficients, strict=True) if coefficient != 0.0)
    return Objective(kept, {"last": Projection()} if wasserstein_weight else {})


def student_alone(*, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy only: the baseline, and how a teacher is trained."""
    loss = partial(cross_entropy, label_smoothing=label_smoothing)
    return Objective((Term("ce", constant_schedule(1.0), loss, distils=False),))


# --- evaluation of terms ----------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """All terms at one step.

    Attributes:
      raw: mean over the batch of each term, `[terms]`.
      weights: each term's coefficient, `[terms]`.
      metrics: name -> scalar: `NAME/raw`, `NAME/weight`, `NAME/weighted`, each schedule and each diagnostic.
    """

    raw: Float[Array, " terms"]
    weights: Float[Array, " terms"]
    metrics: dict[str, Array]


def evaluate(objective: Objective, record: Record, step: Any) -> Evaluation:
    """Evaluate every term of `objective` on `record`, its weight and its schedules at `step`."""
    raws, weights, metrics = [], [], {}
    for term in objective.terms:
        scheduled = {name: schedule(step) for name, schedule in term.schedules.items()}
        result = term.loss(record, **scheduled)
        values, diagnostics = result if isinstance(result, tuple) else (result, {})
        raw, weight = values.mean().astype(jnp.float32), jnp.asarray(term.weight(step), jnp.float32)
        raws.append(raw)
        weights.append(weight)
        metrics |= {f"{term.name}/raw": raw, f"{term.name}/weight": weight, f"{term.name}/weighted": weight * raw}
        metrics |= {f"{term.name}/{name}": jnp.asarray(value, jnp.float32) for name, value in scheduled.items()}
        metrics |= {f"{term.name}/{name}": value.mean() for name, value in diagnostics.items()}
    return Evaluation(jnp.stack(raws), jnp.stack(weights), jax.lax.stop_gradient(metrics))


# --- projections ------------------------------------------------------------------------------------------------------


def init_projections(objective: Objective, student: Outputs, teacher: Outputs, key: Array) -> tuple[PyTree, PyTree]:
    """Fresh projections for these networks' shapes (arrays or `jax.ShapeDtypeStruct`s both serve).

    Args:
      objective: names the stages.
      student: the student's outputs.
      teacher: the teacher's outputs.
      key: random key of the linear maps.

    Returns:
      Parameters (trained with the student) and statistics: BatchNorm's running mean and variance, and the teacher's
      channel mean and standard deviation, 0 and 1 until `measure_teacher` has been called.
    """
    params, stats = {}, {}
    for index, (name, projection) in enumerate(sorted(objective.projections.items())):
        narrow = student.features[projection.student_stage].shape[-1]
        wide = teacher.features[projection.teacher_stage].shape[-1]
        kernel = jax.random.normal(jax.random.fold_in(key, index), (narrow, wide), jnp.float32) * narrow**-0.5
        params[name] = {"kernel": kernel, "scale": jnp.ones(wide), "bias": jnp.zeros(wide)}
        stats[name] = {
            "mean": jnp.zeros(wide),
            "var": jnp.ones(wide),
            "teacher_mean": jnp.zeros(wide),
            "teacher_std": jnp.ones(wide),
        }
    return params, stats


def measure_teacher(objective: Objective, stats: PyTree, teacher_features: Iterable[Any]) -> PyTree:
    """Projection statistics with the teacher's channel means and standard deviations filled in.

    Args:
      objective: names the stages.
      stats: what `init_projections` returned.
      teacher_features: the teacher's `Outputs.features` in evaluation mode, batch by batch.

    Returns:
      The statistics; sums are accumulated on the host in float64 over all batches and positions. No deviation is
      smaller than a hundredth of the layer's root mean square one.
    """
    sums = {name: [0.0, 0.0, 0] for name in objective.projections}
    for features in teacher_features:
        for name, projection in objective.projections.items():
            stage = np.asarray(features[projection.teacher_stage], np.float64)
            flat = stage.reshape(-1, stage.shape[-1])
            sums[name][0] += flat.sum(0)
            sums[name][1] += (flat**2).sum(0)
            sums[name][2] += flat.shape[0]
    measured = {}
    for name, (total, squares, count) in sums.items():
        mean = total / count
        variance = np.maximum(squares / count - mean**2, 0.0)
        # A channel that hardly ever fires would be blown up to thousands by its own scale, and rule the distance.
        floor = 1e-2 * np.sqrt(variance.mean()) or 1.0
        std = np.maximum(np.sqrt(variance), floor)
        measured[name] = {
            **stats[name],
            "teacher_mean": jnp.asarray(mean, jnp.float32),
            "teacher_std": jnp.asarray(std, jnp.float32),
        }
    return measured


def project(
    objective: Objective, params: PyTree, stats: PyTree, student: Outputs, teacher: Outputs, *, train: bool = True
) -> tuple[dict[str, Array], dict[str, Array], PyTree]:
    """Both networks' maps, comparable: the student's projected, the teacher's standardised.

    Args:
      objective: names the stages.
      params: parameters of the projections.
      stats: their statistics.
      student: the student's outputs.
      teacher: the teacher's outputs; its maps receive no gradient.
      train: normalise by the batch's statistics and update the running ones, or use the running ones.

    Returns:
      Student maps and teacher maps by projection name, in float32, and the new statistics.
    """
    student_maps, teacher_maps, new_stats = {}, {}, {}
    for name, projection in objective.projections.items():
        p, s = params[name], stats[name]
        y = student.features[projection.student_stage].astype(jnp.float32) @ p["kernel"]
        mean, var = (y.mean((0, 1, 2)), y.var((0, 1, 2))) if train else (s["mean"], s["var"])
        student_maps[name] = (y - mean) * (jax.lax.rsqrt(var + PROJECTION_EPSILON) * p["scale"]) + p["bias"]
        target = teacher.features[projection.teacher_stage].astype(jnp.float32)
        teacher_maps[name] = jax.lax.stop_gradient((target - s["teacher_mean"]) / s["teacher_std"])
        keep = PROJECTION_MOMENTUM if train else 1.0
        running = {"mean": keep * s["mean"] + (1 - keep) * mean, "var": keep * s["var"] + (1 - keep) * var}
        new_stats[name] = {**s, **jax.lax.stop_gradient(running)}
    return student_maps, teacher_maps, new_stats
