"""Input gradients and distances between them: closed forms, finite differences, and the outer gradient through both."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import central_difference, refused_before_tracing

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
    refused_before_tracing(call, message)


# Targets: which cotangent of the logits is pulled back


def reference_softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def test_one_hot_targets():
    z = normal(40, (2, 5, 7))
    labels = np.random.default_rng(41).integers(0, 7, (2, 5))
    for dtype in (jnp.float32, jnp.bfloat16):
        top = jax.jit(gj.top_class)(jnp.asarray(z, dtype))
        label = jax.jit(gj.label_class)(jnp.asarray(z, dtype), jnp.asarray(labels))
        assert top.dtype == label.dtype == jnp.float32
        np.testing.assert_array_equal(label, np.eye(7)[labels])
    np.testing.assert_array_equal(gj.top_class(jnp.asarray(z)), np.eye(7)[z.argmax(-1)])
    np.testing.assert_array_equal(gj.top_class(jnp.zeros(3)), [1.0, 0.0, 0.0])
    with jax.enable_x64(True):
        assert gj.top_class(jnp.asarray(z)).dtype == gj.label_class(jnp.asarray(z), jnp.asarray(labels)).dtype == "f8"


@pytest.mark.parametrize("target", [gj.label_class, gj.cross_entropy_direction])
def test_a_label_that_is_no_class_gives_nan(target):
    direction = target(jnp.zeros((4, 3)), jnp.array([-1, 0, 2, 3]))
    np.testing.assert_array_equal(np.isnan(direction).all(-1), [True, False, False, True])
    np.testing.assert_array_equal(np.isnan(direction).any(-1), [True, False, False, True])


def test_cross_entropy_direction_is_the_derivative_and_can_be_differentiated():
    z, labels = normal(42, (4, 6), 3.0), np.array([0, 5, 2, 2])
    expected = reference_softmax(z) - np.eye(6)[labels]
    with jax.enable_x64(True):
        direction, derivative, jacobian = jax.jit(
            lambda z, labels: (
                gj.cross_entropy_direction(z, labels),
                jax.grad(lambda z: gj.cross_entropy(z, labels).sum())(z),
                jax.jacrev(gj.cross_entropy_direction)(z[0], labels[0]),
            )
        )(jnp.asarray(z), jnp.asarray(labels))
        np.testing.assert_allclose(direction, expected, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(direction, derivative, atol=1e-14)
        # its own derivative is the cross-entropy's second one: diag(q) - q q^T
        q = reference_softmax(z)[0]
        np.testing.assert_allclose(jacobian, np.diag(q) - np.outer(q, q), rtol=1e-12, atol=1e-14)


def test_cross_entropy_direction_keeps_its_digits_where_the_class_is_certain():
    z = np.float32([[17.0, 0.5, 0.1], [30.0, 1.0, 0.0]])
    q = reference_softmax(z.astype(np.float64))
    others = q[:, 1:]
    expected = np.concatenate([-others.sum(-1, keepdims=True), others], -1)
    direction = gj.cross_entropy_direction(jnp.asarray(z), jnp.zeros(2, jnp.int32))
    # 1 - q in float32 would be 0 in both rows
    np.testing.assert_allclose(direction, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_direction_at_extremes(dtype):
    z = jnp.asarray([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], dtype)
    labels = jnp.zeros(3, jnp.int32)
    direction = gj.cross_entropy_direction(z, labels)
    np.testing.assert_allclose(direction, [[0.0, 0.0], [-1.0, 1.0], [-0.5, 0.5]], atol=1e-7)
    gradient = jax.grad(lambda z: (gj.cross_entropy_direction(z, labels) ** 2).sum())(z)
    assert np.isfinite(gradient).all()


def test_random_direction_is_uniform_on_the_unit_sphere():
    logits = jnp.zeros((20_000, 4))
    v = np.asarray(gj.random_direction(logits, key=jax.random.key(0)), np.float64)
    np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 1.0, rtol=1e-5)
    # E v = 0, E v v^T = I / K, E v_k^4 = 3 / (K (K + 2)); standard errors are about 0.0035, 0.002 and 0.0013
    np.testing.assert_allclose(v.mean(0), 0.0, atol=0.015)
    np.testing.assert_allclose(v.T @ v / len(v), np.eye(4) / 4, atol=0.01)
    np.testing.assert_allclose((v**4).mean(0), 3 / 24, atol=0.006)
    again, other = (gj.random_direction(logits, key=jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(again, np.float32(v))
    assert (np.abs(other - again).max(-1) > 0).all()
    assert gj.random_direction(jnp.zeros((3, 5), jnp.bfloat16), key=jax.random.key(0)).dtype == jnp.float32


# Published losses of logits functions


def logits_network(parameters, images):
    """Three classes of a small nonlinear network; dense, as XLA compiles second derivatives of products the fastest."""
    kernel, head = parameters
    return jnp.tanh(images.reshape(-1, kernel.shape[0]) @ kernel / 4) @ head


def logits_parameters(seed):
    return jnp.asarray(normal(seed, (32, 4))), jnp.asarray(normal(seed + 1, (4, 3)))


IMAGES, LABELS, KEY = normal(43, (3, 4, 4, 2)), np.array([0, 2, 1]), jax.random.key(3)
PUBLISHED = {
    "jacobian": gj.jacobian_matching,
    "sobolev": lambda *arguments: gj.sobolev_matching(*arguments, key=KEY),
    "attention": lambda *arguments: gj.gradient_attention_transfer(*arguments, jnp.asarray(LABELS)),
}


def published(name, student, teacher, images):
    return PUBLISHED[name](lambda x: logits_network(student, x), lambda x: logits_network(teacher, x), images)


def loss_and_gradients(name):
    def mean(student, teacher, images):
        values = published(name, student, teacher, images)
        return values.mean(), values

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))


def whole_jacobian(parameters, images):
    """Logits and Jacobian `[B, K, h, w, c]` by finite differences, one pixel after the other."""
    forward = jax.jit(lambda images: logits_network(parameters, images))
    logits, h = np.asarray(forward(jnp.asarray(images))), 1e-6
    jacobian = np.zeros((*logits.shape, *images.shape[1:]))
    for index in np.ndindex(*images.shape[1:]):
        up, down = images.copy(), images.copy()
        up[(slice(None), *index)] += h
        down[(slice(None), *index)] -= h
        slope = (np.asarray(forward(jnp.asarray(up))) - np.asarray(forward(jnp.asarray(down)))) / (2 * h)
        jacobian[(slice(None), slice(None), *index)] = slope
    return logits, jacobian


def test_published_losses_are_their_formulas_and_their_gradients_finite_differences():
    with jax.enable_x64(True):
        student, teacher = logits_parameters(44), logits_parameters(46)
        images = jnp.asarray(IMAGES)
        student_logits, student_jacobian = whole_jacobian(student, IMAGES)
        teacher_logits, teacher_jacobian = whole_jacobian(teacher, IMAGES)
        v = np.asarray(gj.random_direction(jnp.asarray(teacher_logits), key=KEY))

        expected = {name: np.zeros(3) for name in PUBLISHED}
        for i, label in enumerate(LABELS):
            top = teacher_logits[i].argmax()
            g, h = student_jacobian[i, top], teacher_jacobian[i, top]
            expected["jacobian"][i] = ((g / np.linalg.norm(g) - h / np.linalg.norm(h)) ** 2).sum()
            expected["sobolev"][i] = ((v[i] @ (student_jacobian[i] - teacher_jacobian[i]).reshape(3, -1)) ** 2).sum()
            g = (reference_softmax(student_logits[i]) - np.eye(3)[label]) @ student_jacobian[i].reshape(3, -1)
            h = (reference_softmax(teacher_logits[i]) - np.eye(3)[label]) @ teacher_jacobian[i].reshape(3, -1)
            expected["attention"][i] = ((g - h) ** 2).sum()

        generator, h = np.random.default_rng(48), 1e-6
        direction = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), student)
        for name, values_expected in expected.items():
            compiled = loss_and_gradients(name)
            (_, values), (to_student, to_teacher) = compiled(student, teacher, images)
            assert values.dtype == jnp.float64
            np.testing.assert_allclose(values, values_expected, rtol=1e-6, atol=1e-9)
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(to_teacher))
            slope = sum(np.vdot(g, d) for g, d in zip(to_student, direction, strict=True))
            (ahead, _), _ = compiled(jax.tree.map(lambda p, d: p + h * d, student, direction), teacher, images)
            (behind, _), _ = compiled(jax.tree.map(lambda p, d: p - h * d, student, direction), teacher, images)
            np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_losses_eager_narrow_equal_and_single(name):
    student, teacher = logits_parameters(49), logits_parameters(51)
    compiled = loss_and_gradients(name)
    images = jnp.asarray(IMAGES, jnp.float32)
    (_, values), _ = compiled(student, teacher, images)
    assert values.shape == (3,) and values.dtype == jnp.float32
    np.testing.assert_allclose(published(name, student, teacher, images), values, rtol=1e-4)
    # images are raised before the networks see them
    narrow = images.astype(jnp.bfloat16)
    from_narrow = jax.jit(partial(published, name))(student, teacher, narrow)
    (_, raised), _ = compiled(student, teacher, narrow.astype(jnp.float32))
    assert from_narrow.dtype == jnp.float32
    np.testing.assert_allclose(from_narrow, raised, rtol=1e-5)
    (_, values), (to_student, _) = compiled(student, student, images)
    np.testing.assert_allclose(values, 0.0, atol=1e-12)
    assert all(np.isfinite(leaf).all() for leaf in to_student)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_losses_at_extremes(name):
    """One image and two classes; networks without any gradient, or with logits of 1e4 and -1e4."""
    images = jnp.ones((1, 2, 2, 1))

    def network(scale, images):
        total = scale * images.sum((1, 2, 3)) / 4
        return jnp.stack([total, -total], -1)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(student, teacher, label):
        functions = partial(network, student), partial(network, teacher)
        if name == "jacobian":
            return gj.jacobian_matching(*functions, images)[0]
        if name == "sobolev":
            return gj.sobolev_matching(*functions, images, key=KEY)[0]
        return gj.gradient_attention_transfer(*functions, images, label[None])[0]

    for student, teacher, label in itertools.product([0.0, 1.0, 1e4], [0.0, 1.0, 1e4], [0, 1]):
        value, (to_student, to_teacher) = loss(jnp.float32(student), jnp.float32(teacher), jnp.int32(label))
        assert np.isfinite(value) and np.isfinite(to_student) and to_teacher == 0.0
        if name == "jacobian":
            assert value == (0.0 if student and teacher else 2.0)


def test_sobolev_is_the_frobenius_norm_over_classes_on_average():
    # z = W x: the Jacobian is W, whatever the image
    w, v = normal(53, (5, 8)), normal(54, (5, 8))
    images = jnp.ones((20_000, 2, 2, 2))
    match = lambda x: gj.sobolev_matching(  # noqa: E731
        lambda x: x.reshape(-1, 8) @ jnp.asarray(w, x.dtype).T,
        lambda x: x.reshape(-1, 8) @ jnp.asarray(v, x.dtype).T,
        x,
        key=KEY,
    )
    values = jax.jit(match)(images)
    np.testing.assert_allclose(values.mean(), ((w - v) ** 2).sum() / 5, rtol=0.02)
    assert len(np.unique(values[:100])) > 90  # a direction of its own for every image


# Contributions


def test_contribution_map_is_the_first_order_share_of_every_position():
    feature_map, gradient = normal(55, (2, 3, 4, 5)), normal(56, (2, 3, 4, 5))
    expected = np.zeros((2, 3, 4))
    for i, y, x in np.ndindex(2, 3, 4):
        expected[i, y, x] = feature_map[i, y, x] @ gradient[i, y, x]
    value = jax.jit(gj.contribution_map)(jnp.asarray(feature_map), jnp.asarray(gradient))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        a, g = jnp.asarray(feature_map), jnp.asarray(gradient)
        np.testing.assert_allclose(gj.contribution_map(a, g), expected, rtol=1e-12)
        to_map, to_gradient = jax.grad(lambda a, g: gj.contribution_map(a, g).sum(), argnums=(0, 1))(a, g)
        np.testing.assert_array_equal(to_map, g)
        np.testing.assert_array_equal(to_gradient, a)
    narrow = jnp.asarray(feature_map, jnp.bfloat16)
    assert gj.contribution_map(narrow, narrow).dtype == jnp.float32


def test_contributions_do_not_depend_on_how_the_channels_are_written():
    """Doubling every channel at half its weight, or rotating the channels, is the same network at another width."""
    feature_map, weight = normal(57, (2, 4, 4, 3)), normal(58, (3,))
    rotation, _ = np.linalg.qr(normal(59, (3, 3)))

    def contributions(feature_map, weight):
        gradient = np.broadcast_to(weight, feature_map.shape)
        return gj.contribution_map(jnp.asarray(feature_map), jnp.asarray(gradient))

    expected = contributions(feature_map, weight)
    doubled = contributions(np.concatenate([feature_map] * 2, -1), np.concatenate([weight] * 2) / 2)
    np.testing.assert_allclose(doubled, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(contributions(feature_map @ rotation, weight @ rotation), expected, rtol=1e-4, atol=1e-5)
    pooled = gj.pool_gradient(expected[..., None], 2)
    np.testing.assert_allclose(gj.gradient_distance(pooled, gj.pool_gradient(doubled[..., None], 2)), 0.0, atol=1e-6)


def two(images):
    return images.reshape(2, -1)[:, :2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gj.top_class(jnp.float32(1.0)), r"logits must have the shape \[..., K\], got \(\)"),
        (lambda: gj.random_direction(jnp.float32(1.0), key=KEY), r"logits must have the shape \[..., K\], got \(\)"),
        (lambda: gj.label_class(jnp.zeros((2, 3)), jnp.zeros(3, int)), r"labels must have .*, got \(3,\) and \(2, 3\)"),
        (lambda: gj.cross_entropy_direction(jnp.zeros((2, 3)), jnp.zeros((), int)), r"labels must .*, got \(\) and"),
        (
            lambda: gj.jacobian_matching(lambda x: x.sum((1, 2, 3)), two, X),
            r"student_fn must return logits of the shape \(2, K\), got \(2,\)",
        ),
        (
            lambda: gj.sobolev_matching(two, lambda x: two(x)[:1], X, key=KEY),
            r"teacher_fn must return logits of the shape \(2, K\), got \(1, 2\)",
        ),
        (
            lambda: gj.gradient_attention_transfer(two, lambda x: two(x)[:, :1], X, jnp.zeros(2, int)),
            r"same shape \[B, K\], got \(2, 2\) and \(2, 1\)",
        ),
        (
            lambda: gj.gradient_attention_transfer(two, two, X, jnp.zeros(3, int)),
            r"images and labels must be of the same number, got .* and \(3,\)",
        ),
        (
            lambda: gj.contribution_map(X, X[..., :1]),
            r"feature_map and gradient must have the same shape .*, got \(2, 6, 4, 3\) and \(2, 6, 4, 1\)",
        ),
    ],
)
def test_targets_and_losses_refuse_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
