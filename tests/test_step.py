"""The compiled step: its update, its metrics, its refusal of what is not finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import gompertz_jax as gj
from gompertz_jax import terms

SHAPE = (4, 4, 2)
CLASSES = 3


def linear_apply(params, stats, images, *, train, key=None):
    """Logits linear in the image; one feature map of the image itself; counts its training passes in `stats`."""
    logits = images.reshape(images.shape[0], -1) @ params["w"] + params["b"]
    stats = {"passes": stats["passes"] + 1.0} if train else stats
    return gj.Outputs(logits, (images @ params["v"],), images.mean((1, 2))), stats


def linear_network(seed, *, mean=0.0, std=1.0):
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=(np.prod(SHAPE), CLASSES)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=CLASSES), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(SHAPE[-1], 5)), jnp.float32),
    }
    return gj.Network(linear_apply, params, {"passes": jnp.zeros(())}, mean, std)


def batch(seed=0, size=6):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.uniform(size=(size, *SHAPE)), jnp.float32),
        "label": jnp.asarray(rng.integers(CLASSES, size=size), jnp.int32),
    }


def setup(objective, *, optimizer=None, **options):
    student, teacher = linear_network(1), linear_network(2)
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    state = gj.init_state(
        student, optimizer, objective, SHAPE, teacher=teacher, moving_average="average_decay" in options
    )
    return state, teacher, gj.make_train_step(student, optimizer, objective, **options)


def test_cross_entropy_step_is_the_hand_derived_softmax_regression_update():
    state, _, step = setup(gj.student_alone())
    b, old = batch(), jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, None, b)
    x = np.asarray(b["image"], np.float64).reshape(6, -1)
    logits = x @ old["w"] + old["b"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    error = (p - np.eye(CLASSES)[b["label"]]) / 6
    np.testing.assert_allclose(state.params["w"], old["w"] - 0.1 * x.T @ error, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["ce/raw"], [-np.log(p[np.arange(6), b["label"]]).mean()], rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], [(logits.argmax(-1) == b["label"]).mean()])
    assert state.step == 1
    assert state.stats["passes"] == 1.0


def test_each_network_normalises_the_common_images_by_its_own_statistics():
    """A student with normalisation equals one without it on images normalised beforehand."""
    objective, optimizer = gj.student_alone(), optax.sgd(0.1)
    raw = batch()
    normalised = {**raw, "image": (raw["image"] - 0.3) / 0.2}
    results = []
    for network, data in ((linear_network(1, mean=0.3, std=0.2), raw), (linear_network(1), normalised)):
        state = gj.init_state(network, optimizer, objective, SHAPE)
        results.append(gj.make_train_step(network, optimizer, objective)(state, None, data)[1]["loss"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_full_objective_gradient_matches_finite_differences_in_float64():
    """The outer gradient through projection, transport and the shared input gradient, against central differences.

    The scale of epsilon is a constant in differentiation, so the Gaussian form stands for transport here.
    """

    def nonlinear(params, stats, images, *, train, key=None):
        hidden = jnp.tanh(images @ params["v"])
        outputs, stats = linear_apply(params, stats, images, train=train)
        return gj.Outputs(outputs.logits + hidden.mean((1, 2)) @ params["u"], (hidden,), outputs.pooled), stats

    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        nets = []
        for seed in (1, 2):
            base = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), linear_network(seed).params)
            base["u"] = jnp.asarray(rng.normal(size=(5, CLASSES)))
            nets.append(gj.Network(nonlinear, base, {"passes": jnp.zeros(())}, 0.0, 1.0))
        student, teacher = nets
        constant = gj.constant_schedule(1.0)
        objective = gj.Objective(
            (
                gj.Term("ce", constant, terms.cross_entropy, distils=False),
                gj.Term("kd", constant, terms.soft_targets),
                gj.Term("gaussian", constant, terms.gaussian),
                gj.Term("gradient", constant, lambda record: terms.gradient_match(record, pool=2)),
            ),
            {"last": gj.Projection()},
        )
        b = {"image": jnp.asarray(rng.uniform(size=(5, *SHAPE))), "label": jnp.arange(5) % CLASSES}
        state = gj.init_state(student, optax.sgd(1.0), objective, SHAPE, teacher=teacher)
        step = gj.make_train_step(student, optax.sgd(1.0), objective)

        def loss(params):
            fresh = jax.tree.map(jnp.copy, state._replace(params=params))
            return float(step(fresh, teacher, b)[1]["loss"][0])

        params = jax.tree.map(jnp.copy, state.params)
        new, _ = step(jax.tree.map(jnp.copy, state), teacher, b)
        h = 1e-3  # the loss is reported in float32, which bounds what a smaller step could resolve
        for name in params:
            direction = jnp.asarray(rng.normal(size=params[name].shape))
            ahead, behind = (loss({**params, name: params[name] + sign * h * direction}) for sign in (1, -1))
            analytic = float(jnp.vdot(params[name] - new.params[name], direction))
            np.testing.assert_allclose(analytic, (ahead - behind) / (2 * h), rtol=5e-3, atol=2e-4, err_msg=name)


def test_many_steps_a_dispatch_equal_single_dispatches():
    objective = gj.gompertz_objective(20)
    one_state, teacher, one = setup(objective)
    many_state, _, many = setup(objective, steps_per_dispatch=5)
    b, singles = batch(), []
    for _ in range(5):
        one_state, metrics = one(one_state, teacher, b)
        singles.append(metrics)
    many_state, metrics = many(many_state, teacher, b)
    assert many_state.step == 5
    np.testing.assert_array_equal(metrics["step"], range(5))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one_state.params, many_state.params
    )
    np.testing.assert_allclose(metrics["loss"], np.concatenate([m["loss"] for m in singles]), rtol=1e-4)


def test_schedules_are_evaluated_from_the_states_step():
    objective = gj.gompertz_objective(10, wasserstein_weight=0.0)
    state, teacher, step = setup(objective, steps_per_dispatch=10, logged_schedules={"rate": gj.linear_schedule(10)})
    _, metrics = step(state, teacher, batch())
    np.testing.assert_allclose(metrics["kd/weight"], np.exp(-5 * np.exp(-0.8 * np.arange(10))), rtol=1e-5)
    np.testing.assert_allclose(metrics["rate"], np.arange(10) / 10, rtol=1e-6)


def test_the_batch_is_made_inside_from_data_and_step():
    objective = gj.student_alone()
    whole = batch(size=8)

    def two_at(data, step):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, 2 * step, 2), data)

    state, _, step = setup(objective, make_batch=two_at, steps_per_dispatch=4)
    _, metrics = step(state, None, whole)
    again, _, single = setup(objective)
    for n in range(4):
        again, one = single(again, None, jax.tree.map(lambda a, n=n: a[2 * n : 2 * n + 2], whole))
        np.testing.assert_allclose(metrics["loss"][n], one["loss"][0], rtol=1e-5)


def assert_same_training(state, other):
    for field in ("params", "stats", "opt_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            getattr(state, field),
            getattr(other, field),
        )


def test_a_term_every_k_steps_alternates_between_two_objectives_and_is_nan_in_between():
    full = gj.gompertz_objective(20, wasserstein_weight=0.0)
    sparse = gj.Objective((*full.terms[:2], full.terms[2]._replace(every_k_steps=3)))
    without = gj.Objective(full.terms[:2])
    optimizer = optax.sgd(0.1, momentum=0.9)
    state, teacher, step = setup(sparse, optimizer=optimizer, steps_per_dispatch=5)
    state, metrics = step(state, teacher, batch())

    expected, _, with_it = setup(full, optimizer=optimizer)
    _, _, without_it = setup(without, optimizer=optimizer)
    for n in range(5):
        expected, one = (with_it if n % 3 == 0 else without_it)(expected, teacher, batch())
        np.testing.assert_allclose(metrics["loss"][n], one["loss"][0], rtol=1e-5)
    assert_same_training(state, expected)
    np.testing.assert_array_equal(np.isnan(metrics["gradient/raw"]), [False, True, True, False, True])
    np.testing.assert_array_equal(np.isnan(metrics["gradient/weighted"]), [False, True, True, False, True])
    np.testing.assert_allclose(metrics["gradient/weight"], 0.7 * gj.gompertz_schedule(20)(np.arange(5)), rtol=1e-6)
    assert (metrics["failed_term"] == -1).all()


def test_steps_under_the_cutoff_equal_steps_of_weight_zero_and_never_touch_the_teacher():
    """With a teacher whose logits are NaN nobody notices while it is skipped, and the first step with it is refused."""
    jump = lambda step: jnp.where(step < 3, 1e-4, 1.0)  # noqa: E731
    nothing = lambda step: jnp.where(step < 3, 0.0, 1.0)  # noqa: E731
    results = []
    for weight, cutoff in ((jump, 1e-3), (nothing, 0.0)):
        terms_ = [term._replace(weight=weight) if term.distils else term for term in gj.gompertz_objective(9).terms]
        objective = gj.Objective(tuple(terms_), {"last": gj.Projection()})
        state, teacher, step = setup(
            objective, optimizer=optax.sgd(0.1, momentum=0.9), steps_per_dispatch=3, skip_below=cutoff
        )
        first, metrics = step(state, teacher, batch())
        results.append((jax.tree.map(np.asarray, first), metrics))
        if cutoff:
            assert np.isnan(metrics["kd/raw"]).all()
            assert np.isnan(metrics["agreement"]).all()
            broken = teacher.replace(params={**teacher.params, "b": jnp.full(CLASSES, jnp.nan)})
            fresh, _, _ = setup(objective, optimizer=optax.sgd(0.1, momentum=0.9))
            fresh, quiet = step(fresh, broken, batch())
            assert int(fresh.step) == 3
            np.testing.assert_array_equal(quiet["loss"], metrics["loss"])
            stopped, _ = step(fresh, broken, batch())
            assert (int(stopped.step), int(stopped.failed_step)) == (3, 3)
        results[-1] += (step(first, teacher, batch())[1],)
    (skipped, during, after), (zero, during_zero, after_zero) = results
    assert_same_training(skipped, zero)
    np.testing.assert_allclose(during["loss"], during_zero["loss"], rtol=1e-6)
    np.testing.assert_allclose(after["loss"], after_zero["loss"], rtol=1e-5)


def test_input_gradients_of_the_first_images_are_a_second_pass_in_evaluation_mode():
    """On a network whose two modes differ: what is matched is the evaluation one, on the updated statistics."""

    def apply(params, stats, images, *, train, key=None):
        mean = images.mean(0) if train else stats["mean"]
        hidden = jnp.tanh((images - mean).reshape(images.shape[0], -1) @ params["w"])
        stats = {"mean": jax.lax.stop_gradient(0.5 * stats["mean"] + 0.5 * mean)} if train else stats
        return gj.Outputs(hidden @ params["u"], (images,), hidden), stats

    rng = np.random.default_rng(3)
    student, teacher = (
        gj.Network(
            apply,
            {
                "w": jnp.asarray(rng.normal(size=(32, 5)) / 6, jnp.float32),
                "u": jnp.asarray(rng.normal(size=(5, CLASSES)), jnp.float32),
            },
            {"mean": jnp.asarray(rng.uniform(size=SHAPE), jnp.float32)},
            0.0,
            1.0,
        )
        for _ in range(2)
    )
    term = gj.Term("gradient", gj.constant_schedule(1.0), partial(terms.gradient_match, pool=2, images=4))
    objective, b = gj.Objective((term,)), batch()
    state = gj.init_state(student, optax.sgd(1.0), objective, SHAPE, teacher=teacher)
    before = jax.tree.map(jnp.copy, state.params)
    new, metrics = gj.make_train_step(student, optax.sgd(1.0), objective)(state, teacher, b)

    mean = 0.5 * student.stats["mean"] + 0.5 * b["image"].mean(0)
    images = b["image"][:4]
    top = teacher.forward(images, train=False)[0].logits.argmax(-1)

    def expected(params):
        running = student.replace(params=params, stats={"mean": mean})

        def score(network):
            return lambda images: jnp.take_along_axis(
                network.forward(images, train=False)[0].logits, top[:, None], 1
            ).squeeze(1)

        pooled = [
            gradient.reshape(4, 2, 2, 2, 2, 2).mean((2, 4)).reshape(4, -1)
            for gradient in (gj.input_gradient(score(running), images), gj.input_gradient(score(teacher), images))
        ]
        ours, theirs = (flat / jnp.linalg.norm(flat, axis=1, keepdims=True) for flat in pooled)
        return (1 - (ours * theirs).sum(1)).mean()

    value, gradient = jax.value_and_grad(expected)(before)
    np.testing.assert_allclose(metrics["gradient/raw"][0], value, rtol=1e-5)
    jax.tree.map(
        lambda old, new, g: np.testing.assert_allclose(old - new, g, rtol=1e-4, atol=1e-6), before, new.params, gradient
    )


def test_the_arithmetic_of_a_step_is_the_passes_that_its_terms_need():
    """In forward passes F of the student and T of the teacher, as XLA counts the program's operations.

    A backward pass is one F for the gradients of the maps and one for those of the kernels. Gradient matching adds one
    input gradient of each network, and its derivative: with respect to what was passed back and to the kernels. On a
    part of the batch the networks run again, without the student's second backward pass: in evaluation mode the input
    gradient does not depend on the activations, but for their signs.
    """
    teacher = gj.models.create("resnet14", num_classes=CLASSES, key=jax.random.key(0))
    student = gj.models.create("resnet8", num_classes=CLASSES, key=jax.random.key(1))
    b = {"image": jnp.zeros((16, 16, 16, 3)), "label": jnp.zeros(16, jnp.int32)}
    optimizer = optax.sgd(0.1)

    def flops(objective):
        state = gj.init_state(student, optimizer, objective, (16, 16, 3), teacher=teacher)
        return gj.make_train_step(student, optimizer, objective).lower(state, teacher, b).cost_analysis()["flops"]

    forward = jax.jit(lambda network: network.forward(b["image"], train=False)[0].logits)
    F, T = (forward.lower(network).cost_analysis()["flops"] for network in (student, teacher))
    ce, kd, gradient = gj.gompertz_objective(10, wasserstein_weight=0.0).terms
    half = gradient._replace(loss=partial(terms.gradient_match, images=8))
    for chosen, passes in (
        ((ce,), 3 * F),
        ((ce, kd), 3 * F + T),
        ((ce, kd, gradient), 6 * F + 2 * T),
        ((ce, kd, half), 3 * F + T + 0.5 * (4 * F + 2 * T)),
    ):
        np.testing.assert_allclose(flops(gj.Objective(chosen)), passes, rtol=0.04)


# --- stored outputs ---------------------------------------------------------------------------------------------------


def stored(teacher, images, *names):
    outputs, _ = teacher.forward(images["image"], train=False)
    return images | {f"teacher_{name}": getattr(outputs, name) for name in names}


def test_the_teacher_is_frozen_and_the_student_is_not():
    asked = []

    def watched(role, network):
        def apply(params, stats, images, *, train, key=None, frozen=False):
            asked.append((role, train, frozen))
            return network.apply(params, stats, images, train=train, key=key)

        return network.replace(apply=apply)

    objective = gj.gompertz_objective(10, wasserstein_weight=0.0)
    student, teacher = watched("student", linear_network(1)), watched("teacher", linear_network(2))
    state = gj.init_state(student, optax.sgd(0.1), objective, SHAPE, teacher=teacher)
    asked.clear()
    gj.make_train_step(student, optax.sgd(0.1), objective)(state, teacher, batch())
    assert {(role, frozen) for role, _, frozen in asked} == {("student", False), ("teacher", True)}


def test_a_teacher_of_loops_teaches_as_one_without():
    """What it says of the images, and its gradient at them."""
    student, teacher = (
        gj.models.create(name, num_classes=CLASSES, key=jax.random.key(seed))
        for seed, name in enumerate(("resnet8", "resnet32"))
    )

    def apply(params, stats, images, *, train, key=None, offsets=None):
        return teacher.apply(params, stats, images, train=train, key=key, offsets=offsets)

    objective, optimizer = gj.gompertz_objective(10, curve=lambda step: 1.0, wasserstein_weight=0.0), optax.sgd(0.1)
    b = batch() | {"image": jax.random.uniform(jax.random.key(2), (6, 8, 8, 3))}
    results = []
    for network in (teacher, teacher.replace(apply=apply)):
        state = gj.init_state(student, optimizer, objective, (8, 8, 3), teacher=network)
        results.append(gj.make_train_step(student, optimizer, objective)(state, network, b))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_a_batch_with_the_teachers_outputs_trains_as_with_the_teacher():
    """To the bit, with pooled vectors and progress among what is read, and no teacher at hand."""
    kd = gj.gompertz_objective(10, wasserstein_weight=0.0, gradient_weight=0.0).terms

    def to_pooled(record):
        return (record.student.logits.mean(-1) - record.taught().pooled.mean(-1)) ** 2

    pooled = gj.Term("pooled", gj.by_progress(gj.gompertz_schedule(1)), to_pooled)
    objective = gj.Objective((*kd, pooled), progress=gj.Progress())
    live, teacher, step = setup(objective, steps_per_dispatch=3)
    live, expected = step(live, teacher, batch())
    state, _, _ = setup(objective)
    state, got = step(state, None, stored(teacher, batch(), "logits", "pooled"))
    jax.tree.map(np.testing.assert_array_equal, (state, got), (live, expected))
    assert float(expected["pooled/raw"][0]) > 0


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (terms.wasserstein, "maps"),
        (terms.correlation_congruence, "pooled vectors"),
        (terms.gradient_match, "gradients"),
        (partial(terms.gradient_match, images=2, pool=1), "gradients"),
    ],
)
def test_a_term_that_reads_what_a_batch_does_not_carry_is_refused(loss, what):
    projections = {"last": gj.Projection()} if what == "maps" else {}
    objective = gj.Objective((gj.Term("it", gj.constant_schedule(1.0), loss),), projections)
    state, teacher, step = setup(objective)
    with pytest.raises(ValueError, match=f"the teacher's {what} are read, and are not among its stored outputs"):
        step(state, teacher, stored(teacher, batch(), "logits"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_logits": jnp.zeros((5, 3))}, r"teacher_logits must be floats, one row per image, \[6, _\], got"),
        ({"teacher_logits": jnp.zeros((6, 3), int)}, "got int32"),
        ({"teacher_pooled": jnp.zeros((6, 3))}, "a batch with 'teacher_pooled' must have 'teacher_logits' too"),
    ],
)
def test_stored_outputs_that_are_none_are_refused(changes, message):
    state, _, step = setup(gj.student_alone())
    with pytest.raises(ValueError, match=message):
        step(state, None, batch() | changes)


# --- what is not finite ----------------------------------------------------------------------------------------------

TERMS = ("ce", "kd", "wasserstein", "gradient")
# Where it comes in -> the first thing that is then not finite.
PLACES = {
    **{f"the term {name}": name for name in TERMS},
    "the weight of kd": "kd",
    "the teacher's logits": "kd",
    "a gradient": "the gradient",
    "an image": "ce",
}
# At step 3 n + 1 the n-th of these comes in, and at no other.
INJECTIONS = [(place, value) for place in PLACES for value in (np.nan, np.inf)]


def injected(place, step, otherwise):
    """What comes in at this place at a step."""
    values = np.full(3 * len(INJECTIONS), otherwise, np.float32)
    for number, (where, value) in enumerate(INJECTIONS):
        if where == place:
            values[3 * number + 1] = value
    return jnp.asarray(values)[step]


@jax.custom_vjp
def with_gradient(x, factor):
    """The identity, whose gradient is multiplied."""
    return x


with_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros(())))


def test_what_is_not_finite_is_refused_wherever_it_comes_in():
    """One program: a step without harm, the one with, and one that was issued before anything was known of it."""
    full = gj.gompertz_objective(300)

    def spoilt(term):
        def loss(record, *, poison, factor, **scheduled):
            result = term.loss(record, **scheduled)
            values, told = result if isinstance(result, tuple) else (result, {})
            return with_gradient(values, factor) + poison, told

        own = {
            "poison": partial(injected, f"the term {term.name}", otherwise=0.0),
            "factor": partial(injected, "a gradient" if term.name == "ce" else "nowhere", otherwise=1.0),
        }
        weight = term.weight
        if term.name == "kd":
            weight = lambda step: term.weight(step) * injected("the weight of kd", step, 1.0)  # noqa: E731
        return term._replace(loss=loss, weight=weight, schedules={**term.schedules, **own})

    def teacher_apply(params, stats, images, *, train, key=None):
        # The teacher does not know the step; a pixel tells it what to say.
        (logits, *rest), stats = linear_apply(params, stats, images, train=train)
        mark = images[0, 0, 0, 0]
        wrong = jnp.select([mark == 2.0, mark == 3.0], [jnp.nan, jnp.inf], 0.0)
        return gj.Outputs(logits.at[0, 0].add(wrong), *rest), stats

    def make_batch(data, step):
        what = injected("the teacher's logits", step, 1.0)
        mark = jnp.select([jnp.isnan(what), jnp.isinf(what)], [2.0, 3.0], 0.5)
        image = data["image"].at[0, 0, 0, 0].set(mark)
        return data | {"image": image.at[1, 0, 0, 0].multiply(injected("an image", step, 1.0))}

    objective = full._replace(terms=tuple(map(spoilt, full.terms)))
    optimizer = optax.sgd(0.01, momentum=0.9)
    fresh, teacher, _ = setup(objective, optimizer=optimizer)
    teacher = teacher.replace(apply=teacher_apply)
    step = gj.make_train_step(linear_network(1), optimizer, objective, make_batch=make_batch, average_decay=0.9)
    fresh = fresh._replace(average=jax.tree.map(jnp.array, (fresh.params, fresh.stats)))
    begun = jax.tree.map(np.asarray, fresh)
    for number, (place, value) in enumerate(INJECTIONS):
        at = begun._replace(step=np.int32(3 * number))
        healthy, _ = step(jax.tree.map(jnp.array, at), teacher, batch())
        kept = jax.tree.map(np.array, healthy)
        refused, metrics = step(healthy, teacher, batch())
        case = f"{value} in {place}"
        failed = int(refused.failed_term)
        assert [*TERMS, "the gradient", "the update"][failed] == PLACES[place], case
        assert (metrics["failed_term"], metrics["failed_step"]) == (failed, 3 * number + 1), case
        flags = {"failed_term": np.int32(failed), "failed_step": np.int32(3 * number + 1)}
        expected = kept._replace(**flags)
        assert int(expected.step) == 3 * number + 1
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, refused), expected)
        later, metrics = step(refused, teacher, batch())
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, later), expected)
        assert metrics["failed_term"] == failed, case
        assert np.abs(kept.params["w"] - begun.params["w"]).max() > 0  # the step without harm was taken


def test_an_update_that_overflows_is_refused_although_its_gradient_is_finite():
    huge = optax.chain(optax.scale(1e38), optax.scale(-1e38))
    state, _, step = setup(gj.student_alone(), optimizer=huge)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, None, batch())
    assert np.isfinite(metrics["gradient_norm"]).all()
    assert int(state.failed_term) == 2  # one term, the gradient, the update
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.params), before)


def test_the_refusal_of_what_is_not_finite_grows_with_the_state_and_not_with_its_square():
    """Each array is kept or refused for all of them together: XLA must not repeat that for each."""

    def apply(params, stats, images, *, train, key=None):
        vector = images.reshape(images.shape[0], -1)
        for shift in params["shifts"]:
            vector = jnp.tanh(vector + shift)
        return gj.Outputs(vector[:, :CLASSES], (images,), vector), stats

    def conjunctions(depth):
        shifts = [jnp.full((np.prod(SHAPE),), 0.1 * index) for index in range(depth)]
        network, optimizer = gj.Network(apply, {"shifts": shifts}, {}, 0.0, 1.0), optax.sgd(0.1, momentum=0.9)
        state = gj.init_state(network, optimizer, gj.student_alone(), SHAPE)
        step = gj.make_train_step(network, optimizer, gj.student_alone())
        return step.lower(state, None, batch()).compile().as_text().count(" and(")

    assert conjunctions(40) < 3 * conjunctions(20)


def test_failure_is_sticky_and_later_steps_change_nothing():
    objective = gj.student_alone()
    weight = lambda step: jnp.where(step == 1, jnp.inf, 1.0)  # noqa: E731
    objective = gj.Objective((objective.terms[0]._replace(weight=weight),))
    state, _, step = setup(objective, steps_per_dispatch=4)
    state, metrics = step(state, None, batch())
    assert (int(state.step), int(state.failed_step), int(state.failed_term)) == (1, 1, 0)
    assert metrics["failed_term"].tolist() == [-1, 0, 0, 0]
    kept = jax.tree.map(np.asarray, state)
    state, _ = step(state, None, batch())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), kept)


def test_moving_average_is_the_exponential_one_and_is_what_is_evaluated():
    state, _, step = setup(gj.student_alone(), average_decay=0.9)
    expected = np.asarray(state.params["w"], np.float64)
    for seed in range(3):
        state, _ = step(state, None, batch(seed))
        decay = min(0.9, (2 + seed) / (11 + seed))  # short at first, so that the initial weights are forgotten
        expected = decay * expected + (1 - decay) * np.asarray(state.params["w"], np.float64)
    np.testing.assert_allclose(state.evaluated()[0]["w"], expected, rtol=1e-5)
    assert not np.allclose(state.evaluated()[0]["w"], state.params["w"])


def test_the_moving_average_reaches_its_decay_and_has_the_statistics_too():
    state, _, step = setup(gj.student_alone(), average_decay=0.2)
    w, passes = np.asarray(state.params["w"], np.float64), 0.0
    for n in range(4):
        state, _ = step(state, None, batch(n))
        decay = min(0.2, (2 + n) / (11 + n))  # .18, then .2
        w = decay * w + (1 - decay) * np.asarray(state.params["w"], np.float64)
        passes = decay * passes + (1 - decay) * (n + 1)
    params, stats = state.evaluated()
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(stats["passes"], passes, rtol=1e-6)


def test_a_moving_average_takes_counters_and_keys_among_the_statistics_as_they_are():
    def apply(params, stats, images, *, train, key=None):
        key, _ = jax.random.split(stats["key"])
        outputs, _ = linear_apply(params, {"passes": 0.0}, images, train=train)
        return outputs, {"count": stats["count"] + 1, "key": key} if train else stats

    stats = {"count": jnp.int32(0), "key": jax.random.key(7)}
    student = gj.Network(apply, linear_network(1).params, stats, 0.0, 1.0)
    objective, optimizer = gj.student_alone(), optax.sgd(0.1)
    state = gj.init_state(student, optimizer, objective, SHAPE, moving_average=True)
    step = gj.make_train_step(student, optimizer, objective, average_decay=0.9, steps_per_dispatch=3)
    state, _ = step(state, None, batch())
    assert state.failed_term == -1
    _, averaged = state.evaluated()
    assert averaged["count"] == 3 and averaged["count"].dtype == jnp.int32
    assert (jax.random.key_data(averaged["key"]) == jax.random.key_data(state.stats["key"])).all()


@pytest.mark.parametrize("name", ["dog", "prodigy"])
def test_an_optimiser_that_keeps_the_initial_weights_may_be_donated(name):
    state, _, step = setup(gj.student_alone(), optimizer=getattr(optax.contrib, name)())
    for _ in range(2):
        state, _ = step(state, None, batch())
    assert state.step == 2 and state.failed_term == -1


def test_weights_of_a_weak_dtype_do_not_compile_the_step_twice():
    traced = []

    def apply(params, stats, images, *, train, key=None):
        traced.append(train)
        logits = params["scale"] * images.reshape(len(images), -1)[:, :CLASSES] + params["offset"]
        return gj.Outputs(logits, (), logits), stats

    params = {"scale": jnp.full(CLASSES, 0.1), "offset": 0.5}
    student = gj.Network(apply, params, {}, 0.0, 1.0)
    state = gj.init_state(student, optax.sgd(0.1), gj.student_alone(), SHAPE)
    step = gj.make_train_step(student, optax.sgd(0.1), gj.student_alone())
    state, _ = step(state, None, batch())
    once = len(traced)
    state, _ = step(state, None, batch())
    assert len(traced) == once and state.step == 2


def test_a_teacher_that_shares_arrays_with_the_state_is_told_and_a_copy_of_it_teaches():
    objective = gj.gompertz_objective(10, wasserstein_weight=0.0, gradient_weight=0.0)
    state, teacher, step = setup(objective)
    itself = teacher.replace(params=state.params, stats=state.stats)
    with pytest.raises(ValueError, match=r"teacher.params\['b'\] shares an array with state, .*jnp.copy, teacher\)"):
        step(state, itself, batch())
    state, metrics = step(state, jax.tree.map(jnp.copy, itself), batch())
    assert state.step == 1 and metrics["agreement"] == 1.0


def test_a_step_that_is_not_staged_takes_numpy_arrays():
    objective = gj.gompertz_objective(10, wasserstein_weight=0.0, gradient_weight=0.0)
    as_numpy = {name: np.asarray(values) for name, values in batch().items()}
    state, teacher, step = setup(objective)
    _, expected = step(state, teacher, as_numpy)
    from_numpy = setup(objective, make_batch=lambda data, step: as_numpy)[2]
    for train_step in (step, from_numpy):
        state, teacher, _ = setup(objective)
        with jax.disable_jit():
            state, metrics = train_step(state, teacher, as_numpy)
        assert state.step == 1 and state.failed_term == -1
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    state, teacher, _ = setup(objective)
    np.testing.assert_allclose(from_numpy(state, teacher, None)[1]["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0, rtol=0.5, factor=0.3)),
        optax.polyak_sgd(0.5),
        optax.adam(0.1),
    ],
    ids=["plateau", "polyak", "adam"],
)
def test_an_optimiser_is_given_the_loss_and_does_what_it_does_by_hand(optimizer):
    state, _, step = setup(gj.student_alone(), optimizer=optimizer)
    trained = {"student": jax.tree.map(jnp.copy, state.params), "projections": {}}
    by_hand = optimizer.init(trained)
    network = linear_network(1)

    def loss(trained, images):
        logits = network.replace(params=trained["student"]).forward(images["image"], train=True)[0].logits
        return gj.cross_entropy(logits, images["label"]).mean()

    for seed in range(4):
        value, gradient = jax.value_and_grad(loss)(trained, batch(seed))
        updates, by_hand = optax.with_extra_args_support(optimizer).update(
            gradient, by_hand, trained, value=value, grad=gradient
        )
        trained = optax.apply_updates(trained, updates)
        state, _ = step(state, None, batch(seed))
    for name, found in state.params.items():
        np.testing.assert_allclose(found, trained["student"][name], rtol=1e-5, atol=1e-6)
    if isinstance(state.opt_state, tuple) and hasattr(state.opt_state[-1], "scale"):
        assert 0.0 < state.opt_state[-1].scale < 1.0  # it did find a plateau


def test_a_table_of_integers_among_the_parameters_is_refused():
    network = linear_network(1)
    network = network.replace(params=network.params | {"table": jnp.arange(3)})
    with pytest.raises(TypeError, match=r"student.params\['table'\] must be floats .*got int32: .* `stats`"):
        gj.init_state(network, optax.sgd(0.1), gj.student_alone(), SHAPE)


@pytest.mark.parametrize("name", ["loss", "accuracy", "ce/raw", "step"])
def test_a_logged_schedule_under_the_name_of_a_metric_is_refused(name):
    state, _, step = setup(gj.student_alone(), logged_schedules={name: gj.constant_schedule(1.0)})
    with pytest.raises(ValueError, match=f"logged_schedules must have other names .*got .'{name}'"):
        step(state, None, batch())


def test_what_fails_inside_of_a_running_step_is_told_as_it_is():
    def refuse(logits):
        raise RuntimeError("no room left in the annex")

    def loss(record):
        shape = jax.ShapeDtypeStruct(record.labels.shape, jnp.float32)
        return jax.pure_callback(refuse, shape, jax.lax.stop_gradient(record.student.logits))

    objective = gj.Objective((gj.student_alone().terms[0], gj.Term("annex", gj.constant_schedule(1.0), loss)))
    state, teacher, step = setup(objective)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no room left in the annex"):
        jax.block_until_ready(step(state, teacher, batch()))


def test_a_label_that_is_none_is_refused_and_not_another_classs():
    state, _, step = setup(gj.student_alone())
    state, metrics = step(state, None, batch() | {"label": jnp.array([0, 1, -1, 2, 0, 1])})
    assert state.failed_term == 0 and state.step == 0 and np.isnan(metrics["ce/raw"][0])


@pytest.mark.parametrize("carried", [True, False])
def test_a_moving_average_in_the_state_or_the_step_alone_is_refused_in_words(carried):
    student, optimizer, objective = linear_network(1), optax.sgd(0.1), gj.student_alone()
    state = gj.init_state(student, optimizer, objective, SHAPE, moving_average=carried)
    step = gj.make_train_step(student, optimizer, objective, average_decay=None if carried else 0.9)
    given, lacking = ("state", "step") if carried else ("step", "state")
    with pytest.raises(ValueError, match=f"the {given} has a moving average and the {lacking} has none: give both"):
        step(state, None, batch())


def test_projections_learn_and_teacher_is_unchanged():
    state, teacher, step = setup(gj.gompertz_objective(2), steps_per_dispatch=2)
    kernel, taught = np.asarray(state.projections["last"]["kernel"]), jax.tree.map(np.asarray, teacher.params)
    state, metrics = step(state, teacher, batch())
    assert np.abs(np.asarray(state.projections["last"]["kernel"]) - kernel).max() > 1e-6
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, teacher.params), taught)
    said = [linear_apply(n.params, {}, batch()["image"], train=False)[0] for n in (linear_network(1), teacher)]
    ours, theirs = (outputs.logits.argmax(-1) for outputs in said)
    assert metrics["agreement"][0] == pytest.approx((ours == theirs).mean())


def test_norms_and_cosines_of_gradients_are_those_of_softmax_regression():
    objective = gj.Objective(gj.gompertz_objective(9, wasserstein_weight=0.0, gradient_weight=0.0).terms)
    state, teacher, _ = setup(objective)
    images = batch()
    found = gj.make_gradient_report(linear_network(1), objective)(state, teacher, images)
    x, labels = np.asarray(images["image"], np.float64).reshape(6, -1), np.asarray(images["label"])
    z, t = (x @ np.asarray(p["w"], np.float64) + np.asarray(p["b"]) for p in (state.params, teacher.params))
    softmax = partial(scipy.special.softmax, axis=-1)
    errors = softmax(z) - np.eye(CLASSES)[labels], 4.0 * (softmax(z / 4) - softmax(t / 4))
    ce, kd = (np.concatenate([(x.T @ error).ravel(), error.sum(0)]) / 6 for error in errors)
    norms = np.linalg.norm(ce), np.linalg.norm(kd)
    expected = {
        "ce/gradient_norm": norms[0],
        "kd/gradient_norm": norms[1],
        "ce/gradient_cosine": 1.0,
        "kd/gradient_cosine": ce @ kd / (norms[0] * norms[1]),
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-4)


def test_a_networks_random_key_is_of_the_seed_and_the_step():
    def noisy(params, stats, images, *, train, key=None):
        outputs, stats = linear_apply(params, stats, images, train=train)
        noise = jax.random.normal(key, outputs.logits.shape) if train else 0.0
        return outputs._replace(logits=outputs.logits + noise), stats

    def losses(seed):
        student = linear_network(1).replace(apply=noisy)
        state = gj.init_state(student, optax.sgd(0.0), gj.student_alone(), SHAPE)
        step = gj.make_train_step(student, optax.sgd(0.0), gj.student_alone(), seed=seed, steps_per_dispatch=4)
        return step(state, None, batch())[1]["loss"].tolist()

    first, again, other = (losses(seed) for seed in (0, 0, 1))
    assert first == again and len({*first, *other}) == 8


def test_a_negative_weight_is_not_under_the_cutoff():
    ce, kd = gj.gompertz_objective(9, wasserstein_weight=0.0, gradient_weight=0.0).terms
    objective = gj.Objective((ce, kd._replace(weight=gj.constant_schedule(-1.0))))
    state, teacher, step = setup(objective, skip_below=0.1)
    assert np.isfinite(step(state, teacher, batch())[1]["kd/raw"]).all()


def test_gradient_report_measures_each_raw_term():
    objective = gj.gompertz_objective(20)
    state, teacher, _ = setup(objective)
    report = gj.make_gradient_report(linear_network(1), objective)(state, teacher, batch())
    alone = gj.make_gradient_report(linear_network(1), gj.student_alone())(state, None, batch())
    np.testing.assert_allclose(report["ce/gradient_norm"], alone["ce/gradient_norm"], rtol=1e-5)
    np.testing.assert_allclose(report["ce/gradient_cosine"], 1.0, rtol=1e-5)
    assert -1.0 <= report["kd/gradient_cosine"] <= 1.0
    assert report["wasserstein/gradient_norm"] > 0


@pytest.mark.parametrize("skip_below", [0.0, 0.5])
def test_a_step_measures_each_term_as_the_report_does_and_only_where_it_is_asked(skip_below):
    """With terms that are not computed at every step, and while the teacher rests."""
    ce, kd, wasserstein, gradient = gj.gompertz_objective(20).terms
    rising = kd._replace(weight=lambda step: jnp.float32(step >= 2)), wasserstein._replace(weight=lambda step: 0.0)
    late = gradient._replace(weight=lambda step: 0.0, every_k_steps=2)
    objective = gj.gompertz_objective(20)._replace(terms=(ce, *rising, late))
    state, teacher, step = setup(objective, term_gradients_every=2, skip_below=skip_below)
    _, _, plain = setup(objective, skip_below=skip_below)
    report = gj.make_gradient_report(linear_network(1), objective)
    for number in range(4):
        expected = report(state, teacher, batch(number))
        untold, _ = plain(jax.tree.map(jnp.copy, state), teacher, batch(number))
        state, metrics = step(state, teacher, batch(number))
        for name, value in expected.items():
            rests = skip_below > 0 and number < 2 and not name.startswith("ce")
            wanted = np.nan if number % 2 or rests else value
            np.testing.assert_allclose(metrics[name][0], wanted, rtol=1e-4, atol=1e-6, err_msg=f"{name} at {number}")
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state, untold)


@pytest.mark.parametrize("count", [1, 5, 7])
def test_evaluation_does_not_depend_on_how_the_split_divides(count):
    network = linear_network(1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(count, *SHAPE), dtype=np.uint8)
    labels = rng.integers(CLASSES, size=count).astype(np.int32)
    got = gj.make_eval_step(batch_size=3)(network, jnp.asarray(images), jnp.asarray(labels))
    logits = (images.reshape(count, -1) / 255.0) @ np.asarray(network.params["w"]) + np.asarray(network.params["b"])
    np.testing.assert_array_equal(got.classes, logits.argmax(-1))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got.cross_entropy, -log_p[np.arange(count), labels].mean(), rtol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(640, 320), (500, 500), (501, 251), (1000, 500), (7, 7)])
def test_evaluation_takes_batches_of_one_size_and_hardly_an_image_twice(count, size):
    seen = set()

    def apply(params, stats, images, *, train, key=None):
        seen.add(len(images))
        pooled = images.reshape(len(images), -1)
        return gj.Outputs(pooled @ params, (images,), pooled), stats

    network = gj.Network(apply, jnp.zeros((4, 3)), {}, 0.0, 1.0)
    images = jax.ShapeDtypeStruct((count, 2, 2, 1), jnp.uint8)
    jax.eval_shape(gj.make_eval_step(batch_size=500), network, images, jax.ShapeDtypeStruct((count,), jnp.int32))
    assert seen == {size}


def test_evaluation_makes_no_second_copy_of_the_split():
    network, count = linear_network(1), 4001
    images = jax.ShapeDtypeStruct((count, *SHAPE), jnp.uint8)
    program = gj.make_eval_step(batch_size=10).lower(network, images, jax.ShapeDtypeStruct((count,), jnp.int32))
    assert program.compile().memory_analysis().temp_size_in_bytes < images.size / 2


def test_mistakes_are_told_before_tracing():
    with pytest.raises(ValueError, match="steps_per_dispatch must be a positive integer, got 0"):
        setup(gj.student_alone(), steps_per_dispatch=0)
    with pytest.raises(ValueError, match="term_gradients_every must be a positive integer, got 0"):
        setup(gj.student_alone(), term_gradients_every=0)
    twice = gj.Objective(gj.student_alone().terms * 2)
    with pytest.raises(ValueError, match="term names must differ"):
        setup(twice)
    with pytest.raises(ValueError, match="pass teacher="):
        gj.init_state(linear_network(1), optax.sgd(0.1), gj.gompertz_objective(10), SHAPE)
    with pytest.raises(ValueError, match="skip_below must be 0, which never skips, or more, got -1"):
        setup(gj.student_alone(), skip_below=-1.0)
    ce, kd = gj.gompertz_objective(10, wasserstein_weight=0.0, gradient_weight=0.0).terms
    with pytest.raises(ValueError, match="every_k_steps of the term 'kd' must be a positive integer, got 0"):
        setup(gj.Objective((ce, kd._replace(every_k_steps=0))))
    with pytest.raises(ValueError, match="some steps would have no term"):
        setup(gj.Objective((ce._replace(every_k_steps=2), kd._replace(every_k_steps=3))))
    with pytest.raises(ValueError, match="mesh must have one axis, 'data', got"):
        setup(gj.student_alone(), mesh=jax.make_mesh((1,), ("batch",)))
    with pytest.raises(ValueError, match="mesh must be made with axis_types="):
        explicit = (jax.sharding.AxisType.Explicit,)
        setup(gj.student_alone(), mesh=jax.make_mesh((1,), ("data",), axis_types=explicit))
    state, _, step = setup(gj.gompertz_objective(10))
    with pytest.raises(ValueError, match="need a teacher"):
        step(state, None, batch())


def test_what_a_step_cannot_take_is_told_by_its_place():
    state, teacher, step = setup(gj.student_alone())
    report, b = gj.make_gradient_report(linear_network(1), gj.student_alone()), batch()
    short = b | {"label": b["label"][:2]}
    for arguments, message in (
        ((7, teacher, b), "state must be TrainState, got "),
        ((state, b["image"], b), "teacher must be Network or None, got "),
        ((state._replace(step="a"), teacher, b), r"state.step must be an array of numbers, got 'a'"),
        (
            (state._replace(step=jnp.zeros(2, jnp.int32)), teacher, b),
            r"state.step must be int32 \(\), .*got int32 \(2,\)",
        ),
        ((state._replace(params=state.params | {"w": b["label"]}), teacher, b), r"state.params\['w'\] must be float32"),
        (
            (state._replace(stats={}), teacher, b),
            r"state.stats must have the arrays .* differ at state.stats\['passes'\]",
        ),
        ((state, teacher, {"image": b["image"]}), "a batch must have 'image' and 'label', got 'image'"),
        ((state, teacher, short), r"label must be integers, one per image, of the shape \(6,\), got int32 \(2,\)"),
        ((state, teacher, b | {"image": np.array(["a"])}), r"\['image'\] must be an array of numbers, got array"),
        ((state, teacher, {1: 2, "a": 3}), "must be a tree of arrays, got one that has no order"),
    ):
        for function in (step, report):
            with pytest.raises((TypeError, ValueError), match=message):
                function(*arguments)
    with pytest.raises(ValueError, match=r"state.opt_state must have the arrays"):
        step(state._replace(opt_state=()), teacher, b)
    evaluate, labels = gj.make_eval_step(), b["label"]
    for arguments, message in (
        ((b["image"], b["image"], labels), "network must be Network, got "),
        ((teacher, b["image"], labels[:2]), "images and labels must be as many, got 6 and 2"),
        ((teacher, b["image"], labels * 1.0), r"labels must be an array of integers \[labels\]"),
        ((teacher, b["image"], 2**70), "labels must be an array of integers"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            evaluate(*arguments)
    step(state, teacher, b)
    with pytest.raises(ValueError, match=r"state.step was donated to an earlier call: pass on what that call returned"):
        step(state, teacher, b)


def test_a_state_for_another_teacher_is_refused():
    objective, optimizer = gj.gompertz_objective(10, gradient_weight=0.0), optax.sgd(0.1)
    student, narrow, wide = linear_network(1), hidden_network(2, width=5), hidden_network(2, width=7)
    state = gj.init_state(student, optimizer, objective, SHAPE, teacher=narrow)
    with pytest.raises(ValueError, match=r"state.projections\['last'\]\['bias'\] must be float32 \(7,\)"):
        gj.make_train_step(student, optimizer, objective)(state, wide, batch())


def test_a_plain_loop_over_make_train_step_learns():
    """The notebook's way: no shell, no files, a network of the zoo."""
    teacher = gj.models.create("resnet8", num_classes=CLASSES, key=jax.random.key(0), in_channels=2)
    student = gj.models.create("resnet8", num_classes=CLASSES, key=jax.random.key(1), in_channels=2)
    objective, optimizer = gj.gompertz_objective(total_steps=12), optax.sgd(0.05, momentum=0.9)
    state = gj.init_state(student, optimizer, objective, SHAPE, teacher=teacher)
    train_step = gj.make_train_step(student, optimizer, objective)
    losses = []
    for _ in range(12):
        state, metrics = train_step(state, teacher, batch(size=12))
        losses.append(float(metrics["ce/raw"][0]))
    assert losses[-1] < 0.5 * losses[0]


def test_the_curve_follows_the_students_progress_and_the_state_carries_it():
    """Agreement by hand from both linear networks, smoothed; each step's weight is the curve at the progress before."""
    curve = gj.by_progress(gj.gompertz_schedule(1, displacement=3.0))
    objective = gj.gompertz_objective(50, curve=curve, wasserstein_weight=0.0, gradient_weight=0.0)
    objective = objective._replace(progress=gj.Progress(decay=0.8))
    state, teacher, step = setup(objective, optimizer=optax.sgd(1.0), steps_per_dispatch=3)
    b, expected = batch(size=12), 0.0
    x = np.asarray(b["image"]).reshape(12, -1)
    theirs = (x @ np.asarray(teacher.params["w"]) + np.asarray(teacher.params["b"])).argmax(-1)
    seen = []
    for _ in range(4):
        state, metrics = step(state, teacher, b)
        for agreement, progress, weight in zip(
            metrics["agreement"], metrics["progress"], metrics["kd/weight"], strict=True
        ):
            np.testing.assert_allclose(progress, expected, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(weight, np.exp(-3 * np.exp(-8 * expected)), rtol=1e-4)
            expected = 0.8 * expected + 0.2 * float(agreement)
            seen.append(float(agreement))
    np.testing.assert_allclose(state.progress["progress"], expected, rtol=1e-5)
    ours = (x @ np.asarray(state.params["w"]) + np.asarray(state.params["b"])).argmax(-1)
    assert seen[0] < seen[-1] <= np.mean(ours == theirs) + 0.1


def test_progress_and_skipping_the_teacher_exclude_each_other():
    objective = gj.gompertz_objective(50, curve=gj.by_progress(gj.gompertz_schedule(1)))
    with pytest.raises(ValueError, match="cannot measure the student's progress"):
        setup(objective, skip_below=0.1)
    with pytest.raises(ValueError, match=r"progress.decay must be in \[0, 1\), got 1.0"):
        setup(objective._replace(progress=gj.Progress(decay=1.0)))


def hidden_network(seed, *, width, taps=True):
    """One map, tanh of a linear map of the image, and logits linear in its mean; takes offsets at the map."""
    rng = np.random.default_rng(seed)
    params = {"v": jnp.asarray(rng.normal(size=(2, width)), jnp.float32)}
    params["u"] = jnp.asarray(rng.normal(size=(width, CLASSES)), jnp.float32)

    def apply(params, stats, images, *, train, key=None, offsets=None):
        hidden = jnp.tanh(images @ params["v"])
        if offsets is not None and offsets[0] is not None:
            hidden = hidden + offsets[0]
        return gj.Outputs(hidden.mean((1, 2)) @ params["u"], (hidden,), hidden.mean((1, 2))), stats

    def deaf(params, stats, images, *, train, key=None):
        return apply(params, stats, images, train=train)

    return gj.Network(apply if taps else deaf, params, {}, 0.0, 1.0)


@pytest.mark.parametrize("images", [0, 2])
def test_gradients_at_a_stage_are_those_of_the_maps_by_hand(images):
    """The gradient at the map is u of the teacher's top class over 16 positions, whatever the image."""
    student, teacher = hidden_network(1, width=5), hidden_network(2, width=7)
    loss = partial(terms.gradient_match, stages=(0, -1), pool=1, images=images)
    objective = gj.Objective((gj.Term("m", gj.constant_schedule(1.0), loss, gradient_stages=(0, -1)),))
    b, optimizer = batch(), optax.sgd(1.0)
    state = gj.init_state(student, optimizer, objective, SHAPE)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = gj.make_train_step(student, optimizer, objective)(state, teacher, b)
    maps = [np.tanh(np.asarray(b["image"], np.float64) @ net.params["v"]) for net in (student, teacher)]
    top = (maps[1].mean((1, 2)) @ np.asarray(teacher.params["u"])).argmax(-1)
    shares = [
        np.einsum("bhwc,cb->bhw", m, np.asarray(net.params["u"], np.float64)[:, top]).reshape(6, -1)
        for m, net in zip(maps, (student, teacher), strict=True)
    ]
    norms = np.linalg.norm(shares[0], axis=-1) * np.linalg.norm(shares[1], axis=-1)
    expected = 1 - (shares[0] * shares[1]).sum(-1) / norms
    np.testing.assert_allclose(metrics["m/raw"], [expected[: images or 6].mean()], rtol=1e-4)
    assert all(np.abs(state.params[name] - before[name]).max() > 1e-5 for name in before)


def test_a_gradient_at_a_stage_that_cannot_be_had_is_told():
    teacher = hidden_network(2, width=7)
    loss = partial(terms.gradient_match, stages=(0, 0), pool=1)
    for student, gradient_stages, message in (
        (hidden_network(1, width=5), (), "no gradient was prepared at stage 0: say so in the term's gradient_stages"),
        (hidden_network(1, width=5, taps=False), (0, 0), "this network's apply does not take them"),
        (hidden_network(1, width=5), (1, 0), "stage 1 is not there: the network has stages 0 to 0"),
    ):
        term = gj.Term("m", gj.constant_schedule(1.0), loss, gradient_stages=gradient_stages)
        objective, optimizer = gj.Objective((term,)), optax.sgd(1.0)
        state = gj.init_state(student, optimizer, objective, SHAPE)
        with pytest.raises(ValueError, match=message):
            gj.make_train_step(student, optimizer, objective)(state, teacher, batch())
