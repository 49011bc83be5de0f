"""Wasserstein distances in closed form against their formulas in float64 NumPy, exact assignments and extremes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from helpers import refused_before_tracing
from test_transport import value_and_gradient
from test_wasserstein import EXTREMES, central_difference, clouds, squared_distances

import gompertz_jax as gj

KEY = jax.random.key(3)
# Compiled once per shape and dtype: that eager evaluation agrees is tested below.
gaussian_and_gradient = jax.jit(jax.value_and_grad(lambda x, y: gj.gaussian_wasserstein(x, y).sum()))
sliced_and_gradient = jax.jit(jax.value_and_grad(lambda x, y: gj.sliced_wasserstein(x, y, key=KEY).sum()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_give_finite_values_and_gradients(name, dtype):
    x, y = (jnp.asarray(cloud, dtype)[None] for cloud in EXTREMES[name])  # a batch of one
    wide_x, wide_y = np.asarray(x[0], np.float64), np.asarray(y[0], np.float64)
    value, gradient = gaussian_and_gradient(x, y)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(value, reference_gaussian(wide_x, wide_y), rtol=1e-3, atol=1e-6)
    value, gradient = sliced_and_gradient(x, y)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_clouds_are_raised_before_anything_is_computed(dtype):
    x, y = (jnp.asarray(cloud, dtype) for cloud in clouds(21, 9, 9, 3))
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    for distance in (gj.gaussian_wasserstein, lambda x, y: gj.sliced_wasserstein(x, y, key=KEY)):
        np.testing.assert_array_equal(distance(x, y), distance(wide_x, wide_y))
        np.testing.assert_array_equal(distance(x, wide_y), distance(wide_x, wide_y))


def reference_gaussian(x, y):
    means = x.mean(-2) - y.mean(-2)
    deviations = x.std(-2) - y.std(-2)
    return (means**2 + deviations**2).sum(-1)


def test_the_teacher_receives_no_gradient():
    x, _ = (jnp.asarray(cloud) for cloud in clouds(3, 5, 6, 3))
    for distance in (gj.gaussian_wasserstein, lambda x, y: gj.sliced_wasserstein(x, y, key=KEY)):
        np.testing.assert_array_equal(jax.grad(distance, argnums=1)(x, x + 1.0), 0.0)


def test_gaussian_is_the_formula():
    x, y = clouds(22, 9, 9, 4, batch=(2, 3), shift=0.7)
    y = 1.7 * y
    expected = reference_gaussian(x, y)
    value = gj.gaussian_wasserstein(jnp.asarray(x), jnp.asarray(y))
    assert value.shape == (2, 3) and value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(lambda x: gj.gaussian_wasserstein(x, jnp.asarray(y[0, 0]))))(
            jnp.asarray(x[0, 0])
        )
    np.testing.assert_allclose(value, expected[0, 0], rtol=1e-12)
    difference = central_difference(lambda x: reference_gaussian(x, y[0, 0]), x[0, 0])
    np.testing.assert_allclose(gradient, difference, rtol=1e-7, atol=1e-9)


def test_gaussian_is_the_general_formula_for_diagonal_covariances():
    # |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), with the matrix square root
    x, y = clouds(23, 50, 50, 3, shift=1.0)
    first, second = np.diag(x.var(0)), np.diag(y.var(0))
    root = np.diag(x.std(0))
    cross = scipy.linalg.sqrtm(root @ second @ root)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * cross.real)
    np.testing.assert_allclose(gj.gaussian_wasserstein(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-5)


def test_gaussian_with_a_constant_dimension_still_pulls_the_others_and_the_mean():
    x = jnp.asarray([[1.0, 0.0], [1.0, 2.0]])
    y = jnp.asarray([[0.0, 0.0], [4.0, 0.0]])
    value, gradient = jax.value_and_grad(gj.gaussian_wasserstein)(x, y)
    # means 1, 1 and 2, 0; deviations 0, 1 and 2, 0
    np.testing.assert_allclose(value, 1.0 + 1.0 + 4.0 + 1.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1.0, 1.0 - 1.0], [-1.0, 1.0 + 1.0]], rtol=1e-6, atol=1e-6)


def test_sliced_is_the_formula_on_the_same_directions():
    x, y = clouds(24, 11, 11, 5, batch=(2, 3), shift=0.4)
    with jax.enable_x64(True):
        directions = np.asarray(jax.random.normal(KEY, (7, 5), jnp.float64))
        value, gradient = jax.jit(
            jax.value_and_grad(
                lambda x: (lambda v: (v.sum(), v))(
                    gj.sliced_wasserstein(x, jnp.asarray(y), key=KEY, num_projections=7)
                ),
                has_aux=True,
            )
        )(jnp.asarray(x))
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)

    def reference(x):
        projected_x, projected_y = (np.sort(cloud @ directions.T, axis=-2) for cloud in (x, y))
        return ((projected_x - projected_y) ** 2).mean((-2, -1))

    np.testing.assert_allclose(value[1], reference(x), rtol=1e-12)
    difference = central_difference(lambda x: reference(x).sum(), x)
    np.testing.assert_allclose(gradient, difference, rtol=1e-6, atol=1e-9)


def test_sliced_in_one_dimension_is_exact_transport():
    x, y = clouds(25, 12, 12, 1, shift=1.0)
    rows, columns = scipy.optimize.linear_sum_assignment(squared_distances(x, y))
    expected = squared_distances(x, y)[rows, columns].mean()
    for seed in range(3):
        value = gj.sliced_wasserstein(jnp.asarray(x), jnp.asarray(y), key=jax.random.key(seed), num_projections=2)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    order = np.random.default_rng(26).permutation(12)
    np.testing.assert_allclose(
        gj.sliced_wasserstein(jnp.asarray(x[order]), jnp.asarray(y), key=KEY), expected, rtol=1e-5
    )


def test_sliced_of_a_shift_is_its_square_over_the_dimension_on_average():
    x, _ = clouds(27, 5, 5, 4)
    v = np.array([3.0, 0.0, 4.0, 0.0])
    # a projection is |v|^2 Beta(1/2, 3/2): mean 1/4, standard deviation .25; 4 standard errors of 4096 directions
    value = gj.sliced_wasserstein(jnp.asarray(x), jnp.asarray(x + v), key=KEY, num_projections=4096)
    np.testing.assert_allclose(value, 25.0 / 4.0, atol=4 * 25.0 * 0.25 / 64)


def test_closed_forms_under_jit_and_vmap():
    x, y = (jnp.asarray(cloud) for cloud in clouds(28, 6, 6, 3, batch=(4,)))
    for distance in (gj.gaussian_wasserstein, lambda x, y: gj.sliced_wasserstein(x, y, key=KEY)):
        eager = distance(x, y)
        np.testing.assert_allclose(jax.jit(distance)(x, y), eager, rtol=1e-5)
        np.testing.assert_allclose(jax.vmap(distance)(x, y), eager, rtol=1e-5)


def reference_gaussians(student, teacher, weight, grid):
    def moments(maps, i, j):
        height, width = maps.shape[1:3]
        rows = slice(int(np.floor(i * height / grid)), int(np.ceil((i + 1) * height / grid)))
        columns = slice(int(np.floor(j * width / grid)), int(np.ceil((j + 1) * width / grid)))
        return maps[:, rows, columns].mean((1, 2)), maps[:, rows, columns].std((1, 2))

    total = np.zeros(len(student))
    for i in range(grid):
        for j in range(grid):
            (mean, deviation), (mean_t, deviation_t) = moments(student, i, j), moments(teacher, i, j)
            total += (weight * (mean - mean_t) ** 2 + (deviation - deviation_t) ** 2).sum(-1) / grid**2
    return total


@pytest.mark.parametrize("grid", [1, 3])
def test_gaussians_of_maps_are_the_formula(grid):
    random = np.random.default_rng(13)
    student, teacher = random.standard_normal((2, 5, 4, 3)), 2.0 * random.standard_normal((2, 3, 6, 3)) + 0.5
    distance = partial(gj.wasserstein_gaussians, mean_weight=2.5, grid=grid)
    value, gradient = value_and_gradient(lambda s: distance(s, jnp.asarray(teacher)), student)
    reference = lambda s: reference_gaussians(s, teacher, 2.5, grid)  # noqa: E731
    np.testing.assert_allclose(value, reference(student).sum(), rtol=1e-12)
    np.testing.assert_allclose(
        gradient, central_difference(lambda s: reference(s).sum(), student), rtol=1e-5, atol=1e-8
    )
    student, teacher = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    np.testing.assert_allclose(distance(student, teacher), reference(np.asarray(student)), rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda t: distance(student, t).sum())(teacher), 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gaussians_of_maps_extremes(dtype):
    maps = jnp.asarray(np.random.default_rng(14).standard_normal((1, 4, 4, 3)), dtype)
    distance = jax.jit(jax.value_and_grad(lambda s, t: gj.wasserstein_gaussians(s, t, grid=2).sum()))
    for student, teacher in (
        (maps, maps),
        (0 * maps, maps),
        (maps, 0 * maps),
        (1e4 * maps, maps),
        (0 * maps + 3, maps),
    ):
        value, gradient = distance(student, teacher)
        assert np.isfinite(value) and np.isfinite(gradient).all() and value.dtype == jnp.float32
    assert distance(maps, maps)[0] == 0
    # One cell and equal weights: the distance of the clouds of positions.
    np.testing.assert_allclose(
        gj.wasserstein_gaussians(maps, 2 * maps, mean_weight=1.0),
        gj.gaussian_wasserstein(maps.reshape(1, 16, 3), 2 * maps.reshape(1, 16, 3)),
        rtol=1e-5,
    )


X, M = jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 4, 3))
ILLEGAL = [
    (lambda: gj.gaussian_wasserstein(X, X[:, :3]), r"the same shape .*, got \(2, 4, 3\) and \(2, 3, 3\)"),
    (lambda: gj.gaussian_wasserstein(X[:, :0], X[:, :0]), r"x must be .*, not empty, got .*\(2, 0, 3\)"),
    (lambda: gj.sliced_wasserstein(X, X[:, :3], key=KEY), r"the same shape .*, got \(2, 4, 3\) and \(2, 3, 3\)"),
    (
        lambda: gj.sliced_wasserstein(X, X, key=KEY, num_projections=0),
        "num_projections must be a positive integer, got 0",
    ),
    (lambda: gj.wasserstein_gaussians(M, M[:1]), r"student_map and teacher_map must .*got .*\(1, 4, 4, 3\)"),
    (lambda: gj.wasserstein_gaussians(M, M[..., :2]), r"student_map and teacher_map must .*got .*\(2, 4, 4, 2\)"),
    (lambda: gj.wasserstein_gaussians(M, M[:, :2], grid=3), "grid must be at most 2.*got 3"),
    (lambda: gj.wasserstein_gaussians(M, M, grid=0), "grid must be a positive integer, got 0"),
    (lambda: gj.wasserstein_gaussians(M, M, mean_weight=0.0), "mean_weight must be a positive .*, got 0.0"),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    refused_before_tracing(call, message)
