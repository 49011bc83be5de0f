"""From a config to a result: the thin shell in which the compiled step runs.

Test images are read once, after the last step.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import report
from ..network import Network
from ..objective import student_alone
from ..step import make_eval_step
from . import config as config_module
from . import preflight
from .config import Config
from .data import Dataset, Split, load
from .fit import DeviceData, Plan, fit
from .teacher import gate, load_network, network_from, read_card, save_network
from .workdir import check_workdir, claim_workdir, frozen, provenance
from .writer import read_json, read_metrics, write_json

RESULT, TEACHER_RESULT = "result.json", "teacher.json"


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
        config.data.name,
        data_dir=config.data.data_dir or None,
        validation=config.data.validation,
        split_seed=config.data.split_seed,
    )
    plan = Plan.of(config.recipe, config, len(dataset.train.labels))
    objective = config_module.build_objective(config, plan.steps)
    distils = any(term.distils for term in objective.terms)
    student_shapes = jax.eval_shape(lambda: network_from(content["student"], dataset, seed=config.seed))
    student_shapes = student_shapes.replace(mean=dataset.mean, std=dataset.std)
    if config.teacher.dir:
        teacher_shapes = load_network(Path(config.teacher.dir), abstract=True)
    else:
        teacher_shapes = jax.eval_shape(lambda: network_from(content["teacher"], dataset, seed=config.teacher.seed))
        teacher_shapes = teacher_shapes.replace(mean=dataset.mean, std=dataset.std)
        Plan.of(config.teacher.recipe, config, len(dataset.train.labels))
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
        network=network_from(content["student"], dataset, seed=config.seed),
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
    save_network(workdir, fitted.selected, content["student"], dataset)
    report.plot_curves(read_metrics(workdir / "metrics.jsonl"), workdir / "curves.png")
    write_json(workdir / RESULT, result)
    print(report.result_card(result, workdir), flush=True)
    return result


def trained_teacher(config: Config, dataset: Dataset, data: DeviceData, workdir: Path) -> tuple[Network, float]:
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
        **{key: content[key] for key in ("data", "augment", "steps_per_dispatch", "evaluate_every_epochs")},
    }
    check_workdir(workdir, content)
    if (workdir / TEACHER_RESULT).exists():
        return load_network(workdir), read_json(workdir / TEACHER_RESULT)["timing"]["train_seconds"]
    claim_workdir(workdir, content)
    recipe = config.teacher.recipe
    plan = Plan.of(recipe, config, len(dataset.train.labels))
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


def _accuracy(classes: np.ndarray, split: Split) -> float:
    return float(np.mean(classes == split.labels))
