"""From a config to a result: the thin shell in which the compiled step runs.

Test images are evaluated once, after the last step. With several processes all of them run this; where a file decides
what happens next, the first one reads it and informs the others.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from .. import report
from ..network import Network
from ..objective import Objective
from ..step import make_eval_step
from . import preflight
from .check_config import check_config
from .compilation import keep_compiled
from .config import Config
from .data import Dataset, of_config
from .drive import Plan, make_plan
from .errors import RunError
from .feed import Images, device_room, in_parts
from .files import write_json
from .fit import Fitted, fit
from .networks import (
    load_network,
    network_card,
    network_fault,
    network_from,
    network_shapes,
    read_card,
    save_network,
)
from .objectives import build_objective
from .optim import learning_rate
from .sharding import check_batch_size, data_mesh, on_main, say, together
from .stop import Stop
from .teacher import obtain_teacher, teacher_directory, teacher_shapes
from .workdir import (
    RESULT,
    check_data,
    claim_workdir,
    evaluation_changes,
    finished_result,
    frozen,
    provenance,
    sole_use,
)
from .writer import METRICS, read_metrics


def train_and_evaluate(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Run one distillation experiment, or resume it where it stopped.

    Args:
      config: see `config.get_default`.
      workdir: where everything about the run is kept; an existing run is continued.

    Returns:
      The content of result.json.

    Raises:
      RunError: something the user can change; mostly before any work is done.
      Stopped: SIGTERM or SIGINT came; the work in progress is saved.
    """
    if not isinstance(workdir, str | os.PathLike):
        raise RunError(f"workdir = {workdir!r:.200}: must be a path")
    workdir = Path(workdir).expanduser()
    with Stop() as stop:
        return _train_and_evaluate(config, workdir, stop)


def _train_and_evaluate(config: Config, workdir: Path, stop: Stop) -> dict[str, Any]:
    origin = provenance()  # of the code that is loaded now: a commit may be made during the run
    check_config(config)
    if config.teacher.dir:
        on_main(lambda: read_card(teacher_directory(config)))
    if config.init_from:
        on_main(lambda: check_init_from(config))
    content = frozen(config)
    already = on_main(lambda: finished_result(workdir, RESULT, content))
    if already is not None:
        say(f"{workdir} holds a finished run; another --workdir starts a new one.")
        say(report.result_card(already, workdir))
        if reason := on_main(lambda: network_fault(workdir)):
            say(f"warning: {reason}; remove {workdir / RESULT} and start again: it is made from the last checkpoint")
        return already

    with sole_use(workdir):
        return _run(config, content, workdir, origin, stop)


def describe_run(
    config: Config,
    content: dict[str, Any],
    dataset: Dataset,
    plan: Plan,
    objective: Objective,
    teacher: preflight.Described | None,
    mesh: Mesh,
    *,
    label: str,
    sharing: int | None = None,
) -> str:
    """The pre-flight's text for a config's student under an objective; `preflight.describe` documents the rest.

    Raises:
      RunError: as it does; or the crops would hold nothing of most images.
    """
    padding, side = config.augment.padding, min(dataset.train.images.shape[1:3])
    if padding >= side:
        raise RunError(
            f"augment.padding = {padding}: a crop may miss an image of {side} pixels altogether; 4 suits one of 32"
        )
    return preflight.describe(
        dataset,
        student=(content["student"], network_shapes(content["student"], dataset)),
        teacher=teacher,
        objective=objective,
        rate=learning_rate(config.recipe, steps_per_epoch=plan.steps_per_epoch),
        batch_size=config.recipe.batch_size,
        steps=plan.steps,
        steps_per_dispatch=plan.steps_per_dispatch,
        devices=mesh.size,
        sharing=sharing,
        label=label,
        views=config.teacher.cache.views,
        room=device_room(config.data, mesh.local_devices[0].memory_stats()),
    )


def _run(
    config: Config, content: dict[str, Any], workdir: Path, origin: Mapping[str, Any], stop: Stop
) -> dict[str, Any]:
    """The run itself, once it has the workdir to itself."""
    mesh = data_mesh()
    check_batch_size(config.recipe.batch_size, mesh.size, "recipe.batch_size")
    dataset = together(lambda: of_config(config.data))
    on_main(lambda: check_data(workdir, config.data.name, dataset.sha256))
    plan = make_plan(config.recipe, config, dataset, workdir)
    objective = build_objective(config, plan.steps)
    distils = any(term.distils for term in objective.terms)
    shapes = teacher_shapes(config, content, dataset, mesh.size) if distils else None
    say(describe_run(config, content, dataset, plan, objective, shapes, mesh, label=f"{workdir}, seed {config.seed}"))
    keep_compiled(config.compilation_cache)
    student = network_from(content["student"], dataset, seed=student_seed(config.seed))
    if config.init_from:
        student = init_from(Path(config.init_from).expanduser(), student)
    on_main(lambda: claim_workdir(workdir, content, dataset.sha256))
    changes = on_main(lambda: evaluation_changes(workdir, content))
    data = Images.of(dataset, config.data, mesh)
    teacher = obtain_teacher(config, content, dataset, data, workdir, mesh, stop) if distils else None
    say(f"training the student {config.student.model}: {plan.steps:,} steps of {config.recipe.batch_size} images")
    fitted = fit(
        config,
        config.recipe,
        plan,
        label="student",
        workdir=workdir,
        network=student,
        objective=objective,
        teacher=teacher.network if teacher else None,
        data=data,
        seed=student_seed(config.seed),
        order_seed=student_seed(order_seed(config)),
        mesh=mesh,
        stop=stop,
        views=config.teacher.cache.views,
    )
    result = {
        "dataset": dataset.name,
        **({"data_sha256": dataset.sha256} if dataset.sha256 else {}),
        "teacher": teacher.name if teacher else None,
        "student": config.student.model,
        "seed": config.seed,
        "steps": plan.steps,
        "teacher_validation_accuracy": teacher.validation_accuracy if teacher else None,
        **test_accuracies(fitted, teacher.network if teacher else None, dataset, mesh),
        "best_validation_accuracy": fitted.best_accuracy,
        "best_step": fitted.best_step,
        "evaluated_weights": "moving average" if config.recipe.moving_average else "as trained",
        "not_converged_steps": fitted.not_converged,
        "config": content,
        "evaluation_changes": changes,
        **origin,
        "timing": {
            "train_seconds": round(fitted.seconds, 3),
            "teacher_seconds": round(teacher.seconds, 3) if teacher else 0.0,
            "images_per_second": round(fitted.images_per_second, 1),
        },
    }
    save_network(workdir, fitted.selected, network_card(content["student"], dataset))
    result = on_main(lambda: conclude(workdir, result))
    say(report.result_card(result, workdir))
    return result


def check_init_from(config: Config) -> None:
    """Refuse an `init_from` without a network, or with one of another model than the student's."""
    try:
        model = read_card(Path(config.init_from).expanduser())["model"]
    except RunError as error:
        raise RunError(f"init_from = {config.init_from!r}: {error}") from error
    if model != config.student.model:
        raise RunError(
            f"init_from = {config.init_from!r}: its network is a {model} and the student a {config.student.model}; "
            "give a network of the same model, options and classes"
        )


def init_from(directory: Path, student: Network) -> Network:
    """The student with the weights of a network that was trained before; its normalisation stays this data set's.

    Raises:
      RunError: there is no such network, or its weights have other shapes.
    """
    try:
        trained = load_network(directory)
    except RunError as error:
        raise RunError(f"init_from = {str(directory)!r}: {error}") from error
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path((net.params, net.stats))}
        for net in (trained, student)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        theirs, ours = (of_net.get(name) for of_net in shapes)
        if theirs != ours:
            raise RunError(
                f"init_from = {str(directory)!r}: its network has {theirs} at {name} and the student {ours}; "
                "give a network of the same model, options and classes"
            )
    return student.replace(params=trained.params, stats=trained.stats)


def conclude(workdir: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Draw the curves and write the result, in this order: with the result, a run is finished."""
    report.save(report.curves(read_metrics(workdir / METRICS)), workdir / "curves.png")
    write_json(workdir / RESULT, result)
    return result


def student_seed(seed: int) -> int:
    """What the student's weights, batches and projections are drawn from.

    Teachers draw from their seed itself. With equal seeds, which is the default, teacher and student would otherwise
    begin with equal weights wherever their shapes agree, see the same batches, and look alike for no other reason.
    """
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0] >> 1)


def order_seed(config: Config) -> int:
    """The seed of data order, augmentation and draws."""
    return config.seed if config.order_seed < 0 else config.order_seed


def test_accuracies(fitted: Fitted, teacher: Network | None, dataset: Dataset, mesh: Mesh) -> dict[str, float | None]:
    """Read the test images and evaluate both networks on them: the one place where a run does."""
    test = together(dataset.test)
    evaluate = make_eval_step(mesh=mesh)

    def classes(network: Network | None) -> np.ndarray | None:
        if network is None:
            return None
        return in_parts(lambda *part: evaluate(network, *part).classes, test, mesh)

    def agreement(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
        return None if a is None or b is None else float(np.mean(a == b))

    last, teacher_classes = classes(fitted.last), classes(teacher)
    best = classes(None if fitted.best_accuracy is None else fitted.best)
    return {
        "teacher_test_accuracy": agreement(teacher_classes, test.labels),
        "test_accuracy_last": agreement(last, test.labels),
        "test_accuracy_best": agreement(best, test.labels),
        "test_agreement_last": agreement(last, teacher_classes),
    }
