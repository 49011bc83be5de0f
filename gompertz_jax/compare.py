"""Arms of a comparison, every one with every seed, trained as one compiled program and told in one table.

All students see the same batches and the same teacher; those of one seed begin with the same weights. What differs is
the objective. The students' validation chooses, and the test images are read once, at the end.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from . import report
from .arms import ARMS, GRADIENTS, SCORES, TRANSPORT, Arm
from .network import Network
from .objective import Objective
from .preview import read
from .projections import measure_teacher
from .schedules import ByProgress
from .step import HEALTHY, TrainState, init_state, make_eval_step
from .students import (
    LAYOUTS,
    Group,
    Students,
    divides,
    grouped,
    make_comparison_step,
    over_students,
    stacked,
    term_schedules,
)
from .training import config as config_module
from .training import preflight
from .training.compilation import keep_compiled
from .training.config import Config
from .training.data import Dataset, of_config
from .training.errors import RunError
from .training.feed import Feed, Images, device_room, in_parts
from .training.fit import (
    Best,
    Driven,
    Findings,
    Plan,
    Program,
    Told,
    drive,
    make_survey,
    projections_key,
    teacher_outputs,
)
from .training.loop import Teacher, finished, obtain_teacher, order_seed, student_seed, teacher_shapes
from .training.objectives import build_objective, corners, sampled
from .training.optim import learning_rate, make_optimizer, rate_by_step
from .training.sharding import check_batch, data_mesh, on_main, say, together
from .training.stop import Stop
from .training.teacher import network_from, network_shapes, read_card
from .training.workdir import check_data, claim_workdir, frozen, provenance, sole_use
from .training.writer import METRICS, read_metrics, replace_text, write_json

RESULTS = "results.json"
STUDENT = "student"  # the arm without a teacher, which every comparison has


def compare(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    arms: Mapping[str, Config],
    seeds: int = 5,
    baseline: str = "",
    layout: str = "devices",
) -> dict[str, Any]:
    """Train every arm with every seed, or go on with it where it stopped, and compare.

    Args:
      config: what is common to all arms: data, networks, recipe, teacher.
      workdir: where everything is kept; a comparison that is there is continued.
      arms: name -> config, whose objective is the arm's; `arm` makes one by its name.
      seeds: how many, from the config's `seed` on.
      baseline: the arm that the others are compared with; "": `matched` where it is among the arms, else `student`.
      layout: see `gompertz_jax.students.make_comparison_step`.

    Returns:
      The content of results.json.

    Raises:
      RunError: something its user can change; mostly before any work is done.
      Stopped: SIGTERM or SIGINT came, and what was under way is saved.
    """
    workdir = Path(workdir).expanduser()
    arms = with_student(config, arms)
    baseline = baseline or ("matched" if "matched" in arms else STUDENT)
    if baseline not in arms:
        raise RunError(f"--baseline={baseline} is not among the arms {', '.join(arms)}")
    with Stop() as stop:
        origin = provenance()
        trial = Trials.of(config, arms, seeds, layout)
        results = on_main(lambda: finished(workdir, RESULTS, trial.content))
        if results is not None:
            say(f"{workdir} holds a finished comparison; another --workdir starts a new one.")
        else:
            with sole_use(workdir):
                trained = train_all(trial, workdir, stop)
                results = trained.results(workdir, tested(trained)) | origin
        return on_main(lambda: _conclude(workdir, results, baseline))


def _conclude(workdir: Path, results: dict[str, Any], baseline: str) -> dict[str, Any]:
    """Compare with the baseline, write the table and the picture, and then the results: a comparison is finished."""
    results = results | {"comparison": report.compared(results, baseline)}
    text = report.as_markdown(results)
    report.save(report.comparison_figure(results), workdir / "comparison.png")
    replace_text(workdir / "results.md", text)
    write_json(workdir / RESULTS, results)
    say(f"{text}\nfiles     {workdir}/ {RESULTS}, results.md, comparison.png, metrics.jsonl, checkpoints/, teacher/")
    return results


# --- arms -------------------------------------------------------------------------------------------------------------


def arm(config: Config, name: str) -> Config:
    """The config with the objective of an arm of `gompertz_jax.arms.ARMS`.

    Raises:
      RunError: there is no such arm, or the config's objective has not what it needs.
    """
    if name not in ARMS:
        raise RunError(
            f"the arm {name!r} is unknown; there are {', '.join(ARMS)}, and NAME=FILE, of a config of its own"
        )
    return _changed(config, name, ARMS[name])


def _about(config: Config, name: str, of_arm: Config) -> str:
    """What an arm is, in words; a config of its own may have the name of a known arm and be another thing."""
    with contextlib.suppress(RunError):
        if arm(config, name).objective == of_arm.objective:
            return ARMS[name].about
    return "an objective of its own"


def _changed(config: Config, name: str, change: Arm) -> Config:
    changed = config.copy_and_resolve_references()
    objective, own = changed.objective, config.objective.curve
    terms = objective.terms
    for key in list(terms):
        loss = terms[key].loss
        if loss == "cross_entropy":
            if change.cross_entropy:
                terms[key].weight = change.cross_entropy
        elif change.keeps is not None and loss not in change.keeps:
            del terms[key]
        elif loss in SCORES and change.scores:
            terms[key].weight = change.scores
    kept = {spec.loss for spec in terms.values()}
    for family, what in ((SCORES, "class scores"), (TRANSPORT, "transport"), (GRADIENTS, "gradients")):
        if change.keeps is not None and family & change.keeps and not family & kept:
            raise RunError(f"the arm {name!r} keeps terms of {what}, and the config's objective has none")
    scores = [key for key, spec in config.objective.terms.items() if spec.loss in SCORES and spec.get("weight") != "0"]
    if change.scores and len(scores) > 1:
        raise RunError(
            f"the arm {name!r} shares one weight between the cross-entropy and one term on class scores, and there are "
            f"{len(scores)}: {', '.join(scores)}; leave the arm out, or give it a config of its own"
        )
    if name.split("_")[-1] == "gompertz" and "gompertz" not in own:
        raise RunError(f"the arm {name!r} is one under objective.curve = {own!r}, which is no Gompertz curve")
    objective.curve = change.curve.format(curve=own)
    return changed


def check_differ(objectives: Mapping[str, Objective], groups: Sequence[Group], steps: int) -> None:
    """Refuse arms that would train the same students.

    Raises:
      RunError: names them all, and what may be the reason.
    """
    names = list(objectives)
    same: dict[tuple[int, bytes], list[str]] = {}
    for number, group in enumerate(groups):
        for index, objective in zip(group.arms, group.objectives, strict=True):
            said = hashlib.sha256()
            for _, schedule in (named for term in objective.terms for named in term_schedules(term)):
                said.update(b"progress" if isinstance(schedule, ByProgress) else b"clock")
                said.update(sampled(schedule, steps).tobytes())
            same.setdefault((number, said.digest()), []).append(names[index])
    if equal := [" = ".join(map(repr, arms)) for arms in same.values() if len(arms) > 1]:
        raise RunError(
            f"arms are the same objective at every step: {'; '.join(equal)}. Keep one of each. "
            "An arm changes objective.curve, which counts only where a term's weight reads it: '1 * curve'"
        )


def with_student(config: Config, arms: Mapping[str, Config]) -> dict[str, Config]:
    """The arms and, first, the student alone, if it is not among them."""
    return dict(arms) if STUDENT in arms else {STUDENT: arm(config, STUDENT), **arms}


class Trials(NamedTuple):
    """What is to be trained: every arm's config, in order, the seeds, and all of it as JSON."""

    config: Config
    arms: Mapping[str, Config]
    seeds: tuple[int, ...]
    layout: str
    content: dict[str, Any]

    @classmethod
    def of(cls, config: Config, arms: Mapping[str, Config], seeds: int, layout: str) -> "Trials":
        """All of it, checked.

        Raises:
          RunError: what a run would refuse; or something that makes no sense in a comparison.
        """
        if seeds < 1:
            raise RunError(f"--seeds={seeds}: must be at least 1")
        if layout not in LAYOUTS:
            raise RunError(f"--layout={layout}: must be one of {', '.join(LAYOUTS)}")
        if config.init_from:
            raise RunError(
                f"init_from = {config.init_from!r}: the seeds would all begin with the same weights; leave it"
            )
        if config.teacher.dir:
            on_main(lambda: read_card(Path(config.teacher.dir).expanduser()))
        for name, of_arm in arms.items():
            try:
                config_module.check(of_arm)
            except RunError as error:
                raise RunError(f"the arm {name!r}: {error}") from error
            if of_arm.objective.skip_below:
                raise RunError(
                    f"the arm {name!r}: objective.skip_below = {of_arm.objective.skip_below}: the teacher is computed "
                    "for all arms at once, so none can skip it; take 0"
                )
        content = frozen(config) | {
            "arms": {name: frozen(of_arm)["objective"] for name, of_arm in arms.items()},
            "seeds": seeds,
            "layout": layout,
        }
        return cls(config, arms, tuple(config.seed + i for i in range(seeds)), layout, content)


# --- training ---------------------------------------------------------------------------------------------------------


class Student(NamedTuple):
    """One student: its arm, its seed, and where it is: the group, and its place there."""

    arm: str
    seed: int
    group: int
    place: int


class Tested(NamedTuple):
    """Test accuracies of the teacher and of every student."""

    teacher: float | None
    students: Mapping[Student, Mapping[str, float | None]]


class Trained(NamedTuple):
    """All students after the last step."""

    trial: Trials
    students: tuple[Student, ...]
    network: Network
    groups: tuple[Group, ...]
    driven: Driven
    dataset: Dataset
    teacher: Teacher | None
    plan: Plan
    schedules: Mapping[str, Any]
    mesh: Mesh

    def results(self, workdir: Path, tested: Tested | None = None) -> dict[str, Any]:
        """What is known of all students, and without `tested` nothing of the test images."""
        lines = read_metrics(workdir / METRICS)
        curves = _curves(lines)
        trial, held = self.trial, self.dataset.validation
        listed: dict[str, dict[str, Any]] = {
            name: {
                "about": _about(trial.config, name, of_arm),
                "objective": trial.content["arms"][name],
                "schedules": self.schedules[name],
                "students": [],
            }
            for name, of_arm in trial.arms.items()
        }
        state, best = jax.device_get((self.driven.state.groups, self.driven.best))
        for student in self.students:
            group, place = student.group, student.place
            failed_step = int(state[group].failed_step[place])
            prefix = f"{student.arm}/{student.seed}/"
            listed[student.arm]["students"].append(
                {
                    "seed": student.seed,
                    "failed_at_step": None if failed_step == HEALTHY else failed_step,
                    "best_validation_accuracy": (
                        None if held is None else int(best[group].correct[place]) / len(held.labels)
                    ),
                    "best_step": None if held is None else int(best[group].step[place]),
                    "not_converged_steps": {
                        name.removeprefix(prefix): steps
                        for name, steps in self.driven.not_converged.items()
                        if name.startswith(prefix)
                    },
                    # A student that failed is not compared: its weights are those of the step before.
                    **({} if tested is None or failed_step != HEALTHY else tested.students[student]),
                    "validation": curves.get((student.arm, student.seed), []),
                }
            )
        return {
            "dataset": self.dataset.name,
            **({"data_sha256": self.dataset.sha256} if self.dataset.sha256 else {}),
            "teacher": self.teacher.name if self.teacher else None,
            "teacher_validation_accuracy": self.teacher.validation_accuracy if self.teacher else None,
            "teacher_test_accuracy": None if tested is None else tested.teacher,
            "student": trial.config.student.model,
            "steps": self.plan.steps,
            "seeds": list(trial.seeds),
            "order_seed": order_seed(trial.config),
            "layout": trial.layout,
            "arms": listed,
            "pulls": report.pulls({name: list(self.schedules[name]) for name in trial.arms}, lines),
            "config": trial.content,
            "timing": {
                "train_seconds": round(self.driven.clock.total_seconds, 3),
                "teacher_seconds": round(self.teacher.seconds, 3) if self.teacher else 0.0,
                "images_per_second": round(self.driven.clock.images_per_second, 1),
            },
        }


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[list[Any]]]:
    """Validation accuracy over steps, by arm and seed."""
    found: dict[tuple[str, int], list[list[Any]]] = {}
    for line in lines:
        if line["split"] == "validation" and line.get("accuracy") is not None:
            found.setdefault((line["arm"], line["seed"]), []).append([line["step"], line["accuracy"]])
    return found


def train_all(trial: Trials, workdir: Path, stop: Stop) -> Trained:
    """Train every arm with every seed; goes on from the newest checkpoint."""
    config, content, mesh = trial.config, trial.content, data_mesh()
    sharing = mesh.size if divides(trial.layout) else 1  # the devices that share a batch
    check_batch(config.recipe.batch_size, sharing, "recipe.batch_size")
    dataset = together(lambda: of_config(config.data))
    on_main(lambda: check_data(workdir, config.data.name, dataset.sha256))
    plan = Plan.of(config.recipe, config, len(dataset.train.labels))
    objectives = {name: build_objective(of_arm, plan.steps) for name, of_arm in trial.arms.items()}
    distils = any(term.distils for objective in objectives.values() for term in objective.terms)
    shapes = ("teacher", *teacher_shapes(config, content, dataset, mesh.size)) if distils else None
    groups = grouped(list(objectives.values()))
    check_differ(objectives, groups, plan.steps)
    described = [
        preflight.describe(
            dataset,
            student=("student", content["student"], network_shapes(content["student"], dataset)),
            teacher=shapes if any(term.distils for term in group.objectives[0].terms) else None,
            objective=group.objectives[0],
            batch_size=config.recipe.batch_size,
            steps=plan.steps,
            steps_per_dispatch=plan.steps_per_dispatch,
            devices=mesh.size,
            sharing=sharing,
            views=config.teacher.cache.views,
            room=device_room(config.data, mesh.local_devices[0].memory_stats()),
            label=f"{workdir}, seeds {trial.seeds[0]} to {trial.seeds[-1]}, the arm {list(objectives)[group.arms[0]]}",
        )
        for group in groups
    ]
    say(max(described, key=len))
    schedules = {name: schedule_rows(objective, config, plan.steps) for name, objective in objectives.items()}
    say("\n".join(report.text_table(report.schedule_table(schedules))))
    keep_compiled(config.compilation_cache)
    networks = [network_from(content["student"], dataset, seed=student_seed(seed)) for seed in trial.seeds]
    on_main(lambda: claim_workdir(workdir, content, dataset.sha256))
    data = Images.of(dataset, config.data, mesh)
    teacher = obtain_teacher(config, content, dataset, data, workdir, mesh, stop) if distils else None
    names = list(trial.arms)
    students = tuple(
        Student(names[index], seed, number, place * len(trial.seeds) + offset)
        for number, group in enumerate(groups)
        for place, index in enumerate(group.arms)
        for offset, seed in enumerate(trial.seeds)
    )
    driven = drive(
        config,
        config.recipe,
        plan,
        _program(trial, plan, groups, students, networks, teacher.network if teacher else None, data, mesh),
        label=f"{len(students)} students",
        workdir=workdir,
        teacher=teacher.network if teacher else None,
        data=data,
        order_seed=student_seed(order_seed(config)),
        mesh=mesh,
        stop=stop,
        views=config.teacher.cache.views,
    )
    return Trained(trial, students, networks[0], groups, driven, dataset, teacher, plan, schedules, mesh)


def _program(
    trial: Trials,
    plan: Plan,
    groups: Sequence[Group],
    students: Sequence[Student],
    networks: Sequence[Network],
    teacher: Network | None,
    data: Images,
    mesh: Mesh,
) -> Program:
    """All students as one program for `drive`."""
    config, seed, layout = trial.config, student_seed(order_seed(trial.config)), trial.layout
    rate = learning_rate(config.recipe, steps_per_epoch=plan.steps_per_epoch)
    optimizer = make_optimizer(config.recipe, rate)
    average, network = config.recipe.moving_average or None, networks[0]

    def begun(objective: Objective) -> list[TrainState]:
        return [
            init_state(
                network,
                optimizer,
                objective,
                data.images.shape[1:],
                teacher=teacher,
                key=projections_key(student_seed(number)),
                moving_average=average is not None,
            )
            for number, network in zip(trial.seeds, networks, strict=True)
        ]

    def measured(state: Students, teacher: Network) -> Students:
        def of_group(group: Group, states: TrainState) -> TrainState:
            projections = group.objectives[0].projections
            if not projections:
                return states
            taught = teacher_outputs(teacher, data, config.teacher_statistics_images, mesh)
            # Statistics are of the teacher, and before the first step the same for every student.
            first = jax.tree.map(lambda leaf: leaf[0], states.projection_stats)
            found = measure_teacher(projections, first, taught)
            spread = jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, old.shape), found, states.projection_stats)
            return states._replace(projection_stats=spread)

        return state._replace(groups=tuple(map(of_group, groups, state.groups)))

    def make_step(feed: Feed) -> Any:
        return make_comparison_step(
            network,
            optimizer,
            groups,
            make_batch=feed.make_batch,
            steps_per_dispatch=plan.steps_per_dispatch,
            seed=seed,
            average_decay=average,
            logged_schedules={"learning_rate": rate},
            term_gradients_every=config.logging.term_gradients_every or None,
            layout=layout,
            mesh=mesh,
        )

    look = make_survey(network, mesh)

    @jax.jit
    def survey(state: Students, best: Any, *shared: Any) -> Findings:
        found = [
            over_students("map", lambda *student: look(*student, *shared), states, bests)
            for states, bests in zip(state.groups, best, strict=True)
        ]
        return Findings(
            Students(jnp.copy(state.step), tuple(findings.state for findings in found)),
            tuple(findings.best for findings in found),
            tuple(findings.line for findings in found),
        )

    def told(metrics: Any) -> list[Told]:
        return [
            Told(
                {"arm": student.arm, "seed": student.seed},
                groups[student.group].objectives[student.place // len(trial.seeds)],
                {name: values[..., student.place] for name, values in metrics[student.group].items()},
            )
            for student in students
        ]

    states = tuple(stacked([s for objective in group.objectives for s in begun(objective)]) for group in groups)
    best = tuple(jax.vmap(Best.none)(group) for group in states)
    kinds = tuple(group.objectives[0] for group in groups)
    students_at = Students(jnp.zeros((), jnp.int32), states)
    return Program(
        state=students_at,
        best=best,
        measured=measured,
        make_step=make_step,
        survey=survey,
        students=told,
        network=network,
        objectives=kinds,
        divided=divides(layout),
    )


def tested(trained: Trained) -> Tested:
    """Read the test images and evaluate all students and the teacher: the one place where a comparison does."""
    test = together(trained.dataset.test)
    evaluate, network = make_eval_step(mesh=trained.mesh), trained.network

    @jax.jit
    def classes_of(params: Any, stats: Any, images: Any, labels: Any) -> jax.Array:
        return jax.lax.map(
            lambda arrays: evaluate(network.replace(params=arrays[0], stats=arrays[1]), images, labels).classes,
            (params, stats),
        )

    def in_all(evaluated: Callable[..., jax.Array]) -> np.ndarray:
        return np.concatenate([np.asarray(evaluated(*part)) for part in in_parts(test, trained.mesh)], axis=-1)

    def classes(weights: Any) -> list[np.ndarray]:
        return [in_all(partial(classes_of, *group)) for group in weights]

    def share(ours: np.ndarray, right: np.ndarray) -> float:
        return float(np.mean(ours == right))

    state, best = trained.driven.state, trained.driven.best
    last = classes([group.evaluated() for group in state.groups])
    chosen = None if trained.dataset.validation is None else classes([(group.params, group.stats) for group in best])
    teacher = None if trained.teacher is None else trained.teacher.network
    taught = None if teacher is None else in_all(lambda *part: evaluate(teacher, *part).classes)
    return Tested(
        None if taught is None else share(taught, test.labels),
        {
            student: {
                "test_accuracy_last": share(last[student.group][student.place], test.labels),
                "test_accuracy_best": None
                if chosen is None
                else share(chosen[student.group][student.place], test.labels),
                "test_agreement_last": None if taught is None else share(last[student.group][student.place], taught),
            }
            for student in trained.students
        },
    )


def schedule_rows(objective: Objective, config: Config, steps: int) -> dict[str, dict[str, Any]]:
    """Every term's weight in numbers: at the start, midway, at the end, its mean, and that by the learning rate."""
    rates = np.asarray(rate_by_step(config.recipe, steps)(np.arange(steps)), np.float64)
    rows = {}
    for term in objective.terms:
        values = sampled(term.weight, steps).astype(np.float64)
        reading, (start, _, middle, _, end) = read(values, rates), corners(values)
        rows[term.name] = {
            "start": start,
            "middle": middle,
            "end": end,
            "area": reading.area,
            "weighted_area": reading.weighted_area,
            "by_progress": isinstance(term.weight, ByProgress),
            "curve": [float(value) for value in values[np.linspace(0, steps - 1, min(steps, 101)).astype(int)]],
        }
    return rows
