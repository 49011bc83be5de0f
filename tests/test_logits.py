"""Losses between class scores against float64 NumPy and SciPy, finite differences, and extremes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import gompertz_jax as gj

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def logits(seed, shape, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def reference_kl(student, teacher, temperature):
    log_p = scipy.special.log_softmax(np.asarray(teacher, np.float64) / temperature, axis=-1)
    log_q = scipy.special.log_softmax(np.asarray(student, np.float64) / temperature, axis=-1)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return temperature**2 * terms.sum(-1)


def reference_cross_entropy(z, labels, smoothing):
    log_q = scipy.special.log_softmax(np.asarray(z, np.float64), axis=-1)
    target = np.eye(z.shape[-1])[labels] * (1 - smoothing) + smoothing / z.shape[-1]
    return -(target * log_q).sum(-1)


@pytest.mark.parametrize(
    ("shape", "temperature"), [((10,), 4.0), *(((7, 10), t) for t in TEMPERATURES), ((2, 3, 2), 2.0), ((3, 1), 4.0)]
)
def test_soft_target_kl_is_the_divergence_of_the_student_from_the_teacher(shape, temperature):
    student, teacher = logits(0, shape), logits(1, shape)
    expected = reference_kl(student, teacher, temperature)
    value = jax.jit(gj.soft_target_kl)(jnp.asarray(student), jnp.asarray(teacher), temperature=temperature)
    assert value.shape == shape[:-1] and value.dtype == jnp.float32
    # the terms of the sum are up to T^2 times the size of the result
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-7 * temperature**2)
    with jax.enable_x64(True):
        value = jax.jit(gj.soft_target_kl)(jnp.asarray(student), jnp.asarray(teacher), temperature=temperature)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-13)


def test_the_reference_is_the_divergence_of_scipy():
    student, teacher = logits(0, (7, 10)), logits(1, (7, 10))
    p, q = scipy.special.softmax(teacher / 4.0, axis=-1), scipy.special.softmax(student / 4.0, axis=-1)
    np.testing.assert_allclose(
        reference_kl(student, teacher, 4.0), 16.0 * scipy.stats.entropy(p, q, axis=-1), rtol=1e-12
    )


def test_soft_target_kl_default_temperature_is_four():
    student, teacher = logits(0, (3, 5)), logits(1, (3, 5))
    value = gj.soft_target_kl(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(value, reference_kl(student, teacher, 4.0), rtol=2e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_target_kl_gradient_is_t_times_the_difference_of_probabilities(temperature):
    student, teacher = logits(2, (6, 10)), logits(3, (6, 10))
    p = scipy.special.softmax(teacher / temperature, axis=-1)
    q = scipy.special.softmax(student / temperature, axis=-1)
    with jax.enable_x64(True):
        loss = lambda s, t: gj.soft_target_kl(s, t, temperature=temperature).sum()  # noqa: E731
        to_student, to_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(to_student, temperature * (q - p), rtol=1e-10, atol=1e-13)
    np.testing.assert_array_equal(to_teacher, 0.0)


def test_soft_target_kl_of_equal_logits_is_exactly_zero():
    z = jnp.asarray(logits(4, (5, 100), scale=10.0))
    np.testing.assert_array_equal(gj.soft_target_kl(z, z), 0.0)
    np.testing.assert_allclose(jax.grad(lambda s: gj.soft_target_kl(s, z).sum())(z), 0.0, atol=1e-6)


def test_soft_target_kl_ignores_a_shift_of_all_scores():
    student, teacher = jnp.asarray(logits(5, (4, 10))), jnp.asarray(logits(6, (4, 10)))
    np.testing.assert_allclose(
        gj.soft_target_kl(student + 7.0, teacher - 3.0), gj.soft_target_kl(student, teacher), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("shape", "smoothing"), [((10,), 0.0), ((7, 10), 0.0), ((7, 10), 0.1), ((2, 3, 2), 0.9)])
def test_cross_entropy_value_and_gradient(shape, smoothing):
    z = logits(7, shape)
    labels = np.random.default_rng(8).integers(0, shape[-1], shape[:-1])
    expected = reference_cross_entropy(z, labels, smoothing)
    function = partial(gj.cross_entropy, label_smoothing=smoothing)
    value = jax.jit(function)(jnp.asarray(z), jnp.asarray(labels))
    assert value.shape == shape[:-1] and value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    target = np.eye(shape[-1])[labels] * (1 - smoothing) + smoothing / shape[-1]
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda z: function(z, jnp.asarray(labels)).sum()))(jnp.asarray(z))
    np.testing.assert_allclose(gradient, scipy.special.softmax(z, axis=-1) - target, rtol=1e-10, atol=1e-13)


def test_cross_entropy_of_a_label_out_of_range_is_nan():
    assert np.isnan(gj.cross_entropy(jnp.zeros((1, 3)), jnp.array([3]))[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_raised_before_anything_is_computed(dtype):
    student, teacher = (jnp.asarray(logits(seed, (6, 10)), dtype) for seed in (9, 10))
    wide_student, wide_teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    labels = jnp.arange(6)
    value = gj.soft_target_kl(student, teacher)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, gj.soft_target_kl(wide_student, wide_teacher))
    np.testing.assert_array_equal(gj.soft_target_kl(student, wide_teacher), value)
    np.testing.assert_array_equal(gj.cross_entropy(student, labels), gj.cross_entropy(wide_student, labels))


EXTREMES = {
    "logits of 1e4": ([[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]),
    "logits of 1e30": ([[1e30, -1e30, 0.0]], [[0.0, 1.0, 2.0]]),
    "a certain teacher": ([[0.1, 0.2, 0.3]], [[1e4, 0.0, 0.0]]),
    "a certain student": ([[1e4, 0.0, 0.0]], [[0.1, 0.2, 0.3]]),
    "two classes": ([[3.0, -3.0]], [[-1.0, 1.0]]),
    "one class": ([[3.0]], [[-1.0]]),
    "equal": ([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]),
    "zeros": ([[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]),
    "a masked class": ([[1.0, -np.inf, 3.0]], [[2.0, -np.inf, 0.0]]),
    "a class only the teacher masks": ([[1.0, 2.0, 3.0]], [[2.0, -np.inf, 0.0]]),
}


# Compiled once per shape and dtype: that eager evaluation agrees is tested below.
soft_target_kl = jax.jit(
    jax.value_and_grad(lambda s, t, temperature: gj.soft_target_kl(s, t, temperature=temperature).sum())
)
cross_entropy = jax.jit(
    jax.value_and_grad(lambda s, smoothing: gj.cross_entropy(s, jnp.array([0]), label_smoothing=smoothing).sum()),
    static_argnums=1,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 4.0, 1e4])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_give_finite_values_and_gradients(name, temperature, dtype):
    if dtype == jnp.float16 and "1e30" in name:
        pytest.skip("not a float16 number")
    student, teacher = (jnp.asarray(z, dtype) for z in EXTREMES[name])
    value, gradient = soft_target_kl(student, teacher, temperature)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    expected = reference_kl(student.astype(jnp.float32), teacher.astype(jnp.float32), temperature).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=2e-7 * max(1.0, temperature) ** 2)
    for smoothing in (0.0,) if "mask" in name else (0.0, 0.1):
        value, gradient = cross_entropy(student, smoothing)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_jit_vmap_and_a_temperature_from_a_schedule():
    student, teacher = jnp.asarray(logits(11, (6, 10))), jnp.asarray(logits(12, (6, 10)))
    labels = jnp.arange(6)
    eager = gj.soft_target_kl(student, teacher, temperature=2.0)
    for temperature in (jnp.float32(2.0), np.float64(2.0), 2, jnp.bfloat16(2.0)):
        np.testing.assert_allclose(
            jax.jit(gj.soft_target_kl)(student, teacher, temperature=temperature), eager, rtol=1e-5
        )
    np.testing.assert_allclose(
        jax.vmap(lambda s, t: gj.soft_target_kl(s, t, temperature=2.0))(student, teacher), eager, rtol=1e-5
    )
    schedule = gj.linear_schedule(10, start=4.0, end=0.0)
    np.testing.assert_allclose(
        jax.jit(lambda step: gj.soft_target_kl(student, teacher, temperature=schedule(step)))(5), eager, rtol=1e-5
    )
    hard = gj.cross_entropy(student, labels, label_smoothing=0.1)
    np.testing.assert_allclose(jax.jit(gj.cross_entropy)(student, labels, label_smoothing=0.1), hard, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(gj.cross_entropy)(student, labels), gj.cross_entropy(student, labels), rtol=1e-6
    )


Z = jnp.zeros((2, 3))
INFINITE = jnp.asarray(np.inf)
ILLEGAL = [
    (lambda: gj.soft_target_kl(Z, Z, temperature=0.0), "temperature must be a positive .*, got 0.0"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=-4), "temperature must be a positive .*, got -4.0"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=np.nan), "temperature must be a positive .*, got nan"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=INFINITE), "temperature must be a positive .*, got inf"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=jnp.ones(2)), r"temperature must be .*, got an array of shape \(2,\)"),
    (lambda: gj.soft_target_kl(Z, jnp.zeros((2, 4))), r"same shape .*, got \(2, 3\) and \(2, 4\)"),
    (lambda: gj.soft_target_kl(Z, jnp.zeros(3)), r"same shape .*, got \(2, 3\) and \(3,\)"),
    (lambda: gj.cross_entropy(Z, jnp.zeros(3, int)), r"labels must have .*, got \(3,\) and \(2, 3\)"),
    (lambda: gj.cross_entropy(Z, jnp.zeros((2, 1), int)), r"labels must have .*, got \(2, 1\) and \(2, 3\)"),
    (
        lambda: gj.cross_entropy(Z, jnp.zeros(2, int), label_smoothing=1.0),
        r"label_smoothing must be in \[0, 1\), got 1.0",
    ),
    (lambda: gj.cross_entropy(Z, jnp.zeros(2, int), label_smoothing=-0.1), r"label_smoothing must be .*, got -0.1"),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message):
        jax.jit(call)()
