"""Training one network under one objective: what teachers and students have in common.

The order of things, which resuming relies on:

1. A dispatch is issued before the metrics of the one before it are read: the device never waits for the host.
2. Metrics up to step n are on disk before the checkpoint of step n counts.
3. The best weights so far are part of the checkpoint; validation decides, and of two equals the later one counts.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..network import Network
from ..objective import Objective, measure_teacher
from ..step import (
    HEALTHY,
    TrainState,
    as_unit_interval,
    init_state,
    make_eval_step,
    make_gradient_report,
    make_train_step,
)
from .augment import make_batch
from .checkpoint import Checkpoints
from .config import Config
from .data import Dataset
from .errors import RunError
from .optim import learning_rate, make_optimizer
from .teacher import fingerprint
from .writer import MetricsWriter, Progress

PROJECTIONS = 0x50  # folded into the seed, so that projections, weights and batches draw from different keys


class Plan(NamedTuple):
    """How a recipe's epochs become steps and dispatches on this data set."""

    steps: int
    steps_per_epoch: int
    steps_per_dispatch: int
    evaluate_every: int

    @classmethod
    def of(cls, recipe: Config, config: Config, count: int) -> "Plan":
        """The plan of `recipe` for `count` images; its steps are a multiple of a dispatch's, so one program serves all.

        Raises:
          RunError: the batch is larger than the training set.
        """
        if recipe.batch_size > count:
            raise RunError(f"batch_size = {recipe.batch_size} exceeds the {count:,} training images")
        per_epoch = count // recipe.batch_size
        steps = per_epoch * recipe.epochs
        dispatch = next(n for n in range(min(config.steps_per_dispatch, steps), 0, -1) if steps % n == 0)
        return cls(steps, per_epoch, dispatch, per_epoch * config.evaluate_every_epochs)

    def evaluates_at(self, step: int) -> bool:
        """Whether the dispatch that ends at `step` passed the end of an evaluation interval."""
        before = step - self.steps_per_dispatch
        return step // self.evaluate_every > before // self.evaluate_every or step == self.steps


class DeviceData(NamedTuple):
    """Training and validation images as uint8 and labels, on the device."""

    images: jax.Array
    labels: jax.Array
    validation: tuple[jax.Array, jax.Array] | None

    @classmethod
    def of(cls, dataset: Dataset) -> "DeviceData":
        """Move a data set to the device."""
        held = dataset.validation
        return cls(
            jnp.asarray(dataset.train.images),
            jnp.asarray(dataset.train.labels),
            None if held is None else (jnp.asarray(held.images), jnp.asarray(held.labels)),
        )


@dataclass(frozen=True)
class Fitted:
    """A trained network: after the last step, and the best by validation (None where nothing was held out)."""

    last: Network
    best: Network
    best_accuracy: float | None
    best_step: int | None
    seconds: float
    images_per_second: float

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
    data: DeviceData,
    seed: int,
) -> Fitted:
    """Train one network under one objective; teachers and students alike. Goes on from the newest checkpoint.

    Args:
      config: intervals, augmentation, logging.
      recipe: optimiser and epochs.
      plan: of this recipe.
      label: what the progress line calls it.
      workdir: gets `checkpoints/` and `metrics.jsonl`.
      network: with its initial weights.
      objective: what is minimised.
      teacher: None when no term distils.
      data: training and validation images on the device.
      seed: of data order, augmentation and projections.

    Returns:
      The trained network.

    Raises:
      RunError: a term, the gradient or the update was not finite; or the teacher was exchanged since the last start.
    """
    started = time.monotonic()
    rate = learning_rate(recipe, steps_per_epoch=plan.steps_per_epoch)
    optimizer = make_optimizer(recipe, rate)
    average = recipe.moving_average or None
    state = init_state(
        network,
        optimizer,
        objective,
        data.images.shape[1:],
        teacher=teacher,
        key=jax.random.fold_in(jax.random.key(seed), PROJECTIONS),
        moving_average=average is not None,
    )
    best = Best.none(state)

    def batch_of(arrays: tuple[jax.Array, jax.Array], step: jax.Array) -> Mapping[str, jax.Array]:
        crop, flip = config.augment.padding, config.augment.flip
        return make_batch(*arrays, step, seed=seed, batch_size=recipe.batch_size, padding=crop, flip=flip)

    train_step = make_train_step(
        network,
        optimizer,
        objective,
        make_batch=batch_of,
        steps_per_dispatch=plan.steps_per_dispatch,
        seed=seed,
        average_decay=average,
        logged_schedules={"learning_rate": rate},
    )
    gradient_report = make_gradient_report(network, objective, seed=seed)
    evaluate = Evaluator.of(data, teacher)
    arrays = (data.images, data.labels)
    taught_by = None if teacher is None else fingerprint(teacher)

    with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        clock = Clock()
        if checkpoints.latest_step is not None:
            (state, best), record = checkpoints.restore((state, best))
            if record["taught_by"] != taught_by:
                raise RunError(
                    f"the teacher is not the one that {workdir} began with; restore it, or use a new --workdir"
                )
            clock = Clock(**record["timing"])
            print(f"{label}: goes on from step {int(state.step):,} of {plan.steps:,} in {workdir}", flush=True)
        elif teacher is not None and objective.projections:
            features = _teacher_features(teacher, data.images[: config.teacher_statistics_images])
            state = state._replace(projection_stats=measure_teacher(objective, state.projection_stats, features))
        earlier, step = clock.total_seconds, int(state.step)

        with (
            MetricsWriter(workdir, step=step) as writer,
            Progress(label, step=step, total=plan.steps, enabled=config.logging.progress) as progress,
        ):
            reader = MetricsReader(objective, recipe.batch_size, config.logging.every_steps, clock, writer, progress)
            while step < plan.steps:
                state, metrics = train_step(state, teacher, arrays)
                step += plan.steps_per_dispatch
                reader.take(metrics)
                if not plan.evaluates_at(step):
                    continue
                reader.drain()
                line: dict[str, float] = {}
                if evaluate is not None:
                    correct, line = evaluate(_evaluated(network, state))
                    progress.validation_accuracy = line["accuracy"]
                    if correct >= int(best.correct):
                        best = Best.of(state, correct)
                if config.logging.term_gradients:
                    batches = (batch_of(arrays, state.step + n) for n in range(config.logging.term_gradients))
                    reports = [gradient_report(state, teacher, batch) for batch in batches]
                    line |= {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}
                if line:
                    writer.write({"step": step, "split": "validation", **line})
                writer.commit()
                clock.total_seconds = earlier + time.monotonic() - started
                checkpoints.save(step, (state, best), {"timing": clock.record(), "taught_by": taught_by})
                reader.restart()

    last = _evaluated(network, state)
    return Fitted(
        last=last,
        best=last if evaluate is None else network.replace(params=best.params, stats=best.stats),
        best_accuracy=None if evaluate is None else int(best.correct) / len(evaluate.labels),
        best_step=None if evaluate is None else int(best.step),
        seconds=clock.total_seconds,
        images_per_second=clock.images / clock.step_seconds if clock.step_seconds else 0.0,
    )


def _evaluated(network: Network, state: TrainState) -> Network:
    params, stats = state.evaluated()
    return network.replace(params=params, stats=stats)


def _teacher_features(teacher: Network, images: jax.Array, *, batch_size: int = 200) -> Iterator[tuple[Any, ...]]:
    features = jax.jit(lambda teacher, images: teacher.forward(as_unit_interval(images), train=False)[0].features)
    for start in range(0, len(images), batch_size):
        yield features(teacher, images[start : start + batch_size])


class Best(NamedTuple):
    """The weights that classified most validation images so far; part of every checkpoint."""

    params: Any
    stats: Any
    correct: jax.Array
    step: jax.Array

    @classmethod
    def none(cls, state: TrainState) -> "Best":
        """Before any evaluation."""
        return cls.of(state, -1)

    @classmethod
    def of(cls, state: TrainState, correct: int) -> "Best":
        """The evaluated weights of a state, copied, because the next dispatch takes the state's memory."""
        params, stats = jax.tree.map(jnp.copy, state.evaluated())
        return cls(params, stats, jnp.asarray(correct, jnp.int32), jnp.copy(state.step))


@dataclass(frozen=True)
class Evaluator:
    """A network on the validation split, beside the teacher."""

    evaluate: Callable[..., Any]
    images: jax.Array
    labels: np.ndarray
    teacher_classes: np.ndarray | None

    @classmethod
    def of(cls, data: DeviceData, teacher: Network | None) -> "Evaluator | None":
        """None where nothing is held out."""
        if data.validation is None:
            return None
        evaluate = make_eval_step()
        classes = None if teacher is None else np.asarray(evaluate(teacher, *data.validation).classes)
        return cls(evaluate, data.validation[0], np.asarray(data.validation[1]), classes)

    def __call__(self, network: Network) -> tuple[int, dict[str, float]]:
        """How many images are classified rightly, and the line for metrics.jsonl."""
        predictions = self.evaluate(network, self.images, self.labels)
        classes = np.asarray(predictions.classes)
        correct = int(np.sum(classes == self.labels))
        line = {"accuracy": correct / len(self.labels), "cross_entropy": float(predictions.cross_entropy)}
        if self.teacher_classes is not None:
            line["agreement"] = float(np.mean(classes == self.teacher_classes))
        return correct, line


@dataclass
class Clock:
    """Time spent, over all starts of a run. Steps are timed without compilation, evaluation and saving."""

    total_seconds: float = 0.0
    step_seconds: float = 0.0
    images: int = 0

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return vars(self).copy()


class MetricsReader:
    """Reads each dispatch's metrics once the next one is under way, and passes them on."""

    def __init__(
        self,
        objective: Objective,
        batch_size: int,
        every_steps: int,
        clock: Clock,
        writer: MetricsWriter,
        progress: Progress,
    ):
        self._objective, self._batch_size, self._every_steps = objective, batch_size, every_steps
        self._clock, self._writer, self._progress = clock, writer, progress
        self._pending: Mapping[str, jax.Array] | None = None
        self._compiled = False
        self._last_read = time.monotonic()

    def take(self, metrics: Mapping[str, jax.Array]) -> None:
        """Accept the metrics of the dispatch just issued, and read those of the one before it."""
        self.drain()
        self._pending = metrics

    def restart(self) -> None:
        """Do not count the time since the last reading as training."""
        self._last_read = time.monotonic()

    def drain(self) -> None:
        """Wait for what is pending, check it and write it.

        Raises:
          RunError: a term or the gradient was not finite.
        """
        if self._pending is None:
            return
        metrics, self._pending = {name: np.asarray(values) for name, values in self._pending.items()}, None
        now = time.monotonic()
        elapsed, self._last_read = now - self._last_read, now
        steps = len(metrics["step"])
        images_per_second = steps * self._batch_size / elapsed
        if self._compiled:
            self._clock.step_seconds += elapsed
            self._clock.images += steps * self._batch_size
        self._compiled = True
        failed = metrics["failed_term"] != HEALTHY
        # Steps after a failure change nothing and say nothing new; the failing one itself is told.
        told = np.cumsum(failed) <= 1
        for index in np.flatnonzero(told & ((metrics["step"] % self._every_steps == 0) | failed)):
            values = {name: column[index] for name, column in metrics.items() if not name.startswith("failed_")}
            line = {"step": values.pop("step"), "split": "train", **values}
            self._writer.write({**line, "timing": {"images_per_second": round(images_per_second, 1)}})
        if failed.any():
            self._writer.commit()
            raise self._failure(int(metrics["failed_term"][-1]), int(metrics["failed_step"][-1]))
        self._progress.update(
            int(metrics["step"][-1]) + 1,
            loss=float(metrics["loss"][-1]),
            accuracy=float(metrics["accuracy"].mean()),
            images_per_second=images_per_second,
        )

    def _failure(self, failed: int, step: int) -> RunError:
        what = [*(f"the term {term.name!r}" for term in self._objective.terms), "the gradient", "the update"][failed]
        return RunError(
            f"{what} was not finite at step {step}; the update was refused and nothing of it saved. "
            "Look at that step in metrics.jsonl; a lower learning_rate or a clip_norm in the recipe, with another "
            "--workdir, is the usual remedy"
        )
