"""Losses between feature maps against loops in float64 NumPy, closed forms, finite differences, and extremes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gompertz_jax as gj
from gompertz_jax.losses import features as room


def maps(seed, *shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return tuple(scale * rng.standard_normal(shape) for shape in shapes)


def reference_pool(a, rows, columns):
    """PyTorch's window rule, one window at a time."""
    _, h, w, _ = a.shape
    return np.stack(
        [
            np.stack(
                [
                    a[:, i * h // rows : -(-(i + 1) * h // rows), j * w // columns : -(-(j + 1) * w // columns)].mean(
                        (1, 2)
                    )
                    for j in range(columns)
                ],
                axis=1,
            )
            for i in range(rows)
        ],
        axis=1,
    )


def reference_one_size(a, b):
    size = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
    return reference_pool(a, *size), reference_pool(b, *size)


def reference_attention(a, power):
    q = (np.abs(a) ** power).mean(-1)
    return np.stack([image / np.sqrt((image**2).sum()) for image in q])


def reference_attention_transfer(a, b, power):
    a, b = reference_one_size(a, b)
    return ((reference_attention(a, power) - reference_attention(b, power)) ** 2).mean((1, 2))


def reference_selectivity(a, b):
    values = []
    for x, y in zip(*reference_one_size(a, b), strict=True):
        x, y = (z.reshape(-1, z.shape[-1]).T for z in (x, y))
        x, y = ([row / np.linalg.norm(row) for row in z] for z in (x, y))
        values.append(
            np.mean([[(p @ q) ** 2 for q in x] for p in x])
            + np.mean([[(p @ q) ** 2 for q in y] for p in y])
            - 2 * np.mean([[(p @ q) ** 2 for q in y] for p in x])
        )
    return np.array(values)


def reference_context(a, b, levels=(4, 2, 1)):
    value, total, weight = ((a - b) ** 2).mean((1, 2, 3)), 1.0, 1.0
    for level in levels:
        if level < min(a.shape[1:3]):
            weight /= 2
            total += weight
            difference = reference_pool(a, level, level) - reference_pool(b, level, level)
            value = value + weight * (difference**2).mean((1, 2, 3))
    return value / total


VARIANCE = np.array([0.25, 1.0, 7.0])

# name -> (function of two maps, its reference, shapes of the maps)
LOSSES = {
    "attention, the student larger": (
        gj.attention_transfer,
        partial(reference_attention_transfer, power=2.0),
        ((2, 6, 6, 4), (2, 4, 4, 7)),
    ),
    "attention, the teacher larger, power 3": (
        partial(gj.attention_transfer, power=3),
        partial(reference_attention_transfer, power=3.0),
        ((2, 2, 5, 4), (2, 4, 5, 2)),
    ),
    "attention, the student taller, the teacher wider": (
        gj.attention_transfer,
        partial(reference_attention_transfer, power=2.0),
        ((2, 6, 3, 4), (2, 4, 5, 2)),
    ),
    "hint": (gj.hint_distance, lambda a, b: ((a - b) ** 2).mean((1, 2, 3)), ((2, 2, 4, 5), (2, 2, 4, 5))),
    "selectivity, by second moments": (gj.neuron_selectivity, reference_selectivity, ((2, 4, 4, 6), (2, 2, 2, 9))),
    "selectivity, by Gram matrices": (gj.neuron_selectivity, reference_selectivity, ((2, 4, 5, 2), (2, 4, 5, 3))),
    "variational": (
        lambda a, b: gj.variational_information(a, jnp.asarray(VARIANCE), b),
        lambda a, b: 0.5 * ((a - b) ** 2 / VARIANCE + np.log(VARIANCE)).mean((1, 2, 3)),
        ((2, 2, 4, 3), (2, 2, 4, 3)),
    ),
    "context, all levels": (gj.hierarchical_context, reference_context, ((2, 6, 6, 2), (2, 6, 6, 2))),
    "context, other levels, a map of 3x5": (
        partial(gj.hierarchical_context, levels=(4, 2)),
        partial(reference_context, levels=(4, 2)),
        ((2, 3, 5, 2), (2, 3, 5, 2)),
    ),
    "context, other levels, a map of 5x3": (
        partial(gj.hierarchical_context, levels=(4, 2)),
        partial(reference_context, levels=(4, 2)),
        ((2, 5, 3, 2), (2, 5, 3, 2)),
    ),
    "context, a map of 1x1": (gj.hierarchical_context, reference_context, ((2, 1, 1, 4), (2, 1, 1, 4))),
}

# name -> values and the gradients to student and teacher; compiled once per dtype, for the shapes of the table
COMPILED = {
    name: jax.jit(
        lambda a, b, loss=loss: (
            loss(a, b),
            *jax.grad(lambda a, b: loss(a, b).sum(), argnums=(0, 1))(a, b),
        )
    )
    for name, (loss, _, _) in LOSSES.items()
}


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (4, 7)])
def test_pooling_is_pytorchs_window_rule(size):
    (a,) = maps(0, (2, 5, 7, 3))
    pooled = gj.pool_map(jnp.asarray(a), size)
    assert pooled.shape == (2, *size, 3) and pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, reference_pool(a, *size), rtol=1e-5, atol=1e-6)


def test_pooling_of_known_numbers():
    row = jnp.arange(5.0).reshape(1, 1, 5, 1)
    # windows of PyTorch's adaptive_avg_pool1d(5 -> 3): [0, 1], [1, 2, 3], [3, 4]
    np.testing.assert_allclose(gj.pool_map(row, (1, 3)).ravel(), [0.5, 2.0, 3.5], rtol=1e-6)
    np.testing.assert_array_equal(gj.pool_map(row, (1, 5)), row)
    assert gj.pool_map(jnp.ones((1, 4, 4, 1), jnp.bfloat16), 2).dtype == jnp.float32


def test_pooling_twice_differentiated():
    (a,) = maps(1, (1, 3, 3, 1))
    with jax.enable_x64(True):
        hessian = jax.jit(jax.hessian(lambda x: (gj.pool_map(x, 2) ** 2).sum()))(jnp.asarray(a)).reshape(9, 9)
    windows = np.zeros((4, 9))
    for i, (y, x) in enumerate(np.ndindex(2, 2)):
        windows[i, [3 * r + c for r in (y, y + 1) for c in (x, x + 1)]] = 0.25
    np.testing.assert_allclose(hessian, 2 * windows.T @ windows, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("power", [1, 2.0, 2.5, 4])
def test_attention_is_the_normalised_mean_power(power):
    (a,) = maps(2, (2, 4, 5, 6))
    value = jax.jit(lambda x: gj.attention_map(x, power=power))(jnp.asarray(a))
    assert value.shape == (2, 4, 5) and value.dtype == jnp.float32
    np.testing.assert_allclose(value, reference_attention(a, power), rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(value**2, (1, 2)), 1.0, rtol=1e-6)


def test_attention_takes_a_traced_power():
    (a,) = maps(2, (2, 4, 5, 6))
    value = jax.jit(lambda power: gj.attention_map(jnp.asarray(a), power=power))(2.0)
    np.testing.assert_allclose(value, reference_attention(a, 2.0), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name):
    _, reference, shapes = LOSSES[name]
    a, b = maps(3, *shapes)
    expected = reference(a, b)
    value, _, _ = COMPILED[name](jnp.asarray(a), jnp.asarray(b))
    assert value.shape == shapes[0][:1] and value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        value, to_student, to_teacher = map(np.asarray, COMPILED[name](jnp.asarray(a), jnp.asarray(b)))
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-14)
    np.testing.assert_array_equal(to_teacher, 0.0)
    random = np.random.default_rng(5).standard_normal(a.shape)
    for step in (random, np.sign(random)):
        slope = (reference(a + 1e-6 * step, b).sum() - reference(a - 1e-6 * step, b).sum()) / 2e-6
        np.testing.assert_allclose((to_student * step).sum(), slope, rtol=1e-5, atol=1e-8)


def test_gradient_of_the_variance():
    mean, teacher = (jnp.asarray(a) for a in maps(6, (2, 3, 3, 3), (2, 3, 3, 3)))
    slope = jax.jit(jax.grad(lambda v: gj.variational_information(mean, v, teacher).mean()))
    squared = ((np.asarray(mean, np.float64) - np.asarray(teacher, np.float64)) ** 2).mean((0, 1, 2))
    np.testing.assert_allclose(
        slope(jnp.asarray(VARIANCE)), 0.5 * (1 / VARIANCE - squared / VARIANCE**2) / 3, rtol=1e-4
    )
    # the likelihood is largest where the variance is the mean squared error
    np.testing.assert_allclose(slope(jnp.asarray(squared)), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_image_counts_for_itself(name):
    a, b = (jnp.asarray(x) for x in maps(7, *LOSSES[name][2]))
    value, gradient, _ = COMPILED[name](a, b)
    swapped, swapped_gradient, _ = COMPILED[name](a[::-1], b[::-1])
    np.testing.assert_allclose(swapped, value[::-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(swapped_gradient, gradient[::-1], rtol=1e-4, atol=1e-6)
    twice, _, _ = COMPILED[name](jnp.stack([a[0], a[0]]), jnp.stack([b[0], b[0]]))
    np.testing.assert_allclose(twice, value[0], rtol=1e-5, atol=1e-6)


def test_eager_evaluation_of_one_image_is_the_compiled_one():
    # one shape for all, so that every operation is compiled once
    a, b = (jnp.asarray(x) for x in maps(7, (1, 3, 3, 3), (1, 3, 3, 3)))
    for loss in (
        gj.attention_transfer,
        gj.hint_distance,
        gj.neuron_selectivity,
        gj.hierarchical_context,
        lambda a, b: gj.variational_information(a, jnp.full(3, 2.0), b),
    ):
        np.testing.assert_allclose(loss(a, b), jax.jit(loss)(a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["selectivity, by second moments", "selectivity, by Gram matrices"])
def test_selectivity_knows_neither_the_order_nor_the_scale_nor_the_sign_of_channels(name):
    a, b = maps(8, *LOSSES[name][2])
    value, _, _ = COMPILED[name](jnp.asarray(a), jnp.asarray(b))
    changed = a[..., ::-1] * np.linspace(-2.0, -0.5, a.shape[3])
    np.testing.assert_allclose(COMPILED[name](jnp.asarray(changed), jnp.asarray(b))[0], value, rtol=1e-4)


def test_selectivity_compares_distributions_of_channels_whatever_their_number():
    (a,) = (jnp.asarray(x) for x in maps(8, (2, 2, 3, 2)))
    # by second moments, and by Gram matrices
    for copies in (4, 1):
        ours, theirs = jnp.tile(a, copies), jnp.tile(a, 3)
        np.testing.assert_allclose(jax.jit(gj.neuron_selectivity)(ours, theirs), 0.0, atol=1e-6)


def test_attention_knows_neither_the_scale_nor_the_order_of_channels():
    name = "attention, the student larger"
    a, b = maps(9, *LOSSES[name][2])
    value, _, _ = COMPILED[name](jnp.asarray(a), jnp.asarray(b))
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        changed = jnp.asarray(scale * a[..., ::-1]), jnp.asarray(b / scale)
        np.testing.assert_allclose(COMPILED[name](*changed)[0], value, rtol=1e-5)


@pytest.mark.parametrize("name", ["hint", "context, all levels", "selectivity, by Gram matrices"])
def test_what_is_zero_for_equal_maps(name):
    (a,) = (jnp.asarray(x) for x in maps(10, LOSSES[name][2][0]))
    value, gradient, _ = COMPILED[name](a, a)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


EXTREMES = {
    "zeros": (0.0, 0.0),
    "a student of zeros": (0.0, 1.0),
    "a teacher of zeros": (1.0, 0.0),
    "equal constants": (3.0, 3.0),
    "large": (1e4, -1e4),
    "tiny": (1e-30, 1.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_give_finite_values_and_gradients(name):
    shapes = LOSSES[name][2]
    patterns = maps(11, *shapes)
    patterns[0][..., 0] = 0.0  # a dead channel
    for pattern in (patterns, [np.ones(shape) for shape in shapes]):
        for case, scales in EXTREMES.items():
            arrays = (jnp.asarray(scale * a, jnp.float32) for scale, a in zip(scales, pattern, strict=True))
            value, to_student, to_teacher = COMPILED[name](*arrays)
            assert np.isfinite(value).all() and np.isfinite(to_student).all(), case
            np.testing.assert_array_equal(to_teacher, 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_narrow_maps_are_raised_before_anything_is_computed(name):
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in maps(12, *LOSSES[name][2])]
    value = jax.jit(LOSSES[name][0])(*narrow)
    assert value.dtype == jnp.float32
    expected, _, _ = COMPILED[name](*(a.astype(jnp.float32) for a in narrow))
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


def test_a_direction_that_is_missing_stays_zero_without_a_derivative():
    vectors = jnp.array([[3.0, -4.0], [0.0, 0.0], [1e-39, 0.0], [3e30, 4e30], [3e-30, 4e-30], [np.nan, 1.0]])
    np.testing.assert_allclose(
        jax.jit(room.unit_vectors)(vectors),
        [[0.6, -0.8], [0, 0], [0, 0], [0.6, 0.8], [0.6, 0.8], [np.nan, np.nan]],
        rtol=1e-6,
    )
    jacobian = jax.jit(jax.jacobian(room.unit_vectors))
    np.testing.assert_array_equal(jacobian(jnp.zeros(2)), 0.0)
    np.testing.assert_allclose(jacobian(jnp.array([3.0, -4.0])), np.array([[0.64, 0.48], [0.48, 0.36]]) / 5, rtol=1e-5)


ONE = jnp.zeros((2, 4, 4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gj.pool_map(ONE, 5), "size must be at most that of the map, 4x4, got 5"),
        (lambda: gj.pool_map(ONE, (4, 5)), r"size must be at most that of the map, 4x4, got \(4, 5\)"),
        (lambda: gj.pool_map(ONE, 0), "size must be a positive integer, got 0"),
        (lambda: gj.pool_map(ONE, (2, -1)), "size must be a positive integer, got -1"),
        (lambda: gj.pool_map(ONE, (2, 2, 2)), r"size must be an integer or \(rows, columns\), got \(2, 2, 2\)"),
        (lambda: gj.attention_map(ONE, power=0.5), "power must be a number of at least 1, got 0.5"),
        (lambda: gj.attention_transfer(ONE, ONE, power=float("nan")), "power must be a number of at least 1, got nan"),
        (lambda: gj.attention_transfer(ONE, ONE[:1]), r"maps \[B, h, w, c\] of the same images, got \(2, 4, 4, 3\)"),
        (lambda: gj.neuron_selectivity(ONE, ONE[0]), r"of the same images, got \(2, 4, 4, 3\) and \(4, 4, 3\)"),
        (lambda: gj.hint_distance(ONE, ONE[..., :2]), "student_map and teacher_map must have the same shape"),
        (lambda: gj.hierarchical_context(ONE, ONE[:, :2]), "student_map and teacher_map must have the same shape"),
        (lambda: gj.hierarchical_context(ONE, ONE, levels=(2, 0)), "levels must be a positive integer, got 0"),
        (
            lambda: gj.variational_information(ONE, jnp.ones(3), ONE[..., :2]),
            "student_mean and teacher_map must have the same shape",
        ),
        (
            lambda: gj.variational_information(ONE, jnp.ones(2), ONE),
            r"student_variance must have one value per channel, shape \(3,\), got \(2,\)",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
