"""The objective as data: named terms, each with its own schedule, over one record of both networks' outputs.

    L(step) = w_ce(step) CE + G(step) [ a T^2 KL(teacher || student) + b W + c M ]

G is the Gompertz curve, W the transport between feature maps, M the distance between input gradients. The Gompertz-CNN
paper (Yang and Qin, 2025, https://arxiv.org/abs/2510.21649) states in its abstract that such losses are unified under
such a curve; every concrete choice here is our reconstruction.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import terms
from ._checks import check_real, checked, finite_number, fraction_from_zero, positive_count, positive_number, shown
from .projections import AnyProjection, Projection
from .record import Record, TeacherRecord
from .schedules import AnySchedule, ByProgress, constant_schedule, gompertz_schedule, product, value_at


class Term(NamedTuple):
    """One summand of the objective.

    Attributes:
      name: how the term is logged; unique within an objective.
      weight: step -> coefficient, or `by_progress(...)`.
      loss: `loss(record, **scheduled)` -> one value per example (or per class, or for the whole batch: the term is
        their mean), or a pair of these values and `{name: values}`, diagnostics to log.
      schedules: keyword arguments of `loss` that change over training, each given like `weight`.
      distils: whether the term needs a teacher.
      every_k_steps: the term is computed at steps divisible by k, and costs nothing at the others, where it is logged
        as NaN. Its weight is not raised to make up for the skipped steps: use `k * curve` for that.
      gradient_stages: (student stage, teacher stage) at whose maps `loss` reads gradients; empty if it reads none.
      of_teacher: the expensive part of `loss` that depends only on the teacher, a function `TeacherRecord -> arrays`.
        Where many students learn from one teacher it is computed once, and `loss` gets it as its keyword `of_teacher`.
      bridge: for the pre-flight, how maps that differ in channels or size are made comparable.
    """

    name: str
    weight: AnySchedule
    loss: Callable[..., Any]
    schedules: Mapping[str, AnySchedule] = {}
    distils: bool = True
    every_k_steps: int = 1
    gradient_stages: tuple[int, int] | tuple[()] = ()
    of_teacher: Callable[[TeacherRecord], Any] | None = None
    bridge: str = ""

    def reads_progress(self) -> bool:
        """Whether a weight or another schedule of this term is indexed by the student's progress."""
        return any(isinstance(schedule, ByProgress) for schedule in (self.weight, *self.schedules.values()))


# --- progress ---------------------------------------------------------------------------------------------------------


@checked
def agreement(record: Record) -> tuple[Array, Array]:
    """The share of images that the student puts into the teacher's class, out of 1."""
    same = record.student.logits.argmax(-1) == record.taught().logits.argmax(-1)
    return same.mean(dtype=jnp.float32), jnp.float32(1.0)


@checked
def relative_accuracy(record: Record) -> tuple[Array, Array]:
    """The student's accuracy on the training batch, out of the teacher's."""
    ours, theirs = (
        (outputs.logits.argmax(-1) == record.labels).mean(dtype=jnp.float32)
        for outputs in (record.student, record.taught())
    )
    return ours, theirs


class Progress(NamedTuple):
    r"""The student's progress, measured on the training batches, which `by_progress` weights read.

    .. math:: n \leftarrow \beta n + (1 - \beta) \, n_t, \qquad d \leftarrow \beta d + (1 - \beta) \, d_t, \qquad
       \text{progress} = \min(n / d, 1)

    from n = 0 and d = 1: an untrained student has made no progress, and the first batches move it slowly. It is part of
    the training state, so a resumed run continues with it. A step reads the progress before its own batch.

    Attributes:
      measure: record -> (n_t, d_t); `agreement`, `relative_accuracy` or your own function.
      decay: beta, in [0, 1); its memory is about 1 / (1 - beta) steps.
      monotone: progress never falls: the largest value so far.
    """

    measure: Callable[[Record], tuple[Array, Array]] = agreement
    decay: float = 0.99
    monotone: bool = False

    def start(self) -> dict[str, Array]:
        """The state before the first step."""
        return {"student": jnp.float32(0.0), "teacher": jnp.float32(1.0), "progress": jnp.float32(0.0)}

    def update(self, state: Mapping[str, Array], record: Record) -> dict[str, Array]:
        """The state after a batch."""
        measured = self.measure(record)
        if not isinstance(measured, tuple) or len(measured) != 2:
            raise TypeError(f"progress.measure must return a pair of numbers, got {shown(measured)}")
        ours, theirs = measured
        for number in measured:
            check_real("each of the two that progress.measure returns", number)
        student = self.decay * state["student"] + (1.0 - self.decay) * ours
        teacher = self.decay * state["teacher"] + (1.0 - self.decay) * theirs
        progress = jnp.clip(student / jnp.maximum(teacher, jnp.finfo(jnp.float32).tiny), 0.0, 1.0)
        if self.monotone:
            progress = jnp.maximum(progress, state["progress"])
        return jax.lax.stop_gradient({"student": student, "teacher": teacher, "progress": progress})


class Objective(NamedTuple):
    """Named terms, the projections that they read, by name, and how progress is measured, if a weight reads it."""

    terms: tuple[Term, ...]
    projections: Mapping[str, AnyProjection] = {}
    progress: Progress | None = None


def check_objective(objective: Objective) -> None:
    """Refuse an objective with a part of the wrong type or value, naming the part.

    Raises:
      TypeError: a term, a weight, a loss or a projection has the wrong type.
      ValueError: there is no term, two have the same name, or one is computed at no step.
    """
    if not isinstance(objective.terms, tuple | list) or not objective.terms:
        raise ValueError(f"objective: terms must be a tuple of at least one Term, got {shown(objective.terms)}")
    for term in objective.terms:
        if not isinstance(term, Term) or not isinstance(term.name, str) or not callable(term.loss):
            raise TypeError(f"objective: a term must be a Term with a name and a loss, got {shown(term)}")
        where = f"of the term {term.name!r}"
        if not isinstance(term.schedules, Mapping) or not all(isinstance(name, str) for name in term.schedules):
            raise TypeError(f"objective: schedules {where} must be schedules by name, got {shown(term.schedules)}")
        for schedule in (term.weight, *term.schedules.values()):
            if not callable(schedule) and not isinstance(schedule, ByProgress):
                raise TypeError(f"objective: a weight or schedule {where} must be a function of the step")
        positive_count(f"objective: every_k_steps {where}", term.every_k_steps)
        stages = term.gradient_stages
        if not isinstance(stages, tuple) or len(stages) not in (0, 2) or not all(isinstance(i, int) for i in stages):
            raise TypeError(f"objective: gradient_stages {where} must be () or two integers, got {shown(stages)}")
    if len({term.name for term in objective.terms}) != len(objective.terms):
        raise ValueError(f"objective: term names must differ, got {[term.name for term in objective.terms]}")
    if not isinstance(objective.projections, Mapping):
        raise TypeError(f"objective: projections must be projections by name, got {shown(objective.projections)}")
    for name, projection in objective.projections.items():
        if not isinstance(name, str) or isinstance(projection, type) or not isinstance(projection, AnyProjection):
            raise TypeError(f"objective: the projection {name!r} must be one of gompertz_jax.projections")
    progress = objective.progress
    if progress is not None:
        if not isinstance(progress, Progress) or not callable(progress.measure):
            raise TypeError(f"objective: progress must be a Progress with a function to measure, got {shown(progress)}")
        fraction_from_zero("objective: progress.decay", progress.decay)


# --- the default ------------------------------------------------------------------------------------------------------


@checked
def gompertz_objective(
    total_steps: int,
    *,
    curve: AnySchedule | None = None,
    soft_target_weight: float = 1.0,
    temperature: float = 4.0,
    wasserstein_weight: float = 4.0,
    gradient_weight: float = 0.7,
    label_smoothing: float = 0.0,
) -> Objective:
    """The whole objective `CE + G [a T^2 KL + b W + c M]` under one curve G (our reconstruction).

    Args:
      total_steps: length of training in steps, what the curve is indexed by.
      curve: G, step -> weight; the default is `gompertz_schedule(total_steps)`. `by_progress(gompertz_schedule(1))`
        indexes it by the student's agreement with the teacher instead.
      soft_target_weight: a.
      temperature: T of the soft targets.
      wasserstein_weight: b; the default gives W's gradient about 0.3 times the norm of the cross-entropy's at mid-run
        of `configs/cifar10_small.py`.
      gradient_weight: c; the default gives M's gradient about 0.1 times that norm.
      label_smoothing: label smoothing of the cross-entropy.

    Returns:
      Terms `ce`, `kd`, `wasserstein`, `gradient`; a term whose coefficient is 0 is left out, and with it its cost.

    Examples:
      >>> import gompertz_jax as gj
      >>> [term.name for term in gj.gompertz_objective(1000, gradient_weight=0.0).terms]
      ['ce', 'kd', 'wasserstein']
    """
    total_steps = positive_count("total_steps", total_steps)
    weights = (
        ("soft_target_weight", soft_target_weight),
        ("wasserstein_weight", wasserstein_weight),
        ("gradient_weight", gradient_weight),
    )
    soft_target_weight, wasserstein_weight, gradient_weight = (
        float(finite_number(name, value)) for name, value in weights
    )
    temperature = float(positive_number("temperature", temperature))
    label_smoothing = float(fraction_from_zero("label_smoothing", label_smoothing))
    curve = gompertz_schedule(total_steps) if curve is None else curve

    def under_curve(coefficient: float) -> AnySchedule:
        return product(constant_schedule(coefficient), curve)

    every_term = [
        Term(
            "ce", constant_schedule(1.0), partial(terms.cross_entropy, label_smoothing=label_smoothing), distils=False
        ),
        Term(
            "kd", under_curve(soft_target_weight), terms.soft_targets, {"temperature": constant_schedule(temperature)}
        ),
        Term("wasserstein", under_curve(wasserstein_weight), terms.wasserstein),
        Term("gradient", under_curve(gradient_weight), terms.gradient_match),
    ]
    coefficients = (1.0, soft_target_weight, wasserstein_weight, gradient_weight)
    kept = tuple(term for term, coefficient in zip(every_term, coefficients, strict=True) if coefficient != 0.0)
    progress = Progress() if isinstance(curve, ByProgress) else None
    return Objective(kept, {"last": Projection()} if wasserstein_weight else {}, progress)


@checked
def student_alone(*, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy only: the baseline, and how a teacher is trained."""
    label_smoothing = float(fraction_from_zero("label_smoothing", label_smoothing))
    loss = partial(terms.cross_entropy, label_smoothing=label_smoothing)
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


def evaluate(
    objective: Objective, record: Record, step: Any, progress: Any = None, parts: Mapping[str, Any] | None = None
) -> Evaluation:
    """Evaluate every term of `objective` on `record`, with its weight and schedules at `step` and `progress`.

    `parts` are results of `Term.of_teacher` that are already computed, by the term's name.
    """
    raws, weights, metrics = [], [], {}
    for term in objective.terms:
        of_term = partial(_one_number, term.name, step=step, progress=progress)
        scheduled = {name: of_term(name, schedule) for name, schedule in term.schedules.items()}
        known = {"of_teacher": parts[term.name]} if parts and term.name in parts else {}
        values, diagnostics = _returned(term.name, term.loss(record, **scheduled, **known))
        raw = values.mean().astype(jnp.float32)
        weight = jnp.asarray(of_term("weight", term.weight), jnp.float32)
        raws.append(raw)
        weights.append(weight)
        metrics |= {f"{term.name}/raw": raw, f"{term.name}/weight": weight, f"{term.name}/weighted": weight * raw}
        metrics |= {f"{term.name}/{name}": jnp.asarray(value, jnp.float32) for name, value in scheduled.items()}
        metrics |= {f"{term.name}/{name}": value.mean() for name, value in diagnostics.items()}
    return Evaluation(jnp.stack(raws), jnp.stack(weights), jax.lax.stop_gradient(metrics))


def _one_number(term: str, name: str, schedule: AnySchedule, *, step: Any, progress: Any) -> Any:
    value = value_at(schedule, step, progress)
    if np.ndim(value) != 0:
        raise ValueError(
            f"{name!r} of the term {term!r} must be one number at a step, got an array of shape {np.shape(value)}"
        )
    return value


def _returned(term: str, result: Any) -> tuple[Any, Mapping[str, Any]]:
    """Values and diagnostics from what a loss returned, checked, since the loss may be a user's own."""
    values, diagnostics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    named = {"the values": values} | (dict(diagnostics) if isinstance(diagnostics, Mapping) else {})
    wrong = {name: array for name, array in named.items() if not isinstance(array, jax.Array | np.ndarray | np.generic)}
    if not isinstance(diagnostics, Mapping):
        wrong["the diagnostics"] = diagnostics
    for name, array in wrong.items():
        raise TypeError(
            f"the loss of the term {term!r} must return values, an array, or a pair of them and "
            f"{{name: array}}, got {shown(array)} for {name}"
        )
    return values, diagnostics
