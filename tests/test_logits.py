"""Losses between class scores against float64 NumPy and SciPy, finite differences, and extremes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from helpers import central_difference, refused_before_tracing

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
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-12)
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


@pytest.mark.parametrize("temperature", [1e2, 1e3, 1e4])
def test_soft_target_kl_at_a_high_temperature(temperature):
    student, teacher = (logits(seed, (1000, 10)).astype(np.float32) for seed in (40, 41))
    p, q = (scipy.special.softmax(z.astype(np.float64) / temperature, axis=-1) for z in (teacher, student))
    loss = jax.vmap(jax.value_and_grad(partial(gj.soft_target_kl, temperature=temperature)))
    value, gradient = jax.jit(loss)(student, teacher)
    np.testing.assert_allclose(value, reference_kl(student, teacher, temperature), rtol=1e-4)
    np.testing.assert_allclose(gradient, temperature * (q - p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("noise", "rtol"), [(1e-1, 1e-4), (1e-3, 5e-3), (1e-5, 0.3)])
def test_divergences_of_nearly_equal_logits_are_not_negative(noise, rtol):
    # the tolerance is what rounding the logits themselves to float32 leaves of their difference
    teacher = logits(42, (1000, 10)).astype(np.float32)
    student = (teacher + noise * logits(43, (1000, 10), scale=1.0)).astype(np.float32)
    labels = jnp.arange(1000) % 10
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(gj.soft_target_kl)))(student, teacher)
    assert (value >= 0).all()
    np.testing.assert_allclose(value, reference_kl(student, teacher, 4.0), rtol=rtol)
    p, q = (scipy.special.softmax(z.astype(np.float64) / 4.0, axis=-1) for z in (teacher, student))
    np.testing.assert_allclose(gradient, 4.0 * (q - p), rtol=rtol, atol=rtol * abs(q - p).max())
    assert (jax.jit(gj.decoupled_kl)(student, teacher, labels) >= 0).all()


def test_soft_target_kl_of_a_class_that_only_the_student_masks_is_infinite():
    student = jnp.array([[0.0, -np.inf, 1.0]])
    np.testing.assert_array_equal(gj.soft_target_kl(student, jnp.zeros((1, 3))), np.inf)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_divergences_keep_what_is_not_finite(side, value):
    pair = [jnp.zeros((2, 3)), jnp.ones((2, 3))]
    pair[side] = pair[side].at[1, 1].set(value)
    for loss in (gj.soft_target_kl, partial(gj.decoupled_kl, labels=jnp.array([0, 0]))):
        np.testing.assert_array_equal(np.isfinite(loss(*pair)), [True, False])


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
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-6)
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


# Variants of the soft targets: (gradients, values), compiled once per shape and dtype.
def with_gradients(function):
    def loss(student, teacher, *rest):
        values = function(student, teacher, *rest)
        return values.sum(), values

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


LABELS = jnp.asarray([0, 3, 6, 2, 2])


def decoupled(student, teacher, **options):
    labels = jnp.broadcast_to(LABELS % student.shape[-1], student.shape[:-1])
    return gj.decoupled_kl(student, teacher, labels, **options)


VARIANTS = {
    "decoupled": with_gradients(decoupled),
    "target_part": with_gradients(partial(decoupled, alpha=1.0, beta=0.0)),
    "other_part": with_gradients(partial(decoupled, alpha=0.0, beta=1.0)),
    "interclass": with_gradients(gj.interclass_correlation),
    "multi_temperature": with_gradients(gj.multi_temperature_kl),
    "standardized": with_gradients(
        lambda s, t: gj.soft_target_kl(gj.standardize_logits(s), gj.standardize_logits(t), temperature=2.0)
    ),
}


def reference_decoupled(student, teacher, alpha=1.0, beta=8.0, temperature=4.0):
    values = []
    for z, w, label in zip(student / temperature, teacher / temperature, np.asarray(LABELS), strict=True):
        q, p = scipy.special.softmax(z), scipy.special.softmax(w)
        others = np.arange(len(z)) != label
        target = scipy.stats.entropy([p[label], p[others].sum()], [q[label], q[others].sum()])
        rest = scipy.stats.entropy(p[others] / p[others].sum(), q[others] / q[others].sum())
        values.append(temperature**2 * (alpha * target + beta * rest))
    return np.array(values)


def reference_interclass(student, teacher, temperature=4.0):
    pairs = zip(student / temperature, teacher / temperature, strict=True)
    return temperature**2 * np.array(
        [1 - scipy.stats.pearsonr(scipy.special.softmax(z), scipy.special.softmax(w)).statistic for z, w in pairs]
    )


REFERENCES = {
    "decoupled": reference_decoupled,
    "target_part": partial(reference_decoupled, alpha=1.0, beta=0.0),
    "other_part": partial(reference_decoupled, alpha=0.0, beta=1.0),
    "interclass": reference_interclass,
    "multi_temperature": lambda s, t: sum(reference_kl(s, t, temperature) for temperature in (2.0, 3.0, 4.0, 5.0, 6.0)),
    "standardized": lambda s, t: reference_kl(scipy.stats.zscore(s, axis=-1), scipy.stats.zscore(t, axis=-1), 2.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_their_formulas_with_their_derivatives(name):
    student, teacher = logits(13, (5, 7)), logits(14, (5, 7))
    value = VARIANTS[name](jnp.asarray(student), jnp.asarray(teacher))[1]
    assert value.shape == (5,) and value.dtype == jnp.float32
    # the standardised logits are those of a standard deviation larger by epsilon = 1e-7
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if name == "standardized" else {"rtol": 1e-10, "atol": 1e-13}
    np.testing.assert_allclose(value, REFERENCES[name](student, teacher), rtol=3e-5, atol=2e-6)
    with jax.enable_x64(True):
        (to_student, to_teacher), value = VARIANTS[name](jnp.asarray(student), jnp.asarray(teacher))
        assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, REFERENCES[name](student, teacher), **tolerance)
    np.testing.assert_array_equal(to_teacher, 0.0)
    for k in range(7):
        up, down = (REFERENCES[name](student + h * np.eye(7)[k], teacher) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(np.asarray(to_student)[:, k], (up - down) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1e2, 1e3, 1e4])
def test_decoupled_kl_at_a_high_temperature(temperature):
    student, teacher = (logits(seed, (5, 7)).astype(np.float32) for seed in (44, 45))
    value = jax.jit(partial(decoupled, temperature=temperature))(student, teacher)
    wide = student.astype(np.float64), teacher.astype(np.float64)
    np.testing.assert_allclose(value, reference_decoupled(*wide, temperature=temperature), rtol=1e-3)


def test_decoupled_kl_with_the_weights_of_the_soft_targets_is_their_divergence():
    student, teacher = logits(15, (5, 7)), logits(16, (5, 7))
    not_label = 1 - np.take_along_axis(scipy.special.softmax(teacher / 4.0, -1), np.asarray(LABELS)[:, None], -1)[:, 0]
    with jax.enable_x64(True):
        s, t = jnp.asarray(student), jnp.asarray(teacher)
        combined = np.asarray(VARIANTS["target_part"](s, t)[1]) + not_label * VARIANTS["other_part"](s, t)[1]
        np.testing.assert_allclose(combined, gj.soft_target_kl(s, t), rtol=1e-10)


def test_decoupled_kl_keeps_what_a_certain_teacher_knows_of_the_other_classes():
    # 1 - p is 0 in float32 where p = 1 - e^-50; what is left of it is not
    teacher = np.array([[200.0, 4.0, 0.0]])
    student = np.array([[200.0, 0.0, 0.0]])
    value = gj.decoupled_kl(jnp.asarray(student), jnp.asarray(teacher), jnp.array([0]), alpha=0.0, beta=1.0)
    np.testing.assert_allclose(value, reference_kl(student[:, 1:], teacher[:, 1:], 4.0), rtol=1e-5)
    confident = gj.decoupled_kl(jnp.zeros((1, 3)), jnp.asarray(teacher), jnp.array([0]), beta=0.0)
    np.testing.assert_allclose(confident, 16.0 * np.log(3.0), rtol=1e-5)


def test_decoupled_kl_of_two_classes_is_all_in_the_label_and_a_label_out_of_range_is_nan():
    student, teacher = jnp.asarray(logits(17, (5, 2))), jnp.asarray(logits(18, (5, 2)))
    np.testing.assert_array_equal(VARIANTS["other_part"](student, teacher)[1], 0.0)
    np.testing.assert_allclose(
        VARIANTS["target_part"](student, teacher)[1], gj.soft_target_kl(student, teacher), rtol=1e-4, atol=1e-6
    )
    assert np.isnan(gj.decoupled_kl(jnp.zeros((1, 3)), jnp.ones((1, 3)), jnp.array([3]))[0])


def test_interclass_correlation_is_blind_to_a_linear_change_of_the_probabilities():
    teacher = np.array([[0.5, 0.3, 0.2]])
    values = [
        gj.interclass_correlation(jnp.log(a * teacher + (1 - a) / 3), jnp.log(teacher), temperature=1.0)
        for a in (1.0, 0.4, -0.4, 0.0)
    ]
    np.testing.assert_allclose(np.ravel(values), [0.0, 0.0, 2.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (3,), (2, 1, 2)])
def test_standardized_logits_have_mean_zero_and_deviation_one_at_every_scale(shape):
    z = logits(19, shape)
    standardize = jax.jit(gj.standardize_logits)
    for factor in (1.0, 1e-3, 1e30):
        value = standardize(jnp.asarray(factor * z + 5.0 * factor, jnp.float32))
        np.testing.assert_allclose(value, scipy.stats.zscore(z, axis=-1), rtol=1e-3, atol=1e-4)
    value = standardize(jnp.asarray(z), epsilon=0.5)
    np.testing.assert_allclose(
        value, (z - z.mean(-1, keepdims=True)) / (z.std(-1, keepdims=True) + 0.5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("classes", [1, 7, 100])
def test_equal_logits_are_standardized_to_zero_with_a_derivative_of_zero(classes):
    z, cotangent = jnp.full((2, classes), 0.1), jnp.asarray(logits(20, (2, classes)))
    value, pull_back = jax.vjp(gj.standardize_logits, z)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(pull_back(cotangent)[0], 0.0)


def variant_extremes():
    student, teacher = logits(21, (5, 7)), logits(22, (5, 7))
    large = np.zeros((5, 7))
    large[np.arange(5), np.asarray(LABELS)], large[1, 0] = 1e4, -1e4
    yield from [(large, -large), (student, large), (large, teacher), (large, large), (1e26 * large, large)]
    yield from [(0 * student, teacher), (student, 0 * teacher), (np.full_like(student, 0.1), teacher)]
    yield from [(student, student), (student, -student)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_extremes_of_the_variants_are_finite(name, dtype):
    for student, teacher in variant_extremes():
        (gradient, _), value = VARIANTS[name](jnp.asarray(student, dtype), jnp.asarray(teacher, dtype))
        assert value.dtype == jnp.float32 and np.isfinite(value).all()
        assert np.isfinite(gradient.astype(jnp.float32)).all()
    if dtype == jnp.float32:
        masked = np.where(np.arange(7) == 5, -np.inf, logits(23, (5, 7)))
        if name in ("decoupled", "multi_temperature"):
            (gradient, _), value = VARIANTS[name](jnp.asarray(masked), jnp.asarray(masked[::-1]))
            assert np.isfinite(value).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("temperature", [3.0, 5.0, 7.0])
def test_a_temperature_known_to_the_compiler_is_as_good_as_a_traced_one(temperature):
    # a constant divisor becomes a factor, and may be fused with what follows
    student, teacher = 1e30 * jnp.eye(3), 1e4 * jnp.eye(3)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s: gj.soft_target_kl(s, teacher, temperature=temperature).sum())
    )(student)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_outside_of_jit_and_with_more_axes(name):
    student, teacher = jnp.asarray(logits(24, (5, 7))), jnp.asarray(logits(25, (5, 7)))
    with jax.disable_jit():
        eager = VARIANTS[name](student[None], teacher[None])[1]
    np.testing.assert_allclose(eager, VARIANTS[name](student, teacher)[1][None], rtol=1e-5, atol=1e-6)


def test_target_cross_entropy_is_the_formula():
    student, teacher = logits(2, (4, 5)), logits(3, (4, 5))
    labels = np.array([0, 4, 2, 2])

    def reference(student):
        q, p = scipy.special.softmax(student, -1), scipy.special.softmax(teacher, -1)
        return -np.array([p[i, label] * np.log(q[i, label]) for i, label in enumerate(labels)])

    with jax.enable_x64(True):
        loss = lambda s, t: gj.target_cross_entropy(s, t, jnp.asarray(labels)).sum()  # noqa: E731
        value, (gradient, to_teacher) = jax.jit(jax.value_and_grad(loss, (0, 1)))(
            jnp.asarray(student), jnp.asarray(teacher)
        )
    np.testing.assert_allclose(value, reference(student).sum(), rtol=1e-12)
    difference = central_difference(lambda s: reference(s).sum(), student, h=1e-5)
    np.testing.assert_allclose(gradient, difference, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(to_teacher, 0.0)


@pytest.mark.parametrize("label", [-1, -3, 3, 300])
def test_a_label_that_is_none_gives_nan_and_not_another_classs_value(label):
    student, teacher = jnp.asarray(logits(4, (2, 3))), jnp.asarray(logits(5, (2, 3)))
    labels = jnp.array([1, label])
    for loss in (
        gj.cross_entropy(student, labels),
        gj.cross_entropy(student, labels, label_smoothing=0.1),
        gj.decoupled_kl(student, teacher, labels),
        gj.target_cross_entropy(student, teacher, labels),
        gj.wasserstein_logits(student, teacher, 1.0 - jnp.eye(3), labels=labels),
        gj.label_class(student, labels).sum(-1),
    ):
        np.testing.assert_array_equal(np.isnan(loss), [False, True])


@pytest.mark.parametrize("label", [2**32 + 1, 2**40])
def test_a_label_beyond_32_bits_is_none_and_does_not_wrap_around(label):
    with jax.enable_x64(True):
        scores, labels = jnp.asarray(logits(6, (2, 3))), jnp.asarray(np.array([1, label]))
        for loss in (gj.cross_entropy(scores, labels), gj.decoupled_kl(scores, -scores, labels)):
            np.testing.assert_array_equal(np.isnan(loss), [False, True])


def test_labels_of_a_narrow_dtype_count_as_others_do():
    scores, labels = jnp.asarray(logits(6, (2, 128))), jnp.array([0, 127])
    narrow = labels.astype(jnp.int8)
    np.testing.assert_array_equal(gj.label_class(scores, narrow), jax.nn.one_hot(labels, 128))
    np.testing.assert_array_equal(gj.cross_entropy(scores, narrow), gj.cross_entropy(scores, labels))


Z = jnp.zeros((2, 3))
INFINITE = jnp.asarray(np.inf)
ILLEGAL = [
    (lambda: gj.soft_target_kl(Z, Z, temperature=0.0), "temperature must be a positive .*, got 0.0"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=-4), "temperature must be a positive .*, got -4.0"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=1e20), "temperature must be .* whose square is .*, got 1e\\+20"),
    (lambda: gj.multi_temperature_kl(Z, Z, temperatures=(1e20,)), "temperatures must be .* whose square is"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=np.nan), "temperature must be a positive .*, got nan"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=INFINITE), "temperature must be a positive .*, got inf"),
    (lambda: gj.soft_target_kl(Z, Z, temperature=jnp.ones(2)), r"temperature must be .*, got an array of shape \(2,\)"),
    (lambda: gj.soft_target_kl(Z, jnp.zeros((2, 4))), r"same shape .*, got \(2, 3\) and \(2, 4\)"),
    (lambda: gj.soft_target_kl(Z, jnp.zeros(3)), r"same shape .*, got \(2, 3\) and \(3,\)"),
    (lambda: gj.multi_temperature_kl(Z, Z, temperatures=()), r"temperatures must have at least one number, got \(\)"),
    (lambda: gj.multi_temperature_kl(Z, Z, temperatures=(2.0, 0.0)), "temperatures must be a positive .*, got 0.0"),
    (lambda: gj.multi_temperature_kl(Z, Z[:1]), r"same shape .*, got \(2, 3\) and \(1, 3\)"),
    (lambda: gj.decoupled_kl(Z, Z[:1], jnp.zeros(2, int)), r"same shape .*, got \(2, 3\) and \(1, 3\)"),
    (lambda: gj.decoupled_kl(Z, Z, jnp.zeros(3, int)), r"labels must have .*, got \(3,\) and \(2, 3\)"),
    (lambda: gj.decoupled_kl(Z[:, :1], Z[:, :1], jnp.zeros(2, int)), r"at least two classes, got shape \(2, 1\)"),
    (lambda: gj.decoupled_kl(Z, Z, jnp.zeros(2, int), alpha=-1.0), "alpha must be .* at least 0, got -1.0"),
    (lambda: gj.decoupled_kl(Z, Z, jnp.zeros(2, int), beta=np.nan), "beta must be .* at least 0, got nan"),
    (lambda: gj.decoupled_kl(Z, Z, jnp.zeros(2, int), temperature=0), "temperature must be .*, got 0.0"),
    (lambda: gj.interclass_correlation(Z, Z[0]), r"same shape .*, got \(2, 3\) and \(3,\)"),
    (lambda: gj.interclass_correlation(Z, Z, temperature=-1.0), "temperature must be .*, got -1.0"),
    (lambda: gj.standardize_logits(Z, epsilon=0.0), "epsilon must be a positive .*, got 0.0"),
    (lambda: gj.cross_entropy(Z, jnp.zeros(3, int)), r"labels must have .*, got \(3,\) and \(2, 3\)"),
    (lambda: gj.cross_entropy(Z, jnp.zeros((2, 1), int)), r"labels must have .*, got \(2, 1\) and \(2, 3\)"),
    (
        lambda: gj.cross_entropy(Z, jnp.zeros(2, int), label_smoothing=1.0),
        r"label_smoothing must be in \[0, 1\), got 1.0",
    ),
    (lambda: gj.cross_entropy(Z, jnp.zeros(2, int), label_smoothing=-0.1), r"label_smoothing must be .*, got -0.1"),
    (lambda: gj.target_cross_entropy(Z, Z, jnp.zeros(3, int)), r"labels must have .*got \(3,\)"),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    refused_before_tracing(call, message)
