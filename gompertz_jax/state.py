"""The training state: what it holds, how it begins, and a check that it belongs to its student and objective."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from ._checks import check_leaves, checked, positive_count, shown
from .network import Network, PyTree, output_shapes
from .objective import Objective, Progress, check_objective
from .projections import init_projections

HEALTHY = -1


class TrainState(NamedTuple):
    """All that changes during training; everything else is a function of it, the data and the seed.

    Attributes:
      step: steps taken, int32 scalar.
      params: the student's parameters.
      stats: the student's batch statistics.
      projections: parameters of the objective's projections; trained with the student, never exported.
      projection_stats: their statistics, including those measured on the teacher.
      progress: the student's progress if the objective measures it, else empty; see `Progress`.
      opt_state: the optimiser's state over `{"student": params, "projections": projections}`.
      average: exponential moving average of `(params, stats)`, or None.
      failed_term: index of the term that was not finite, else `HEALTHY`; with n terms, n stands for the gradient and
        n + 1 for the update. Sticky.
      failed_step: the step at which that happened, else `HEALTHY`.
    """

    step: Int[Array, ""]
    params: PyTree
    stats: PyTree
    projections: PyTree
    projection_stats: PyTree
    progress: PyTree
    opt_state: PyTree
    average: PyTree
    failed_term: Int[Array, ""]
    failed_step: Int[Array, ""]

    def evaluated(self) -> tuple[PyTree, PyTree]:
        """The parameters and statistics that are evaluated and exported: the moving average where there is one."""
        return (self.params, self.stats) if self.average is None else self.average


@checked
def init_state(
    student: Network,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    image_shape: tuple[int, ...],
    *,
    teacher: Network | None = None,
    key: PRNGKeyArray | None = None,
    moving_average: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
      student: its arrays are copied, since the step donates the state.
      optimizer: any Optax transformation over the tree `{"student": ..., "projections": ...}` that needs no `value_fn`
        (not `lbfgs`); of a wrapper such as `MultiSteps`, its `gradient_transformation()`.
      objective: defines the projections.
      image_shape: `(height, width, channels)`.
      teacher: needed when the objective has projections.
      key: random key of the projections; default `jax.random.key(0)`.
      moving_average: keep an average of the weights.

    Returns:
      A TrainState at step 0.

    Raises:
      TypeError: an argument has the wrong type, or a parameter of the student is not floating-point.
      ValueError: `image_shape` is not three positive integers, or the objective has projections and there is no
        teacher.
    """
    check_objective(objective)
    check_optimizer(optimizer)
    check_leaves("student", student)
    check_leaves("teacher", teacher)
    for path, leaf in jax.tree.leaves_with_path(student.params):
        if not jnp.issubdtype(jax.typeof(leaf).dtype, jnp.floating):
            place = f"student.params{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{place} must be floats to be trained, got {jax.typeof(leaf).dtype}: put counters and tables of "
                "integers into the network's `stats`"
            )
    if len([positive_count("image_shape", side) for side in image_shape]) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {image_shape!r}")
    projections, projection_stats = {}, {}
    if objective.projections:
        if teacher is None:
            raise ValueError(f"the objective projects {sorted(objective.projections)} onto a teacher: pass teacher=...")
        key = jax.random.key(0) if key is None else key
        ours, theirs = output_shapes(student, image_shape), output_shapes(teacher, image_shape)
        projections, projection_stats = init_projections(objective.projections, ours, theirs, key)
    params, stats = _copies((student.params, student.stats))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=stats,
        projections=projections,
        projection_stats=projection_stats,
        progress={} if objective.progress is None else objective.progress.start(),
        # Some optimisers keep the initial weights themselves, without a copy, and no array can be donated twice.
        opt_state=_copies(optimizer.init({"student": params, "projections": projections})),
        average=_copies((params, stats)) if moving_average else None,
        failed_term=jnp.full((), HEALTHY, jnp.int32),
        failed_step=jnp.full((), HEALTHY, jnp.int32),
    )


def _copies(tree: PyTree) -> PyTree:
    """Separate copies, to be donated, without weak types: those would have the step compiled twice."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jax.typeof(leaf).dtype), tree)


def progress_of(state: TrainState) -> Array | None:
    """The student's progress, if it is measured."""
    return state.progress["progress"] if state.progress else None


def check_optimizer(optimizer: optax.GradientTransformation) -> None:
    """Refuse anything without an optimiser's two functions."""
    if not callable(optimizer.init) or not callable(optimizer.update):
        raise TypeError(f"optimizer must have functions init and update, got {shown(optimizer)}")


def state_check(
    student: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation | None = None,
    *,
    averages: bool = False,
) -> Callable[[TrainState], None]:
    """A function that refuses a state unlike the one `init_state` makes for these arguments, naming the part.

    It is called while a step is traced. Parts given without arrays, or not given, are not compared.
    """
    check_leaves("student", student, or_shapes=True)
    params, stats = jax.eval_shape(lambda *trees: trees, student.params, student.stats)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)

    def check(state: TrainState) -> None:
        like: dict[str, Any] = {"step": scalar, "failed_term": scalar, "failed_step": scalar}
        if params is not None:
            like |= {"params": params, "stats": stats}
        # A state made for a larger objective will do too, for instance for a report on some of its terms.
        if objective.progress is not None or jax.tree.leaves(state.progress):
            like["progress"] = jax.eval_shape(Progress().start)
        for name, part in like.items():
            check_form(f"state.{name}", getattr(state, name), part)
        for name in ("projections", "projection_stats"):
            found = getattr(state, name)
            if not isinstance(found, Mapping) or not found.keys() >= objective.projections.keys():
                names = sorted(objective.projections)
                raise ValueError(f"state.{name} must be those of the objective's projections {names}, {_MADE}")
        if optimizer is not None:
            trained = {"student": state.params, "projections": state.projections}
            check_form("state.opt_state", state.opt_state, jax.eval_shape(optimizer.init, trained))
            if averages != (state.average is not None):
                given, lacking = ("step", "state") if averages else ("state", "step")
                raise ValueError(
                    f"the {given} has a moving average and the {lacking} has none: give both "
                    "init_state(moving_average=True) and make_train_step(average_decay=0.999), or neither"
                )
            average = (state.params, state.stats) if averages else None
            check_form("state.average", state.average, average)

    return check


_MADE = "as init_state makes them for this student, objective and optimizer"


def check_form(name: str, tree: PyTree, like: PyTree) -> None:
    """Refuse a tree whose structure, shapes or kinds of numbers differ from those of `like`."""
    found, wanted = ({path: leaf for path, leaf in jax.tree.leaves_with_path(t)} for t in (tree, like))
    if jax.tree.structure(tree) != jax.tree.structure(like):
        differing = [*(found.keys() ^ wanted.keys())][:1]
        place = f", which differ at {name}{jax.tree_util.keystr(differing[0])}" if differing else ""
        raise ValueError(f"{name} must have the arrays {_MADE}{place}")
    for path, leaf in wanted.items():
        got, kind = found[path], jnp.floating if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        if got.shape != leaf.shape or not jnp.issubdtype(got.dtype, kind):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must be {leaf.dtype} {leaf.shape}, {_MADE}, "
                f"got {got.dtype} {got.shape}"
            )
