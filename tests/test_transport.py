"""Other costs, mass given up, classes and logits against convex solves, closed forms and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from helpers import refused_before_tracing
from test_wasserstein import TO_CONVERGENCE, central_difference, clouds, reference_sinkhorn, squared_distances

import gompertz_jax as gj
from gompertz_jax.losses import _sinkhorn


def value_and_gradient(function, x):
    """In float64 and compiled; of the sum."""
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(lambda x: function(x).sum()))(jnp.asarray(x))
        return np.asarray(value), np.asarray(gradient)


def check_gradient(gradient, function, point, *, rtol):
    """Along three random directions, where evaluating the reference everywhere would take long."""
    for direction in np.random.default_rng(0).standard_normal((3, *point.shape)):
        difference = (function(point + 1e-4 * direction) - function(point - 1e-4 * direction)) / 2e-4
        np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=rtol, atol=1e-7)


def to_convergence(x, y, **options):
    return gj.sinkhorn_distance(x, jnp.asarray(y), **TO_CONVERGENCE, **options)


def cosine_distances(x, y):
    return np.array([[1 - u @ v / np.sqrt((u @ u) * (v @ v)) for v in y] for u in x])


def curved(x, y):
    return jnp.sum(jnp.sqrt(1.0 + jnp.square(x[:, None] - y[None])), axis=-1)


def euclidean(x, y):
    return jnp.sum(jnp.square(x[:, None] - y[None]), axis=-1)


COSTS = {
    "cosine": ("cosine", cosine_distances),
    "function": (curved, lambda x, y: np.sqrt(1 + (x[:, None] - y[None]) ** 2).sum(-1)),
}


@pytest.mark.parametrize(("name", "debiased"), [(name, False) for name in COSTS] + [(next(iter(COSTS)), True)])
def test_other_costs_against_an_independent_sinkhorn(name, debiased):
    cost, matrix = COSTS[name]
    x, y = clouds(0, 4, 5, 3, shift=0.4)
    e = 0.3 * matrix(x, y).mean()

    def reference(x):
        self_terms = reference_sinkhorn(matrix(x, x), e) + reference_sinkhorn(matrix(y, y), e) if debiased else 0.0
        return reference_sinkhorn(matrix(x, y), e) - 0.5 * self_terms

    value, gradient = value_and_gradient(partial(to_convergence, y=y, epsilon=0.3, cost=cost, debiased=debiased), x)
    np.testing.assert_allclose(value, reference(x), rtol=1e-8)
    check_gradient(gradient, reference, x, rtol=1e-5)


def test_a_function_and_the_closed_form_agree_on_a_batch():
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(1, 5, 6, 3, batch=(2, 2)))
    both = [
        jax.value_and_grad(
            lambda x, cost=cost: (lambda value: (value.sum(), value))(gj.sinkhorn_distance(x, y, cost=cost)),
            has_aux=True,
        )(x)
        for cost in ("squared_euclidean", euclidean)
    ]
    ((_, value), gradient), ((_, other_value), other_gradient) = both
    assert value.shape == (2, 2)
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    np.testing.assert_allclose(other_gradient, gradient, rtol=1e-3, atol=1e-5)


def test_cosine_of_zero_vectors_costs_one_and_has_no_gradient():
    cosine = jax.jit(jax.value_and_grad(lambda x, y: gj.sinkhorn_distance(x, y, cost="cosine")))
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(2, 4, 4, 3))
    value, gradient = cosine(0.0 * x, y)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0.0)
    value, gradient = cosine(x.at[0].set(0.0), y)
    np.testing.assert_array_equal(gradient[0], 0.0)
    assert np.isfinite(value) and np.isfinite(gradient).all() and abs(gradient[1:]).min(0).max() > 0
    for scale in (1e-25, 1e25):
        scaled, scaled_gradient = cosine(scale * x, y)
        np.testing.assert_allclose(scaled, cosine(x, y)[0], rtol=1e-5)
        assert np.isfinite(scaled_gradient).all()
    # The same points: the clipped cost has the gradient 0 where the cosine is 1.
    assert np.isfinite(cosine(x, x)[1]).all()


def reference_unbalanced(cost, e, rho):
    """Minimise the primal problem over the logarithm of the plan."""
    n, m = cost.shape
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)

    def divergence(p, q):
        return (scipy.special.xlogy(p, p / q) - p + q).sum()

    def primal(log_plan):
        plan = np.exp(log_plan.reshape(n, m))
        rows, columns = plan.sum(1), plan.sum(0)
        value = (plan * cost).sum() + e * divergence(plan, np.outer(a, b))
        value += rho * (divergence(rows, a) + divergence(columns, b))
        slope = cost + e * np.log(plan / np.outer(a, b)) + rho * np.log(rows / a)[:, None] + rho * np.log(columns / b)
        return value, (plan * slope).ravel()

    start = np.log(np.outer(a, b)).ravel()
    solution = scipy.optimize.minimize(primal, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    assert abs(solution.jac).max() < 1e-7, solution.message
    return solution.fun


@pytest.mark.parametrize(("rho", "debiased"), [(0.2, False), (1.5, False), (1.5, True)])
def test_unbalanced_against_a_convex_solve(rho, debiased):
    x, y = clouds(3, 3, 4, 2, shift=0.5)
    mean = squared_distances(x, y).mean()

    def reference(x):
        between = [(x, y)] + ([(x, x), (y, y)] if debiased else [])
        values = [reference_unbalanced(squared_distances(*pair), 0.2 * mean, rho * mean) for pair in between]
        return values[0] - 0.5 * sum(values[1:])

    options = {"epsilon": 0.2, "marginal_penalty": rho, "debiased": debiased}
    value, gradient = value_and_gradient(partial(to_convergence, y=y, **options), x)
    np.testing.assert_allclose(value, reference(x), rtol=1e-8)
    check_gradient(gradient, reference, x, rtol=1e-4)
    single = gj.sinkhorn_distance(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), **options)
    np.testing.assert_allclose(single, value, rtol=1e-4, atol=1e-5)


def test_unbalanced_grows_with_the_penalty_up_to_the_balanced_value():
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(4, 9, 7, 3, shift=0.5))
    cost = squared_distances(np.asarray(x, np.float64), np.asarray(y, np.float64))
    unbalanced = jax.jit(
        lambda rho: gj.sinkhorn_distance(x, y, marginal_penalty=rho, return_diagnostics=True, threshold=1e-5)
    )
    values = []
    for rho in (1e-30, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e30):
        value, health = unbalanced(rho)
        assert health.converged and health.marginal_error < 1.1e-5, rho
        values.append(float(value))
    assert (np.diff(values) > 0).all()
    e = 0.05 * cost.mean()
    # Free to vanish, the plan is the product times exp(-C / e).
    np.testing.assert_allclose(values[0], e * (1 - np.exp(-cost / e).mean()), rtol=1e-3)
    np.testing.assert_allclose(values[-1], gj.sinkhorn_distance(x, y, threshold=1e-5), rtol=3e-4)


def test_an_outlier_is_given_up():
    x, _ = clouds(5, 6, 6, 2)
    x[0] = 30.0
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(clouds(6, 6, 6, 2)[1], jnp.float32)
    pull = {
        rho: jax.grad(lambda x, rho=rho: gj.sinkhorn_distance(x, y, marginal_penalty=rho))(x) for rho in (None, 0.1)
    }
    assert np.linalg.norm(pull[None][0]) > 5.0
    assert np.linalg.norm(pull[0.1][0]) < 0.01
    assert np.linalg.norm(pull[0.1][1:]) > 0.1


def test_every_iteration_runs_in_turn_and_in_lockstep_alike():
    # In lockstep: the way of the accelerators, which a CPU never takes by itself.
    random = np.random.default_rng(7)
    weights = tuple(jnp.asarray(random.dirichlet(np.ones(size), 5), jnp.float32) for size in (7, 6))
    cost = jnp.asarray(random.uniform(0.0, 2.0, (5, 7, 6)), jnp.float32)
    solver = _sinkhorn.Sinkhorn(threshold=1e-3, inner_iterations=5, max_iterations=100)
    for costs, iterate in (
        (cost[:1], partial(_sinkhorn._balanced, solver, jnp.float32(0.05))),
        (cost, partial(_sinkhorn._unbalanced, jnp.float32(0.05), jnp.float32(0.5), jnp.float32(1e-3), 100)),
    ):
        in_turn = jax.jit(partial(_sinkhorn._in_turn, iterate))(costs, *weights)
        in_lockstep = jax.jit(partial(_sinkhorn._in_lockstep, iterate))(costs, *weights)
        for one, other in zip(in_turn, in_lockstep, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


LABELS = np.array([3, 1, 3, 3, 1, 7])
in_classes = partial(gj.class_sinkhorn_distance, threshold=1e-7, max_iterations=20_000)


def test_classes_are_separate_problems_at_one_regularisation():
    x, y = clouds(8, 6, 6, 3, shift=0.3)
    mean = squared_distances(x, y)[LABELS[:, None] == LABELS].mean()

    def reference(x):
        classes = [label == LABELS for label in set(LABELS)]
        return sum(c.mean() * reference_sinkhorn(squared_distances(x[c], y[c]), 0.1 * mean) for c in classes)

    value, gradient = value_and_gradient(
        lambda x: gj.class_sinkhorn_distance(x, jnp.asarray(y), jnp.asarray(LABELS), epsilon=0.1, **TO_CONVERGENCE), x
    )
    np.testing.assert_allclose(value, reference(x), rtol=1e-9)
    check_gradient(gradient, reference, x, rtol=1e-5)


def test_classes_of_one_image_and_one_class_of_all_images():
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(9, 6, 6, 3, batch=(2,), shift=0.3))
    one = jnp.broadcast_to(jnp.arange(6)[::-1] - 3, (2, 6))
    value, gradient = jax.value_and_grad(lambda x: (lambda v: (v.sum(), v))(in_classes(x, y, one)), has_aux=True)(x)
    np.testing.assert_allclose(value[1], jnp.mean(jnp.sum((x - y) ** 2, -1), -1), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 / 6 * (x - y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(in_classes(x, x, one), 0.0, atol=1e-30)
    all_equal = jnp.zeros((2, 6), int)
    expected = gj.sinkhorn_distance(x, y, threshold=1e-7, max_iterations=20_000)
    np.testing.assert_allclose(in_classes(x, y, all_equal), expected, rtol=1e-5)


def test_inside_a_class_the_order_is_free_and_across_classes_it_is_not():
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(10, 6, 6, 3, batch=(2,)))
    labels = jnp.asarray([LABELS, LABELS])
    value, health = in_classes(x, y, labels, return_diagnostics=True)
    assert health.marginal_error.shape == (2,) and (health.marginal_error < 1e-5).all()
    np.testing.assert_allclose(in_classes(x, y[:, jnp.array([2, 4, 3, 0, 1, 5])], labels), value, rtol=1e-5)
    assert (abs(in_classes(x, y[:, jnp.array([1, 0, 2, 3, 4, 5])], labels) - value) > 1e-2).all()
    np.testing.assert_allclose(jax.jit(in_classes)(x, y, labels), value, rtol=1e-5)


def reference_weighted(cost, a, b, e):
    """Scaling iterations, not in the log domain, and the primal value."""
    kernel, u, v = np.exp(-cost / e), np.ones(len(a)), np.ones(len(b))
    for _ in range(5000):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    assert abs(plan.sum(1) - a).sum() < 1e-12
    return (plan * cost).sum() + e * scipy.special.xlogy(plan, plan / np.outer(a, b)).sum()


def logits_and_cost(classes=5, batch=()):
    random = np.random.default_rng(11)
    points = random.standard_normal((classes, 3))
    student, teacher = 2.0 * random.standard_normal((2, *batch, classes))
    return student, teacher, squared_distances(points, points)


@pytest.mark.parametrize("label", [None, 2])
def test_logits_against_an_independent_sinkhorn(label):
    student, teacher, cost = logits_and_cost()
    kept = np.arange(5) != label

    def reference(student):
        q, p = (scipy.special.softmax(logits[kept] / 3.0) for logits in (student, teacher))
        return reference_weighted(cost[np.ix_(kept, kept)], q, p, 0.1 * cost.mean())

    value, gradient = value_and_gradient(
        lambda student: gj.wasserstein_logits(
            student, jnp.asarray(teacher), jnp.asarray(cost), labels=None if label is None else jnp.asarray(label),
            temperature=3.0, epsilon=0.1, **TO_CONVERGENCE,
        ),
        student,
    )  # fmt: skip
    np.testing.assert_allclose(value, reference(student), rtol=1e-9)
    np.testing.assert_allclose(gradient, central_difference(reference, student), rtol=1e-6, atol=1e-9)


@jax.jit
def logits_and_gradients(student, teacher, cost):
    def total(*arrays):
        value = gj.wasserstein_logits(*arrays)
        return value.sum(), value

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(student, teacher, cost)


def test_logits_of_certain_networks_cost_what_lies_between_their_classes():
    cost = jnp.asarray(logits_and_cost()[2], jnp.float32)
    certain = 1e4 * (2 * jnp.eye(5) - 1)
    student, teacher = jnp.repeat(certain, 5, axis=0), jnp.tile(certain, (5, 1))
    (_, value), (gradient, _, _) = logits_and_gradients(student, teacher, cost)
    np.testing.assert_allclose(value.reshape(5, 5), cost, rtol=1e-5, atol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("classes", "dtype"), [(2, jnp.float32), (5, jnp.bfloat16)])
def test_logits_extremes(classes, dtype):
    student, teacher, cost = (jnp.asarray(array, dtype) for array in logits_and_cost(classes, (4,)))
    labels = jnp.arange(4) % classes
    gradient_of = jax.jit(
        jax.value_and_grad(lambda s, t, c, labels: gj.wasserstein_logits(s, t, c, labels=labels).sum())
    )
    for scale in (1.0, 0.0, 1e4, -1e4):
        for other in (teacher, student):
            for c in (cost, 0.0 * cost, 1e-20 * cost):
                for given in (labels, None):
                    value, gradient = gradient_of(scale * student, scale * other, c, given)
                    assert value.dtype == jnp.float32 and gradient.dtype == dtype
                    assert np.isfinite(value) and np.isfinite(gradient).all(), (scale, given)
                    assert value >= -1e-4 * float(c.mean() + 1e-30)
    value, gradient = jax.value_and_grad(lambda s: gj.target_cross_entropy(1e4 * s, 1e4 * teacher, labels).sum())(
        student
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_two_classes_without_regularisation_cost_the_difference_of_probabilities():
    student, teacher = jnp.asarray([[1.0, -1.0], [0.0, 2.0]]), jnp.asarray([[0.0, 0.0], [3.0, 0.0]])
    value, health = gj.wasserstein_logits(
        student, teacher, jnp.asarray([[0.0, 5.0], [5.0, 0.0]]), temperature=1.0, epsilon=0.02, return_diagnostics=True
    )
    moved = abs(jax.nn.softmax(student) - jax.nn.softmax(teacher))[:, 0]
    # The regularisation costs at most e times the entropy of the weights, ln 2.
    assert (value >= 5.0 * moved - 1e-3).all() and (value <= 5.0 * moved + 0.02 * 2.5 * np.log(2) + 1e-3).all()
    assert health.converged.all() and health.iterations.shape == (2,)


def test_logits_examples_and_gradients_that_are_not_there():
    student, teacher, cost = (jnp.asarray(array, jnp.float32) for array in logits_and_cost(batch=(2, 3)))
    (_, value), (gradient, to_teacher, to_cost) = logits_and_gradients(student, teacher, cost)
    assert value.shape == (2, 3) and abs(gradient).max() > 1e-3
    np.testing.assert_array_equal(to_teacher, 0.0)
    np.testing.assert_array_equal(to_cost, 0.0)
    (_, swapped), _ = logits_and_gradients(student[::-1], teacher[::-1], cost)
    np.testing.assert_array_equal(swapped, value[::-1])
    np.testing.assert_allclose(gj.wasserstein_logits(student, teacher, cost), value, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="entropic transport"):
        jax.jit(jax.hessian(lambda s: gj.wasserstein_logits(s, teacher[0, 0], cost))).lower(student[0, 0])


@pytest.mark.parametrize("label", [None, 2])
def test_the_derivative_with_respect_to_the_temperature_has_both_networks_in_it(label):
    student, teacher, cost = logits_and_cost()
    kept = np.arange(5) != label

    def reference(temperature):
        q, p = (scipy.special.softmax(logits[kept] / temperature) for logits in (student, teacher))
        return reference_weighted(cost[np.ix_(kept, kept)], q, p, 0.1 * cost.mean())

    with jax.enable_x64(True):
        derivative = jax.jit(
            jax.grad(
                lambda temperature: gj.wasserstein_logits(
                    jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(cost), temperature=temperature,
                    labels=None if label is None else jnp.asarray(label), epsilon=0.1, **TO_CONVERGENCE,
                )
            )
        )(3.0)  # fmt: skip
    expected = (reference(3.0 + 1e-4) - reference(3.0 - 1e-4)) / 2e-4
    np.testing.assert_allclose(derivative, expected, rtol=1e-6)


def weighted(weight):
    return lambda x, y: weight * ((x[:, None] - y[None]) ** 2).sum(-1)


def test_a_cost_that_reads_what_is_differentiated_is_refused_and_not_constant():
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(20, 4, 5, 3))
    distance = lambda w, x: gj.sinkhorn_distance(x, y, cost=weighted(w))  # noqa: E731
    scanned = lambda w: jax.lax.scan(lambda total, _: (total + distance(w, x), None), 0.0, None, length=2)[0]  # noqa: E731
    for differentiated in (
        jax.grad(distance),
        jax.grad(distance, argnums=(0, 1)),
        jax.jit(jax.grad(distance)),
        jax.grad(jax.jit(distance)),
        jax.grad(jax.checkpoint(distance)),
        lambda w, x: jax.vmap(jax.grad(distance), in_axes=(0, None))(w[None], x),
        lambda w, x: jax.grad(lambda w: jax.vmap(distance, in_axes=(0, None))(w[None], x).sum())(w),
        lambda w, x: jax.grad(scanned)(w),
    ):
        with pytest.raises(NotImplementedError, match=r"cost function .*stop_gradient"):
            differentiated(jnp.float32(2.0), x)


def test_a_cost_that_reads_a_constant_has_its_gradient_in_every_transformation():
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(20, 4, 5, 3))
    expected = 2.0 * jax.grad(lambda x: gj.sinkhorn_distance(x, y))(x)

    def distance(w, x):
        return gj.sinkhorn_distance(x * w / 2.0, y * w / 2.0, cost=weighted(jax.lax.stop_gradient(w)))

    constant = lambda w, x: gj.sinkhorn_distance(x, y, cost=weighted(jax.lax.stop_gradient(w)))  # noqa: E731
    two = jnp.float32(2.0)
    batched = lambda w, x: jax.vmap(constant, in_axes=(None, 0))(w, x[None]).sum()  # noqa: E731
    stepped = lambda w, x: jax.lax.scan(lambda w, _: (w, constant(w, x)), w, None, length=1)[1].sum()  # noqa: E731
    branched = lambda w, x: jax.lax.cond(w > 0, constant, lambda w, x: x.sum(), w, x)  # noqa: E731
    for function in (constant, distance, jax.jit(constant), jax.checkpoint(constant), batched, stepped, branched):
        to_weight, gradient = jax.grad(function, argnums=(0, 1))(two, x)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
        assert function is distance or to_weight == 0.0
        np.testing.assert_allclose(jax.jit(jax.grad(function, argnums=1))(two, x), gradient, rtol=1e-3, atol=1e-5)
    _, tangent = jax.jvp(stepped, (two, x), (two, x))
    np.testing.assert_allclose(tangent, (expected * x).sum(), rtol=1e-3)


def test_the_minimum_over_the_student_is_near_the_teacher():
    _, teacher, cost = (jnp.asarray(array, jnp.float32) for array in logits_and_cost())
    loss = jax.grad(lambda s: gj.wasserstein_logits(s, teacher, cost, threshold=1e-6))
    found = jax.jit(lambda s: jax.lax.fori_loop(0, 300, lambda _, s: s - 0.5 * loss(s), s))(jnp.zeros(5))
    found, wanted = jax.nn.softmax(found / 2.0), jax.nn.softmax(teacher / 2.0)
    assert abs(found - wanted).sum() < 0.1 < abs(0.2 - wanted).sum()


def test_ten_iterations_fade_near_the_teacher_where_convergence_does_not():
    """The table of docs/wasserstein.md: gradients of WKD-L here, and of its reference code at the same costs."""
    classes, temperature, random = 100, 8.0, np.random.default_rng(0)
    means = random.standard_normal((classes, 64)) + random.standard_normal((20, 64))[np.arange(classes) // 5]
    cost = gj.class_distances(jnp.asarray(means, jnp.float32))
    labels = random.integers(0, classes, 64)
    teacher = 2.0 * random.standard_normal((64, classes)) + 6.0 * (1.0 - np.asarray(cost, np.float64))[labels]
    teacher = jnp.asarray(teacher, jnp.float32)

    def ten_iterations(student, teacher, label):
        is_other = jnp.arange(classes) != label
        q, p = (jax.nn.softmax(jnp.where(is_other, z / temperature, -jnp.inf)) for z in (student, teacher))
        kernel = jnp.exp(-(cost + 1e-8) / 0.05)

        def step(pair, _):
            v = p / (kernel.T @ pair[0] + 1e-8)
            return (q / (kernel @ v + 1e-8), v), None

        (u, v), _ = jax.lax.scan(step, (is_other / (classes - 1.0), q), length=10)
        return u @ ((kernel * cost) @ v)

    def converged(student, teacher, labels):
        return gj.wasserstein_logits(student, teacher, cost, labels=labels, temperature=temperature)

    batched = jax.vmap(ten_iterations), converged
    theirs, ours = (jax.jit(jax.grad(lambda *arrays, loss=loss: loss(*arrays).sum())) for loss in batched)
    students = [teacher + size * random.standard_normal(teacher.shape).astype(np.float32) for size in (0.01, 0.1, 1, 3)]
    students.append(0.1 * random.standard_normal(teacher.shape).astype(np.float32))
    for student, ratio, cosine in zip(
        students, (3.9, 28, 2.3, 0.64, 0.71), (0.71, 0.45, 0.60, 0.88, 0.78), strict=True
    ):
        a, b = (np.asarray(gradient(student, teacher, labels)) for gradient in (ours, theirs))
        norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        assert norms[0].mean() / norms[1].mean() == pytest.approx(ratio, rel=0.02)
        assert ((a * b).sum(1) / (norms[0] * norms[1])).mean() == pytest.approx(cosine, abs=0.01)


X, L, C = jnp.zeros((2, 4, 3)), jnp.zeros((2, 4), int), jnp.ones((3, 3))
ILLEGAL = [
    (lambda: gj.sinkhorn_distance(X, X, cost="manhattan"), "cost must be .*, got 'manhattan'"),
    (lambda: gj.sinkhorn_distance(X, X, cost=lambda x, y: x), r"cost must return .*\(4, 4\), got \(4, 3\)"),
    (lambda: gj.sinkhorn_distance(X, X, cost=lambda x, y: (x, y)), r"cost must return .*\(4, 4\), got None"),
    (lambda: gj.sinkhorn_distance(X, X, marginal_penalty=0.0), "marginal_penalty must be a positive .*, got 0.0"),
    (lambda: gj.class_sinkhorn_distance(X, X, L[:, :3]), r"x, y and labels must .* and \(2, 3\)"),
    (lambda: gj.class_sinkhorn_distance(X, X[:, :3], L), r"x, y and labels must .*\(2, 3, 3\) and \(2, 4\)"),
    (lambda: gj.class_sinkhorn_distance(X[:, :0], X[:, :0], L[:, :0]), r"x must be .*, not empty, got .*\(2, 0, 3\)"),
    (lambda: gj.class_sinkhorn_distance(X, X, L, epsilon=-1.0), "epsilon must be a positive .*, got -1.0"),
    (lambda: gj.wasserstein_logits(X, X[:, :3], C), r"student_logits and teacher_logits must .*\(2, 3, 3\)"),
    (lambda: gj.wasserstein_logits(X[..., :1], X[..., :1], C[:1, :1]), r"at least two classes, got \(2, 4, 1\)"),
    (lambda: gj.wasserstein_logits(X, X, C[:2]), r"class_cost must have .*\(3, 3\), got \(2, 3\)"),
    (lambda: gj.wasserstein_logits(X, X, C, labels=L[0]), r"labels must have .*got \(4,\)"),
    (lambda: gj.wasserstein_logits(X, X, C, temperature=0.0), "temperature must be a positive .*, got 0.0"),
    (lambda: gj.wasserstein_logits(X, X, C, epsilon=0.0), "epsilon must be a positive .*, got 0.0"),
    (lambda: gj.wasserstein_logits(X, X, C, threshold=0.0), "threshold must be a positive .*, got 0.0"),
    (lambda: gj.wasserstein_logits(X, X, C, max_iterations=0), "max_iterations must be a positive integer, got 0"),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    refused_before_tracing(call, message)
