"""Batch-relational losses against loops in float64 NumPy, finite differences, invariances, and extremes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
from helpers import central_difference, refused_before_tracing

import gompertz_jax as gj

LABELS = [0, 1, 0, 2, 1]


def normal(seed, shape, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def cosine(x, y):
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def huber(x):
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def pairwise(function, x):
    return np.array([[function(a, b) for b in x] for a in x])


def reference_intraclass_correlation(student, teacher, temperature=4.0):
    q, p = (scipy.special.softmax(z / temperature, axis=-1) for z in (student, teacher))
    return temperature**2 * np.array([1 - np.corrcoef(q[:, k], p[:, k])[0, 1] for k in range(q.shape[1])])


def reference_batch_correlation(student, teacher, temperature=4.0):
    q, p = (scipy.special.softmax(z / temperature, axis=-1) for z in (student, teacher))
    return ((pairwise(np.dot, q) - pairwise(np.dot, p)) ** 2).sum(1)


def reference_class_correlation(student, teacher, temperature=4.0):
    q, p = (scipy.special.softmax(z / temperature, axis=-1) for z in (student, teacher))
    return ((pairwise(np.dot, q.T) - pairwise(np.dot, p.T)) ** 2).sum(1)


def reference_similarity_preserving(student, teacher):
    rows = []
    for x in (student, teacher):
        gram = pairwise(np.dot, x.reshape(len(x), -1))
        rows.append(gram / np.sqrt((gram**2).sum(1, keepdims=True)))
    return ((rows[0] - rows[1]) ** 2).sum(1) / len(student)


def reference_correlation_congruence(student, teacher, gamma=0.4, order=2):
    kernels = []
    for x in (student, teacher):
        cosines = pairwise(cosine, x.reshape(len(x), -1))
        kernels.append(
            sum(math.exp(-2 * gamma) * (2 * gamma * cosines) ** p / math.factorial(p) for p in range(order + 1))
        )
    return ((kernels[0] - kernels[1]) ** 2).mean(1)


def reference_relational_distance(student, teacher):
    distances = []
    for x in (student, teacher):
        condensed = scipy.spatial.distance.pdist(x.reshape(len(x), -1))
        distances.append(scipy.spatial.distance.squareform(condensed) / condensed.mean())
    return np.vectorize(huber)(distances[0] - distances[1]).mean(1)


def reference_relational_angle(student, teacher):
    def angle(x, i, j, k):
        return 0.0 if i in (j, k) else cosine(x[j] - x[i], x[k] - x[i])

    s, t = (x.reshape(len(x), -1) for x in (student, teacher))
    every = range(len(s))
    return np.array(
        [np.mean([huber(angle(s, i, j, k) - angle(t, i, j, k)) for j in every for k in every]) for i in every]
    )


def reference_probabilistic_transfer(student, teacher):
    q, p = ((pairwise(cosine, x.reshape(len(x), -1)) + 1) / 2 for x in (student, teacher))
    q, p = (x / x.sum(1, keepdims=True) for x in (q, p))
    return (p * np.log((p + 1e-7) / (q + 1e-7))).mean(1)


def reference_contrastive_representation(student, teacher, labels=None, temperature=0.07, constant=None):
    """By probabilities and loops over anchors; `constant` is c, measured where it is not given."""
    batch = len(student)
    labels = range(batch) if labels is None else labels
    negatives = [[j for j in range(batch) if labels[j] != labels[i]] for i in range(batch)]
    scores = np.array([[math.exp(cosine(s, t) / temperature) for t in teacher] for s in student])
    if constant is None:
        constant = np.mean([scores[i, j] for i in range(batch) for j in negatives[i]])
    values = []
    for i in range(batch):
        count = len(negatives[i])
        h = scores / (scores + count * constant)
        values.append(-2 * math.log(h[i, i]) - sum(math.log(1 - h[i, j]) + math.log(1 - h[j, i]) for j in negatives[i]))
    return np.array(values)


LOGITS = {
    "intraclass_correlation": reference_intraclass_correlation,
    "batch_correlation": reference_batch_correlation,
    "class_correlation": reference_class_correlation,
}
FEATURES = {
    "similarity_preserving": reference_similarity_preserving,
    "correlation_congruence": reference_correlation_congruence,
    "relational_distance": reference_relational_distance,
    "relational_angle": reference_relational_angle,
    "probabilistic_transfer": reference_probabilistic_transfer,
}
REFERENCES = LOGITS | FEATURES | {"contrastive_representation": reference_contrastive_representation}


def example(name, seed=0):
    """A pair of arguments; widths differ where they may."""
    if name in LOGITS:
        return normal(seed, (5, 7), 3.0), normal(seed + 1, (5, 7), 3.0)
    if name in FEATURES:
        return normal(seed, (5, 4)), normal(seed + 1, (5, 2, 3))
    return normal(seed, (5, 4)), normal(seed + 1, (5, 4))


def as_teacher(name, student):
    """The student as the teacher it would agree with; more dimensions that are zero change no relation."""
    return np.pad(student, ((0, 0), (0, 2))).reshape(-1, 2, 3) if name in FEATURES else student


def with_gradients(function):
    def loss(student, teacher):
        values = function(student, teacher)
        return values.sum(), values

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


# (gradients, values), compiled once per function, shape and dtype.
COMPILED = {name: with_gradients(getattr(gj, name)) for name in REFERENCES}


def values(name, student, teacher):
    return COMPILED[name](jnp.asarray(student), jnp.asarray(teacher))[1]


def gradients(name, student, teacher):
    return COMPILED[name](jnp.asarray(student), jnp.asarray(teacher))[0]


@pytest.mark.parametrize("name", REFERENCES)
def test_the_value_is_the_formula(name):
    student, teacher = example(name)
    expected = REFERENCES[name](student, teacher)
    value = values(name, student, teacher)
    assert value.shape == ((7,) if name in ("intraclass_correlation", "class_correlation") else (5,))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=3e-5, atol=1e-7)
    eager = getattr(gj, name)(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(eager, value, rtol=2e-5, atol=1e-7)
    with jax.enable_x64(True):
        value = values(name, student, teacher)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_gradient_is_the_finite_difference_and_only_contrastive_teachers_have_one(name):
    student, teacher = example(name, seed=10)
    constants = {}
    if name == "contrastive_representation":
        pairs = [math.exp(cosine(s, t) / 0.07) for i, s in enumerate(student) for j, t in enumerate(teacher) if i != j]
        constants["constant"] = np.mean(pairs)
    reference = lambda s, t: REFERENCES[name](s, t, **constants).sum()  # noqa: E731
    with jax.enable_x64(True):
        to_student, to_teacher = (np.asarray(gradient) for gradient in gradients(name, student, teacher))
    expected = central_difference(lambda x: reference(x, teacher), student)
    np.testing.assert_allclose(to_student, expected, rtol=1e-5, atol=1e-7)
    if name == "contrastive_representation":
        expected = central_difference(lambda x: reference(student, x), teacher)
        np.testing.assert_allclose(to_teacher, expected, rtol=1e-5, atol=1e-7)
        assert np.abs(to_teacher).max() > 0.1
    else:
        np.testing.assert_array_equal(to_teacher, 0.0)


def test_options_against_the_references():
    logits, features = example("class_correlation"), example("correlation_congruence")
    embeddings = example("contrastive_representation")

    @jax.jit
    def results(logits, features, embeddings, temperature):
        return [
            *(getattr(gj, name)(*logits, temperature=temperature) for name in LOGITS),
            gj.correlation_congruence(*features, gamma=1.3, order=4),
            gj.contrastive_representation(*embeddings, labels=jnp.asarray(LABELS), temperature=0.3),
        ]

    expected = [
        *(LOGITS[name](*logits, 1.5) for name in LOGITS),
        reference_correlation_congruence(*features, 1.3, 4),
        reference_contrastive_representation(*embeddings, LABELS, 0.3),
    ]
    with jax.enable_x64(True):
        for value, formula in zip(results(logits, features, embeddings, 1.5), expected, strict=True):
            np.testing.assert_allclose(value, formula, rtol=1e-11, atol=1e-14)


def test_the_kernel_of_high_order_is_gaussian():
    student, teacher = normal(2, (6, 4)), normal(3, (6, 9))
    kernels = []
    for x in (student, teacher):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        kernels.append(np.exp(-0.4 * scipy.spatial.distance.cdist(unit, unit, "sqeuclidean")))
    value = jax.jit(lambda s, t: gj.correlation_congruence(s, t, order=12))(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(value, ((kernels[0] - kernels[1]) ** 2).mean(1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle"])
def test_a_batch_of_more_than_one_block_of_anchors(name):
    student, teacher = normal(4, (19, 3)), normal(5, (19, 2))
    with jax.enable_x64(True):
        (gradient, _), value = COMPILED[name](jnp.asarray(student), jnp.asarray(teacher))
        gradient = np.asarray(gradient)
    np.testing.assert_allclose(value, FEATURES[name](student, teacher), rtol=1e-11)
    direction = normal(6, student.shape)
    up, down = (FEATURES[name](student + h * direction, teacher).sum() for h in (1e-6, -1e-6))
    np.testing.assert_allclose((gradient * direction).sum(), (up - down) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "width"), [("relational_distance", 256), ("relational_angle", 8)])
def test_the_derivative_holds_a_few_anchors_in_memory_and_not_the_batch(name, width):
    batch = 128
    vectors = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    loss = lambda s, t: getattr(gj, name)(s, t).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(vectors, vectors).compile()
    of_all_anchors = 4 * batch * (batch * width if name == "relational_distance" else batch * batch)
    assert compiled.memory_analysis().temp_size_in_bytes < of_all_anchors / 2


@pytest.mark.parametrize("name", REFERENCES)
def test_the_order_of_the_images_changes_nothing_and_networks_that_agree_have_no_loss(name):
    student, teacher = example(name)
    order = np.array([3, 0, 4, 1, 2])
    value, shuffled = values(name, student, teacher), values(name, student[order], teacher[order])
    per_class = name in ("intraclass_correlation", "class_correlation")
    np.testing.assert_allclose(shuffled, value if per_class else value[order], rtol=1e-4, atol=1e-6)
    if name != "contrastive_representation":
        np.testing.assert_allclose(values(name, student, as_teacher(name, student)), 0.0, atol=1e-7)
        np.testing.assert_allclose(gradients(name, student, as_teacher(name, student))[0], 0.0, atol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_features_may_be_scaled_and_rotated(name):
    student, teacher = example(name)
    rotation = np.linalg.qr(normal(7, (4, 4)))[0]
    value = values(name, student, teacher)
    np.testing.assert_allclose(values(name, 3.0 * student @ rotation, 0.01 * teacher), value, rtol=1e-4, atol=1e-6)
    for factor in (1e-18, 1e25):
        np.testing.assert_allclose(values(name, factor * student, teacher), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle"])
def test_relations_of_points_ignore_a_shift(name):
    student, teacher = example(name)
    value = values(name, student, teacher)
    np.testing.assert_allclose(values(name, student + 5.0, teacher), value, rtol=1e-4, atol=1e-6)


def test_the_contrastive_loss_of_what_is_not_learned_yet_and_of_what_is():
    unlearned = values("contrastive_representation", np.ones((5, 4)), np.ones((5, 4)))
    np.testing.assert_allclose(unlearned, 2 * (math.log(5) + 4 * math.log(5 / 4)), rtol=1e-5)
    student = example("contrastive_representation")[0]
    matched, mixed = (values("contrastive_representation", student, t) for t in (student, np.roll(student, 1, 0)))
    assert matched.max() < unlearned.min() < mixed.min()


def test_images_of_the_same_class_do_not_repel_each_other_with_labels():
    student, teacher = (jnp.asarray(x) for x in example("contrastive_representation"))
    loss = lambda t, labels: gj.contrastive_representation(student, t, labels=labels, temperature=1.0)  # noqa: E731
    value_and_jacobian = jax.jit(lambda t, labels: (loss(t, labels), jax.jacrev(loss)(t, labels)))
    value, jacobian = value_and_jacobian(teacher, jnp.arange(5))
    np.testing.assert_allclose(value, loss(teacher, None), rtol=1e-5)
    assert np.abs(jacobian[0, 2]).max() > 0.01
    _, jacobian = value_and_jacobian(teacher, jnp.asarray(LABELS))
    assert np.abs(jacobian[0, 1]).max() > 0.01
    np.testing.assert_array_equal(jacobian[0, 2], 0.0)
    for part in value_and_jacobian(teacher, jnp.zeros(5, int)):  # no negatives
        np.testing.assert_array_equal(part, 0.0)


def extremes(name):
    student, teacher = example(name)
    if name in LOGITS:
        large = np.zeros((5, 7))
        large[np.arange(5), np.arange(5)], large[1, 3] = 1e4, -1e4
        yield "logits of 1e4", large, -large
        yield "a certain teacher", student, large
        yield "a certain student", large, teacher
        yield "logits of 1e30", 1e26 * large, large[::-1]
    else:
        yield "1e25", 1e25 * student, teacher
        yield "1e-25", 1e-25 * student, 1e-25 * teacher
    yield "a zero row", student * np.array([0.0, 1, 1, 1, 1])[:, None], teacher
    yield "zeros", 0.0 * student, teacher
    yield "a teacher of zeros", student, 0.0 * teacher
    yield "all equal", np.full_like(student, 0.1), np.full_like(teacher, 0.3)
    yield "duplicates", student[[0, 0, 1, 2, 0]], teacher[[1, 2, 1, 0, 1]]
    yield "opposite", np.stack([student[0], -student[0]])[[0, 1, 0, 1, 0]], teacher
    yield "an opposite teacher", student, np.stack([teacher[0], -teacher[0]])[[0, 1, 0, 1, 0]]
    yield "equal", student, as_teacher(name, student)
    yield "opposite networks", student, as_teacher(name, -student)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", REFERENCES)
def test_extremes_give_finite_values_and_gradients(name, dtype):
    cases = list(extremes(name))
    if dtype == jnp.float32:
        student, teacher = example(name)
        cases.append(("one image", student[:1], teacher[:1]))
        if name in LOGITS:
            cases += [("two classes", student[:, :2], teacher[:, :2]), ("one class", student[:, :1], teacher[:, :1])]
    for case, student, teacher in cases:
        grads, value = COMPILED[name](jnp.asarray(student, dtype), jnp.asarray(teacher, dtype))
        assert value.dtype == jnp.float32 and np.isfinite(value).all(), case
        assert all(np.isfinite(gradient.astype(jnp.float32)).all() for gradient in grads), case


@pytest.mark.parametrize("name", FEATURES)
def test_what_has_no_direction_has_no_gradient(name):
    student, teacher = example(name)
    nowhere = np.zeros_like(student) + (student[0] if name.startswith("relational") else 0.0)
    np.testing.assert_array_equal(gradients(name, nowhere, teacher)[0], 0.0)


@pytest.mark.parametrize("name", REFERENCES)
def test_bfloat16_is_raised_before_anything_is_computed(name):
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in example(name))
    expected = values(name, student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(values(name, student, teacher), expected, rtol=1e-5, atol=1e-7)


X, Y = jnp.ones((2, 3)), jnp.ones((3, 3))
NO_PAIR = r"features \[B, ...\] of the same images, not empty, got \(2, 3\) and \(3, 3\)"
ILLEGAL = [
    *((lambda f=f: getattr(gj, f)(X, Y), NO_PAIR) for f in FEATURES),
    (
        lambda: gj.similarity_preserving(X[:, :0], X),
        r"student_features must be .*, not empty, got .* \(2, 0\)",
    ),
    *((lambda f=f: getattr(gj, f)(X, Y), r"same shape .*, got \(2, 3\) and \(3, 3\)") for f in LOGITS),
    *((lambda f=f: getattr(gj, f)(X[0], X[0]), r"student_logits must .* \[B, K\], got \(3,\)") for f in LOGITS),
    *((lambda f=f: getattr(gj, f)(X, X, temperature=0.0), "temperature must be .*, got 0.0") for f in LOGITS),
    (lambda: gj.correlation_congruence(X, X, gamma=-1.0), "gamma must be a positive .*, got -1.0"),
    (lambda: gj.correlation_congruence(X, X, order=0), "order must be a positive integer, got 0"),
    (lambda: gj.contrastive_representation(X, X[:, :2]), r"same shape \[B, d\].*, got \(2, 3\) and \(2, 2\)"),
    (lambda: gj.contrastive_representation(X[0], X[0]), r"same shape \[B, d\].*, got \(3,\) and \(3,\)"),
    (lambda: gj.contrastive_representation(X, X, labels=jnp.zeros(3, int)), r"labels must .* \(2,\), got \(3,\)"),
    (lambda: gj.contrastive_representation(X, X, temperature=np.nan), "temperature must be .*, got nan"),
]


@pytest.mark.parametrize(("call", "message"), ILLEGAL)
def test_illegal_arguments_raise_before_tracing(call, message):
    refused_before_tracing(call, message)
