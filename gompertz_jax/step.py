"""The one compiled program: batch, both forward passes, all terms, update and metrics, many steps per dispatch.

Everything here is a pure function of arrays and a step, and needs none of the shell around it (files, flags, clocks).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from ._checks import checked, compiled, finite_number, fraction_from_zero, positive_count, shown
from .data_parallel import check_mesh, per_image, replicated, shard_batch, whole_batch
from .losses.logits import cross_entropy
from .network import Network, Outputs, PyTree
from .objective import Objective, Term, check_objective, evaluate
from .projections import init_projections, project
from .record import Leading, NotStored, Pullback, Record, StoredOutputs, TeacherRecord, no_pullback
from .schedules import Schedule, value_at
from .state import HEALTHY, TrainState, check_form, check_optimizer, progress_of, state_check

Batch = Mapping[str, Array]
Metrics = dict[str, Array]

TELEMETRY = ("/gradient_norm", "/gradient_cosine")  # suffixes of the metrics of one term's gradient
STORED, STORED_POOLED = "teacher_logits", "teacher_pooled"  # keys of a batch that carries stored teacher outputs


class _Aux(NamedTuple):
    stats: PyTree
    projection_stats: PyTree
    progress: PyTree
    metrics: Metrics
    weights: Float[Array, " terms"]


def run_teacher(teacher: Network | None, batch: Batch, terms: Sequence[Term], key: Array) -> TeacherRecord | None:
    """The teacher's outputs on a batch, as far as these terms read them; None if none of the terms distils."""
    if not any(term.distils for term in terms):
        return None
    labels, (_, term_key) = batch["label"], jax.random.split(key)
    if STORED in batch:

        def not_stored(count: int) -> Leading:
            raise NotStored("gradients")

        stored = jax.lax.stop_gradient(StoredOutputs.of(batch[STORED], batch.get(STORED_POOLED)))
        return TeacherRecord(labels, stored, no_pullback, not_stored, term_key)
    if teacher is None:
        lacking = [term.name for term in terms if term.distils]
        raise ValueError(f"the terms {lacking} need a teacher and got None: pass one, or gj.student_alone()")
    taps = [pair[1] for pair in _tapped(terms)]

    def forward(images: Array) -> Leading:
        outputs, _, pull_back = _forward(teacher, images, taps, train=False, frozen=True)
        return Leading(jax.lax.stop_gradient(outputs), _constant(pull_back))

    return TeacherRecord(labels, *forward(batch["image"]), lambda count: forward(batch["image"][:count]), term_key)


def _raw_terms(
    trainable: PyTree,
    state: TrainState,
    teacher_record: TeacherRecord | None,
    batch: Batch,
    *,
    student: Network,
    objective: Objective,
    key: Array,
    mesh: Mesh | None,
) -> tuple[Float[Array, " terms"], _Aux]:
    """Every term's batch mean as a function of what is trained; the student's forward pass runs once."""
    images, labels = batch["image"], batch["label"]
    student_key, term_key = jax.random.split(key)
    taps = [pair[0] for pair in _tapped(objective.terms)]
    learner = student.replace(params=trainable["student"], stats=state.stats)
    outputs, stats, pull_student = _forward(learner, images, taps, train=True, key=student_key)
    record = Record(
        labels,
        outputs,
        student_pullback=pull_student,
        per_image=per_image(mesh),
        whole_batch=whole_batch(mesh),
        key=term_key,
    )
    projection_stats, progress = state.projection_stats, state.progress
    if teacher_record is not None and any(term.distils for term in objective.terms):

        def leading(count: int) -> Leading:
            running = learner.replace(stats=jax.lax.stop_gradient(stats))
            ours, _, pull_ours = _forward(running, images[:count], taps, train=False)
            return Leading(ours, pull_ours)

        fresh = jax.eval_shape(partial(init_projections, objective.projections), outputs, teacher_record.outputs, key)
        given = trainable["projections"], state.projection_stats
        for name, found, like in zip(("projections", "projection_stats"), given, fresh, strict=True):
            check_form(f"state.{name}", {key: found[key] for key in objective.projections}, like)
        student_views, teacher_views, projection_stats = project(
            objective.projections, trainable["projections"], state.projection_stats, outputs, teacher_record.outputs
        )
        record = replace(
            record,
            teacher=teacher_record.outputs,
            student_views=student_views,
            teacher_views=teacher_views,
            teacher_pullback=teacher_record.pullback,
            leading=leading,
            teacher_leading=teacher_record.leading,
        )
        if objective.progress is not None:
            progress = objective.progress.update(progress, record)
    parts = {} if teacher_record is None else teacher_record.parts
    evaluation = evaluate(objective, record, state.step, progress_of(state), parts)
    predictions = outputs.logits.argmax(-1)
    metrics = evaluation.metrics | {"accuracy": (predictions == labels).mean(dtype=jnp.float32)}
    if record.teacher is not None:
        metrics["agreement"] = (predictions == record.teacher.logits.argmax(-1)).mean(dtype=jnp.float32)
    return evaluation.raw, _Aux(stats, projection_stats, progress, metrics, evaluation.weights)


def _forward(
    network: Network,
    images: Array,
    taps: Iterable[int],
    *,
    train: bool,
    key: Array | None = None,
    frozen: bool = False,
) -> tuple[Outputs, PyTree, Pullback]:
    """One forward pass, its new statistics, and the pull-back of its logits to the images and to the tapped stages."""
    offsets = None
    if taps:
        maps = jax.eval_shape(lambda images: network.forward(images, train=False, frozen=frozen)[0].features, images)
        tapped = {_stage(index, maps) for index in taps}
        # The derivative with respect to what is added to a map is the derivative with respect to the map.
        offsets = tuple(jnp.zeros(m.shape, m.dtype) if index in tapped else None for index, m in enumerate(maps))

    def logits(images: Array, offsets: Any) -> tuple[Array, tuple[Outputs, PyTree]]:
        outputs, stats = network.forward(images, train=train, key=key, offsets=offsets, frozen=frozen)
        return outputs.logits, (outputs, stats)

    # An unused pull-back leaves only dead code, which is removed before compilation; so the forward pass is written
    # once for all objectives, and shared by the loss and the gradients at images and maps that its terms read.
    _, pull, (outputs, stats) = jax.vjp(logits, images, offsets, has_aux=True)

    def pull_back(cotangent: Array, stage: int | None = None) -> Array:
        to_images, to_maps = pull(cotangent)
        if stage is None:
            return to_images
        gradient = None if to_maps is None else to_maps[_stage(stage, outputs.features)]
        if gradient is None:
            raise ValueError(f"no gradient was prepared at stage {stage}: say so in the term's gradient_stages")
        return gradient

    return outputs, stats, pull_back


def _constant(pull_back: Pullback) -> Pullback:
    return lambda cotangent, stage=None: jax.lax.stop_gradient(pull_back(cotangent, stage))


def _stage(index: int, maps: tuple[Any, ...]) -> int:
    if not -len(maps) <= index < len(maps):
        raise ValueError(f"stage {index} is not there: the network has stages 0 to {len(maps) - 1}, or -1 for the last")
    return index % len(maps)


def _tapped(terms: Iterable[Term]) -> list[tuple[int, int]]:
    return [term.gradient_stages for term in terms if term.gradient_stages]


class _StepGradient(NamedTuple):
    """The terms of one step and their gradient; terms not computed are NaN in `raw` and in the metrics."""

    computed: Bool[Array, " terms"]
    raw: Float[Array, " terms"]
    weights: Float[Array, " terms"]
    gradient: PyTree
    stats: PyTree
    projection_stats: PyTree
    progress: PyTree
    metrics: Metrics


TeacherFor = Callable[[tuple[Term, ...]], TeacherRecord | None]
"""terms -> the teacher's outputs on this step's batch, as far as these terms read them."""


def _term_gradients(terms: Sequence[Term], gradient_of: Callable[[Array], PyTree], first: Term) -> Metrics:
    """Norms of the terms' gradients, and their cosines with the gradient of `first` if it is among the terms.

    `gradient_of(weights)` is the gradient of the terms' weighted sum.
    """
    rows = jnp.eye(len(terms), dtype=jnp.float32)
    gradients = {term.name: gradient_of(row) for term, row in zip(terms, rows, strict=True)}
    norms = {name: optax.tree.norm(gradient) for name, gradient in gradients.items()}
    metrics = {f"{name}/gradient_norm": norm for name, norm in norms.items()}
    if first.name in gradients:
        for name, norm in norms.items():
            inner = optax.tree.vdot(gradients[name], gradients[first.name])
            scale = jnp.maximum(norm * norms[first.name], jnp.finfo(norm.dtype).tiny)
            metrics[f"{name}/gradient_cosine"] = jnp.divide(inner, scale)
    return metrics


def _make_step_gradient(
    student: Network, objective: Objective, skip_below: float, term_gradients_every: int | None, mesh: Mesh | None
) -> Callable[[TrainState, TeacherFor, Batch, Array], _StepGradient]:
    """The terms of a step and the gradient of their weighted sum; only the terms of this step cost anything."""
    terms = objective.terms

    def step_gradient(
        computed: tuple[bool, ...], teacher_for: TeacherFor, state: TrainState, batch: Batch, key: Array
    ) -> _StepGradient:
        present = tuple(term for term, on in zip(terms, computed, strict=True) if on)
        teacher_record = teacher_for(present)
        raw, pull_back, aux = jax.vjp(
            lambda trainable: _raw_terms(
                trainable,
                state,
                teacher_record,
                batch,
                student=student,
                objective=objective._replace(terms=present),
                key=key,
                mesh=mesh,
            ),
            {"student": state.params, "projections": state.projections},
            has_aux=True,
        )
        (gradient,) = pull_back(aux.weights)
        metrics = aux.metrics
        if term_gradients_every:
            # This reuses the step's forward pass and adds one backward pass per term, only at the steps that measure.
            measure = partial(_term_gradients, present, lambda row: pull_back(row)[0]["student"], terms[0])
            blank = {name: jnp.full(leaf.shape, jnp.nan, leaf.dtype) for name, leaf in jax.eval_shape(measure).items()}
            metrics |= jax.lax.cond(state.step % term_gradients_every == 0, measure, lambda: blank)
        values = dict(zip((term.name for term in present), raw, strict=True))
        at = state.step, progress_of(state)
        weights = {f"{term.name}/weight": jnp.asarray(value_at(term.weight, *at), jnp.float32) for term in terms}
        return _StepGradient(
            computed=jnp.asarray(computed),
            raw=jnp.stack([values.get(term.name, jnp.float32(jnp.nan)) for term in terms]),
            weights=jnp.stack(list(weights.values())),
            gradient=gradient,
            stats=aux.stats,
            projection_stats=aux.projection_stats,
            progress=aux.progress,
            metrics=weights | metrics,
        )

    # The set of computed terms repeats with the least common multiple of their intervals.
    period = math.lcm(*(term.every_k_steps for term in terms))
    busy = [tuple(step % term.every_k_steps == 0 for term in terms) for step in range(period)]
    idle = [tuple(on and not term.distils for term, on in zip(terms, row, strict=True)) for row in busy]
    skips = skip_below > 0 and any(term.distils for term in terms)
    variants = list(dict.fromkeys(busy + (idle if skips else [])))
    if not all(any(row) for row in variants):
        raise ValueError("some steps would have no term: give one that does not distil every_k_steps = 1")
    if len(variants) == 1:
        return lambda state, teacher_for, batch, key: step_gradient(variants[0], teacher_for, state, batch, key)

    def variant_gradient(state: TrainState, teacher_for: TeacherFor, batch: Batch, key: Array) -> _StepGradient:
        arguments = state, batch, key
        whole = jax.eval_shape(partial(step_gradient, (True,) * len(terms), teacher_for), *arguments)
        absent = {name: jnp.full(leaf.shape, jnp.nan, leaf.dtype) for name, leaf in whole.metrics.items()}

        def padded(computed: tuple[bool, ...], *arguments: Any) -> _StepGradient:
            result = step_gradient(computed, teacher_for, *arguments)
            return result._replace(metrics=absent | result.metrics)

        def variant_at(rows: list[tuple[bool, ...]]) -> Array:
            return jnp.asarray([variants.index(row) for row in rows])[state.step % period]

        variant = variant_at(busy)
        if skips:
            weights = jnp.stack([jnp.asarray(value_at(term.weight, state.step)) for term in terms if term.distils])
            variant = jnp.where((jnp.abs(weights) < skip_below).all(), variant_at(idle), variant)
        return jax.lax.switch(variant, [partial(padded, row) for row in variants], *arguments)

    return variant_gradient


def make_learn(
    student: Network,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    average_decay: float | None,
    logged_schedules: Mapping[str, Schedule],
    skip_below: float,
    term_gradients_every: int | None,
    mesh: Mesh | None,
) -> Callable[[TrainState, TeacherFor, Batch, Array], tuple[TrainState, Metrics]]:
    """The step of one student on a batch that is already made; `make_train_step` documents the options."""
    if term_gradients_every is not None:
        term_gradients_every = positive_count("term_gradients_every", term_gradients_every)
    update = optax.with_extra_args_support(optimizer).update
    step_gradient = _make_step_gradient(
        student.replace(params=None, stats=None), objective, skip_below, term_gradients_every, mesh
    )

    def learn(state: TrainState, teacher_for: TeacherFor, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        result = step_gradient(state, teacher_for, batch, key)
        gradient = result.gradient
        weighted = jnp.where(result.computed, result.raw * result.weights, 0.0)
        loss = weighted.sum()
        trainable = {"student": state.params, "projections": state.projections}
        updates, opt_state = update(gradient, state.opt_state, trainable, value=loss, grad=gradient)
        trained: Any = optax.apply_updates(trainable, updates)
        new = state._replace(
            step=state.step + 1,
            params=trained["student"],
            stats=result.stats,
            projections=trained["projections"],
            projection_stats=result.projection_stats,
            progress=result.progress,
            opt_state=opt_state,
        )
        if average_decay is not None:
            decay = jnp.minimum(average_decay, (1.0 + new.step) / (10.0 + new.step))
            new = new._replace(average=_averaged((new.params, new.stats), state.average, decay))
        gradient_norm = optax.tree.norm(gradient)
        kept = _accepted(new, state, weighted, gradient_norm)
        metrics = result.metrics | {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "step": state.step,
            **({"progress": state.progress["progress"]} if state.progress else {}),
            "failed_term": kept.failed_term,
            "failed_step": kept.failed_step,
        }
        if taken := sorted(metrics.keys() & logged_schedules.keys()):
            raise ValueError(f"logged_schedules must have other names than the step's own metrics, got {taken}")
        logged = {name: jnp.asarray(schedule(state.step)) for name, schedule in logged_schedules.items()}
        return kept, metrics | logged

    return learn


def _accepted(new: TrainState, old: TrainState, weighted: Array, gradient_norm: Array) -> TrainState:
    """The new state or, once something is not finite, the old one with the failure marked, for all later steps too."""
    sound = jnp.concatenate([jnp.isfinite(weighted), jnp.stack([jnp.isfinite(gradient_norm), _all_finite(new)])])
    # Without the barrier XLA repeats the conjunction over all arrays in the fusion of each: half of resnet56 ->
    # resnet20's step.
    sound = jax.lax.optimization_barrier(sound)
    failed_term = jnp.argmin(sound).astype(jnp.int32)
    was_healthy = old.failed_term == HEALTHY
    accept = sound.all() & was_healthy
    newly_failed = ~sound.all() & was_healthy
    kept: TrainState = jax.tree.map(lambda new, old: jnp.where(accept, new, old), new, old)
    return kept._replace(
        failed_term=jnp.where(newly_failed, failed_term, old.failed_term),
        failed_step=jnp.where(newly_failed, old.step, old.failed_step),
    )


@checked
def make_train_step(
    student: Network,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    make_batch: Callable[[Any, Array], Batch] | None = None,
    steps_per_dispatch: int = 1,
    seed: int = 0,
    average_decay: float | None = None,
    logged_schedules: Mapping[str, Schedule] | None = None,
    skip_below: float = 0.0,
    term_gradients_every: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Network | None, Any], tuple[TrainState, Metrics]]:
    """The compiled, donated training step of any objective.

    Args:
      student: its `apply`, `mean` and `std` are compiled in; its arrays live in the state.
      optimizer: any Optax transformation over the tree `{"student": ..., "projections": ...}` that needs no `value_fn`
        (not `lbfgs`); of a wrapper such as `MultiSteps`, its `gradient_transformation()`. One that reads the loss of
        the step (`contrib.reduce_on_plateau`, `polyak_sgd`) gets the weighted sum of the terms.
      objective: terms and projections.
      make_batch: `(data, step) -> {"image": [B, h, w, c] in [0, 1], "label": [B]}`, run inside the program; by default
        `data` is the batch itself. If a batch also contains `teacher_logits` `[B, K]` (and `teacher_pooled` `[B, d]`,
        for terms that read it), these are used as the teacher's outputs for exactly these images, and the teacher is
        not run.
      steps_per_dispatch: steps per call, run by `lax.scan`.
      seed: seed of the random keys, which are a function of it and the step, so that resuming needs no saved key.
      average_decay: decay of the moving average of the weights; None keeps none. It must match `moving_average` of
        `init_state`. After t steps it is at most (1 + t) / (10 + t), so that the initial weights are soon forgotten.
      logged_schedules: further step -> value functions to log, for instance the learning rate.
      skip_below: while the weights of all terms that distil are smaller than this, neither the teacher nor these terms
        are computed. The step then consists of the other terms, and the projections' running statistics do not change.
        0 never skips; otherwise one more variant of the step is compiled.
      term_gradients_every: n: at every n-th step, measure the gradient of every raw term on the step's batch, as
        `make_gradient_report` does, at the cost of one more backward pass per term. None: never.
      mesh: devices to spread the batch over, with the one axis "data"; None for one device. State, teacher and metrics
        are copied to all of them. Losses, BatchNorm and gradients are those of the global batch.

    Returns:
      `train_step(state, teacher, data) -> (state, metrics)`. `state` is donated; `teacher` is a Network, or None for an
      objective without distillation or batches that carry its outputs; every metric is an array
      `[steps_per_dispatch]`: `loss`, `accuracy`, `agreement`, `gradient_norm`, `step` (the step they belong to),
      `failed_term`, `failed_step`, and per term `NAME/raw`, `NAME/weight` and `NAME/weighted`; where they are measured,
      `progress`, `NAME/gradient_norm` and `NAME/gradient_cosine`. They come from the state before the update. A metric
      not computed at a step (`Term.every_k_steps`, `skip_below`, `term_gradients_every`) is NaN there, which is not a
      failure.

      An update that is not finite is refused: the old state is kept, `failed_term` and `failed_step` are set, and every
      later step returns the state unchanged.

    Raises:
      ValueError: `steps_per_dispatch` or `term_gradients_every` below 1, a negative `skip_below`, two terms with the
        same name, a step without any term, a mesh with other axes, a weight that reads the progress together with
        `skip_below`; when called, a term that distils without a teacher, a state that does not have the form
        `init_state` gives it, was already donated or shares an array with the teacher, a batch with other shapes or
        dtypes, or one not divisible by the number of devices, a name in `logged_schedules` that is one of the step's
        own.
      TypeError: an argument of this function or of the step has the wrong type, or holds something that is not an
        array.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, gompertz_jax as gj
      >>> teacher = gj.models.create("resnet8", num_classes=10, key=jax.random.key(0))
      >>> student = gj.models.create("resnet8", num_classes=10, key=jax.random.key(1))
      >>> objective = gj.gompertz_objective(total_steps=100, gradient_weight=0.0, wasserstein_weight=0.0)
      >>> optimizer = optax.sgd(0.1)
      >>> state = gj.init_state(student, optimizer, objective, (8, 8, 3), teacher=teacher)
      >>> train_step = gj.make_train_step(student, optimizer, objective)
      >>> batch = {"image": jnp.linspace(0, 1, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3), "label": jnp.arange(4)}
      >>> for _ in range(3):
      ...     state, metrics = train_step(state, teacher, batch)
      >>> int(state.step), sorted(name for name in metrics if name.endswith("raw"))
      (3, ['ce/raw', 'kd/raw'])
    """
    check_objective(objective)
    check_optimizer(optimizer)
    steps_per_dispatch = positive_count("steps_per_dispatch", steps_per_dispatch)
    check_seed(seed)
    if average_decay is not None:
        average_decay = float(fraction_from_zero("average_decay", average_decay))
    skip_below = float(
        finite_number(
            "skip_below", skip_below, legal="0, which never skips, or more", accept=lambda number: number >= 0
        )
    )
    if skip_below and any(term.reads_progress() for term in objective.terms):
        raise ValueError(
            f"skip_below = {skip_below}: a step that skips the teacher cannot measure the student's progress, which a "
            "weight of this objective reads; take 0, or a schedule by the clock"
        )
    check_mesh(mesh)
    check_state = state_check(student, objective, optimizer, averages=average_decay is not None)
    batch_of = (lambda data, step: data) if make_batch is None else make_batch
    learn = make_learn(
        student,
        optimizer,
        objective,
        average_decay=average_decay,
        logged_schedules=logged_schedules or {},
        skip_below=skip_below,
        term_gradients_every=term_gradients_every,
        mesh=mesh,
    )

    def one_step(state: TrainState, teacher: Network | None, data: Any) -> tuple[TrainState, Metrics]:
        batch = batch_of(data, state.step)
        batch, key = shard_batch(check_batch(batch), mesh), step_key(seed, state.step)
        return learn(state, lambda terms: run_teacher(teacher, batch, terms, key), batch, key)

    # One step goes through `scan` too: a second form of the program would round differently.
    def dispatch(state: TrainState, teacher: Network | None, data: Any) -> tuple[TrainState, Metrics]:
        check_state(state)
        return jax.lax.scan(lambda state, _: one_step(state, teacher, data), state, length=steps_per_dispatch)

    return compiled(dispatch, donate_argnums=0, out_shardings=replicated(mesh))


@checked
def make_gradient_report(
    student: Network, objective: Objective, *, seed: int = 0, mesh: Mesh | None = None
) -> Callable[[TrainState, Network | None, Batch], Metrics]:
    """How each term pulls on the student: gradient norms, and cosines with the first term's gradient.

    Args:
      student: its `apply`, `mean` and `std`.
      objective: the first term is what the others are compared with (the cross-entropy).
      seed: as in `make_train_step`.
      mesh: see `make_train_step`.

    Returns:
      `report(state, teacher, batch) -> {"NAME/gradient_norm": scalar, "NAME/gradient_cosine": scalar}`: for the raw,
      unweighted terms, over the student's parameters. It costs one backward pass per term.
    """
    check_objective(objective)
    check_seed(seed)
    check_mesh(mesh)
    check_state = state_check(student, objective)
    student = student.replace(params=None, stats=None)

    def report(state: TrainState, teacher: Network | None, batch: Batch) -> Metrics:
        check_state(state)
        batch, key = shard_batch(check_batch(batch), mesh), step_key(seed, state.step)

        def terms(params: PyTree) -> tuple[Array, _Aux]:
            trainable = {"student": params, "projections": state.projections}
            teacher_record = run_teacher(teacher, batch, objective.terms, key)
            return _raw_terms(
                trainable, state, teacher_record, batch, student=student, objective=objective, key=key, mesh=mesh
            )

        _, pull_back, _ = jax.vjp(terms, state.params, has_aux=True)
        return _term_gradients(objective.terms, lambda row: pull_back(row)[0], objective.terms[0])

    return compiled(report, out_shardings=replicated(mesh))


def check_seed(seed: int) -> None:
    """Refuse anything that is not a seed."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2^32), got {shown(seed)}")


def check_batch(batch: Any) -> Batch:
    """Refuse anything that is not a batch, with a clear message, before a network sees it.

    Returns:
      The batch in JAX's arrays: outside of `jit`, as under `jax.disable_jit`, NumPy's arrive as they are.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be {{'image': [B, h, w, c], 'label': [B]}}, got {shown(batch)}")
    if not {"image", "label"} <= batch.keys():
        raise ValueError(f"a batch must have 'image' and 'label', got {', '.join(map(repr, batch)) or 'nothing'}")
    image, label = batch["image"], batch["label"]
    for name, values in (("image", image), ("label", label)):
        if not isinstance(values, jax.Array | np.ndarray):
            raise TypeError(f"{name} of a batch must be an array, got {shown(values)}")
    if image.ndim != 4 or 0 in image.shape or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image must be floats in [0, 1] of the shape [B, h, w, c], not empty, got {image.dtype} {image.shape}"
        )
    if label.shape != image.shape[:1] or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(
            f"label must be integers, one per image, of the shape {image.shape[:1]}, got {label.dtype} {label.shape}"
        )
    if STORED_POOLED in batch and STORED not in batch:
        raise ValueError(f"a batch with {STORED_POOLED!r} must have {STORED!r} too")
    for name in batch.keys() & {STORED, STORED_POOLED}:
        rows = batch[name]
        if rows.ndim != 2 or rows.shape[0] != image.shape[0] or not jnp.issubdtype(rows.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floats, one row per image, [{image.shape[0]}, _], got {rows.dtype} {rows.shape}"
            )
    return {name: jnp.asarray(values) if isinstance(values, np.ndarray) else values for name, values in batch.items()}


def step_key(seed: int, step: Array) -> Array:
    """The key of a step's losses, different from all keys that batches of the same seed are drawn with."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x7E), step)


def _averaged(new: PyTree, average: PyTree, decay: Array) -> PyTree:
    """The moving average after a step; what cannot be averaged (a counter, a random key) takes its new value."""

    def moved(new: Array, average: Array) -> Array:
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return new
        return (decay * average + (1.0 - decay) * new).astype(average.dtype)

    return jax.tree.map(moved, new, average)


def _all_finite(tree: PyTree) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


class Predictions(NamedTuple):
    """A network's predictions on a whole split: its classes `[N]` and its mean cross-entropy with the labels."""

    classes: Int[Array, " images"]
    cross_entropy: Float[Array, ""]


@checked
def make_eval_step(
    *, batch_size: int = 500, mesh: Mesh | None = None
) -> Callable[[Network, Array, Array], Predictions]:
    """The compiled evaluation of a network on a whole split, in evaluation mode.

    Args:
      batch_size: images per forward pass, at most; on a mesh rounded up to a multiple of its devices. It affects
        results by rounding only.
      mesh: devices to spread each pass over; see `make_train_step`.

    Returns:
      `evaluate(network, images, labels) -> Predictions`; images are uint8 or floats in [0, 1], `[N, h, w, c]`, any N.
    """
    batch_size = positive_count("batch_size", batch_size)
    check_mesh(mesh)
    devices = 1 if mesh is None else mesh.size

    def evaluate_split(
        network: Network, images: Shaped[Array, "images height width channels"], labels: Int[Array, " labels"]
    ) -> Predictions:
        if len(images) != len(labels):
            raise ValueError(f"images and labels must be as many, got {len(images)} and {len(labels)}")
        count = images.shape[0]
        # As few batches as there can be, of one size, as small as that can be: 640 images are two batches of 320.
        batches = -(-count // batch_size)
        size = -(-count // (batches * devices)) * devices
        missing = max(size - count, 0)  # of a split that is smaller than a batch of these devices
        images, labels = (jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in (images, labels))
        last = len(images) - size

        def one_batch(start: Array) -> tuple[Array, Array]:
            image, label = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (images, labels))
            sharded = shard_batch({"image": image, "label": label}, mesh)
            logits = network.forward(as_unit_interval(sharded["image"]), train=False, frozen=True)[0].logits
            return logits.argmax(-1).astype(jnp.int32), cross_entropy(logits, sharded["label"])

        # The last batch ends where the split does and overlaps the one before: padding it would take a copy of the
        # whole split.
        starts = jnp.minimum(jnp.arange(0, len(images), size), last)
        found = jax.lax.map(one_batch, starts)
        repeated = len(starts) * size - len(images)
        classes, losses = (jnp.concatenate([rows[:-1].reshape(-1), rows[-1, repeated:]])[:count] for rows in found)
        return Predictions(classes, losses.mean())

    return compiled(evaluate_split, out_shardings=replicated(mesh))


def as_unit_interval(images: Array) -> Float[Array, "..."]:
    """Images as floats in [0, 1]: uint8 is divided by 255, floats are returned as they are."""
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images
