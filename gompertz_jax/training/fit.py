"""Training one network under one objective: what teachers and students have in common."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..network import Network, Outputs
from ..objective import Objective
from ..projections import measure_teacher
from ..state import TrainState, init_state
from ..step import as_unit_interval, make_eval_step, make_train_step
from .config import Config
from .drive import Plan, Program, Snapshot, drive
from .feed import Feed, Images, Labelled
from .optim import learning_rate, make_optimizer
from .reader import StudentMetrics
from .sharding import replicate
from .stop import Stop

PROJECTIONS = 0x50  # folded into the seed, so that projections, weights and batches draw from different keys


@dataclass(frozen=True)
class Fitted:
    """A trained network: after the last step, and the best by validation (None where nothing was held out).

    `not_converged` counts, per term, the steps at which the transport of some image did not converge.
    """

    last: Network
    best: Network
    best_accuracy: float | None
    best_step: int | None
    seconds: float
    images_per_second: float
    not_converged: Mapping[str, int]

    @property
    def selected(self) -> Network:
        """The network that counts: the best by validation, or the last."""
        return self.last if self.best_accuracy is None else self.best


def fit(
    config: Config,
    recipe: Config,
    plan: Plan,
    *,
    label: str,
    workdir: Path,
    network: Network,
    objective: Objective,
    teacher: Network | None,
    data: Images,
    seed: int,
    order_seed: int | None = None,
    mesh: Mesh,
    stop: Stop | None = None,
    views: int = 0,
) -> Fitted:
    """Train one network under one objective; teachers and students alike. Resumes from the newest checkpoint.

    Args:
      config: intervals, augmentation, logging.
      recipe: optimiser and epochs.
      plan: the plan of this recipe.
      label: what the progress line calls it.
      workdir: gets `checkpoints/` and `metrics.jsonl`.
      network: with its initial weights.
      objective: what is minimised.
      teacher: None when no term distils.
      data: training and validation images.
      seed: seed of the projections.
      order_seed: seed of data order, augmentation and what terms draw; default: `seed`.
      mesh: the devices to train on.
      stop: checked after every dispatch.
      views: how many views an image has, for which the teacher's outputs are then stored in `outputs/`; 0: any number,
        and the teacher runs in every step.

    Returns:
      The trained network.

    Raises:
      Stopped: it was asked to stop, and has saved the state after its last dispatch.
      RunError: a term, the gradient or the update was not finite; or the teacher was exchanged since the last start.
    """
    order_seed = seed if order_seed is None else order_seed
    rate = learning_rate(recipe, steps_per_epoch=plan.steps_per_epoch)
    optimizer = make_optimizer(recipe, rate)
    average = recipe.moving_average or None

    def begin() -> tuple[TrainState, Best]:
        state = init_state(
            network,
            optimizer,
            objective,
            data.images.shape[1:],
            teacher=teacher,
            key=projections_key(seed),
            moving_average=average is not None,
        )
        return state, Best.none(state)

    def measured(state: TrainState, teacher: Network) -> TrainState:
        if not objective.projections:
            return state
        outputs = teacher_outputs(teacher, data, config.teacher_statistics_images, mesh)
        return state._replace(projection_stats=measure_teacher(objective.projections, state.projection_stats, outputs))

    def make_step(feed: Feed) -> Any:
        return make_train_step(
            network,
            optimizer,
            objective,
            make_batch=feed.make_batch,
            steps_per_dispatch=plan.steps_per_dispatch,
            seed=order_seed,
            average_decay=average,
            logged_schedules={"learning_rate": rate},
            skip_below=config.objective.skip_below,
            term_gradients_every=config.logging.term_gradients_every or None,
            mesh=mesh,
        )

    def alone(metrics: Any) -> list[StudentMetrics]:
        return [StudentMetrics({}, objective, metrics)]

    driven = drive(
        config,
        recipe,
        plan,
        Program(
            begin=begin,
            measured=measured,
            make_step=make_step,
            snapshot=jax.jit(make_snapshot(network, mesh)),
            students=alone,
            network=network,
            objectives=(objective,),
        ),
        label=label,
        workdir=workdir,
        teacher=teacher,
        data=data,
        order_seed=order_seed,
        mesh=mesh,
        stop=stop,
        views=views,
    )
    (state, best), validation = driven[:2], data.validation
    return Fitted(
        last=evaluated(network, state),
        best=evaluated(network, state) if validation is None else network.replace(params=best.params, stats=best.stats),
        best_accuracy=None if validation is None else int(best.correct) / len(validation.labels),
        best_step=None if validation is None else int(best.step),
        seconds=driven.clock.total_seconds,
        images_per_second=driven.clock.images_per_second,
        not_converged=driven.not_converged,
    )


def projections_key(seed: int) -> jax.Array:
    """What a student's projections are drawn from."""
    return jax.random.fold_in(jax.random.key(seed), PROJECTIONS)


def evaluated(network: Network, state: TrainState) -> Network:
    """The network that a state is evaluated as."""
    params, stats = state.evaluated()
    return network.replace(params=params, stats=stats)


def teacher_outputs(
    teacher: Network, data: Images, count: int, mesh: Mesh, *, batch_size: int = 200
) -> Iterator[tuple[Outputs, Any]]:
    """The teacher's outputs on the first `count` training images, and their labels, in batches."""
    outputs = jax.jit(lambda teacher, images: teacher.forward(as_unit_interval(images), train=False, frozen=True)[0])
    for start in range(0, min(count, len(data.labels)), batch_size):
        chosen = slice(start, min(start + batch_size, count))
        yield outputs(teacher, replicate(data.images[chosen], mesh)), data.labels[chosen]


class Best(NamedTuple):
    """The weights that classified most validation images so far; part of every checkpoint."""

    params: Any
    stats: Any
    correct: jax.Array
    step: jax.Array

    @classmethod
    def none(cls, state: TrainState) -> "Best":
        """Before any evaluation."""
        return cls.of(state, jnp.full((), -1, jnp.int32))

    @classmethod
    def of(cls, state: TrainState, correct: jax.Array) -> "Best":
        """The evaluated weights of a state, copied, because the next dispatch takes the state's memory."""
        params, stats = jax.tree.map(jnp.copy, state.evaluated())
        return cls(params, stats, correct, jnp.copy(state.step))


def make_snapshot(
    network: Network, mesh: Mesh
) -> Callable[[TrainState, Best, Labelled | None, jax.Array | None], Snapshot]:
    """What is queued behind a dispatch of one student whose end is to be evaluated and saved.

    Args:
      network: the one in training.
      mesh: its devices.

    Returns:
      `snapshot(state, best, validation, teacher_classes) -> Snapshot`: `teacher_classes` are those that the teacher
      predicts for the held-out images. Accuracies are exact counts.
    """
    evaluate = make_eval_step(mesh=mesh)

    def snapshot(
        state: TrainState, best: Best, validation: Labelled | None, teacher_classes: jax.Array | None
    ) -> Snapshot:
        line = {}
        if validation is not None:
            predictions = evaluate(evaluated(network, state), *validation)
            correct = (predictions.classes == validation.labels).sum(dtype=jnp.int32)
            line = {"accuracy": correct, "cross_entropy": predictions.cross_entropy}
            if teacher_classes is not None:
                line["agreement"] = (predictions.classes == teacher_classes).sum(dtype=jnp.int32)
            better = correct >= best.correct
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), Best.of(state, correct), best)
        return Snapshot(jax.tree.map(jnp.copy, state), best, line)

    return snapshot
