"""From a config to a result: the thin shell in which the compiled step runs.

The order of things, which resuming relies on:

1. A dispatch is issued before the metrics of the one before it are read: the device never waits for the host.
2. Metrics up to step n are on disk before the checkpoint of step n counts.
3. The best weights so far are part of the checkpoint; validation decides, and the earlier of two equals stays.
4. Test images are read once, after the last step.
"""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import report
from ..network import Network
from ..objective import Objective, measure_teacher, student_alone
from ..step import (
    HEALTHY,
    TrainState,
    as_unit_interval,
    init_state,
    make_eval_step,
    make_gradient_report,
    make_train_step,
)
from . import config as config_module
from . import preflight
from .augment import make_batch
from .checkpoint import Checkpoints
from .config import Config
from .data import Dataset, Split, load
from .errors import RunError
from .optim import learning_rate, make_optimizer
from .teacher import frozen, gate, load_network, network_from, read_card, save_network
from .writer import MetricsWriter, Progress, read_json, read_metrics, write_json

RESULT, TEACHER_RESULT, CONFIG = "result.json", "teacher.json", "config.json"
PROJECTIONS = 1  # folded into the seed, so that projections and weights draw from different keys


def train_and_evaluate(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Run one distillation experiment, or go on with it where it stopped.

    Args:
      config: see `config.get_default`.
      workdir: where everything about the run is kept; a run that is there is continued.

    Returns:
      The content of result.json.

    Raises:
      RunError: something its user can change; mostly before any work is done.
    """
    workdir = Path(workdir)
    config_module.check(config)
    content = frozen(config)
    check_workdir(workdir, content)
    if (workdir / RESULT).exists():
        result = read_json(workdir / RESULT)
        print(f"{workdir} holds a finished run; another --workdir starts a new one.")
        print(report.result_card(result, workdir))
        return result

    dataset = load(
        config.dataset.name,
        data_dir=config.dataset.data_dir or None,
        validation=config.dataset.validation,
        split_seed=config.dataset.split_seed,
    )
    plan = Plan.of(config.recipe, config, dataset)
    objective = config_module.build_objective(config, plan.steps)
    distils = any(term.distils for term in objective.terms)
    student_shapes = jax.eval_shape(lambda: network_from(config.student, dataset, seed=config.seed))
    student_shapes = student_shapes.replace(mean=dataset.mean, std=dataset.std)
    if config.teacher.dir:
        teacher_shapes = load_network(Path(config.teacher.dir), abstract=True)
    else:
        teacher_shapes = jax.eval_shape(lambda: network_from(config.teacher, dataset, seed=config.teacher.seed))
        teacher_shapes = teacher_shapes.replace(mean=dataset.mean, std=dataset.std)
        Plan.of(config.teacher.recipe, config, dataset)
    print(
        preflight.describe(
            config,
            dataset,
            student=student_shapes,
            teacher=teacher_shapes,
            objective=objective,
            batch_size=config.recipe.batch_size,
            steps=plan.steps,
            steps_per_dispatch=plan.steps_per_dispatch,
            label=str(workdir),
        ),
        flush=True,
    )
    claim_workdir(workdir, content)

    data = DeviceData.of(dataset)
    if config.teacher.dir:
        teacher, teacher_seconds = load_network(Path(config.teacher.dir)), 0.0
        origin, teacher_name = config.teacher.dir, read_card(Path(config.teacher.dir))["model"]
    else:
        teacher, teacher_seconds = trained_teacher(config, dataset, data, workdir / "teacher")
        origin, teacher_name = str(workdir / "teacher"), config.teacher.model
    accuracy = gate(teacher, dataset, floor=config.teacher.min_accuracy, origin=origin)
    print(f"teacher {teacher_name} of {origin}: {accuracy:.2%} of the held-out images", flush=True)

    fitted = fit(
        config,
        config.recipe,
        plan,
        label="student",
        workdir=workdir,
        network=network_from(config.student, dataset, seed=config.seed),
        objective=objective,
        teacher=teacher if distils else None,
        dataset=dataset,
        data=data,
        seed=config.seed,
    )

    test = dataset.test()
    evaluate = make_eval_step()
    test_data = jnp.asarray(test.images), jnp.asarray(test.labels)

    def test_predictions(network: Network) -> np.ndarray:
        return np.asarray(evaluate(network, *test_data).classes)

    last, taught = test_predictions(fitted.last), test_predictions(teacher)
    best = test_predictions(fitted.best) if fitted.best_accuracy is not None else None
    result = {
        "dataset": dataset.name,
        "teacher": teacher_name,
        "student": config.student.model,
        "seed": config.seed,
        "steps": plan.steps,
        "teacher_validation_accuracy": accuracy,
        "teacher_test_accuracy": _accuracy(taught, test),
        "test_accuracy_last": _accuracy(last, test),
        "test_accuracy_best": None if best is None else _accuracy(best, test),
        "test_agreement_last": float(np.mean(last == taught)),
        "best_validation_accuracy": fitted.best_accuracy,
        "best_step": fitted.best_step,
        "evaluated_weights": "moving average" if config.recipe.moving_average else "as trained",
        "config": content,
        **provenance(),
        "timing": {
            "train_seconds": round(fitted.seconds, 3),
            "teacher_seconds": round(teacher_seconds, 3),
            "images_per_second": round(fitted.images_per_second, 1),
        },
    }
    save_network(workdir, fitted.selected, config.student, dataset)
    report.plot_curves(read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png")
    write_json(workdir / RESULT, result)
    print(report.result_card(result, workdir), flush=True)
    return result


# --- one network ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a recipe's epochs become steps and dispatches on this data set."""

    steps: int
    steps_per_epoch: int
    steps_per_dispatch: int
    evaluate_every: int

    @classmethod
    def of(cls, recipe: Config, config: Config, dataset: Dataset) -> "Plan":
        """The plan of `recipe`; the number of steps is a multiple of those per dispatch, so one program serves all.

        Raises:
          RunError: the batch is larger than the training set.
        """
        count = len(dataset.train.labels)
        if recipe.batch_size > count:
            raise RunError(f"batch_size = {recipe.batch_size} exceeds the {count:,} training images of {dataset.name}")
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
    dataset: Dataset,
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
      dataset: for the image shape.
      data: the same on the device.
      seed: of data order, augmentation and projections.

    Returns:
      The trained network.

    Raises:
      RunError: a term or gradient was not finite.
    """
    started = time.monotonic()
    rate = learning_rate(recipe, steps_per_epoch=plan.steps_per_epoch)
    optimizer = make_optimizer(recipe, rate)
    average = recipe.moving_average or None
    state = init_state(
        network,
        optimizer,
        objective,
        dataset.train.images.shape[1:],
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

    with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        clock = Clock()
        if checkpoints.latest_step is not None:
            (state, best), record = checkpoints.restore((state, best))
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
                    if correct > int(best.correct):
                        best = Best.of(state, correct)
                if config.logging.term_gradients:
                    batches = (batch_of(arrays, state.step + n) for n in range(config.logging.term_gradients))
                    reports = [gradient_report(state, teacher, batch) for batch in batches]
                    line |= {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}
                if line:
                    writer.write({"step": step, "split": "validation", **line})
                writer.commit()
                clock.total_seconds = earlier + time.monotonic() - started
                checkpoints.save(step, (state, best), {"timing": clock.record()})
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
        self._refuse_failure(metrics)
        for index in np.flatnonzero(metrics["step"] % self._every_steps == 0):
            values = {name: column[index] for name, column in metrics.items() if not name.startswith("failed_")}
            line = {"step": values.pop("step"), "split": "train", **values}
            self._writer.write({**line, "timing": {"images_per_second": round(images_per_second, 1)}})
        self._progress.update(
            int(metrics["step"][-1]) + 1,
            loss=float(metrics["loss"][-1]),
            accuracy=float(metrics["accuracy"].mean()),
            images_per_second=images_per_second,
        )

    def _refuse_failure(self, metrics: Mapping[str, np.ndarray]) -> None:
        failed, step = int(metrics["failed_term"][-1]), int(metrics["failed_step"][-1])
        if failed == HEALTHY:
            return
        terms = [f"the term {term.name!r}" for term in self._objective.terms]
        what = [*terms, "the gradient"][failed]
        self._writer.commit()
        raise RunError(
            f"{what} was not finite at step {step}; the update was refused and nothing of it saved. "
            "Lower the learning rate, set recipe.clip_norm, or look at that term in metrics.jsonl"
        )


# --- the teacher ------------------------------------------------------------------------------------------------------


def trained_teacher(
    config: Config, dataset: Dataset, data: DeviceData, workdir: Path
) -> tuple[Network, float]:
    """Train the teacher that `config.teacher` describes with this same program, or take the one trained before.

    Args:
      config: the whole experiment's.
      dataset: what it learns.
      data: the same on the device.
      workdir: a workdir of its own.

    Returns:
      The teacher and the seconds that its training took.

    Raises:
      RunError: the workdir holds a teacher of another config.
    """
    content = frozen(config)
    spec = content["teacher"]
    content = {
        "teacher": {key: value for key, value in spec.items() if key not in ("dir", "min_accuracy")},
        **{key: content[key] for key in ("dataset", "augment", "steps_per_dispatch", "evaluate_every_epochs")},
    }
    check_workdir(workdir, content)
    if (workdir / TEACHER_RESULT).exists():
        return load_network(workdir), read_json(workdir / TEACHER_RESULT)["timing"]["train_seconds"]
    claim_workdir(workdir, content)
    recipe = config.teacher.recipe
    plan = Plan.of(recipe, config, dataset)
    print(f"training the teacher {spec['model']}: {plan.steps:,} steps of {recipe.batch_size} images", flush=True)
    fitted = fit(
        config,
        recipe,
        plan,
        label="teacher",
        workdir=workdir,
        network=network_from(spec, dataset, seed=config.teacher.seed),
        objective=student_alone(label_smoothing=recipe.label_smoothing),
        teacher=None,
        dataset=dataset,
        data=data,
        seed=config.teacher.seed,
    )
    save_network(workdir, fitted.selected, spec, dataset)
    card = {
        "dataset": dataset.name,
        "model": spec["model"],
        "seed": config.teacher.seed,
        "steps": plan.steps,
        "validation_accuracy": fitted.best_accuracy,
        "selected_step": fitted.best_step or plan.steps,
        "config": content,
        **provenance(),
        "timing": {
            "train_seconds": round(fitted.seconds, 3),
            "images_per_second": round(fitted.images_per_second, 1),
        },
    }
    write_json(workdir / TEACHER_RESULT, card)
    # From disk also the first time, so that a run and its continuation see the same arrays by the same way.
    return load_network(workdir), card["timing"]["train_seconds"]


# --- the workdir ------------------------------------------------------------------------------------------------------


def check_workdir(workdir: Path, content: Mapping[str, Any]) -> None:
    """Refuse a workdir that cannot be written or that belongs to another config; creates it if need be.

    Raises:
      RunError: says which keys differ.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"the workdir {workdir} cannot be written ({error.strerror})"
        raise RunError(f"{reason}; choose another --workdir") from error
    if (workdir / CONFIG).exists():
        changes = config_module.differing_keys(read_json(workdir / CONFIG), dict(content))
        if changes:
            raise RunError(
                f"the workdir {workdir} belongs to a run with another config; choose another --workdir. "
                f"Changed: {'; '.join(changes)}"
            )
    elif (workdir / "checkpoints").exists():
        raise RunError(f"the workdir {workdir} holds checkpoints but no {CONFIG}; choose another --workdir")


def claim_workdir(workdir: Path, content: Mapping[str, Any]) -> None:
    """Freeze the config of a run into its workdir."""
    write_json(workdir / CONFIG, content)


def provenance() -> dict[str, Any]:
    """Versions of everything that computes, and the commit of this code where it is in a checkout."""
    packages = ("gompertz-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "versions": versions | {"python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "commit": _commit(),
    }


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        tracked = git("ls-files", Path(__file__).name)
        if not tracked:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _accuracy(classes: np.ndarray, split: Split) -> float:
    return float(np.mean(classes == split.labels))
