"""Transport against an independent float64 Sinkhorn, exact linear programs, closed forms and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from helpers import central_difference as central_difference_of
from helpers import refused_before_tracing

import gompertz_jax as gj
from gompertz_jax.losses import _sinkhorn

sinkhorn_and_gradient = jax.value_and_grad(
    lambda x, y, epsilon, **options: gj.sinkhorn_distance(x, y, epsilon=epsilon, **options).sum()
)
TO_CONVERGENCE = {"threshold": 1e-12, "max_iterations": 20_000}

central_difference = partial(central_difference_of, h=1e-5)


def clouds(seed, n, m, d, batch=(), shift=0.0):
    random = np.random.default_rng(seed)
    return random.standard_normal((*batch, n, d)) + shift, random.standard_normal((*batch, m, d))


def squared_distances(x, y):
    return ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def reference_sinkhorn(cost, e):
    """Minimum of <P, C> + e KL(P || ab) in float64, read off the plan.

    Sinkhorn in the log domain, and then Newton's method on the dual, because the last digits can take Sinkhorn 1e5
    iterations.
    """
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(300):
        g = -e * (scipy.special.logsumexp((f[:, None] - cost) / e, axis=0) - np.log(n))
        f = -e * (scipy.special.logsumexp((g[None, :] - cost) / e, axis=1) - np.log(m))

    def plan_at(f, g):
        plan = np.exp((f[:, None] + g[None, :] - cost) / e) / (n * m)
        return plan, np.concatenate([1 / n - plan.sum(1), 1 / m - plan.sum(0)])

    plan, residual = plan_at(f, g)
    while abs(residual).sum() > 1e-13:
        hessian = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]]) / e
        step = np.linalg.lstsq(hessian, residual, rcond=1e-12)[0]  # a constant moved from f to g changes nothing
        length = 1.0
        while length > 1e-3:
            new_f, new_g = f + length * step[:n], g + length * step[n:]
            plan, new_residual = plan_at(new_f, new_g)
            if abs(new_residual).sum() < abs(residual).sum():
                break
            length /= 2
        else:
            break
        f, g, residual = new_f, new_g, new_residual
    plan, residual = plan_at(f, g)
    assert abs(residual).sum() < 1e-11, "the reference did not converge"
    return (plan * cost).sum() + (plan * (f[:, None] + g[None, :] - cost)).sum()


def exact_transport(cost):
    """The linear program without regularisation: its value and its plan."""
    n, m = cost.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    solution = scipy.optimize.linprog(
        cost.ravel(),
        A_eq=np.concatenate([rows, columns]),
        b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]),
        method="highs",
    )
    assert solution.status == 0
    return solution.fun, solution.x.reshape(n, m)


# Between clouds of the same size, Sinkhorn needs 1e5 iterations for the last digits from epsilon = .02 down.
@pytest.mark.parametrize(
    ("n", "m", "d", "epsilon"), [(5, 6, 3, 1.0), (5, 6, 3, 0.05), (5, 6, 3, 0.01), (9, 9, 3, 1.0), (9, 9, 3, 0.05)]
)
def test_value_is_that_of_an_independent_sinkhorn(n, m, d, epsilon):
    x, y = clouds(0, n, m, d, shift=0.5)
    cost = squared_distances(x, y)
    expected = reference_sinkhorn(cost, epsilon * cost.mean())
    np.testing.assert_allclose(
        gj.sinkhorn_distance(jnp.asarray(x), jnp.asarray(y), epsilon=epsilon), expected, rtol=1e-4
    )
    with jax.enable_x64(True):
        value = gj.sinkhorn_distance(jnp.asarray(x), jnp.asarray(y), epsilon=epsilon, **TO_CONVERGENCE)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-10)


@pytest.mark.parametrize("epsilon", [0.3, 0.02])
def test_debiased_value_is_the_divergence_at_one_regularisation(epsilon):
    x, y = clouds(1, 5, 6, 3, shift=1.0)
    cost = squared_distances(x, y)
    e = epsilon * cost.mean()
    expected = reference_sinkhorn(cost, e) - 0.5 * (
        reference_sinkhorn(squared_distances(x, x), e) + reference_sinkhorn(squared_distances(y, y), e)
    )
    with jax.enable_x64(True):
        value = gj.sinkhorn_distance(jnp.asarray(x), jnp.asarray(y), epsilon=epsilon, debiased=True, **TO_CONVERGENCE)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_gradient_against_finite_differences_at_fixed_regularisation(debiased):
    x, y = clouds(2, 5, 6, 3, shift=0.3)
    epsilon = 0.3
    e = epsilon * squared_distances(x, y).mean()

    def reference(x):
        self_term = 0.5 * reference_sinkhorn(squared_distances(x, x), e) if debiased else 0.0
        return reference_sinkhorn(squared_distances(x, y), e) - self_term

    expected = central_difference(reference, x)
    with jax.enable_x64(True):
        _, gradient = sinkhorn_and_gradient(
            jnp.asarray(x), jnp.asarray(y), epsilon, debiased=debiased, **TO_CONVERGENCE
        )
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
    # The defaults: single precision and a threshold of 1e-3.
    _, gradient = sinkhorn_and_gradient(jnp.asarray(x), jnp.asarray(y), epsilon, debiased=debiased)
    np.testing.assert_allclose(gradient, expected, rtol=0.02, atol=2e-3)


def test_teacher_and_epsilon_receive_no_gradient():
    x, y = (jnp.asarray(cloud) for cloud in clouds(3, 5, 6, 3))
    for debiased in (False, True):
        to_y, to_epsilon = jax.grad(
            partial(
                lambda debiased, y, epsilon: gj.sinkhorn_distance(x, y, epsilon=epsilon, debiased=debiased), debiased
            ),
            argnums=(0, 1),
        )(y, 0.05)
        np.testing.assert_array_equal(to_y, 0.0)
        assert to_epsilon == 0.0


@pytest.mark.parametrize(("n", "m"), [(9, 9), (5, 6)])
def test_converges_to_the_exact_linear_program_from_above(n, m):
    x, y = clouds(4, n, m, 3)
    cost = squared_distances(x, y)
    exact, plan = exact_transport(cost)
    if n == m:
        rows, columns = scipy.optimize.linear_sum_assignment(cost)
        np.testing.assert_allclose(exact, cost[rows, columns].mean(), rtol=1e-9)
    divergence = scipy.special.xlogy(plan, plan * n * m).sum()
    previous = np.inf
    with jax.enable_x64(True):
        for epsilon in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
            value = float(
                gj.sinkhorn_distance(
                    jnp.asarray(x), jnp.asarray(y), epsilon=epsilon, threshold=1e-9, max_iterations=100_000
                )
            )
            # The optimal plan of the linear program is admissible, so it bounds the regularised value from above.
            assert exact - 1e-9 <= value <= exact + epsilon * cost.mean() * divergence + 1e-9
            assert value < previous
            previous = value
    assert previous - exact < 0.02 * exact


def test_closed_forms():
    # One point on either side: the plan is the product, and its divergence 0.
    x, y = clouds(5, 1, 6, 4)
    expected = squared_distances(x, y).mean()
    np.testing.assert_allclose(gj.sinkhorn_distance(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-6)
    # Two points against themselves: by symmetry the plan is [[p, q], [q, p]] / 2 with p = sigmoid(C / e).
    two = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    cost, epsilon = 25.0, 0.7
    e = epsilon * cost / 2
    p = scipy.special.expit(cost / e)
    entropic = scipy.special.xlogy(p, 2 * p) + scipy.special.xlogy(1 - p, 2 * (1 - p))
    expected = (1 - p) * cost + e * entropic
    np.testing.assert_allclose(gj.sinkhorn_distance(two, two, epsilon=epsilon), expected, rtol=1e-6)


def test_a_shift_of_the_whole_cloud_costs_its_square():
    # Debiased, W(x, x + v) = |v|^2 exactly, with the gradient -2 v / n at every point; at any distance from the origin.
    x, _ = clouds(6, 9, 9, 3)
    v = np.array([1.0, -2.0, 0.5])
    for offset in (0.0, 100.0):
        value, gradient = sinkhorn_and_gradient(
            jnp.asarray(x + offset), jnp.asarray(x + offset + v), 0.05, debiased=True
        )
        np.testing.assert_allclose(value, 5.25, rtol=1e-4)
        np.testing.assert_allclose(gradient, np.broadcast_to(-2 * v / 9, (9, 3)), atol=2e-3)


def test_a_shift_common_to_both_clouds_changes_nothing():
    # multiples of 1/64, which float32 holds at 1e4 too
    x, y = (np.round(64 * cloud) / 64 for cloud in clouds(19, 7, 8, 3))
    shift = np.array([1e4, -1e4, 5e3])
    cost = squared_distances(x, y)
    expected = reference_sinkhorn(cost, 0.1 * cost.mean())
    here, gradient = sinkhorn_and_gradient(jnp.asarray(x), jnp.asarray(y), 0.1)
    there, gradient_there = sinkhorn_and_gradient(jnp.asarray(x + shift), jnp.asarray(y + shift), 0.1)
    np.testing.assert_allclose([here, there], expected, rtol=1e-4)
    np.testing.assert_allclose(there, here, rtol=1e-5)
    np.testing.assert_allclose(gradient_there, gradient, rtol=1e-3, atol=1e-5)


def test_epsilon_is_floored_at_64_machine_epsilons():
    x, y = (jnp.asarray(cloud, jnp.float32) for cloud in clouds(20, 6, 7, 3))
    floor = 64 * np.finfo(np.float32).eps
    at = partial(gj.sinkhorn_distance, x, y, return_diagnostics=True, max_iterations=100)
    results = {factor: at(epsilon=factor * floor) for factor in (1e-4, 1.0, 1.5)}
    for found, wanted in zip(jax.tree.leaves(results[1e-4]), jax.tree.leaves(results[1.0]), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert results[1.5][1].marginal_error != results[1.0][1].marginal_error


def test_debiased_divergence_of_equal_clouds_is_zero():
    x, _ = clouds(7, 9, 9, 3)
    value, gradient = sinkhorn_and_gradient(jnp.asarray(x), jnp.asarray(x), 0.05, debiased=True)
    plain = gj.sinkhorn_distance(jnp.asarray(x), jnp.asarray(x))
    assert (plain > 0.1).all()
    assert abs(value) < 1e-4 * plain.sum()
    assert abs(gradient).max() < 1e-3


def test_order_of_the_points_does_not_matter():
    x, y = clouds(8, 5, 6, 3)
    value, gradient = sinkhorn_and_gradient(jnp.asarray(x), jnp.asarray(y), 0.05)
    order = np.random.default_rng(9).permutation(5)
    permuted, permuted_gradient = sinkhorn_and_gradient(jnp.asarray(x[order]), jnp.asarray(y[::-1].copy()), 0.05)
    np.testing.assert_allclose(permuted, value, rtol=1e-5)
    np.testing.assert_allclose(permuted_gradient, gradient[order], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_epsilon_is_relative_to_the_cost(scale):
    x, y = clouds(10, 5, 6, 3)
    value, gradient = sinkhorn_and_gradient(jnp.asarray(scale * x), jnp.asarray(scale * y), 0.05)
    cost = squared_distances(x, y)
    np.testing.assert_allclose(value / scale**2, reference_sinkhorn(cost, 0.05 * cost.mean()), rtol=1e-4)
    _, unscaled = sinkhorn_and_gradient(jnp.asarray(x), jnp.asarray(y), 0.05)
    np.testing.assert_allclose(gradient / scale, unscaled, rtol=1e-3, atol=1e-5)


def test_examples_do_not_know_of_each_other():
    x, y = (jnp.asarray(cloud) for cloud in clouds(11, 5, 6, 3, batch=(2, 3)))
    y = y.at[1, 2].mul(10.0)
    together = gj.sinkhorn_distance(x, y, epsilon=0.02)
    assert together.shape == (2, 3)
    alone = [[gj.sinkhorn_distance(x[i, j], y[i, j], epsilon=0.02) for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(gj.sinkhorn_distance(x[:1, 1:2], y[:1, 1:2], epsilon=0.02), together[:1, 1:2])


def test_both_ways_to_batch_agree():
    # The way of the accelerators, which a CPU never takes by itself.
    cost = jnp.asarray(np.random.default_rng(12).uniform(0.0, 2.0, (5, 7, 6)), jnp.float32)
    weights = jnp.full((5, 7), 1 / 7), jnp.full((5, 6), 1 / 6)
    solver = _sinkhorn.Sinkhorn(threshold=1e-3, inner_iterations=5, max_iterations=100)
    iterate = partial(_sinkhorn._balanced, solver, jnp.float32(0.02))
    in_turn = jax.jit(partial(_sinkhorn._in_turn, iterate))(cost, *weights)
    in_lockstep = jax.jit(partial(_sinkhorn._in_lockstep, iterate))(cost, *weights)
    for one, other in zip(in_turn, in_lockstep, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    x, y = (jnp.asarray(cloud) for cloud in clouds(13, 5, 6, 3, batch=(2,)))
    lowered = jax.jit(jax.grad(lambda x: gj.sinkhorn_distance(x, y).sum())).trace(x).lower(lowering_platforms=("cuda",))
    assert "while" in lowered.as_text()


def test_jit_vmap_scan_remat_and_forward_mode_agree():
    x, y = (jnp.asarray(cloud) for cloud in clouds(14, 5, 6, 3, batch=(3,)))
    distance = lambda x: gj.sinkhorn_distance(x, y)  # noqa: E731
    value, gradient = distance(x), jax.grad(lambda x: distance(x).sum())(x)
    np.testing.assert_allclose(jax.jit(distance)(x), value, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: distance(x).sum()))(x), gradient, rtol=1e-4, atol=1e-6)
    mapped = jax.vmap(jax.grad(gj.sinkhorn_distance))(x, y)
    np.testing.assert_allclose(mapped, gradient, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: jax.checkpoint(distance)(x).sum())(x), gradient, rtol=1e-4, atol=1e-6)
    scanned = jax.grad(
        lambda x: jax.lax.scan(lambda total, _: (total + distance(x).sum(), None), 0.0, None, length=2)[0]
    )(x)
    np.testing.assert_allclose(scanned, 2 * gradient, rtol=1e-4, atol=1e-6)
    direction = jnp.asarray(np.random.default_rng(15).standard_normal(x.shape), x.dtype)
    _, tangent = jax.jvp(distance, (x,), (direction,))
    np.testing.assert_allclose(tangent, (gradient * direction).sum((1, 2)), rtol=1e-3, atol=1e-5)


def test_epsilon_from_a_schedule():
    x, y = (jnp.asarray(cloud) for cloud in clouds(16, 5, 6, 3))
    schedule = gj.linear_schedule(10, start=0.1, end=0.0)
    value = jax.jit(lambda step: gj.sinkhorn_distance(x, y, epsilon=schedule(step)))(5)
    np.testing.assert_allclose(value, gj.sinkhorn_distance(x, y, epsilon=0.05), rtol=1e-5)


def test_second_derivatives_raise():
    x, y = (jnp.asarray(cloud) for cloud in clouds(17, 5, 6, 3))
    distance = lambda x: gj.sinkhorn_distance(x, y)  # noqa: E731
    for twice in (
        lambda: jax.grad(lambda x: (jax.grad(distance)(x) ** 2).sum())(x),
        lambda: jax.hessian(distance)(x),
        lambda: jax.jvp(jax.grad(distance), (x,), (x,)),
        lambda: jax.grad(lambda x: jax.lax.scan(lambda x, _: (x - jax.grad(distance)(x), None), x, None, 2)[0].sum())(
            x
        ),
    ):
        with pytest.raises(NotImplementedError, match="second derivatives of sinkhorn_distance"):
            twice()
    # What the gradient is multiplied with may be differentiated.
    gradient = jax.grad(distance)(x)
    derivative = jax.grad(lambda s: (jax.grad(lambda x: s * distance(x))(x) ** 2).sum())(2.0)
    np.testing.assert_allclose(derivative, 4 * (gradient**2).sum(), rtol=1e-5)


def test_diagnostics():
    x, y = (jnp.asarray(cloud) for cloud in clouds(18, 5, 6, 3, batch=(3,)))
    value, diagnostics = gj.sinkhorn_distance(x, y, epsilon=0.02, return_diagnostics=True)
    np.testing.assert_array_equal(value, gj.sinkhorn_distance(x, y, epsilon=0.02))
    assert isinstance(diagnostics, gj.SinkhornDiagnostics)
    assert diagnostics.converged.all() and diagnostics.converged.shape == (3,)
    assert (diagnostics.marginal_error < 1.1e-3).all() and (diagnostics.marginal_error > 0).all()
    assert ((diagnostics.iterations >= 5) & (diagnostics.iterations < 1000)).all()
    _, strict = gj.sinkhorn_distance(x, y, epsilon=0.02, threshold=1e-5, return_diagnostics=True)
    assert (strict.iterations > diagnostics.iterations).all() and (strict.marginal_error < 1.1e-5).all()
    stopped, gave_up = gj.sinkhorn_distance(x, y, epsilon=0.02, max_iterations=3, return_diagnostics=True)
    assert not gave_up.converged.any() and (gave_up.iterations == 3).all() and (gave_up.marginal_error > 1e-3).all()
    assert (stopped <= value).all()
    _, worst = gj.sinkhorn_distance(x, y, epsilon=0.02, debiased=True, return_diagnostics=True)
    assert worst.converged.all() and (worst.iterations >= diagnostics.iterations).all()
    # The auxiliary output does not disturb the derivative.
    gradient, _ = jax.grad(
        lambda x: (lambda v, aux: (v.sum(), aux))(*gj.sinkhorn_distance(x, y, return_diagnostics=True)), has_aux=True
    )(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: gj.sinkhorn_distance(x, y).sum())(x), rtol=1e-4, atol=1e-6)


def test_the_default_converges_on_maps_like_those_of_a_network():
    random = np.random.default_rng(19)
    # 16 positions that vary smoothly in 32 channels of decaying scale, rectified: far from Gaussian
    maps = np.maximum(random.standard_normal((2, 32, 16, 32)).cumsum(-2), 0.0) * np.exp(-np.arange(32) / 8.0)
    for epsilon in (0.05, 0.01):
        _, diagnostics = gj.sinkhorn_distance(
            *jnp.asarray(maps), epsilon=epsilon, debiased=True, return_diagnostics=True
        )
        assert diagnostics.converged.all()


POINT, CLOUD = np.ones((1, 3)), np.random.default_rng(20).standard_normal((9, 3))
CONSTANT, FIRST = np.ones((9, 3)), np.arange(9)[:, None] == 0
EXTREMES = {
    "equal": (CLOUD, CLOUD),
    "all in one point": (CONSTANT, CONSTANT),
    "all at the origin": (0.0 * CONSTANT, 0.0 * CONSTANT),
    "constant against varied": (CONSTANT, CLOUD),
    "varied against constant": (CLOUD, CONSTANT),
    "one point each": (POINT, 2.0 * POINT),
    "one equal point each": (POINT, POINT),
    "one dimension": (CLOUD[:, :1], CLOUD[::-1, :1] + 1.0),
    "one constant dimension": (CLOUD * [1.0, 0.0, 1.0], CLOUD[::-1] * [2.0, 1.0, 0.0]),
    "scale of 1e4": (1e4 * CLOUD, 1e4 * CLOUD[::-1] + 1.0),
    "scale of 1e-20": (1e-20 * CLOUD, 1e-20 * CLOUD + 1e-20),
    "far from the origin": (CLOUD + 1e4, CLOUD - 1e4),
    "scales of 1e4 and 1e-4": (1e4 * CLOUD, 1e-4 * CLOUD),
    "one outlier": (np.where(FIRST, 1e4, 1.0) * CLOUD, CLOUD),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_give_finite_values_and_gradients(name, dtype):
    x, y = (jnp.asarray(cloud, dtype)[None] for cloud in EXTREMES[name])  # a batch of one
    for epsilon, debiased in ((0.05, False), (0.05, True), (1e-30, False), (1e30, True)):
        value, gradient = sinkhorn_and_gradient(x, y, epsilon, debiased=debiased)
        assert value.dtype == jnp.float32 and gradient.dtype == dtype
        assert np.isfinite(value) and np.isfinite(gradient).all(), (epsilon, debiased)
    assert gj.sinkhorn_distance(x, y).dtype == jnp.float32


def test_zero_cost_is_zero():
    x = jnp.ones((9, 3))
    for debiased in (False, True):
        value, gradient = sinkhorn_and_gradient(x, x, 0.05, debiased=debiased)
        np.testing.assert_allclose(value, 0.0, atol=1e-30)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_clouds_are_raised_before_anything_is_computed(dtype):
    x, y = (jnp.asarray(cloud, dtype) for cloud in clouds(21, 9, 9, 3))
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    expected = gj.sinkhorn_distance(wide_x, wide_y)
    np.testing.assert_array_equal(gj.sinkhorn_distance(x, y), expected)
    np.testing.assert_array_equal(gj.sinkhorn_distance(x, wide_y), expected)


X = jnp.zeros((2, 4, 3))
ILLEGAL = [
    (lambda: gj.sinkhorn_distance(X, X, epsilon=0.0), "epsilon must be a positive .*, got 0.0"),
    (lambda: gj.sinkhorn_distance(X, X, epsilon=-0.05), "epsilon must be a positive .*, got -0.05"),
    (lambda: gj.sinkhorn_distance(X, X, epsilon=float("nan")), "epsilon must be a positive .*, got nan"),
    (lambda: gj.sinkhorn_distance(X, X, epsilon=jnp.ones(2)), r"epsilon must be .*, got an array of shape \(2,\)"),
    (lambda: gj.sinkhorn_distance(X, X, threshold=0.0), "threshold must be a positive .*, got 0.0"),
    (lambda: gj.sinkhorn_distance(X, X, max_iterations=0), "max_iterations must be a positive integer, got 0"),
    (lambda: gj.sinkhorn_distance(X, X[:, :, :2]), r"x and y must have the shapes .*, got \(2, 4, 3\) and \(2, 4, 2\)"),
    (lambda: gj.sinkhorn_distance(X, X[:1]), r"x and y must have the shapes .*, got \(2, 4, 3\) and \(1, 4, 3\)"),
    (lambda: gj.sinkhorn_distance(X, X[0]), r"x and y must have the shapes .*, got \(2, 4, 3\) and \(4, 3\)"),
    (lambda: gj.sinkhorn_distance(X[:, :0], X), r"x must be .*, not empty, got .*\(2, 0, 3\)"),
    (lambda: gj.sinkhorn_distance(X, X[:, :0]), r"y must be .*, not empty, got .*\(2, 0, 3\)"),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    refused_before_tracing(call, message)


@pytest.mark.parametrize("noise", [0.5, 0.3, 0.1])
def test_what_a_looser_threshold_costs_where_clouds_are_near(noise):
    """At .01, on maps that differ by noise: the value within 3e-4 and the gradient within 1 % of the limit."""
    rng = np.random.default_rng(0)
    coarse = np.repeat(np.repeat(rng.normal(size=(8, 4, 4, 64)), 2, axis=1), 2, axis=2)
    y = np.maximum(coarse + 0.3 * rng.normal(size=(8, 8, 8, 64)), 0).reshape(8, 64, 64)
    x = y + noise * rng.normal(size=y.shape)

    def solved(threshold):
        distance = partial(gj.sinkhorn_distance, y=jnp.float32(y), threshold=threshold, max_iterations=5000)
        return jax.jit(jax.value_and_grad(lambda x: distance(x).sum()))(jnp.float32(x))

    (value, gradient), (limit, exact) = solved(1e-2), solved(1e-5)
    np.testing.assert_allclose(value, limit, rtol=3e-4)
    assert np.linalg.norm(gradient - exact) < 0.01 * np.linalg.norm(exact)
