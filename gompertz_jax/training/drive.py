"""The loop over a program's dispatches, whether it trains one student or all of a comparison.

The order of things, which resuming relies on:

1. A dispatch is issued before the metrics of the one before it are read: the device never waits for the host.
2. So is an evaluation: it is queued behind its dispatch with a copy of the state, and read, written and saved while the
   next dispatch runs (with several processes Orbax's save begins with a collective, so behind that dispatch).
3. Metrics up to step n are on disk before the checkpoint of step n is begun; a partial one does not count.
4. The best weights so far are part of the checkpoint; validation decides, and of two equal ones the later counts.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ..network import Network, output_shapes
from ..objective import Objective
from ..step import make_eval_step
from .checkpoint import Checkpoints
from .config import Config
from .data import Dataset
from .errors import RunError
from .feed import Feed, Images
from .networks import fingerprint
from .outputs import OUTPUTS, stored_outputs
from .preflight import stored_parts
from .reader import Clock, MetricsReader, StudentMetrics
from .sharding import on_main, replicate, say
from .stop import Stop
from .workdir import CHECKPOINTS, begun_with
from .writer import METRICS, MetricsWriter, ProgressBar, lines_until, read_metrics

MOST_STEPS = 10_000_000  # the schedules' values at every step are looked at beforehand


class Plan(NamedTuple):
    """How a recipe's epochs become steps and dispatches on this data set."""

    steps: int
    steps_per_epoch: int
    steps_per_dispatch: int
    evaluate_every: int

    @classmethod
    def of(
        cls, recipe: Config, config: Config, count: int, *, where: str = "recipe", begun: int | None = None
    ) -> "Plan":
        """The plan of `recipe` for `count` images.

        A dispatch divides the steps, so that one program serves all, and is no longer than what is between two
        evaluations.

        Args:
          recipe: how one network is trained.
          config: the whole experiment's.
          count: training images.
          where: the recipe's key, for messages.
          begun: `evaluate_every_epochs` at the first start, if that was another one: a dispatch of another length is
            another program, whose bits differ.

        Raises:
          RunError: the batch is larger than the training set, or the steps are more than MOST_STEPS.
        """
        if recipe.batch_size > count:
            raise RunError(
                f"{where}.batch_size = {recipe.batch_size} exceeds the {count:,} training images: take {count} or fewer"
            )
        per_epoch = count // recipe.batch_size
        steps = per_epoch * recipe.epochs
        if steps > MOST_STEPS:
            raise RunError(
                f"{where}.epochs = {recipe.epochs:,} of {per_epoch:,} steps exceed {MOST_STEPS:,} steps: take fewer"
            )
        longest = min(config.steps_per_dispatch, steps, per_epoch * (begun or config.evaluate_every_epochs))
        dispatch = next(n for n in range(longest, 0, -1) if steps % n == 0)
        return cls(steps, per_epoch, dispatch, per_epoch * config.evaluate_every_epochs)

    def evaluates_at(self, step: int) -> bool:
        """Whether the dispatch that ends at `step` passed the end of an evaluation interval."""
        before = step - self.steps_per_dispatch
        return step // self.evaluate_every > before // self.evaluate_every or step == self.steps


def make_plan(recipe: Config, config: Config, dataset: Dataset, workdir: Path, *, where: str = "recipe") -> Plan:
    """The plan of a recipe on a data set, with the dispatches of the workdir's first start."""
    begun = on_main(lambda: begun_with(workdir, "evaluate_every_epochs"))
    return Plan.of(recipe, config, len(dataset.train.labels), where=where, begun=begun)


class Program(NamedTuple):
    """What `drive` trains: one student, or all students of a comparison.

    Attributes:
      begin: makes the state before the first step, which has a `step`, and the best before any evaluation, see
        `fit.Best`. Arrays that were held here would stay in memory until the end.
      measured: `(state, teacher) -> state`, what is measured of the teacher once, before the first step.
      make_step: `(feed) -> step`, the compiled training step.
      snapshot: compiled, as from `fit.make_snapshot`; it is queued behind a dispatch that is to be evaluated.
      students: takes a tree of metrics apart: per student its tags in metrics.jsonl, its objective, its metrics.
      network: one whose outputs have the shapes of every student's.
      objectives: those of all students, each kind once.
      divided: whether batches are divided among the devices; otherwise each has whole batches.
    """

    begin: Callable[[], tuple[Any, Any]]
    measured: Callable[[Any, Network], Any]
    make_step: Callable[[Feed], Any]
    snapshot: Any
    students: Callable[[Any], Iterable[StudentMetrics]]
    network: Network
    objectives: tuple[Objective, ...]
    divided: bool = True


class Snapshot(NamedTuple):
    """What is known about a state beyond its metrics, perhaps still being computed.

    Attributes:
      state: a copy, whose memory no dispatch will reuse.
      best: the best weights so far, this state's among them.
      line: the validation line of metrics.jsonl; empty where nothing is held out. For several students a tree of such
        lines, as `Program.students` takes it; () where nothing was evaluated.
    """

    state: Any
    best: Any
    line: Any


class Driven(NamedTuple):
    """The end of a program: its last state and best weights, the time it took, and transports that did not converge."""

    state: Any
    best: Any
    clock: Clock
    not_converged: dict[str, int]


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
    """Take a program's steps, starting from the newest checkpoint: evaluate, save, write and stop in between.

    The arguments and errors are those of `fit`.
    """
    started, stop = time.monotonic(), stop or Stop()
    taught_by = None if teacher is None else fingerprint(teacher)
    teacher, agrees = replicate(teacher, mesh), partial(_lines_are_there, workdir)

    with (
        Checkpoints(workdir / CHECKPOINTS, keep=config.checkpoint.keep, agrees=agrees) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        # Taken apart: whoever held the whole of it would hold the best weights of the start until the end.
        step, state, best, clock, not_converged, failed = _begun_or_resumed(
            checkpoints, program, teacher, workdir, taught_by=taught_by, mesh=mesh
        )
        earlier = clock.total_seconds
        if step:
            say(f"{label}: resumes from step {step:,} of {plan.steps:,} in {workdir}")

        outputs = {}
        if views and teacher is not None and step < plan.steps:
            outputs = _stored(config, recipe, program, workdir, teacher, data, seed=order_seed, views=views, mesh=mesh)
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
        train_step, snapshot = program.make_step(feed), program.snapshot
        validation = data.validation
        teacher_classes = (
            None if validation is None or teacher is None else make_eval_step(mesh=mesh)(teacher, *validation).classes
        )
        if outputs:
            teacher = None  # its outputs are in the batches
        if step < plan.steps:
            # A program that is compiled ahead refuses what does not fit it: nothing is compiled a second time.
            train_step = train_step.lower(state, teacher, feed(step)).compile()
            snapshot = snapshot.lower(state, best, validation, teacher_classes).compile()

        with (
            MetricsWriter(workdir, step=step) as writer,
            ProgressBar(label, step=step, total=plan.steps, enabled=config.logging.progress) as progress,
            stop.deferred(),
            jax.transfer_guard("disallow"),
        ):
            reader = MetricsReader(
                program.students,
                batch_size=recipe.batch_size,
                logging=config.logging,
                clock=clock,
                not_converged=not_converged,
                failed=failed,
                writer=writer,
                progress=progress,
            )

            def conclude(step: int, found: Snapshot) -> None:
                """Write and save what was found at `step`, the end of the dispatch whose metrics were read last."""
                accuracies = []
                for student in program.students(jax.device_get(found.line)) if found.line else ():
                    if validation is None or reader.has_failed(student):
                        continue
                    line = {name: value.item() for name, value in student.metrics.items()}
                    count = len(validation.labels)
                    line |= {name: line[name] / count for name in ("accuracy", "agreement") if name in line}
                    accuracies.append(line["accuracy"])
                    writer.write({"step": step, "split": "validation", **student.tags, **line})
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
                    found = snapshot(state, best, validation, teacher_classes)
                    best, pending = found.best, (step, found)
                if stop.requested():
                    # No dispatch will reuse this state's memory, so if it is not evaluated it is saved without a copy.
                    pending = pending or (step, Snapshot(state, best, ()))
                    break
            reader.drain()
            if pending is not None:
                conclude(*pending)
            checkpoints.wait()
            reader.count_rest()
            if step < plan.steps:
                say(f"{label}: saved at step {step:,} of {plan.steps:,}")
    return Driven(state, best, clock, reader.not_converged)


class _Start(NamedTuple):
    """Where a start begins: before the first step, or after that of the newest checkpoint."""

    step: int
    state: Any
    best: Any
    clock: Clock
    not_converged: dict[str, int]
    failed: set[str]


def _begun_or_resumed(
    checkpoints: Checkpoints,
    program: Program,
    teacher: Network | None,
    workdir: Path,
    *,
    taught_by: str | None,
    mesh: Mesh,
) -> _Start:
    if checkpoints.latest_step is None:
        state, best = program.begin()
        state = state if teacher is None else program.measured(state, teacher)
        state, best = replicate((state, best), mesh)
        return _Start(0, state, best, Clock(), {}, set())
    (state, best), record = checkpoints.restore(jax.eval_shape(program.begin))
    if record["taught_by"] != taught_by:
        raise RunError(f"the teacher is not the one that {workdir} began with; restore it, or use a new --workdir")
    step = int(state.step)
    if not on_main(lambda: _lines_are_there(workdir, step, record)):
        say(f"{workdir / METRICS} lost lines that no checkpoint is old enough to write again: they stay lost")
    return _Start(step, state, best, Clock(**record["timing"]), record["not_converged"], set(record["failed"]))


def _lines_are_there(workdir: Path, step: int, record: Mapping[str, Any]) -> bool:
    return len(lines_until(read_metrics(workdir / METRICS), step)) == record["lines"]


def _stored(
    config: Config,
    recipe: Config,
    program: Program,
    workdir: Path,
    teacher: Network,
    data: Images,
    *,
    seed: int,
    views: int,
    mesh: Mesh,
) -> dict[str, Any]:
    """What the objectives read of the teacher on every view of every image; computed if it is not on disk yet."""
    image, networks = data.images.shape[1:], (program.network, teacher)
    ours, theirs = (output_shapes(network, image, batch_size=recipe.batch_size) for network in networks)
    parts = {part for objective in program.objectives for part in stored_parts(objective, ours, theirs, image)}
    return stored_outputs(
        workdir / OUTPUTS,
        teacher,
        data,
        parts=sorted(parts),
        views=views,
        seed=seed,
        augment=config.augment,
        mesh=mesh,
    )
