"""Training one network under one objective: what teachers and students have in common.

The order of things, which resuming relies on:

1. A dispatch is issued before the metrics of the one before it are read: the device never waits for the host.
2. So is an evaluation: it is queued behind its dispatch with a copy of the state, and read, written and saved while the
   next dispatch runs.
3. Metrics up to step n are on disk before the checkpoint of step n is begun; one that is not whole does not count.
4. The best weights so far are part of the checkpoint; validation decides, and of two equals the later one counts.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..network import Network, Outputs
from ..objective import Objective
from ..projections import measure_teacher
from ..step import (
    HEALTHY,
    TELEMETRY,
    TrainState,
    as_unit_interval,
    init_state,
    make_eval_step,
    make_train_step,
    output_shapes,
)
from .checkpoint import Checkpoints
from .config import Config
from .errors import RunError
from .feed import Feed, Held, Images
from .optim import learning_rate, make_optimizer
from .outputs import OUTPUTS, stored_outputs
from .preflight import stored_parts
from .sharding import on_main, replicate, say
from .stop import Stop
from .teacher import fingerprint
from .writer import METRICS, MetricsWriter, Progress, lines_until, read_metrics

MOST_STEPS = 10_000_000  # the schedules' values at every step are looked at beforehand
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
          RunError: the batch is larger than the training set, or the steps are more than MOST_STEPS.
        """
        if recipe.batch_size > count:
            raise RunError(f"batch_size = {recipe.batch_size} exceeds the {count:,} training images")
        per_epoch = count // recipe.batch_size
        steps = per_epoch * recipe.epochs
        if steps > MOST_STEPS:
            raise RunError(
                f"epochs = {recipe.epochs:,} of {per_epoch:,} steps are more than {MOST_STEPS:,} steps: take fewer"
            )
        dispatch = next(n for n in range(min(config.steps_per_dispatch, steps), 0, -1) if steps % n == 0)
        return cls(steps, per_epoch, dispatch, per_epoch * config.evaluate_every_epochs)

    def evaluates_at(self, step: int) -> bool:
        """Whether the dispatch that ends at `step` passed the end of an evaluation interval."""
        before = step - self.steps_per_dispatch
        return step // self.evaluate_every > before // self.evaluate_every or step == self.steps


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


class Program(NamedTuple):
    """What `drive` trains: one student, or all students of a comparison.

    Attributes:
      state: before the first step; has a `step`.
      best: before any evaluation, see `Best`.
      measured: `(state, teacher) -> state`, what is measured of the teacher once, before the first step.
      make_step: `(feed) -> step`, the compiled training step.
      survey: compiled; what is queued behind a dispatch that is to be evaluated, see `make_survey`.
      students: takes a tree of metrics apart: per student its tags in metrics.jsonl, its objective, its metrics.
      network: whose outputs have the shapes of every student's.
      objectives: of all students, each kind once.
      divided: whether batches are divided among the devices; else each has them whole.
    """

    state: Any
    best: Any
    measured: Callable[[Any, Network], Any]
    make_step: Callable[[Feed], Any]
    survey: Any
    students: "Callable[[Any], Iterable[Told]]"
    network: Network
    objectives: tuple[Objective, ...]
    divided: bool = True


class Told(NamedTuple):
    """What one student's metrics say.

    Attributes:
      tags: of its lines in metrics.jsonl; none where there is one student.
      objective: its own.
      metrics: by name, an array `[steps]` or a scalar.
    """

    tags: Mapping[str, Any]
    objective: Objective
    metrics: Mapping[str, np.ndarray]


class Driven(NamedTuple):
    """The end of a program: its last state and best weights, the time it took, and transports that did not converge."""

    state: Any
    best: Any
    clock: "Clock"
    not_converged: dict[str, int]


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
      data: training and validation images.
      seed: of the projections.
      order_seed: of data order and augmentation, and of what terms draw; default: `seed`.
      mesh: the devices to train on.
      stop: asked after every dispatch.
      views: how many views an image has, of which the teacher's outputs are then stored in `outputs/`; 0: any number,
        and the teacher runs in every step.

    Returns:
      The trained network.

    Raises:
      Stopped: it was asked to, and has saved the state after its last dispatch.
      RunError: a term, the gradient or the update was not finite; or the teacher was exchanged since the last start.
    """
    order_seed = seed if order_seed is None else order_seed
    rate = learning_rate(recipe, steps_per_epoch=plan.steps_per_epoch)
    optimizer = make_optimizer(recipe, rate)
    average = recipe.moving_average or None
    state = init_state(
        network,
        optimizer,
        objective,
        data.images.shape[1:],
        teacher=teacher,
        key=projections_key(seed),
        moving_average=average is not None,
    )

    def measured(state: TrainState, teacher: Network) -> TrainState:
        if not objective.projections:
            return state
        taught = teacher_outputs(teacher, data, config.teacher_statistics_images, mesh)
        return state._replace(projection_stats=measure_teacher(objective.projections, state.projection_stats, taught))

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

    def alone(metrics: Any) -> list[Told]:
        return [Told({}, objective, metrics)]

    driven = drive(
        config,
        recipe,
        plan,
        Program(
            state=state,
            best=Best.none(state),
            measured=measured,
            make_step=make_step,
            survey=jax.jit(make_survey(network, mesh)),
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
    (state, best), held = driven[:2], data.validation
    return Fitted(
        last=evaluated(network, state),
        best=evaluated(network, state) if held is None else network.replace(params=best.params, stats=best.stats),
        best_accuracy=None if held is None else int(best.correct) / len(held[1]),
        best_step=None if held is None else int(best.step),
        seconds=driven.clock.total_seconds,
        images_per_second=driven.clock.images_per_second,
        not_converged=driven.not_converged,
    )


def drive(
    config: Config,
    recipe: Config,
    plan: Plan,
    program: Program,
    *,
    label: str,
    workdir: Path,
    teacher: Network | None,
    data: Images,
    order_seed: int,
    mesh: Mesh,
    stop: Stop | None = None,
    views: int = 0,
) -> Driven:
    """Take a program's steps, from the newest checkpoint on: evaluate, save, write and stop in between.

    The arguments and errors are those of `fit`.
    """
    started, stop = time.monotonic(), stop or Stop()
    taught_by = None if teacher is None else fingerprint(teacher)
    teacher = replicate(teacher, mesh)

    def lines_are_there(step: int, record: Mapping[str, Any]) -> bool:
        return len(lines_until(read_metrics(workdir / METRICS), step)) == record["lines"]

    with (
        Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, agrees=lines_are_there) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        clock, not_converged, failed = Clock(), {}, set()
        state, best = program.state, program.best
        if checkpoints.latest_step is None and teacher is not None:
            state = program.measured(state, teacher)
        state, best = replicate((state, best), mesh)
        if checkpoints.latest_step is not None:
            (state, best), record = checkpoints.restore((state, best))
            if record["taught_by"] != taught_by:
                raise RunError(
                    f"the teacher is not the one that {workdir} began with; restore it, or use a new --workdir"
                )
            clock, not_converged = Clock(**record["timing"]), record["not_converged"]
            failed = set(record["failed"])
            say(f"{label}: goes on from step {int(state.step):,} of {plan.steps:,} in {workdir}")
            if not on_main(lambda: lines_are_there(int(state.step), record)):
                say(f"{workdir / METRICS} lost lines that no checkpoint is old enough to write again: they stay lost")
        earlier, step = clock.total_seconds, int(state.step)

        outputs = {}
        if views and teacher is not None and step < plan.steps:
            image, networks = data.images.shape[1:], (program.network, teacher)
            ours, theirs = (output_shapes(network, image, batch_size=recipe.batch_size) for network in networks)
            parts = {part for o in program.objectives for part in stored_parts(o, ours, theirs, image)}
            outputs = stored_outputs(
                workdir / OUTPUTS,
                teacher,
                data,
                parts=sorted(parts),
                views=views,
                seed=order_seed,
                augment=config.augment,
                mesh=mesh,
            )
        feed = stack.enter_context(
            Feed(
                data,
                seed=order_seed,
                batch_size=recipe.batch_size,
                augment=config.augment,
                steps_per_dispatch=plan.steps_per_dispatch,
                mesh=mesh,
                divided=program.divided,
                views=views,
                outputs=outputs,
            )
        )
        train_step, survey = program.make_step(feed), program.survey
        held = data.validation
        classes = None if held is None or teacher is None else make_eval_step(mesh=mesh)(teacher, *held).classes
        if outputs:
            teacher = None  # its outputs are in the batches
        if step < plan.steps:
            # A program that is compiled ahead refuses what does not fit it: nothing is compiled a second time.
            train_step = train_step.lower(state, teacher, feed(step)).compile()
            survey = survey.lower(state, best, held, classes).compile()

        with (
            MetricsWriter(workdir, step=step) as writer,
            Progress(label, step=step, total=plan.steps, enabled=config.logging.progress) as progress,
            stop.deferred(),
            jax.transfer_guard("disallow"),
        ):
            reader = MetricsReader(
                program.students,
                recipe.batch_size,
                config.logging,
                clock,
                not_converged,
                failed,
                writer,
                progress,
            )

            def conclude(step: int, found: Findings) -> None:
                """Write and save what was found at `step`, the end of the dispatch whose metrics were read last."""
                accuracies = []
                for told in program.students(jax.device_get(found.line)) if found.line else ():
                    if held is None or reader.has_failed(told):
                        continue
                    line = {name: value.item() for name, value in told.metrics.items()}
                    line |= {name: line[name] / len(held[1]) for name in ("accuracy", "agreement") if name in line}
                    accuracies.append(line["accuracy"])
                    writer.write({"step": step, "split": "validation", **told.tags, **line})
                if accuracies:
                    progress.validation_accuracy = sum(accuracies) / len(accuracies)
                writer.commit()
                clock.total_seconds = earlier + time.monotonic() - started
                record = {
                    "timing": clock.record(),
                    "taught_by": taught_by,
                    "lines": writer.lines,
                    "not_converged": reader.not_converged.copy(),
                    "failed": sorted(reader.failed),
                }
                with jax.transfer_guard("allow"):  # Orbax fetches the arrays in its own way
                    checkpoints.save(step, (found.state, found.best), record)

            pending = None
            while step < plan.steps:
                state, metrics = train_step(state, teacher, feed(step))
                step += plan.steps_per_dispatch
                reader.take(metrics)
                if pending is not None:
                    conclude(*pending)
                pending = None
                if plan.evaluates_at(step):
                    found = survey(state, best, held, classes)
                    best, pending = found.best, (step, found)
                if stop.requested():
                    # No dispatch will take this state's memory, so it is saved as it is where it is not evaluated.
                    pending = pending or (step, Findings(state, best, ()))
                    break
            reader.drain()
            if pending is not None:
                conclude(*pending)
            checkpoints.wait()
            reader.count_rest()
            if step < plan.steps:
                say(f"{label}: saved at step {step:,} of {plan.steps:,}")
    return Driven(state, best, clock, not_converged)


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


class Findings(NamedTuple):
    """What is known of a state beyond its metrics, perhaps still on its way.

    Attributes:
      state: a copy, whose memory no dispatch will take.
      best: the best weights so far, this state's among them.
      line: the validation line of metrics.jsonl; empty where nothing is held out. Of several students a tree of such
        lines, as `Program.students` takes it; () where nothing was looked at.
    """

    state: Any
    best: Any
    line: Any


def make_survey(network: Network, mesh: Mesh) -> Callable[[TrainState, Best, Held | None, jax.Array | None], Findings]:
    """What is queued behind a dispatch when its end is to be evaluated and saved, of one student.

    Args:
      network: the one in training.
      mesh: its devices.

    Returns:
      `survey(state, best, held_out, classes) -> Findings`: `classes` are the teacher's of the held-out images.
      Accuracies are exact counts.
    """
    evaluate = make_eval_step(mesh=mesh)

    def survey(state: TrainState, best: Best, held: Held | None, classes: jax.Array | None) -> Findings:
        line = {}
        if held is not None:
            predictions = evaluate(evaluated(network, state), *held)
            correct = (predictions.classes == held[1]).sum(dtype=jnp.int32)
            line = {"accuracy": correct, "cross_entropy": predictions.cross_entropy}
            if classes is not None:
                line["agreement"] = (predictions.classes == classes).sum(dtype=jnp.int32)
            better = correct >= best.correct
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), Best.of(state, correct), best)
        return Findings(jax.tree.map(jnp.copy, state), best, line)

    return survey


@dataclass
class Clock:
    """Time spent, over all starts of a run. The seconds of steps hold evaluation and saving, but no compilation."""

    total_seconds: float = 0.0
    step_seconds: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        """While steps were taken; 0 if none was."""
        return self.images / self.step_seconds if self.step_seconds else 0.0

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return vars(self).copy()


class MetricsReader:
    """Reads each dispatch's metrics once the next one is under way, and passes them on.

    Attributes:
      not_converged: by term, and before it by student where there are several, at how many steps the transport of some
        image did not converge; counted on, over all starts.
      failed: of several students those whose training ended before its time.
    """

    def __init__(
        self,
        students: Callable[[Any], Iterable[Told]],
        batch_size: int,
        logging: Config,
        clock: Clock,
        not_converged: dict[str, int],
        failed: set[str],
        writer: MetricsWriter,
        progress: Progress,
    ):
        self.not_converged, self.failed = not_converged, failed
        self._warned = False
        self._students, self._batch_size, self._logging = students, batch_size, logging
        self._clock, self._writer, self._progress = clock, writer, progress
        self._pending: Any = None
        self._last_read = time.monotonic()

    def has_failed(self, told: Told) -> bool:
        """Whether this student's training has ended before its time."""
        return _prefix(told) in self.failed

    def take(self, metrics: Any) -> None:
        """Accept the metrics of the dispatch just issued, and read those of the one before it."""
        self.drain()
        self._pending = metrics

    def drain(self) -> None:
        """Wait for what is pending, check it and write it.

        Raises:
          RunError: a term or the gradient was not finite, of the only student or of the last one.
        """
        if self._pending is None:
            return
        students, self._pending = list(self._students(jax.device_get(self._pending))), None
        now = time.monotonic()
        elapsed, self._last_read = now - self._last_read, now
        steps = len(students[0].metrics["step"])
        images = steps * self._batch_size * len(students)
        self._clock.step_seconds += elapsed
        self._clock.images += images
        failures = []
        for told in students:
            if not self.has_failed(told) and (failure := self._read(told, images / elapsed)):
                self.failed.add(_prefix(told))
                failures.append(failure)
        if failures:
            self._writer.commit()
            if len(self.failed) == len(students):
                raise RunError(failures[-1])
            say("\n".join(f"warning: {failure}; the others go on" for failure in failures))
        going = [told.metrics for told in students if not self.has_failed(told)]
        self._progress.update(
            max(int(metrics["step"][-1]) for metrics in going) + 1,
            loss=float(np.mean([metrics["loss"][-1] for metrics in going])),
            accuracy=float(np.mean([metrics["accuracy"] for metrics in going])),
            images_per_second=images / elapsed,
        )

    def count_rest(self) -> None:
        """Count the time after the last metrics, too: of the last evaluation, and of saving."""
        if self._clock.images:
            self._clock.step_seconds += time.monotonic() - self._last_read

    def _read(self, told: Told, images_per_second: float) -> str | None:
        """Write what a student's metrics say; how it failed, if it did."""
        metrics = told.metrics
        failed, gradients_every = metrics["failed_term"] != HEALTHY, self._logging.term_gradients_every
        # Steps after a failure change nothing and say nothing new; the failing one itself is told.
        until = np.cumsum(failed) <= 1
        measured = metrics["step"] % gradients_every == 0 if gradients_every else np.zeros_like(failed)
        for index in np.flatnonzero(until & ((metrics["step"] % self._logging.every_steps == 0) | measured | failed)):
            without = ("failed_term", "failed_step", *(TELEMETRY if gradients_every and not measured[index] else ()))
            values = {name: column[index] for name, column in metrics.items() if not name.endswith(without)}
            line = {"step": values.pop("step"), "split": "train", **told.tags, **values}
            self._writer.write({**line, "timing": {"images_per_second": round(images_per_second, 1)}})
        self._count_convergence(told)
        if not failed.any():
            return None
        return _failure(told, int(metrics["failed_term"][-1]), int(metrics["failed_step"][-1]))

    def _count_convergence(self, told: Told) -> None:
        metrics = told.metrics
        for term in told.objective.terms:
            shares = metrics.get(f"{term.name}/converged", np.ones(1))
            short = np.flatnonzero(shares < 1)  # NaN, where the term was not computed, is no such step
            if not short.size:
                continue
            name = _prefix(told) + term.name
            self.not_converged[name] = self.not_converged.get(name, 0) + int(short.size)
            if not self._warned:
                self._warned = True
                first = short[0]
                say(
                    f"warning: at step {int(metrics['step'][first])} the transport of {1 - float(shares[first]):.1%} "
                    f"of the images in the term {name!r} did not converge (mean marginal error "
                    f"{float(metrics[f'{term.name}/marginal_error'][first]):.1e}): its value is approximate. A larger "
                    f"objective.terms.{term.name}.epsilon converges sooner. Further steps are counted in result.json"
                )


def _prefix(told: Told) -> str:
    return "".join(f"{value}/" for value in told.tags.values())


def _failure(told: Told, failed: int, step: int) -> str:
    what = [*(f"the term {term.name!r}" for term in told.objective.terms), "the gradient", "the update"][failed]
    whose = f"{_prefix(told).rstrip('/')}: " if told.tags else ""
    return (
        f"{whose}{what} was not finite at step {step}; the update was refused and nothing of it saved. "
        "Look at that step in metrics.jsonl; a lower learning_rate or a clip_norm in the recipe, with another "
        "--workdir, is the usual remedy"
    )
