"""All students of a comparison or a search, trained at once as one compiled program.

All of them see the same batches and the same teacher; those of one seed begin with the same weights. What differs is
the objective. Validation chooses, and nothing here reads the test images.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from . import report
from .arms import about
from .network import Network
from .objective import Objective
from .preview import schedule_summary
from .projections import measure_teacher
from .schedules import ByProgress
from .state import HEALTHY, TrainState, init_state
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
from .training.check_config import check_config
from .training.compilation import keep_compiled
from .training.config import Config
from .training.data import Dataset, of_config
from .training.drive import Driven, Plan, Program, Snapshot, drive, make_plan
from .training.errors import RunError
from .training.feed import Feed, Images
from .training.fit import Best, make_snapshot, projections_key, teacher_outputs
from .training.loop import (
    describe_run,
    order_seed,
    student_seed,
)
from .training.networks import network_from, read_card
from .training.objectives import build_objective, sampled
from .training.optim import learning_rate, make_optimizer, rate_by_step
from .training.reader import StudentMetrics
from .training.sharding import check_batch_size, data_mesh, on_main, say, together
from .training.stop import Stop
from .training.teacher import Teacher, obtain_teacher, teacher_shapes
from .training.workdir import begun_with, check_data, claim_workdir, evaluation_changes, frozen
from .training.writer import METRICS, read_metrics


class Cohort(NamedTuple):
    """The students to train.

    Attributes:
      config: what they have in common.
      arms: each arm's config, in order.
      seeds: every arm has one student for each.
      layout: see `students.make_comparison_step`.
      content: all of it as JSON.
    """

    config: Config
    arms: Mapping[str, Config]
    seeds: tuple[int, ...]
    layout: str
    content: dict[str, Any]

    @classmethod
    def of(cls, config: Config, arms: Mapping[str, Config], seeds: int, layout: str) -> "Cohort":
        """A cohort, checked.

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
                check_config(of_arm)
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

    def in_order_of(self, names: Sequence[str]) -> "Cohort":
        """The same with its arms in this order; none: as they are."""
        if not names:
            return self
        arms, objectives = ({name: of[name] for name in names} for of in (self.arms, self.content["arms"]))
        return self._replace(arms=arms, content=self.content | {"arms": objectives})


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

    cohort: Cohort
    students: tuple[Student, ...]
    network: Network
    groups: tuple[Group, ...]
    driven: Driven
    dataset: Dataset
    teacher: Teacher | None
    plan: Plan
    schedules: Mapping[str, Any]
    mesh: Mesh
    evaluation_changes: list[str]

    def results(self, workdir: Path, tested: Tested | None = None) -> dict[str, Any]:
        """What is known about all students; without `tested`, nothing about the test images."""
        lines = read_metrics(workdir / METRICS)
        curves = _curves(lines)
        cohort, validation = self.cohort, self.dataset.validation
        arms: dict[str, dict[str, Any]] = {
            name: {
                "about": about(cohort.config, name, of_arm),
                "objective": cohort.content["arms"][name],
                "schedules": self.schedules[name],
                "students": [],
            }
            for name, of_arm in cohort.arms.items()
        }
        state, best = jax.device_get((self.driven.state.groups, self.driven.best))
        for student in self.students:
            group, place = student.group, student.place
            failed_step = int(state[group].failed_step[place])
            prefix = f"{student.arm}/{student.seed}/"
            arms[student.arm]["students"].append(
                {
                    "seed": student.seed,
                    "failed_at_step": None if failed_step == HEALTHY else failed_step,
                    "best_validation_accuracy": (
                        None if validation is None else int(best[group].correct[place]) / len(validation.labels)
                    ),
                    "best_step": None if validation is None else int(best[group].step[place]),
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
            "student": cohort.config.student.model,
            "steps": self.plan.steps,
            "seeds": list(cohort.seeds),
            "order_seed": order_seed(cohort.config),
            "layout": cohort.layout,
            "arms": arms,
            "pulls": report.pulls({name: list(self.schedules[name]) for name in cohort.arms}, lines),
            "config": cohort.content,
            "evaluation_changes": self.evaluation_changes,
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


def train_all(cohort: Cohort, workdir: Path, stop: Stop) -> Trained:
    """Train every arm with every seed, resuming from the newest checkpoint."""
    # Checkpoints know students by their place only.
    cohort = cohort.in_order_of(on_main(lambda: list(begun_with(workdir, "arms") or ())))
    config, content, mesh = cohort.config, cohort.content, data_mesh()
    sharing = mesh.size if divides(cohort.layout) else 1  # the devices that share a batch
    check_batch_size(config.recipe.batch_size, sharing, "recipe.batch_size")
    dataset = together(lambda: of_config(config.data))
    on_main(lambda: check_data(workdir, config.data.name, dataset.sha256))
    plan = make_plan(config.recipe, config, dataset, workdir)
    objectives = {name: build_objective(of_arm, plan.steps) for name, of_arm in cohort.arms.items()}
    distils = any(term.distils for objective in objectives.values() for term in objective.terms)
    shapes = teacher_shapes(config, content, dataset, mesh.size) if distils else None
    groups = grouped(list(objectives.values()))
    check_differ(objectives, groups, plan.steps)
    first, last = cohort.seeds[0], cohort.seeds[-1]
    seeds = f"seeds {first} to {last}" if first < last else f"seed {first}"
    texts = [
        describe_run(
            config,
            content,
            dataset,
            plan,
            group.objectives[0],
            shapes if any(term.distils for term in group.objectives[0].terms) else None,
            mesh,
            label=f"{workdir}, {seeds}, the arm {list(objectives)[group.arms[0]]}",
            sharing=sharing,
        )
        for group in groups
    ]
    say(max(texts, key=len))
    schedules = {name: schedule_rows(objective, config, plan.steps) for name, objective in objectives.items()}
    say("\n".join(report.text_table(report.schedule_table(schedules))))
    keep_compiled(config.compilation_cache)
    networks = [network_from(content["student"], dataset, seed=student_seed(seed)) for seed in cohort.seeds]
    on_main(lambda: claim_workdir(workdir, content, dataset.sha256))
    changes = on_main(lambda: evaluation_changes(workdir, content))
    data = Images.of(dataset, config.data, mesh)
    teacher = obtain_teacher(config, content, dataset, data, workdir, mesh, stop) if distils else None
    names = list(cohort.arms)
    students = tuple(
        Student(names[index], seed, number, place * len(cohort.seeds) + offset)
        for number, group in enumerate(groups)
        for place, index in enumerate(group.arms)
        for offset, seed in enumerate(cohort.seeds)
    )
    say(f"training {len(students)} students: {plan.steps:,} steps of {config.recipe.batch_size} images")
    driven = drive(
        config,
        config.recipe,
        plan,
        _program(cohort, plan, groups, students, networks, teacher.network if teacher else None, data, mesh),
        label=f"{len(students)} students",
        workdir=workdir,
        teacher=teacher.network if teacher else None,
        data=data,
        order_seed=student_seed(order_seed(config)),
        mesh=mesh,
        stop=stop,
        views=config.teacher.cache.views,
    )
    return Trained(cohort, students, networks[0], groups, driven, dataset, teacher, plan, schedules, mesh, changes)


def _program(
    cohort: Cohort,
    plan: Plan,
    groups: Sequence[Group],
    students: Sequence[Student],
    networks: Sequence[Network],
    teacher: Network | None,
    data: Images,
    mesh: Mesh,
) -> Program:
    """All students as one program for `drive`."""
    config, seed, layout = cohort.config, student_seed(order_seed(cohort.config)), cohort.layout
    rate = learning_rate(config.recipe, steps_per_epoch=plan.steps_per_epoch)
    optimizer = make_optimizer(config.recipe, rate)
    average, network = config.recipe.moving_average or None, networks[0]

    def of_arm(objective: Objective) -> list[TrainState]:
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
            for number, network in zip(cohort.seeds, networks, strict=True)
        ]

    def begin() -> tuple[Students, Any]:
        states = tuple(stacked([s for objective in group.objectives for s in of_arm(objective)]) for group in groups)
        return Students(jnp.zeros((), jnp.int32), states), tuple(jax.vmap(Best.none)(group) for group in states)

    def measured(state: Students, teacher: Network) -> Students:
        def of_group(group: Group, states: TrainState) -> TrainState:
            projections = group.objectives[0].projections
            if not projections:
                return states
            outputs = teacher_outputs(teacher, data, config.teacher_statistics_images, mesh)
            # Statistics are of the teacher, and before the first step the same for every student.
            first = jax.tree.map(lambda leaf: leaf[0], states.projection_stats)
            measured_stats = measure_teacher(projections, first, outputs)
            spread = jax.tree.map(
                lambda leaf, old: jnp.broadcast_to(leaf, old.shape), measured_stats, states.projection_stats
            )
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

    of_one = make_snapshot(network, mesh)

    @jax.jit
    def snapshot(state: Students, best: Any, *shared: Any) -> Snapshot:
        found = [
            over_students("map", lambda *student: of_one(*student, *shared), states, bests)
            for states, bests in zip(state.groups, best, strict=True)
        ]
        return Snapshot(
            Students(jnp.copy(state.step), tuple(one.state for one in found)),
            tuple(one.best for one in found),
            tuple(one.line for one in found),
        )

    def of_students(metrics: Any) -> list[StudentMetrics]:
        return [
            StudentMetrics(
                {"arm": student.arm, "seed": student.seed},
                groups[student.group].objectives[student.place // len(cohort.seeds)],
                {name: values[..., student.place] for name, values in metrics[student.group].items()},
            )
            for student in students
        ]

    return Program(
        begin=begin,
        measured=measured,
        make_step=make_step,
        snapshot=snapshot,
        students=of_students,
        network=network,
        objectives=tuple(group.objectives[0] for group in groups),
        divided=divides(layout),
    )


def check_differ(objectives: Mapping[str, Objective], groups: Sequence[Group], steps: int) -> None:
    """Refuse arms that would train the same students.

    Raises:
      RunError: names them all, and what may be the reason.
    """
    names = list(objectives)
    same: dict[tuple[int, bytes], list[str]] = {}
    for number, group in enumerate(groups):
        for index, objective in zip(group.arms, group.objectives, strict=True):
            digest = hashlib.sha256()
            for _, schedule in (named for term in objective.terms for named in term_schedules(term)):
                digest.update(b"progress" if isinstance(schedule, ByProgress) else b"clock")
                digest.update(sampled(schedule, steps).tobytes())
            same.setdefault((number, digest.digest()), []).append(names[index])
    if equal := [" = ".join(map(repr, arms)) for arms in same.values() if len(arms) > 1]:
        raise RunError(
            f"arms are the same objective at every step: {'; '.join(equal)}. Keep one of each. "
            "An arm changes objective.curve, which counts only where a term's weight reads it: '1 * curve'"
        )


def schedule_rows(objective: Objective, config: Config, steps: int) -> dict[str, dict[str, Any]]:
    """Every term's weight at the start, midway and at the end, its mean, and its mean weighted by the learning rate."""
    rates = np.asarray(rate_by_step(config.recipe, steps)(np.arange(steps)), np.float64)
    rows = {}
    for term in objective.terms:
        values = sampled(term.weight, steps).astype(np.float64)
        summary = schedule_summary(values, rates)
        start, _, middle, _, end = summary.at_quarters
        rows[term.name] = {
            "start": start,
            "middle": middle,
            "end": end,
            "area": summary.area,
            "weighted_area": summary.weighted_area,
            "by_progress": isinstance(term.weight, ByProgress),
            "curve": [float(value) for value in values[np.linspace(0, steps - 1, min(steps, 101)).astype(int)]],
        }
    return rows
