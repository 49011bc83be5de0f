"""Many students of one teacher in one compiled program: every arm of a comparison, and every seed of each.

An arm is an objective. All students see the same batches; each batch is made once, and so is everything that is read of
the teacher. Students whose objectives have the same terms and differ only in schedules form a group: one program with
the student as an axis, which selects the student's schedules. So a student pays only for its own terms.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from ._checks import checked, positive_count
from .data_parallel import AXIS, REPLICATED, SHARDED, check_mesh, each_device, replicated, shard_batch
from .network import Network, PyTree
from .objective import Objective, Term, check_objective
from .record import TeacherRecord
from .schedules import AnySchedule, Schedule, constant_schedule, value_at
from .state import TrainState, check_optimizer, progress_of
from .step import Batch, Metrics, check_batch, check_seed, make_learn, run_teacher, step_key

LAYOUTS = ("devices", "map", "vmap", "unroll")


def divides(layout: str) -> bool:
    """Whether a layout divides batches among the devices; otherwise every device has whole batches."""
    return layout != "devices"


class Group(NamedTuple):
    """Arms that differ in schedules only.

    Attributes:
      arms: their indices among all arms.
      objectives: their objectives, in the same order.
    """

    arms: tuple[int, ...]
    objectives: tuple[Objective, ...]

    def at(self, arm: Int[Array, ""], state: TrainState) -> Objective:
        """The objective of this group's `arm`-th arm at the current step, with each schedule replaced by its value.

        `arm` may be traced.
        """

        def numbers(objective: Objective) -> list[dict[str, Array]]:
            where = state.step, progress_of(state)
            return [
                {name: jnp.asarray(value_at(schedule, *where), jnp.float32) for name, schedule in term_schedules(term)}
                for term in objective.terms
            ]

        rows = jax.lax.switch(arm, [partial(numbers, objective) for objective in self.objectives])
        first, terms = self.objectives[0], []
        for term, values in zip(first.terms, rows, strict=True):
            held = {name: constant_schedule(value) for name, value in values.items()}
            weight = held.pop("")
            terms.append(term._replace(weight=weight, schedules=held))
        return first._replace(terms=tuple(terms))


def term_schedules(term: Term) -> list[tuple[str, AnySchedule]]:
    """All schedules of a term, each with the name of its argument, "" for the weight."""
    return [("", term.weight), *term.schedules.items()]


def _computes(term: Term) -> tuple[Any, ...]:
    """What a term computes, apart from its name and schedules: equal for equal losses and options."""
    loss: Any = term.loss
    if isinstance(loss, partial):
        loss = loss.func, _identity(loss.args), _identity(loss.keywords)
    return loss, term.distils, term.every_k_steps, term.gradient_stages


def _identity(option: Any) -> Any:
    """Equal for equal options, and hashable; arrays by all of their elements, of which `repr` leaves some out."""
    if isinstance(option, jax.Array) and jnp.issubdtype(option.dtype, jax.dtypes.prng_key):
        option = jax.random.key_data(option)
    if isinstance(option, np.ndarray | jax.Array):
        return option.shape, str(option.dtype), np.asarray(option).tobytes()
    if isinstance(option, Mapping):
        return frozenset((repr(name), _identity(value)) for name, value in option.items())
    if isinstance(option, list | tuple):
        return type(option), *map(_identity, option)  # kinds of projections are tuples, and differ by their type
    return repr(option)


def _shape(objective: Objective) -> tuple[Any, ...]:
    """What two objectives of one group have in common: all but the schedules."""
    terms = tuple((term.name, tuple(sorted(term.schedules)), *_computes(term)) for term in objective.terms)
    return terms, _identity(objective.projections), objective.progress


def grouped(objectives: Sequence[Objective]) -> tuple[Group, ...]:
    """Arms grouped by what they compute, the groups in the order of their first arms.

    Examples:
      >>> import gompertz_jax as gj
      >>> from gompertz_jax.students import grouped
      >>> steady = gj.gompertz_objective(100, curve=gj.constant_schedule(1.0))
      >>> [group.arms for group in grouped([gj.gompertz_objective(100), gj.student_alone(), steady])]
      [(0, 2), (1,)]
    """
    found: dict[Any, list[int]] = {}
    for index, objective in enumerate(objectives):
        check_objective(objective)
        found.setdefault(_shape(objective), []).append(index)
    return tuple(Group(tuple(arms), tuple(objectives[arm] for arm in arms)) for arms in found.values())


class Students(NamedTuple):
    """The state of a comparison.

    Attributes:
      step: steps taken, int32 scalar. A student that failed stays at the step of its failure.
      groups: per group a TrainState whose arrays have a leading axis: its students, arm by arm, and seed by seed within
        an arm.
    """

    step: Int[Array, ""]
    groups: tuple[TrainState, ...]


def stacked(states: Sequence[Any]) -> Any:
    """Several states, or other trees, as one with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def over_students(layout: str, one: Callable[..., Any], *arguments: PyTree) -> Any:
    """Apply a function of one student to all students of a group on a device: arrays have a leading axis, in and out.

    "vmap": all at once; convolutions become grouped ones. "unroll": one after another, each compiled by itself, so that
    the compiler may interleave them. Otherwise one after another, compiled once.
    """
    if layout == "vmap":
        return jax.vmap(one)(*arguments)
    if layout != "unroll":
        return jax.lax.map(lambda student: one(*student), arguments)
    count = len(jax.tree.leaves(arguments)[0])
    return stacked([one(*jax.tree.map(lambda leaf, i=i: leaf[i], arguments)) for i in range(count)])


def run_teacher_once(
    teacher: Network | None, batch: Batch, groups: Sequence[Group], key: Array, step: Array
) -> list[TeacherRecord | None]:
    """What each group reads of the teacher on a batch, computed once for all of them."""
    terms_of = [group.objectives[0].terms for group in groups]
    teacher_record = run_teacher(teacher, batch, tuple(term for terms in terms_of for term in terms), key)
    if teacher_record is None:
        return [None] * len(groups)
    known: dict[Any, PyTree] = {}

    def part(term: Term) -> PyTree:
        identity = _computes(term)
        if identity not in known:
            assert term.of_teacher is not None
            compute = partial(term.of_teacher, teacher_record)
            if term.every_k_steps > 1:
                nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute))
                known[identity] = jax.lax.cond(step % term.every_k_steps == 0, compute, lambda: nothing)
            else:
                known[identity] = compute()
        return known[identity]

    return [
        teacher_record._replace(parts={term.name: part(term) for term in terms if term.of_teacher is not None})
        for terms in terms_of
    ]


@checked
def make_comparison_step(
    student: Network,
    optimizer: optax.GradientTransformation,
    groups: Sequence[Group],
    *,
    make_batch: Callable[[Any, Array], Batch] | None = None,
    steps_per_dispatch: int = 1,
    seed: int = 0,
    average_decay: float | None = None,
    logged_schedules: Mapping[str, Schedule] | None = None,
    term_gradients_every: int | None = None,
    layout: str = "devices",
    mesh: Mesh | None = None,
) -> Callable[[Students, Network | None, Any], tuple[Students, tuple[Metrics, ...]]]:
    """The compiled, donated step of all students; for each of them it is the step of `make_train_step`.

    Args:
      student: its `apply`, `mean` and `std`; the arrays are in the state.
      optimizer: the same for every student.
      groups: from `grouped`.
      make_batch: see `make_train_step`.
      steps_per_dispatch: see `make_train_step`.
      seed: seed of the step's random keys, which are the same for all students.
      average_decay: see `make_train_step`.
      logged_schedules: see `make_train_step`.
      term_gradients_every: see `make_train_step`; under "vmap" every step bears the cost.
      layout: "devices": every device trains its share of each group's students, one after another, on whole batches and
        with its own copy of the teacher, so that devices communicate once per dispatch; a group is padded to a multiple
        of the number of devices. On one device that is "map": one after another, compiled once. "vmap": all at once.
        "unroll": one after another, each compiled by itself. Under all but "devices", every student's batch is divided
        among the devices.
      mesh: devices, with the one axis "data"; None for one device. Between dispatches each device has a copy of all
        states.

    Returns:
      `step(students, teacher, data) -> (students, metrics)`: per group a dict of arrays `[steps, students]`. A student
      whose update is not finite keeps its last state; the others continue.

    Raises:
      ValueError: an unknown layout; and as `make_train_step`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, gompertz_jax as gj
      >>> from gompertz_jax.students import Students, grouped, make_comparison_step, stacked
      >>> def apply(params, stats, images, *, train, key=None):
      ...     pooled = images.mean((1, 2))
      ...     return gj.Outputs(pooled @ params, (images,), pooled), stats
      >>> network = gj.Network(apply, jnp.ones((3, 10)), {}, mean=0.5, std=0.25)
      >>> ce, kd = gj.gompertz_objective(10, wasserstein_weight=0.0, gradient_weight=0.0).terms
      >>> arms = [gj.Objective((ce, kd)), gj.Objective((ce, kd._replace(weight=gj.constant_schedule(1.0))))]
      >>> groups = grouped(arms)
      >>> state = gj.init_state(network, optax.sgd(0.1), arms[0], (4, 4, 3), teacher=network)
      >>> students = Students(jnp.int32(0), (stacked([state, state]),))
      >>> step = make_comparison_step(network, optax.sgd(0.1), groups)
      >>> batch = {"image": jnp.linspace(0, 1, 96).reshape(2, 4, 4, 3), "label": jnp.arange(2)}
      >>> students, (metrics,) = step(students, network, batch)
      >>> int(students.step), metrics["kd/weight"].shape
      (1, (1, 2))
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    steps_per_dispatch = positive_count("steps_per_dispatch", steps_per_dispatch)
    check_optimizer(optimizer)
    check_seed(seed)
    check_mesh(mesh)
    batch_of = (lambda data, step: data) if make_batch is None else make_batch
    apart = mesh if not divides(layout) and mesh is not None and mesh.size > 1 else None
    dividing = None if apart else mesh  # every batch
    rest: dict[str, Any] = {
        "average_decay": average_decay,
        "logged_schedules": logged_schedules or {},
        "skip_below": 0.0,
        "term_gradients_every": term_gradients_every,
        "mesh": dividing,
    }
    for group in groups:  # for its checks
        make_learn(student, optimizer, group.objectives[0], **rest)

    def one_step(
        students: Students, arms: Sequence[Array], teacher: Network | None, data: Any
    ) -> tuple[Students, tuple[Metrics, ...]]:
        batch = batch_of(data, students.step)
        batch, key = shard_batch(check_batch(batch), dividing), step_key(seed, students.step)
        teacher_records = run_teacher_once(teacher, batch, groups, key, students.step)

        def one(
            group: Group, teacher_record: TeacherRecord | None, state: TrainState, arm: Array
        ) -> tuple[TrainState, Metrics]:
            learn = make_learn(student, optimizer, group.at(arm, state), **rest)
            return learn(state, lambda terms: teacher_record, batch, key)

        results = [
            over_students(layout, partial(one, group, teacher_record), states, theirs)
            for group, teacher_record, states, theirs in zip(
                groups, teacher_records, students.groups, arms, strict=True
            )
        ]
        return (
            Students(students.step + 1, tuple(state for state, _ in results)),
            tuple(metrics for _, metrics in results),
        )

    def steps(
        students: Students, arms: Sequence[Array], teacher: Network | None, data: Any
    ) -> tuple[Students, tuple[Metrics, ...]]:
        return jax.lax.scan(lambda state, _: one_step(state, arms, teacher, data), students, length=steps_per_dispatch)

    def dispatch(students: Students, teacher: Network | None, data: Any) -> tuple[Students, tuple[Metrics, ...]]:
        arms = tuple(arms_of(group, states) for group, states in zip(groups, students.groups, strict=True))
        return (steps if apart is None else _divided(steps, apart))(students, arms, teacher, data)

    return jax.jit(dispatch, donate_argnums=0, out_shardings=replicated(mesh))


Steps = Callable[[Students, Sequence[Array], Network | None, Any], tuple[Students, tuple[Metrics, ...]]]
"""Steps of all students; their arms are a separate argument."""


def _divided(steps: Steps, mesh: Mesh) -> Steps:
    """The same steps, with each group's students divided among the devices and everything else copied to all."""
    specs: Any = (REPLICATED, SHARDED)
    students_apart = Students(*specs)
    of_device = each_device(
        steps, mesh, (students_apart, SHARDED, REPLICATED, REPLICATED), (students_apart, PartitionSpec(None, AXIS))
    )

    def of_all(
        students: Students, arms: Sequence[Array], teacher: Network | None, data: Any
    ) -> tuple[Students, tuple[Metrics, ...]]:
        filled, theirs = jax.tree.map(partial(_filled, multiple=mesh.size), (students.groups, arms))
        after, metrics = of_device(students._replace(groups=filled), theirs, teacher, data)
        groups = jax.tree.map(lambda rows, whole: rows[: len(whole)], after.groups, students.groups)
        return after._replace(groups=groups), tuple(
            {name: rows[:, : len(whole)] for name, rows in group_metrics.items()}
            for group_metrics, whole in zip(metrics, arms, strict=True)
        )

    return of_all


def _filled(rows: Array, *, multiple: int) -> Array:
    """Rows padded to a multiple of a number by repeating the last one."""
    return jnp.pad(rows, [(0, -len(rows) % multiple)] + [(0, 0)] * (rows.ndim - 1), mode="edge")


def arms_of(group: Group, states: TrainState) -> Int[Array, " students"]:
    """For each student of the group, the index of its arm among the group's arms."""
    count = len(states.failed_term)
    return jnp.asarray(np.repeat(np.arange(len(group.arms)), count // len(group.arms)))
