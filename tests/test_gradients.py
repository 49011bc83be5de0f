"""Input gradients and distances between them: closed forms, finite differences, and the outer gradient through both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gompertz_jax as gj

KINDS = ["cosine", "l2", "normalized_l2"]


def normal(seed, shape, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def reference_distance(g, h, kind):
    g, h = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (g, h))
    if kind == "l2":
        return ((g - h) ** 2).sum(-1)
    cosine = 1.0 - (g * h).sum(-1) / (np.linalg.norm(g, axis=-1) * np.linalg.norm(h, axis=-1))
    return cosine if kind == "cosine" else 2.0 * cosine


def network(parameters, images):
    """A small nonlinear network in plain jnp: a 3x3 convolution, tanh, and a quadratic head."""
    kernel, head = parameters
    maps = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    pooled = jnp.tanh(maps).mean((1, 2))
    return jnp.einsum("bi,ij,bj->b", pooled, head, pooled)


def parameters(seed):
    return jnp.asarray(normal(seed, (3, 3, 2, 4))), jnp.asarray(normal(seed + 1, (4, 4)))


def central_difference(function, point, h=1e-6):
    difference = np.zeros(point.shape)
    for index in np.ndindex(*point.shape):
        up, down = point.copy(), point.copy()
        up[index] += h
        down[index] -= h
        difference[index] = (function(up) - function(down)) / (2 * h)
    return difference


# Compiled once per shape and dtype: that eager evaluation agrees is tested below.
distance_and_gradient = jax.jit(
    jax.value_and_grad(lambda g, h, kind: gj.gradient_distance(g, h, kind=kind).sum(), argnums=(0, 1)), static_argnums=2
)


def test_input_gradient_of_a_linear_score_is_its_weight():
    weight, images = normal(0, (3, 4, 5, 2)), normal(1, (3, 4, 5, 2))
    gradient = gj.input_gradient(lambda x: (jnp.asarray(weight, x.dtype) * x).sum((1, 2, 3)), jnp.asarray(images))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, weight, rtol=1e-6)


def test_input_gradient_against_finite_differences():
    images = normal(2, (2, 3, 3, 2))
    with jax.enable_x64(True):
        score = jax.jit(lambda x: network(parameters(3), x))
        gradient = jax.jit(lambda x: gj.input_gradient(score, x))(jnp.asarray(images))
        expected = central_difference(lambda x: float(score(jnp.asarray(x)).sum()), images)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


def test_input_gradient_has_the_cross_terms_of_coupled_images():
    images = jnp.asarray(normal(4, (3, 2, 2, 1)))
    # score_i = mean of all images: every image gets the gradient of three scores
    gradient = gj.input_gradient(lambda x: jnp.full(3, x.mean()), images)
    np.testing.assert_allclose(gradient, 3.0 / images.size, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_input_gradient_of_narrow_images_is_in_float32(dtype):
    images = jnp.asarray(normal(5, (2, 4, 4, 1)), dtype)
    gradient = gj.input_gradient(lambda x: (x**2).sum((1, 2, 3)), images)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 2.0 * images.astype(jnp.float32))
    narrow = gj.input_gradient(lambda x: (x.astype(dtype) ** 2).sum((1, 2, 3)), images)
    assert narrow.dtype == jnp.float32


def test_pool_gradient_is_the_mean_of_windows():
    gradient = normal(6, (2, 6, 4, 3))
    expected = np.zeros((2, 3, 2, 3))
    for i in range(3):
        for j in range(2):
            expected[:, i, j] = gradient[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
    np.testing.assert_allclose(gj.pool_gradient(jnp.asarray(gradient), 2), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gj.pool_gradient(jnp.asarray(gradient), 1), jnp.asarray(gradient))
    assert gj.pool_gradient(jnp.asarray(gradient, jnp.bfloat16), 2).dtype == jnp.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (1, 7), (4,)])
def test_distance_is_the_formula(kind, shape):
    g, h = normal(7, shape), normal(8, shape)
    expected = reference_distance(g, h, kind)
    value = gj.gradient_distance(jnp.asarray(g), jnp.asarray(h), kind=kind)
    assert value.shape == shape[:1] and value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        value = gj.gradient_distance(jnp.asarray(g), jnp.asarray(h), kind=kind)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_distance(kind):
    g, h = normal(9, (3, 2, 4)), normal(10, (3, 2, 4))
    with jax.enable_x64(True):
        _, (to_student, to_teacher) = distance_and_gradient(jnp.asarray(g), jnp.asarray(h), kind)
    expected = central_difference(lambda g: reference_distance(g, h, kind).sum(), g)
    np.testing.assert_allclose(to_student, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(to_teacher, 0.0)


def test_cosine_is_accurate_where_the_gradients_almost_agree():
    g = normal(11, (1, 100))
    h = g + 1e-5 * normal(12, (1, 100))
    g, h = np.float32(g), np.float32(h)
    # 1 - cos in float32 would leave no digit of a distance of about 5e-11
    np.testing.assert_allclose(
        gj.gradient_distance(jnp.asarray(g), jnp.asarray(h)), reference_distance(g, h, "cosine"), rtol=0.02
    )
    np.testing.assert_allclose(gj.gradient_distance(jnp.asarray(g), jnp.asarray(3.0 * g)), 0.0, atol=1e-12)
    np.testing.assert_allclose(gj.gradient_distance(jnp.asarray(g), jnp.asarray(-g)), 2.0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "normalized_l2"])
@pytest.mark.parametrize("student_scale", [1e-32, 1e-10, 1.0, 1e10, 1e32])
@pytest.mark.parametrize("teacher_scale", [1e-35, 1.0, 1e35])
def test_magnitude_changes_nothing_but_the_size_of_the_gradient(kind, student_scale, teacher_scale):
    g, h = np.float32(normal(13, (4, 6))), np.float32(normal(14, (4, 6)))
    value, (gradient, _) = distance_and_gradient(jnp.asarray(g) * student_scale, jnp.asarray(h) * teacher_scale, kind)
    np.testing.assert_allclose(value, reference_distance(g, h, kind).sum(), rtol=1e-5)
    expected = central_difference(lambda g: reference_distance(g, h, kind).sum(), g.astype(np.float64))
    # the derivative of a direction is its inverse length
    np.testing.assert_allclose(np.asarray(gradient, np.float64) * student_scale, expected, rtol=1e-4, atol=1e-6)


ZERO, ONE, SUBNORMAL = np.zeros((1, 4)), np.ones((1, 4)), np.full((1, 4), 1e-40)
EXTREMES = {
    "zero student": (ZERO, ONE, 1.0),
    "zero teacher": (ONE, ZERO, 1.0),
    "both zero": (ZERO, ZERO, 1.0),
    "subnormal student": (SUBNORMAL, ONE, 1.0),
    "subnormal teacher": (ONE, SUBNORMAL, 1.0),
    "equal": (ONE, ONE, 0.0),
    "opposite": (ONE, -ONE, 2.0),
    "1e-30 and 1e30": (1e-30 * ONE, 1e30 * ONE, 0.0),
    "1e30 and zero": (1e30 * ONE, ZERO, 1.0),
    "one huge entry": (np.array([[1e30, 1e-30, 0.0, 1.0]]), np.array([[1.0, 0.0, 0.0, 0.0]]), 0.0),
    "mixed batch": (np.concatenate([ZERO, ONE]), np.concatenate([ONE, ONE]), 1.0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_give_finite_values_and_gradients(name, dtype):
    if dtype == jnp.float16 and ("1e30" in name or "huge" in name):
        pytest.skip("not a float16 number")
    g, h, cosine = EXTREMES[name]
    g, h = jnp.asarray(g, dtype), jnp.asarray(h, dtype)
    for kind, expected in (("cosine", cosine), ("normalized_l2", 2.0 * cosine)):
        value, (gradient, _) = distance_and_gradient(g, h, kind)
        np.testing.assert_allclose(value, expected, atol=1e-6)
        assert np.isfinite(gradient).all()
        if "zero" in name or "subnormal" in name:
            np.testing.assert_array_equal(gradient, 0.0)
    _, (gradient, _) = distance_and_gradient(g, h, "l2")
    assert np.isfinite(gradient).all()


def test_a_non_finite_gradient_does_not_pass_for_zero():
    bad = jnp.asarray([[np.nan, 1.0], [np.inf, 1.0]])
    assert np.isnan(gj.gradient_distance(bad, jnp.ones((2, 2)))).all()
    assert np.isnan(gj.gradient_distance(jnp.ones((2, 2)), bad)).all()


def test_matching_of_linear_models_by_hand():
    # score = <w, x>: the gradients are the weights, whatever the images
    w, v = normal(15, (4, 4, 2)), normal(16, (4, 4, 2))
    images = jnp.asarray(normal(17, (3, 4, 4, 2)))
    cosine = (w * v).sum() / np.linalg.norm(w) / np.linalg.norm(v)
    unit_w, unit_v = w / np.linalg.norm(w), v / np.linalg.norm(v)
    expected = {
        "cosine": (1 - cosine, (cosine * unit_w - unit_v) / np.linalg.norm(w)),
        "l2": (((w - v) ** 2).sum(), 2 * (w - v)),
        "normalized_l2": (2 - 2 * cosine, 2 * (cosine * unit_w - unit_v) / np.linalg.norm(w)),
    }
    for kind, (value, gradient) in expected.items():

        def loss(w, kind=kind):
            return gj.gradient_matching(
                lambda x: (w * x).sum((1, 2, 3)), lambda x: (jnp.asarray(v) * x).sum((1, 2, 3)), images, kind=kind
            )

        np.testing.assert_allclose(jax.jit(loss)(jnp.asarray(w)), np.full(3, value), rtol=1e-5)
        to_student = jax.jit(jax.grad(lambda w, loss=loss: loss(w).mean()))(jnp.asarray(w))
        np.testing.assert_allclose(to_student, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_outer_gradient_through_the_inner_one_against_finite_differences(kind):
    with jax.enable_x64(True):
        images = jnp.asarray(normal(18, (3, 4, 4, 2)))
        student, teacher = parameters(19), parameters(21)

        @jax.jit
        def loss(student, teacher):
            return gj.gradient_matching(
                lambda x: network(student, x), lambda x: network(teacher, x), images, kind=kind
            ).mean()

        to_student, to_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, teacher)
        kernel = np.asarray(student[0])
        expected = central_difference(lambda k: float(loss((jnp.asarray(k), student[1]), teacher)), kernel)
        np.testing.assert_allclose(to_student[0], expected, rtol=1e-5, atol=1e-8)
        head = central_difference(lambda m: float(loss((student[0], jnp.asarray(m)), teacher)), np.asarray(student[1]))
        np.testing.assert_allclose(to_student[1], head, rtol=1e-5, atol=1e-8)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(to_teacher))


def test_pooled_matching_with_a_shared_forward_is_the_same():
    # What the objective does: jax.vjp instead of jax.grad, pooling in between, and an outer gradient through both.
    with jax.enable_x64(True):
        images = jnp.asarray(normal(23, (2, 8, 8, 2)))
        student, teacher = parameters(24), parameters(26)
        fixed = jax.jit(lambda x: gj.pool_gradient(gj.input_gradient(lambda x: network(teacher, x), x), 4))(images)

        def shared(student):
            scores, pull_back = jax.vjp(lambda x: network(student, x), images)
            (gradient,) = pull_back(jnp.ones_like(scores))
            return gj.gradient_distance(gj.pool_gradient(gradient, 4), fixed).mean()

        def separate(student):
            gradient = gj.input_gradient(lambda x: network(student, x), images)
            return gj.gradient_distance(gj.pool_gradient(gradient, 4), fixed).mean()

        for one, other in zip(
            jax.tree.leaves(jax.jit(jax.grad(shared))(student)),
            jax.tree.leaves(jax.jit(jax.grad(separate))(student)),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_jit_and_vmap():
    g, h = jnp.asarray(normal(28, (5, 3, 4))), jnp.asarray(normal(29, (5, 3, 4)))
    for kind in KINDS:
        eager = gj.gradient_distance(g, h, kind=kind)
        np.testing.assert_allclose(
            jax.jit(gj.gradient_distance, static_argnames="kind")(g, h, kind=kind), eager, rtol=1e-6
        )
        mapped = jax.vmap(lambda g, h: gj.gradient_distance(g[None], h[None], kind=kind)[0])(g, h)  # noqa: B023
        np.testing.assert_allclose(mapped, eager, rtol=1e-6)
    images = jnp.asarray(normal(30, (2, 4, 4, 2)))
    match = lambda x: gj.gradient_matching(  # noqa: E731
        lambda x: network(parameters(31), x), lambda x: network(parameters(33), x), x
    )
    np.testing.assert_allclose(jax.jit(match)(images), match(images), rtol=1e-4, atol=1e-6)


X = jnp.zeros((2, 6, 4, 3))
ILLEGAL = [
    (lambda: gj.gradient_distance(X, X, kind="l1"), "kind must be one of cosine, l2, normalized_l2, got 'l1'"),
    (lambda: gj.gradient_distance(X, X[:, :3]), r"same shape .*, got \(2, 6, 4, 3\) and \(2, 3, 4, 3\)"),
    (lambda: gj.pool_gradient(X, 4), "size must divide the height and the width .*, got 4 for 6x4"),
    (lambda: gj.pool_gradient(X, 3), "size must divide the height and the width .*, got 3 for 6x4"),
    (lambda: gj.pool_gradient(X, 0), "size must be a positive integer, got 0"),
    (
        lambda: gj.input_gradient(lambda x: x.sum(), X),
        r"score_fn must return one score per image, shape \(2,\), got shape \(\)",
    ),
    (
        lambda: gj.gradient_matching(lambda x: x.sum((1, 2)), lambda x: x.sum((1, 2, 3)), X),
        r"score_fn must return one score per image, shape \(2,\), got shape \(2, 3\)",
    ),
    (
        lambda: gj.gradient_matching(lambda x: x.sum((1, 2, 3)), lambda x: x.sum((1, 2, 3)), X, kind="L2"),
        "kind must be one of .*, got 'L2'",
    ),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(ValueError, match=message):
        jax.jit(call)()
