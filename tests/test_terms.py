"""What each term computes from a record, against NumPy and SciPy or the loss that it calls."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import record
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax, softmax

import gompertz_jax as gj
from gompertz_jax import projections, terms

RNG = np.random.default_rng(0)


def test_cross_entropy_term_is_the_negative_log_probability_of_the_label():
    r = record()
    expected = -log_softmax(np.asarray(r.student.logits, np.float64), -1)[np.arange(3), np.asarray(r.labels)]
    np.testing.assert_allclose(terms.cross_entropy(r), expected, rtol=1e-5)


def test_soft_targets_term_is_scaled_kl_from_teacher_to_student():
    r, t = record(), 3.0
    p = softmax(np.asarray(r.teacher.logits, np.float64) / t, -1)
    q = log_softmax(np.asarray(r.student.logits, np.float64) / t, -1)
    np.testing.assert_allclose(terms.soft_targets(r, temperature=t), t**2 * (p * (np.log(p) - q)).sum(-1), rtol=1e-4)


def test_wasserstein_term_takes_maps_of_different_size_and_is_per_channel():
    r = record()
    value, health = terms.wasserstein(r, epsilon=0.05)
    x, y = (np.asarray(m["last"]).reshape(3, -1, 10) for m in (r.student_views, r.teacher_views))
    direct = gj.sinkhorn_distance(jnp.asarray(x), jnp.asarray(y), epsilon=0.05) / 10
    np.testing.assert_allclose(value, direct, rtol=1e-4)
    assert set(health) == {"converged", "iterations", "marginal_error"}
    assert np.asarray(health["converged"]).all()


def test_wasserstein_over_the_batch_is_the_assignment_of_images_whichever_is_which():
    """At small epsilon, the exact assignment between the mean vectors of the images (SciPy), for any order of them."""
    r = record()
    x, y = (np.asarray(m["last"], np.float64).mean((1, 2)) for m in (r.student_views, r.teacher_views))
    cost = ((x[:, None] - y) ** 2).sum(-1) / 10
    # A plan that is a permutation has KL(P || ab) = ln n.
    exact = cost[linear_sum_assignment(cost)].mean() + 1e-3 * cost.mean() * np.log(3)
    value, health = terms.wasserstein(r, epsilon=1e-3, cloud="batch")
    np.testing.assert_allclose(value, exact, rtol=1e-4)
    assert bool(health["converged"])
    shuffled = record(teacher_views={"last": r.teacher_views["last"][jnp.array([2, 0, 1])]})
    np.testing.assert_allclose(terms.wasserstein(shuffled, epsilon=1e-3, cloud="batch")[0], value, rtol=1e-4)
    assert abs(terms.wasserstein(shuffled)[0].mean() - terms.wasserstein(r)[0].mean()) > 1e-3
    with pytest.raises(ValueError, match="cloud must be 'image', 'batch' or 'class', got 'both'"):
        terms.wasserstein(r, cloud="both")


def test_gaussian_term_compares_moments_of_maps_of_different_size():
    r = record()
    x, y = (np.asarray(m["last"], np.float64).reshape(3, -1, 10) for m in (r.student_views, r.teacher_views))
    expected = ((x.mean(1) - y.mean(1)) ** 2 + (x.std(1) - y.std(1)) ** 2).mean(-1)
    np.testing.assert_allclose(terms.gaussian(r), expected, rtol=1e-4)


def test_gradient_term_pulls_back_the_teachers_top_class():
    """With linear networks of weights v and w, the input gradients are v and w of the teacher's top class."""
    v, w = (jnp.asarray(RNG.normal(size=(4, 4, 2, 5)), jnp.float32) for _ in range(2))
    r = record(
        student_pullback=lambda c: jnp.einsum("bk,hwck->bhwc", c, v),
        teacher_pullback=lambda c: jnp.einsum("bk,hwck->bhwc", c, w),
    )
    top = np.asarray(r.teacher.logits).argmax(-1)

    def pooled(a):
        return np.asarray(a, np.float64).reshape(2, 2, 2, 2, 2, 5).mean((1, 3)).reshape(-1, 5)[:, top]

    a, b = pooled(v), pooled(w)
    cosine = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(terms.gradient_match(r, pool=2), 1 - cosine, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(terms.gradient_match(r, pool=2, images=3), terms.gradient_match(r, pool=2))
    for images in (-1, 4):
        with pytest.raises(ValueError, match=rf"images must lie in \[0, 3\], the batch, got {images}"):
            terms.gradient_match(r, pool=2, images=images)


def test_a_term_that_needs_a_teacher_says_so():
    with pytest.raises(ValueError, match="needs a teacher"):
        terms.soft_targets(record(teacher=None))


def with_pullbacks(r, *, stages=()):
    """Linear pull-backs: the gradient at the images, or at a stage, is a fixed linear map of the cotangent."""
    rng = np.random.default_rng(3)

    def pull_back_of(outputs):
        shapes = {None: (4, 4, 2), **{stage: outputs.features[stage].shape[1:] for stage in stages}}
        maps = {stage: jnp.asarray(rng.normal(size=(*shape, 5)), jnp.float32) for stage, shape in shapes.items()}
        return lambda cotangent, stage=None: jnp.einsum("bk,hwck->bhwc", cotangent, maps[stage])

    pullbacks = {"student_pullback": pull_back_of(r.student), "teacher_pullback": pull_back_of(r.teacher)}
    return dataclasses.replace(r, **pullbacks, key=jax.random.key(5))


@pytest.mark.parametrize("target", terms.TARGETS)
def test_the_target_of_a_gradient_is_its_cotangent(target):
    r = with_pullbacks(record())
    student, teacher = (np.asarray(outputs.logits, np.float64) for outputs in (r.student, r.teacher))
    labels, eye = np.asarray(r.labels), np.eye(5)
    if target == "random":
        ours = theirs = np.asarray(gj.random_direction(r.teacher.logits, key=r.key))
    else:
        ours, theirs = {
            "top_class": (eye[teacher.argmax(-1)], eye[teacher.argmax(-1)]),
            "label": (eye[labels], eye[labels]),
            "cross_entropy": (softmax(student, -1) - eye[labels], softmax(teacher, -1) - eye[labels]),
        }[target]
    pulled = r.student_pullback(jnp.float32(ours)), r.teacher_pullback(jnp.float32(theirs))
    expected = ((np.asarray(pulled[0], np.float64) - pulled[1]) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(terms.gradient_match(r, target=target, kind="l2", pool=1), expected, rtol=1e-4)


def test_the_published_gradient_losses_are_their_targets_and_distances():
    r = with_pullbacks(record())
    for published, options in (
        (terms.jacobian, {"target": "top_class", "kind": "normalized_l2"}),
        (terms.sobolev, {"target": "random", "kind": "l2"}),
        (terms.gradient_attention, {"target": "cross_entropy", "kind": "l2"}),
    ):
        np.testing.assert_array_equal(published(r), terms.gradient_match(r, pool=1, **options))


def test_the_gradient_at_a_stage_is_compared_as_contributions_at_the_smaller_size():
    r = with_pullbacks(record(), stages=(0, 1))
    top = jnp.asarray(np.eye(5, dtype=np.float32)[np.asarray(r.teacher.logits).argmax(-1)])
    # stages 1 of both: 2x2x8 in the student, 4x4x10 in the teacher
    ours = (np.asarray(r.student.features[1], np.float64) * r.student_pullback(top, stage=1)).sum(-1)
    theirs = (np.asarray(r.teacher.features[1], np.float64) * r.teacher_pullback(top, stage=1)).sum(-1)
    theirs = theirs.reshape(3, 2, 2, 2, 2).mean((2, 4))
    a, b = ours.reshape(3, -1), theirs.reshape(3, -1)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    for stages in ((1, 1), (-1, -1)):
        value = terms.gradient_match(r, pool=1, stages=stages)
        np.testing.assert_allclose(value, 1 - cosine, rtol=1e-4, atol=1e-5)
    # another stage of each: 4x4x6 in the student, as large as the teacher's
    ours = (np.asarray(r.student.features[0], np.float64) * r.student_pullback(top, stage=0)).sum(-1)
    theirs = (np.asarray(r.teacher.features[1], np.float64) * r.teacher_pullback(top, stage=1)).sum(-1)
    expected = ((ours - theirs) ** 2).sum((1, 2))
    value = terms.gradient_match(r, pool=1, kind="l2", stages=(0, 1))
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "class"}, "target must be one of top_class, label, cross_entropy, random, got 'class'"),
        ({"stages": (1,)}, r"stages must be empty or \(student stage, teacher stage\), got \(1,\)"),
    ],
)
def test_what_a_gradient_term_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        terms.gradient_match(with_pullbacks(record()), pool=1, **options)


def views_record():
    """A record with the views of every kind of projection, as the projections themselves make them."""
    r = record()
    kinds = {
        "hint": projections.Regressor(1, 1),
        "variational": projections.VariationalRegressor(),
        "review": projections.Review(),
        "embedding": projections.Embedding(),
        "width": projections.Regressor(-1, -1, resize=False),
        "classes": projections.ClassDistances(),
    }
    params, stats = projections.init_projections(kinds, r.student, r.teacher, jax.random.key(0))
    ours, theirs, _ = projections.project(kinds, params, stats, r.student, r.teacher)
    return dataclasses.replace(r, student_views=ours, teacher_views=theirs)


def test_every_other_term_is_the_loss_of_what_it_reads():
    """Which arrays, which options, summed over which stages; the losses themselves have tests of their own."""
    r = views_record()
    names = []
    values = jax.jit(lambda: _pairs_of_values(r, names))()
    for name, (value, expected) in zip(names, values, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
        assert np.isfinite(value).all() and np.abs(value).max() > 0, name


def _pairs_of_values(r, names):
    ours, theirs, s, t = r.student_views, r.teacher_views, r.student, r.teacher
    z, w = s.logits, t.logits
    standardized = gj.standardize_logits(z), gj.standardize_logits(w)
    temperatures = (2.0, 3.0, 4.0, 5.0, 6.0)
    expected = {
        terms.decoupled: gj.decoupled_kl(z, w, r.labels),
        partial(terms.decoupled, alpha=0.5, beta=2.0, temperature=3.0, standardize=True): gj.decoupled_kl(
            *standardized, r.labels, alpha=0.5, beta=2.0, temperature=3.0
        ),
        partial(terms.soft_targets, standardize=True): gj.soft_target_kl(*standardized),
        terms.multi_temperature: gj.multi_temperature_kl(z, w),
        terms.batch_correlation: sum(gj.batch_correlation(z, w, temperature=T) for T in temperatures),
        terms.class_correlation: sum(gj.class_correlation(z, w, temperature=T) for T in temperatures),
        terms.interclass_correlation: gj.interclass_correlation(z, w),
        terms.intraclass_correlation: gj.intraclass_correlation(z, w),
        terms.hint: gj.hint_distance(ours["hint"], theirs["hint"]),
        terms.attention_transfer: gj.attention_transfer(s.features[1], t.features[1]),
        partial(terms.attention_transfer, pairs=((0, 0), (1, 0)), power=3.0): sum(
            gj.attention_transfer(s.features[i], t.features[0], power=3.0) for i in (0, 1)
        ),
        terms.neuron_selectivity: gj.neuron_selectivity(s.features[1], t.features[1]),
        terms.variational_information: gj.variational_information(*ours["variational"][0], theirs["variational"][0]),
        terms.review: sum(gj.hierarchical_context(a, b) for a, b in zip(ours["review"], theirs["review"], strict=True)),
        terms.similarity_preserving: gj.similarity_preserving(s.features[-1], t.features[-1]),
        partial(terms.similarity_preserving, student_stage=0, teacher_stage=1): gj.similarity_preserving(
            s.features[0], t.features[1]
        ),
        terms.correlation_congruence: gj.correlation_congruence(s.pooled, t.pooled),
        terms.relational_distance: gj.relational_distance(s.pooled, t.pooled),
        terms.relational_angle: gj.relational_angle(s.pooled, t.pooled),
        terms.probabilistic_transfer: gj.probabilistic_transfer(s.pooled, t.pooled),
        terms.contrastive_representation: gj.contrastive_representation(
            ours["embedding"], theirs["embedding"], labels=r.labels
        ),
        partial(terms.contrastive_representation, other_classes=False): gj.contrastive_representation(
            ours["embedding"], theirs["embedding"]
        ),
        terms.wasserstein_features: gj.wasserstein_gaussians(ours["width"], theirs["width"]),
        terms.target_cross_entropy: gj.target_cross_entropy(z, w, r.labels),
    }
    value, health = terms.wasserstein_logits(r)
    direct = gj.wasserstein_logits(z, w, theirs["classes"], labels=r.labels, temperature=8.0)
    names += [*map(str, expected), "wasserstein_logits", "its convergence"]
    values = [(term(r), value) for term, value in expected.items()]
    return [*values, (value, direct), (health["converged"], jnp.ones(3))]


def test_transport_takes_other_costs_soft_marginals_and_classes():
    r = record()
    x, y = (jnp.asarray(m["last"]).reshape(3, -1, 10) / 10**0.5 for m in (r.student_views, r.teacher_views))
    np.testing.assert_array_equal(
        terms.wasserstein(r, cost="cosine", marginal_penalty=1.0)[0],
        gj.sinkhorn_distance(x, y, cost="cosine", marginal_penalty=1.0),
    )
    by_class, _ = terms.wasserstein(r, cloud="class")
    # three labels, three images: the plan is the identity
    np.testing.assert_allclose(by_class, jnp.square(x.mean(1) - y.mean(1)).sum(-1).mean(), rtol=1e-5)
    a, b = (np.asarray(cloud, np.float64).mean(1) for cloud in (x, y))
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    by_class, _ = terms.wasserstein(r, cloud="class", cost="cosine")
    np.testing.assert_allclose(by_class, (1 - cosines).mean(), rtol=1e-5)
    for cloud in ("image", "batch", "class"):
        strict, loose = (terms.wasserstein(r, cloud=cloud, threshold=t)[1]["iterations"] for t in (1e-6, 0.5))
        assert np.all(np.asarray(loose) == 5) and np.all(np.asarray(strict) >= loose), cloud
        assert cloud == "class" or np.all(np.asarray(strict) > 5)
    with pytest.raises(ValueError, match="cloud='class' takes neither debiased nor marginal_penalty"):
        terms.wasserstein(r, cloud="class", debiased=True)
    with pytest.raises(ValueError, match="cloud='class' takes neither debiased nor marginal_penalty"):
        terms.wasserstein(r, cloud="class", marginal_penalty=1.0)


def test_labels_are_smoothed_by_the_term_and_by_both_objectives():
    r = record()
    log_p = log_softmax(np.asarray(r.student.logits, np.float64), -1)
    expected = -((0.7 * np.eye(5)[np.asarray(r.labels)] + 0.3 / 5) * log_p).sum(-1)
    for objective in (gj.student_alone(label_smoothing=0.3), gj.gompertz_objective(9, label_smoothing=0.3)):
        np.testing.assert_allclose(objective.terms[0].loss(r), expected, rtol=1e-5)


def test_every_option_reaches_its_loss():
    r, last = views_record(), record()
    views = {
        f"{side}_views": getattr(r, f"{side}_views") | getattr(last, f"{side}_views") for side in ("student", "teacher")
    }
    r = dataclasses.replace(r, labels=jnp.array([0, 1, 1]), **views)
    several = (terms.multi_temperature, terms.batch_correlation, terms.class_correlation)
    correlations = (terms.interclass_correlation, terms.intraclass_correlation)
    options = [
        (terms.cross_entropy, {"label_smoothing": 0.3}),
        *((term, {"temperatures": (1.5,)}) for term in several),
        *((term, {"temperature": 2.0}) for term in correlations),
        *((term, {"standardize": True}) for term in (*several, *correlations)),
        (terms.correlation_congruence, {"gamma": 1.0}),
        (terms.correlation_congruence, {"order": 3}),
        (terms.contrastive_representation, {"temperature": 0.3}),
        (terms.wasserstein, {"debiased": True}),
        (terms.wasserstein, {"epsilon": 0.5}),
        (terms.wasserstein_features, {"mean_weight": 1.0}),
        (terms.wasserstein_features, {"grid": 2}),
        (terms.wasserstein_logits, {"temperature": 2.0}),
        (terms.wasserstein_logits, {"epsilon": 0.5}),
    ]

    def mean(value):
        return (value[0] if isinstance(value, tuple) else value).mean()

    values = jax.jit(lambda: [(mean(term(r)), mean(term(r, **option))) for term, option in options])()
    for (term, option), (usual, other) in zip(options, values, strict=True):
        assert abs(other - usual) > 1e-3 * abs(usual), (term.__name__, option)


def test_a_pool_that_does_not_divide_the_images_is_told_by_its_name():
    pull_back = lambda cotangent, stage=None: jnp.ones((3, 6, 5, 2))  # noqa: E731
    r = record(student_pullback=pull_back, teacher_pullback=pull_back)
    with pytest.raises(ValueError, match="pool = 4 must divide the gradients' 6x5; 1 always does"):
        terms.gradient_match(r)
